//! What is written is read again, whatever the keys, values, buckets and page sizes are.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{
    io::{self, Write},
    ops::Bound,
};

use bbolt::{
    DEFAULT_PAGE_SIZE, Database, MAX_DEPTH, MAX_KEY_LENGTH, MAX_VALUE_LENGTH, Measure, Report, WriteError, Writer,
};
use proptest::{collection, prelude::*};
use support::{Item, Model, entries, entries_with_keys, measure, nodes, read, read_bucket, root, write};

const BRANCH: u16 = 1;

/// What every file of ours fulfils, beside being read again.
fn check_file(file: &[u8], model: &Model, page_size: usize) -> Report {
    let report = Database::open(file).unwrap().check().unwrap();
    assert_eq!(read(file).unwrap(), *model);
    let nodes = nodes(file, page_size);
    let (branches, leaves): (Vec<_>, Vec<_>) = nodes.iter().partition(|(_, kind, ..)| *kind == BRANCH);
    assert!(
        branches.iter().all(|(_, _, count, _)| *count >= 2),
        "bbolt panics when it deletes from a branch with one child"
    );
    assert!(branches.iter().all(|(_, _, count, overflow)| *count <= 3 || *overflow == 0));
    assert!(leaves.iter().all(|(_, _, count, overflow)| *count <= 4 || *overflow == 0));
    assert_eq!((report.branch_pages, report.leaf_pages), (branches.len() as u64, leaves.len() as u64));
    assert_eq!(report.free_pages, 0);
    report
}

fn item() -> impl Strategy<Value = Item> {
    let length = prop_oneof![8 => 0..40_usize, 3 => 0..1500_usize, 1 => 0..20_000_usize, 1 => 60_000..140_000_usize];
    let value = (length, any::<u8>()).prop_map(|(length, byte)| Item::Value(vec![byte; length]));
    value.prop_recursive(3, 40, 20, |inner| collection::btree_map(key(), inner, 0..20).prop_map(Item::Bucket))
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    let short = collection::vec(any::<u8>(), 1..20);
    prop_oneof![20 => short, 1 => (1..=MAX_KEY_LENGTH, any::<u8>()).prop_map(|(length, byte)| vec![byte; length])]
}

fn model() -> impl Strategy<Value = Model> {
    let bucket = collection::btree_map(key(), item(), 0..60).prop_map(Item::Bucket);
    collection::btree_map(key(), bucket, 0..4)
}

fn page_size() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1024), Just(4096), Just(65536)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_database_is_read_as_it_was_written(model in model(), page_size in page_size()) {
        let file = write(&model, page_size);
        check_file(&file, &model, page_size);
        // One pass gives the same file.
        let mut writer = Writer::unmeasured(Vec::new(), page_size).unwrap();
        support::write_bucket(&mut writer, &model);
        let (mut one_pass, layout) = writer.finish().unwrap();
        assert_eq!(layout, measure(&model, page_size));
        let metas = layout.meta_pages();
        assert!(one_pass[..metas.len()].iter().all(|byte| *byte == 0));
        one_pass[..metas.len()].copy_from_slice(&metas);
        assert_eq!(one_pass, file);
    }

    #[test]
    fn lookups_find_what_is_there(
        keys in collection::btree_map(key(), 0..200_usize, 0..400),
        sought in collection::vec(key(), 0..100),
        page_size in page_size(),
    ) {
        let bucket: Model = keys.into_iter().map(|(key, length)| (key, Item::Value(vec![7; length]))).collect();
        let file = write(&root([("b", Item::Bucket(bucket.clone()))]), page_size);
        let database = Database::open(&file[..]).unwrap();
        let read = database.bucket(b"b").unwrap().unwrap();
        let mut cursor = read.cursor();
        for key in sought.iter().chain(bucket.keys()) {
            let next: Vec<_> = bucket.range((Bound::Included(key.clone()), Bound::Unbounded)).take(3).collect();
            cursor.seek(key).unwrap();
            for (key, _) in &next {
                assert_eq!(cursor.next_entry().unwrap().unwrap().key, &key[..]);
            }
            assert!(next.len() == 3 || cursor.next_entry().unwrap().is_none());
            let expected = bucket.get(key).map(|item| if let Item::Value(value) = item { value.clone() } else { vec![] });
            assert_eq!(read.get(key).unwrap(), expected);
        }
    }
}

