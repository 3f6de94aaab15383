//! The log on files: segments of a fixed size, which are preallocated, written from front to back, and recycled.
//!
//! ```text
//! 00000000000000000007.segment   │ header │ group │ group │ … │ group │ (too short for the next group)
//! 00000000000000000008.segment   │ header │ group │ group │ zeros, or old data …
//! 00000000000000000012.spare     │ anything
//! ```
//!
//! Groups are written to the newest segment. When a group does not fit, a spare file gets a header and the next number; a group
//! larger than a segment gets a segment of its own size. A segment whose entries are all at or below the truncation point becomes
//! a spare. The header contains the complete state except the entries (see `format.rs`), so nothing else is lost with a segment.
//!
//! INVARIANTS
//! * A segment has an intact, synced header before it has its name, and its name is durable before its first group.
//! * The newest segment is never recycled, so segment and group numbers only increase.
//! * Segments are removed from the oldest on, and only after the truncation that allows it was synced.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use raft::eraftpb::HardState;

use super::contents::{Record, Recovered, Summary};
use super::files::File;
use super::format::{self, Link, SegmentHeader};
use super::location::{LogLocation, Segment};
use super::recovery::{self, LogOnDisk};
use super::segment_pool::{self, Spare, Spares};
use super::{Group, Identity, LogStore, Position};
use crate::error::Halt;

/// The segment to which groups are written.
struct Active {
    segment: Segment,
    path: PathBuf,
    file: Box<dyn File>,
    /// Where the next group begins.
    end: u64,
    /// The last group, to which the next one refers.
    link: Link,
}

impl Active {
    /// Turns a spare file into the segment with this number.
    fn begin(
        place: &LogLocation,
        spare: Spare,
        header: &SegmentHeader,
        number: u64,
        previous: Link,
    ) -> Result<Self, Halt> {
        let Spare { path: old, mut file, bytes } = spare;
        let path = place.segment_path(number);
        let mut group = Vec::new();
        let link = format::segment_group(&mut group, header, number, previous);
        file.write_at(0, &group).map_err(Halt::io("write", &old))?;
        file.sync().map_err(Halt::io("sync", &old))?;
        place.files.rename(&old, &path).map_err(Halt::io("rename", &old))?;
        place.sync_dir()?;
        let segment = Segment { number, bytes, last_index: 0 };
        Ok(Self { segment, path, file, end: group.len() as u64, link })
    }
}

/// Which operation is allowed next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Everything is synced; a write is next.
    Synced,
    /// A group was written; a sync is next.
    Written,
    /// An operation failed; no operation is allowed.
    Failed,
}

/// The raft log on segment files.
pub struct SegmentLog {
    place: LogLocation,
    salt: u32,
    identity: Identity,
    /// Older segments that are still needed, in ascending order.
    older: VecDeque<Segment>,
    active: Active,
    summary: Summary,
    spares: Spares,
    /// The group being written. The buffer is kept to reuse its memory.
    buffer: Vec<u8>,
    state: State,
}

impl SegmentLog {
    /// Creates a log without entries, with its truncation point at `truncated`, in a directory that contains none. When this
    /// returns, the files and the directory's content are durable; the caller must make the directory's own name durable.
    pub fn create(
        place: &LogLocation,
        identity: Identity,
        truncated: Position,
        hard_state: &HardState,
    ) -> Result<(), Halt> {
        place.files.create_dir(&place.dir).map_err(Halt::io("create", &place.dir))?;
        let names = place.names()?;
        if !LogLocation::segments(&names).is_empty() {
            return Err(Halt::InvalidData(format!("{}: there is a log already", place.dir.display())));
        }
        let mut spares = Spares::open(place, &names)?;
        let summary = Summary::new(truncated, hard_state.clone());
        let header = SegmentHeader { salt: rand::random(), identity, summary };
        Active::begin(place, spares.take(0)?, &header, 1, Link::default())?;
        Ok(())
    }

    /// Opens a log and returns its content. A torn write at its end is removed with a warning; corruption is an error.
    pub fn open(place: &LogLocation) -> Result<(Self, Recovered), Halt> {
        let names = place.names()?;
        let found = recovery::read(place, &names)?;
        let active = Self::activate(place, &found)?;
        let LogOnDisk { salt, recovered, summary, mut segments, leftovers, .. } = found;
        segments.pop();
        let mut log = Self {
            place: place.clone(),
            salt,
            identity: recovered.identity,
            older: segments.into(),
            active,
            summary,
            spares: Spares::open(place, &names)?,
            buffer: Vec::new(),
            state: State::Synced,
        };
        log.spares.recycle(leftovers)?;
        log.recycle()?;
        tracing::info!(dir = %place.dir.display(), syncs = log.active.file.sync_method(), "opened the raft log");
        Ok((log, recovered))
    }

    /// Makes the newest segment ready for the next write.
    ///
    /// The last group may be only in a cache, the system's or the disk's: the process may have ended before the sync, or because
    /// it failed. The group counts from now on, so it is written again: after a failed sync only a new write reaches the disk.
    fn activate(place: &LogLocation, found: &LogOnDisk) -> Result<Active, Halt> {
        let mut segment = found.segments.last().expect("recovery refuses a log without segments").clone();
        let path = place.segment_path(segment.number);
        let mut file = place.files.open(&path).map_err(Halt::io("open", &path))?;
        let end = found.last_group_start + found.last_group.len() as u64;
        file.write_at(found.last_group_start, &found.last_group).map_err(Halt::io("write", &path))?;
        let clean_from = if found.recovered.torn_tail.is_some() { end } else { segment.bytes };
        segment.bytes = segment.bytes.max(place.segment_bytes);
        segment_pool::zero(file.as_mut(), clean_from, segment.bytes).map_err(Halt::io("write", &path))?;
        file.sync().map_err(Halt::io("sync", &path))?;
        place.sync_dir()?;
        Ok(Active { segment, path, file, end, link: found.link })
    }

