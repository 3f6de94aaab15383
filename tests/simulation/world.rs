//! One run: a member, its clients, a seed that says what happens next, and what must be true all the while.
//!
//! * What was handed to the apply thread once is the agreed history: no crash changes it or makes it shorter.
//! * Whoever got an answer got the model's answer for his command at its place in that history.
//! * The state is the model's, at the head and at every revision that is not compacted.
//! * A read behind the barrier sees every write that was acknowledged before it was asked for.
//! * Nothing is applied that the log has not called durable; nothing is cut from it that the database has not.
//! * At the end HashKV is that of a member that lived through the same history without a crash.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use bytes::Bytes;
use metastore::{
    error::Error,
    mvcc::{Interval, Reader, read::Query},
    proto::{
        etcdserverpb::{
            DeleteRangeResponse, LeaseGrantResponse, PutResponse, TxnResponse, response_op::Response as OpResponse,
        },
        mvccpb::KeyValue,
    },
    state::{self, Command, Machine, Readers, Response},
    storage::memory::Memory,
};
use parking_lot::Mutex;
use prost::Message;
use raft::eraftpb;

use super::{
    client,
    dice::Dice,
    disk::Fault,
    member::{Disks, Member, Share, TICK, founded_database},
    model::{Answer, Model, Outcome},
};

/// What clients have been told and not yet looked at.
#[derive(Debug)]
enum Told {
    Outcome(u64, Result<Response, Error>),
    /// A read that wanted at least this revision may read at that one.
    Read {
        wanted: i64,
        head: i64,
    },
}

type Mailbox = Arc<Mutex<Vec<Told>>>;

/// The agreed history, and what it came to.
#[derive(Default)]
struct History {
    entries: BTreeMap<u64, eraftpb::Entry>,
    model: Model,
    /// By the command's ID.
    outcomes: BTreeMap<u64, Outcome>,
}

impl History {
    /// An entry is about to be applied, for the first time or again.
    fn see(&mut self, entry: &eraftpb::Entry) {
        if let Some(before) = self.entries.get(&entry.index) {
            assert_eq!((before.term, &before.data), (entry.term, &entry.data), "entry {} has changed", entry.index);
            return;
        }
        let next = self.entries.last_key_value().map_or(2, |(last, _)| last + 1);
        assert_eq!(entry.index, next, "entries are handed over without gaps");
        self.entries.insert(entry.index, entry.clone());
        if !entry.data.is_empty() {
            let command = Command::decode(entry.data.clone()).expect("the simulation proposes what it can read");
            let outcome = self.model.apply(&command.request);
            self.outcomes.insert(command.id, outcome);
        }
    }

    fn last_index(&self) -> u64 {
        self.entries.last_key_value().map_or(1, |(last, _)| *last)
    }
}

/// A run.
pub struct World {
    dice: Dice,
    now: Instant,
    fault: Option<Fault>,
    member: Member,
    history: History,
    mailbox: Mailbox,
    /// The highest revision that anybody was told of.
    acknowledged: i64,
    /// How many keys the clients know.
    keys: usize,
    next_id: u64,
    crashes: usize,
    answers: usize,
    /// One line for each event.
    pub trace: Vec<String>,
}

/// What a run came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    pub crashes: usize,
    pub entries: usize,
    pub answers: usize,
}

