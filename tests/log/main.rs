//! The raft log under bad conditions: crashes at every step, torn writes, decaying bytes.
//!
//! Two logs do the same things: one on segment files that can lose power, and the volatile one, which is a few rules about
//! a vector. Whatever happens to the first, after reopening it must hold what the second holds before or after the step
//! that was interrupted.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod crash;
mod decay;
mod full;
mod ground;

use std::path::Path;
use std::time::Instant;

use metastore::error::Halt;
use metastore::node::log::lossy::Loss;
use metastore::node::log::{LogStore, Place, SegmentLog};

use ground::{CONTRACT, Ground, IDENTITY, SEGMENT_BYTES, START, Step, a_varied_life, at, expected, group, hard_state};

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
    let empty = Ground::empty(CONTRACT);
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
