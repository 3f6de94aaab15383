//! One state machine with its engine, and the log that a real node would have.

use std::{error::Error, fmt::Write, ops::ControlFlow, sync::Arc};

use bytes::Bytes;
use metastore::{
    mvcc::{
        compact::{Compaction, CompactionProgress, Hashing, MAX_HASHED_HISTORY_BYTES},
        read::View,
    },
    proto::{
        etcdserverpb::{
            AlarmRequest, CompactionRequest, LeaseGrantRequest, LeaseRevokeRequest, Member, MemberPromoteRequest,
            MemberRemoveRequest, MemberUpdateRequest, PutRequest, RangeResponse, ResponseHeader,
        },
        membershippb::{Attributes, ClusterMemberAttrSetRequest},
    },
    state::{self, Command, Entry, Kind, Machine, Members, NewMember, Readers, Response, txn},
    storage::{Batch, Engine, Table, memory::Memory, rocks::Rocks},
    watch::Settings,
};
use prost::Message;
use tempfile::TempDir;

use crate::{
    parse::{self, Args},
    print,
    watch_streams::WatchHarness,
};

type Output = Result<String, Box<dyn Error>>;

const TABLES: [Table; 6] = [Table::History, Table::Meta, Table::Lease, Table::Member, Table::Removed, Table::Alarm];
const VALUE_CACHE_BYTES: u64 = 1 << 16;
const TERM: u64 = 2;

/// The engine of a state machine.
pub enum TestEngine {
    Memory(Arc<Memory>),
    Rocks(TempDir),
}

impl TestEngine {
    pub fn memory() -> Self {
        Self::Memory(Arc::default())
    }

    pub fn rocks() -> Self {
        Self::Rocks(tempfile::tempdir().unwrap())
    }

    fn open(&self) -> Arc<dyn Engine> {
        match self {
            Self::Memory(engine) => engine.clone(),
            Self::Rocks(directory) => Arc::new(Rocks::open(directory.path()).unwrap()),
        }
    }
}

/// Everything that is created anew by a restart.
struct Running {
    engine: Arc<dyn Engine>,
    machine: Machine,
    readers: Readers,
    compaction: Option<Compaction>,
    view: Option<View>,
    watchers: WatchHarness,
}

impl Running {
    fn open(engine: Arc<dyn Engine>) -> Self {
        let machine = Machine::open(engine.clone(), VALUE_CACHE_BYTES).unwrap();
        let readers = machine.readers();
        let watchers = WatchHarness::new(readers.keys.clone(), Settings::default());
        Self { engine, machine, readers, compaction: None, view: None, watchers }
    }

    /// Commits and publishes what was applied, as the apply thread does; returns it as lines of text.
    fn commit(&mut self) -> Vec<String> {
        let published = self.machine.commit().unwrap();
        let events = published.events.iter().map(print::event);
        let lines = events.chain(published.effects.iter().map(print::effect)).collect();
        self.watchers.append(published.events, published.head);
        self.machine.publish_head();
        self.watchers.settle();
        assert_eq!(published.head, self.readers.keys.head());
        lines
    }
}

/// The state machine, and the log of all entries that were applied to it.
pub struct Node {
    /// None only during a restart. Declared first, so that it is dropped before its engine.
    running: Option<Running>,
    test_engine: TestEngine,
    log: Vec<(Kind, Entry, Result<Response, metastore::error::Error>)>,
    /// Whether entries are collected into one batch.
    batching: bool,
}

impl Node {
    pub fn new(test_engine: TestEngine) -> Self {
        let engine = test_engine.open();
        let members = Members::new([Member { id: 1, ..Member::default() }]);
        Machine::bootstrap(engine.as_ref(), 1, &members, (1, 1)).unwrap();
        Self { test_engine, running: Some(Running::open(engine)), log: Vec::new(), batching: false }
    }

    fn running(&mut self) -> &mut Running {
        self.running.as_mut().expect("the node runs between commands")
    }

    /// The content of the database, in order.
    pub fn content(&self) -> Vec<(Table, Vec<u8>, Vec<u8>)> {
        let running = self.running.as_ref().expect("the node runs between commands");
        content(running.engine.as_ref())
    }