impl World {
    pub fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut dice = Dice::new(seed);
        let keys = *dice.pick(&client::KEY_SPACES);
        let now = Instant::now(); // Only differences count.
        let member = Member::start(Disks::found(), fault, now, &mut dice).expect("a new member starts");
        Self {
            dice,
            now,
            fault,
            member,
            history: History::default(),
            mailbox: Mailbox::default(),
            acknowledged: 1,
            keys,
            next_id: 1,
            crashes: 0,
            answers: 0,
            trace: Vec::new(),
        }
    }

    /// Lives through so many steps and an end in peace.
    pub fn run(&mut self, steps: usize) -> Report {
        for _ in 0..steps {
            self.step();
            self.listen();
        }
        self.crash();
        self.settle();
        self.check_state(true);
        self.check_hashes();
        Report { crashes: self.crashes, entries: self.history.entries.len(), answers: self.answers }
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        self.trace.push(line());
    }

    fn step(&mut self) {
        let share = Share::draw(&mut self.dice);
        match self.dice.below(1000) {
            0..280 => self.propose(),
            280..330 => self.read(),
            330..520 => {
                let ticks = u32::from(self.dice.percent(10));
                self.now += TICK * ticks;
                self.note(|| format!("turn {share:?} ticks {ticks}"));
                self.member.turn(share, ticks);
            }
            520..680 => {
                self.note(|| format!("log {share:?}"));
                self.member.write_log(share).expect("the disk works");
            }
            680..840 => self.apply(share),
            840..910 => {
                self.note(|| "compact".to_owned());
                self.member.compact(self.now).expect("the disk works");
            }
            910..950 => {
                self.note(|| "flush".to_owned());
                self.member.flush(self.now).expect("the disk works");
            }
            950..985 => self.check_state(false),
            _ => self.crash(),
        }
    }

    fn propose(&mut self) {
        let id = self.next_id;
        self.next_id += 1;
        let request = client::command(&mut self.dice, self.keys, id, self.history.model.head);
        let (kind, bytes) = client::encode(&request);
        self.note(|| format!("propose {id}: {request:?}"));
        let mailbox = self.mailbox.clone();
        let waiter = move |outcome| mailbox.lock().push(Told::Outcome(id, outcome));
        self.member.node.propose(id, kind, &bytes, Box::new(waiter));
    }

    fn read(&mut self) {
        let wanted = self.acknowledged;
        self.note(|| format!("read what is acknowledged up to {wanted}"));
        let (mailbox, keys) = (self.mailbox.clone(), self.reader());
        let waiter = move |outcome: Result<(), Error>| {
            if outcome.is_ok() {
                mailbox.lock().push(Told::Read { wanted, head: keys.head() });
            }
        };
        self.member.node.read_barrier(Box::new(waiter));
    }

    fn apply(&mut self, share: Share) {
        self.note(|| format!("apply {share:?}"));
        let Self { member, history, now, .. } = self;
        member.apply(share, *now, |entry| history.see(entry)).expect("the disk works");
    }

    fn crash(&mut self) {
        self.crashes += 1;
        let mut dice = Dice::new(self.dice.below(usize::MAX) as u64);
        // The old member stops to exist before the new one begins.
        let member = std::mem::replace(
            &mut self.member,
            Member::start(Disks::found(), None, self.now, &mut dice).expect("a new member starts"),
        );
        let disks = member.crash(&mut dice);
        self.mailbox.lock().clear();
        let started = Member::start(disks, self.fault, self.now, &mut dice);
        self.member = started.unwrap_or_else(|halt| panic!("no start after a crash: {halt}"));
        let (applied, agreed) = (self.member.applied(), self.history.last_index());
        assert!(applied.index <= agreed, "{applied:?} is in the database, but nobody handed it over");
        self.note(|| format!("crash, back at {applied:?} of {agreed}"));
    }

    /// Clients look at what they were told.
    fn listen(&mut self) {
        let told = std::mem::take(&mut *self.mailbox.lock());
        for told in told {
            match told {
                Told::Read { wanted, head } => {
                    self.answers += 1;
                    assert!(head >= wanted, "a read at {head} follows an acknowledgement of {wanted}");
                }
                // The outcome is unknown: the command may be in the history or not.
                Told::Outcome(_, Err(Error::Timeout | Error::DeadlineExceeded | Error::Stopped)) => (),
                Told::Outcome(id, outcome) => self.hear(id, outcome),
            }
        }
    }

    fn hear(&mut self, id: u64, outcome: Result<Response, Error>) {
        self.answers += 1;
        let expected = self.history.outcomes.get(&id);
        let expected = expected.unwrap_or_else(|| panic!("command {id} is answered before it is agreed"));
        let outcome = outcome.map(|response| {
            let like = expected.as_ref().map_or(&Answer::Nothing, |(_, answer)| answer);
            (response.revision, decode(like, &response.body))
        });
        assert_eq!(&outcome, expected, "the answer to command {id}");
        if let Ok((revision, _)) = outcome {
            self.acknowledged = self.acknowledged.max(revision);
        }
    }

    /// Everything that is on its way arrives.
    fn settle(&mut self) {
        let mut rounds = 0;
        while !self.member.is_quiet() || rounds == 0 {
            rounds += 1;
            assert!(rounds < 1000, "the member does not come to rest");
            self.member.turn(Share::All, 0);
            self.member.write_log(Share::All).expect("the disk works");
            self.apply(Share::All);
            self.listen();
        }
        let (applied, agreed) = (self.member.applied().index, self.history.last_index());
        assert_eq!(applied, agreed, "all that was agreed is applied, and nothing else");
    }

    fn reader(&self) -> Reader {
        self.member.node.readers().keys.clone()
    }

    /// Holds what can be read against the model. While entries are on their way the model is ahead; where it has compacted
    /// by then, nothing can be compared.
    fn check_state(&mut self, all_revisions: bool) {
        let keys = self.reader();
        let head = keys.head();
        let model = &self.history.model;
        assert!(head <= model.head, "the head is {head}, but all that was agreed comes to {}", model.head);
        assert!(keys.compacted() <= model.compacted, "compacted at {}", keys.compacted());
        let oldest = keys.compacted().max(1);
        let revisions =
            if all_revisions { (oldest..=head).collect() } else { vec![head, self.dice.between(oldest, head)] };
        for revision in revisions {
            assert_eq!(state_at(&keys, revision), model.state_at(revision), "the state at revision {revision}");
        }
        if self.member.applied().index == self.history.last_index() {
            assert_eq!((head, keys.compacted()), (model.head, model.compacted));
            check_leases(&self.member.node.readers(), model);
        }
        self.trace.push(format!("looked at revision {head}"));
    }

    /// Lives through the history again, without crashes, and compares hashes.
    fn check_hashes(&mut self) {
        let peaceful = replay(self.history.entries.values());
        let keys = self.reader();
        for revision in keys.compacted().max(1)..=keys.head() {
            let (ours, theirs) = (keys.hash_kv(revision), peaceful.hash_kv(revision));
            let equal = matches!((&ours, &theirs), (Ok(ours), Ok(theirs)) if ours == theirs);
            assert!(equal, "the hash at revision {revision}: {ours:?}, and without crashes {theirs:?}");
        }
        while !self.member.compaction_is_done() {
            self.member.compact(self.now).expect("the disk works");
        }
        let (ours, theirs) = (keys.hash_kv(0), peaceful.hash_kv(0));
        assert!(matches!((&ours, &theirs), (Ok(ours), Ok(theirs)) if ours == theirs), "{ours:?}, {theirs:?}");
        self.check_state(true);
    }
}

