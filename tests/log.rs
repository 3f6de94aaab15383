//! The raft log under bad conditions: crashes at every step, torn writes, decaying bytes.
//!
//! Two logs do the same things: one on segment files that can lose power, and the volatile one, which is a few rules about
//! a vector. Whatever happens to the first, after reopening it must hold what the second holds before or after the step
//! that was interrupted.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use metastore::error::Halt;
use metastore::node::log::lossy::{Loss, LossyFiles};
use metastore::node::log::volatile::VolatileLog;
use metastore::node::log::{Group, Identity, LogStore, Place, Position, Recovered, SegmentLog};
use raft::eraftpb::{Entry, EntryType, HardState};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

const IDENTITY: Identity = Identity { cluster_id: 7, member_id: 1 };
const START: Position = Position { index: 3, term: 1 };
const SEGMENT_BYTES: u64 = 2048;
/// What the header of a segment takes.
const HEADER_BYTES: usize = 128;

fn hard_state(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit, ..HardState::default() }
}

fn entry(index: u64, term: u64, bytes: usize) -> Entry {
    let fill = u8::try_from(index % 251).unwrap();
    Entry { index, term, data: Bytes::from(vec![fill; bytes]), ..Entry::default() }
}

/// Entries `first..=last` of one term and size.
fn group(first: u64, last: u64, term: u64, bytes: usize) -> Group {
    Group { entries: (first..=last).map(|index| entry(index, term, bytes)).collect(), hard_state: None }
}

fn at(index: u64, term: u64) -> Position {
    Position { index, term }
}

/// Anything that can be done to a log.
#[derive(Debug, Clone)]
enum Step {
    Append(Group),
    Cut(Position),
    Reset(Position, HardState),
    Installing(Option<Position>),
}

impl Step {
    fn take(&self, log: &mut dyn LogStore) -> Result<(), Halt> {
        match self {
            Self::Append(group) => log.append(group),
            Self::Cut(at) => log.cut(*at),
            Self::Reset(at, hard_state) => log.reset(*at, hard_state),
            Self::Installing(snapshot) => log.set_installing(*snapshot),
        }
    }
}

/// What a log should hold after these steps.
fn expected(steps: &[Step]) -> Recovered {
    let mut model = VolatileLog::create(IDENTITY, START, &hard_state(1, 3));
    for step in steps {
        step.take(&mut model).unwrap();
    }
    model.open().unwrap()
}

/// A log on files that can lose power.
struct Ground {
    _root: TempDir,
    files: LossyFiles,
    place: Place,
}

impl Ground {
    fn empty(segment_bytes: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let files = LossyFiles::new();
        let place = Place { dir: root.path().join("log"), files: Arc::new(files.clone()), segment_bytes };
        Self { _root: root, files, place }
    }

    fn new(segment_bytes: u64) -> Self {
        let ground = Self::empty(segment_bytes);
        ground.create().unwrap();
        ground
    }

    fn create(&self) -> Result<(), Halt> {
        SegmentLog::create(&self.place, IDENTITY, START, &hard_state(1, 3))
    }

    /// Opens the log; a torn tail is returned apart from what the log holds.
    fn open(&self) -> Result<(SegmentLog, Recovered, bool), Halt> {
        let (log, mut recovered) = SegmentLog::open(&self.place)?;
        let torn = recovered.torn_tail.take().is_some();
        Ok((log, recovered, torn))
    }

    fn take(&self, steps: &[Step]) {
        let (mut log, ..) = self.open().unwrap();
        for step in steps {
            step.take(&mut log).unwrap();
        }
    }

    fn named(&self, ending: &str) -> Vec<PathBuf> {
        let names = std::fs::read_dir(&self.place.dir).unwrap().map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = names.filter(|path| path.extension().is_some_and(|own| own == ending)).collect();
        paths.sort();
        paths
    }

    fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.named("segment").into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }
}

