//! The bytes of a segment file. Numbers are little-endian.
//!
//! A segment is a sequence of groups, each beginning at a multiple of eight, the first one holding the segment header. The last
//! group is followed by zeros, or by data from an earlier use of the file as another segment.
//!
//! ```text
//! group    magic u32 │ crc u32 │ payload bytes u32 │ previous crc u32 │ group number u64 │ segment number u64 │ payload
//! ```
//!
//! The crc covers everything after itself. Each group contains the crc of the group before it, across segments, and the number of
//! the segment that it was written to; so old data in a recycled file can never be taken for the next group. The crc starts from
//! a random salt, which is in the segment header. Without it a client could store bytes that look like a group, and the search
//! for an intact group after a damaged one would find it.
//!
//! ```text
//! payload  records, one after the other; a byte for the kind, then
//!
//! 1 entries      first index u64, entries u32, runs u32; per run: term u64, entries u32;
//!                per entry: type u8, data bytes u32, context bytes u32; per entry: data, context
//! 2 hard state   term u64, vote u64, commit u64
//! 3 truncate     index u64, term u64
//! 4 reset        index u64, term u64
//! 5 installing   index u64, term u64; 0 and 0 for none
//! 9 segment      version u32, salt u32, cluster ID u64, member ID u64, next index u64,
//!                and the bodies of a truncate, a hard state and an installing record: the state of the log up to here
//! ```
//!
//! The group with the segment header has the salt 0, and the header begins with the version, so that every version of the program
//! can determine the version of a file.

use bytes::{Buf, BufMut, Bytes};
use protobuf::ProtobufEnum;
use raft::eraftpb::{Entry, EntryType, HardState};

use super::contents::{Record, Summary};
use super::{Group, Identity, Position};

/// The version of this format.
pub(super) const VERSION: u32 = 1;

/// The length of a group's header, which precedes the payload.
pub(super) const HEAD_BYTES: usize = 32;

/// The length of the group that begins a segment.
pub(super) const SEGMENT_GROUP_BYTES: u64 = 128;

/// Groups begin at multiples of this.
pub(super) const ALIGNMENT: usize = 8;

const MAGIC: [u8; 4] = *b"mlog";
/// Where the bytes covered by the crc begin.
const COVERED: usize = 8;

const ENTRIES: u8 = 1;
const HARD_STATE: u8 = 2;
const TRUNCATE: u8 = 3;
const RESET: u8 = 4;
const INSTALLING: u8 = 5;
const SEGMENT: u8 = 9;

/// What the next group must refer to: the number and crc of the last group.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub group: u64,
    pub crc: u32,
}

/// The header of a group, as read.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupHeader {
    crc: u32,
    payload_bytes: usize,
    pub previous_crc: u32,
    pub group: u64,
    pub segment: u64,
}

impl GroupHeader {
    /// Reads a header, if the bytes begin with the magic number.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(&MAGIC) { Self::read_any(bytes) } else { None }
    }

    /// Reads bytes as a header, even if the magic number does not match.
    pub fn read_any(bytes: &[u8]) -> Option<Self> {
        let mut bytes = bytes.get(MAGIC.len()..HEAD_BYTES)?;
        Some(Self {
            crc: bytes.get_u32_le(),
            payload_bytes: bytes.get_u32_le() as usize,
            previous_crc: bytes.get_u32_le(),
            group: bytes.get_u64_le(),
            segment: bytes.get_u64_le(),
        })
    }

    /// The length of the group, up to the beginning of the next one.
    pub fn group_bytes(&self) -> usize {
        (HEAD_BYTES + self.payload_bytes).next_multiple_of(ALIGNMENT)
    }

    /// What the next group must refer to.
    pub fn link(&self) -> Link {
        Link { group: self.group, crc: self.crc }
    }
}

/// The group at the start of `bytes`, if it is intact: its header and its payload.
pub(super) fn intact(bytes: &[u8], salt: u32) -> Option<(GroupHeader, &[u8])> {
    let head = GroupHeader::read(bytes)?;
    let covered = bytes.get(COVERED..HEAD_BYTES + head.payload_bytes)?;
    (crc32c::crc32c_append(salt, covered) == head.crc).then(|| (head, &covered[HEAD_BYTES - COVERED..]))
}

