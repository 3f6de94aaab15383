//! Watchers hear every change.
//!
//! ```text
//! apply thread ─ append ─▶ ring ◀─ read ─ hub ─ deliver ─▶ outbox ─ take ─▶ stream's task
//!                publish head ▲             │ ▲
//!                                       Job ▼ │ Replayed
//!                                         historian ─ read ─▶ history table
//! ```
//!
//! The apply thread leaves events in the [`ring`], publishes the head, and never waits. The [`hub`], a thread of its own,
//! takes the ring up to the published head, finds out who watches what ([`interest`]), encodes each event once ([`frame`])
//! and puts it into the [`outbox`] of each stream concerned. A stream's task takes responses out as fast as its client
//! listens. If it does not, its watches become positions in history and cost nothing more; they catch up ([`replay`]) when
//! there is room again.
//!
//! INVARIANTS
//! * A watch hears each event that it wants once, in order, and the events of a revision together.
//! * It hears nothing before the answer to its creation, and nothing after the answer to its end.
//! * A progress notice stands behind every event up to its revision.
//! * Writers wait for nobody. What may wait for one stream is bounded, for all streams together too, and so is what one pass
//!   of catching up reads.
//! * What the watches of a stream and its outbox keep is known to the stream's task ([`Subscriber::held`]).

pub mod frame;
pub mod hub;
pub mod interest;
mod laggards;
pub mod outbox;
pub mod replay;
mod requests;
mod revision;
pub mod ring;
pub mod slots;
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
pub use hub::{Create, HubCore, Input, Request, Turn};
use outbox::{Backlog, Outbox};
pub use outbox::{Events, Frames, Response};
use replay::Job;
pub use requests::NOBODY;
use ring::Ring;
pub use stream::{Wishes, charge};

/// What can be chosen about watching.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Memory for recent events.
    pub ring_bytes: usize,
    /// What may wait for one stream, beside a little for each of its watches.
    pub pending_bytes: usize,
    /// What may wait for all streams together. Beyond it only those for which less than a fair share waits are sent more.
    pub all_pending_bytes: usize,
    /// How often watches that ask for it are told that nothing happened; up to a tenth is added, stream by stream.
    pub progress_interval: Duration,
    /// Watches that one stream may have.
    pub watches_per_stream: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ring_bytes: 8 << 20,
            pending_bytes: 1 << 20,
            all_pending_bytes: 128 << 20,
            progress_interval: Duration::from_mins(10),
            watches_per_stream: 1_000_000,
        }
    }
}

/// Who watches, in numbers.
#[derive(Debug, Clone)]
pub struct Gauges {
    /// Open streams.
    pub streams: IntGauge,
    /// Watches.
    pub watches: IntGauge,
    /// Watches that are not synced.
    pub lagging: IntGauge,
    /// Events that wait in an outbox.
    pub pending: IntGauge,
    /// Events that left one.
    pub events: IntCounter,
}

impl Gauges {
    /// The ones that the process reports.
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

    /// Ones that nobody reports.
    #[must_use]
    pub fn detached() -> Self {
        let gauge = || IntGauge::new("detached", "Reported nowhere.").expect("the name is a constant");
        let counter = IntCounter::new("detached", "Reported nowhere.").expect("the name is a constant");
        Self { streams: gauge(), watches: gauge(), lagging: gauge(), pending: gauge(), events: counter }
    }
}

/// Where the apply thread leaves events.
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

    /// Tells the hub that there is something to deliver.
    pub fn wake(&self) {
        self.inbox.ring();
    }

    /// Goes on with a later state of the key space, as an installed snapshot brings it. Comes before anything is appended
    /// that follows it.
    pub fn restore(&mut self, reader: Reader) {
        *self.ring.lock() = Ring::new(reader.head(), self.ring_bytes);
        tell(&self.inbox, Input::Restored(reader));
    }
}

