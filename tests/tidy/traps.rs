//! The known traps of etcd's contract (behaviour that a reimplementation easily gets wrong), by number, and the tests for each.
//! A test or script that covers a trap names its number in a comment ("Trap 5", "Traps 6 and 7"); this table is checked against
//! those comments.

use std::{collections::BTreeMap, fs, path::Path};

/// Number, description and test files of each trap: golden scripts are in `tests/golden`, tests of one server in `tests/kv`,
/// of several servers in `tests/cluster`, unit tests in the source.
const COVERED: &[(u32, &str, &[&str])] = &[
    (1, "the header's revision is the current one", &["tests/golden/mvcc/range", "tests/kv/keys.rs"]),
    (2, "count ignores limit and filters", &["tests/golden/mvcc/range"]),
    (3, "a sort target without a sort order", &["tests/golden/mvcc/range"]),
    (4, "a descending sort with a limit considers all keys", &["tests/golden/mvcc/range"]),
    (5, "a sort keeps the key order of equal values", &["tests/golden/mvcc/range"]),
    (6, "empty and inverted ranges", &["tests/golden/mvcc/range"]),
    (7, "a zero byte as the end", &["tests/golden/mvcc/range"]),
    (
        8,
        "the compact revision itself",
        &["tests/golden/mvcc/compaction", "tests/golden/mvcc/hash", "tests/kv/errors.rs"],
    ),
    (9, "negative revisions", &["tests/golden/mvcc/range", "tests/golden/txn/revisions", "tests/kv/errors.rs"]),
    (10, "a compaction at 0", &["tests/golden/mvcc/compaction", "tests/kv/errors.rs"]),
    (11, "a deletion at the compact revision", &["tests/golden/mvcc/compaction", "tests/golden/mvcc/hash"]),
    (12, "the current revision never decreases", &["tests/golden/mvcc/compaction_of_the_end"]),
    (13, "a deletion as a key's first record", &["tests/golden/mvcc/restart"]),
    (14, "the cache of compaction hashes", &["tests/golden/mvcc/hash_stored"]),
    (15, "seed, deletions and kept records in the hash", &["tests/golden/mvcc/hash", "tests/kv/hashes.rs"]),
    (16, "an interrupted compaction has no hash", &["tests/golden/mvcc/hash_stored"]),
    (17, "a revoked lease's keys in order", &["tests/golden/lease/revoke"]),
    (18, "nested comparisons", &["tests/golden/txn/nested"]),
    (19, "the value of a missing key", &["tests/golden/txn/compare"]),
    (20, "a comparison of a range", &["tests/golden/txn/compare"]),
    (21, "the branch not taken", &["tests/golden/txn/branches"]),
    (22, "a bad revision in a transaction", &["tests/golden/txn/revisions"]),
    (23, "duplicate keys through nesting", &["src/service/validate.rs", "tests/kv/errors.rs"]),
    (24, "the budget of operations", &["src/service/validate.rs", "tests/kv/errors.rs"]),
    (25, "a transaction that changes nothing", &["tests/golden/txn/branches"]),
    (
        26,
        "an operation with no request set",
        &["src/service/validate.rs", "tests/golden/txn/branches", "tests/kv/errors.rs"],
    ),
    (27, "an invalid sort option", &["src/service/validate.rs", "tests/kv/errors.rs"]),
    (28, "ignore_value and ignore_lease", &["tests/golden/lease/attachment", "tests/kv/errors.rs"]),
    (29, "a plain put drops the lease", &["tests/golden/lease/attachment"]),
    (30, "what counts as too large", &["tests/kv/errors.rs"]),
    (
        31,
        "a request that meets the quota exactly is refused",
        &["src/node/quota/tests.rs", "tests/kv/quota.rs", "tests/golden/lease/alarm_nospace"],
    ),
    (32, "what a transaction costs", &["src/state/command.rs", "tests/golden/lease/alarm_nospace"]),
    (33, "corruption blocks every change", &["tests/golden/lease/alarm_corrupt", "tests/kv/maintenance.rs"]),
    (34, "clearing an alarm names its member", &["tests/golden/lease/alarms", "tests/kv/maintenance.rs"]),
    (35, "what a learner answers", &["src/service/admission.rs", "tests/cluster/membership.rs"]),
    (36, "the last chunk of a stream", &["tests/kv/stream.rs"]),
    (37, "a stream overtaken by compaction", &["tests/kv/stream.rs"]),
    (38, "a stream of large values", &["tests/kv/stream.rs"]),
    (41, "the quota that Status shows", &["tests/kv/maintenance.rs"]),
    (43, "periodic compaction", &["src/node/auto_compaction.rs"]),
    (44, "MoveLeader checks first that this member leads", &["tests/cluster/leadership.rs"]),
    (45, "a defragmentation that fails", &["tests/kv/full_disk.rs"]),
    (47, "reads without a quorum", &["tests/cluster/leadership.rs"]),
    (48, "hashes of another cluster", &["tests/cluster/peer_port.rs"]),
    (49, "keys_only loses the lease", &["tests/golden/mvcc/range"]),
    (50, "too many requests, code unknown", &["src/frontend/grpc/status.rs", "tests/kv/bounds.rs"]),
    (51, "a transaction that only compares", &["src/service/kv.rs"]),
    (53, "the quirks of the duplicate check", &["src/service/validate.rs", "tests/golden/mvcc/same_revision"]),
    (54, "a stored hash below the compact revision", &["tests/golden/mvcc/hash_stored"]),
    (55, "a write without a leader", &["tests/cluster/leadership.rs"]),
];

/// Traps of features that do not exist yet, or that no test can provoke from outside.
const LATER: &[(&str, &[u32])] =
    &[("snapshots for clients, import and export", &[39, 40, 46]), ("users", &[42, 56]), ("downgrades", &[52])];

#[test]
fn every_trap_has_a_test_or_a_reason_for_having_none() {
    let mut all: Vec<u32> = COVERED.iter().map(|(trap, ..)| *trap).collect();
    all.extend(LATER.iter().flat_map(|(_, traps)| *traps));
    all.sort_unstable();
    assert_eq!(all, (1..=56).collect::<Vec<_>>());
    let mut named: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for (trap, what, files) in COVERED {
        for file in *files {
            let named = named.entry(file).or_insert_with(|| traps_in(file));
            assert!(named.contains(trap), "{file} does not name trap {trap}, {what}");
        }
    }
}

/// The numbers after every "trap" or "traps" in a file.
fn traps_in(file: &str) -> Vec<u32> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap().to_lowercase();
    let mut traps = Vec::new();
    for (at, word) in text.match_indices("trap") {
        let rest = text[at + word.len()..].trim_start_matches('s');
        let words =
            rest.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty() && *word != "and");
        traps.extend(words.map_while(|word| word.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().ok()));
    }
    traps
}