/// Clears `buffer` for the records of a new group.
pub(super) fn begin(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.resize(HEAD_BYTES, 0);
}

/// The length of the group in `buffer` once it is sealed.
pub(super) fn sealed_bytes(buffer: &[u8]) -> u64 {
    buffer.len().next_multiple_of(ALIGNMENT) as u64
}

/// Completes the group whose records are in `buffer`: fills in its header and pads it.
pub(super) fn seal(buffer: &mut Vec<u8>, salt: u32, segment: u64, previous: Link) -> Link {
    let payload_bytes = u32::try_from(buffer.len() - HEAD_BYTES).expect("a group is far smaller than 4 GiB");
    let group = previous.group + 1;
    let mut head = &mut buffer[COVERED..HEAD_BYTES];
    head.put_u32_le(payload_bytes);
    head.put_u32_le(previous.crc);
    head.put_u64_le(group);
    head.put_u64_le(segment);
    let crc = crc32c::crc32c_append(salt, &buffer[COVERED..]);
    let mut head = &mut buffer[..COVERED];
    head.put_slice(&MAGIC);
    head.put_u32_le(crc);
    buffer.resize(buffer.len().next_multiple_of(ALIGNMENT), 0);
    Link { group, crc }
}

/// Appends the records of a group, without copying raft's entries first.
pub(super) fn put_group(buffer: &mut Vec<u8>, group: &Group) {
    if !group.entries.is_empty() {
        put_entries(buffer, &group.entries);
    }
    if let Some(hard_state) = &group.hard_state {
        put_record(buffer, &Record::HardState(hard_state.clone()));
    }
}

/// Appends one record.
pub(super) fn put_record(buffer: &mut Vec<u8>, record: &Record) {
    match record {
        Record::Entries(entries) => put_entries(buffer, entries),
        Record::HardState(hard_state) => {
            buffer.put_u8(HARD_STATE);
            put_hard_state(buffer, hard_state);
        }
        Record::Truncate(at) => {
            buffer.put_u8(TRUNCATE);
            put_position(buffer, *at);
        }
        Record::Reset(at) => {
            buffer.put_u8(RESET);
            put_position(buffer, *at);
        }
        Record::Installing(snapshot) => {
            buffer.put_u8(INSTALLING);
            put_position(buffer, snapshot.unwrap_or_default());
        }
    }
}

fn put_entries(buffer: &mut Vec<u8>, entries: &[Entry]) {
    let count = |number: usize| u32::try_from(number).expect("a group is far smaller than 4 GiB");
    let same_term = |left: &Entry, right: &Entry| left.term == right.term;
    let payload: usize = entries.iter().map(|entry| 9 + entry.data.len() + entry.context.len()).sum();
    buffer.reserve(payload + 64);
    buffer.put_u8(ENTRIES);
    buffer.put_u64_le(entries[0].index);
    buffer.put_u32_le(count(entries.len()));
    buffer.put_u32_le(count(entries.chunk_by(same_term).count()));
    for run in entries.chunk_by(same_term) {
        buffer.put_u64_le(run[0].term);
        buffer.put_u32_le(count(run.len()));
    }
    for entry in entries {
        buffer.put_u8(u8::try_from(entry.entry_type.value()).expect("raft has three types of entries"));
        buffer.put_u32_le(count(entry.data.len()));
        buffer.put_u32_le(count(entry.context.len()));
    }
    for entry in entries {
        buffer.put_slice(&entry.data);
        buffer.put_slice(&entry.context);
    }
}

fn put_position(buffer: &mut Vec<u8>, at: Position) {
    buffer.put_u64_le(at.index);
    buffer.put_u64_le(at.term);
}

fn put_hard_state(buffer: &mut Vec<u8>, hard_state: &HardState) {
    buffer.put_u64_le(hard_state.term);
    buffer.put_u64_le(hard_state.vote);
    buffer.put_u64_le(hard_state.commit);
}

