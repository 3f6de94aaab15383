//! Tests across modules: a key space, its readers, and compactions in between.

use std::{ops::ControlFlow, sync::mpsc, thread, time::Duration};

use proptest::prelude::*;

use super::{
    compact::{Compaction, CompactionProgress, Hashing},
    write::Put,
    *,
};
use crate::storage::{Batch, Table, memory::Memory};

pub(super) struct Fixture {
    engine: Arc<Memory>,
    pub store: Store,
    batch: Batch,
}

impl Fixture {
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

    /// Bytes of all records in the database.
    fn bytes(&self) -> u64 {
        let mut bytes = 0;
        let mut visit = |key: &[u8], value: &[u8]| {
            bytes += key.len() + value.len();
            ControlFlow::Continue(())
        };
        self.engine.scan(Table::History, &[], &[], &mut visit).unwrap();
        bytes as u64
    }

    /// Opens the same database again.
    fn reopen(&mut self) {
        let (head, cache_bytes) = (self.store.head(), 1 << 20);
        self.store = Store::open(self.engine.clone(), head, cache_bytes, &mut |_, _| ()).unwrap();
    }

    /// Runs the next scheduled compaction. Returns the size of the history if that is too large to be hashed.
    fn run_next_compaction(&self, max_bytes: u64) -> Option<u64> {
        let mut compaction = Compaction::pending(self.store.shared()).unwrap();
        let too_large = match compaction.hashing(max_bytes).unwrap() {
            Hashing::Due(mut pass) => {
                while !pass.step(3).unwrap() {}
                None
            }
            Hashing::TooLarge { history_bytes } => Some(history_bytes),
            Hashing::Unknown => None,
        };
        while compaction.step(10).unwrap() != CompactionProgress::Done {}
        too_large
    }

    /// The keys of all records in the database.
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

    pub fn run_compaction(&self) -> CompactionProgress {
        Compaction::pending(self.store.shared()).unwrap().step(1000).unwrap()
    }
}

#[test]
fn compaction_waits_for_a_view_at_a_lower_revision() {
    let mut fixture = Fixture::new();
    fixture.put(&["a"]);
    fixture.put(&["a"]);
    let guard = fixture.store.shared().register(2);
    fixture.compact(3);
    assert_eq!(fixture.run_compaction(), CompactionProgress::Blocked);
    drop(guard);
    assert_eq!(fixture.run_compaction(), CompactionProgress::Done);
}

/// Regression: the row was silently missing, because compaction had removed the key's old revision from the index.
#[test]
fn a_read_overtaken_by_a_compaction_is_repeated() {
    let mut fixture = Fixture::new();
    fixture.put(&["a"]);
    let (reader, resolved) = (fixture.store.reader(), 2);
    fixture.put(&["a"]);
    fixture.compact(3);
    assert_eq!(fixture.run_compaction(), CompactionProgress::Done);
    for count_only in [false, true] {
        let query = Query { count_only, ..Query::all(Interval::Key("a".into())) };
        assert_eq!(reader.range_unguarded(&query, resolved).unwrap().map(|rows| rows.count), None);
        assert_eq!(reader.range(&query).unwrap().0.count, 1);
    }
}

/// Regression: the returned hash was of a revision that was compacted, so that a request for it by number was refused.
#[test]
fn a_hash_at_the_head_waits_for_the_head_that_a_compaction_was_scheduled_at() {
    let mut fixture = Fixture::new();
    fixture.put(&["a"]);
    fixture.put(&["a"]);
    fixture.store.put(&mut fixture.batch, Put { key: "a".into(), value: "newest".into(), lease: 0 });
    fixture.store.end_transaction();
    fixture.store.schedule_compaction(&mut fixture.batch, 4);
    fixture.engine.write(&fixture.batch).unwrap();
    fixture.store.publish();
    assert_eq!(
        (fixture.store.reader().head(), fixture.store.reader().compacted()),
        (3, 4),
        "the head is published later"
    );

    let (reader, (tell, told)) = (fixture.store.reader(), mpsc::channel());
    thread::scope(|scope| {
        scope.spawn(|| tell.send(reader.hash_kv(0).unwrap()).unwrap());
        let early = told.recv_timeout(Duration::from_millis(200));
        fixture.store.publish_head();
        assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
        let hash = told.recv_timeout(Duration::from_mins(1)).unwrap();
        assert_eq!((hash.hash_revision, hash.compact_revision), (4, 4));
    });
}

