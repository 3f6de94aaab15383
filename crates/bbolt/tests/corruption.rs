//! Damaged and hostile files: an error, or data that is in order; never a panic, and never more work or memory than the file is worth.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::{fs::File, sync::LazyLock};

use bbolt::{Database, Options, ReadError};
use proptest::{prelude::*, sample};
use support::{
    Item, META_FREELIST, META_PAGE_SIZE, META_PAGES, META_ROOT, META_TRANSACTION, META_VERSION, Model, PAGE_COUNT,
    PAGE_KIND, PAGE_OVERFLOW, check_and_read, entries, nodes, patch_metas, put_u16, put_u32, put_u64, read, root, seal,
    u32_at, u64_at, write,
};

const PAGE_SIZE: usize = 1024;
const LEAF: u16 = 2;

/// Trees of several levels, inline and nested buckets, values of several pages.
fn sample_model() -> Model {
    let nested =
        Item::Bucket(root([("deeper", entries(40, 60)), ("inline", entries(2, 20)), ("z", Item::Value(vec![1; 99]))]));
    root([("empty", entries(0, 0)), ("large", entries(5, 5000)), ("nested", nested), ("tree", entries(1000, 40))])
}

fn sample_file() -> Vec<u8> {
    static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| write(&sample_model(), PAGE_SIZE));
    FILE.clone()
}

