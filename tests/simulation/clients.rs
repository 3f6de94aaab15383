//! What clients want of members, what they are told, and whether that is true.

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
    client::{self, Change},
    model::Model,
    world::{Event, World},
};

/// What clients have been told and not yet looked at.
#[derive(Debug)]
pub enum Told {
    Outcome(u64, Result<Response, Error>),
    /// A read that wants at least this revision may read now at this member.
    MayRead {
        member: u64,
        life: u64,
        wanted: i64,
        outcome: Result<(), Error>,
    },
    /// A member is certain to lead, or leads no more, or has let a lease end: a request to renew one can be looked at again.
    Renewable {
        lease: i64,
        at: u64,
        life: u64,
    },
    /// A copy of a database is in place, or was not wanted.
    Installed {
        shipment: u64,
        installed: bool,
    },
}

pub type Mailbox = Arc<Mutex<Vec<Told>>>;

impl World {
    /// Some client does something, and will again.
    pub fn wish(&mut self) {
        if self.peace {
            return;
        }
        let pause = self.dice.millis(0, self.climate.think);
        self.agenda.after(pause, Event::Wish);
        let running = self.running();
        if running.is_empty() {
            return;
        }
        let id = *self.dice.pick(&running);
        match self.dice.below(100) {
            0..70 => self.propose(id),
            70..95 => self.read(id),
            95..98 => self.check_state(id, false),
            _ => self.move_watcher(id),
        }
    }

    pub fn propose(&mut self, at: u64) {
        let id = self.next_id;
        self.next_id += 1;
        let request = client::command(&mut self.dice, self.climate.keys, id, self.history.model.head);
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
        self.arrange(at);
    }

    pub fn change_members(&mut self, at: u64, change: Change) {
        let id = self.next_id;
        self.next_id += 1;
        self.note(|_| format!("{at}: wanted {id}: {change:?}"));
        let waiter = self.outcome_waiter(id);
        let Some(member) = self.member(at) else { return };
        member.node.change_members(id, change.encode(id), waiter);
        self.arrange(at);
    }

    fn outcome_waiter(&self, id: u64) -> Box<dyn FnOnce(Result<Response, Error>) + Send> {
        let mailbox = self.mailbox.clone();
        Box::new(move |outcome| mailbox.lock().push(Told::Outcome(id, outcome)))
    }

    pub fn read(&mut self, at: u64) {
        let (wanted, mailbox) = (self.acknowledged, self.mailbox.clone());
        self.note(|_| format!("{at}: read what is acknowledged up to {wanted}"));
        let Some(member) = self.member(at) else { return };
        let life = member.life;
        let waiter = move |outcome| mailbox.lock().push(Told::MayRead { member: at, life, wanted, outcome });
        member.node.read_barrier(Box::new(waiter));
        self.arrange(at);
    }

    fn move_watcher(&mut self, to: u64) {
        if self.watchers.is_empty() {
            return;
        }
        let nth = self.dice.below(self.watchers.len());
        self.note(|world| format!("{to}: watcher {nth} comes, {} is next", world.watchers[nth].next));
        let member = self.seats[&to].member.as_ref().expect("it runs");
        self.watchers[nth].go_to(to, member);
        self.deliver(to).expect("memory does not fail");
    }

    /// Clients look at what they were told.
    pub fn listen(&mut self) {
        let told = std::mem::take(&mut *self.mailbox.lock());
        for told in told {
            match told {
                Told::Renewable { lease, at, life } => {
                    if self.member_in(at, life).is_some() {
                        self.renew_lease(lease, at);
                    }
                }
                Told::Installed { shipment, installed } => self.report_later(shipment, installed),
                Told::MayRead { member, life, wanted, outcome } => self.may_read(member, life, wanted, outcome),
                // The outcome is unknown: the command may be in the history or not.
                Told::Outcome(_, Err(error)) if is_silence(&error) => (),
                Told::Outcome(id, outcome) => {
                    self.report.answers += 1;
                    if let Some(revision) = self.history.check_answer(id, outcome) {
                        self.acknowledged = self.acknowledged.max(revision);
                    }
                    self.note(|_| format!("command {id} is answered"));
                }
            }
        }
    }

    fn may_read(&mut self, id: u64, life: u64, wanted: i64, outcome: Result<(), Error>) {
        let Some(member) = self.member_in(id, life) else { return };
        let head = member.node.readers().keys.head();
        match outcome {
            Ok(()) => {
                assert!(head >= wanted, "a read of {id} at {head} follows an acknowledgement of {wanted}");
                self.report.reads += 1;
                self.acknowledged = self.acknowledged.max(head); // Who reads later sees no less.
                self.note(|_| format!("{id}: a read sees {head}"));
            }
            Err(error) => self.note(|_| format!("{id}: a read is refused: {error}")),
        }
    }

    /// Holds what can be read of a member against the model. Members may be behind it.
    pub fn check_state(&mut self, id: u64, all_revisions: bool) {
        let Some(member) = self.seats[&id].member.as_ref() else { return };
        let (keys, model) = (member.node.readers().keys.clone(), &self.history.model);
        let head = keys.head();
        assert!(head <= model.head, "the head of {id} is {head}, but all that was agreed comes to {}", model.head);
        assert!(keys.compacted() <= model.compacted, "compacted at {}", keys.compacted());
        let oldest = keys.compacted().max(1);
        let revisions =
            if all_revisions { (oldest..=head).collect() } else { vec![head, self.dice.between(oldest, head)] };
        for revision in revisions {
            assert_eq!(state_at(&keys, revision), model.state_at(revision), "{id} at revision {revision}");
        }
        if member.applied().index == self.history.last_index() {
            assert_eq!((head, keys.compacted()), (model.head, model.compacted));
            check_leases(&member.node.readers(), model);
        }
        self.note(|_| format!("{id}: looked at revision {head}"));
    }
}

/// Whether nobody knows what became of a command.
fn is_silence(error: &Error) -> bool {
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

/// How long clients wait at most for what they want.
pub const PATIENCE: Duration = Duration::from_secs(4);

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