/// Regression: the removal of keys with a long history blocked all writers until it was complete.
#[test]
fn a_compaction_works_in_small_steps_and_small_batches() {
    let mut fixture = Fixture::new();
    for _ in 0..50 {
        fixture.put(&["a", "b", "c", "d"]);
    }
    fixture.compact(51);
    let before = fixture.engine.unflushed();
    let mut compaction = Compaction::pending(fixture.store.shared()).unwrap();
    let (mut steps, mut progress) = (0, CompactionProgress::More);
    while progress == CompactionProgress::More {
        progress = compaction.step(60).unwrap();
        steps += 1;
    }
    assert_eq!((progress, compaction.removed()), (CompactionProgress::Done, 4 * 49));
    assert_eq!(steps, 4, "of 200 records");
    assert!(fixture.engine.unflushed() >= before + 2, "one batch does not hold all deletions");
}

proptest! {
    #[test]
    fn a_compaction_keeps_the_right_records_for_any_step_and_range_size(
        rounds in prop::collection::vec(prop::collection::vec((0_usize..6, prop::bool::weighted(0.2)), 1..15), 1..10),
        range in 1_usize..6,
        limit in 1_usize..9,
    ) {
        let mut fixture = Fixture::new();
        let mut wanted: Vec<(i64, usize, bool)> = Vec::new();
        for changes in rounds {
            for (key, is_deleted) in changes {
                let name = ["a", "b", "c", "d", "e", "f"][key];
                let is_alive = wanted.iter().rfind(|(_, known, _)| *known == key).is_some_and(|(.., deleted)| !deleted);
                if !is_deleted {
                    fixture.put(&[name]);
                } else if is_alive {
                    fixture.delete(name);
                } else {
                    continue;
                }
                wanted.push((fixture.head(), key, is_deleted));
            }
            let at = fixture.head();
            if at == fixture.store.shared().compacted() {
                continue;
            }
            fixture.compact(at);
            if let Some(compaction) = Compaction::pending(fixture.store.shared()) {
                let mut compaction = compaction.with_range_delete_min(range);
                while compaction.step(limit).unwrap() != CompactionProgress::Done {}
                let newest = |of| wanted.iter().rfind(|(_, key, _)| *key == of).map(|(main, ..)| *main);
                let kept = wanted.iter().filter(|(main, key, deleted)| {
                    newest(*key) == Some(*main) && (!deleted || *main == at)
                });
                wanted = kept.copied().collect();
            }
            let keys = wanted.iter().map(|&(main, _, deleted)| RecordKey::new(Revision { main, sub: 0 }, deleted));
            let keys: Vec<Vec<u8>> = keys.map(|key| key.as_ref().to_vec()).collect();
            prop_assert_eq!(fixture.records(), keys);
            let alive = wanted.iter().filter(|(.., deleted)| !deleted).count();
            let all = Query::all(Interval::From("\0".into()));
            prop_assert_eq!(usize::try_from(fixture.store.reader().range(&all).unwrap().0.count), Ok(alive));
        }
    }
}

