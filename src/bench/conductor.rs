//! Leads the workers through the phases: fill, warm up, measure.
//!
//! A phase ends when every worker has said that its callers are done, and a phase with watchers also only when every event
//! has arrived. CPU time is read between phases, when nothing is in flight, so it belongs to exactly the operations counted.

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
    kv::KvCaller,
    measure::{Failure, Tally},
    plan::{Plan, Workload},
    process::Usage,
    progress::Progress,
    report::{Report, Used},
    schedule::{Extent, Rate, Schedule},
    wire::Line,
    worker::{Order, Task, Worker},
};

/// Counters are looked at so often.
const LOOK: Duration = Duration::from_millis(100);
/// Once somebody wants to stop, answers are waited for no longer than this.
const FAREWELL: Duration = Duration::from_secs(2);

/// Makes the whole run.
pub(super) fn conduct(plan: &Plan) -> Result<Report, String> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime: {error}"))?;
    runtime.block_on(async {
        Usage::of_all(&plan.server_pids)?;
        // Asked first whatever the workload, so that a server that is not there or does not answer is reported once.
        let is_filled = is_filled(plan).await?;
        Conductor::assemble(plan).await?.perform(plan.workload.wants_keys() && !is_filled).await
    })
}

async fn is_filled(plan: &Plan) -> Result<bool, String> {
    let line = Line::connect(&plan.endpoints[0]).await?;
    let mut caller = KvCaller::new(line, plan.keys.clone(), 0, std::rc::Rc::default(), Instant::now());
    let asked = tokio::time::timeout(plan.patience, caller.is_filled()).await;
    let asked = asked.map_err(|_| format!("{}: no answer within {:?}", plan.endpoints[0], plan.patience))?;
    asked.map_err(|failure| format!("{}: {}: {}", plan.endpoints[0], failure.kind, failure.message))
}

struct Conductor<'a> {
    plan: &'a Plan,
    workers: Vec<Worker>,
    interrupts: Signal,
    interrupted: bool,
    /// Of everything before the measured phase: no figures, but failures all the same.
    earlier: Tally,
}

/// What all workers have counted.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    answered: u64,
    failed: u64,
    events: u64,
}

impl<'a> Conductor<'a> {
    async fn assemble(plan: &'a Plan) -> Result<Self, String> {
        let interrupts = signal(SignalKind::interrupt()).map_err(|error| format!("no signal handler: {error}"))?;
        let epoch = Instant::now();
        let (workers, connected): (Vec<_>, Vec<_>) =
            (0..plan.threads).map(|index| Worker::start(plan, index, epoch)).unzip();
        let mut conductor = Self { plan, workers, interrupts, interrupted: false, earlier: Tally::new() };
        let interrupts = &mut conductor.interrupts;
        for connected in connected {
            tokio::select! {
                connected = connected => connected.map_err(|_| worker_died())??,
                _ = interrupts.recv() => return Err("ended before it began".to_owned()),
            }
        }
        Ok(conductor)
    }

    async fn perform(mut self, wants_fill: bool) -> Result<Report, String> {
        if wants_fill {
            self.phase(Task::Fill, "fill", Extent::Turns(self.plan.keys.count()), None).await?;
            self.set_aside().await?;
            if self.earlier.failed() > 0 {
                return Err(format!("the key space could not be filled: {:?}", self.earlier.failures));
            }
        }
        if !self.plan.warmup.is_zero() && !self.interrupted {
            self.phase(Task::Workload, "warm-up", Extent::Time(self.plan.warmup), self.plan.rate).await?;
            self.set_aside().await?;
        }
        if self.interrupted {
            return Err("ended before measuring began".to_owned());
        }
        let server_before = Usage::of_all(&self.plan.server_pids)?;
        let self_before = Usage::of_self().ok();
        let elapsed = self.phase(Task::Workload, self.plan.workload.name(), self.plan.extent, self.plan.rate).await?;
        let generator = self_before.and_then(|before| Usage::of_self().ok().map(|after| used(&before, &after)));
        let server = server_before.and_then(|before| self.server_used(&before));
        let mut tally = self.collect().await?;
        self.leave().await?;
        tally.add_all_failures(std::mem::take(&mut self.earlier.failures));
        Ok(Report { plan: self.plan.clone(), elapsed, tally, server, generator, interrupted: self.interrupted })
    }

    /// What the server used; a server that died under the load is a failure, but the report is still wanted.
    fn server_used(&mut self, before: &Usage) -> Option<Used> {
        match Usage::of_all(&self.plan.server_pids) {
            Ok(after) => after.map(|after| used(before, &after)),
            Err(error) => {
                self.earlier.fail(Failure { kind: "ServerGone".to_owned(), message: error });
                None
            }
        }
    }