/// Steps that rotate several times, overwrite a conflicting tail, and hold a group larger than a segment.
fn a_varied_life() -> Vec<Step> {
    let mut change = entry(23, 2, 10);
    change.entry_type = EntryType::EntryConfChangeV2;
    change.context = Bytes::from_static(b"context");
    vec![
        Step::Append(group(4, 8, 1, 100)),
        Step::Append(Group { entries: vec![], hard_state: Some(hard_state(2, 6)) }),
        Step::Append(Group { entries: vec![entry(7, 2, 0), entry(8, 2, 300)], hard_state: Some(hard_state(2, 6)) }),
        Step::Append(group(9, 20, 2, 150)),
        Step::Append(group(21, 22, 2, 3000)),
        Step::Append(Group { entries: vec![change], hard_state: None }),
        Step::Append(group(24, 30, 3, 220)),
        Step::Append(group(28, 29, 4, 40)),
    ]
}

#[test]
fn what_is_appended_is_there_after_reopening() {
    let ground = Ground::new(SEGMENT_BYTES);
    let steps = a_varied_life();
    let mut files = 0;
    for (done, step) in steps.iter().enumerate() {
        ground.take(std::slice::from_ref(step));
        let (_, recovered, torn) = ground.open().unwrap();
        assert_eq!((recovered, torn), (expected(&steps[..=done]), false));
        files = ground.named("segment").len();
    }
    assert!(files > 3, "the steps were to need several segments, but need {files}");
}

#[test]
fn segments_are_used_again_and_their_garbage_does_not_count() {
    let ground = Ground::new(SEGMENT_BYTES);
    let mut steps = Vec::new();
    let (mut log, ..) = ground.open().unwrap();
    for first in (4..400).step_by(4) {
        let mut life = vec![Step::Append(group(first, first + 3, 1, 90))];
        if first % 16 == 0 {
            life.push(Step::Cut(at(first - 8, 1)));
        }
        for step in life {
            step.take(&mut log).unwrap();
            steps.push(step);
        }
        let (_, recovered, torn) = ground.open().unwrap();
        assert_eq!((recovered, torn), (expected(&steps), false));
        log = ground.open().unwrap().0;
    }
    let (segments, spares) = (ground.named("segment").len(), ground.named("spare").len());
    assert!(segments <= 5 && spares <= 3, "{segments} segments and {spares} spares were left");
}

#[test]
fn a_reset_leaves_an_empty_log_behind_the_snapshot() {
    let ground = Ground::new(SEGMENT_BYTES);
    let mut steps = a_varied_life();
    steps.push(Step::Installing(Some(at(500, 9))));
    ground.take(&steps);
    let (_, recovered, _) = ground.open().unwrap();
    assert_eq!(recovered.interrupted_install(at(500, 9)), Some(at(500, 9)));
    assert_eq!(recovered.interrupted_install(at(29, 4)), None, "the database was not replaced");

    steps.push(Step::Reset(at(500, 9), hard_state(9, 500)));
    ground.take(&steps[steps.len() - 1..]);
    let (mut log, recovered, _) = ground.open().unwrap();
    assert_eq!(recovered, expected(&steps));
    assert_eq!((recovered.truncated, recovered.last_index(), recovered.installing), (at(500, 9), 500, None));
    assert_eq!(ground.named("segment").len(), 1);

    let more = Step::Append(group(501, 503, 9, 50));
    more.take(&mut log).unwrap();
    steps.push(more);
    assert_eq!(ground.open().unwrap().1, expected(&steps));
}

#[test]
fn only_a_directory_without_a_log_gets_a_new_one() {
    let ground = Ground::new(SEGMENT_BYTES);
    assert!(matches!(ground.create(), Err(Halt::Refused(_))));
    let empty = Ground::empty(SEGMENT_BYTES);
    std::fs::create_dir(&empty.place.dir).unwrap();
    assert!(matches!(empty.open(), Err(Halt::Refused(_))));
}

