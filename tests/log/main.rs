//! The raft log under faults: crashes at every operation, torn writes, corrupted bytes.
//!
//! The same steps are applied to two logs: one on segment files that can lose power, and the in-memory log, which is a simple
//! model based on a vector. Whatever happens to the first, after reopening it must hold what the second holds before or after
//! the interrupted step.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod corruption;
mod crash;
mod fixture;
mod full;

use std::path::Path;
use std::time::Instant;

use metastore::error::Halt;
use metastore::raft_log::fault_files::Loss;
use metastore::raft_log::{LogLocation, LogStore, SegmentLog};

use fixture::{CONTRACT, IDENTITY, SEGMENT_BYTES, START, Step, TestLog, at, expected, group, hard_state, varied_steps};

#[test]
fn appended_entries_are_recovered_after_reopening() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    let steps = varied_steps();
    let mut files = 0;
    for (done, step) in steps.iter().enumerate() {
        test_log.apply(std::slice::from_ref(step));
        let (_, recovered, torn) = test_log.open().unwrap();
        assert_eq!((recovered, torn), (expected(&steps[..=done]), false));
        files = test_log.files_with_extension("segment").len();
    }
    assert!(files > 3, "the steps should need several segments, but need {files}");
}

#[test]
fn recycled_segments_do_not_resurrect_old_entries() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    let mut steps = Vec::new();
    let (mut log, ..) = test_log.open().unwrap();
    for first in (4..400).step_by(4) {
        let mut new_steps = vec![Step::Append(group(first, first + 3, 1, 90))];
        if first % 16 == 0 {
            new_steps.push(Step::Truncate(at(first - 8, 1)));
        }
        for step in new_steps {
            step.apply(&mut log).unwrap();
            steps.push(step);
        }
        let (_, recovered, torn) = test_log.open().unwrap();
        assert_eq!((recovered, torn), (expected(&steps), false));
        log = test_log.open().unwrap().0;
    }
    let (segments, spares) =
        (test_log.files_with_extension("segment").len(), test_log.files_with_extension("spare").len());
    assert!(segments <= 5 && spares <= 3, "{segments} segments and {spares} spares were left");
}

#[test]
fn a_reset_leaves_an_empty_log_after_the_snapshot() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    let mut steps = varied_steps();
    steps.push(Step::Installing(Some(at(500, 9))));
    test_log.apply(&steps);
    let (_, recovered, _) = test_log.open().unwrap();
    assert_eq!(recovered.interrupted_install(at(500, 9)), Some(at(500, 9)));
    assert_eq!(recovered.interrupted_install(at(29, 4)), None, "the database was not replaced");

    steps.push(Step::Reset(at(500, 9), hard_state(9, 500)));
    test_log.apply(&steps[steps.len() - 1..]);
    let (mut log, recovered, _) = test_log.open().unwrap();
    assert_eq!(recovered, expected(&steps));
    assert_eq!((recovered.truncated, recovered.last_index(), recovered.installing), (at(500, 9), 500, None));
    assert_eq!(test_log.files_with_extension("segment").len(), 1);

    let more = Step::Append(group(501, 503, 9, 50));
    more.apply(&mut log).unwrap();
    steps.push(more);
    assert_eq!(test_log.open().unwrap().1, expected(&steps));
}

#[test]
fn a_log_is_created_only_where_there_is_none() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    assert!(matches!(test_log.create(), Err(Halt::InvalidData(_))));
    let empty = TestLog::empty(CONTRACT);
    std::fs::create_dir(&empty.place.dir).unwrap();
    assert!(matches!(empty.open(), Err(Halt::InvalidData(_))));
}

#[test]
fn after_an_error_the_log_accepts_no_more_writes() {
    for failing in 1..=2 {
        let test_log = TestLog::new(SEGMENT_BYTES);
        let (mut log, ..) = test_log.open().unwrap();
        test_log.files.fail_at(failing); // The write, or the sync.
        assert!(matches!(log.append(&group(4, 4, 1, 10)), Err(Halt::Io { .. })));
        test_log.files.crash(Loss::Nothing).unwrap(); // The disk would work again.
        let before = test_log.files.operations();
        assert!(matches!(log.sync(), Err(Halt::InvalidData(_))));
        assert!(matches!(log.write(&group(4, 4, 1, 10)), Err(Halt::InvalidData(_))));
        assert!(matches!(log.truncate(at(3, 1)), Err(Halt::InvalidData(_))));
        assert_eq!(test_log.files.operations(), before, "nothing was retried");
    }
}

#[test]
#[should_panic(expected = "each write is synced before the next one")]
fn a_second_write_before_the_sync_is_a_bug() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    let (mut log, ..) = test_log.open().unwrap();
    log.write(&group(4, 4, 1, 10)).unwrap();
    let _ = log.write(&group(5, 5, 1, 10));
}

#[test]
fn a_log_that_is_behind_the_database_is_refused() {
    let test_log = TestLog::new(SEGMENT_BYTES);
    test_log.apply(&[Step::Append(group(4, 9, 1, 10)), Step::Truncate(at(5, 1))]);
    let (_, recovered, _) = test_log.open().unwrap();
    recovered.check_applied(at(9, 1)).unwrap();
    recovered.check_applied(at(5, 1)).unwrap();
    for (applied, text) in [(at(10, 1), "missing"), (at(4, 1), "older"), (at(9, 2), "another term")] {
        let refusal = recovered.check_applied(applied).unwrap_err().to_string();
        assert!(refusal.contains(text), "{refusal}");
    }
}

/// A log on real files, with its helper thread.
fn log_on_real_files(dir: &Path, segment_bytes: u64) -> (LogLocation, SegmentLog) {
    let place = LogLocation { segment_bytes, ..LogLocation::new(dir) };
    SegmentLog::create(&place, IDENTITY, START, &hard_state(1, 3)).unwrap();
    let (log, _) = SegmentLog::open(&place).unwrap();
    (place, log)
}

#[test]
fn the_helper_thread_keeps_up_with_rotations_and_truncations() {
    let root = tempfile::tempdir().unwrap();
    let (place, mut log) = log_on_real_files(&root.path().join("log"), 8192);
    let mut steps = Vec::new();
    for first in (4..1004).step_by(10) {
        steps.push(Step::Append(group(first, first + 9, 1, 100)));
        if first % 40 == 4 && first > 100 {
            steps.push(Step::Truncate(at(first - 50, 1)));
        }
    }
    for step in &steps {
        step.apply(&mut log).unwrap();
    }
    assert!(log.size_bytes() <= 20 * 8192);
    drop(log);
    let (_, recovered) = SegmentLog::open(&place).unwrap();
    assert_eq!(recovered, expected(&steps));
}

#[test]
#[ignore = "long"]
fn latency_of_appending_one_kib() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (_, mut log) = log_on_real_files(&root.path().join("log"), LogLocation::SEGMENT_BYTES);
    let mut times = Vec::new();
    for index in 4..20_004 {
        let group = group(index, index, 1, 1024);
        let start = Instant::now();
        log.append(&group).unwrap();
        times.push(start.elapsed());
        if index % 5000 == 0 {
            log.truncate(at(index - 1, 1)).unwrap();
        }
    }
    times.sort();
    let permille = |part: usize| times[times.len() * part / 1000];
    println!("append and sync of 1 KiB: p50 {:?}, p99 {:?}, p99.9 {:?}", permille(500), permille(990), permille(999));
    assert_eq!(times.len(), 20_000);
}
