//! The log thread: all waiting writes become one group, which is written and synced at once. Then the messages that had to wait
//! for the sync are sent.

use std::{sync::Arc, time::Instant};

use super::{
    inbox::Inbox,
    messages::{Input, LogTask, MessageSender},
    replica::{Install, Write},
    status::Status,
};
use crate::error::Halt;
use crate::raft_log::LogStore;

/// The log thread's state.
pub struct LogThread {
    pub log: Box<dyn LogStore>,
    /// The raft thread's inbox.
    pub raft: Arc<Inbox<Input>>,
    /// Sends the messages that had to wait for the sync.
    pub message_sender: Arc<dyn MessageSender>,
    pub status: Arc<Status>,
}

impl LogThread {
    /// Runs until the inbox is closed. An error is fatal to the node.
    pub fn run(&mut self, inbox: &Inbox<LogTask>) -> Result<(), Halt> {
        let mut tasks = Vec::new();
        while inbox.receive(&mut tasks, None) {
            self.process(&mut tasks)?;
        }
        Ok(())
    }

    /// Carries out the tasks, writing consecutive writes as one group.
    pub fn process(&mut self, tasks: &mut Vec<LogTask>) -> Result<(), Halt> {
        let mut gathered: Option<Write> = None;
        for task in tasks.drain(..) {
            match task {
                LogTask::Write(write) => match &mut gathered {
                    Some(earlier) => earlier.absorb(write),
                    None => gathered = Some(write),
                },
                LogTask::Truncate(at) => {
                    self.persist(gathered.take())?;
                    self.log.truncate(at)?;
                }
            }
        }
        self.persist(gathered)
    }

    /// Resets the log to begin after a snapshot. `adopt` makes the snapshot this member's database. Meanwhile the log holds a
    /// mark, by which the next start finds out whether a crash came before or after `adopt`.
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
            self.status.add_log_write(bytes, written - started, written.elapsed());
        }
        // Raft first: the messages may be vote requests, and it must know that the write is durable before it receives votes.
        let _ = self.raft.send(Input::Persisted(write.number));
        if !write.persisted_messages.is_empty() {
            self.message_sender.send(write.persisted_messages);
        }
        Ok(())
    }
}
