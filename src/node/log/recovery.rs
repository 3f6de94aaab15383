//! Reading a log back: which bytes count, which were torn off by a crash, and which are damage.
//!
//! Since a group is written only after the one before it was synced, an intact group proves that all earlier ones were
//! durable. So when a group is not intact there are two cases. If nothing intact with a higher number lies behind it, it was
//! the last write, its sync never returned, and nobody was promised anything: a torn tail, which is cut off with a warning.
//! If something does, the group *was* synced and its bytes have changed since: damage, and going on without it could break
//! a promise. The log is refused then, and this member must come back through its peers.
//!
//! A bit that flips in the very last group looks like a torn tail. No rule about one log can tell them apart; hence the
//! warning, and [`Recovered::check_applied`].
//!
//! Only the unbroken row of segments up to the newest one counts. Segments before a gap are left over from a cut whose
//! removals became durable in part; that nothing is missing is proved by the entries, which must reach back to the
//! truncation point.

use std::path::PathBuf;

use super::contents::{Contents, Recovered, Summary, TornTail};
use super::format::{self, Head, HeaderError, Link, SegmentHeader};
use super::segment::{Place, Segment};
use crate::error::Halt;

/// A log, as found on disk.
pub(super) struct Found {
    pub recovered: Recovered,
    pub summary: Summary,
    pub salt: u32,
    /// The segments that count, ascending; never empty.
    pub segments: Vec<Segment>,
    /// Segments that do not count any more, and their sizes.
    pub leftovers: Vec<(PathBuf, u64)>,
    /// The last intact group, which lies in the newest segment: where it begins, its bytes, and what the next one names.
    pub last_group_start: u64,
    pub last_group: Vec<u8>,
    pub link: Link,
}

