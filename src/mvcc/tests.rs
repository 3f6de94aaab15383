//! What spans rooms: a key space, its readers, and compaction between them.

use std::{ops::ControlFlow, sync::mpsc, thread, time::Duration};

use proptest::prelude::*;

use super::{
    compact::{Compaction, Hashing, Progress},
    write::Put,
    *,
};
use crate::storage::{Batch, Table, memory::Memory};

pub(super) struct World {
    engine: Arc<Memory>,
    pub store: Store,
    batch: Batch,
}

impl World {
    pub fn new() -> Self {
        let engine = Arc::new(Memory::default());
        let store = Store::open(engine.clone(), 1, 1 << 20, &mut |_, _| ()).unwrap();
        Self { engine, store, batch: Batch::default() }
    }

    pub fn put(&mut self, keys: &[&str]) {
        self.put_with(keys, b"value");
    }

    fn put_with(&mut self, keys: &[&str], value: &[u8]) {
        for key in keys {
            let value = Bytes::copy_from_slice(value);
            let put = Put { key: Bytes::copy_from_slice(key.as_bytes()), value, lease: 0 };
            self.store.put(&mut self.batch, put);
        }
        self.commit();
    }

    pub fn delete(&mut self, key: &str) {
        self.store.delete(&mut self.batch, &Bytes::copy_from_slice(key.as_bytes())).unwrap();
        self.commit();
    }

    pub fn compact(&mut self, at: i64) {
        self.store.schedule_compaction(&mut self.batch, at);
        self.commit();
    }

    fn head(&self) -> i64 {
        self.store.shared().head()
    }

    /// The bytes of the whole history, as the database has them.
    fn bytes(&self) -> u64 {
        let mut bytes = 0;
        let mut visit = |key: &[u8], value: &[u8]| {
            bytes += key.len() + value.len();
            ControlFlow::Continue(())
        };
        self.engine.scan(Table::History, &[], &[], &mut visit).unwrap();
        bytes as u64
    }

    /// Opens the same database anew.
    fn reopen(&mut self) {
        let (head, cache_bytes) = (self.store.head(), 1 << 20);
        self.store = Store::open(self.engine.clone(), head, cache_bytes, &mut |_, _| ()).unwrap();
    }

    /// Does the next compaction. Returns the size of the history if that is too large to be hashed.
    fn do_compaction(&self, max_bytes: u64) -> Option<u64> {
        let mut compaction = Compaction::pending(self.store.shared()).unwrap();
        let too_large = match compaction.hashing(max_bytes).unwrap() {
            Hashing::Due(mut pass) => {
                while !pass.step(3).unwrap() {}
                None
            }
            Hashing::TooLarge { history_bytes } => Some(history_bytes),
            Hashing::Unknown => None,
        };
        while compaction.step(10).unwrap() != Progress::Done {}
        too_large
    }

    /// The keys of the whole history, as the database has them.
    fn records(&self) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        let mut visit = |key: &[u8], _: &[u8]| {
            records.push(key.to_vec());
            ControlFlow::Continue(())
        };
        self.engine.scan(Table::History, &[], &[], &mut visit).unwrap();
        records
    }

    fn commit(&mut self) {
        self.store.end_transaction();
        self.engine.write(&self.batch).unwrap();
        self.batch.clear();
        self.store.publish();
        self.store.publish_head();
    }

    pub fn forget(&self) -> Progress {
        Compaction::pending(self.store.shared()).unwrap().step(1000).unwrap()
    }
}

#[test]
fn compaction_waits_for_a_view_at_a_lower_revision() {
    let mut world = World::new();
    world.put(&["a"]);
    world.put(&["a"]);
    let guard = world.store.shared().register(2);
    world.compact(3);
    assert_eq!(world.forget(), Progress::Blocked);
    drop(guard);
    assert_eq!(world.forget(), Progress::Done);
}

/// The row was dropped without a word: the index had forgotten what the reader came for.
#[test]
fn a_read_that_compaction_overtakes_is_done_again() {
    let mut world = World::new();
    world.put(&["a"]);
    let (reader, resolved) = (world.store.reader(), 2);
    world.put(&["a"]);
    world.compact(3);
    assert_eq!(world.forget(), Progress::Done);
    for count_only in [false, true] {
        let query = Query { count_only, ..Query::all(Interval::Key("a".into())) };
        assert_eq!(reader.range_unguarded(&query, resolved).unwrap().map(|rows| rows.count), None);
        assert_eq!(reader.range(&query).unwrap().0.count, 1);
    }
}

