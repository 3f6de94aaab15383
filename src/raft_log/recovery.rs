//! Recovery: reads a log, and distinguishes valid data, a write torn by a crash, and corruption.
//!
//! Since a group is written only after the one before it was synced, an intact group proves that all earlier ones were
//! durable. So if a group is not intact there are two cases. If no intact group with a higher number follows it, it was the last
//! write, its sync never returned, and nothing in it was acknowledged: a torn write, which is removed with a warning. If one
//! follows, the group *was* synced and its bytes have changed since: the log is corrupt, and continuing without the group could
//! break a promise to other members. Opening the log fails then, and this member must be restored from its peers.
//!
//! A bit that flips in the very last group looks like a torn write. No rule about the log alone can distinguish the two; hence
//! the warning, and [`Recovered::check_applied`].
//!
//! Only the segments with contiguous numbers up to the newest one count. Segments before a gap are left over from a truncation
//! whose removals became durable only in part. That no segment is missing is proved by the entries, which must reach back to the
//! truncation point.

use std::path::PathBuf;

use super::contents::{Contents, Recovered, Summary, TornTail};
use super::format::{self, GroupHeader, HeaderError, Link, SegmentHeader};
use super::location::{LogLocation, Segment};
use crate::error::Halt;

/// A log as read from disk.
pub(super) struct LogOnDisk {
    pub recovered: Recovered,
    pub summary: Summary,
    pub salt: u32,
    /// The segments that count, ascending; never empty.
    pub segments: Vec<Segment>,
    /// Segments that are no longer needed, and their sizes.
    pub leftovers: Vec<(PathBuf, u64)>,
    /// The last intact group, which is in the newest segment: where it begins, its bytes, and what the next one must refer to.
    pub last_group_start: u64,
    pub last_group: Vec<u8>,
    pub link: Link,
}

/// Reads the log in a directory that contains these names.
pub(super) fn read(place: &LogLocation, names: &[String]) -> Result<LogOnDisk, Halt> {
    let numbers = LogLocation::segments(names);
    let Some(newest) = numbers.last() else {
        return Err(Halt::InvalidData(format!("{}: there is no log here", place.dir.display())));
    };
    // In an ascending sequence, the distance to the end equals the difference of the numbers exactly if no number is missing.
    let counts = |(nth, number): &(usize, &u64)| newest - **number == (numbers.len() - 1 - nth) as u64;
    let first = numbers.iter().enumerate().find(counts).map_or(0, |(nth, _)| nth);
    let (leftovers, contiguous) = numbers.split_at(first);

    let mut replay = Replay::new(place);
    for number in contiguous {
        let path = place.segment_path(*number);
        let bytes = place.files.read(&path).map_err(Halt::io("read", &path))?;
        replay.segment(*number, path, bytes)?;
    }
    let leftovers = leftovers.iter().map(|number| place.segment_path(*number));
    let leftovers = leftovers.map(|path| {
        let file = place.files.open(&path).map_err(Halt::io("open", &path))?;
        let bytes = file.size_bytes().map_err(Halt::io("open", &path))?;
        Ok((path, bytes))
    });
    replay.finish(leftovers.collect::<Result<_, _>>()?)
}

/// The error for a segment that is corrupt.
fn damaged(path: &std::path::Path, offset: u64, what: &str) -> Halt {
    Halt::InvalidData(format!(
        "{}: damaged at offset {offset}: {what}. Nothing was changed. Restore the log and the database from the same backup, \
         or remove this member from the cluster and add it again with an empty data directory",
        path.display()
    ))
}

/// The content of a segment file, and the part of it that was replayed.
struct SegmentFile {
    number: u64,
    path: PathBuf,
    bytes: Vec<u8>,
    /// Where the last intact group begins and ends.
    group_start: usize,
    end: usize,
}

impl SegmentFile {
    fn damaged(&self, what: &str) -> Halt {
        damaged(&self.path, self.end as u64, what)
    }
}

struct Replay<'a> {
    place: &'a LogLocation,
    /// The salt, identity and contents, from the first segment header on.
    log: Option<(SegmentHeader, Contents)>,
    link: Link,
    segments: Vec<Segment>,
    /// The segment read last.
    newest: Option<SegmentFile>,
}

impl<'a> Replay<'a> {
    fn new(place: &'a LogLocation) -> Self {
        Self { place, log: None, link: Link::default(), segments: Vec::new(), newest: None }
    }

