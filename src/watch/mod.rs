//! Watches: every change to the key space is delivered to the streams that watch the changed keys.
//!
//! ```text
//! apply thread ─ append ─▶ ring ◀─ read ─ hub ─ deliver ─▶ outbox ─ take ─▶ stream's task
//!                publish head ▲             │ ▲
//!                                       Job ▼ │ Replayed
//!                                    history thread ─ read ─▶ history table
//! ```
//!
//! The apply thread appends events to the [`ring`], publishes the head, and never waits. The [`hub`], which has its own thread,
//! reads the ring up to the published head, looks up which watches match each event ([`matcher`]), encodes each event once
//! ([`frame`]) and puts it into the [`outbox`] of each stream concerned. A stream's task takes responses as fast as its client
//! reads them. If the client is too slow, the watches of its stream are reduced to positions in the history, which cost
//! nothing more; they catch up ([`replay`]) when the outbox has capacity again.
//!
//! INVARIANTS
//! * A watch receives each event that it selects once, in order, and the events of a revision together.
//! * It receives no event before the response to its creation, and none after the response to its cancellation.
//! * A progress notification follows every event up to its revision.
//! * Writers never wait for watches. The bytes that are pending for one stream are bounded, as are those for all streams
//!   together, and so is the amount of history that one pass of catching up reads.
//! * A stream's task knows how many bytes its watches and its outbox hold ([`Subscriber::held`]).

pub mod frame;
pub mod hub;
mod inputs;
mod lagging;
pub mod matcher;
pub mod outbox;
pub mod replay;
mod revision;
pub mod ring;
pub mod slab;
pub mod stream;
pub mod tree;

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    task::Waker,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use prometheus::{IntCounter, IntGauge};
use rand::RngExt;

use crate::{
    error::Halt,
    inbox::Inbox,
    metrics::METRICS,
    mvcc::{Event, Reader},
};
pub use hub::{Create, HubCore, Input, Request, StepResult};
pub use inputs::NO_WATCH_ID;
use outbox::{Backlog, Outbox};
pub use outbox::{Events, Frames, Response};
use replay::Job;
use ring::Ring;
pub use stream::{WatchOptions, watch_cost};

/// The limits and intervals that can be configured.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The maximum memory of the recent events in the ring.
    pub ring_bytes: usize,
    /// The maximum bytes of pending responses of one stream; a small allowance for each of its watches is added.
    pub pending_bytes: usize,
    /// The maximum bytes of pending responses of all streams together. Beyond it, more is sent only to streams that have less
    /// than a fair share pending.
    pub all_pending_bytes: usize,
    /// The interval of progress notifications, for watches that ask for them. Each stream adds up to a tenth at random.
    pub progress_interval: Duration,
    /// The maximum number of watches of one stream.
    pub watches_per_stream: usize,
    /// The maximum number of watches of all streams.
    pub watches: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ring_bytes: 8 << 20,
            pending_bytes: 1 << 20,
            all_pending_bytes: 128 << 20,
            progress_interval: Duration::from_mins(10),
            watches_per_stream: 1_000_000,
            watches: 10_000_000,
        }
    }
}

/// The metrics that the hub updates.
#[derive(Debug, Clone)]
pub struct Gauges {
    pub streams: IntGauge,
    pub watches: IntGauge,
    /// Watches that are not synced.
    pub lagging: IntGauge,
    /// Events in the outboxes.
    pub pending: IntGauge,
    /// Events that were taken out of an outbox.
    pub events: IntCounter,
}

impl Gauges {
    /// The metrics that this process reports.
    #[must_use]
    pub fn of_process() -> Self {
        Self {
            streams: METRICS.watch_streams.clone(),
            watches: METRICS.watchers.clone(),
            lagging: METRICS.slow_watchers.clone(),
            pending: METRICS.pending_events.clone(),
            events: METRICS.events.clone(),
        }
    }

    /// Metrics that are not reported, for tests.
    #[must_use]
    pub fn detached() -> Self {
        let gauge = || IntGauge::new("detached", "Reported nowhere.").expect("the name is a constant");
        let counter = IntCounter::new("detached", "Reported nowhere.").expect("the name is a constant");
        Self { streams: gauge(), watches: gauge(), lagging: gauge(), pending: gauge(), events: counter }
    }
}

/// The apply thread's handle: it appends events and wakes the hub.
pub struct Publisher {
    ring: Arc<Mutex<Ring>>,
    inbox: Arc<Inbox<Input>>,
    ring_bytes: usize,
}

impl Publisher {
    /// Makes events deliverable as soon as `head` is published.
    pub fn append(&mut self, events: Vec<Event>, head: i64) {
        if !events.is_empty() {
            self.ring.lock().append(events, head);
        }
    }

    /// Notifies the hub that there is something to deliver.
    pub fn wake(&self) {
        self.inbox.notify();
    }

