//! Runs the phases on all workers: fill, warm up, measure.
//!
//! A phase ends when every worker has reported that its callers are done and, with watchers, when every event has arrived.
//! CPU time is read between phases, when nothing is in flight, so it belongs to exactly the operations that are counted.

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    time::interval,
};

use super::{
    arguments::WatchedKeys,
    connections::UnaryChannel,
    kv::KvCaller,
    measure::{Failure, Tally},
    plan::{Plan, Workload},
    process::Usage,
    progress::Progress,
    report::{Report, Used},
    schedule::{Extent, Rate, Schedule},
    worker::{Task, Worker, WorkerCommand},
};

/// How often the counters of the workers are read.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// After an interrupt, responses are awaited no longer than this.
const INTERRUPT_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) fn run_plan(plan: &Plan) -> Result<Report, String> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("the runtime cannot be built: {error}"))?;
    runtime.block_on(async {
        Usage::of_all(&plan.server_pids)?;
        // Sent first with every workload, so that a server that is not reachable or does not answer is reported only once.
        let is_filled = is_filled(plan).await?;
        Runner::connect_workers(plan).await?.run_phases(plan.workload.needs_keys() && !is_filled).await
    })
}

async fn is_filled(plan: &Plan) -> Result<bool, String> {
    let channel = UnaryChannel::connect(&plan.endpoints[0], plan.user.as_ref(), &plan.open_tls()?).await?;
    let mut caller = KvCaller::new(channel, plan.keys.clone(), 0, std::rc::Rc::default(), Instant::now());
    let asked = tokio::time::timeout(plan.timeout, caller.is_filled()).await;
    let asked = asked.map_err(|_| format!("{}: no answer within {:?}", plan.endpoints[0], plan.timeout))?;
    asked.map_err(|failure| format!("{}: {}: {}", plan.endpoints[0], failure.kind, failure.message))
}

struct Runner<'a> {
    plan: &'a Plan,
    workers: Vec<Worker>,
    interrupts: Signal,
    interrupted: bool,
    /// Failures outside the measured phase. They have no figures in the report, but they count as failures.
    unmeasured: Tally,
}

/// The sum of the workers' counters.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    answered: u64,
    failed: u64,
    events: u64,
}

impl<'a> Runner<'a> {
    async fn connect_workers(plan: &'a Plan) -> Result<Self, String> {
        let interrupts = signal(SignalKind::interrupt())
            .map_err(|error| format!("the signal handler cannot be installed: {error}"))?;
        let epoch = Instant::now();
        let (workers, connected): (Vec<_>, Vec<_>) =
            (0..plan.threads).map(|index| Worker::start(plan, index, epoch)).unzip();
        let mut runner = Self { plan, workers, interrupts, interrupted: false, unmeasured: Tally::new() };
        let interrupts = &mut runner.interrupts;
        for connected in connected {
            tokio::select! {
                connected = connected => connected.map_err(|_| worker_died())??,
                _ = interrupts.recv() => return Err("interrupted before the run began".to_owned()),
            }
        }
        Ok(runner)
    }

    async fn run_phases(mut self, needs_fill: bool) -> Result<Report, String> {
        if needs_fill {
            self.phase(Task::Fill, "fill", Extent::Calls(self.plan.keys.count()), None).await?;
            self.discard_figures().await?;
            if self.unmeasured.failed() > 0 {
                return Err(format!("the key space could not be filled: {:?}", self.unmeasured.failures));
            }
        }
        if !self.plan.warmup.is_zero() && !self.interrupted {
            self.phase(Task::Workload, "warm-up", Extent::Time(self.plan.warmup), self.plan.rate).await?;
            self.discard_figures().await?;
        }
        if self.interrupted {
            return Err("interrupted before measuring began".to_owned());
        }
        let server_before = Usage::of_all(&self.plan.server_pids)?;
        let self_before = Usage::of_self().ok();
        let elapsed = self.phase(Task::Workload, self.plan.workload.name(), self.plan.extent, self.plan.rate).await?;
        let generator = self_before.and_then(|before| Usage::of_self().ok().map(|after| used(&before, &after)));
        let server = server_before.and_then(|before| self.server_used(&before));
        let mut tally = self.collect().await?;
        self.clean_up().await?;
        tally.add_all_failures(std::mem::take(&mut self.unmeasured.failures));
        Ok(Report { plan: self.plan.clone(), elapsed, tally, server, generator, interrupted: self.interrupted })
    }

    /// What the server used. A server that died under the load is a failure, but there is a report all the same.
    fn server_used(&mut self, before: &Usage) -> Option<Used> {
        match Usage::of_all(&self.plan.server_pids) {
            Ok(after) => after.map(|after| used(before, &after)),
            Err(error) => {
                self.unmeasured.fail(Failure { kind: "ServerGone".to_owned(), message: error });
                None
            }
        }
    }

    /// Runs one phase, from its first call until its last response and event.
    async fn phase(&mut self, task: Task, title: &str, extent: Extent, rate: Option<Rate>) -> Result<Duration, String> {
        let before = self.counts();
        let schedule = Arc::new(Schedule::start(extent, rate));
        let mut progress = Progress::start(title.to_owned(), extent);
        let done: Vec<_> = self.workers.iter().map(|worker| start_phase(worker, task, &schedule)).collect();
        let all_done = async {
            for done in done {
                done.await.map_err(|_| worker_died())?;
            }
            Ok(())
        };
        self.supervise(&schedule, &mut progress, before, all_done).await?;
        if task == Task::Workload {
            self.await_events(&schedule, &mut progress, before).await?;
        }
        progress.finish();
        Ok(schedule.started().elapsed())
    }