/// Each number of children that a branch can have, at up to four levels.
#[test]
fn every_number_of_entries_makes_a_tree_that_bbolt_accepts() {
    // One entry per leaf, and eight children per branch; or many of each.
    for (key_length, value_length, most) in [(100, 850, 600), (8, 20, 1500)] {
        for count in 0..most {
            let model = root([("b", entries_with_keys(count, key_length, value_length))]);
            let report = check_file(&write(&model, 1024), &model, 1024);
            assert_eq!((report.buckets, report.entries), (1, count as u64));
        }
    }
}

#[test]
fn the_longest_keys_make_branches_of_several_pages() {
    for count in 0..40_u8 {
        let keys = (0..count).map(|nth| (vec![nth; MAX_KEY_LENGTH], Item::Value(vec![nth])));
        let model = root([("b", Item::Bucket(keys.collect()))]);
        check_file(&write(&model, 4096), &model, 4096);
    }
}

#[test]
fn large_values_waste_little() {
    for (length, most) in [(1300, 1.1), (3000, 1.4), (4200, 1.25), (5000, 1.05), (70_000, 1.07), (1 << 20, 1.01)] {
        let count = 4_000_000 / length.clamp(1000, 100_000);
        let model = root([("b", entries(count, length))]);
        let file = write(&model, 4096);
        check_file(&file, &model, 4096);
        #[allow(clippy::cast_precision_loss, reason = "the numbers are small")]
        let ratio = file.len() as f64 / (count * length) as f64;
        assert!(ratio < most, "{length}: {ratio}");
    }
}

#[test]
fn an_empty_database_and_empty_buckets() {
    let file = write(&Model::new(), 4096);
    assert_eq!(
        (file.len(), check_file(&file, &Model::new(), 4096)),
        (4 * 4096, Report { leaf_pages: 1, ..Report::default() })
    );
    let model = root([("a", entries(0, 0)), ("b", Item::Bucket(root([("c", entries(0, 0))]))), ("d", entries(1, 1))]);
    let report = check_file(&write(&model, 4096), &model, 4096);
    assert_eq!((report.buckets, report.inline_buckets, report.entries), (4, 3, 1));
    let file = write(&model, 4096);
    let database = Database::open(&file[..]).unwrap();
    assert!(database.bucket(b"e").unwrap().is_none() && database.bucket(b"").unwrap().is_none());
    let bucket = database.bucket(b"b").unwrap().unwrap();
    assert_eq!(bucket.get(b"c").unwrap(), None, "a bucket is not a value");
    let entry = database.bucket(b"d").unwrap().unwrap();
    assert!(entry.bucket(b"00000000").unwrap().is_none(), "a value is not a bucket");
}

#[test]
fn buckets_nest_up_to_the_limit() {
    let mut model = entries(3, 3);
    for _ in 1..MAX_DEPTH {
        model = Item::Bucket(root([("b", model)]));
    }
    let model = root([("b", model)]);
    check_file(&write(&model, 4096), &model, 4096);
    let mut writer = Writer::unmeasured(io::sink(), 4096).unwrap();
    for _ in 0..MAX_DEPTH {
        writer.begin_bucket(b"b").unwrap();
    }
    assert!(matches!(writer.begin_bucket(b"b"), Err(WriteError::Nesting)));
}

#[test]
fn what_bbolt_would_refuse_is_refused_and_leaves_no_trace() {
    let refused = |error: Result<(), WriteError>| error.unwrap_err().to_string();
    let mut writer = Writer::unmeasured(Vec::new(), 4096).unwrap();
    assert_eq!(refused(writer.put(b"k", b"v")), "no bucket is open");
    assert_eq!(refused(writer.end_bucket()), "no bucket is open");
    assert_eq!(refused(writer.begin_bucket(b"")), "a key or the name of a bucket is empty");
    writer.begin_bucket(b"b").unwrap();
    assert_eq!(refused(writer.put(b"", b"v")), "a key or the name of a bucket is empty");
    let long = vec![b'k'; MAX_KEY_LENGTH + 1];
    let too_long = "a key or the name of a bucket has 32769 bytes, the limit is 32768";
    assert_eq!(refused(writer.put(&long, b"v")), too_long);
    assert_eq!(refused(writer.begin_bucket(&long)), too_long);
    writer.put(b"k", b"v").unwrap();
    assert_eq!(refused(writer.put(b"k", b"v")), "key \"k\" comes after \"k\"");
    assert_eq!(refused(writer.put(b"a\n", b"v")), "key \"a\\n\" comes after \"k\"");
    assert_eq!(refused(writer.begin_bucket(b"k")), "key \"k\" comes after \"k\"");
    writer.end_bucket().unwrap();
    assert_eq!(refused(writer.begin_bucket(b"b")), "key \"b\" comes after \"b\"");
    let (mut file, layout) = writer.finish().unwrap();
    file[..2 * 4096].copy_from_slice(&layout.meta_pages());
    let bucket = Item::Bucket(Model::from([(b"k".to_vec(), Item::Value(b"v".to_vec()))]));
    assert_eq!(read(&file).unwrap(), root([("b", bucket)]));
    for page_size in [0, 512, 1000, 4097, 32 << 20] {
        let error = format!("page size {page_size}: it must be a power of two from 1 KiB to 16 MiB");
        assert_eq!(Measure::with_page_size(page_size).unwrap_err().to_string(), error);
        assert_eq!(Writer::unmeasured(io::sink(), page_size).unwrap_err().to_string(), error);
    }
}

