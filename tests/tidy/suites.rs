//! `tests/README.md` describes every suite.

use std::{fs, path::Path};

#[test]
fn every_suite_is_described() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let text = fs::read_to_string(tests.join("README.md")).unwrap();
    let (table, _) = text.split_once("### Files").expect("the table of suites comes first");
    for entry in fs::read_dir(&tests).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let name = if entry.path().is_dir() { name + "/" } else { name };
        assert!(name == "README.md" || table.contains(&format!("`{name}`")), "{name} is not described");
    }
}