    /// Supervises a phase until `done`: shows progress, handles interrupts, and gives up when no more responses arrive.
    async fn supervise(
        &mut self,
        schedule: &Schedule,
        progress: &mut Progress,
        before: Counts,
        done: impl Future<Output = Result<(), String>>,
    ) -> Result<(), String> {
        let mut done = pin!(done);
        let mut ticks = interval(POLL_INTERVAL);
        let mut latest = (Instant::now(), before);
        loop {
            tokio::select! {
                result = &mut done => return result,
                _ = self.interrupts.recv() => {
                    if std::mem::replace(&mut self.interrupted, true) {
                        schedule.abandon();
                    }
                    schedule.end();
                    latest.0 = Instant::now();
                }
                _ = ticks.tick() => {
                    let counts = self.counts();
                    self.show(progress, before, counts);
                    if counts != latest.1 {
                        latest = (Instant::now(), counts);
                    } else if latest.0.elapsed() > self.answer_timeout() {
                        schedule.abandon();
                    }
                }
            }
        }
    }

    /// Waits until every watcher has received every event of the phase's puts; missing events are failures.
    async fn await_events(
        &mut self,
        schedule: &Schedule,
        progress: &mut Progress,
        before: Counts,
    ) -> Result<(), String> {
        let counts = self.counts();
        let Workload::Watch { watchers, watched, .. } = self.plan.workload else { return Ok(()) };
        let per_put = if watched == WatchedKeys::One { u64::from(watchers) } else { 1 };
        let expected = before.events + (counts.answered - before.answered) * per_put;
        let counters: Vec<_> = self.workers.iter().map(|worker| Arc::clone(&worker.counters)).collect();
        let received = move || counters.iter().map(|counters| counters.events.load(Ordering::Relaxed)).sum::<u64>();
        let arrived = async {
            while received() < expected {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        };
        tokio::select! {
            result = self.supervise(schedule, progress, before, arrived) => result,
            () = schedule.abandoned() => Ok(()),
        }?;
        let missing = expected.saturating_sub(self.counts().events);
        let lost = Failure { kind: "LostEvent".to_owned(), message: "an event did not arrive".to_owned() };
        self.unmeasured.fail_many(lost, missing);
        Ok(())
    }

    fn show(&self, progress: &mut Progress, before: Counts, counts: Counts) {
        let (answered, failed) = (counts.answered - before.answered, counts.failed - before.failed);
        let watches = matches!(self.plan.workload, Workload::Watch { .. });
        let counted = if watches { counts.events - before.events } else { answered };
        progress.show(answered + failed, counted, failed);
    }

    /// How long to wait without any response. At a slow rate, the interval between two calls is added.
    fn answer_timeout(&self) -> Duration {
        let between = self.plan.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate.per_second()));
        if self.interrupted { INTERRUPT_TIMEOUT } else { self.plan.timeout + between }
    }

    fn counts(&self) -> Counts {
        self.workers.iter().fold(Counts::default(), |sum, worker| Counts {
            answered: sum.answered + worker.counters.answered.load(Ordering::Relaxed),
            failed: sum.failed + worker.counters.failed.load(Ordering::Relaxed),
            events: sum.events + worker.counters.events.load(Ordering::Relaxed),
        })
    }

    /// Discards the figures of a phase that is not measured, but keeps its failures.
    async fn discard_figures(&mut self) -> Result<(), String> {
        let failures = self.collect().await?.failures;
        self.unmeasured.add_all_failures(failures);
        Ok(())
    }

    async fn collect(&self) -> Result<Tally, String> {
        let mut sum = Tally::new();
        for worker in &self.workers {
            let (tally, counted) = oneshot::channel();
            worker.commands.send(WorkerCommand::Collect { tally }).map_err(|_| worker_died())?;
            sum.add(counted.await.map_err(|_| worker_died())?);
        }
        Ok(sum)
    }

    /// Lets the workers revoke what they hold on the server; a server that does not answer is not waited for.
    async fn clean_up(&mut self) -> Result<(), String> {
        let mut cleaned_up = Vec::new();
        for worker in &self.workers {
            let (done, received) = oneshot::channel();
            worker.commands.send(WorkerCommand::CleanUp { done }).map_err(|_| worker_died())?;
            cleaned_up.push(received);
        }
        let all_cleaned_up = async {
            for cleaned_up in cleaned_up {
                cleaned_up.await.map_err(|_| worker_died())?;
            }
            Ok::<_, String>(())
        };
        let timeout = self.answer_timeout();
        tokio::select! {
            result = all_cleaned_up => result?,
            () = tokio::time::sleep(timeout) => {
                self.unmeasured.fail(Failure::unanswered("leases could not be revoked"));
                return Ok(());
            }
        }
        self.discard_figures().await
    }
}

fn start_phase(worker: &Worker, task: Task, schedule: &Arc<Schedule>) -> oneshot::Receiver<()> {
    let (done, received) = oneshot::channel();
    // A worker that is gone drops `done`, and the receiver reports that.
    let _ = worker.commands.send(WorkerCommand::Run { task, schedule: Arc::clone(schedule), done });
    received
}

fn used(before: &Usage, after: &Usage) -> Used {
    let Usage { resident_bytes, peak_resident_bytes, .. } = *after;
    Used { cpu: after.cpu_since(before), resident_bytes, peak_resident_bytes }
}

fn worker_died() -> String {
    "a worker thread ended unexpectedly".to_owned()
}