    pub fn run(&mut self, name: &str, mut args: Args) -> Output {
        let output = match self.running().watchers.run(name, &mut args) {
            Some(output) => output?,
            None => self.run_machine_command(name, &mut args)?,
        };
        args.finish()?;
        Ok(output)
    }

    /// Runs a command that is not a watch command.
    fn run_machine_command(&mut self, name: &str, args: &mut Args) -> Output {
        Ok(match name {
            "put" => self.propose(Kind::Put, &parse::put(args)?),
            "fill" => self.fill(args.expect_number()?),
            "delete" => self.propose(Kind::DeleteRange, &parse::delete(args)),
            "compact" => self.compact(args)?,
            "grant" => {
                let (id, ttl) = (args.expect_number()?, args.number("ttl")?);
                self.propose(Kind::LeaseGrant, &LeaseGrantRequest { id, ttl })
            }
            "revoke" => self.propose(Kind::LeaseRevoke, &LeaseRevokeRequest { id: args.expect_number()? }),
            "alarm" => self.alarm(args)?,
            "member" => self.member(args)?,
            "members" => print::members(self.running().machine.members()),
            "garbage" => self.apply_data(Kind::Put, false, Bytes::from_static(&[0x22, 0x7f, 1])),
            "get" => self.get(parse::range(args)?),
            "view" => self.open_view(args)?,
            "read" => self.read_view(parse::range(args)?)?,
            "close" => {
                self.running().view = None;
                String::new()
            }
            "hash" => self.hash(args)?,
            "store_hash" => {
                let running = self.running();
                let due = running.compaction.take().or_else(|| Compaction::pending(running.machine.shared()));
                let due = due.ok_or("nothing is compacted")?;
                if let Hashing::Due(mut pass) = due.hashing(MAX_HASHED_HISTORY_BYTES)? {
                    while !pass.step(2)? {}
                }
                let known = running.readers.keys.compaction_hashes();
                let known: Vec<_> = known.iter().map(|hash| hash.hash_revision).collect();
                format!("hashes of {known:?}")
            }
            "remove" => self.remove(args)?,
            "records" => self.records(args.flag("raw")),
            "leases" => self.leases(),
            "batch" => {
                self.batching = true;
                String::new()
            }
            "commit" => {
                self.batching = false;
                self.commit()
            }
            "flush" => {
                self.running().engine.flush()?;
                String::new()
            }
            "restart" => self.restart(),
            other => return Err(format!("no such command: {other}").into()),
        })
    }

    pub fn txn(&mut self, text: &str) -> Output {
        Ok(self.propose(Kind::Txn, &parse::txn(text)?))
    }

    fn propose(&mut self, kind: Kind, request: &impl Message) -> String {
        let id = self.log.len() as u64 + 1;
        self.apply_data(kind, false, Command::encode(id, kind, &request.encode_to_vec()))
    }

    fn fill(&mut self, count: i64) -> String {
        let mut last = String::new();
        for nth in 0..count {
            let (key, value) = (format!("k{nth:04}").into(), nth.to_string().into());
            last = self.propose(Kind::Put, &PutRequest { key, value, ..PutRequest::default() });
        }
        last
    }

    fn apply_data(&mut self, kind: Kind, changes_members: bool, data: Bytes) -> String {
        let index = self.running().machine.applied().index + 1;
        let entry = Entry { index, term: TERM, data, changes_members };
        let outcome = self.running().machine.apply(&entry).unwrap().outcome;
        let mut out = match &outcome {
            Ok(response) => print::response(kind, response),
            Err(error) => format!("refused: {error}"),
        };
        self.log.push((kind, entry, outcome));
        if !self.batching {
            let published = self.commit();
            _ = write!(out, "{}{published}", if published.is_empty() { "" } else { "\n" });
        }
        out
    }

    fn commit(&mut self) -> String {
        let lines = self.running().commit();
        lines.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }

