//! The log thread: everything that waits becomes one group, one write, one sync; then its promises are sent.

use std::{sync::Arc, time::Instant};

use super::{
    driver::Input,
    inbox::Inbox,
    log::{LogStore, Position},
    peers::Post,
    replica::{Install, Write},
    status::Status,
};
use crate::error::Halt;

/// What the log thread hears.
pub enum LogTask {
    /// Make this durable, then send what it promises.
    Write(Write),
    /// Forget everything up to here.
    Cut(Position),
}

/// The log thread's belongings.
pub struct LogWriter {
    /// Where groups are kept.
    pub log: Box<dyn LogStore>,
    /// The raft thread's ear.
    pub raft: Arc<Inbox<Input>>,
    /// Who carries promises.
    pub post: Arc<dyn Post>,
    /// What everybody may know.
    pub status: Arc<Status>,
}

impl LogWriter {
    /// Runs until the inbox is closed; returns why this node cannot go on, if so.
    pub fn run(&mut self, inbox: &Inbox<LogTask>) -> Result<(), Halt> {
        let mut tasks = Vec::new();
        while inbox.receive(&mut tasks, None) {
            self.take(&mut tasks)?;
        }
        Ok(())
    }

    /// Everything that is waiting becomes one group.
    pub fn take(&mut self, tasks: &mut Vec<LogTask>) -> Result<(), Halt> {
        let mut gathered: Option<Write> = None;
        for task in tasks.drain(..) {
            match task {
                LogTask::Write(write) => match &mut gathered {
                    Some(earlier) => earlier.absorb(write),
                    None => gathered = Some(write),
                },
                LogTask::Cut(at) => {
                    self.persist(gathered.take())?;
                    self.log.cut(at)?;
                }
            }
        }
        self.persist(gathered)
    }

    /// Starts the log over behind a snapshot. `adopt` makes the snapshot this member's database; a crash before or after it
    /// is told apart at the next start by the mark that stands in the log meanwhile.
    pub fn install(&mut self, install: &Install, adopt: impl FnOnce() -> Result<(), Halt>) -> Result<(), Halt> {
        self.log.set_installing(Some(install.at))?;
        adopt()?;
        self.log.reset(install.at, &install.hard_state)
    }

    fn persist(&mut self, write: Option<Write>) -> Result<(), Halt> {
        let Some(write) = write else { return Ok(()) };
        if !write.group.is_empty() {
            let started = Instant::now();
            let bytes = self.log.write(&write.group)?;
            let written = Instant::now();
            self.log.sync()?;
            self.status.logged(bytes, written - started, written.elapsed());
        }
        // Raft first: it must know that it is durable what it asks votes for before it can hear of any.
        let _ = self.raft.send(Input::Persisted(write.number));
        if !write.promises.is_empty() {
            self.post.send(write.promises);
        }
        Ok(())
    }
}