/// The door for streams.
pub struct Hub {
    ring: Arc<Mutex<Ring>>,
    inbox: Arc<Inbox<Input>>,
    settings: Settings,
    gauges: Gauges,
    backlog: Arc<Backlog>,
    streams: AtomicU64,
    threads: Mutex<Option<Threads>>,
}

/// The threads that deliver.
struct Threads {
    handles: [JoinHandle<()>; 2],
    /// Disconnected once both have ended.
    running: mpsc::Receiver<Infallible>,
}

/// How long [`Hub::stop`] waits for what the threads are about to do.
const STOP_TIMEOUT: Duration = Duration::from_millis(200);

impl Hub {
    /// Starts the threads that deliver.
    #[must_use]
    pub fn start(reader: Reader, settings: Settings) -> (Publisher, Arc<Self>) {
        let (publisher, hub, core) = Self::assemble(reader, settings, Gauges::of_process());
        let (jobs, orders) = mpsc::channel();
        let (runs, running) = mpsc::channel();
        let inbox = hub.inbox.clone();
        let deliver = spawn("watch", runs.clone(), move || run(core, &inbox, &jobs));
        let inbox = hub.inbox.clone();
        let read = spawn("watch-history", runs, move || run_jobs(&orders, &inbox));
        *hub.threads.lock() = Some(Threads { handles: [deliver, read], running });
        (publisher, hub)
    }

    /// Everything but the threads, for who wants to take the steps himself: see [`Hub::settle`].
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

    /// How much memory the events take that are kept for everybody.
    #[must_use]
    pub fn ring_bytes(&self) -> usize {
        self.ring.lock().bytes()
    }

    /// How much memory the responses take that wait for streams, each counted for every stream that it waits for.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.backlog.bytes()
    }

    /// Takes what streams have said since the last call: the inputs of a step.
    pub fn take_inputs(&self, into: &mut Vec<Input>) {
        self.inbox.drain(into);
    }

    /// Takes steps until nothing is left to do at time `now`. Returns when there will be.
    pub fn settle(&self, core: &mut HubCore, now: Duration) -> Result<Option<Duration>, Halt> {
        let mut inputs = Vec::new();
        loop {
            self.inbox.drain(&mut inputs);
            let turn = core.step(now, &mut inputs)?;
            if let Some(job) = turn.job {
                inputs.push(Input::Replayed(job.run()?));
            } else if !turn.busy && !self.inbox.has_letters() {
                return Ok(turn.until);
            }
        }
    }

    /// Opens a stream.
    #[must_use]
    pub fn open(&self) -> Subscriber {
        let interval = self.settings.progress_interval;
        self.open_with_period(interval + interval.mul_f64(rand::rng().random_range(0.0..0.1)))
    }

    /// Opens a stream that says every `period` that nothing happened, to those who ask for it.
    #[must_use]
    pub fn open_with_period(&self, period: Duration) -> Subscriber {
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        let outbox = Arc::new(Outbox::new(self.backlog.clone(), self.gauges.clone()));
        tell(&self.inbox, Input::Open { stream, outbox: outbox.clone(), period });
        Subscriber { inbox: self.inbox.clone(), stream, outbox, asked: 0, handled: 0, answers: 0 }
    }

    /// Stops delivering: every stream learns that it has ended. A thread that is in the middle of something long is not
    /// waited for: it changes nothing that outlives the process.
    pub fn stop(&self) {
        self.inbox.close();
        let Some(Threads { handles, running }) = self.threads.lock().take() else { return };
        if let Err(mpsc::RecvTimeoutError::Timeout) = running.recv_timeout(STOP_TIMEOUT) {
            return tracing::warn!(timeout = ?STOP_TIMEOUT, "the watch threads are still busy; stopping without them");
        }
        for thread in handles {
            // A thread that panicked has ended the process already.
            let _ = thread.join();
        }
    }
}

