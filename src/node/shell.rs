//! How many threads a member's rooms run on: one for raft, log and apply together while it is alone, three in company.
//!
//! Three threads let a leader hear its followers while its own disk works, and sync one group while the last one is applied. A
//! member that is alone has no followers, and on a busy machine the processors are the limit, not the disk: there each hop
//! between threads costs a wake-up on both sides and buys nothing. Members come and go, so this changes while it runs: the
//! threads finish what they have and end, which leaves all rooms here, on one thread. A snapshot is put in place at such a
//! moment, too.

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

/// The three rooms that agree, keep promises, and change the state.
pub struct Core {
    /// What agrees.
    pub driver: Driver,
    /// What keeps promises.
    pub writer: LogWriter,
    /// What changes the state.
    pub applier: Applier,
}

impl Core {
    /// Runs until the raft inbox is closed; returns why this node cannot go on, if so.
    pub fn run(mut self) -> Result<(), Halt> {
        loop {
            let pause = if self.driver.replica.is_alone() { self.run_alone()? } else { self.run_in_company() };
            match pause {
                Pause::Company => (),
                Pause::Install => self.install()?,
                Pause::Stopped => break,
            }
        }
        self.applier.waiters.stop();
        // A restart after a clean stop replays nothing: the last thing is a flush.
        self.applier.machine.engine().flush()
    }

    /// All on this thread. What is committed is applied and answered before the next group is synced.
    fn run_alone(&mut self) -> Result<Pause, Halt> {
        let (mut inputs, mut next_tick) = (Vec::new(), Instant::now() + self.driver.tick);
        while self.driver.inbox.receive(&mut inputs, Some(next_tick)) {
            loop {
                let ticks = self.driver.ticks_due(&mut next_tick);
                self.driver.take(&mut inputs, ticks);
                let settled = !self.settle()?;
                if !self.driver.replica.is_alone() {
                    return Ok(Pause::Company); // What was written is told in company: it lies in the inbox.
                }
                if settled && self.driver.accepted.is_some() {
                    return Ok(Pause::Install);
                }
                if settled {
                    break;
                }
                // "Persisted", and whatever came while the disk worked.
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

    /// A thread for each room. When this returns, all that was handed over is done.
    fn run_in_company(&mut self) -> Pause {
        let Self { driver, writer, applier } = self;
        let (log, handoffs) = (driver.log.clone(), driver.applier.clone());
        let pause = thread::scope(|scope| {
            scope_thread(scope, "log", || writer.run(&log));
            scope_thread(scope, "apply", || applier.run(&handoffs));
            let mut pause = Pause::Stopped;
            // A panic must not wait for the other two.
            guarded("raft", || {
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

    /// Puts a snapshot in place that raft has accepted: the database first, then the log, then what raft wants written.
    pub fn install(&mut self) -> Result<(), Halt> {
        let accepted = self.driver.accepted.take().expect("the raft thread paused for it");
        let Accepted { install, write } = accepted;
        let arrived = self.driver.arrived.take().filter(|arrived| arrived.index == install.at.index);
        let Arrived { incoming, done, .. } = arrived.expect("raft accepts only the snapshot that it was shown last");
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

/// A thread whose failure ends the process, be it an error or a panic (which the panic hook has reported by then).
pub(super) fn guarded(name: &'static str, run: impl FnOnce() -> Result<(), Halt>) {
    match panic::catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => (),
        Ok(Err(halt)) => {
            tracing::error!(thread = name, error = %halt, "cannot go on");
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
    thread.spawn_scoped(scope, move || guarded(name, run)).expect("the system has room for a handful of threads");
}
