//! The numbered facts of `docs/contract`, and the tests for each: traps of etcd's behaviour (`KV-14`, `WATCH-3`), which a new
//! implementation easily gets wrong, and faults that such systems really had (`FAULT-32`). A test or script that covers one names
//! its ID in a comment. The tables here are checked against those comments, and every ID that is named anywhere against
//! `docs/contract`.

use std::{collections::BTreeSet, fs, path::Path};

/// ID, description and test files: golden scripts are in `tests/golden`, tests of one server in `tests/kv`, of several servers
/// in `tests/cluster`, unit tests in the source.
type Covered = &'static [(&'static str, &'static str, &'static [&'static str])];

const KV: Covered = &[
    ("KV-1", "the header's revision is the current one", &["tests/golden/mvcc/range", "tests/kv/keys.rs"]),
    ("KV-2", "count ignores limit and filters", &["tests/golden/mvcc/range"]),
    ("KV-3", "a sort target without a sort order", &["tests/golden/mvcc/range"]),
    ("KV-4", "a descending sort with a limit considers all keys", &["tests/golden/mvcc/range"]),
    ("KV-5", "a sort keeps the key order of equal values", &["tests/golden/mvcc/range"]),
    ("KV-6", "empty and inverted ranges", &["tests/golden/mvcc/range"]),
    ("KV-7", "a zero byte as the end", &["tests/golden/mvcc/range"]),
    (
        "KV-8",
        "the compact revision itself",
        &["tests/golden/mvcc/compaction", "tests/golden/mvcc/hash", "tests/kv/errors.rs"],
    ),
    ("KV-9", "negative revisions", &["tests/golden/mvcc/range", "tests/golden/txn/revisions", "tests/kv/errors.rs"]),
    ("KV-10", "a compaction at 0", &["tests/golden/mvcc/compaction", "tests/kv/errors.rs"]),
    ("KV-11", "a deletion at the compact revision", &["tests/golden/mvcc/compaction", "tests/golden/mvcc/hash"]),
    ("KV-12", "the current revision never decreases", &["tests/golden/mvcc/compaction_of_the_end"]),
    ("KV-13", "a deletion as a key's first record", &["tests/golden/mvcc/restart"]),
    ("KV-14", "the cache of compaction hashes", &["tests/golden/mvcc/hash_stored"]),
    ("KV-15", "seed, deletions and kept records in the hash", &["tests/golden/mvcc/hash", "tests/kv/hashes.rs"]),
    ("KV-16", "an interrupted compaction has no hash", &["tests/golden/mvcc/hash_stored"]),
    ("KV-17", "a revoked lease's keys in order", &["tests/golden/lease/revoke"]),
    ("KV-18", "nested comparisons", &["tests/golden/txn/nested"]),
    ("KV-19", "the value of a missing key", &["tests/golden/txn/compare"]),
    ("KV-20", "a comparison of a range", &["tests/golden/txn/compare"]),
    ("KV-21", "the branch not taken", &["tests/golden/txn/branches"]),
    ("KV-22", "a bad revision in a transaction", &["tests/golden/txn/revisions"]),
    ("KV-23", "duplicate keys through nesting", &["src/service/validate.rs", "tests/kv/errors.rs"]),
    ("KV-24", "the budget of operations", &["src/service/validate.rs", "tests/kv/errors.rs"]),
    ("KV-25", "a transaction that changes nothing", &["tests/golden/txn/branches"]),
    (
        "KV-26",
        "an operation with no request set",
        &["src/service/validate.rs", "tests/golden/txn/branches", "tests/kv/errors.rs"],
    ),
    ("KV-27", "an invalid sort option", &["src/service/validate.rs", "tests/kv/errors.rs"]),
    ("KV-28", "ignore_value and ignore_lease", &["tests/golden/lease/attachment", "tests/kv/errors.rs"]),
    ("KV-29", "a plain put drops the lease", &["tests/golden/lease/attachment"]),
    ("KV-30", "what counts as too large", &["tests/kv/errors.rs"]),
    (
        "KV-31",
        "a request that meets the quota exactly is refused",
        &["src/node/quota/tests.rs", "tests/kv/quota.rs", "tests/golden/lease/alarm_nospace"],
    ),
    ("KV-32", "what a transaction costs", &["src/state/command.rs", "tests/golden/lease/alarm_nospace"]),
    ("KV-33", "corruption blocks every change", &["tests/golden/lease/alarm_corrupt", "tests/kv/maintenance.rs"]),
    ("KV-34", "clearing an alarm names its member", &["tests/golden/lease/alarms", "tests/kv/maintenance.rs"]),
    ("KV-35", "what a learner answers", &["src/service/admission.rs", "tests/cluster/membership.rs"]),
    ("KV-36", "the last chunk of a stream", &["tests/kv/stream.rs"]),
    ("KV-37", "a stream overtaken by compaction", &["tests/kv/stream.rs"]),
    ("KV-38", "a stream of large values", &["tests/kv/stream.rs"]),
    ("KV-41", "the quota that Status shows", &["tests/kv/maintenance.rs"]),
    ("KV-42", "Status needs a user, Compact root", &["tests/auth/matrix.rs"]),
    ("KV-43", "periodic compaction", &["src/node/auto_compaction.rs"]),
    ("KV-44", "MoveLeader checks first that this member leads", &["tests/cluster/leadership.rs"]),
    ("KV-45", "a defragmentation that fails", &["tests/kv/full_disk.rs"]),
    ("KV-47", "reads without a quorum", &["tests/cluster/leadership.rs"]),
    ("KV-48", "hashes of another cluster", &["tests/cluster/peer_port.rs"]),
    ("KV-49", "keys_only loses the lease", &["tests/golden/mvcc/range"]),
    ("KV-50", "too many requests, code unknown", &["src/frontend/grpc/status.rs", "tests/kv/bounds.rs"]),
    ("KV-51", "a transaction that only compares", &["src/service/kv.rs"]),
    ("KV-53", "the quirks of the duplicate check", &["src/service/validate.rs", "tests/golden/mvcc/same_revision"]),
    ("KV-54", "a stored hash below the compact revision", &["tests/golden/mvcc/hash_stored"]),
    ("KV-55", "a write without a leader", &["tests/cluster/leadership.rs"]),
    ("KV-56", "an empty transaction needs no user", &["src/state/permission.rs"]),
];

const WATCH: Covered = &[
    ("WATCH-1", "a watch cancelled by a compaction", &["tests/watch/lagging.rs"]),
    ("WATCH-2", "a watch that is refused", &["tests/watch/contract.rs"]),
    ("WATCH-3", "one created response for each request, in order", &["tests/watch/contract.rs"]),
    ("WATCH-4", "the revision in the header of a replay", &["tests/watch/contract.rs", "tests/watch/progress.rs"]),
    ("WATCH-5", "progress on request", &["tests/watch/progress.rs"]),
    ("WATCH-6", "a stream whose requests have ended", &["tests/watch/contract.rs"]),
    (
        "WATCH-7",
        "whole revisions, and at most a thousand in a response",
        &["tests/watch/contract.rs", "tests/watch/lagging.rs"],
    ),
    ("WATCH-8", "a deletion at the compact revision", &["tests/watch/lagging.rs"]),
    ("WATCH-9", "a previous value that was compacted", &["tests/watch/contract.rs"]),
    ("WATCH-10", "fragments", &["tests/watch/contract.rs"]),
    ("WATCH-11", "streams that require a leader", &["tests/cluster/lost_leader_streams.rs"]),
    ("WATCH-12", "permission for a range that ends in a zero byte", &["tests/watch/contract.rs"]),
    ("LEASE-13", "TTLs: granted, renewed, missing", &["tests/lease/main.rs"]),
    ("LEASE-14", "a revoked lease takes its keys in one revision", &["tests/lease/main.rs"]),
    ("LEASE-15", "a new leader starts all TTLs again", &["tests/lease/main.rs"]),
    ("LEASE-16", "the renewal of an expired lease", &["tests/lease/main.rs"]),
    ("LEASE-17", "negative IDs survive a restart", &["tests/lease/main.rs"]),
    (
        "CONCURRENCY-18",
        "errors of Lock and Election, and waiters without a lease",
        &["tests/concurrency/lock.rs", "tests/concurrency/election.rs"],
    ),
    ("WATCH-19", "the version that Kubernetes looks at", &["tests/kv/maintenance.rs"]),
    ("WATCH-20", "what a closed stream leaves behind", &["tests/watch/lagging.rs"]),
];

const FAULTS: Covered = &[
    ("FAULT-1", "the applied index apart from its writes", &["tests/simulation/main.rs"]),
    ("FAULT-3", "a write acknowledged before it is durable", &["tests/durability/main.rs", "tests/simulation/main.rs"]),
    (
        "FAULT-4",
        "a crash at each step of an install, or of a rotation",
        &["tests/cluster/snapshots.rs", "tests/log/crash.rs"],
    ),
    ("FAULT-5", "the revision goes back after a compaction", &["tests/golden/mvcc/compaction_of_the_end"]),
    ("FAULT-6", "a deletion at the compact revision", &["tests/watch/lagging.rs"]),
    ("FAULT-7", "a read after a deletion", &["tests/golden/mvcc/batches"]),
    ("FAULT-8", "members whose data differs after a transaction", &["tests/simulation/main.rs"]),
    ("FAULT-9", "half a transaction", &["tests/golden/txn/branches", "tests/durability/writer.rs"]),
    ("FAULT-11", "leases after a snapshot", &["tests/simulation/main.rs"]),
    ("FAULT-12", "a crash after the install of a snapshot", &["tests/cluster/snapshots.rs"]),
    ("FAULT-13", "two snapshots in a short time", &["tests/cluster/snapshots.rs"]),
    (
        "FAULT-15",
        "a torn log, or a crash in the first start",
        &["tests/log/corruption.rs", "tests/log/crash.rs", "src/node/data_dir.rs"],
    ),
    ("FAULT-16", "a member that lost its data", &["tests/cluster/joining.rs"]),
    ("FAULT-17", "a corrupt member", &["tests/cluster/corruption.rs"]),
    ("FAULT-18", "reads from a new leader", &["tests/cluster/register.rs"]),
    ("FAULT-19", "a reused context of ReadIndex", &["tests/simulation/main.rs", "src/node/replica/read_index.rs"]),
    ("FAULT-20", "reads across a change of leader", &["tests/cluster/register.rs"]),
    ("FAULT-21", "reads from a leader without a quorum", &["tests/cluster/partitions.rs"]),
    ("FAULT-22", "revisions in headers go back", &["tests/cluster/register.rs"]),
    (
        "FAULT-23",
        "revisions of writes, and reads in a transaction",
        &["tests/cluster/register.rs", "tests/golden/txn/branches"],
    ),
    ("FAULT-24", "tests that try writes again", &["crates/test-support/src/load.rs"]),
    ("FAULT-25", "progress that overtakes events, or is not sent at all", &["tests/watch/progress.rs"]),
    (
        "FAULT-26",
        "watches across the install of a snapshot",
        &["tests/watch/install_and_stop.rs", "tests/cluster/watches.rs"],
    ),
    ("FAULT-27", "a watch from a future revision", &["tests/watch/contract.rs"]),
    ("FAULT-28", "a slow watch that a compaction overtakes", &["tests/watch/lagging.rs"]),
    ("FAULT-29", "events that arrive twice", &["tests/watch/random.rs", "tests/watch/lagging.rs"]),
    ("FAULT-30", "writes while a watch starts", &["tests/watch/race.rs"]),
    ("FAULT-31", "watch 0, negative revisions, slow readers", &["tests/watch/contract.rs", "tests/watch/lagging.rs"]),
    (
        "FAULT-32",
        "a leader that was stalled decides about leases",
        &[
            "tests/cluster/stuck_disks.rs",
            "tests/cluster/leases.rs",
            "tests/cluster/paused_leader.rs",
            "tests/simulation/main.rs",
            "src/node/lease_expiry.rs",
        ],
    ),
    ("FAULT-33", "renewals that race with a grant or a revocation", &["tests/lease/main.rs"]),
    ("FAULT-34", "leases across changes of leader; negative IDs", &["tests/cluster/leases.rs", "tests/lease/main.rs"]),
    ("FAULT-35", "expiry under load", &["tests/lease/many.rs"]),
    ("FAULT-36", "a lock whose lease has ended", &["tests/concurrency/lock.rs"]),
    ("FAULT-37", "the member table and raft's configuration", &["tests/simulation/main.rs"]),
    (
        "FAULT-38",
        "membership changes that cost the quorum",
        &["tests/cluster/membership.rs", "src/cluster/reconfig_check.rs"],
    ),
    ("FAULT-39", "the members after --force-new-cluster", &["tests/cluster/removal.rs"]),
    ("FAULT-2", "the auth revision after a crash", &["tests/auth/members.rs", "src/auth/tests.rs"]),
    ("FAULT-10", "the users in a snapshot", &["tests/auth/members.rs"]),
    ("FAULT-41", "every RPC is denied by default", &["tests/auth/matrix.rs", "src/service/admission.rs"]),
    ("FAULT-42", "permissions of nested operations, and for prev_kv", &["src/state/permission.rs"]),
    ("FAULT-43", "permission for a range that ends in a zero byte", &["src/auth/permission.rs"]),
    (
        "FAULT-44",
        "the keys of a lease; passwords in memory and logs",
        &["src/state/permission.rs", "tests/auth/tokens.rs"],
    ),
    ("FAULT-45", "handshakes without an end; revoked certificates", &["tests/tls/hostile.rs", "tests/tls/clients.rs"]),
    ("FAULT-46", "floods of HTTP/2 frames", &["tests/http2/floods.rs"]),
    (
        "FAULT-47",
        "limits for what clients may ask",
        &[
            "tests/kv/bounds.rs",
            "tests/watch/contract.rs",
            "tests/http2/floods.rs",
            "tests/http2/mixed_floods.rs",
            "tests/tls/hostile.rs",
        ],
    ),
];

/// What has no test, and why.
const UNCOVERED: &[(&str, &[&str])] = &[
    ("there are no snapshots for clients, no import and no export yet", &["KV-39", "KV-40", "KV-46", "FAULT-40"]),
    ("there are no downgrades yet", &["KV-52"]),
    (
        "the simulation installs snapshots, but no test puts entries and a snapshot into one Ready on purpose",
        &["FAULT-14"],
    ),
];

#[test]
fn every_trap_and_fault_has_a_test_or_a_reason_for_having_none() {
    let covered = [KV, WATCH, FAULTS].concat();
    let listed = covered.iter().map(|(id, ..)| *id).chain(UNCOVERED.iter().flat_map(|(_, ids)| *ids).copied());
    let listed: Vec<String> = listed.map(str::to_owned).collect();
    let unique: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(unique.len(), listed.len(), "each is listed once");
    let mut defined = defined();
    defined.retain(|id| !["MEMBER", "AUTH", "SURFACE"].contains(&prefix(id)));
    assert_eq!(unique, defined, "the tables list what docs/contract defines");
    for (id, what, files) in &covered {
        assert!(!files.is_empty(), "{id} is covered by nothing");
        for file in *files {
            assert!(named(&read(file)).contains(*id), "{file} does not name {id}, {what}");
        }
    }
}

#[test]
fn every_id_that_is_named_exists() {
    let defined = defined();
    let mut files = Vec::new();
    for under in ["src", "crates", "tests", "docs/decisions"] {
        collect(&root().join(under), &mut files);
    }
    files.retain(|path| !path.ends_with("tests/tidy/traps.rs"));
    for path in files {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for id in named(&text) {
            assert!(defined.contains(&id), "{} names {id}, which docs/contract does not define", path.display());
        }
    }
}

/// The kinds of IDs.
const PREFIXES: [&str; 8] = ["KV", "WATCH", "LEASE", "CONCURRENCY", "MEMBER", "AUTH", "SURFACE", "FAULT"];

/// The IDs that `docs/contract` defines: the first cells of table rows, and list items that begin in bold.
fn defined() -> BTreeSet<String> {
    let mut files = Vec::new();
    collect(&root().join("docs/contract"), &mut files);
    let mut ids = Vec::new();
    for path in files {
        let text = fs::read_to_string(path).unwrap();
        let begins = |line: &str| {
            let line = line.strip_prefix("| ").or_else(|| line.strip_prefix("* **"))?;
            let id = line.split([' ', '*']).next()?;
            is_id(id).then(|| id.to_owned())
        };
        ids.extend(text.lines().filter_map(begins));
    }
    let unique: BTreeSet<String> = ids.iter().cloned().collect();
    assert_eq!(unique.len(), ids.len(), "each ID is defined once");
    assert!(unique.contains("KV-56") && unique.contains("FAULT-47"), "the definitions are found");
    unique
}

/// The IDs that a text names.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    words.filter(|word| is_id(word)).map(str::to_owned).collect()
}

fn is_id(word: &str) -> bool {
    word.split_once('-').is_some_and(|(kind, number)| PREFIXES.contains(&kind) && number.parse::<u32>().is_ok())
}

fn prefix(id: &str) -> &str {
    id.split('-').next().unwrap_or_default()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

fn collect(path: &Path, files: &mut Vec<std::path::PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            collect(&entry.unwrap().path(), files);
        }
    } else {
        files.push(path.to_owned());
    }
}

#[test]
fn ids_are_found_in_text() {
    let ids: Vec<String> =
        named("/// KV-1, (FAULT-32); WATCH-3: x\nKV-x KV-1-2 ID-7 kv-4 \"AUTH-9\"").into_iter().collect();
    assert_eq!(ids, ["AUTH-9", "FAULT-32", "KV-1", "WATCH-3"]);
}