#[test]
fn after_an_error_the_log_takes_nothing_more() {
    for failing in 1..=2 {
        let ground = Ground::new(SEGMENT_BYTES);
        let (mut log, ..) = ground.open().unwrap();
        ground.files.fail_at(failing); // The write, or the sync.
        assert!(matches!(log.append(&group(4, 4, 1, 10)), Err(Halt::Io { .. })));
        ground.files.crash(Loss::Nothing).unwrap(); // The disk would work again.
        let before = ground.files.operations();
        assert!(matches!(log.sync(), Err(Halt::Refused(_))));
        assert!(matches!(log.write(&group(4, 4, 1, 10)), Err(Halt::Refused(_))));
        assert!(matches!(log.cut(at(3, 1)), Err(Halt::Refused(_))));
        assert_eq!(ground.files.operations(), before, "nothing was tried again");
    }
}

#[test]
#[should_panic(expected = "each write is synced before the next one")]
fn a_second_write_before_the_sync_is_a_bug() {
    let ground = Ground::new(SEGMENT_BYTES);
    let (mut log, ..) = ground.open().unwrap();
    log.write(&group(4, 4, 1, 10)).unwrap();
    let _ = log.write(&group(5, 5, 1, 10));
}

#[test]
fn a_log_shorter_than_the_database_is_refused() {
    let ground = Ground::new(SEGMENT_BYTES);
    ground.take(&[Step::Append(group(4, 9, 1, 10)), Step::Cut(at(5, 1))]);
    let (_, recovered, _) = ground.open().unwrap();
    recovered.check_applied(at(9, 1)).unwrap();
    recovered.check_applied(at(5, 1)).unwrap();
    for (applied, word) in [(at(10, 1), "missing"), (at(4, 1), "older"), (at(9, 2), "another term")] {
        let refusal = recovered.check_applied(applied).unwrap_err().to_string();
        assert!(refusal.contains(word), "{refusal}");
    }
}

/// What may follow the byte at which the newest segment is cut.
#[derive(Debug, Clone, Copy)]
enum Behind {
    Nothing,
    Zeros,
    Garbage,
}

/// Cuts the newest segment at each of the last `span` written bytes: all groups before the cut must be there, and writing
/// must go on.
fn cut_at_each_byte(segment_bytes: u64, entry_bytes: usize, span: usize) {
    let ground = Ground::new(segment_bytes);
    let mut steps = Vec::new();
    let mut ends = Vec::new();
    let mut end = 0;
    let mut next = 4;
    // One segment and its successor, so that the successor is a recycled one with garbage behind its tail.
    let (mut log, ..) = ground.open().unwrap();
    while ground.named("segment").len() < 3 {
        log.append(&group(next, next, 1, entry_bytes)).unwrap();
        next += 1;
    }
    log.cut(at(next - 1, 1)).unwrap();
    steps.push(Step::Append(group(4, next - 1, 1, entry_bytes)));
    steps.push(Step::Cut(at(next - 1, 1)));
    let newest = loop {
        let segments = ground.named("segment").len();
        let step = Step::Append(group(next, next, 1, entry_bytes));
        let Step::Append(group) = &step else { unreachable!("just made") };
        let bytes = usize::try_from(log.write(group).unwrap()).unwrap();
        log.sync().unwrap();
        next += 1;
        if ground.named("segment").len() > segments {
            (ends, end) = (vec![HEADER_BYTES], HEADER_BYTES);
        }
        if end > 0 {
            end += bytes;
            ends.push(end);
        }
        steps.push(step);
        if end > HEADER_BYTES + span {
            break ground.named("segment").pop().unwrap();
        }
    };
    drop(log);
    let all = ground.contents();
    let garbage: Vec<u8> = all[&newest].iter().map(|byte| byte.wrapping_mul(31).wrapping_add(7)).collect();
    let states: Vec<_> = (0..ends.len()).map(|lost| expected(&steps[..steps.len() - lost])).collect();

    for cut in end - span..=end {
        for behind in [Behind::Nothing, Behind::Zeros, Behind::Garbage] {
            let mut bytes = all[&newest][..cut].to_vec();
            match behind {
                Behind::Nothing => {}
                Behind::Zeros => bytes.resize(all[&newest].len(), 0),
                Behind::Garbage => bytes.extend_from_slice(&garbage[cut..]),
            }
            ground.files.rewrite(&newest, &bytes).unwrap();
            let (mut log, recovered, _) = ground.open().unwrap_or_else(|halt| panic!("{cut} {behind:?}: {halt}"));
            // The last bytes of a group may be padding, which nobody misses.
            let kept = |slack: usize| ends.iter().filter(|end| **end <= cut + slack).count();
            let lost = ends.len() - kept(0)..=ends.len() - kept(7);
            let lost = [*lost.start(), *lost.end()];
            let found = lost.into_iter().find(|lost| states[*lost] == recovered);
            assert!(found.is_some(), "{cut} {behind:?}: the log holds up to {}", recovered.last_index());

            let first = recovered.last_index() + 1;
            log.append(&group(first, first, 2, 20)).unwrap();
            drop(log);
            let (_, again, torn) = ground.open().unwrap();
            assert_eq!((again.last_index(), again.term(first), torn), (first, Some(2), false), "{cut} {behind:?}");
            assert_eq!(again.entries[..again.entries.len() - 1], recovered.entries[..], "{cut} {behind:?}");
        }
    }
}

