//! What the tests of files share: a model of a database, and access to bytes of a file.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::collections::BTreeMap;

use bbolt::{Bucket, Database, Layout, Measure, ReadError, Source, Value, Writer};

/// The entries of a bucket.
pub type Model = BTreeMap<Vec<u8>, Item>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Value(Vec<u8>),
    Bucket(Model),
}

/// A bucket with so many entries of the same size; their keys are eight digits.
pub fn entries(count: usize, value_length: usize) -> Item {
    entries_with_keys(count, 8, value_length)
}

pub fn entries_with_keys(count: usize, key_length: usize, value_length: usize) -> Item {
    let entry = |nth| (format!("{nth:0key_length$}").into_bytes(), Item::Value(vec![b'v'; value_length]));
    Item::Bucket((0..count).map(entry).collect())
}

/// A root bucket with a bucket for each name.
pub fn root(buckets: impl IntoIterator<Item = (&'static str, Item)>) -> Model {
    buckets.into_iter().map(|(name, bucket)| (name.as_bytes().to_vec(), bucket)).collect()
}

pub fn measure(model: &Model, page_size: usize) -> Layout {
    fn bucket(measure: &mut Measure, model: &Model) {
        for (key, item) in model {
            match item {
                Item::Value(value) => measure.put(key.len(), value.len()).unwrap(),
                Item::Bucket(model) => {
                    measure.begin_bucket(key.len()).unwrap();
                    bucket(measure, model);
                    measure.end_bucket().unwrap();
                }
            }
        }
    }
    let mut measured = Measure::with_page_size(page_size).unwrap();
    bucket(&mut measured, model);
    measured.finish().unwrap()
}

pub fn write_bucket(writer: &mut Writer<Vec<u8>>, model: &Model) {
    for (key, item) in model {
        match item {
            Item::Value(value) => writer.put(key, value).unwrap(),
            Item::Bucket(model) => {
                writer.begin_bucket(key).unwrap();
                write_bucket(writer, model);
                writer.end_bucket().unwrap();
            }
        }
    }
}

/// The file of a database, written in two passes.
pub fn write(model: &Model, page_size: usize) -> Vec<u8> {
    let layout = measure(model, page_size);
    let mut writer = Writer::new(Vec::new(), layout);
    write_bucket(&mut writer, model);
    let (file, written) = writer.finish().unwrap();
    assert_eq!((written, file.len() as u64), (layout, layout.file_size()));
    file
}

pub fn read_bucket<S: Source>(bucket: &Bucket<'_, S>) -> Result<Model, ReadError> {
    let (mut model, mut previous) = (Model::new(), None);
    let mut cursor = bucket.cursor();
    while let Some(entry) = cursor.next_entry()? {
        assert!(previous.as_deref() < Some(entry.key), "keys ascend");
        previous = Some(entry.key.to_vec());
        let item = match entry.value {
            Value::Bytes(value) => Item::Value(value.to_vec()),
            Value::Bucket => {
                let nested = bucket.bucket(entry.key)?.expect("the bucket was listed");
                Item::Bucket(read_bucket(&nested)?)
            }
        };
        model.insert(entry.key.to_vec(), item);
    }
    Ok(model)
}

pub fn read(file: &[u8]) -> Result<Model, ReadError> {
    read_bucket(&Database::open(file)?.root())
}

/// Checks a file, then reads it.
pub fn check_and_read(file: &[u8]) -> Result<Model, ReadError> {
    Database::open(file)?.check()?;
    read(file)
}

/// Page header: offsets of its fields.
pub const PAGE_KIND: usize = 8;
pub const PAGE_COUNT: usize = 10;
pub const PAGE_OVERFLOW: usize = 12;
/// Meta page: offsets of its fields.
pub const META_VERSION: usize = 20;
pub const META_PAGE_SIZE: usize = 24;
pub const META_ROOT: usize = 32;
pub const META_FREELIST: usize = 48;
pub const META_PAGES: usize = 56;
pub const META_TRANSACTION: usize = 64;

pub fn put_u16(file: &mut [u8], at: usize, value: u16) {
    file[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub fn put_u32(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub fn put_u64(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

pub fn u16_at(file: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(file[at..at + 2].try_into().unwrap())
}

pub fn u32_at(file: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
}

pub fn u64_at(file: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(file[at..at + 8].try_into().unwrap())
}

/// Makes the checksums of both meta pages right.
pub fn seal(file: &mut [u8], page_size: usize) {
    for page in [0, page_size] {
        let fields = &file[page + 16..page + 72];
        let sum = fields
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        put_u64(file, page + 72, sum);
    }
}

/// Changes a field in both meta pages.
pub fn patch_metas(file: &mut [u8], page_size: usize, field: usize, value: u64) {
    put_u64(file, field, value);
    put_u64(file, page_size + field, value);
    seal(file, page_size);
}

/// The pages that are branches and leaves, with their kind, count and overflow. (Pages that others extend over are left out.)
pub fn nodes(file: &[u8], page_size: usize) -> Vec<(usize, u16, u16, u32)> {
    let (mut nodes, mut page) = (Vec::new(), 3);
    while page * page_size < file.len() {
        let at = page * page_size;
        assert_eq!(u64_at(file, at), page as u64);
        let overflow = u32_at(file, at + PAGE_OVERFLOW);
        nodes.push((page, u16_at(file, at + PAGE_KIND), u16_at(file, at + PAGE_COUNT), overflow));
        page += 1 + overflow as usize;
    }
    nodes
}