/// The key space of a member that applied these entries and never crashed or forgot anything.
fn replay<'a>(entries: impl Iterator<Item = &'a eraftpb::Entry>) -> Reader {
    let memory: Arc<Memory> = Arc::new(founded_database());
    let mut machine = Machine::open(memory, 0).expect("memory does not fail");
    for entry in entries {
        let entry =
            state::Entry { index: entry.index, term: entry.term, data: entry.data.clone(), changes_members: false };
        machine.apply(&entry).expect("memory does not fail");
        machine.commit().expect("memory does not fail");
        machine.publish_head();
    }
    machine.readers().keys
}

fn state_at(keys: &Reader, revision: i64) -> Vec<KeyValue> {
    let query = Query { revision, ..Query::all(Interval::From(Bytes::new())) };
    let (rows, _) = keys.range(&query).unwrap_or_else(|failure| panic!("the range at {revision}: {failure:?}"));
    rows.records.into_iter().map(|record| KeyValue::decode(record).expect("a record")).collect()
}

fn check_leases(readers: &Readers, model: &Model) {
    let leases: BTreeMap<_, _> = readers
        .leases
        .all()
        .into_iter()
        .map(|(id, _)| (id.0, readers.leases.keys(id).unwrap_or_default().into_iter().collect()))
        .collect();
    assert_eq!(leases, model.leases, "leases and their keys");
}

/// Reads an answer, headers left out.
fn decode(like: &Answer, body: &[u8]) -> Answer {
    match like {
        Answer::Put(_) => Answer::Put(PutResponse::decode(body).expect("an answer")),
        Answer::Delete(_) => Answer::Delete(DeleteRangeResponse::decode(body).expect("an answer")),
        Answer::Grant(_) => Answer::Grant(LeaseGrantResponse::decode(body).expect("an answer")),
        Answer::Nothing => Answer::Nothing,
        Answer::Txn(_) => {
            let mut txn = TxnResponse::decode(body).expect("an answer");
            for op in &mut txn.responses {
                match op.response.as_mut().expect("filled") {
                    OpResponse::ResponseRange(range) => range.header = None,
                    OpResponse::ResponsePut(put) => put.header = None,
                    OpResponse::ResponseDeleteRange(delete) => delete.header = None,
                    OpResponse::ResponseTxn(txn) => txn.header = None,
                }
            }
            Answer::Txn(txn)
        }
    }
}