/// Requests of one stream that may be unanswered, and answers that may wait for it.
const OPEN_REQUESTS_MAX: u64 = 64;

/// A stream, as its own task holds it. Dropped, it takes all its watches with it.
pub struct Subscriber {
    inbox: Arc<Inbox<Input>>,
    stream: u64,
    outbox: Arc<Outbox>,
    asked: u64,
    handled: u64,
    answers: usize,
}

/// The hub has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped;

impl Subscriber {
    /// Whether another request may be made before responses are taken.
    #[must_use]
    pub fn may_ask(&self) -> bool {
        let unhandled = self.asked - self.handled;
        unhandled + (self.answers as u64) < OPEN_REQUESTS_MAX
    }

    /// Asks for something. Requests are handled in order.
    pub fn ask(&mut self, request: Request) {
        self.asked += 1;
        if let Request::Create(create) = &request {
            self.outbox.charge_watch(charge(&create.interval));
        }
        tell(&self.inbox, Input::Request { stream: self.stream, request });
    }

    /// What is kept for this stream, in bytes: its watches, those included that were just asked for, and responses.
    #[must_use]
    pub fn held(&self) -> usize {
        self.outbox.held()
    }

    /// Takes some responses out. If there are none, the waker is called when there are, or when more may be asked.
    pub fn take(&mut self, into: &mut VecDeque<Response>, waker: &Waker) -> Result<(), Stopped> {
        let taken = self.outbox.take(into, waker);
        self.handled = taken.handled;
        self.answers = taken.answers;
        if taken.room {
            tell(&self.inbox, Input::Room { stream: self.stream });
        }
        if taken.stopped { Err(Stopped) } else { Ok(()) }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.outbox.close();
        tell(&self.inbox, Input::Close { stream: self.stream });
    }
}

/// Leaves an input for the hub. Once the hub has stopped nobody hears it: a stream that is opened then has ended already.
fn tell(inbox: &Inbox<Input>, input: Input) {
    if let Err(Input::Open { outbox, .. }) = inbox.send(input) {
        outbox.close();
    }
}

/// The hub's thread.
fn run(mut core: HubCore, inbox: &Inbox<Input>, jobs: &mpsc::Sender<Job>) -> Result<(), Halt> {
    let started = Instant::now();
    let mut inputs = Vec::new();
    let mut turn = Turn::default();
    loop {
        let until = if turn.busy { Some(started) } else { turn.until.map(|until| started + until) };
        let is_open = if core.listens() {
            inbox.receive_or_hear(&mut inputs, || core.has_news(), until)
        } else {
            inbox.receive(&mut inputs, until)
        };
        // What was asked for and not heard yet is of no use to anybody who is about to be told that it all has ended.
        if !is_open || inbox.is_closed() {
            core.stop(&mut inputs);
            return Ok(());
        }
        turn = core.step(started.elapsed(), &mut inputs)?;
        if let Some(job) = turn.job.take() {
            jobs.send(job).expect("the historian lives as long as this thread");
        }
    }
}

/// The historian's thread.
fn run_jobs(orders: &mpsc::Receiver<Job>, inbox: &Inbox<Input>) -> Result<(), Halt> {
    for job in orders {
        tell(inbox, Input::Replayed(job.run()?));
    }
    Ok(())
}

/// A thread whose failure ends the process.
fn spawn(
    name: &'static str,
    runs: mpsc::Sender<Infallible>,
    run: impl FnOnce() -> Result<(), Halt> + Send + 'static,
) -> JoinHandle<()> {
    let body = move || {
        let _runs = runs; // Until the end.
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        match outcome {
            Ok(Ok(())) => return,
            Ok(Err(halt)) => tracing::error!(thread = name, error = %halt, "cannot go on"),
            Err(_) => tracing::error!(thread = name, "panicked"),
        }
        std::process::abort();
    };
    thread::Builder::new().name(name.into()).spawn(body).expect("the system has room for a handful of threads")
}