/// The hash was one of a revision that could not be asked for by number any more.
#[test]
fn a_hash_of_now_waits_for_the_head_that_a_compaction_was_made_at() {
    let mut world = World::new();
    world.put(&["a"]);
    world.put(&["a"]);
    world.store.put(&mut world.batch, Put { key: "a".into(), value: "newest".into(), lease: 0 });
    world.store.end_transaction();
    world.store.schedule_compaction(&mut world.batch, 4);
    world.engine.write(&world.batch).unwrap();
    world.store.publish();
    assert_eq!((world.store.reader().head(), world.store.reader().compacted()), (3, 4), "the head comes later");

    let (reader, (tell, told)) = (world.store.reader(), mpsc::channel());
    thread::scope(|scope| {
        scope.spawn(|| tell.send(reader.hash_kv(0).unwrap()).unwrap());
        let early = told.recv_timeout(Duration::from_millis(200));
        world.store.publish_head();
        assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
        let hash = told.recv_timeout(Duration::from_mins(1)).unwrap();
        assert_eq!((hash.hash_revision, hash.compact_revision), (4, 4));
    });
}

/// Keys with a long history held up all writers, until all of it was gone.
#[test]
fn a_compaction_looks_at_little_at_a_time_and_removes_little_at_once() {
    let mut world = World::new();
    for _ in 0..50 {
        world.put(&["a", "b", "c", "d"]);
    }
    world.compact(51);
    let before = world.engine.unflushed();
    let mut compaction = Compaction::pending(world.store.shared()).unwrap();
    let (mut steps, mut progress) = (0, Progress::More);
    while progress == Progress::More {
        progress = compaction.step(60).unwrap();
        steps += 1;
    }
    assert_eq!((progress, compaction.removed()), (Progress::Done, 4 * 49));
    assert_eq!(steps, 4, "of 200 records");
    assert!(world.engine.unflushed() >= before + 2, "no batch is that large");
}

proptest! {
    #[test]
    fn a_compaction_leaves_what_it_should_however_it_removes(
        turns in prop::collection::vec(prop::collection::vec((0_usize..6, prop::bool::weighted(0.2)), 1..15), 1..10),
        range in 1_usize..6,
        limit in 1_usize..9,
    ) {
        let mut world = World::new();
        let mut wanted: Vec<(i64, usize, bool)> = Vec::new();
        for changes in turns {
            for (key, is_deleted) in changes {
                let name = ["a", "b", "c", "d", "e", "f"][key];
                let is_alive = wanted.iter().rfind(|(_, known, _)| *known == key).is_some_and(|(.., deleted)| !deleted);
                if !is_deleted {
                    world.put(&[name]);
                } else if is_alive {
                    world.delete(name);
                } else {
                    continue;
                }
                wanted.push((world.head(), key, is_deleted));
            }
            let at = world.head();
            if at == world.store.shared().compacted() {
                continue;
            }
            world.compact(at);
            if let Some(compaction) = Compaction::pending(world.store.shared()) {
                let mut compaction = compaction.with_ranges_of(range);
                while compaction.step(limit).unwrap() != Progress::Done {}
                let newest = |of| wanted.iter().rfind(|(_, key, _)| *key == of).map(|(main, ..)| *main);
                let kept = wanted.iter().filter(|(main, key, deleted)| {
                    newest(*key) == Some(*main) && (!deleted || *main == at)
                });
                wanted = kept.copied().collect();
            }
            let keys = wanted.iter().map(|&(main, _, deleted)| RecordKey::new(Revision { main, sub: 0 }, deleted));
            let keys: Vec<Vec<u8>> = keys.map(|key| key.as_ref().to_vec()).collect();
            prop_assert_eq!(world.records(), keys);
            let alive = wanted.iter().filter(|(.., deleted)| !deleted).count();
            let all = Query::all(Interval::From("\0".into()));
            prop_assert_eq!(usize::try_from(world.store.reader().range(&all).unwrap().0.count), Ok(alive));
        }
    }
}

