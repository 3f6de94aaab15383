//! Files of `crates/bbolt` and of bbolt itself, each read and checked by the other: by our program in `tests/go/bbolt`, with the
//! version of bbolt that etcd 3.7.3 uses.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use bbolt::{Bucket, Database, Measure, Report, Value, WriteError, Writer};
use tempfile::TempDir;
use test_support::requirements::installed;

/// Our program; `None` on a machine without Go.
fn program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let go = installed("go", "go")?;
    Some(PROGRAM.get_or_init(|| {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bbolt");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/go");
        let built =
            Command::new(go).args(["build", "-o"]).arg(&program).arg("./bbolt").current_dir(source).output().unwrap();
        assert!(built.status.success(), "go build: {}", String::from_utf8_lossy(&built.stderr));
        program
    }))
}

/// What the program prints for a file.
#[track_caller]
fn run(program: &Path, command: &str, file: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).arg(command).arg(file).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "bbolt {command} {} {arguments:?}: {errors}", file.display());
    String::from_utf8(output.stdout).unwrap()
}

/// How the program describes what a file contains.
fn describe(report: Report) -> String {
    let Report { buckets, inline_buckets, entries, branch_pages, leaf_pages, overflow_pages, free_pages } = report;
    format!(
        "buckets {buckets} inline {inline_buckets} entries {entries} branches {branch_pages} leaves {leaf_pages} \
         overflow {overflow_pages} free {free_pages}\n"
    )
}

/// All entries, as the program lists them.
fn list(database: &Database<File>) -> String {
    fn hex(bytes: &[u8]) -> String {
        bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
    }
    fn hash(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
    }
    fn list_bucket(out: &mut String, depth: usize, bucket: &Bucket<'_, File>) {
        let mut cursor = bucket.cursor();
        while let Some(entry) = cursor.next_entry().unwrap() {
            match entry.value {
                Value::Bytes(value) => {
                    writeln!(out, "{depth} {} {} {:x}", hex(entry.key), value.len(), hash(value)).unwrap();
                }
                Value::Bucket => {
                    let nested = bucket.bucket(entry.key).unwrap().unwrap();
                    writeln!(out, "{depth} bucket {} {}", hex(entry.key), nested.sequence()).unwrap();
                    list_bucket(out, depth + 1, &nested);
                }
            }
        }
    }
    let mut out = String::new();
    list_bucket(&mut out, 0, &database.root());
    out
}

/// Checks and lists a file with our reader and with bbolt, which must agree.
fn compare(program: &Path, file: &Path) -> Report {
    let database = Database::open(File::open(file).unwrap()).unwrap();
    let report = database.check().unwrap();
    assert_eq!(describe(report), run(program, "check", file, &[]));
    let (ours, theirs) = (list(&database), run(program, "list", file, &[]));
    // Not assert_eq, which would print both.
    let difference = ours.lines().zip(theirs.lines()).find(|(ours, theirs)| ours != theirs);
    assert!(ours == theirs, "{}: {difference:?}", file.display());
    report
}

/// A bucket to be written.
struct Plan {
    name: String,
    count: usize,
    key_length: usize,
    /// For each entry.
    value_length: fn(usize) -> usize,
}

fn write(file: &Path, page_size: usize, plans: &[Plan]) {
    let mut measure = Measure::with_page_size(page_size).unwrap();
    for Plan { name, count, key_length, value_length } in plans {
        measure.begin_bucket(name.len()).unwrap();
        for nth in 0..*count {
            measure.put(*key_length, value_length(nth)).unwrap();
        }
        measure.end_bucket().unwrap();
    }
    let layout = measure.finish().unwrap();
    let mut writer = Writer::new(File::create(file).unwrap(), layout);
    let written = plans.iter().try_for_each(|Plan { name, count, key_length, value_length }| {
        writer.begin_bucket(name.as_bytes())?;
        for nth in 0..*count {
            let filler = nth.to_be_bytes()[7];
            writer.put(format!("{nth:0key_length$}").as_bytes(), &vec![filler; value_length(nth)])?;
        }
        writer.end_bucket()
    });
    written.and_then(|()| writer.finish()).map_err(|error: WriteError| error.to_string()).unwrap();
    assert_eq!(fs::metadata(file).unwrap().len(), layout.file_size());
}