#[test]
fn a_log_cut_at_any_byte_keeps_all_groups_before_the_cut() {
    cut_at_each_byte(4096, 60, 500);
}

#[test]
#[ignore = "long"]
fn a_log_cut_at_any_of_its_last_64_kib_keeps_all_groups_before_the_cut() {
    cut_at_each_byte(96 << 10, 1500, 64 << 10);
}

#[test]
fn a_torn_tail_is_cut_off_once_and_for_all() {
    let ground = Ground::new(SEGMENT_BYTES);
    let steps = [Step::Append(group(4, 4, 1, 900)), Step::Append(group(5, 5, 1, 900))];
    ground.take(&steps);
    let newest = ground.named("segment").pop().unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    let written = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[written - 300..].fill(0);
    ground.files.rewrite(&newest, &bytes).unwrap();

    let (log, recovered) = SegmentLog::open(&ground.place).unwrap();
    let torn = recovered.torn_tail.unwrap();
    assert_eq!((torn.file, recovered.entries.len()), (newest.clone(), 1));
    drop(log);
    let rest = std::fs::read(&newest).unwrap().split_off(usize::try_from(torn.offset).unwrap());
    assert!(rest.iter().all(|byte| *byte == 0), "nothing of the torn group is left");
    assert_eq!(ground.open().unwrap().1, expected(&steps[..1]));
    assert!(!ground.open().unwrap().2);
}

#[test]
fn segments_of_two_copies_that_went_apart_are_not_one_log() {
    let ground = Ground::new(SEGMENT_BYTES);
    ground.take(&[Step::Append(group(4, 8, 1, 100))]);
    let first = ground.named("segment").pop().unwrap();
    let fork = std::fs::read(&first).unwrap();
    ground.take(&[Step::Append(group(9, 9, 1, 50)), Step::Append(group(10, 20, 1, 150))]);
    assert_eq!(ground.named("segment").len(), 2);

    // The other copy goes on with something else of the same shape.
    let root = tempfile::tempdir().unwrap();
    let other = Place { segment_bytes: SEGMENT_BYTES, ..Place::new(root.path()) };
    let copy = root.path().join(first.file_name().unwrap());
    std::fs::write(&copy, fork).unwrap();
    let (mut log, _) = SegmentLog::open(&other).unwrap();
    log.append(&group(9, 9, 2, 50)).unwrap();
    drop(log);
    ground.files.rewrite(&first, &std::fs::read(&copy).unwrap()).unwrap();
    let refusal = ground.open().map(|_| ()).unwrap_err().to_string();
    assert!(refusal.contains("not intact"), "{refusal}");
}