/// All records of a payload, or None if this version cannot decode them.
pub(super) fn records(mut payload: &[u8]) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    while let Ok(kind) = payload.try_get_u8() {
        records.push(match kind {
            ENTRIES => Record::Entries(take_entries(&mut payload)?),
            HARD_STATE => Record::HardState(take_hard_state(&mut payload)?),
            TRUNCATE => Record::Truncate(take_position(&mut payload)?),
            RESET => Record::Reset(take_position(&mut payload)?),
            INSTALLING => Record::Installing(position_or_none(take_position(&mut payload)?)),
            _ => return None,
        });
    }
    Some(records)
}

fn take_entries(payload: &mut &[u8]) -> Option<Vec<Entry>> {
    let first_index = payload.try_get_u64_le().ok()?;
    let count = payload.try_get_u32_le().ok()?;
    let runs = payload.try_get_u32_le().ok()?;
    let mut entries = Vec::new();
    for _ in 0..runs {
        let term = payload.try_get_u64_le().ok()?;
        for _ in 0..payload.try_get_u32_le().ok()? {
            let index = first_index + entries.len() as u64;
            entries.push(Entry { term, index, ..Entry::default() });
        }
    }
    let mut lengths = payload.get(..entries.len() * 9)?;
    payload.advance(lengths.len());
    for entry in &mut entries {
        entry.entry_type = EntryType::from_i32(i32::from(lengths.get_u8()))?;
        // Copied, because a slice would keep the whole segment in memory as long as one of its entries exists.
        entry.data = take_bytes(payload, lengths.get_u32_le())?;
        entry.context = take_bytes(payload, lengths.get_u32_le())?;
    }
    (!entries.is_empty() && entries.len() == count as usize).then_some(entries)
}

fn take_bytes(payload: &mut &[u8], length: u32) -> Option<Bytes> {
    let bytes = payload.get(..length as usize)?;
    payload.advance(bytes.len());
    Some(Bytes::copy_from_slice(bytes))
}

fn take_position(payload: &mut &[u8]) -> Option<Position> {
    Some(Position { index: payload.try_get_u64_le().ok()?, term: payload.try_get_u64_le().ok()? })
}

/// Decodes a position where index 0 and term 0 mean none.
fn position_or_none(at: Position) -> Option<Position> {
    (at != Position::default()).then_some(at)
}

fn take_hard_state(payload: &mut &[u8]) -> Option<HardState> {
    Some(HardState {
        term: payload.try_get_u64_le().ok()?,
        vote: payload.try_get_u64_le().ok()?,
        commit: payload.try_get_u64_le().ok()?,
        ..HardState::default()
    })
}

/// The first record of a segment.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SegmentHeader {
    pub salt: u32,
    pub identity: Identity,
    pub summary: Summary,
}

/// Why a segment header cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// It is of a later version.
    Newer(u32),
    /// It is not a segment header.
    Malformed,
}

/// Fills `buffer` with the group that begins a segment.
pub(super) fn segment_group(buffer: &mut Vec<u8>, header: &SegmentHeader, segment: u64, previous: Link) -> Link {
    begin(buffer);
    buffer.put_u8(SEGMENT);
    buffer.put_u32_le(VERSION);
    buffer.put_u32_le(header.salt);
    buffer.put_u64_le(header.identity.cluster_id);
    buffer.put_u64_le(header.identity.member_id);
    buffer.put_u64_le(header.summary.next_index);
    put_position(buffer, header.summary.truncated);
    put_hard_state(buffer, &header.summary.hard_state);
    put_position(buffer, header.summary.installing.unwrap_or_default());
    let link = seal(buffer, 0, segment, previous);
    assert_eq!(buffer.len() as u64, SEGMENT_GROUP_BYTES, "the header's fields have fixed lengths");
    link
}