    /// Replays all groups of one segment.
    fn segment(&mut self, number: u64, path: PathBuf, bytes: Vec<u8>) -> Result<(), Halt> {
        let mut file = SegmentFile { number, path, bytes, group_start: 0, end: 0 };
        self.segments.push(Segment { number, bytes: file.bytes.len() as u64, last_index: 0 });
        self.header(&mut file)?;
        while self.group(&mut file)? {}
        self.newest = Some(file);
        Ok(())
    }

    /// Reads the group that begins a segment, and checks that it continues the segment before.
    fn header(&mut self, file: &mut SegmentFile) -> Result<(), Halt> {
        let Some((head, payload)) = format::intact(&file.bytes, 0) else {
            return Err(file.damaged("the segment header is not intact"));
        };
        let header = format::segment_header(payload).map_err(|error| match error {
            HeaderError::Newer(version) => Halt::InvalidData(format!(
                "{}: written in version {version} of the log format, but this program supports only version {}: use a newer \
                 program",
                file.path.display(),
                format::VERSION
            )),
            HeaderError::Malformed => file.damaged("this is not a segment header"),
        })?;
        if head.segment != file.number {
            return Err(file.damaged(&format!("this is the header of segment {}", head.segment)));
        }
        if let (Some((first, _)), Some(before)) = (&self.log, &self.newest) {
            if (first.salt, first.identity) != (header.salt, header.identity) {
                return Err(file.damaged("the segment belongs to another log"));
            }
            if !follows(&head, self.link) {
                return Err(before.damaged(&format!("groups from {} on are not intact", self.link.group + 1)));
            }
        } else {
            self.log = Some((header.clone(), Contents::new(header.summary)));
        }
        self.link = head.link();
        file.end = head.group_bytes();
        Ok(())
    }

    /// Replays the next group of a segment; false if there is none.
    fn group(&mut self, file: &mut SegmentFile) -> Result<bool, Halt> {
        let (header, contents) = self.log.as_mut().expect("a header comes first");
        let Some((head, payload)) = format::intact(file.bytes.get(file.end..).unwrap_or_default(), header.salt) else {
            return Ok(false);
        };
        if head.segment != file.number || !follows(&head, self.link) {
            return Ok(false);
        }
        let records = format::records(payload).ok_or_else(|| file.damaged("the group holds no known records"))?;
        for record in records {
            let segment = self.segments.last_mut().expect("pushed before its groups are read");
            segment.last_index = segment.last_index.max(record.last_index());
            if record.is_reset() {
                self.segments.iter_mut().for_each(|segment| segment.last_index = 0);
            }
            contents.replay(record).map_err(|reason| file.damaged(&reason))?;
        }
        self.link = head.link();
        file.group_start = file.end;
        file.end += head.group_bytes();
        Ok(true)
    }

    /// Checks what follows the last intact group of the newest segment: nothing, a torn write, or corruption.
    fn tail(&self, file: &SegmentFile, salt: u32) -> Result<Option<TornTail>, Halt> {
        let rest = file.bytes.get(file.end..).unwrap_or_default();
        for offset in (0..rest.len()).step_by(format::ALIGNMENT) {
            let Some(head) = GroupHeader::read(&rest[offset..]) else { continue };
            let later = head.segment == file.number && head.group > self.link.group;
            if later && format::intact(&rest[offset..], salt).is_some() {
                let (next, at) = (self.link.group + 1, file.end + offset);
                return Err(file.damaged(&format!(
                    "group {next} is not intact, but group {} at offset {at} is, so both were synced",
                    head.group
                )));
            }
        }
        let Some(bytes) = torn_bytes(rest, file.number, self.link) else { return Ok(None) };
        let torn = TornTail { file: file.path.clone(), offset: file.end as u64, bytes };
        let path = torn.file.display();
        tracing::warn!(file = %path, offset = torn.offset, bytes, "removed a torn write at the end of the raft log");
        Ok(Some(torn))
    }

