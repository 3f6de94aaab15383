//! Corrupted segments: truncated files, flipped bits, and segments of another log.

use std::collections::BTreeMap;

use metastore::error::Halt;
use metastore::raft_log::{LogLocation, LogStore, SegmentLog};

use crate::fixture::{SEGMENT_BYTES, Step, TestLog, at, expected, group, varied_steps};

/// The size of a segment's header.
const HEADER_BYTES: usize = 128;

/// What may follow the byte at which the newest segment is truncated.
#[derive(Debug, Clone, Copy)]
enum Tail {
    Nothing,
    Zeros,
    Garbage,
}

/// Truncates the newest segment at each of the last `span` written bytes: all groups before that byte must be recovered, and
/// the log must accept writes.
fn truncate_at_each_byte(segment_bytes: u64, entry_bytes: usize, span: usize) {
    let test_log = TestLog::new(segment_bytes);
    let mut steps = Vec::new();
    let mut ends = Vec::new();
    let mut end = 0;
    let mut next = 4;
    // Fills several segments and truncates the log, so that the next segment is a recycled one with garbage behind its tail.
    let (mut log, ..) = test_log.open().unwrap();
    while test_log.files_with_extension("segment").len() < 3 {
        log.append(&group(next, next, 1, entry_bytes)).unwrap();
        next += 1;
    }
    log.truncate(at(next - 1, 1)).unwrap();
    steps.push(Step::Append(group(4, next - 1, 1, entry_bytes)));
    steps.push(Step::Truncate(at(next - 1, 1)));
    let newest = loop {
        let segments = test_log.files_with_extension("segment").len();
        let step = Step::Append(group(next, next, 1, entry_bytes));
        let Step::Append(group) = &step else { unreachable!("just made") };
        let bytes = usize::try_from(log.write(group).unwrap()).unwrap();
        log.sync().unwrap();
        next += 1;
        if test_log.files_with_extension("segment").len() > segments {
            (ends, end) = (vec![HEADER_BYTES], HEADER_BYTES);
        }
        if end > 0 {
            end += bytes;
            ends.push(end);
        }
        steps.push(step);
        if end > HEADER_BYTES + span {
            break test_log.files_with_extension("segment").pop().unwrap();
        }
    };
    drop(log);
    let all = test_log.segment_contents();
    let garbage: Vec<u8> = all[&newest].iter().map(|byte| byte.wrapping_mul(31).wrapping_add(7)).collect();
    let states: Vec<_> = (0..ends.len()).map(|lost| expected(&steps[..steps.len() - lost])).collect();

    for end_of_file in end - span..=end {
        for tail in [Tail::Nothing, Tail::Zeros, Tail::Garbage] {
            let mut bytes = all[&newest][..end_of_file].to_vec();
            match tail {
                Tail::Nothing => {}
                Tail::Zeros => bytes.resize(all[&newest].len(), 0),
                Tail::Garbage => bytes.extend_from_slice(&garbage[end_of_file..]),
            }
            test_log.files.rewrite(&newest, &bytes).unwrap();
            let (mut log, recovered, _) =
                test_log.open().unwrap_or_else(|halt| panic!("{end_of_file} {tail:?}: {halt}"));
            // The last bytes of a group may be padding, whose loss has no effect.
            let kept = |slack: usize| ends.iter().filter(|end| **end <= end_of_file + slack).count();
            let lost = ends.len() - kept(0)..=ends.len() - kept(7);
            let lost = [*lost.start(), *lost.end()];
            let found = lost.into_iter().find(|lost| states[*lost] == recovered);
            assert!(found.is_some(), "{end_of_file} {tail:?}: the log holds up to {}", recovered.last_index());

            let first = recovered.last_index() + 1;
            log.append(&group(first, first, 2, 20)).unwrap();
            drop(log);
            let (_, again, torn) = test_log.open().unwrap();
            assert_eq!(
                (again.last_index(), again.term(first), torn),
                (first, Some(2), false),
                "{end_of_file} {tail:?}"
            );
            assert_eq!(again.entries[..again.entries.len() - 1], recovered.entries[..], "{end_of_file} {tail:?}");
        }
    }
}

/// FAULT-15.
#[test]
fn a_log_truncated_at_any_byte_keeps_all_groups_before_it() {
    truncate_at_each_byte(4096, 60, 500);
}

#[test]
#[ignore = "long"]
fn a_log_truncated_in_its_last_64_kib_keeps_all_groups_before_it() {
    truncate_at_each_byte(96 << 10, 1500, 64 << 10);
}

