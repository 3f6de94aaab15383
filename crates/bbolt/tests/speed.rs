//! What it costs to measure, write and read small entries. `cargo test --release -p bbolt --test speed -- --ignored --nocapture`

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs::{self, File},
    time::Duration,
};

use bbolt::{Database, Measure, Value, Writer};

const COUNT: u64 = 1_000_000;

/// Runs a step, and prints how much processor time it took. (Linux counts that; it depends less than time on what else runs.)
fn timed<T>(what: &str, step: impl FnOnce() -> T) -> T {
    let processor_time = || {
        let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    };
    let begin = processor_time();
    let result = step();
    let took = processor_time().saturating_sub(begin);
    println!("{what}: {took:?}, {:?} per entry", took / u32::try_from(COUNT).unwrap());
    assert!(took < Duration::from_mins(1), "{what}");
    result
}

#[test]
#[ignore = "long"]
fn a_million_small_entries() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let key = |nth: u64| {
        let mut key = [b'_'; 17];
        key[..8].copy_from_slice(&nth.to_be_bytes());
        key
    };
    let layout = timed("measure", || {
        let mut measure = Measure::new();
        measure.begin_bucket(3).unwrap();
        for _ in 0..COUNT {
            measure.put(17, 64).unwrap();
        }
        measure.end_bucket().unwrap();
        measure.finish().unwrap()
    });
    timed("write to a file", || {
        let mut writer = Writer::new(File::create(&path).unwrap(), layout);
        writer.begin_bucket(b"key").unwrap();
        for nth in 0..COUNT {
            writer.put(&key(nth), &[7; 64]).unwrap();
        }
        writer.end_bucket().unwrap();
        writer.finish().unwrap();
    });
    println!("{} bytes", fs::metadata(&path).unwrap().len());
    let database = Database::open(File::open(&path).unwrap()).unwrap();
    timed("iterate", || {
        let (mut count, mut cursor) = (0, database.bucket(b"key").unwrap().unwrap().cursor());
        while let Some(entry) = cursor.next_entry().unwrap() {
            assert_eq!(entry.value, Value::Bytes(&[7; 64]));
            count += 1;
        }
        assert_eq!(count, COUNT);
    });
    timed("seek", || {
        let mut cursor = database.bucket(b"key").unwrap().unwrap().cursor();
        for nth in 0..COUNT {
            let key = key(nth * 7919 % COUNT);
            cursor.seek(&key).unwrap();
            assert_eq!(cursor.next_entry().unwrap().unwrap().key, key);
        }
    });
    assert_eq!(timed("check", || database.check()).unwrap().entries, COUNT);
}
