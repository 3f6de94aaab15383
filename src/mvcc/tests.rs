//! What spans rooms: a key space, its readers, and compaction between them.

use super::{
    compact::{Compaction, Progress},
    write::Put,
    *,
};
use crate::storage::{Batch, memory::Memory};

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

/// Keys with a long history held up all writers, until all of it was gone.
#[test]
fn a_compaction_removes_little_at_a_time() {
    let mut world = World::new();
    for _ in 0..50 {
        world.put(&["a", "b", "c", "d"]);
    }
    world.compact(51);
    let mut compaction = Compaction::pending(world.store.shared()).unwrap();
    let (mut steps, mut progress) = (0, Progress::More);
    while progress == Progress::More {
        let before = compaction.removed();
        progress = compaction.step(60).unwrap();
        assert!(compaction.removed() - before <= 60 + 49, "no more than asked for, and the rest of one key");
        steps += 1;
    }
    assert_eq!((progress, compaction.removed()), (Progress::Done, 4 * 49));
    assert!(steps >= 2, "{steps}");
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
