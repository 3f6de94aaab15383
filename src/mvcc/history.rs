//! History: every change of a span of revisions, in the order it happened.
//!
//! A span is read in chunks. While a chunk is read, a registered view at its first revision blocks compaction. Between two
//! chunks nothing is registered, so a reader that pauses for an hour does not delay compaction; if its next revision has been
//! compacted by then, the next read fails with [`Error::Compacted`].
//!
//! INVARIANTS
//! * A chunk ends between two revisions, never inside one.
//! * A chunk contains all that compaction has left of its span: the only changes missing are those that were overwritten at
//!   or before the compact revision.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Event, Reader, RecordKey, Revision, compact::key_of, read::ReadError};
use crate::{
    error::{Error, Halt},
    storage::Table,
};

/// The range of revisions to read.
#[derive(Debug, Clone, Copy)]
pub struct RevisionSpan {
    /// The first revision.
    pub from: i64,
    /// The last revision, inclusive; it must be published already.
    pub to: i64,
    /// Whether to look up [`Event::previous`].
    pub with_previous: bool,
}

/// A part of the history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Oldest first.
    pub events: Vec<Event>,
    /// The chunk contains every change up to and including this revision.
    pub through: i64,
}

impl Event {
    /// Builds an event from a stored record, without [`Event::previous`].
    #[must_use]
    pub fn of_record(revision: Revision, deletion: bool, record: Bytes) -> Self {
        let key = key_of(&record).map_or_else(Bytes::new, |key| record.slice_ref(key));
        Self { key, revision, deletion, record, previous: None }
    }
}

impl Reader {
    /// Reads a span from its start: about `limit` changes, completed to a whole revision. The rest of the span starts after
    /// [`Chunk::through`].
    pub fn history(&self, span: RevisionSpan, limit: usize) -> Result<Chunk, ReadError> {
        let shared = &self.shared;
        assert!(span.to <= shared.head(), "only what is published can be read");
        // Register first, check afterwards: so no compaction can run between the check and the scan.
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
                damage = Some(format!("the database is corrupt: invalid record key {key:02x?} in the history table"));
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
            return Err(Halt::InvalidData(damage).into());
        }
        if span.with_previous {
            self.fill_previous(&mut chunk.events);
        }
        drop(guard);
        Ok(chunk)
    }

    /// Sets [`Event::previous`] of each event; it stays None where compaction has removed the previous record.
    fn fill_previous(&self, events: &mut [Event]) {
        for events in events.chunks_mut(super::source::CHUNK) {
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
        super::{compact::CompactionProgress, tests::Fixture},
        *,
    };

    impl Fixture {
        fn read(&self, from: i64, to: i64, limit: usize) -> Result<(String, i64), ReadError> {
            let chunk = self.store.reader().history(RevisionSpan { from, to, with_previous: true }, limit)?;
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
    fn a_span_is_read_in_order_with_the_previous_revision_of_each_key() {
        let mut fixture = Fixture::new();
        fixture.put(&["a", "b"]);
        fixture.put(&["a"]);
        fixture.delete("a");
        fixture.put(&["a"]);
        assert_eq!(fixture.read(1, 5, 100).unwrap(), ("2+a 2+b 3+a<2 4-a<3 5+a".into(), 5));
        assert_eq!(fixture.read(3, 4, 100).unwrap(), ("3+a<2 4-a<3".into(), 4));
        assert_eq!(fixture.read(6, 5, 100).unwrap(), (String::new(), 5));
    }

    #[test]
    fn a_chunk_never_ends_inside_a_revision() {
        let mut fixture = Fixture::new();
        fixture.put(&["a", "b", "c"]);
        fixture.put(&["d"]);
        fixture.put(&["e", "f"]);
        assert_eq!(fixture.read(2, 4, 1).unwrap(), ("2+a 2+b 2+c".into(), 2));
        assert_eq!(fixture.read(3, 4, 1).unwrap(), ("3+d".into(), 3));
        assert_eq!(fixture.read(3, 4, 2).unwrap(), ("3+d 4+e 4+f".into(), 4));
    }

    #[test]
    fn history_starts_at_the_compact_revision_and_includes_its_tombstone() {
        let mut fixture = Fixture::new();
        fixture.put(&["a"]);
        fixture.delete("a");
        fixture.put(&["b"]);
        fixture.compact(3);
        assert!(matches!(fixture.read(2, 4, 100), Err(ReadError::Refused(Error::Compacted))));
        assert_eq!(fixture.read(3, 4, 100).unwrap().0, "3-a<2 4+b");
        assert_eq!(fixture.run_compaction(), CompactionProgress::Done);
        assert_eq!(fixture.read(3, 4, 100).unwrap().0, "3-a 4+b", "a previous record that was compacted is no error");
    }
}
