//! History: every change of a span of revisions, in the order it happened.
//!
//! A span is read in chunks. While one is read, a view at its first revision keeps compaction away from it; between two
//! chunks nothing is held, so a reader that pauses for an hour holds up nobody, and is told so when it comes back too late.
//!
//! INVARIANTS
//! * A chunk ends between two revisions, never inside one.
//! * What a chunk says of its span is all that compaction has left of it: from the compact revision on, nothing is missing
//!   but changes that were overwritten before that revision.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Event, Reader, RecordKey, Revision, compact::key_of, read::Failure};
use crate::{
    error::{Error, Halt},
    storage::Table,
};

/// Which history to read.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The first revision.
    pub from: i64,
    /// The last one; it is published.
    pub to: i64,
    /// Whether [`Event::previous`] shall be looked up.
    pub with_previous: bool,
}

/// A piece of history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The changes, oldest first.
    pub events: Vec<Event>,
    /// Every change up to this revision is there.
    pub through: i64,
}

impl Event {
    /// What happened, from a record as it is stored.
    #[must_use]
    pub fn of_record(revision: Revision, deletion: bool, record: Bytes) -> Self {
        let key = key_of(&record).map_or_else(Bytes::new, |key| record.slice_ref(key));
        Self { key, revision, deletion, record, previous: None }
    }
}

impl Reader {
    /// Reads a span from its start: about `limit` changes, and then the rest of the last one's revision. The span goes on
    /// behind [`Chunk::through`].
    pub fn history(&self, span: Span, limit: usize) -> Result<Chunk, Failure> {
        let shared = &self.shared;
        assert!(span.to <= shared.head(), "only what is published can be read");
        // Registered first and checked afterwards, so compaction has no moment in between.
        let guard = shared.register(span.from);
        if span.from < shared.compacted() {
            return Err(Error::Compacted.into());
        }
        let mut chunk = Chunk { events: Vec::new(), through: span.to };
        let mut damage = None;
        let from = RecordKey::first_of(span.from);
        let end = RecordKey::first_of(span.to.saturating_add(1));
        shared.engine.scan(Table::History, from.as_ref(), end.as_ref(), &mut |key, record| {
            let Some((revision, deletion)) = RecordKey::decode(key) else {
                damage = Some(format!("the history table has a key that is none: {key:02x?}"));
                return ControlFlow::Break(());
            };
            let last = chunk.events.last().map(|event: &Event| event.revision.main);
            if chunk.events.len() >= limit && last.is_some_and(|last| last < revision.main) {
                chunk.through = revision.main - 1;
                return ControlFlow::Break(());
            }
            chunk.events.push(Event::of_record(revision, deletion, Bytes::copy_from_slice(record)));
            ControlFlow::Continue(())
        })?;
        if let Some(damage) = damage {
            return Err(Halt::Refused(damage).into());
        }
        if span.with_previous {
            self.find_previous(&mut chunk.events);
        }
        drop(guard);
        Ok(chunk)
    }

    /// Looks up what was there before each change. Where compaction has forgotten it, it stays unknown.
    fn find_previous(&self, events: &mut [Event]) {
        for events in events.chunks_mut(super::read::CHUNK) {
            let index = self.shared.index.read();
            for event in events {
                event.previous = index.get(&event.key, event.revision.main - 1).map(|hit| hit.revision);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{compact::Progress, tests::World},
        *,
    };

    impl World {
        fn read(&self, from: i64, to: i64, limit: usize) -> Result<(String, i64), Failure> {
            let chunk = self.store.reader().history(Span { from, to, with_previous: true }, limit)?;
            let text = chunk.events.iter().map(|event| {
                let key = String::from_utf8(event.key.to_vec()).unwrap();
                let mark = if event.deletion { "-" } else { "+" };
                let previous = event.previous.map(|previous| format!("<{}", previous.main)).unwrap_or_default();
                format!("{}{mark}{key}{previous}", event.revision.main)
            });
            Ok((text.collect::<Vec<_>>().join(" "), chunk.through))
        }
    }

    #[test]
    fn a_span_is_read_in_order_with_what_was_there_before() {
        let mut world = World::new();
        world.put(&["a", "b"]);
        world.put(&["a"]);
        world.delete("a");
        world.put(&["a"]);
        assert_eq!(world.read(1, 5, 100).unwrap(), ("2+a 2+b 3+a<2 4-a<3 5+a".into(), 5));
        assert_eq!(world.read(3, 4, 100).unwrap(), ("3+a<2 4-a<3".into(), 4));
        assert_eq!(world.read(6, 5, 100).unwrap(), (String::new(), 5));
    }

    #[test]
    fn a_chunk_never_ends_inside_a_revision() {
        let mut world = World::new();
        world.put(&["a", "b", "c"]);
        world.put(&["d"]);
        world.put(&["e", "f"]);
        assert_eq!(world.read(2, 4, 1).unwrap(), ("2+a 2+b 2+c".into(), 2));
        assert_eq!(world.read(3, 4, 1).unwrap(), ("3+d".into(), 3));
        assert_eq!(world.read(3, 4, 2).unwrap(), ("3+d 4+e 4+f".into(), 4));
    }

    #[test]
    fn below_the_compact_revision_there_is_no_history_and_at_it_the_deletion_is_kept() {
        let mut world = World::new();
        world.put(&["a"]);
        world.delete("a");
        world.put(&["b"]);
        world.compact(3);
        assert!(matches!(world.read(2, 4, 100), Err(Failure::Refused(Error::Compacted))));
        assert_eq!(world.read(3, 4, 100).unwrap().0, "3-a<2 4+b");
        assert_eq!(world.forget(), Progress::Done);
        assert_eq!(world.read(3, 4, 100).unwrap().0, "3-a 4+b", "what was before is forgotten, which is no error");
    }
}
