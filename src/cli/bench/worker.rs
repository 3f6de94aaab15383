//! A worker: one thread, with a runtime of its own, that runs its share of the connections, callers and watch streams.
//!
//! A worker shares nothing but three counters for the progress display, so its tally needs no lock, and wake-ups never cross
//! threads.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
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
    connections::{self, UnaryChannel},
    kv::{KvCaller, Operation, Outcome},
    lease::KeepAlive,
    measure::{Failure, LiveCounters, Tally},
    plan::{Plan, Workload},
    schedule::{Schedule, ScheduledCall},
    watch::WatchStream,
};

/// A caller waits this long after a failure, so that a server that is down is not flooded.
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

/// A command from the runner to a worker.
pub(super) enum WorkerCommand {
    /// Let all callers make calls until the schedule has no more, then signal `done`.
    Run { task: Task, schedule: Arc<Schedule>, done: oneshot::Sender<()> },
    /// Return the tally, and start a new one.
    Collect { tally: oneshot::Sender<Tally> },
    /// Revoke the leases of the callers.
    CleanUp { done: oneshot::Sender<()> },
}

/// What the callers do in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Write the whole key space.
    Fill,
    /// Run the workload.
    Workload,
}

/// The runner's handle of a worker.
pub(super) struct Worker {
    /// Commands are executed one after the other. The thread ends when this is dropped.
    pub(super) commands: mpsc::UnboundedSender<WorkerCommand>,
    pub(super) counters: Arc<LiveCounters>,
}

impl Worker {
    /// Starts worker `index` of the plan. The receiver reports when it is connected, or why it is not.
    pub(super) fn start(plan: &Plan, index: u32, epoch: Instant) -> (Self, oneshot::Receiver<Result<(), String>>) {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (connected, ready) = oneshot::channel();
        let counters = Arc::new(LiveCounters::default());
        let (plan, worker_counters) = (plan.clone(), Arc::clone(&counters));
        let body = move || {
            let runtime =
                runtime::Builder::new_current_thread().enable_all().build().expect("the runtime can be built");
            LocalSet::new().block_on(&runtime, work(plan, index, epoch, worker_counters, connected, inbox));
        };
        thread::Builder::new().name(format!("bench-{index}")).spawn(body).expect("a thread can be started");
        (Self { commands, counters }, ready)
    }
}

async fn work(
    plan: Plan,
    index: u32,
    epoch: Instant,
    counters: Arc<LiveCounters>,
    connected: oneshot::Sender<Result<(), String>>,
    mut inbox: mpsc::UnboundedReceiver<WorkerCommand>,
) {
    // Sending a reply fails only if the runner is gone, and then no more commands arrive either.
    let mut group = match CallerGroup::connect(&plan, index, epoch, counters).await {
        Ok(group) => group,
        Err(refusal) => return drop(connected.send(Err(refusal))),
    };
    let _ = connected.send(Ok(()));
    while let Some(command) = inbox.recv().await {
        match command {
            WorkerCommand::Run { task, schedule, done } => {
                group.run(task, schedule).await;
                let _ = done.send(());
            }
            WorkerCommand::Collect { tally } => {
                let _ = tally.send(group.tally.replace(Tally::new()));
            }
            WorkerCommand::CleanUp { done } => {
                group.clean_up().await;
                let _ = done.send(());
            }
        }
    }
}

/// The callers of one worker.
struct CallerGroup {
    workload: Workload,
    callers: Vec<Caller>,
    tally: Rc<RefCell<Tally>>,
    counters: Arc<LiveCounters>,
}

enum Caller {
    Kv(KvCaller),
    KeepAlive(KeepAlive),
}

impl CallerGroup {
    async fn connect(plan: &Plan, index: u32, epoch: Instant, counters: Arc<LiveCounters>) -> Result<Self, String> {
        let tally = Rc::new(RefCell::new(Tally::new()));
        let mut group = Self { workload: plan.workload, callers: Vec::new(), tally, counters };
        let explain = |what: &str, failure: Failure| format!("{what}: {}: {}", failure.kind, failure.message);
        match plan.workload {
            Workload::Lease { leases, ttl } => {
                let channels = channels(plan, index).await?;
                let callers = grant(plan, index, &channels, leases, ttl).await;
                group.callers = callers.map_err(|failure| explain("leases are not granted", failure))?;
            }
            Workload::Put
            | Workload::Range { .. }
            | Workload::List(_)
            | Workload::Txn
            | Workload::Watch { .. }
            | Workload::Load(_) => group.callers = kv_callers(plan, index, epoch).await?,
        }
        if let Workload::Watch { watchers, streams, watched } = plan.workload {
            let channels = channels(plan, index).await?;
            let opened = group.open_watch_streams(plan, index, &channels, epoch, (watchers, streams, watched)).await;
            opened.map_err(|failure| explain("watches are not created", failure))?;
        }
        Ok(group)
    }