/// Reads the payload of the group that begins a segment.
pub(super) fn segment_header(mut payload: &[u8]) -> Result<SegmentHeader, HeaderError> {
    let payload = &mut payload;
    if payload.try_get_u8() != Ok(SEGMENT) {
        return Err(HeaderError::Malformed);
    }
    match payload.try_get_u32_le() {
        Ok(VERSION) => take_segment_header(payload).ok_or(HeaderError::Malformed),
        Ok(version) if version > VERSION => Err(HeaderError::Newer(version)),
        Ok(_) | Err(_) => Err(HeaderError::Malformed),
    }
}

fn take_segment_header(payload: &mut &[u8]) -> Option<SegmentHeader> {
    let salt = payload.try_get_u32_le().ok()?;
    let cluster_id = payload.try_get_u64_le().ok()?;
    let member_id = payload.try_get_u64_le().ok()?;
    let next_index = payload.try_get_u64_le().ok()?;
    let truncated = take_position(payload)?;
    let hard_state = take_hard_state(payload)?;
    let installing = position_or_none(take_position(payload)?);
    let summary = Summary { truncated, hard_state, installing, next_index };
    Some(SegmentHeader { salt, identity: Identity { cluster_id, member_id }, summary })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64, data: &'static [u8]) -> Entry {
        Entry { index, term, data: Bytes::from_static(data), ..Entry::default() }
    }

    #[test]
    fn records_are_decoded_to_what_was_encoded() {
        let mut change = entry(7, 3, b"change");
        change.entry_type = EntryType::EntryConfChangeV2;
        change.context = Bytes::from_static(b"why");
        let hard_state = HardState { term: 3, vote: 9, commit: 5, ..HardState::default() };
        let group =
            Group { entries: vec![entry(5, 2, b""), entry(6, 2, b"six"), change], hard_state: Some(hard_state) };
        let at = Position { index: 4, term: 2 };
        let extra = [Record::Truncate(at), Record::Reset(at), Record::Installing(Some(at)), Record::Installing(None)];

        let mut buffer = Vec::new();
        begin(&mut buffer);
        put_group(&mut buffer, &group);
        for record in &extra {
            put_record(&mut buffer, record);
        }
        let link = seal(&mut buffer, 77, 4, Link { group: 10, crc: 99 });

        let (head, payload) = intact(&buffer, 77).expect("just sealed");
        assert_eq!((head.link(), head.segment, head.previous_crc), (link, 4, 99));
        assert_eq!((head.group, head.group_bytes()), (11, buffer.len()));
        let expected: Vec<_> = Record::of(&group).into_iter().chain(extra).collect();
        assert_eq!(records(payload), Some(expected));
    }

    #[test]
    fn a_flipped_bit_anywhere_breaks_a_group() {
        let mut buffer = Vec::new();
        begin(&mut buffer);
        put_record(&mut buffer, &Record::Entries(vec![entry(1, 1, b"some bytes of a client")]));
        let end = buffer.len();
        seal(&mut buffer, 5, 1, Link::default());
        assert!(intact(&buffer, 5).is_some());
        for bit in 0..end * 8 {
            buffer[bit / 8] ^= 1 << (bit % 8);
            assert!(intact(&buffer, 5).is_none(), "bit {bit}");
            buffer[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_group_is_not_intact_under_another_salt() {
        let mut buffer = Vec::new();
        begin(&mut buffer);
        put_record(&mut buffer, &Record::Truncate(Position::default()));
        seal(&mut buffer, 5, 1, Link::default());
        assert!(intact(&buffer, 6).is_none());
    }

    #[test]
    fn a_later_version_is_told_from_a_malformed_header() {
        let header = SegmentHeader { salt: 1, identity: Identity::default(), summary: Summary::default() };
        let mut buffer = Vec::new();
        segment_group(&mut buffer, &header, 1, Link::default());
        assert_eq!(segment_header(&buffer[HEAD_BYTES..]), Ok(header));
        buffer[HEAD_BYTES + 1] = 2;
        assert_eq!(segment_header(&buffer[HEAD_BYTES..]), Err(HeaderError::Newer(2)));
        buffer[HEAD_BYTES] = TRUNCATE;
        assert_eq!(segment_header(&buffer[HEAD_BYTES..]), Err(HeaderError::Malformed));
    }
}
