//! Databases in bbolt's format. An input is one of three:
//!
//! * bytes of a file;
//! * a file that our writer makes, in which some bytes are changed and the checksums of the meta pages made right again;
//! * entries, which are written and read again.
//!
//! Whatever a file contains, reading it ends, with an error or with keys in ascending order.

use std::collections::BTreeMap;

use bbolt::{Bucket, Database, Layout, Measure, Options, ReadError, Value, Writer};

use super::input::Input;

const PAGE_SIZE: usize = 1024;
const MAX_ENTRIES: usize = 300;
/// Buckets inside each other that are followed without a check, in which buckets may refer to each other.
const MAX_DEPTH: usize = 3;

/// Keys and values of a bucket, or the buckets in it.
type Buckets = BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>>;

/// Decisions: which of the three it is, then its bytes, changes or entries.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => read_anything(input.0),
        1 => {
            let mut file = write(&buckets(&mut input));
            change(&mut input, &mut file);
            read_anything(&file);
        }
        // The same with the bytes of a file, so that the checksums do not stop most of them.
        2 => {
            let mut file = input.0.to_vec();
            file.resize(file.len().next_multiple_of(PAGE_SIZE), 0);
            seal(&mut file);
            read_anything(&file);
        }
        _ => write_and_read(&buckets(&mut input)),
    }
}

/// Decisions: for each entry the bucket, the key and the length of the value.
fn buckets(input: &mut Input) -> Buckets {
    let mut buckets = Buckets::new();
    for _ in 0..MAX_ENTRIES {
        if input.byte() == 0 {
            break;
        }
        let name = vec![b'a' + input.byte() % 4];
        let bucket = buckets.entry(name).or_default();
        let count = if input.byte().is_multiple_of(8) { usize::from(input.byte()) } else { 1 };
        let (key, length) = (input.piece(), usize::from(input.short()) % 6000);
        for nth in 0..count {
            let key = [key, format!("{nth:03}").as_bytes()].concat();
            bucket.insert(key, vec![b'v'; length / count]);
        }
    }
    buckets
}

fn measure(buckets: &Buckets) -> Layout {
    let mut measure = Measure::with_page_size(PAGE_SIZE).expect("an allowed size");
    let measured = buckets.iter().try_for_each(|(name, entries)| {
        measure.begin_bucket(name.len())?;
        entries.iter().try_for_each(|(key, value)| measure.put(key.len(), value.len()))?;
        measure.end_bucket()
    });
    measured.and_then(|()| measure.finish()).expect("names and keys are in order")
}

fn write(buckets: &Buckets) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), measure(buckets));
    let written = buckets.iter().try_for_each(|(name, entries)| {
        writer.begin_bucket(name)?;
        entries.iter().try_for_each(|(key, value)| writer.put(key, value))?;
        writer.end_bucket()
    });
    written.and_then(|()| writer.finish()).expect("it is what was measured").0
}

fn write_and_read(buckets: &Buckets) {
    let file = write(buckets);
    let database = Database::open(&file[..]).expect("our own file");
    let report = database.check().expect("our own file");
    let count: usize = buckets.values().map(BTreeMap::len).sum();
    assert_eq!((report.buckets, report.entries), (buckets.len() as u64, count as u64));
    for (name, entries) in buckets {
        let bucket = database.bucket(name).expect("our own file").expect("it was written");
        let (mut cursor, mut entries) = (bucket.cursor(), entries.iter());
        while let Some(entry) = cursor.next_entry().expect("our own file") {
            let written = entries.next().map(|(key, value)| (&key[..], Value::Bytes(value)));
            assert_eq!(Some((entry.key, entry.value)), written);
        }
        assert_eq!(entries.next(), None);
    }
}

/// Decisions: for each change the place, and the byte or the number to be put there.
fn change(input: &mut Input, file: &mut [u8]) {
    while !input.is_empty() {
        let page = usize::from(input.byte()) % (file.len() / PAGE_SIZE);
        // Mostly in headers and tables.
        let within =
            if input.byte().is_multiple_of(4) { usize::from(input.short()) } else { usize::from(input.byte()) };
        let at = page * PAGE_SIZE + within % PAGE_SIZE;
        let bytes = input.take(1 + usize::from(input.0.first().is_some_and(|byte| byte % 2 == 0)));
        let end = file.len().min(at + bytes.len());
        file[at..end].copy_from_slice(&bytes[..end - at]);
    }
    seal(file);
}

/// Makes both checksums right.
fn seal(file: &mut [u8]) {
    for page in file.chunks_mut(PAGE_SIZE).take(2) {
        let fields = page[16..72].iter();
        let sum =
            fields.fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        page[72..80].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Entries in a file, at most, for its size: an element with a key of one byte takes 17 bytes.
fn read_anything(file: &[u8]) {
    let Ok(database) = Database::open_with(file, Options { max_held_bytes: 1 << 20 }) else { return };
    let mut count = 0;
    let read = read_bucket(&database.root(), 0, &mut count, file.len() as u64 / 17);
    if let Ok(report) = database.check() {
        read.expect("the check has found no problem");
        assert!(report.entries + report.buckets <= file.len() as u64 / 17);
        let pages = report.branch_pages + report.leaf_pages + report.overflow_pages + report.free_pages;
        assert!(pages <= database.pages() && database.pages() * database.page_size() as u64 <= file.len() as u64);
    }
}

fn read_bucket(bucket: &Bucket<'_, &[u8]>, depth: usize, count: &mut u64, most: u64) -> Result<(), ReadError> {
    let (mut cursor, mut previous, mut entries) = (bucket.cursor(), Vec::new(), 0);
    while let Some(entry) = cursor.next_entry()? {
        assert!(entry.key > &previous[..], "keys ascend");
        previous = entry.key.to_vec();
        entries += 1;
        assert!(entries <= most, "more entries than the file has space for");
        *count += 1;
        if *count > 4 * most {
            // Buckets refer to each other. Only a check finds that.
            return Ok(());
        }
        match entry.value {
            Value::Bytes(value) => {
                assert_eq!(bucket.get(&previous)?.map(|found| found.len()), Some(value.len()));
            }
            Value::Bucket if depth < MAX_DEPTH => {
                let nested = bucket.bucket(&previous)?.expect("it was listed");
                read_bucket(&nested, depth + 1, count, most)?;
            }
            Value::Bucket => (),
        }
    }
    Ok(())
}

pub fn seeds() -> Vec<Vec<u8>> {
    let entry = |bucket: u8, many: u8, count: u8, key: &[u8], length: u16| {
        let mut bytes = vec![1, bucket, many];
        if many == 0 {
            bytes.push(count);
        }
        bytes.push(u8::try_from(key.len()).expect("a short key"));
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes
    };
    let small = [entry(0, 1, 0, b"key", 20), entry(1, 1, 0, b"other", 2000), vec![0]].concat();
    let tree =
        [entry(0, 0, 200, b"k", 3000), entry(1, 0, 250, b"long key", 5999), entry(2, 1, 0, b"", 0), vec![0]].concat();
    let with = |kind: u8, parts: &[&[u8]]| [&[kind], parts.concat().as_slice()].concat();
    let file = write(&buckets(&mut Input(&small)));
    vec![
        with(0, &[&file]),
        with(2, &[&file]),
        with(1, &[&small, &[3, 1, 8, 1]]),
        with(1, &[&tree, &[5, 1, 20, 1, 9, 1, 30, 2, 7]]),
        with(3, &[&small]),
        with(3, &[&tree]),
    ]
}