/// Flips one bit in every `stride`-th byte of every segment. No synced group may go without a word: either the log is
/// refused, or nothing is missing, or the last group is and a torn tail was reported.
fn flip_bits(stride: usize) -> BTreeMap<&'static str, usize> {
    let ground = Ground::new(SEGMENT_BYTES);
    let mut steps: Vec<_> = (4..50).map(|index| Step::Append(group(index, index, 1, 120))).collect();
    steps.insert(20, Step::Cut(at(14, 1)));
    steps.insert(30, Step::Cut(at(24, 1)));
    ground.take(&steps);
    let (whole, without_last) = (expected(&steps), expected(&steps[..steps.len() - 1]));
    let segments = ground.contents();
    assert!(segments.len() >= 3);
    let mut outcomes = BTreeMap::new();
    for (path, bytes) in &segments {
        for place in (0..bytes.len()).step_by(stride) {
            let mut flipped = bytes.clone();
            flipped[place] ^= 1 << (place % 8);
            ground.files.rewrite(path, &flipped).unwrap();
            let outcome = match ground.open() {
                Err(Halt::Refused(reason)) => {
                    assert!(reason.contains(".segment") && reason.contains("offset"), "{reason}");
                    assert_eq!(std::fs::read(path).unwrap(), flipped, "a refused log is left as it is");
                    if reason.contains("both were synced") { "refused for what lies behind" } else { "refused" }
                }
                Err(halt) => panic!("{}: {place}: {halt}", path.display()),
                Ok((_, recovered, false)) => {
                    assert!(recovered == whole, "{}: {place}: a group went without a word", path.display());
                    "unharmed"
                }
                Ok((_, recovered, true)) => {
                    assert!(recovered == without_last, "{}: {place}: more went than the tail", path.display());
                    "repaired"
                }
            };
            *outcomes.entry(outcome).or_default() += 1;
            for (path, bytes) in &segments {
                ground.files.rewrite(path, bytes).unwrap();
            }
        }
    }
    outcomes
}

#[test]
fn no_flipped_bit_costs_a_synced_group_without_a_word() {
    let outcomes = flip_bits(7);
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
}

#[test]
#[ignore = "long"]
fn no_bit_in_any_byte_costs_a_synced_group_without_a_word() {
    let outcomes = flip_bits(1);
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
}