/// Members that opened their databases at different times, or run their compactions later, compute the same history size for
/// the same compaction.
#[test]
fn members_decide_alike_which_compactions_are_too_large_to_be_hashed() {
    let mut members = [Fixture::new(), Fixture::new(), Fixture::new()];
    let mut too_large: [Vec<Option<u64>>; 3] = Default::default();
    for round in 0..30_usize {
        for (nth, member) in members.iter_mut().enumerate() {
            for change in 0..10 + round % 3 * 10 {
                let key = ["a", "b", "c", "d", "e", "f", "g"][(round * 3 + change * change) % 7];
                match change % 5 {
                    4 if member.store.newest(key.as_bytes()).is_some_and(|newest| newest.metadata.is_some()) => {
                        member.delete(key);
                    }
                    _ => member.put(&[key]),
                }
            }
            let at = member.head() - 5;
            member.compact(at);
            // The second member is always one compaction late, and the third one is restarted.
            let late = usize::from(nth == 1);
            if round >= late {
                too_large[nth].push(member.run_next_compaction(1200));
            }
            if nth == 2 && round == 13 {
                member.reopen();
            }
            assert_eq!(member.store.shared().history_bytes(), member.bytes(), "member {nth}, round {round}");
        }
    }
    let [first, second, third] = too_large;
    assert_eq!(first[..29], second);
    assert_eq!(first, third);
    let without_hash = first.iter().flatten().count();
    assert!(0 < without_hash && without_hash < first.len(), "{first:?}");
    let hashes = |member: &Fixture| {
        let all = member.store.reader().compaction_hashes().into_iter();
        all.map(|hash| (hash.hash_revision, hash.compact_revision, hash.hash)).collect::<Vec<_>>()
    };
    assert_eq!(hashes(&members[0]), hashes(&members[2]));
    assert!(!hashes(&members[0]).is_empty());
}

/// A queue that grows without bound drops its oldest compactions; their work is done by the first that is left, without a hash.
#[test]
fn a_long_queue_of_compactions_is_shortened() {
    let mut fixture = Fixture::new();
    for _ in 0..30 {
        fixture.put(&["a", "b"]);
    }
    for at in 2..=30 {
        fixture.compact(at);
    }
    let mut done = 0;
    while let Some(compaction) = Compaction::pending(fixture.store.shared()) {
        assert_eq!(compaction.at(), 21 + done);
        fixture.run_next_compaction(u64::MAX);
        done += 1;
    }
    assert_eq!(done, 10);
    let stored: Vec<i64> = fixture.store.reader().compaction_hashes().iter().map(|hash| hash.hash_revision).collect();
    assert_eq!(stored, (22..=30).rev().collect::<Vec<_>>(), "the first one did the work of several");
    assert_eq!(fixture.store.shared().history_bytes(), fixture.bytes());
}

#[test]
fn a_read_of_few_long_records_is_not_short() {
    let mut fixture = Fixture::new();
    let keys: Vec<String> = (0..20).map(|nth| format!("{nth:04}")).collect();
    fixture.put_with(&keys.iter().map(String::as_str).collect::<Vec<_>>(), &vec![b'x'; 100_000]);
    let reader = fixture.store.reader();
    let all = Query::all(Interval::From("\0".into()));
    assert!(reader.range_if_short(&Query { limit: 5, ..all.clone() }).unwrap().is_some());
    assert!(reader.range_if_short(&all).unwrap().is_none());
    assert!(reader.range_if_short(&Query { keys_only: true, ..all.clone() }).unwrap().is_some(), "no record is read");
    let metered =
        |bytes| reader.range_metered(&all, &meter::at_most(bytes)).unwrap().map(|(rows, _)| rows.records.len());
    assert_eq!((metered(3_000_000), metered(1_000_000)), (Some(20), None));
    let one = Query::all(Interval::Key("0000".into()));
    assert!(
        reader.range_metered(&one, &meter::at_most(0)).unwrap().is_some(),
        "a single record never exceeds the meter"
    );
}

/// Keys that are live at an older revision are counted one by one, whether the count is all that was requested or covers only
/// the keys beyond the limit.
#[test]
fn a_long_count_at_an_old_revision_is_not_short() {
    let mut fixture = Fixture::new();
    let keys: Vec<String> = (0..=source::CHUNK).map(|nth| format!("{nth:04}")).collect();
    fixture.put(&keys.iter().map(String::as_str).collect::<Vec<_>>());
    let few = Query { limit: 10, ..Query::all(Interval::From("\0".into())) };
    let is_short = |query: &Query| fixture.store.reader().range_if_short(query).unwrap().is_some();
    assert!(is_short(&few), "live keys at the head are counted by adding up leaves");
    assert!(is_short(&Query { revision: 2, counts_rest: false, ..few.clone() }));
    for counts_rest in [false, true] {
        assert!(!is_short(&Query { revision: 2, count_only: true, counts_rest, ..few.clone() }));
    }
    assert!(!is_short(&Query { revision: 2, ..few }));
}
