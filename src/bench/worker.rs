//! A worker: one thread with a runtime of its own, on which its share of the connections, callers and watch streams live.
//!
//! Nothing of a worker is shared but three counters for the progress display, so its tally needs no lock and a wake-up
//! never crosses threads.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    task::{JoinSet, LocalSet},
};
use tonic::transport::Channel;

use super::{
    arguments::{LoadOrder, WatchedKeys},
    kv::{Act, KvCaller, Outcome},
    lease::KeepAlive,
    measure::{Failure, Tally},
    plan::{Plan, Workload},
    schedule::{Schedule, Turn},
    watch::WatchStream,
    wire::{self, Line},
};

/// A caller without a rate waits so long after a failure: a server that is down is not helped by a storm.
const BREATH: Duration = Duration::from_millis(10);

/// What a worker is told.
pub(super) enum Order {
    /// Let all callers draw turns until there are none, then say so.
    Run { task: Task, schedule: Arc<Schedule>, done: oneshot::Sender<()> },
    /// Hand over what was counted and begin anew.
    Collect { tally: oneshot::Sender<Tally> },
    /// Give back what the server holds for the callers.
    Leave { done: oneshot::Sender<()> },
}

/// What the callers do with their turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Write the whole key space.
    Fill,
    /// What the run is about.
    Workload,
}

/// What may be looked at while a worker works. Alone on its cache line, for it changes with every answer.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Live {
    /// Calls answered well.
    pub(super) answered: AtomicU64,
    /// Failures.
    pub(super) failed: AtomicU64,
    /// Events received.
    pub(super) events: AtomicU64,
}

/// The conductor's end of a worker.
pub(super) struct Worker {
    /// Takes orders, one after the other. The thread ends when this is dropped.
    pub(super) orders: mpsc::UnboundedSender<Order>,
    /// Its counters.
    pub(super) live: Arc<Live>,
}

impl Worker {
    /// Starts worker `index` of the plan; the receiver tells when it is connected, or why not.
    pub(super) fn start(plan: &Plan, index: u32, epoch: Instant) -> (Self, oneshot::Receiver<Result<(), String>>) {
        let (orders, inbox) = mpsc::unbounded_channel();
        let (connected, tidings) = oneshot::channel();
        let live = Arc::new(Live::default());
        let (plan, counters) = (plan.clone(), Arc::clone(&live));
        let body = move || {
            let runtime =
                runtime::Builder::new_current_thread().enable_all().build().expect("the system grants a poller");
            LocalSet::new().block_on(&runtime, work(plan, index, epoch, counters, connected, inbox));
        };
        thread::Builder::new().name(format!("bench-{index}")).spawn(body).expect("the system grants a thread");
        (Self { orders, live }, tidings)
    }
}

async fn work(
    plan: Plan,
    index: u32,
    epoch: Instant,
    live: Arc<Live>,
    connected: oneshot::Sender<Result<(), String>>,
    mut inbox: mpsc::UnboundedReceiver<Order>,
) {
    // Nobody hears the answers below only if the conductor is gone, and then nobody sends orders either.
    let mut crew = match Crew::assemble(&plan, index, epoch, live).await {
        Ok(crew) => crew,
        Err(refusal) => return drop(connected.send(Err(refusal))),
    };
    let _ = connected.send(Ok(()));
    while let Some(order) = inbox.recv().await {
        match order {
            Order::Run { task, schedule, done } => {
                crew.run(task, schedule).await;
                let _ = done.send(());
            }
            Order::Collect { tally } => {
                let _ = tally.send(crew.tally.replace(Tally::new()));
            }
            Order::Leave { done } => {
                crew.leave().await;
                let _ = done.send(());
            }
        }
    }
}

/// The callers of one worker.
struct Crew {
    workload: Workload,
    callers: Vec<Caller>,
    tally: Rc<RefCell<Tally>>,
    live: Arc<Live>,
}

enum Caller {
    Kv(KvCaller),
    KeepAlive(KeepAlive),
}