    /// The directory of the log.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// Runs one operation, unless an earlier one failed. A failure is final: all later operations are refused.
    fn step<T>(&mut self, expected: State, step: impl FnOnce(&mut Self) -> Result<T, Halt>) -> Result<T, Halt> {
        if self.state == State::Failed {
            let dir = self.place.dir.display();
            return Err(Halt::InvalidData(format!(
                "{dir}: an earlier operation on the log failed, so it accepts no more writes"
            )));
        }
        assert_eq!(self.state, expected, "each write is synced before the next one");
        let result = step(self);
        if result.is_err() {
            self.state = State::Failed;
        }
        result
    }

    /// Writes the group whose records are in the buffer.
    fn write_buffer(&mut self) -> Result<u64, Halt> {
        let bytes = format::sealed_bytes(&self.buffer);
        if self.active.end + bytes > self.active.segment.bytes {
            self.rotate(bytes)?;
        }
        let Active { segment, path, file, end, link } = &mut self.active;
        *link = format::seal(&mut self.buffer, self.salt, segment.number, *link);
        file.write_at(*end, &self.buffer).map_err(Halt::io("write", path))?;
        *end += bytes;
        self.state = State::Written;
        Ok(bytes)
    }

    fn sync_active(&mut self) -> Result<(), Halt> {
        self.active.file.sync().map_err(Halt::io("sync", &self.active.path))?;
        self.state = State::Synced;
        Ok(())
    }

    /// Begins the next segment, which must be large enough for a group of this size.
    fn rotate(&mut self, group_bytes: u64) -> Result<(), Halt> {
        let header = SegmentHeader { salt: self.salt, identity: self.identity, summary: self.summary.clone() };
        let spare = self.spares.take(group_bytes + format::SEGMENT_GROUP_BYTES)?;
        let next = Active::begin(&self.place, spare, &header, self.active.segment.number + 1, self.active.link)?;
        let full = std::mem::replace(&mut self.active, next);
        self.older.push_back(full.segment);
        self.spares.request_if_none()
    }

    /// Writes and syncs a group of records other than entries.
    fn write_synced(&mut self, records: &[Record]) -> Result<(), Halt> {
        format::begin(&mut self.buffer);
        for record in records {
            format::put_record(&mut self.buffer, record);
        }
        self.write_buffer()?;
        self.sync_active()?;
        for record in records {
            self.summary.replay(record);
        }
        Ok(())
    }

    /// Recycles the older segments that hold no entry above the truncation point.
    fn recycle(&mut self) -> Result<(), Halt> {
        let truncated = self.summary.truncated.index;
        let gone = self.older.iter().take_while(|segment| segment.last_index <= truncated).count();
        let gone = self.older.drain(..gone).map(|segment| (self.place.segment_path(segment.number), segment.bytes));
        self.spares.recycle(gone.collect())
    }
}

impl LogStore for SegmentLog {
    fn write(&mut self, group: &Group) -> Result<u64, Halt> {
        assert!(!group.is_empty(), "an empty group needs no write");
        self.step(State::Synced, |log| {
            if let Some(reason) = log.summary.refuses(&group.entries) {
                panic!("raft appends without gaps and never below the truncation point: {reason}");
            }
            format::begin(&mut log.buffer);
            format::put_group(&mut log.buffer, group);
            let bytes = log.write_buffer()?;
            log.summary.replay_group(group);
            if let Some(last) = group.entries.last() {
                log.active.segment.last_index = log.active.segment.last_index.max(last.index);
            }
            Ok(bytes)
        })
    }

    fn sync(&mut self) -> Result<(), Halt> {
        self.step(State::Written, Self::sync_active)
    }

    fn truncate(&mut self, at: Position) -> Result<(), Halt> {
        self.step(State::Synced, |log| {
            assert!(at.index < log.summary.next_index, "the truncation point is in the log");
            if at.index <= log.summary.truncated.index {
                return Ok(());
            }
            log.write_synced(&[Record::Truncate(at)])?;
            log.recycle()
        })
    }

    fn set_installing(&mut self, snapshot: Option<Position>) -> Result<(), Halt> {
        assert_ne!(snapshot, Some(Position::default()), "a snapshot has an index and a term");
        self.step(State::Synced, |log| log.write_synced(&[Record::Installing(snapshot)]))
    }

    fn reset(&mut self, at: Position, hard_state: &HardState) -> Result<(), Halt> {
        self.step(State::Synced, |log| {
            log.write_synced(&[Record::Reset(at), Record::HardState(hard_state.clone())])?;
            log.active.segment.last_index = 0;
            log.older.iter_mut().for_each(|segment| segment.last_index = 0);
            log.recycle()
        })
    }

    fn size_bytes(&self) -> u64 {
        self.older.iter().map(|segment| segment.bytes).sum::<u64>() + self.active.segment.bytes
    }
}