    fn finish(self, leftovers: Vec<(PathBuf, u64)>) -> Result<LogOnDisk, Halt> {
        let file = self.newest.as_ref().expect("the newest segment was read");
        let salt = self.log.as_ref().expect("with its header").0.salt;
        let torn_tail = self.tail(file, salt)?;
        let (header, contents) = self.log.expect("checked above");
        let summary = contents.summary.clone();
        let refuse = |reason: String| damaged(&self.place.dir, 0, &reason);
        let recovered = contents.finish(header.identity, torn_tail).map_err(refuse)?;
        let mut last_group = file.bytes[file.group_start..file.end.min(file.bytes.len())].to_vec();
        last_group.resize(file.end - file.group_start, 0); // Of an intact group only the padding can be missing.
        Ok(LogOnDisk {
            recovered,
            summary,
            salt,
            segments: self.segments,
            leftovers,
            last_group_start: file.group_start as u64,
            last_group,
            link: self.link,
        })
    }
}

/// Whether a group is the one after `link`.
fn follows(head: &GroupHeader, link: Link) -> bool {
    (head.group, head.previous_crc) == (link.group + 1, link.crc)
}

/// The length of the group whose write was begun at the start of `rest`, if any.
///
/// If no write was begun, there are zeros or a header from an earlier use of the file, whose fields all differ from the expected
/// ones. If a write was torn, or a bit flipped, most fields match.
fn torn_bytes(rest: &[u8], segment: u64, link: Link) -> Option<u64> {
    let head = GroupHeader::read_any(rest)?;
    let matches = [head.segment == segment, head.group == link.group + 1, head.previous_crc == link.crc];
    let begun = matches.into_iter().filter(|matches| *matches).count() >= 2;
    begun.then(|| head.group_bytes().min(rest.len()) as u64)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use raft::eraftpb::{Entry, HardState};

    use super::super::{Group, Identity, LogStore, Position, SegmentLog};
    use super::*;

    fn empty_log(dir: &std::path::Path) -> LogLocation {
        let place = LogLocation { segment_bytes: 4096, ..LogLocation::new(dir) };
        SegmentLog::create(&place, Identity::default(), Position::default(), &HardState::default()).unwrap();
        place
    }

    fn rewrite(place: &LogLocation, change: impl FnOnce(&mut Vec<u8>)) {
        let path = place.segment_path(1);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
    }

    #[test]
    fn a_log_of_a_later_version_is_refused_with_both_versions() {
        let root = tempfile::tempdir().unwrap();
        let place = empty_log(root.path());
        rewrite(&place, |bytes| {
            let (_, payload) = format::intact(bytes, 0).unwrap();
            let mut later = Vec::new();
            format::begin(&mut later);
            later.extend_from_slice(payload);
            later[format::HEAD_BYTES + 1] = 2;
            format::seal(&mut later, 0, 1, Link::default());
            bytes[..later.len()].copy_from_slice(&later);
        });
        let refusal = SegmentLog::open(&place).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.contains("version 2") && refusal.contains("only version 1"), "{refusal}");
    }

    #[test]
    fn bytes_of_a_client_that_look_like_a_group_are_not_taken_for_one() {
        let root = tempfile::tempdir().unwrap();
        let place = empty_log(root.path());
        let mut forged = Vec::new();
        format::begin(&mut forged);
        format::seal(&mut forged, 0, 1, Link { group: 1000, crc: 0 });
        // One of these copies of the forged group is aligned like a group.
        let data: Vec<u8> =
            (0..8).flat_map(|shift| [vec![0; shift], forged.clone(), vec![0; 8 - shift]].concat()).collect();
        let entry = Entry { index: 1, term: 1, data: Bytes::from(data), ..Entry::default() };
        let (mut log, _) = SegmentLog::open(&place).unwrap();
        log.append(&Group { entries: vec![entry], hard_state: None }).unwrap();
        drop(log);
        let start = usize::try_from(format::SEGMENT_GROUP_BYTES).unwrap();
        rewrite(&place, |bytes| bytes[start + format::HEAD_BYTES] ^= 1); // As if the write had been torn.

        let (_, recovered) = SegmentLog::open(&place).unwrap();
        assert_eq!(recovered.torn_tail.map(|torn| torn.offset), Some(start as u64));
        assert_eq!(recovered.entries, []);
    }

    #[test]
    fn a_segment_of_another_log_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let place = empty_log(root.path());
        let mut header = Vec::new();
        let foreign = SegmentHeader { salt: 1, identity: Identity::default(), summary: Summary::default() };
        format::segment_group(&mut header, &foreign, 2, Link::default());
        std::fs::write(place.segment_path(2), header).unwrap();
        let refusal = SegmentLog::open(&place).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.contains("another log"), "{refusal}");
    }
}