impl Crew {
    async fn assemble(plan: &Plan, index: u32, epoch: Instant, live: Arc<Live>) -> Result<Self, String> {
        let tally = Rc::new(RefCell::new(Tally::new()));
        let mut crew = Self { workload: plan.workload, callers: Vec::new(), tally, live };
        let explain = |what: &str, failure: Failure| format!("{what}: {}: {}", failure.kind, failure.message);
        match plan.workload {
            Workload::Lease { leases, ttl } => {
                let channels = channels(plan, index).await?;
                let callers = grant(plan, index, &channels, leases, ttl).await;
                crew.callers = callers.map_err(|failure| explain("leases are not granted", failure))?;
            }
            Workload::Put
            | Workload::Range { .. }
            | Workload::List(_)
            | Workload::Txn
            | Workload::Watch { .. }
            | Workload::Load(_) => crew.callers = kv_callers(plan, index, epoch).await?,
        }
        if let Workload::Watch { watchers, streams, watched } = plan.workload {
            let channels = channels(plan, index).await?;
            let opened = crew.listen(plan, index, &channels, epoch, (watchers, streams, watched)).await;
            opened.map_err(|failure| explain("watches are not created", failure))?;
        }
        Ok(crew)
    }

    /// Opens this worker's share of the streams; stream s has every watcher whose number is s modulo all streams.
    async fn listen(
        &self,
        plan: &Plan,
        index: u32,
        channels: &[Channel],
        epoch: Instant,
        (watchers, streams, watched): (u32, u32, WatchedKeys),
    ) -> Result<(), Failure> {
        let mut block = bytes::BytesMut::new();
        for (nth, stream) in share(streams, plan.threads, index).enumerate() {
            let key_of = |watcher: u32| if watched == WatchedKeys::Own { u64::from(watcher) } else { 0 };
            let keys = share(watchers, streams, stream).map(|watcher| plan.keys.key(key_of(watcher), &mut block));
            let stream = WatchStream::open(channels[nth % channels.len()].clone(), keys.collect()).await?;
            tokio::task::spawn_local(stream.listen(epoch, Rc::clone(&self.tally), Arc::clone(&self.live)));
        }
        Ok(())
    }

    /// One phase. Callers that are still unanswered when it is abandoned count as failed, and are gone.
    async fn run(&mut self, task: Task, schedule: Arc<Schedule>) {
        let mut running = JoinSet::new();
        let act = act(self.workload, task);
        for caller in self.callers.drain(..) {
            let (tally, live) = (Rc::clone(&self.tally), Arc::clone(&self.live));
            running.spawn_local(drive(caller, act, Arc::clone(&schedule), tally, live));
        }
        loop {
            tokio::select! {
                finished = running.join_next() => match finished {
                    Some(caller) => self.callers.push(caller.expect("a caller does not panic and is not aborted")),
                    None => return,
                },
                () = schedule.abandoned() => break,
            }
        }
        let unanswered = running.len() as u64;
        self.live.failed.fetch_add(unanswered, Ordering::Relaxed);
        let failure = Failure::unanswered("no answer came, and the run was given up");
        self.tally.borrow_mut().fail_often(failure, unanswered);
        running.shutdown().await;
    }

    async fn leave(&mut self) {
        let mut leaving = JoinSet::new();
        for caller in self.callers.drain(..) {
            if let Caller::KeepAlive(leases) = caller {
                leaving.spawn_local(leases.revoke());
            }
        }
        while let Some(left) = leaving.join_next().await {
            if let Err(failure) = left.expect("a caller does not panic and is not aborted") {
                self.tally.borrow_mut().fail(failure);
            }
        }
    }
}

/// Which of `all` things are dealt to `player` of `players`.
fn share(all: u32, players: u32, player: u32) -> impl ExactSizeIterator<Item = u32> {
    (player..all.max(player)).step_by(players as usize)
}

/// The addresses that this worker is to connect to, one for each of its connections.
fn addresses(plan: &Plan, index: u32) -> impl Iterator<Item = &str> {
    share(plan.connections, plan.threads, index).map(|nth| plan.endpoints[nth as usize % plan.endpoints.len()].as_str())
}

