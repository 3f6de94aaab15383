//! The requests of clients, the answers of members, and whether these are correct.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use metastore::{
    error::Error,
    mvcc::{Interval, Query, Reader},
    proto::mvccpb::KeyValue,
    state::{Kind, Readers, Response},
};
use parking_lot::Mutex;
use prost::Message;

use super::{
    client::{self, MembershipChange},
    model::Model,
    world::{Event, World},
};

/// An answer of a member that has not been checked yet.
#[derive(Debug)]
pub enum Completion {
    Outcome(u64, Result<Response, Error>),
    /// A linearizable read that must see at least revision `wanted` may now read at this member.
    Read {
        member: u64,
        incarnation: u64,
        wanted: i64,
        outcome: Result<(), Error>,
    },
    /// A request to renew a lease can be processed again: the member has confirmed that it leads, or leads no more, or the
    /// lease has ended.
    Renewable {
        lease: i64,
        at: u64,
        incarnation: u64,
    },
    /// A snapshot was installed or rejected.
    Installed {
        transfer: u64,
        installed: bool,
    },
}

pub type Completions = Arc<Mutex<Vec<Completion>>>;

impl World {
    /// Sends a request of a client, and schedules its next one.
    pub fn client_request(&mut self) {
        if self.quiescent {
            return;
        }
        let pause = self.rng.millis(0, self.config.think_time);
        self.events.schedule(pause, Event::ClientRequest);
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let id = *self.rng.pick(&running);
        match self.rng.below(100) {
            0..70 => self.propose(id),
            70..95 => self.read(id),
            95..98 => self.check_state(id, false),
            _ => self.move_watcher(id),
        }
    }

    pub fn propose(&mut self, at: u64) {
        let id = self.next_id;
        self.next_id += 1;
        let request = client::command(&mut self.rng, self.config.keys, id, self.history.model.head);
        let (kind, bytes) = client::encode(&request);
        self.note(|_| format!("{at}: propose {id}: {request:?}"));
        self.propose_as(id, at, kind, &bytes);
    }

    pub fn propose_request(&mut self, at: u64, kind: Kind, bytes: &[u8]) {
        let id = self.next_id;
        self.next_id += 1;
        self.propose_as(id, at, kind, bytes);
    }

    fn propose_as(&mut self, id: u64, at: u64, kind: Kind, bytes: &[u8]) {
        let waiter = self.outcome_waiter(id);
        let Some(member) = self.member(at) else { return };
        member.node.propose(id, kind, bytes, waiter);
        self.schedule_threads(at);
    }

    pub fn change_members(&mut self, at: u64, change: MembershipChange) {
        let id = self.next_id;
        self.next_id += 1;
        self.note(|_| format!("{at}: propose {id}: {change:?}"));
        let waiter = self.outcome_waiter(id);
        let Some(member) = self.member(at) else { return };
        member.node.change_members(id, change.encode(id), waiter);
        self.schedule_threads(at);
    }

    fn outcome_waiter(&self, id: u64) -> Box<dyn FnOnce(Result<Response, Error>) + Send> {
        let completions = self.completions.clone();
        Box::new(move |outcome| completions.lock().push(Completion::Outcome(id, outcome)))
    }

    pub fn read(&mut self, at: u64) {
        let (wanted, completions) = (self.acknowledged, self.completions.clone());
        self.note(|_| format!("{at}: read, revision {wanted} is acknowledged"));
        let Some(member) = self.member(at) else { return };
        let incarnation = member.incarnation;
        let waiter =
            move |outcome| completions.lock().push(Completion::Read { member: at, incarnation, wanted, outcome });
        member.node.read_barrier(Box::new(waiter));
        self.schedule_threads(at);
    }

    fn move_watcher(&mut self, to: u64) {
        if self.watchers.is_empty() {
            return;
        }
        let nth = self.rng.below(self.watchers.len());
        self.note(|world| format!("{to}: watcher {nth} connects, next revision {}", world.watchers[nth].next));
        let member = self.slots[&to].member.as_ref().expect("it is running");
        self.watchers[nth].watch_at(to, member);
        self.deliver(to).expect("memory does not fail");
    }