    /// One phase, from its first turn until its last answer and event.
    async fn phase(&mut self, task: Task, title: &str, extent: Extent, rate: Option<Rate>) -> Result<Duration, String> {
        let before = self.counts();
        let schedule = Arc::new(Schedule::start(extent, rate));
        let mut progress = Progress::start(title.to_owned(), extent);
        let done: Vec<_> = self.workers.iter().map(|worker| run(worker, task, &schedule)).collect();
        let all_done = async {
            for done in done {
                done.await.map_err(|_| worker_died())?;
            }
            Ok(())
        };
        self.attend(&schedule, &mut progress, before, all_done).await?;
        if task == Task::Workload {
            self.await_events(&schedule, &mut progress, before).await?;
        }
        progress.finish();
        Ok(schedule.started().elapsed())
    }

    /// Watches over a phase until `done`: shows progress, heeds interrupts, gives up when nothing is answered any more.
    async fn attend(
        &mut self,
        schedule: &Schedule,
        progress: &mut Progress,
        before: Counts,
        done: impl Future<Output = Result<(), String>>,
    ) -> Result<(), String> {
        let mut done = pin!(done);
        let mut ticks = interval(LOOK);
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
                    } else if latest.0.elapsed() > self.patience() {
                        schedule.abandon();
                    }
                }
            }
        }
    }

    /// Waits until every watcher has every event of the phase's puts; those that do not come are failures.
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
        let lives: Vec<_> = self.workers.iter().map(|worker| Arc::clone(&worker.live)).collect();
        let received = move || lives.iter().map(|live| live.events.load(Ordering::Relaxed)).sum::<u64>();
        let arrived = async {
            while received() < expected {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        };
        tokio::select! {
            result = self.attend(schedule, progress, before, arrived) => result,
            () = schedule.abandoned() => Ok(()),
        }?;
        let missing = expected.saturating_sub(self.counts().events);
        let lost = Failure { kind: "LostEvent".to_owned(), message: "an event did not arrive".to_owned() };
        self.earlier.fail_often(lost, missing);
        Ok(())
    }

    fn show(&self, progress: &mut Progress, before: Counts, counts: Counts) {
        let (answered, failed) = (counts.answered - before.answered, counts.failed - before.failed);
        let watches = matches!(self.plan.workload, Workload::Watch { .. });
        let counted = if watches { counts.events - before.events } else { answered };
        progress.show(answered + failed, counted, failed);
    }

    /// How long nothing may be answered; at a slow rate there is nothing to be answered for a while.
    fn patience(&self) -> Duration {
        let between = self.plan.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate.per_second()));
        if self.interrupted { FAREWELL } else { self.plan.patience + between }
    }

    fn counts(&self) -> Counts {
        self.workers.iter().fold(Counts::default(), |sum, worker| Counts {
            answered: sum.answered + worker.live.answered.load(Ordering::Relaxed),
            failed: sum.failed + worker.live.failed.load(Ordering::Relaxed),
            events: sum.events + worker.live.events.load(Ordering::Relaxed),
        })
    }

    /// Forgets the figures of a phase that is not measured, but not its failures.
    async fn set_aside(&mut self) -> Result<(), String> {
        let failures = self.collect().await?.failures;
        self.earlier.add_all_failures(failures);
        Ok(())
    }

    async fn collect(&self) -> Result<Tally, String> {
        let mut sum = Tally::new();
        for worker in &self.workers {
            let (tally, counted) = oneshot::channel();
            worker.orders.send(Order::Collect { tally }).map_err(|_| worker_died())?;
            sum.add(counted.await.map_err(|_| worker_died())?);
        }
        Ok(sum)
    }

    /// Has the workers clean up behind them; a server that does not answer is not waited for.
    async fn leave(&mut self) -> Result<(), String> {
        let mut left = Vec::new();
        for worker in &self.workers {
            let (done, heard) = oneshot::channel();
            worker.orders.send(Order::Leave { done }).map_err(|_| worker_died())?;
            left.push(heard);
        }
        let all_left = async {
            for left in left {
                left.await.map_err(|_| worker_died())?;
            }
            Ok::<_, String>(())
        };
        let patience = self.patience();
        tokio::select! {
            result = all_left => result?,
            () = tokio::time::sleep(patience) => {
                self.earlier.fail(Failure::unanswered("leases could not be given back"));
                return Ok(());
            }
        }
        self.set_aside().await
    }
}

fn run(worker: &Worker, task: Task, schedule: &Arc<Schedule>) -> oneshot::Receiver<()> {
    let (done, heard) = oneshot::channel();
    // A worker that is gone drops `done`, and its receiver says so.
    let _ = worker.orders.send(Order::Run { task, schedule: Arc::clone(schedule), done });
    heard
}

fn used(before: &Usage, after: &Usage) -> Used {
    let Usage { resident_bytes, peak_resident_bytes, .. } = *after;
    Used { cpu: after.cpu_since(before), resident_bytes, peak_resident_bytes }
}

fn worker_died() -> String {
    "a worker thread ended unexpectedly".to_owned()
}