    fn compact(&mut self, args: &mut Args) -> Output {
        let (revision, physical) = (args.expect_number()?, args.flag("physical"));
        let mut out = self.propose(Kind::Compact, &CompactionRequest { revision, physical });
        if physical {
            out = format!("{out}\n  {}", self.remove(&mut Args::default())?);
        }
        Ok(out)
    }

    /// Runs one step of the pending compaction with `limit=` records, or all steps.
    fn remove(&mut self, args: &mut Args) -> Output {
        let limit = args.number("limit")?;
        let running = self.running();
        let due = running.compaction.take().or_else(|| Compaction::pending(running.machine.shared()));
        let Some(mut compaction) = due else { return Ok("nothing to remove".into()) };
        let piece = if limit == 0 { 1000 } else { usize::try_from(limit)? };
        let progress = loop {
            let progress = compaction.step(piece)?;
            if progress != CompactionProgress::More || limit != 0 {
                break progress;
            }
        };
        let out = format!("removed {}, up to {}: {progress:?}", compaction.removed(), compaction.at());
        running.compaction = (progress != CompactionProgress::Done).then_some(compaction);
        Ok(out.to_lowercase())
    }

    fn alarm(&mut self, args: &mut Args) -> Output {
        let action = match args.word().as_deref() {
            Some("list") => 0,
            Some("raise") => 1,
            Some("clear") => 2,
            _ => return Err("an alarm is listed, raised or cleared".into()),
        };
        let alarm = match args.word().as_deref() {
            None => 0,
            Some("nospace") => state::NOSPACE,
            Some("corrupt") => state::CORRUPT,
            Some(other) => other.parse()?,
        };
        let member_id = args.number("member")?.cast_unsigned();
        Ok(self.propose(Kind::Alarm, &AlarmRequest { action, member_id, alarm }))
    }

    fn member(&mut self, args: &mut Args) -> Output {
        let what = args.word().ok_or("a member is added, removed, promoted or updated")?;
        let id = args.expect_number()?.cast_unsigned();
        let misfiled = args.flag("misfiled");
        let peer_ur_ls: Vec<String> = std::iter::from_fn(|| args.word()).collect();
        let (kind, for_raft, request) = match what.as_str() {
            "add" => {
                let member = Member { id, peer_ur_ls, is_learner: args.flag("learner"), ..Member::default() };
                let max_learners = args.option("max_learners").map(|most| most.parse()).transpose()?;
                (Kind::MemberAdd, true, NewMember { member, max_learners }.encode())
            }
            "remove" => (Kind::MemberRemove, true, MemberRemoveRequest { id }.encode_to_vec()),
            "promote" => (Kind::MemberPromote, true, MemberPromoteRequest { id }.encode_to_vec()),
            "update" => (Kind::MemberUpdate, false, MemberUpdateRequest { id, peer_ur_ls }.encode_to_vec()),
            "attributes" => {
                let name = args.option("name").unwrap_or_default();
                let member_attributes = Some(Attributes { name, client_urls: peer_ur_ls });
                let request = ClusterMemberAttrSetRequest { member_id: id, member_attributes };
                (Kind::MemberAttributesSet, false, request.encode_to_vec())
            }
            other => return Err(format!("unknown member command: {other}").into()),
        };
        let entry = Command::encode(self.log.len() as u64 + 1, kind, &request);
        Ok(self.apply_data(kind, for_raft != misfiled, entry))
    }

    fn get(&mut self, range: metastore::proto::etcdserverpb::RangeRequest) -> String {
        match self.running().readers.keys.range(&txn::query(range)) {
            Ok((rows, head)) => {
                let mut encoded = Vec::new();
                rows.encode(&mut encoded);
                assert_eq!(encoded.len(), rows.encoded_len());
                let header = ResponseHeader { revision: head, ..ResponseHeader::default() };
                let answer = RangeResponse::decode(encoded.as_slice()).unwrap();
                print::range(&RangeResponse { header: Some(header), ..answer })
            }
            Err(failure) => format!("refused: {failure}"),
        }
    }

    fn open_view(&mut self, args: &mut Args) -> Output {
        let revision = args.number("rev")?;
        let running = self.running();
        Ok(match running.readers.keys.view(revision) {
            Ok((view, head)) => {
                let out = format!("at={} head={head}", view.at());
                running.view = Some(view);
                out
            }
            Err(error) => format!("refused: {error}"),
        })
    }