/// bbolt accepts a file of this many keys in one bucket, and what remains when it deletes them in several ways.
fn accepted(program: &Path, page_size: usize, count: usize, value_length: fn(usize) -> usize, ways: &[(&str, &str)]) {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("db");
    for (order, batch) in ways {
        let keys = Plan { name: "key".to_owned(), count, key_length: 17, value_length };
        let meta = Plan { name: "meta".to_owned(), count: 3, key_length: 10, value_length: |_| 8 };
        write(&file, page_size, &[keys, meta]);
        assert_eq!(compare(program, &file).entries, count as u64 + 3);
        run(program, "empty", &file, &[order, batch]);
        // The reader reads what bbolt made of it.
        assert_eq!(compare(program, &file).entries, 0);
    }
}

const WAYS: [(&str, &str); 5] =
    [("forward", "1000000"), ("forward", "100"), ("backward", "37"), ("random", "50"), ("random", "1000000")];

#[test]
fn bbolt_accepts_few_keys() {
    let Some(program) = program() else { return };
    for count in [0, 1, 2, 1000] {
        accepted(program, 4096, count, |_| 60, &WAYS);
    }
}

/// Around the number of keys at which a second level of branches begins.
#[test]
fn bbolt_accepts_any_number_of_keys_around_a_full_branch() {
    let Some(program) = program() else { return };
    for count in 1537..=1541 {
        accepted(program, 4096, count, |_| 2000, &[("forward", "1000000"), ("random", "200")]);
    }
}

#[test]
fn bbolt_accepts_many_keys() {
    let Some(program) = program() else { return };
    accepted(program, 4096, 300_000, |_| 60, &[("forward", "1000000"), ("random", "30000")]);
}

/// One bucket for each number of entries. The keys are so long that a branch has few children: trees of up to four levels, each with
/// any number of children at its right edge.
#[test]
fn bbolt_accepts_a_bucket_of_every_size() {
    let Some(program) = program() else { return };
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("db");
    for (order, batch) in [("forward", "1000000"), ("backward", "1000000"), ("random", "10000"), ("forward", "5000")] {
        let plan = |count| Plan { name: format!("{count:05}"), count, key_length: 150, value_length: |_| 800 };
        let plans: Vec<Plan> = (0..250).map(plan).collect();
        write(&file, 1024, &plans);
        assert_eq!(compare(program, &file).buckets, 250);
        run(program, "empty", &file, &[order, batch]);
        assert_eq!(compare(program, &file).entries, 0);
    }
}

#[test]
fn bbolt_accepts_values_of_all_lengths_and_pages_of_all_sizes() {
    let Some(program) = program() else { return };
    let mixed = |nth: usize| match nth % 50 {
        0 => 1 << 20,
        1 => 70_000,
        2..6 => 5000,
        6..10 => 4030 + nth % 40,
        _ => nth % 300,
    };
    for page_size in [1024, 2048, 4096, 16384, 65536] {
        accepted(program, page_size, 500, mixed, &[("random", "40"), ("forward", "1000000")]);
    }
}

#[test]
fn what_bbolt_wrote_is_read() {
    let Some(program) = program() else { return };
    let directory = TempDir::new().unwrap();
    let (mut free, mut inline, mut without_freelist) = (0, 0, 0);
    for seed in 0..18 {
        let page_size = 1024 << (seed % 7);
        let file = directory.path().join(format!("{seed}"));
        run(program, "make", &file, &[&seed.to_string(), &page_size.to_string()]);
        let report = compare(program, &file);
        free += report.free_pages;
        inline += report.inline_buckets;
        without_freelist += u64::from(fs::read(&file).unwrap()[48..56] == [0xff; 8]);
    }
    assert!(free > 100 && inline > 10 && without_freelist > 2, "{free} {inline} {without_freelist}");
}
