//! Random histories, random watches, slow readers, compactions, and steps in random order. The guarantees of the protocol are
//! checked against the history: every watch receives exactly its events, in order, once, with whole revisions together, and no
//! progress notification comes before an event that it covers.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use metastore::{
    proto::{
        etcdserverpb::{RequestOp, TxnRequest, WatchCreateRequest, WatchResponse, request_op},
        mvccpb::Event,
    },
    state::Kind,
    watch::{
        Input, NO_WATCH_ID, Settings,
        replay::{Job, REVISIONS_MAX},
    },
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use crate::{
    client::{Client, event_text},
    world::{World, owned, put},
};

const KEYS: [&str; 6] = ["a", "aa", "b", "ba", "c", "d"];

/// A change of a key.
struct Change {
    revision: i64,
    key: &'static str,
    deletion: bool,
    /// The event as text (see [`event_text`]), without and with the previous value.
    plain: String,
    full: String,
}

/// A watch, as its client expects it to behave.
struct Expected {
    create: WatchCreateRequest,
    /// The first revision that it must receive.
    first: i64,
    /// Its position in the history.
    position: usize,
    last: i64,
}

impl Expected {
    fn wants(&self, change: &Change) -> bool {
        let (key, end) = (self.create.key.as_ref(), self.create.range_end.as_ref());
        let inside = match end {
            [] => change.key.as_bytes() == key,
            [0] => change.key.as_bytes() >= key,
            _ => change.key.as_bytes() >= key && change.key.as_bytes() < end,
        };
        inside && change.revision >= self.first && !self.create.filters.contains(&i32::from(change.deletion))
    }

    /// The next change that it must receive.
    fn next<'a>(&mut self, history: &'a [Change]) -> Option<&'a Change> {
        while self.position < history.len() && !self.wants(&history[self.position]) {
            self.position += 1;
        }
        history.get(self.position)
    }
}

struct Reader {
    client: Client,
    requested: VecDeque<WatchCreateRequest>,
    watches: BTreeMap<i64, Expected>,
}