    fn read_view(&mut self, range: metastore::proto::etcdserverpb::RangeRequest) -> Output {
        let view = self.running().view.as_ref().ok_or("no view is open")?;
        let mut encoded = Vec::new();
        view.range(&txn::query(range))?.encode(&mut encoded);
        let header = ResponseHeader { revision: view.at(), ..ResponseHeader::default() };
        Ok(print::range(&RangeResponse { header: Some(header), ..RangeResponse::decode(encoded.as_slice())? }))
    }

    fn hash(&mut self, args: &mut Args) -> Output {
        let revision = args.word().map(|word| parse::number(&word)).transpose()?.unwrap_or(0);
        Ok(match self.running().readers.keys.hash_kv(revision) {
            Ok(hash) => format!(
                "hash={} compact={} at={} head={}",
                hash.hash, hash.compact_revision, hash.hash_revision, hash.head
            ),
            Err(failure) => format!("refused: {failure}"),
        })
    }

    fn records(&self, raw: bool) -> String {
        let content = self.content();
        let history = content.iter().filter(|(table, ..)| *table == Table::History);
        let show = if raw { print::raw_record } else { print::record };
        history.map(|(_, key, value)| show(key, value)).collect::<Vec<_>>().join("\n")
    }

    fn leases(&mut self) -> String {
        let leases = &self.running().readers.leases;
        let mut lines = Vec::new();
        for (id, ttl) in leases.all() {
            let keys = leases.keys(id).unwrap();
            let keys: Vec<_> = keys.iter().map(|key| String::from_utf8_lossy(key)).collect();
            lines.push(format!("{} ttl={ttl} keys: {}", id.0, keys.join(" ")).trim_end().to_owned());
        }
        lines.join("\n")
    }

    /// A clean stop and start.
    fn restart(&mut self) -> String {
        self.batching = false;
        drop(self.running.take());
        self.start()
    }

    fn start(&mut self) -> String {
        let mut running = Running::open(self.test_engine.open());
        let progress = running.machine.applied();
        let found = running.readers.keys.head();
        let compacted = running.readers.keys.compacted();
        let mut replayed = 0;
        for (_, entry, outcome) in self.log.iter().filter(|(_, entry, _)| entry.index > progress.index) {
            let again = running.machine.apply(entry).unwrap().outcome;
            assert_eq!(again, *outcome, "entry {} has the same outcome when it is replayed", entry.index);
            running.commit();
            replayed += 1;
        }
        let head = running.readers.keys.head();
        self.running = Some(running);
        format!("found rev={found} compact={compacted}, replayed {replayed} entries, rev={head}")
    }

    /// Simulates a crash that loses the newest `lose` batches. Returns a copy of the state that is left, for the other node.
    pub fn crash(&mut self, lose: usize) -> Result<Memory, Box<dyn Error>> {
        let TestEngine::Memory(engine) = &self.test_engine else { return Err("only memory can crash".into()) };
        let keep = engine.unflushed().checked_sub(lose).ok_or("there are not so many batches to lose")?;
        let (found, copy) = (engine.crash(keep), engine.crash(keep));
        self.test_engine = TestEngine::Memory(Arc::new(found));
        Ok(copy)
    }

    /// Replaces the engine by one with the content of `found`.
    pub fn load_from(&mut self, found: &Memory) {
        drop(self.running.take());
        self.test_engine = TestEngine::rocks();
        let mut batch = Batch::default();
        for (table, key, value) in content(found) {
            batch.put(table, &key, value);
        }
        self.test_engine.open().write(&batch).unwrap();
    }

    pub fn start_after_crash(&mut self) -> String {
        self.restart()
    }
}

fn content(engine: &dyn Engine) -> Vec<(Table, Vec<u8>, Vec<u8>)> {
    let mut all = Vec::new();
    for table in TABLES {
        let take = &mut |key: &[u8], value: &[u8]| {
            all.push((table, key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        };
        engine.scan(table, &[], &[], take).unwrap();
    }
    all
}