    /// Replaces the key space by a later state of it, when a snapshot has been installed. Must be called before the first event
    /// after the snapshot is appended.
    pub fn restore(&mut self, reader: Reader) {
        *self.ring.lock() = Ring::new(reader.head(), self.ring_bytes);
        send_input(&self.inbox, Input::Restored(reader));
    }
}

/// Opens watch streams, and owns the threads that deliver to them.
pub struct Hub {
    ring: Arc<Mutex<Ring>>,
    inbox: Arc<Inbox<Input>>,
    settings: Settings,
    gauges: Gauges,
    backlog: Arc<Backlog>,
    streams: AtomicU64,
    threads: Mutex<Option<Threads>>,
}

/// The hub's thread and the history thread.
struct Threads {
    handles: [JoinHandle<()>; 2],
    /// Disconnected once both threads have ended.
    running: mpsc::Receiver<Infallible>,
}

/// How long [`Hub::lag`] waits for the hub's thread.
const LAG_TIMEOUT: Duration = Duration::from_millis(200);
/// How long [`Hub::stop`] waits for the threads to end.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

impl Hub {
    /// Creates a hub and starts its threads.
    #[must_use]
    pub fn start(reader: Reader, settings: Settings) -> (Publisher, Arc<Self>) {
        let (publisher, hub, core) = Self::assemble(reader, settings, Gauges::of_process());
        let (jobs, queue) = mpsc::channel();
        let (runs, running) = mpsc::channel();
        let inbox = hub.inbox.clone();
        let deliver = spawn("watch", runs.clone(), move || run(core, &inbox, &jobs));
        let inbox = hub.inbox.clone();
        let read = spawn("watch-history", runs, move || run_jobs(&queue, &inbox));
        *hub.threads.lock() = Some(Threads { handles: [deliver, read], running });
        (publisher, hub)
    }

    /// Creates a hub without threads; the caller steps its core, for example with [`Hub::settle`].
    #[must_use]
    pub fn assemble(reader: Reader, settings: Settings, gauges: Gauges) -> (Publisher, Arc<Self>, HubCore) {
        let ring = Arc::new(Mutex::new(Ring::new(reader.head(), settings.ring_bytes)));
        let inbox = Arc::new(Inbox::default());
        let publisher = Publisher { ring: ring.clone(), inbox: inbox.clone(), ring_bytes: settings.ring_bytes };
        let backlog = Arc::new(Backlog::default());
        let core = HubCore::new(reader, ring.clone(), backlog.clone(), settings, gauges.clone());
        let streams = AtomicU64::new(0);
        let hub = Self { ring, inbox, settings, gauges, backlog, streams, threads: Mutex::default() };
        (publisher, Arc::new(hub), core)
    }

    /// The memory of the events in the ring.
    #[must_use]
    pub fn ring_bytes(&self) -> usize {
        self.ring.lock().bytes()
    }

    /// The bytes of all pending responses; what several streams share is counted for each of them.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.backlog.bytes()
    }

    /// How many revisions up to `head` the watch that is furthest behind has yet to be sent; zero also if the hub does not answer
    /// soon. This waits for the hub's thread.
    #[must_use]
    pub fn lag(&self, head: i64) -> i64 {
        let (result, oldest) = mpsc::channel();
        send_input(&self.inbox, Input::OldestNeeded(Box::new(move |revision| _ = result.send(revision))));
        let oldest = oldest.recv_timeout(LAG_TIMEOUT).ok().flatten();
        oldest.map_or(0, |revision| (head + 1).saturating_sub(revision).max(0))
    }

    /// Drains the inbox: the inputs for the next [`HubCore::step`].
    pub fn drain_inputs(&self, into: &mut Vec<Input>) {
        self.inbox.drain(into);
    }

    /// Steps the core until nothing is left to do at time `now`. Returns the time at which there will be something to do.
    pub fn settle(&self, core: &mut HubCore, now: Duration) -> Result<Option<Duration>, Halt> {
        let mut inputs = Vec::new();
        loop {
            self.inbox.drain(&mut inputs);
            let result = core.step(now, &mut inputs)?;
            if let Some(job) = result.job {
                inputs.push(Input::Replayed(job.run()?));
            } else if !result.busy && !self.inbox.has_messages() {
                return Ok(result.until);
            }
        }
    }

    /// Opens a watch stream.
    #[must_use]
    pub fn open(&self) -> Subscriber {
        let interval = self.settings.progress_interval;
        self.open_with_period(interval + interval.mul_f64(rand::rng().random_range(0.0..0.1)))
    }

    /// Opens a stream whose progress notifications, for watches that ask for them, are `period` apart.
    #[must_use]
    pub fn open_with_period(&self, period: Duration) -> Subscriber {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        let outbox = Arc::new(Outbox::new(self.backlog.clone(), self.gauges.clone()));
        send_input(&self.inbox, Input::Open { stream, outbox: outbox.clone(), period });
        Subscriber { inbox: self.inbox.clone(), stream, outbox, sent: 0, handled: 0, answers: 0 }
    }

    /// Stops the hub and ends all streams. Threads that are busy for longer than `STOP_TIMEOUT` are not waited for: nothing
    /// that they do outlives the process.
    pub fn stop(&self) {
        self.inbox.close();
        let Some(Threads { handles, running }) = self.threads.lock().take() else { return };
        if let Err(mpsc::RecvTimeoutError::Timeout) = running.recv_timeout(STOP_TIMEOUT) {
            return tracing::warn!(timeout = ?STOP_TIMEOUT, "the watch threads are still busy; stopping without them");
        }
        for thread in handles {
            // If a thread panics, the process aborts, so this never fails.
            let _ = thread.join();
        }
    }
}