struct Run {
    rng: SmallRng,
    world: World,
    history: Vec<Change>,
    values: HashMap<&'static str, (String, i64)>,
    compacted: i64,
    readers: Vec<Reader>,
    inputs: Vec<Input>,
    job: Option<Job>,
    received: usize,
    lost: usize,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let settings = Settings {
            ring_bytes: rng.random_range(0..6000),
            pending_bytes: rng.random_range(0..2000),
            ..Settings::default()
        };
        Self {
            rng,
            world: World::with(settings),
            history: Vec::new(),
            values: HashMap::new(),
            compacted: -1,
            readers: Vec::new(),
            inputs: Vec::new(),
            job: None,
            received: 0,
            lost: 0,
        }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..40 => self.write(),
            40..60 => self.step_hub(),
            60..63 => self.finish_job(),
            63..65 => self.compact(),
            65..68 if self.readers.len() < 5 => self.open(),
            68 if !self.readers.is_empty() => {
                let gone = self.rng.random_range(0..self.readers.len());
                self.readers.swap_remove(gone);
            }
            69 => self.world.now += Duration::from_secs(self.rng.random_range(0..15)),
            _ if !self.readers.is_empty() => self.step_reader(),
            _ => (),
        }
    }

    /// A batch of transactions.
    fn write(&mut self) {
        let mut head = self.world.reader.head();
        for _ in 0..self.rng.random_range(1..4) {
            let before = self.values.clone();
            let mut changes: Vec<(&'static str, Option<String>)> = Vec::new();
            for key in KEYS {
                if self.rng.random_bool(0.2) {
                    changes.push((key, self.rng.random_bool(0.7).then(|| self.rng.random_range(0..1000).to_string())));
                }
            }
            let mut effective = false;
            for (key, value) in &changes {
                effective |= value.is_some() || before.contains_key(key);
                self.record(head + 1, key, value.as_deref(), before.get(key));
            }
            head += i64::from(effective);
            self.world.stage(Kind::Txn, &txn(&changes));
        }
        self.world.publish();
        assert_eq!(self.world.reader.head(), head);
    }

    fn record(&mut self, revision: i64, key: &'static str, value: Option<&str>, before: Option<&(String, i64)>) {
        let plain = match (value, before) {
            (Some(value), None) => format!("{revision}*{key}={value}"),
            (Some(value), Some(_)) => format!("{revision}+{key}={value}"),
            (None, Some(_)) => format!("{revision}-{key}"),
            (None, None) => return,
        };
        let previous = before.map(|(value, revision)| format!("<{value}@{revision}")).unwrap_or_default();
        let full = plain.clone() + &previous;
        match value {
            Some(value) => _ = self.values.insert(key, (value.into(), revision)),
            None => _ = self.values.remove(key),
        }
        self.history.push(Change { revision, key, deletion: value.is_none(), plain, full });
    }

    fn compact(&mut self) {
        let head = self.world.reader.head();
        if self.compacted < head {
            self.compacted = self.rng.random_range(self.compacted.max(0) + 1..=head);
            self.world.compact(self.compacted);
        }
        if self.rng.random_bool(0.5) {
            self.world.finish_compaction();
        }
    }

    fn open(&mut self) {
        let client = self.world.client();
        self.readers.push(Reader { client, requested: VecDeque::new(), watches: BTreeMap::new() });
    }

    fn step_hub(&mut self) {
        self.world.hub.drain_inputs(&mut self.inputs);
        let turn = self.world.core.step(self.world.now, &mut self.inputs).unwrap();
        if let Some(job) = turn.job {
            assert!(self.job.replace(job).is_none(), "one job at a time");
        }
    }

    fn finish_job(&mut self) {
        if let Some(job) = self.job.take() {
            self.inputs.push(Input::Replayed(job.run().unwrap()));
        }
    }

    fn step_reader(&mut self) {
        let nth = self.rng.random_range(0..self.readers.len());
        match self.rng.random_range(0..10) {
            0..2 => {
                let create = self.random_watch();
                self.readers[nth].requested.push_back(create.clone());
                self.readers[nth].client.create(create);
            }
            2 if !self.readers[nth].watches.is_empty() => {
                let known: Vec<i64> = self.readers[nth].watches.keys().copied().collect();
                let id = known[self.rng.random_range(0..known.len())];
                self.readers[nth].client.cancel(id);
            }
            3 => self.readers[nth].client.progress(),
            _ => {
                self.readers[nth].client.line.capacity = self.rng.random_range(0..6);
                self.read_responses(nth);
            }
        }
    }

    fn random_watch(&mut self) -> WatchCreateRequest {
        let ends = ["", "", "b", "bb", "c", "\0", "\0"];
        let start = match self.rng.random_range(0..4) {
            0 => 0,
            1 => self.world.reader.head() + self.rng.random_range(1..5),
            _ => self.rng.random_range(self.compacted.max(1)..=self.world.reader.head()),
        };
        WatchCreateRequest {
            key: owned(KEYS[self.rng.random_range(0..KEYS.len())]),
            range_end: owned(ends[self.rng.random_range(0..ends.len())]),
            start_revision: start,
            progress_notify: self.rng.random_bool(0.3),
            filters: if self.rng.random_bool(0.2) { vec![self.rng.random_range(0..2)] } else { Vec::new() },
            prev_kv: self.rng.random_bool(0.5),
            ..WatchCreateRequest::default()
        }
    }

    fn read_responses(&mut self, nth: usize) {
        let reader = &mut self.readers[nth];
        reader.client.step();
        for response in std::mem::take(&mut reader.client.line.sent) {
            check(reader, &response, &self.history, self.compacted, &mut self.lost);
            self.received += response.events.len();
        }
    }

    /// All readers read until nothing more comes; then checks that no event is missing.
    fn finish(&mut self) {
        let mut idle_rounds = 0;
        while idle_rounds < 5 {
            let before = self.received;
            self.step_hub();
            self.finish_job();
            for nth in 0..self.readers.len() {
                self.readers[nth].client.line.capacity = usize::MAX;
                self.read_responses(nth);
            }
            idle_rounds = if self.received == before { idle_rounds + 1 } else { 0 };
        }
        for reader in &mut self.readers {
            assert!(reader.requested.is_empty(), "every create request is answered");
            for (id, watch) in &mut reader.watches {
                let missing = watch.next(&self.history).map(|change| &change.plain);
                assert_eq!(missing, None, "watch {id}: {:?}", watch.create);
            }
        }
        let watches: usize = self.readers.iter().map(|reader| reader.watches.len()).sum();
        assert_eq!(self.world.counts(), [self.readers.len(), watches, 0, 0].map(|count| i64::try_from(count).unwrap()));
        self.readers.clear();
        self.step_hub();
        assert_eq!(self.world.counts(), [0; 4]);
    }
}