    /// Checks the answers that have arrived.
    pub fn handle_completions(&mut self) {
        let completions = std::mem::take(&mut *self.completions.lock());
        for completion in completions {
            match completion {
                Completion::Renewable { lease, at, incarnation } => {
                    if self.member_in(at, incarnation).is_some() {
                        self.renew_lease(lease, at);
                    }
                }
                Completion::Installed { transfer, installed } => self.schedule_report(transfer, installed),
                Completion::Read { member, incarnation, wanted, outcome } => {
                    self.check_read(member, incarnation, wanted, outcome);
                }
                // The outcome is unknown: the command may be in the history or not.
                Completion::Outcome(_, Err(error)) if is_unknown_outcome(&error) => (),
                Completion::Outcome(id, outcome) => {
                    self.report.answers += 1;
                    if let Some(revision) = self.history.check_answer(id, outcome) {
                        self.acknowledged = self.acknowledged.max(revision);
                    }
                    self.note(|_| format!("command {id} is answered"));
                }
            }
        }
    }

    fn check_read(&mut self, id: u64, incarnation: u64, wanted: i64, outcome: Result<(), Error>) {
        let Some(member) = self.member_in(id, incarnation) else { return };
        let head = member.node.readers().keys.head();
        match outcome {
            Ok(()) => {
                assert!(head >= wanted, "a read at {id} saw revision {head} after {wanted} was acknowledged");
                self.report.reads += 1;
                self.acknowledged = self.acknowledged.max(head); // Later reads must see at least this.
                self.note(|_| format!("{id}: a read sees revision {head}"));
            }
            Err(error) => self.note(|_| format!("{id}: a read is refused: {error}")),
        }
    }

    /// Compares what can be read from a member with the model. Members may be behind it.
    pub fn check_state(&mut self, id: u64, all_revisions: bool) {
        let Some(member) = self.slots[&id].member.as_ref() else { return };
        let (keys, model) = (member.node.readers().keys.clone(), &self.history.model);
        let head = keys.head();
        assert!(head <= model.head, "the head of {id} is {head}, but the committed history ends at {}", model.head);
        assert!(keys.compacted() <= model.compacted, "compacted at {}", keys.compacted());
        let oldest = keys.compacted().max(1);
        let revisions =
            if all_revisions { (oldest..=head).collect() } else { vec![head, self.rng.between(oldest, head)] };
        for revision in revisions {
            assert_eq!(state_at(&keys, revision), model.state_at(revision), "{id} at revision {revision}");
        }
        if member.applied().index == self.history.last_index() {
            assert_eq!((head, keys.compacted()), (model.head, model.compacted));
            check_leases(&member.node.readers(), model);
        }
        self.note(|_| format!("{id}: state checked at revision {head}"));
    }
}

/// Whether an error leaves open if the command was executed.
fn is_unknown_outcome(error: &Error) -> bool {
    matches!(
        error,
        Error::Timeout
            | Error::TimeoutLeaderFailure
            | Error::TimeoutConnectionLost
            | Error::DeadlineExceeded
            | Error::Stopped
            | Error::TooManyRequests
    )
}

/// The longest that a client waits for an answer.
pub const CLIENT_TIMEOUT: Duration = Duration::from_secs(4);

fn state_at(keys: &Reader, revision: i64) -> Vec<KeyValue> {
    let query = Query { revision, ..Query::all(Interval::From(Bytes::new())) };
    let (rows, _) = keys.range(&query).unwrap_or_else(|failure| panic!("the range at {revision}: {failure:?}"));
    rows.records.into_iter().map(|record| KeyValue::decode(record).expect("a record")).collect()
}

fn check_leases(readers: &Readers, model: &Model) {
    let leases = readers.leases.all().into_iter();
    let leases = leases.map(|(id, _)| (id.0, readers.leases.keys(id).unwrap_or_default().into_iter().collect()));
    assert_eq!(leases.collect::<std::collections::BTreeMap<_, _>>(), model.leases, "leases and their keys");
}
