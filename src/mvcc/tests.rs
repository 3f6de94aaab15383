//! Tests across modules: a key space, its readers, and compactions in between.

use std::ops::ControlFlow;

use proptest::prelude::*;

use super::{
    compact::{Compaction, Progress},
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
        for key in keys {
            let put = Put { key: Bytes::copy_from_slice(key.as_bytes()), value: "value".into(), lease: 0 };
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

    pub fn run_compaction(&self) -> Progress {
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
    assert_eq!(fixture.run_compaction(), Progress::Blocked);
    drop(guard);
    assert_eq!(fixture.run_compaction(), Progress::Done);
}

/// Regression: the row was silently missing, because compaction had removed the key's old revision from the index.
#[test]
fn a_read_overtaken_by_a_compaction_is_repeated() {
    let mut fixture = Fixture::new();
    fixture.put(&["a"]);
    let (reader, resolved) = (fixture.store.reader(), 2);
    fixture.put(&["a"]);
    fixture.compact(3);
    assert_eq!(fixture.run_compaction(), Progress::Done);
    for count_only in [false, true] {
        let query = Query { count_only, ..Query::all(Interval::Key("a".into())) };
        assert_eq!(reader.range_unguarded(&query, resolved).unwrap().map(|rows| rows.count), None);
        assert_eq!(reader.range(&query).unwrap().0.count, 1);
    }
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
    let (mut steps, mut progress) = (0, Progress::More);
    while progress == Progress::More {
        progress = compaction.step(60).unwrap();
        steps += 1;
    }
    assert_eq!((progress, compaction.removed()), (Progress::Done, 4 * 49));
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
            prop_assert_eq!(fixture.records(), keys);
            let alive = wanted.iter().filter(|(.., deleted)| !deleted).count();
            let all = Query::all(Interval::From("\0".into()));
            prop_assert_eq!(usize::try_from(fixture.store.reader().range(&all).unwrap().0.count), Ok(alive));
        }
    }
}

/// Keys that are live at an older revision are counted one by one, whether the count is all that was requested or covers only
/// the keys beyond the limit.
#[test]
fn a_long_count_at_an_old_revision_is_not_short() {
    let mut fixture = Fixture::new();
    let keys: Vec<String> = (0..=read::CHUNK).map(|nth| format!("{nth:04}")).collect();
    fixture.put(&keys.iter().map(String::as_str).collect::<Vec<_>>());
    let few = Query { limit: 10, ..Query::all(Interval::From("\0".into())) };
    let is_short = |query: &Query| fixture.store.reader().range_at_once(query).unwrap().is_some();
    assert!(is_short(&few), "live keys at the head are counted by adding up leaves");
    assert!(is_short(&Query { revision: 2, counts_rest: false, ..few.clone() }));
    for counts_rest in [false, true] {
        assert!(!is_short(&Query { revision: 2, count_only: true, counts_rest, ..few.clone() }));
    }
    assert!(!is_short(&Query { revision: 2, ..few }));
}