fn txn(changes: &[(&'static str, Option<String>)]) -> TxnRequest {
    let ops = changes.iter().map(|(key, value)| match value {
        Some(value) => request_op::Request::RequestPut(put(key, value)),
        None => request_op::Request::RequestDeleteRange(crate::world::delete(key, "")),
    });
    TxnRequest { success: ops.map(|op| RequestOp { request: Some(op) }).collect(), ..TxnRequest::default() }
}

fn check(reader: &mut Reader, response: &WatchResponse, history: &[Change], compacted: i64, lost: &mut usize) {
    let revision = response.header.as_ref().unwrap().revision;
    let id = response.watch_id;
    if response.created {
        let create = reader.requested.pop_front().expect("one answer for one request");
        if response.canceled {
            return assert!(matches!((create.key.as_ref(), create.range_end.as_ref()), (key, end) if key >= end));
        }
        let first = if create.start_revision == 0 { revision + 1 } else { create.start_revision };
        let known = reader.watches.insert(id, Expected { create, first, position: 0, last: 0 });
        return assert!(known.is_none(), "watch {id} exists already");
    }
    if response.canceled {
        let mut watch = reader.watches.remove(&id).expect("only existing watches are cancelled");
        if response.compact_revision != 0 {
            assert_eq!(revision, 0);
            assert!(
                response.compact_revision <= compacted && watch.create.start_revision < response.compact_revision
                    || watch.create.start_revision == 0
            );
            *lost += usize::from(watch.next(history).is_some());
        }
        return;
    }
    if response.events.is_empty() {
        for (other, watch) in reader.watches.iter_mut().filter(|(other, _)| id == NO_WATCH_ID || **other == id) {
            let owed = watch.next(history).filter(|change| change.revision <= revision).map(|change| &change.plain);
            assert_eq!(owed, None, "progress {revision} precedes an event of watch {other}");
            assert!(watch.create.start_revision <= revision, "a future watch has no progress");
            watch.last = watch.last.max(revision);
        }
        return;
    }
    let watch = reader.watches.get_mut(&id).expect("events are for existing watches");
    check_events(watch, &response.events, history, compacted);
    assert!(revision >= watch.last);
}

fn check_events(watch: &mut Expected, events: &[Event], history: &[Change], compacted: i64) {
    let mut revisions: Vec<i64> = events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision).collect();
    assert!(revisions[0] > watch.last, "no revision is split or comes after a progress notification that covers it");
    for event in events {
        let change = watch.next(history).expect("every event is in the history");
        let actual = event_text(event);
        let is_compacted = actual == change.plain && change.revision - 1 < compacted;
        let expected = if watch.create.prev_kv && !is_compacted { &change.full } else { &change.plain };
        assert_eq!(&actual, expected, "{:?}", watch.create);
        watch.last = change.revision;
        watch.position += 1;
    }
    revisions.dedup();
    assert!(revisions.len() <= REVISIONS_MAX);
    // The last revision is complete.
    assert!(watch.next(history).is_none_or(|change| change.revision > watch.last), "revision {} is split", watch.last);
}

fn run(seed: u64, actions: usize) -> (usize, usize) {
    println!("seed {seed}");
    let mut run = Run::new(seed);
    for _ in 0..actions {
        run.step();
    }
    run.finish();
    (run.received, run.lost)
}

/// FAULT-29.
#[test]
fn every_watch_receives_exactly_its_events() {
    let (mut received, mut lost) = (0, 0);
    for seed in 0..150 {
        let (more_received, more_lost) = run(seed, 600);
        received += more_received;
        lost += more_lost;
    }
    assert!(received > 10_000, "too few events were received: {received}");
    assert!(lost > 10, "too few watches were overtaken by compaction: {lost}");
}

#[test]
#[ignore = "long"]
fn every_watch_receives_exactly_its_events_with_fresh_seeds() {
    let first: u64 = rand::rng().random_range(0..u64::MAX / 2);
    for seed in first..first + 5000 {
        run(seed, 2000);
    }
}
