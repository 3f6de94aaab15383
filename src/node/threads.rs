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
    apply_thread::ApplyThread,
    inbox::Inbox,
    log_thread::LogThread,
    messages::LogTask,
    raft_thread::{Accepted, Arrived, Pause, RaftThread},
};
use crate::{error::Halt, metrics::METRICS};

/// The state of the raft, log and apply threads.
pub struct Core {
    pub raft_thread: RaftThread,
    pub log_thread: LogThread,
    pub apply_thread: ApplyThread,
}

impl Core {
    /// Runs until the raft inbox is closed. An error is fatal to the node.
    pub fn run(mut self) -> Result<(), Halt> {
        loop {
            let pause = if self.raft_thread.replica.is_sole_member() {
                self.run_on_one_thread()?
            } else {
                self.run_on_three_threads()
            };
            match pause {
                Pause::MembershipChanged => (),
                Pause::Install => self.install()?,
                Pause::Stopped => break,
            }
        }
        self.apply_thread.waiters.stop();
        // Flush last, so that a restart after a clean stop replays nothing.
        self.apply_thread.machine.engine().flush()
    }

    /// Runs everything on this thread. Committed entries are applied and answered before the next group is synced.
    fn run_on_one_thread(&mut self) -> Result<Pause, Halt> {
        let (mut inputs, mut next_tick) = (Vec::new(), Instant::now() + self.raft_thread.tick);
        while self.raft_thread.inbox.receive(&mut inputs, Some(next_tick)) {
            loop {
                let now = Instant::now();
                let ticks = self.raft_thread.ticks_due(&mut next_tick, now);
                self.raft_thread.process(&mut inputs, ticks, now);
                let settled = !self.settle()?;
                if !self.raft_thread.replica.is_sole_member() {
                    return Ok(Pause::MembershipChanged); // "Persisted" is in the inbox, and will be handled there.
                }
                if settled && self.raft_thread.accepted.is_some() {
                    return Ok(Pause::Install);
                }
                if settled {
                    break;
                }
                // "Persisted", and inputs that came while the disk worked.
                self.raft_thread.inbox.drain(&mut inputs);
            }
        }
        Ok(Pause::Stopped)
    }

    /// Applies and writes what was handed over; false if there was nothing.
    fn settle(&mut self) -> Result<bool, Halt> {
        let (mut tasks, mut handoffs) = (Vec::<LogTask>::new(), Vec::new());
        self.raft_thread.apply_thread.drain(&mut handoffs);
        self.raft_thread.log.drain(&mut tasks);
        if tasks.is_empty() && handoffs.is_empty() {
            return Ok(false);
        }
        self.apply_thread.process(&mut handoffs, Instant::now())?;
        self.log_thread.process(&mut tasks)?;
        Ok(true)
    }

    /// Runs raft on this thread, and log and apply on one each. Before this returns, those finish all that was handed over.
    fn run_on_three_threads(&mut self) -> Pause {
        let Self { raft_thread, log_thread, apply_thread } = self;
        let (log, handoffs) = (raft_thread.log.clone(), raft_thread.apply_thread.clone());
        let pause = thread::scope(|scope| {
            scope_thread(scope, "log", || log_thread.run(&log));
            scope_thread(scope, "apply", || apply_thread.run(&handoffs));
            let mut pause = Pause::Stopped;
            // A panic must end the process at once; leaving the scope would wait for the other two threads.
            abort_on_failure("raft", || {
                pause = raft_thread.run();
                Ok(())
            });
            log.close();
            handoffs.close();
            pause
        });
        raft_thread.log = Arc::new(Inbox::default());
        raft_thread.apply_thread = Arc::new(Inbox::default());
        pause
    }

    /// Installs a snapshot that raft has accepted: first the database is replaced, then the log is reset, then raft's pending
    /// write is carried out.
    pub fn install(&mut self) -> Result<(), Halt> {
        let accepted = self.raft_thread.accepted.take().expect("the raft thread paused for it");
        let Accepted { install, write } = accepted;
        let arrived = self.raft_thread.arrived.take().filter(|arrived| arrived.index == install.at.index);
        let Arrived { incoming, done, .. } = arrived.expect("raft accepts only the snapshot that it was given last");
        tracing::info!(index = install.at.index, term = install.at.term, "installing a snapshot");
        METRICS.snapshots_in_progress.set(1);
        self.log_thread.install(&install, incoming.adopt)?;
        self.apply_thread.restore(incoming.machine);
        self.raft_thread.status.set_unflushed(0);
        if let Some(write) = write {
            self.log_thread.process(&mut vec![LogTask::Write(write)])?;
        }
        let mut inputs = Vec::new();
        self.raft_thread.inbox.drain(&mut inputs);
        self.raft_thread.process(&mut inputs, 0, Instant::now());
        METRICS.snapshots_in_progress.set(0);
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