async fn channels(plan: &Plan, index: u32) -> Result<Vec<Channel>, String> {
    let callers = plan.clients.div_ceil(plan.connections);
    let mut channels = Vec::new();
    for address in addresses(plan, index) {
        channels.push(wire::connect(address, callers).await?);
    }
    Ok(channels)
}

async fn kv_callers(plan: &Plan, index: u32, epoch: Instant) -> Result<Vec<Caller>, String> {
    let mut lines = Vec::new();
    for address in addresses(plan, index) {
        lines.push(Line::connect(address).await?);
    }
    let places = if plan.workload == Workload::Txn { plan.keys.count() } else { 0 };
    let places = usize::try_from(places).expect("the key space of a swap fits into memory");
    let revisions = Rc::new(RefCell::new(vec![0; places]));
    let caller = |(nth, client): (usize, u32)| {
        let line = lines[nth % lines.len()].clone();
        Caller::Kv(KvCaller::new(line, plan.keys.clone(), client, Rc::clone(&revisions), epoch))
    };
    Ok(share(plan.clients, plan.threads, index).enumerate().map(caller).collect())
}

async fn grant(plan: &Plan, index: u32, channels: &[Channel], leases: u32, ttl: i64) -> Result<Vec<Caller>, Failure> {
    let mut granting = JoinSet::new();
    for (nth, client) in share(plan.clients, plan.threads, index).enumerate() {
        let count = u32::try_from(share(leases, plan.clients, client).len()).expect("a share is no more than all");
        granting.spawn_local(KeepAlive::grant(channels[nth % channels.len()].clone(), count, ttl));
    }
    let mut callers = Vec::new();
    while let Some(granted) = granting.join_next().await {
        callers.push(Caller::KeepAlive(granted.expect("a caller does not panic and is not aborted")?));
    }
    Ok(callers)
}

/// What callers of keys do in `task`; those of leases have but one thing to do.
fn act(workload: Workload, task: Task) -> Act {
    if task == Task::Fill {
        return Act::PutInOrder;
    }
    match workload {
        Workload::Put | Workload::Lease { .. } => Act::Put,
        Workload::Range { serializable } => Act::Get { serializable },
        Workload::List(listing) => Act::List(listing),
        Workload::Txn => Act::Swap,
        Workload::Watch { .. } => Act::PutStamped,
        Workload::Load(LoadOrder::Sequential) => Act::PutInOrder,
        Workload::Load(LoadOrder::Random) => Act::PutShuffled,
    }
}

/// Draws turns and makes calls until there are no more turns.
async fn drive(
    mut caller: Caller,
    act: Act,
    schedule: Arc<Schedule>,
    tally: Rc<RefCell<Tally>>,
    live: Arc<Live>,
) -> Caller {
    while let Some(Turn { number, begun }) = schedule.turn().await {
        let outcome = match &mut caller {
            Caller::Kv(kv) => kv.call(act, number, begun).await,
            Caller::KeepAlive(leases) => leases.call().await.map(|()| Outcome::Done),
        };
        let latency = begun.elapsed();
        match outcome {
            Ok(outcome) => {
                let mut tally = tally.borrow_mut();
                tally.calls.record(latency);
                tally.lost += u64::from(outcome == Outcome::Lost);
                live.answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(failure) => {
                tally.borrow_mut().fail(failure);
                live.failed.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(BREATH).await;
            }
        }
    }
    caller
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_dealt_exactly_once() {
        let mut dealt: Vec<u32> = (0..3).flat_map(|player| share(10, 3, player)).collect();
        dealt.sort_unstable();
        assert_eq!(dealt, (0..10).collect::<Vec<_>>());
        assert_eq!(share(1, 3, 2).len(), 0);
    }

    #[test]
    fn a_fill_writes_keys_in_order_whatever_comes_after_it() {
        assert_eq!(act(Workload::Txn, Task::Fill), Act::PutInOrder);
        assert_eq!(act(Workload::Txn, Task::Workload), Act::Swap);
        assert_eq!(act(Workload::Load(LoadOrder::Random), Task::Workload), Act::PutShuffled);
    }
}