#[test]
fn a_missing_segment_is_refused() {
    let ground = Ground::new(SEGMENT_BYTES);
    ground.take(&a_varied_life());
    let segments = ground.named("segment");
    for missing in &segments[..segments.len() - 1] {
        let copy = tempfile::tempdir().unwrap();
        for path in segments.iter().filter(|path| *path != missing) {
            std::fs::copy(path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        let place = Place { segment_bytes: SEGMENT_BYTES, ..Place::new(copy.path()) };
        let refusal = SegmentLog::open(&place).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.contains("missing"), "{refusal}");
    }
}

/// What a log held when it was opened after a crash, and what it took then, must survive a power cut: what was only in the
/// page cache must have become durable.
fn survives_another_crash(ground: &Ground, recovered: &Recovered) {
    let (mut log, ..) = ground.open().unwrap();
    let next = recovered.last_index() + 1;
    log.append(&group(next, next, 90, 10)).unwrap();
    drop(log);
    ground.files.crash(Loss::Unsynced).unwrap();
    let mut again = ground.open().unwrap().1;
    assert_eq!(again.entries.pop(), Some(entry(next, 90, 10)));
    assert_eq!(again, *recovered);
}

/// Breaks the disk at each operation that the last of `steps` needs, and crashes in several ways.
fn crash_at_each_operation(segment_bytes: u64, steps: &[Step]) {
    let (last, before) = steps.split_last().unwrap();
    let states = [expected(before), expected(steps)];
    for operation in 1.. {
        for loss in [Loss::Nothing, Loss::Unsynced].into_iter().chain((0..12).map(Loss::Parts)) {
            let ground = Ground::new(segment_bytes);
            ground.take(before);
            let (mut log, ..) = ground.open().unwrap();
            ground.files.fail_at(operation);
            let outcome = last.take(&mut log);
            let done = outcome.is_ok();
            drop(log);
            ground.files.crash(loss).unwrap();
            let (_, recovered, _) = ground.open().unwrap_or_else(|halt| panic!("{operation} {loss:?}: {halt}"));
            let allowed = if done { &states[1..] } else { &states[..] };
            assert!(allowed.contains(&recovered), "{operation} {loss:?}: {recovered:?}");
            survives_another_crash(&ground, &recovered);
            if done && loss == Loss::Parts(11) {
                assert!(operation > 2, "the step was to need several operations");
                return;
            }
        }
    }
}

#[test]
fn a_crash_at_any_step_of_a_rotation_leaves_the_log_before_or_after() {
    let steps: Vec<_> = (4..=17).map(|index| Step::Append(group(index, index, 1, 100))).collect();
    let rotates = |steps: &[Step]| {
        let ground = Ground::new(SEGMENT_BYTES);
        ground.take(steps);
        ground.named("segment").len() == 2
    };
    let first = (1..steps.len()).find(|count| rotates(&steps[..*count])).unwrap();
    crash_at_each_operation(SEGMENT_BYTES, &steps[..first]);
}

#[test]
fn a_crash_at_any_step_of_an_oversized_group_leaves_the_log_before_or_after() {
    crash_at_each_operation(SEGMENT_BYTES, &[Step::Append(group(4, 8, 1, 100)), Step::Append(group(7, 12, 2, 900))]);
}

#[test]
fn a_crash_at_any_step_of_a_cut_leaves_the_log_before_or_after() {
    let mut steps = a_varied_life();
    steps.push(Step::Cut(at(28, 4)));
    crash_at_each_operation(SEGMENT_BYTES, &steps);
}

#[test]
fn a_crash_at_any_step_of_a_reset_leaves_the_log_before_or_after() {
    let mut steps = a_varied_life();
    steps.push(Step::Installing(Some(at(90, 5))));
    steps.push(Step::Reset(at(90, 5), hard_state(5, 90)));
    crash_at_each_operation(SEGMENT_BYTES, &steps);
}

#[test]
fn a_crash_at_any_step_of_creation_leaves_no_log_or_a_whole_one() {
    for operation in 1..100 {
        for seed in 0..12 {
            let ground = Ground::empty(SEGMENT_BYTES);
            ground.files.fail_at(operation);
            let done = ground.create().is_ok();
            ground.files.crash(Loss::Parts(seed)).unwrap();
            match ground.open() {
                Ok((_, recovered, torn)) => assert_eq!((recovered, torn), (expected(&[]), false)),
                Err(halt) => {
                    assert!(!done && halt.to_string().contains("no log here"), "{operation} {seed}: {halt}");
                    ground.create().unwrap();
                    assert_eq!(ground.open().unwrap().1, expected(&[]));
                }
            }
            if done && seed == 11 {
                assert!(operation > 4, "creation was to need several operations");
                return;
            }
        }
    }
    panic!("creation never came to its end");
}

/// Chooses steps that raft could take.
struct Will {
    dice: StdRng,
    term: u64,
}

impl Will {
    fn step(&mut self, log: &Recovered) -> Step {
        let last = log.last_index();
        match self.dice.random_range(0..100) {
            0..8 if last > log.truncated.index => {
                let index = self.dice.random_range(log.truncated.index + 1..=last);
                Step::Cut(at(index, log.term(index).unwrap()))
            }
            8..10 => {
                let snapshot = at(last + self.dice.random_range(1..50), self.term);
                Step::Reset(snapshot, hard_state(self.term, snapshot.index))
            }
            10..12 => Step::Installing(self.dice.random_bool(0.5).then(|| at(last + 5, self.term))),
            _ => Step::Append(self.group(log)),
        }
    }

    fn group(&mut self, log: &Recovered) -> Group {
        let mut first = log.last_index() + 1;
        let lowest = log.hard_state.commit.max(log.truncated.index) + 1;
        if self.dice.random_bool(0.1) {
            self.term += 1;
            first = self.dice.random_range(lowest..=first);
        }
        let mut group = Group::default();
        for index in first..first + self.dice.random_range(0..5) {
            let bytes = if self.dice.random_bool(0.02) { 3000 } else { self.dice.random_range(0..200) };
            group.entries.push(entry(index, self.term, bytes));
        }
        if group.is_empty() || self.dice.random_bool(0.3) {
            let commit = self.dice.random_range(log.hard_state.commit.max(log.truncated.index).min(first - 1)..first);
            group.hard_state = Some(hard_state(self.term, commit));
        }
        group
    }

    fn loss(&mut self) -> Loss {
        match self.dice.random_range(0..4) {
            0 => Loss::Nothing,
            1 => Loss::Unsynced,
            _ => Loss::Parts(self.dice.random()),
        }
    }
}

/// A life of appends, cuts, resets and crashes: also crashes while recovering from the crash before.
fn live(seed: u64, crashes: usize) {
    let ground = Ground::new(SEGMENT_BYTES);
    let mut will = Will { dice: StdRng::seed_from_u64(seed), term: 1 };
    let mut model = VolatileLog::create(IDENTITY, START, &hard_state(1, 3));
    for crash in 0..crashes {
        ground.files.fail_at(will.dice.random_range(1..80));
        let mut in_flight = None;
        match ground.open() {
            Ok((mut log, recovered, _)) => {
                assert_eq!(recovered, model.open().unwrap(), "seed {seed}, crash {crash}");
                while in_flight.is_none() {
                    let step = will.step(&model.open().unwrap());
                    match step.take(&mut log) {
                        Ok(()) => step.take(&mut model).unwrap(),
                        Err(halt) => {
                            assert!(matches!(halt, Halt::Io { .. }), "seed {seed}, crash {crash}: {halt}");
                            in_flight = Some(step);
                        }
                    }
                }
            }
            Err(halt) => assert!(matches!(halt, Halt::Io { .. }), "seed {seed}, crash {crash}: {halt}"),
        }
        ground.files.crash(will.loss()).unwrap();
        let found = ground.open().unwrap_or_else(|halt| panic!("seed {seed}, crash {crash}: {halt}")).1;
        if let Some(step) = in_flight.filter(|_| found != model.open().unwrap()) {
            step.take(&mut model).unwrap();
        }
        assert_eq!(found, model.open().unwrap(), "seed {seed}, crash {crash}");
    }
}

#[test]
fn whatever_happens_the_log_holds_what_was_synced() {
    for seed in 0..20 {
        live(seed, 25);
    }
}

#[test]
#[ignore = "long"]
fn whatever_happens_for_long_the_log_holds_what_was_synced() {
    for seed in 1000..2500 {
        live(seed, 40);
    }
}

/// A log on the files of the operating system, with its helper thread.
fn real(dir: &Path, segment_bytes: u64) -> (Place, SegmentLog) {
    let place = Place { segment_bytes, ..Place::new(dir) };
    SegmentLog::create(&place, IDENTITY, START, &hard_state(1, 3)).unwrap();
    let (log, _) = SegmentLog::open(&place).unwrap();
    (place, log)
}

#[test]
fn the_helper_thread_keeps_up_with_rotations_and_cuts() {
    let root = tempfile::tempdir().unwrap();
    let (place, mut log) = real(&root.path().join("log"), 8192);
    let mut steps = Vec::new();
    for first in (4..1004).step_by(10) {
        steps.push(Step::Append(group(first, first + 9, 1, 100)));
        if first % 40 == 4 && first > 100 {
            steps.push(Step::Cut(at(first - 50, 1)));
        }
    }
    for step in &steps {
        step.take(&mut log).unwrap();
    }
    assert!(log.size_bytes() <= 20 * 8192);
    drop(log);
    let (_, recovered) = SegmentLog::open(&place).unwrap();
    assert_eq!(recovered, expected(&steps));
}

#[test]
#[ignore = "long"]
fn how_long_an_append_of_one_kib_takes() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (_, mut log) = real(&root.path().join("log"), Place::SEGMENT_BYTES);
    let mut times = Vec::new();
    for index in 4..20_004 {
        let group = group(index, index, 1, 1024);
        let start = Instant::now();
        log.append(&group).unwrap();
        times.push(start.elapsed());
        if index % 5000 == 0 {
            log.cut(at(index - 1, 1)).unwrap();
        }
    }
    times.sort();
    let share = |part: usize| times[times.len() * part / 1000];
    println!("append and sync of 1 KiB: p50 {:?}, p99 {:?}, p99.9 {:?}", share(500), share(990), share(999));
    assert_eq!(times.len(), 20_000);
}