/// Members that have opened their databases at other times, or do their compactions later, count the same where it matters.
#[test]
fn members_decide_alike_which_compactions_are_too_large_to_be_hashed() {
    let mut members = [World::new(), World::new(), World::new()];
    let mut told: [Vec<Option<u64>>; 3] = Default::default();
    for round in 0..30_usize {
        for (nth, member) in members.iter_mut().enumerate() {
            for change in 0..10 + round % 3 * 10 {
                let key = ["a", "b", "c", "d", "e", "f", "g"][(round * 3 + change * change) % 7];
                match change % 5 {
                    4 if member.store.newest(key.as_bytes()).is_some_and(|newest| newest.life.is_some()) => {
                        member.delete(key);
                    }
                    _ => member.put(&[key]),
                }
            }
            let at = member.head() - 5;
            member.compact(at);
            // The second one is always late, and the third one was started anew.
            let late = usize::from(nth == 1);
            if round >= late {
                told[nth].push(member.do_compaction(1200));
            }
            if nth == 2 && round == 13 {
                member.reopen();
            }
            assert_eq!(member.store.shared().history_bytes(), member.bytes(), "member {nth}, round {round}");
        }
    }
    let [first, second, third] = told;
    assert_eq!(first[..29], second);
    assert_eq!(first, third);
    let left_out = first.iter().flatten().count();
    assert!(0 < left_out && left_out < first.len(), "{first:?}");
    let hashes = |member: &World| {
        let all = member.store.reader().compaction_hashes().into_iter();
        all.map(|hash| (hash.hash_revision, hash.compact_revision, hash.hash)).collect::<Vec<_>>()
    };
    assert_eq!(hashes(&members[0]), hashes(&members[2]));
    assert!(!hashes(&members[0]).is_empty());
}

/// A queue that grows without bound is cut in front; what is cut off is done together, without a hash.
#[test]
fn a_long_queue_of_compactions_is_shortened() {
    let mut world = World::new();
    for _ in 0..30 {
        world.put(&["a", "b"]);
    }
    for at in 2..=30 {
        world.compact(at);
    }
    let mut done = 0;
    while let Some(compaction) = Compaction::pending(world.store.shared()) {
        assert_eq!(compaction.at(), 21 + done);
        world.do_compaction(u64::MAX);
        done += 1;
    }
    assert_eq!(done, 10);
    let remembered: Vec<i64> = world.store.reader().compaction_hashes().iter().map(|hash| hash.hash_revision).collect();
    assert_eq!(remembered, (22..=30).rev().collect::<Vec<_>>(), "the first one did the work of many");
    assert_eq!(world.store.shared().history_bytes(), world.bytes());
}

#[test]
fn few_records_that_are_long_are_not_short() {
    let mut world = World::new();
    let keys: Vec<String> = (0..20).map(|nth| format!("{nth:04}")).collect();
    world.put_with(&keys.iter().map(String::as_str).collect::<Vec<_>>(), &vec![b'x'; 100_000]);
    let reader = world.store.reader();
    let all = Query::all(Interval::From("\0".into()));
    assert!(reader.range_at_once(&Query { limit: 5, ..all.clone() }).unwrap().is_some());
    assert!(reader.range_at_once(&all).unwrap().is_none());
    assert!(reader.range_at_once(&Query { keys_only: true, ..all.clone() }).unwrap().is_some(), "no record is read");
    let metered =
        |bytes| reader.range_metered(&all, &meter::at_most(bytes)).unwrap().map(|(rows, _)| rows.records.len());
    assert_eq!((metered(3_000_000), metered(1_000_000)), (Some(20), None));
    let one = Query::all(Interval::Key("0000".into()));
    assert!(reader.range_metered(&one, &meter::at_most(0)).unwrap().is_some(), "a single record is never too much");
}

/// What is alive at an older revision has to be looked at key by key, whether it is all that was asked for or only the rest.
#[test]
fn a_long_count_of_the_past_is_not_short() {
    let mut world = World::new();
    let keys: Vec<String> = (0..=read::CHUNK).map(|nth| format!("{nth:04}")).collect();
    world.put(&keys.iter().map(String::as_str).collect::<Vec<_>>());
    let few = Query { limit: 10, ..Query::all(Interval::From("\0".into())) };
    let is_short = |query: &Query| world.store.reader().range_at_once(query).unwrap().is_some();
    assert!(is_short(&few), "what is alive now is counted by adding up");
    assert!(is_short(&Query { revision: 2, counts_rest: false, ..few.clone() }));
    for counts_rest in [false, true] {
        assert!(!is_short(&Query { revision: 2, count_only: true, counts_rest, ..few.clone() }));
    }
    assert!(!is_short(&Query { revision: 2, ..few }));
}