/// The maximum number of a stream's requests that the hub has not handled, plus responses to requests that are not taken yet.
const MAX_OPEN_REQUESTS: u64 = 64;

/// The handle of a watch stream, owned by the stream's task. Dropping it ends the stream and all its watches.
pub struct Subscriber {
    inbox: Arc<Inbox<Input>>,
    stream: u64,
    outbox: Arc<Outbox>,
    sent: u64,
    handled: u64,
    answers: usize,
}

/// The hub has stopped, so the stream has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped;

impl Subscriber {
    /// Whether [`Subscriber::send_request`] may be called now. If not, responses have to be taken first.
    #[must_use]
    pub fn can_send_request(&self) -> bool {
        let unhandled = self.sent - self.handled;
        unhandled + (self.answers as u64) < MAX_OPEN_REQUESTS
    }

    /// Sends a request to the hub. Requests are handled in order.
    pub fn send_request(&mut self, request: Request) {
        self.sent += 1;
        if let Request::Create(create) = &request {
            self.outbox.charge_watch(watch_cost(&create.interval));
        }
        send_input(&self.inbox, Input::Request { stream: self.stream, request });
    }

    /// The bytes held for this stream: its watches, including those that were just requested, and its pending responses.
    #[must_use]
    pub fn held(&self) -> usize {
        self.outbox.held()
    }

    /// Takes some responses. If there are none, the waker is woken when there are, or when more requests may be sent.
    pub fn take(&mut self, into: &mut VecDeque<Response>, waker: &Waker) -> Result<(), Stopped> {
        let taken = self.outbox.take(into, waker);
        self.handled = taken.handled;
        self.answers = taken.answers;
        if taken.notify_hub {
            send_input(&self.inbox, Input::HasCapacity { stream: self.stream });
        }
        if taken.stopped { Err(Stopped) } else { Ok(()) }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.outbox.close();
        send_input(&self.inbox, Input::Close { stream: self.stream });
    }
}

/// Sends an input to the hub. If the hub has stopped, the input is dropped, and a stream that it would open is closed.
fn send_input(inbox: &Inbox<Input>, input: Input) {
    if let Err(Input::Open { outbox, .. }) = inbox.send(input) {
        outbox.close();
    }
}

/// The body of the hub's thread.
fn run(mut core: HubCore, inbox: &Inbox<Input>, jobs: &mpsc::Sender<Job>) -> Result<(), Halt> {
    let started = Instant::now();
    let mut inputs = Vec::new();
    let mut result = StepResult::default();
    loop {
        let until = if result.busy { Some(started) } else { result.until.map(|until| started + until) };
        let is_open = if core.has_synced_watches() {
            inbox.receive_or_notified(&mut inputs, || core.has_undelivered(), until)
        } else {
            inbox.receive(&mut inputs, until)
        };
        // Inputs that are not handled yet need not be: all streams end now.
        if !is_open || inbox.is_closed() {
            core.stop(&mut inputs);
            return Ok(());
        }
        result = core.step(started.elapsed(), &mut inputs)?;
        if let Some(job) = result.job.take() {
            jobs.send(job).expect("the history thread ends after this one");
        }
    }
}

/// The body of the history thread.
fn run_jobs(queue: &mpsc::Receiver<Job>, inbox: &Inbox<Input>) -> Result<(), Halt> {
    for job in queue {
        send_input(inbox, Input::Replayed(job.run()?));
    }
    Ok(())
}

/// Spawns a thread. If it fails or panics, the process aborts.
fn spawn(
    name: &'static str,
    runs: mpsc::Sender<Infallible>,
    run: impl FnOnce() -> Result<(), Halt> + Send + 'static,
) -> JoinHandle<()> {
    let body = move || {
        let _runs = runs; // Dropped when this thread ends.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        match outcome {
            Ok(Ok(())) => return,
            Ok(Err(halt)) => tracing::error!(thread = name, error = %halt, "fatal error in a watch thread, aborting"),
            Err(_) => tracing::error!(thread = name, "a watch thread panicked, aborting"),
        }
        std::process::abort();
    };
    thread::Builder::new().name(name.into()).spawn(body).expect("the system can start a few more threads")
}