    /// Opens this worker's share of the streams; stream s has every watcher whose number is s modulo the number of streams.
    async fn open_watch_streams(
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
            tokio::task::spawn_local(stream.receive(epoch, Rc::clone(&self.tally), Arc::clone(&self.counters)));
        }
        Ok(())
    }

    /// Runs one phase. Callers without a response when it is abandoned count as failed, and are dropped.
    async fn run(&mut self, task: Task, schedule: Arc<Schedule>) {
        let mut running = JoinSet::new();
        let operation = operation(self.workload, task);
        for caller in self.callers.drain(..) {
            let (tally, counters) = (Rc::clone(&self.tally), Arc::clone(&self.counters));
            running.spawn_local(run_caller(caller, operation, Arc::clone(&schedule), tally, counters));
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
        self.counters.failed.fetch_add(unanswered, Ordering::Relaxed);
        let failure = Failure::unanswered("no response, and the run was aborted");
        self.tally.borrow_mut().fail_many(failure, unanswered);
        running.shutdown().await;
    }

    async fn clean_up(&mut self) {
        let mut cleanups = JoinSet::new();
        for caller in self.callers.drain(..) {
            if let Caller::KeepAlive(leases) = caller {
                cleanups.spawn_local(leases.revoke());
            }
        }
        while let Some(cleaned_up) = cleanups.join_next().await {
            if let Err(failure) = cleaned_up.expect("a caller does not panic and is not aborted") {
                self.tally.borrow_mut().fail(failure);
            }
        }
    }
}

/// The numbers below `all` that belong to share `share_index` of `shares`.
fn share(all: u32, shares: u32, share_index: u32) -> impl ExactSizeIterator<Item = u32> {
    (share_index..all.max(share_index)).step_by(shares as usize)
}

/// The addresses for this worker's connections, one for each.
fn addresses(plan: &Plan, index: u32) -> impl Iterator<Item = &str> {
    share(plan.connections, plan.threads, index).map(|nth| plan.endpoints[nth as usize % plan.endpoints.len()].as_str())
}

async fn channels(plan: &Plan, index: u32) -> Result<Vec<Channel>, String> {
    let (callers, tls) = (plan.clients.div_ceil(plan.connections), plan.open_tls()?);
    let mut channels = Vec::new();
    for address in addresses(plan, index) {
        channels.push(connections::connect(address, callers, &tls).await?);
    }
    Ok(channels)
}

async fn kv_callers(plan: &Plan, index: u32, epoch: Instant) -> Result<Vec<Caller>, String> {
    let (mut channels, tls) = (Vec::new(), plan.open_tls()?);
    for address in addresses(plan, index) {
        channels.push(UnaryChannel::connect(address, plan.user.as_ref(), &tls).await?);
    }
    let slots = if plan.workload == Workload::Txn { plan.keys.count() } else { 0 };
    let slots = usize::try_from(slots).expect("the key space of a swap fits into memory");
    let revisions = Rc::new(RefCell::new(vec![0; slots]));
    let caller = |(nth, client): (usize, u32)| {
        let channel = channels[nth % channels.len()].clone();
        Caller::Kv(KvCaller::new(channel, plan.keys.clone(), client, Rc::clone(&revisions), epoch))
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

/// The operation of KV callers in `task`; lease callers always do the same.
fn operation(workload: Workload, task: Task) -> Operation {
    if task == Task::Fill {
        return Operation::PutInOrder;
    }
    match workload {
        Workload::Put | Workload::Lease { .. } => Operation::Put,
        Workload::Range { serializable } => Operation::Get { serializable },
        Workload::List(listing) => Operation::List(listing),
        Workload::Txn => Operation::Swap,
        Workload::Watch { .. } => Operation::PutStamped,
        Workload::Load(LoadOrder::Sequential) => Operation::PutInOrder,
        Workload::Load(LoadOrder::Random) => Operation::PutShuffled,
    }
}

/// Makes calls until the schedule has no more.
async fn run_caller(
    mut caller: Caller,
    operation: Operation,
    schedule: Arc<Schedule>,
    tally: Rc<RefCell<Tally>>,
    counters: Arc<LiveCounters>,
) -> Caller {
    while let Some(ScheduledCall { number, start }) = schedule.next_call().await {
        let outcome = match &mut caller {
            Caller::Kv(kv) => kv.call(operation, number, start).await,
            Caller::KeepAlive(leases) => leases.call().await.map(|()| Outcome::Done),
        };
        let latency = start.elapsed();
        match outcome {
            Ok(outcome) => {
                let mut tally = tally.borrow_mut();
                tally.calls.record(latency);
                tally.lost += u64::from(outcome == Outcome::Lost);
                counters.answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(failure) => {
                tally.borrow_mut().fail(failure);
                counters.failed.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(FAILURE_PAUSE).await;
            }
        }
    }
    caller
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_belongs_to_exactly_one_share() {
        let mut shared: Vec<u32> = (0..3).flat_map(|share_index| share(10, 3, share_index)).collect();
        shared.sort_unstable();
        assert_eq!(shared, (0..10).collect::<Vec<_>>());
        assert_eq!(share(1, 3, 2).len(), 0);
    }

    #[test]
    fn a_fill_writes_keys_in_order_for_every_workload() {
        assert_eq!(operation(Workload::Txn, Task::Fill), Operation::PutInOrder);
        assert_eq!(operation(Workload::Txn, Task::Workload), Operation::Swap);
        assert_eq!(operation(Workload::Load(LoadOrder::Random), Task::Workload), Operation::PutShuffled);
    }
}