#[track_caller]
fn assert_damaged<T>(result: Result<T, ReadError>, text: &str) {
    let Err(error) = result else { panic!("it is no error: {text}") };
    assert!(error.to_string().contains(text), "{error}");
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let file = sample_file();
    let pages = file.len() / PAGE_SIZE;
    for page in 0..pages {
        for more in [0, 1, PAGE_SIZE / 2, PAGE_SIZE - 1] {
            let error = Database::open(&file[..page * PAGE_SIZE + more]).unwrap_err().to_string();
            if page * PAGE_SIZE + more >= 80 {
                let text = format!("{pages} pages are in use, but the file ends after {page}: it is truncated");
                assert!(error.contains(&text), "{error}");
            } else {
                assert!(error.contains("not a bbolt database"), "{error}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_are_noticed_or_change_only_what_they_are_in(
        places in proptest::collection::vec((any::<sample::Index>(), 1..=u8::MAX), 1..4),
    ) {
        let mut file = sample_file();
        for (at, mask) in &places {
            let at = at.index(file.len());
            file[at] ^= mask;
        }
        // Reading asserts that keys ascend. A meta page may be lost: the other one says the same.
        let _ = read(&file);
        if let Ok(report) = Database::open(&file[..]).and_then(|database| database.check()) {
            assert_eq!(report, Database::open(&sample_file()[..]).unwrap().check().unwrap());
        }
    }

    #[test]
    fn swapped_pages_are_noticed(a in any::<sample::Index>(), b in any::<sample::Index>()) {
        let mut file = sample_file();
        let pages = nodes(&file, PAGE_SIZE);
        let (a, b) = (a.index(pages.len()), b.index(pages.len()));
        let (a, b) = (pages[a.min(b)].0 * PAGE_SIZE, pages[a.max(b)].0 * PAGE_SIZE);
        prop_assume!(a != b);
        let (front, back) = file.split_at_mut(b);
        front[a..a + PAGE_SIZE].swap_with_slice(&mut back[..PAGE_SIZE]);
        assert_damaged(check_and_read(&file), "the page says that it is page");
        // Even if each says that it is the page in whose place it is; unless both places would do.
        for page in [a, b] {
            put_u64(&mut file, page, (page / PAGE_SIZE) as u64);
        }
        if let Ok(report) = Database::open(&file[..]).and_then(|database| database.check()) {
            assert_eq!(report, Database::open(&sample_file()[..]).unwrap().check().unwrap());
        }
    }

    #[test]
    fn wrong_fields_are_noticed(page in any::<sample::Index>(), field in 0..4_usize, value in any::<u16>()) {
        let mut file = sample_file();
        let pages = nodes(&file, PAGE_SIZE);
        let at = pages[page.index(pages.len())].0 * PAGE_SIZE;
        let at = at + [0, PAGE_KIND, PAGE_COUNT, PAGE_OVERFLOW][field];
        let before = file.clone();
        put_u16(&mut file, at, value);
        prop_assume!(file != before);
        assert!(check_and_read(&file).is_err());
    }
}

#[test]
fn any_bit_of_a_table_of_elements_is_noticed_but_for_the_last_lengths() {
    let original = write(&root([("b", entries(12, 60))]), PAGE_SIZE);
    let leaf = 3 * PAGE_SIZE;
    assert_eq!(&original[leaf..leaf + 12], &[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 12 - 1, 0]);
    let table = leaf + 16..leaf + 16 + 11 * 16 - 8;
    for at in table {
        for bit in 0..8 {
            let mut file = original.clone();
            file[at] ^= 1 << bit;
            // Lengths of key and value may change together. Flags may say that a value is a bucket, which it does not look like.
            assert!(check_and_read(&file).is_err(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn either_meta_page_may_be_lost() {
    for page_size in [1024, 4096, 1 << 16] {
        let model = root([("b", entries(100, 10))]);
        let original = write(&model, page_size);
        for lost in [0, page_size] {
            let mut file = original.clone();
            file[lost + 30] ^= 1;
            assert_eq!(read(&file).unwrap(), model);
            let database = Database::open(&file[..]).unwrap();
            assert_eq!((database.page_size(), database.transaction()), (page_size, if lost == 0 { 1 } else { 2 }));
        }
        let mut file = original.clone();
        file[40] ^= 1;
        file[page_size + 40] ^= 1;
        assert_damaged(read(&file), "not a bbolt database: the first meta page has checksum 0x");
    }
}

#[test]
fn the_newest_valid_meta_page_counts() {
    let mut file = write(&root([("b", entries(100, 10))]), PAGE_SIZE);
    // The second one becomes newer, and its root another leaf.
    put_u64(&mut file, PAGE_SIZE + META_TRANSACTION, 3);
    put_u64(&mut file, PAGE_SIZE + META_ROOT, 3);
    let unsealed = file.clone();
    seal(&mut file, PAGE_SIZE);
    assert_eq!(Database::open(&file[..]).unwrap().transaction(), 3);
    assert_eq!(Database::open(&unsealed[..]).unwrap().transaction(), 2);
    assert_damaged(
        check_and_read(&file),
        "page 3 (offset 3088): element 0: the root bucket holds an entry that is no bucket",
    );
}

#[test]
fn foreign_files_are_named_so() {
    assert_damaged(
        read(b""),
        "the first meta page has no space in a file of 0 bytes, the second one no space in a file of 0 bytes",
    );
    let text = vec![b' '; 10_000];
    assert_damaged(
        read(&text),
        "not a bbolt database: the first meta page has magic number 0x20202020 instead of 0xed0cdaed",
    );
    let mut newer = sample_file();
    put_u32(&mut newer, META_VERSION, 3);
    put_u32(&mut newer, PAGE_SIZE + META_VERSION, 3);
    assert_damaged(read(&newer), "version 3 instead of 2");
    let mut odd = sample_file();
    put_u32(&mut odd, META_PAGE_SIZE, 1000);
    put_u32(&mut odd, PAGE_SIZE + META_PAGE_SIZE, 1000);
    seal(&mut odd, PAGE_SIZE);
    assert_damaged(read(&odd), "page size 1000, which is no power of two from 1 KiB to 16 MiB");
}

#[test]
fn meta_pages_must_refer_to_pages_in_use() {
    let original = sample_file();
    let pages = (original.len() / PAGE_SIZE) as u64;
    for page in [0, 1, pages, u64::MAX - 1] {
        for (field, what) in [(META_ROOT, "root"), (META_FREELIST, "freelist")] {
            let mut file = original.clone();
            patch_metas(&mut file, PAGE_SIZE, field, page);
            assert_damaged(read(&file), &format!("the {what} is page {page}, outside of the pages in use"));
        }
    }
    let mut file = original.clone();
    patch_metas(&mut file, PAGE_SIZE, META_PAGES, u64::MAX);
    assert_damaged(read(&file), "it is truncated");
    patch_metas(&mut file, PAGE_SIZE, META_PAGES, 0);
    assert_damaged(read(&file), "the root is page");
}

/// The page of the first branch, and the offset of its first element.
fn first_branch(file: &[u8]) -> (usize, usize) {
    let (page, ..) = *nodes(file, PAGE_SIZE).iter().find(|(_, kind, ..)| *kind == 1).unwrap();
    (page, page * PAGE_SIZE + 16)
}

#[test]
fn circles_and_shared_pages_end() {
    let original = sample_file();
    let (page, element) = first_branch(&original);
    let first_child = u64_at(&original, element + 8);
    for child in [page as u64, first_child, 3] {
        let mut file = original.clone();
        put_u64(&mut file, element + 16 + 8, child);
        assert!(check_and_read(&file).is_err());
        assert!(read(&file).is_err());
    }
    for child in [0, 1, u64::MAX] {
        let mut file = original.clone();
        put_u64(&mut file, element + 8, child);
        assert_damaged(read(&file), &format!("it refers to page {child}, outside of the pages in use"));
    }
}

/// A branch with one child, itself: all keys are in order.
#[test]
fn a_page_below_itself_is_refused() {
    let mut file = write(&root([("b", entries(100, 40))]), PAGE_SIZE);
    let (page, element) = first_branch(&file);
    put_u16(&mut file, page * PAGE_SIZE + PAGE_COUNT, 1);
    let (key, length) = (u32_at(&file, element) as usize, u32_at(&file, element + 4) as usize);
    file.copy_within(element + key..element + key + length, element + 16);
    put_u32(&mut file, element, 16);
    put_u64(&mut file, element + 8, page as u64);
    assert_damaged(read(&file), "the bucket has more pages than the file: pages overlap or form a circle");
    assert_damaged(check_and_read(&file), "is used twice");
}

/// The root bucket inside itself, twice: 2^64 buckets, if all are followed.
#[test]
fn buckets_inside_themselves_are_refused() {
    let mut file = write(&root([("a", entries(20, 80)), ("b", entries(20, 80))]), PAGE_SIZE);
    let root_page = file.len() / PAGE_SIZE - 1;
    assert_eq!(u64_at(&file, META_ROOT), root_page as u64);
    // Behind two elements, the name, root page and sequence of each bucket.
    let first = root_page * PAGE_SIZE + 16 + 2 * 16 + 1;
    for bucket in [first, first + 17] {
        put_u64(&mut file, bucket, root_page as u64);
    }
    assert_damaged(Database::open(&file[..]).unwrap().check(), "is used twice");
    let database = Database::open(&file[..]).unwrap();
    let mut bucket = database.root();
    let error = loop {
        match bucket.bucket(b"b") {
            Ok(inner) => bucket = inner.unwrap(),
            Err(error) => break error,
        }
    };
    assert!(error.to_string().ends_with("more than 64 buckets inside each other"), "{error}");
}

/// Pages that all extend to the end of the file, so that each is read many times.
#[test]
fn overlapping_pages_are_refused() {
    let mut file = sample_file();
    let pages = file.len() / PAGE_SIZE;
    for (page, kind, ..) in nodes(&sample_file(), PAGE_SIZE) {
        if kind == LEAF {
            put_u32(&mut file, page * PAGE_SIZE + PAGE_OVERFLOW, u32::try_from(pages - page - 1).unwrap());
        }
    }
    assert!(read(&file).is_err());
    assert!(check_and_read(&file).is_err());
}

#[test]
fn a_node_is_no_larger_than_allowed() {
    let model = root([("b", entries(2, 1 << 20))]);
    let file = write(&model, 4096);
    let open = |max_held_bytes| Database::open_with(&file[..], Options { max_held_bytes }).unwrap();
    let read = |database: &Database<_>| database.bucket(b"b").unwrap().unwrap().get(b"00000001");
    assert_eq!(read(&open(2 << 20)).unwrap(), Some(vec![b'v'; 1 << 20]));
    let error = read(&open(1 << 20)).unwrap_err().to_string();
    assert_eq!(
        error,
        "page 260 (offset 1064960): a node of 1052672 bytes, beside 4096 of its parents: the limit is 1048576"
    );
}

/// A file that claims to be huge takes no memory or time for what is not there.
#[test]
fn a_sparse_file_costs_nothing() {
    let mut bytes = sample_file();
    let pages = (1_u64 << 40) / PAGE_SIZE as u64;
    patch_metas(&mut bytes, PAGE_SIZE, META_PAGES, pages);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    let database = Database::open(File::open(file.path()).unwrap()).unwrap();
    let lost = bytes.len() / PAGE_SIZE;
    assert_damaged(
        database.check(),
        &format!("page {lost} (offset {}): the page is neither used nor in the freelist", bytes.len()),
    );
    // A leaf that extends over all of it.
    let leaf = bytes.len() - PAGE_SIZE;
    put_u32(&mut bytes, leaf + PAGE_OVERFLOW, u32::try_from(pages - 1).unwrap() - u32::try_from(lost).unwrap());
    let database = Database::open(&bytes[..]);
    assert_damaged(database, "it is truncated");
    std::fs::write(file.path(), &bytes).unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    let database = Database::open(File::open(file.path()).unwrap()).unwrap();
    assert_damaged(database.bucket(b"tree"), "a node of 1099511519232 bytes");
    // Without a freelist, what no bucket reaches is free.
    let mut bytes = sample_file();
    patch_metas(&mut bytes, PAGE_SIZE, META_PAGES, pages);
    patch_metas(&mut bytes, PAGE_SIZE, META_FREELIST, u64::MAX);
    std::fs::write(file.path(), &bytes).unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    let database = Database::open(File::open(file.path()).unwrap()).unwrap();
    assert_eq!(database.check().unwrap().free_pages, pages - lost as u64 + 1);
}

/// A file with these numbers in its freelist, at whose end there is space for as many free pages.
fn with_freelist(count: u16, numbers: &[u64]) -> Vec<u8> {
    let mut file = write(&root([("b", entries(20, 20))]), PAGE_SIZE);
    put_u16(&mut file, 2 * PAGE_SIZE + PAGE_COUNT, count);
    for (nth, number) in numbers.iter().enumerate() {
        put_u64(&mut file, 2 * PAGE_SIZE + 16 + 8 * nth, *number);
    }
    file.resize(file.len() + 3 * PAGE_SIZE, 0);
    let pages = (file.len() / PAGE_SIZE) as u64;
    patch_metas(&mut file, PAGE_SIZE, META_PAGES, pages);
    file
}

#[test]
fn freelists() {
    let check = |count, numbers: &[u64]| Database::open(&with_freelist(count, numbers)[..]).unwrap().check();
    let used = (write(&root([("b", entries(20, 20))]), PAGE_SIZE).len() / PAGE_SIZE) as u64;
    let free = [used, used + 1, used + 2];
    assert_eq!(check(3, &free).unwrap().free_pages, 3);
    assert_eq!(check(0xffff, &[3, used, used + 1, used + 2]).unwrap().free_pages, 3, "the long form");
    assert_damaged(check(2, &free), &format!("page {} (offset {}): the page is neither", used + 2, (used + 2) * 1024));
    assert_damaged(check(4, &[3, used, used + 1, used + 2]), "page 3 is used, but in the freelist");
    assert_damaged(check(4, &[2, used, used + 1, used + 2]), "page 2 is used, but in the freelist");
    assert_damaged(
        check(3, &[used, used + 2, used + 1]),
        &format!("the freelist has page {} after {}", used + 1, used + 2),
    );
    assert_damaged(check(3, &[used, used, used + 1]), "the freelist has page");
    assert_damaged(check(1, &[1]), "page 2 (offset 2064): the freelist has page 1 after 1");
    assert_damaged(check(1, &[used + 3]), "the freelist has page");
    assert_damaged(check(200, &[]), "a freelist of 200 pages does not fit into 1 pages");
    assert_damaged(check(0xffff, &[u64::MAX]), "does not fit into 1 pages");
    let mut file = with_freelist(3, &free);
    put_u16(&mut file, 2 * PAGE_SIZE + PAGE_KIND, LEAF);
    assert_damaged(Database::open(&file[..]).unwrap().check(), "kind 2 instead of a freelist");
    let mut file = with_freelist(0, &[]);
    put_u32(&mut file, 2 * PAGE_SIZE + PAGE_OVERFLOW, 5);
    assert_damaged(Database::open(&file[..]).unwrap().check(), "a freelist of 0 pages extends over 6 pages");
}

#[test]
fn inline_buckets_are_checked() {
    let original = write(&root([("b", entries(2, 5))]), PAGE_SIZE);
    // Behind the element and the name: the header of the bucket, then the page.
    let value = 3 * PAGE_SIZE + 16 + 16 + 1;
    let inline = value + 16;
    let patched = |patch: &dyn Fn(&mut Vec<u8>)| {
        let mut file = original.clone();
        patch(&mut file);
        check_and_read(&file)
    };
    assert!(patched(&|_| ()).is_ok());
    let no_page = "element 0: an inline bucket without a page";
    assert_damaged(patched(&|file| put_u16(file, inline + PAGE_KIND, 1)), no_page);
    assert_damaged(patched(&|file| put_u32(file, inline + PAGE_OVERFLOW, 1)), no_page);
    assert_damaged(patched(&|file| put_u64(file, inline, 3)), no_page);
    assert_damaged(patched(&|file| put_u16(file, inline + PAGE_COUNT, 100)), "100 elements do not fit into");
    assert_damaged(patched(&|file| put_u32(file, inline + 16, 1)), "a bucket inside an inline bucket");
    let place = format!("page 3 (offset {})", inline + 16 + 16);
    assert_damaged(patched(&|file| put_u32(file, inline + 32 + 8, 0)), &place);
    let length = 3 * PAGE_SIZE + 16 + 12;
    assert_damaged(patched(&|file| put_u32(file, length, 15)), "the value is too short for a bucket");
    assert_damaged(patched(&|file| put_u32(file, length, 31)), no_page);
}
