//! The threads of raft, log and apply: one for all three while this is the only member of its cluster, otherwise three.
//!
//! With three threads a leader can receive messages of its followers while its own disk works, and sync one group while the one
//! before is applied. A single member has no followers, and on a busy machine its limit is the processors, not the disk: there,
//! each hop between threads costs a wake-up on both sides and gains nothing. Members are added and removed at run time, so this
//! changes while the node runs: the log and apply threads finish their work and end, and everything is on one thread again. That
//! is also when a snapshot is installed.

use std::{
    panic::{self, AssertUnwindSafe},
    process,
    sync::Arc,
    thread,
    time::Instant,
};

use super::{
    applier::Applier,
    driver::{Accepted, Arrived, Driver, Pause},
    inbox::Inbox,
    writer::{LogTask, LogWriter},
};
use crate::{error::Halt, metrics::METRICS};

/// The state of the raft, log and apply threads.
pub struct Core {
    pub driver: Driver,
    pub writer: LogWriter,
    pub applier: Applier,
}

impl Core {
    /// Runs until the raft inbox is closed. An error is fatal to the node.
    pub fn run(mut self) -> Result<(), Halt> {
        loop {
            let pause =
                if self.driver.replica.is_alone() { self.run_on_one_thread()? } else { self.run_on_three_threads() };
            match pause {
                Pause::MembershipChanged => (),
                Pause::Install => self.install()?,
                Pause::Stopped => break,
            }
        }
        self.applier.waiters.stop();
        // Flush last, so that a restart after a clean stop replays nothing.
        self.applier.machine.engine().flush()
    }

    /// Runs everything on this thread. Committed entries are applied and answered before the next group is synced.
    fn run_on_one_thread(&mut self) -> Result<Pause, Halt> {
        let (mut inputs, mut next_tick) = (Vec::new(), Instant::now() + self.driver.tick);
        while self.driver.inbox.receive(&mut inputs, Some(next_tick)) {
            loop {
                let ticks = self.driver.ticks_due(&mut next_tick);
                self.driver.take(&mut inputs, ticks);
                let settled = !self.settle()?;
                if !self.driver.replica.is_alone() {
                    return Ok(Pause::MembershipChanged); // "Persisted" is in the inbox, and will be handled there.
                }
                if settled && self.driver.accepted.is_some() {
                    return Ok(Pause::Install);
                }
                if settled {
                    break;
                }
                // "Persisted", and inputs that came while the disk worked.
                self.driver.inbox.drain(&mut inputs);
            }
        }
        Ok(Pause::Stopped)
    }

    /// Applies and writes what was handed over; false if there was nothing.
    fn settle(&mut self) -> Result<bool, Halt> {
        let (mut tasks, mut handoffs) = (Vec::<LogTask>::new(), Vec::new());
        self.driver.applier.drain(&mut handoffs);
        self.driver.log.drain(&mut tasks);
        if tasks.is_empty() && handoffs.is_empty() {
            return Ok(false);
        }
        self.applier.take(&mut handoffs, Instant::now())?;
        self.writer.take(&mut tasks)?;
        Ok(true)
    }

    /// Runs raft on this thread, and log and apply on one each. Before this returns, those finish all that was handed over.
    fn run_on_three_threads(&mut self) -> Pause {
        let Self { driver, writer, applier } = self;
        let (log, handoffs) = (driver.log.clone(), driver.applier.clone());
        let pause = thread::scope(|scope| {
            scope_thread(scope, "log", || writer.run(&log));
            scope_thread(scope, "apply", || applier.run(&handoffs));
            let mut pause = Pause::Stopped;
            // A panic must end the process at once; leaving the scope would wait for the other two threads.
            abort_on_failure("raft", || {
                pause = driver.run();
                Ok(())
            });
            log.close();
            handoffs.close();
            pause
        });
        driver.log = Arc::new(Inbox::default());
        driver.applier = Arc::new(Inbox::default());
        pause
    }

    /// Installs a snapshot that raft has accepted: first the database is replaced, then the log is reset, then raft's pending
    /// write is carried out.
    pub fn install(&mut self) -> Result<(), Halt> {
        let accepted = self.driver.accepted.take().expect("the raft thread paused for it");
        let Accepted { install, write } = accepted;
        let arrived = self.driver.arrived.take().filter(|arrived| arrived.index == install.at.index);
        let Arrived { incoming, done, .. } = arrived.expect("raft accepts only the snapshot that it was given last");
        tracing::info!(index = install.at.index, term = install.at.term, "installing a snapshot");
        METRICS.snapshots_under_way.set(1);
        self.writer.install(&install, incoming.adopt)?;
        self.applier.restore(incoming.machine);
        self.driver.status.set_unflushed(0);
        if let Some(write) = write {
            self.writer.take(&mut vec![LogTask::Write(write)])?;
        }
        let mut inputs = Vec::new();
        self.driver.inbox.drain(&mut inputs);
        self.driver.take(&mut inputs, 0);
        METRICS.snapshots_under_way.set(0);
        done(true);
        tracing::info!(index = install.at.index, "installed a snapshot");
        Ok(())
    }
}

/// Runs the body of a thread, and aborts the process if it fails with an error or a panic (which the panic hook has logged).
pub(super) fn abort_on_failure(name: &'static str, run: impl FnOnce() -> Result<(), Halt>) {
    match panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => (),
        Ok(Err(halt)) => {
            tracing::error!(thread = name, error = %halt, "fatal error in the {name} thread, aborting");
            process::abort();
        }
        Err(_) => process::abort(),
    }
}

fn scope_thread<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    name: &'static str,
    run: impl FnOnce() -> Result<(), Halt> + Send + 'scope,
) {
    let thread = thread::Builder::new().name(name.into());
    thread.spawn_scoped(scope, move || abort_on_failure(name, run)).expect("the system can start a handful of threads");
}