/// Reads the log in a directory with these names.
pub(super) fn read(place: &Place, names: &[String]) -> Result<Found, Halt> {
    let numbers = Place::segments(names);
    let Some(newest) = numbers.last() else {
        return Err(Halt::Refused(format!("{}: there is no log here", place.dir.display())));
    };
    // In a row of ascending numbers, distance to the end equals distance in value exactly where nothing is missing.
    let counts = |(place, number): &(usize, &u64)| newest - **number == (numbers.len() - 1 - place) as u64;
    let first = numbers.iter().enumerate().find(counts).map_or(0, |(place, _)| place);
    let (leftovers, row) = numbers.split_at(first);

    let mut replay = Replay::new(place);
    for number in row {
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

/// Refuses a segment whose bytes cannot be what was written.
fn damaged(path: &std::path::Path, offset: u64, what: &str) -> Halt {
    Halt::Refused(format!(
        "{}: damaged at offset {offset}: {what}. Nothing was changed. Put the log and the database back from one copy, or \
         remove this member from the cluster and add it again with an empty data directory",
        path.display()
    ))
}

/// A segment as read.
struct Page {
    number: u64,
    path: PathBuf,
    bytes: Vec<u8>,
    /// Where the last intact group begins and ends.
    group_start: usize,
    end: usize,
}

impl Page {
    fn damaged(&self, what: &str) -> Halt {
        damaged(&self.path, self.end as u64, what)
    }
}

struct Replay<'a> {
    place: &'a Place,
    /// The salt, identity and contents, from the first segment header on.
    log: Option<(SegmentHeader, Contents)>,
    link: Link,
    segments: Vec<Segment>,
    /// The segment read last.
    newest: Option<Page>,
}

impl<'a> Replay<'a> {
    fn new(place: &'a Place) -> Self {
        Self { place, log: None, link: Link::default(), segments: Vec::new(), newest: None }
    }

    /// Follows all groups of one segment.
    fn segment(&mut self, number: u64, path: PathBuf, bytes: Vec<u8>) -> Result<(), Halt> {
        let mut page = Page { number, path, bytes, group_start: 0, end: 0 };
        self.segments.push(Segment { number, bytes: page.bytes.len() as u64, last_index: 0 });
        self.header(&mut page)?;
        while self.group(&mut page)? {}
        self.newest = Some(page);
        Ok(())
    }

    /// Reads the group that begins a segment and holds it against what came before.
    fn header(&mut self, page: &mut Page) -> Result<(), Halt> {
        let Some((head, payload)) = format::intact(&page.bytes, 0) else {
            return Err(page.damaged("the segment header is not intact"));
        };
        let header = format::segment_header(payload).map_err(|error| match error {
            HeaderError::Newer(version) => Halt::Refused(format!(
                "{}: written in version {version} of the log format, but this program knows only version {}: start the \
                 newer program again",
                page.path.display(),
                format::VERSION
            )),
            HeaderError::Malformed => page.damaged("this is not a segment header"),
        })?;
        if head.segment != page.number {
            return Err(page.damaged(&format!("this is the header of segment {}", head.segment)));
        }
        if let (Some((first, _)), Some(before)) = (&self.log, &self.newest) {
            if (first.salt, first.identity) != (header.salt, header.identity) {
                return Err(page.damaged("the segment belongs to another log"));
            }
            if !follows(&head, self.link) {
                return Err(before.damaged(&format!("groups from {} on are not intact", self.link.group + 1)));
            }
        } else {
            self.log = Some((header.clone(), Contents::new(header.summary)));
        }
        self.link = head.link();
        page.end = head.group_bytes();
        Ok(())
    }

    /// Follows the next group of a segment; false if there is none.
    fn group(&mut self, page: &mut Page) -> Result<bool, Halt> {
        let (header, contents) = self.log.as_mut().expect("a header comes first");
        let Some((head, payload)) = format::intact(page.bytes.get(page.end..).unwrap_or_default(), header.salt) else {
            return Ok(false);
        };
        if head.segment != page.number || !follows(&head, self.link) {
            return Ok(false);
        }
        let records = format::records(payload).ok_or_else(|| page.damaged("the group holds no known records"))?;
        for record in records {
            let segment = self.segments.last_mut().expect("pushed before its groups are read");
            segment.last_index = segment.last_index.max(record.last_index());
            if record.forgets_all() {
                self.segments.iter_mut().for_each(|segment| segment.last_index = 0);
            }
            contents.follow(record).map_err(|reason| page.damaged(&reason))?;
        }
        self.link = head.link();
        page.group_start = page.end;
        page.end += head.group_bytes();
        Ok(true)
    }

    /// What lies behind the last intact group of the newest segment: nothing, a torn tail, or damage.
    fn tail(&self, page: &Page, salt: u32) -> Result<Option<TornTail>, Halt> {
        let rest = page.bytes.get(page.end..).unwrap_or_default();
        for offset in (0..rest.len()).step_by(format::ALIGNMENT) {
            let Some(head) = Head::read(&rest[offset..]) else { continue };
            let later = head.segment == page.number && head.group > self.link.group;
            if later && format::intact(&rest[offset..], salt).is_some() {
                let (next, at) = (self.link.group + 1, page.end + offset);
                return Err(page.damaged(&format!(
                    "group {next} is not intact, but group {} at offset {at} is, so both were synced",
                    head.group
                )));
            }
        }
        let Some(bytes) = torn_bytes(rest, page.number, self.link) else { return Ok(None) };
        let torn = TornTail { file: page.path.clone(), offset: page.end as u64, bytes };
        tracing::warn!(file = %torn.file.display(), offset = torn.offset, bytes, "the log ends in a torn write, cut off");
        Ok(Some(torn))
    }

    fn finish(self, leftovers: Vec<(PathBuf, u64)>) -> Result<Found, Halt> {
        let page = self.newest.as_ref().expect("the newest segment was read");
        let salt = self.log.as_ref().expect("with its header").0.salt;
        let torn_tail = self.tail(page, salt)?;
        let (header, contents) = self.log.expect("checked above");
        let summary = contents.summary.clone();
        let refuse = |reason: String| damaged(&self.place.dir, 0, &reason);
        let recovered = contents.finish(header.identity, torn_tail).map_err(refuse)?;
        let mut last_group = page.bytes[page.group_start..page.end.min(page.bytes.len())].to_vec();
        last_group.resize(page.end - page.group_start, 0); // Only the padding can be cut off from an intact group.
        Ok(Found {
            recovered,
            summary,
            salt,
            segments: self.segments,
            leftovers,
            last_group_start: page.group_start as u64,
            last_group,
            link: self.link,
        })
    }
}

/// Whether a group is the one that comes after `link`.
fn follows(head: &Head, link: Link) -> bool {
    (head.group, head.previous_crc) == (link.group + 1, link.crc)
}

/// How long the group would have been that somebody began to write at the start of `rest`, if anybody did.
///
/// A head that is zero or that of a recycled group agrees with the awaited one in nothing; one whose write was torn, or in
/// which a bit flipped, agrees in most.
fn torn_bytes(rest: &[u8], segment: u64, link: Link) -> Option<u64> {
    let head = Head::read_any(rest)?;
    let agrees = [head.segment == segment, head.group == link.group + 1, head.previous_crc == link.crc];
    let begun = agrees.into_iter().filter(|agrees| *agrees).count() >= 2;
    begun.then(|| head.group_bytes().min(rest.len()) as u64)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use raft::eraftpb::{Entry, HardState};

    use super::super::{Group, Identity, LogStore, Position, SegmentLog};
    use super::*;

    fn empty_log(dir: &std::path::Path) -> Place {
        let place = Place { segment_bytes: 4096, ..Place::new(dir) };
        SegmentLog::create(&place, Identity::default(), Position::default(), &HardState::default()).unwrap();
        place
    }

    fn rewrite(place: &Place, change: impl FnOnce(&mut Vec<u8>)) {
        let path = place.segment_path(1);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
    }

    #[test]
    fn a_log_of_a_later_version_is_refused_by_name() {
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
    fn bytes_of_a_client_that_look_like_a_group_are_none() {
        let root = tempfile::tempdir().unwrap();
        let place = empty_log(root.path());
        let mut forged = Vec::new();
        format::begin(&mut forged);
        format::seal(&mut forged, 0, 1, Link { group: 1000, crc: 0 });
        // At one of these offsets the forged group lies where groups may begin.
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