#[test]
fn a_database_ends_when_its_buckets_have_ended() {
    let mut writer = Writer::unmeasured(io::sink(), 4096).unwrap();
    writer.begin_bucket(b"b").unwrap();
    assert!(matches!(writer.finish(), Err(WriteError::OpenBuckets(1))));
}

/// The value is never touched, so it takes no memory.
#[test]
fn the_largest_value_is_written_without_a_copy() {
    let value = vec![0; MAX_VALUE_LENGTH + 1];
    let mut measure = Measure::new();
    measure.begin_bucket(1).unwrap();
    measure.put(1, MAX_VALUE_LENGTH).unwrap();
    assert!(matches!(measure.put(1, MAX_VALUE_LENGTH + 1), Err(WriteError::ValueTooLong(_))));
    measure.end_bucket().unwrap();
    let layout = measure.finish().unwrap();
    let mut writer = Writer::new(io::sink(), layout);
    writer.begin_bucket(b"b").unwrap();
    assert!(matches!(writer.put(b"k", &value), Err(WriteError::ValueTooLong(_))));
    writer.put(b"k", &value[1..]).unwrap();
    writer.end_bucket().unwrap();
    assert_eq!(writer.finish().unwrap().1, layout);
}

#[test]
fn other_data_than_was_measured_is_noticed() {
    let write_entries = |layout, count: usize| {
        let mut writer = Writer::new(Vec::new(), layout);
        writer.begin_bucket(b"b")?;
        for nth in 0..count {
            writer.put(format!("{nth:08}").as_bytes(), &[0; 100])?;
        }
        writer.end_bucket()?;
        writer.finish().map(|(file, _)| file)
    };
    let layout = measure(&root([("b", entries(100, 100))]), 4096);
    assert!(write_entries(layout, 100).is_ok());
    let text = format!("the data is not what was measured and came to {} pages", layout.file_size() / 4096);
    for count in [0, 10, 200, 100_000] {
        assert_eq!(write_entries(layout, count).unwrap_err().to_string(), text, "{count}");
    }
}

#[test]
fn nothing_is_written_after_a_failure() {
    /// Fails once, at the given call.
    struct FailsOnce {
        calls_left: usize,
        written: usize,
    }
    impl Write for FailsOnce {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.calls_left = self.calls_left.wrapping_sub(1);
            if self.calls_left == 0 {
                return Err(io::Error::other("disk full"));
            }
            self.written += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for calls_left in 1..5 {
        let mut out = FailsOnce { calls_left, written: 0 };
        let mut writer = Writer::unmeasured(&mut out, DEFAULT_PAGE_SIZE).unwrap();
        writer.begin_bucket(b"b").unwrap();
        let mut errors = Vec::new();
        for nth in 0..10_000 {
            errors.extend(writer.put(format!("{nth:08}").as_bytes(), &[1; 100]).err());
        }
        errors.extend(writer.end_bucket().err());
        errors.extend(writer.finish().err());
        assert_eq!(errors[0].to_string(), "cannot write the database: disk full");
        assert!(errors.len() > 2 && errors[1].to_string().contains("an earlier write has failed"), "{errors:?}");
        assert!(out.written <= calls_left * (80 << 10));
    }
}

#[test]
fn a_file_is_read_by_position() {
    let model = root([("a", entries(2000, 30)), ("b", entries(3, 100_000))]);
    let file = tempfile::tempfile().unwrap();
    (&file).write_all(&write(&model, 4096)).unwrap();
    // A digest behind the pages does not matter.
    (&file).write_all(&[9; 32]).unwrap();
    let database = Database::open(file).unwrap();
    assert_eq!(read_bucket(&database.root()).unwrap(), model);
    assert_eq!(database.check().unwrap().entries, 2003);
    assert_eq!((database.page_size(), database.transaction()), (4096, 2));
}
