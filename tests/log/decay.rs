//! Bytes that were torn off, that decay, or that belong elsewhere.

use std::collections::BTreeMap;

use metastore::error::Halt;
use metastore::node::log::{LogStore, Place, SegmentLog};

use crate::ground::{Ground, SEGMENT_BYTES, Step, a_varied_life, at, expected, group};

/// What the header of a segment takes.
const HEADER_BYTES: usize = 128;

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