#[test]
fn a_torn_tail_is_removed_permanently() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    let steps = [Step::Append(group(4, 4, 1, 900)), Step::Append(group(5, 5, 1, 900))];
    test_log.apply(&steps);
    let newest = test_log.files_with_extension("segment").pop().unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    let written = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[written - 300..].fill(0);
    test_log.files.rewrite(&newest, &bytes).unwrap();

    let (log, recovered) = SegmentLog::open(&test_log.place).unwrap();
    let torn = recovered.torn_tail.unwrap();
    assert_eq!((torn.file, recovered.entries.len()), (newest.clone(), 1));
    drop(log);
    let rest = std::fs::read(&newest).unwrap().split_off(usize::try_from(torn.offset).unwrap());
    assert!(rest.iter().all(|byte| *byte == 0), "nothing of the torn group is left");
    assert_eq!(test_log.open().unwrap().1, expected(&steps[..1]));
    assert!(!test_log.open().unwrap().2);
}

#[test]
fn segments_of_two_diverged_copies_are_refused() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    test_log.apply(&[Step::Append(group(4, 8, 1, 100))]);
    let first = test_log.files_with_extension("segment").pop().unwrap();
    let fork = std::fs::read(&first).unwrap();
    test_log.apply(&[Step::Append(group(9, 9, 1, 50)), Step::Append(group(10, 20, 1, 150))]);
    assert_eq!(test_log.files_with_extension("segment").len(), 2);

    // The other copy continues with a different group of the same size.
    let root = tempfile::tempdir().unwrap();
    let other = LogLocation { segment_bytes: SEGMENT_BYTES, ..LogLocation::new(root.path()) };
    let copy = root.path().join(first.file_name().unwrap());
    std::fs::write(&copy, fork).unwrap();
    let (mut log, _) = SegmentLog::open(&other).unwrap();
    log.append(&group(9, 9, 2, 50)).unwrap();
    drop(log);
    test_log.files.rewrite(&first, &std::fs::read(&copy).unwrap()).unwrap();
    let refusal = test_log.open().map(|_| ()).unwrap_err().to_string();
    assert!(refusal.contains("not intact"), "{refusal}");
}

/// Flips one bit in every `stride`-th byte of every segment. No synced group may be lost silently: either the log is refused,
/// or nothing is missing, or only the last group is missing and a torn tail is reported.
fn flip_bits(stride: usize) -> BTreeMap<&'static str, usize> {
    let test_log = TestLog::new(SEGMENT_BYTES);
    let mut steps: Vec<_> = (4..50).map(|index| Step::Append(group(index, index, 1, 120))).collect();
    steps.insert(20, Step::Truncate(at(14, 1)));
    steps.insert(30, Step::Truncate(at(24, 1)));
    test_log.apply(&steps);
    let (whole, without_last) = (expected(&steps), expected(&steps[..steps.len() - 1]));
    let segments = test_log.segment_contents();
    assert!(segments.len() >= 3);
    let mut outcomes = BTreeMap::new();
    for (path, bytes) in &segments {
        for offset in (0..bytes.len()).step_by(stride) {
            let mut flipped = bytes.clone();
            flipped[offset] ^= 1 << (offset % 8);
            test_log.files.rewrite(path, &flipped).unwrap();
            let outcome = match test_log.open() {
                Err(Halt::InvalidData(reason)) => {
                    assert!(reason.contains(".segment") && reason.contains("offset"), "{reason}");
                    assert_eq!(std::fs::read(path).unwrap(), flipped, "a refused log is left as it is");
                    if reason.contains("both were synced") { "refused because of a later group" } else { "refused" }
                }
                Err(halt) => panic!("{}: {offset}: {halt}", path.display()),
                Ok((_, recovered, false)) => {
                    assert!(recovered == whole, "{}: {offset}: a group was lost silently", path.display());
                    "unharmed"
                }
                Ok((_, recovered, true)) => {
                    assert!(recovered == without_last, "{}: {offset}: more than the tail was lost", path.display());
                    "repaired"
                }
            };
            *outcomes.entry(outcome).or_default() += 1;
            for (path, bytes) in &segments {
                test_log.files.rewrite(path, bytes).unwrap();
            }
        }
    }
    outcomes
}

#[test]
fn no_flipped_bit_loses_a_synced_group_silently() {
    let outcomes = flip_bits(7);
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
}

#[test]
#[ignore = "long"]
fn no_flipped_bit_in_any_byte_loses_a_synced_group_silently() {
    let outcomes = flip_bits(1);
    assert_eq!(outcomes.len(), 4, "{outcomes:?}");
}

#[test]
fn a_missing_segment_is_refused() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    test_log.apply(&varied_steps());
    let segments = test_log.files_with_extension("segment");
    for missing in &segments[..segments.len() - 1] {
        let copy = tempfile::tempdir().unwrap();
        for path in segments.iter().filter(|path| *path != missing) {
            std::fs::copy(path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        let place = LogLocation { segment_bytes: SEGMENT_BYTES, ..LogLocation::new(copy.path()) };
        let refusal = SegmentLog::open(&place).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.contains("missing"), "{refusal}");
    }
}
