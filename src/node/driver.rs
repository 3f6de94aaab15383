//! The raft thread: wait, drain, one turn after another. It never waits for a disk or for a full queue.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    applier::Handoff,
    inbox::Inbox,
    log::{LogStore, Position},
    replica::{Replica, Turn, Write},
    status::Status,
    waiters::{ProposalWaiter, ReadWaiter},
};
use crate::error::Halt;

/// What the raft thread hears.
pub enum Input {
    /// Somebody wants an entry in the log, and waits for its outcome.
    Propose {
        /// The ID inside the entry.
        id: u64,
        /// The entry.
        data: Bytes,
        /// Who waits.
        waiter: ProposalWaiter,
    },
    /// Somebody wants to read what was acknowledged before now.
    Read(ReadWaiter),
    /// Somebody wants to see applied what is known here to be committed.
    CatchUp(ReadWaiter),
    /// The log has synced the write with this number and all before it.
    Persisted(u64),
    /// The database survives a crash up to this index.
    Durable(u64),
}

/// What the log thread hears.
pub enum LogTask {
    /// Make this durable, then send what it promises.
    Write(Write),
    /// Forget everything up to here.
    Cut(Position),
}

/// Late ticks are delivered up to this many at once: a process that was paused must hear its mail before it wants an
/// election.
const LATE_TICKS: u32 = 3;

/// The raft thread's belongings.
pub struct Driver {
    /// The value that it drives.
    pub replica: Replica<ReadWaiter>,
    /// What it hears.
    pub inbox: Arc<Inbox<Input>>,
    /// The log thread's ear.
    pub log: Arc<Inbox<LogTask>>,
    /// The apply thread's ear.
    pub applier: Arc<Inbox<Handoff>>,
    /// What everybody may know.
    pub status: Arc<Status>,
    /// Time between ticks.
    pub tick: Duration,
    /// Entries that are kept behind the applied index, for whoever is late.
    pub catchup_entries: u64,
    /// This member's ID.
    pub id: u64,
}

impl Driver {
    /// Runs until the inbox is closed.
    pub fn run(mut self) {
        let mut inputs = Vec::new();
        let mut next_tick = Instant::now() + self.tick;
        while self.inbox.receive(&mut inputs, Some(next_tick)) {
            let ticks = self.ticks_due(&mut next_tick);
            self.take(&mut inputs, ticks);
        }
        self.log.close();
        self.applier.close();
    }

    /// Hears everything that lies there, then lets so many ticks go by, then acts.
    pub fn take(&mut self, inputs: &mut Vec<Input>, ticks: u32) {
        let mut handoff = Handoff::default();
        for input in inputs.drain(..) {
            self.hear(input, &mut handoff);
        }
        for _ in 0..ticks {
            self.replica.tick();
        }
        if ticks > 0 {
            self.status.set_ticked();
            handoff.expire = true;
        }
        self.replica.applied(self.status.applied());
        while let Some(turn) = self.replica.turn() {
            self.carry_out(turn, &mut handoff);
        }
        if self.begins_to_rule_alone() {
            self.status.set_rules_alone(true);
        }
        self.status.set_term(self.replica.term());
        self.status.set_committed(self.replica.committed());
        if !handoff.is_empty() {
            let _ = self.applier.send(handoff); // A closed applier means that everything stops.
        }
    }

    /// How many ticks have become due; moves the next one on.
    pub fn ticks_due(&self, next_tick: &mut Instant) -> u32 {
        let now = Instant::now();
        let mut due = 0;
        while *next_tick <= now {
            *next_tick += self.tick;
            due += 1;
        }
        due.min(LATE_TICKS)
    }

    /// A leader knows everything that was ever acknowledged, but after a restart the database is behind the log. An entry of
    /// the leader's own term comes after all that others, or an earlier life of this member, have acknowledged.
    fn begins_to_rule_alone(&self) -> bool {
        !self.status.rules_alone()
            && self.replica.leadership().is_self
            && self.status.applied_term() == self.replica.term()
            && self.replica.is_sole_voter()
    }

    fn hear(&mut self, input: Input, handoff: &mut Handoff) {
        match input {
            Input::Propose { id, data, waiter } => {
                self.replica.propose(data);
                handoff.waiters.push((id, waiter));
            }
            Input::Read(waiter) => self.replica.read(waiter),
            Input::CatchUp(waiter) => handoff.catch_up.push((self.replica.committed(), waiter)),
            Input::Persisted(number) => self.replica.persisted(number),
            Input::Durable(index) => self.cut(index),
        }
    }

    fn carry_out(&mut self, turn: Turn<ReadWaiter>, handoff: &mut Handoff) {
        if let Some(leadership) = turn.leadership {
            tracing::info!(
                "local-member-id" = format_args!("{:x}", self.id),
                leader = format_args!("{:x}", leadership.leader),
                term = self.replica.term(),
                "leader changed"
            );
            self.status.set_leader(leadership.leader);
            self.status.set_rules_alone(false);
            handoff.leadership = Some(leadership);
        }
        assert!(turn.messages.is_empty(), "a sole member has nobody to talk to");
        handoff.entries.extend(turn.committed);
        let applied = self.status.applied();
        for (index, reads) in turn.reads {
            if index <= applied {
                for read in reads {
                    read(Ok(()));
                }
            } else {
                handoff.reads.push((index, reads));
            }
        }
        if let Some(write) = turn.write {
            let _ = self.log.send(LogTask::Write(write));
        }
    }

    /// Drops from memory and disk what no restart needs any more.
    fn cut(&mut self, durable: u64) {
        let behind = self.status.applied().saturating_sub(self.catchup_entries);
        if self.replica.position(durable.min(behind)).is_some() {
            let cut = self.replica.cut(durable.min(behind));
            let _ = self.log.send(LogTask::Cut(cut));
        }
    }
}

/// The log thread's belongings.
pub struct LogWriter {
    /// Where groups are kept.
    pub log: Box<dyn LogStore>,
    /// The raft thread's ear.
    pub raft: Arc<Inbox<Input>>,
    /// What everybody may know.
    pub status: Arc<Status>,
}

impl LogWriter {
    /// Runs until the inbox is closed; returns why this node cannot go on, if so.
    pub fn run(mut self, inbox: &Inbox<LogTask>) -> Result<(), Halt> {
        let mut tasks = Vec::new();
        while inbox.receive(&mut tasks, None) {
            self.take(&mut tasks)?;
        }
        Ok(())
    }

    /// Everything that is waiting becomes one group, one write, one sync.
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

    fn persist(&mut self, write: Option<Write>) -> Result<(), Halt> {
        let Some(write) = write else { return Ok(()) };
        if !write.group.is_empty() {
            let started = Instant::now();
            let bytes = self.log.write(&write.group)?;
            let written = Instant::now();
            self.log.sync()?;
            self.status.logged(bytes, written - started, written.elapsed());
        }
        let _ = self.raft.send(Input::Persisted(write.number));
        Ok(())
    }
}
