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
use crate::metrics::METRICS;
use crate::raft_log::LogStore;
use crate::slow_log::{SLOW_SYNC, Slow};

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
            let (entries, synced) = (write.group.entries.len(), Instant::now());
            self.status.add_log_write(bytes, written - started, synced - written);
            METRICS.log_bytes.set(i64::try_from(self.log.size_bytes()).unwrap_or(i64::MAX));
            if entries > 0 {
                #[allow(clippy::cast_precision_loss, reason = "a group is small")]
                METRICS.log_groups.observe(entries as f64);
            }
            if synced - written > SLOW_SYNC
                && let Some(suppressed) = Slow::Sync.count(synced)
            {
                tracing::warn!(
                    { took = ?synced - written, "expected-duration" = ?SLOW_SYNC, entries, suppressed },
                    "slow fdatasync"
                );
            }
        }
        // Raft first: the messages may be vote requests, and it must know that the write is durable before it receives votes.
        let _ = self.raft.send(Input::Persisted(write.number));
        if !write.persisted_messages.is_empty() {
            self.message_sender.send(write.persisted_messages);
        }
        Ok(())
    }
}
