//! What the house promises about its own source: that floors know only those below them, that the core knows no clock, no
//! thread and no network, that the README lists what there is, and a few habits. `ARCHITECTURE.md` says why.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "tidy/readme.rs"]
mod readme;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/traps.rs"]
mod traps;

use std::collections::BTreeSet;

use source::{Source, sources};

/// The floors, from above. A room may use the rooms of lower floors; rooms of one floor do not know each other.
const FLOORS: &[&[&str]] = &[
    &["api", "http2"],
    &["node", "peer"],
    &["watch"],
    // What is kept for clients, counted in one place for all of the above.
    &["ledger"],
    // Measuring is for the edges: nothing below this line does it.
    &["metrics"],
    &["state"],
    &["mvcc", "lease", "auth"],
    &["storage"],
    &["error", "proto", "call", "inbox", "urls", "version"],
];

/// The rooms beside the floors, and which rooms each of them may use.
const BESIDE: &[(&str, &[&str])] = &[
    ("main", &["bench", "config", "server"]),
    ("lib", &[]),
    // Puts the floors on top of each other.
    (
        "server",
        &[
            "api", "http2", "node", "peer", "watch", "ledger", "metrics", "state", "mvcc", "lease", "auth", "storage",
            "error", "proto",
        ],
    ),
    ("server", &["call", "config", "logging", "urls", "version"]),
    // A client: it knows the wire, and how durations are written.
    ("bench", &["proto", "config"]),
    ("config", &["logging", "urls", "version"]),
    ("logging", &[]),
];

/// What a room on the floors may use, by name.
fn below(room: &str) -> Option<BTreeSet<&'static str>> {
    let floor = FLOORS.iter().position(|rooms| rooms.contains(&room))?;
    Some(FLOORS[floor + 1..].iter().copied().flatten().copied().collect())
}

fn allowed(room: &str) -> BTreeSet<&'static str> {
    below(room).unwrap_or_else(|| {
        let beside: Vec<_> = BESIDE.iter().filter(|(name, _)| *name == room).collect();
        assert!(!beside.is_empty(), "the room {room} has no place in the house: say in tests/tidy.rs where it belongs");
        beside.into_iter().flat_map(|(_, rooms)| rooms.iter().copied()).collect()
    })
}

/// The floors from `state` down, which are synchronous and deterministic. (`proto` is generated, and holds tonic's clients.)
fn is_core(source: &Source) -> bool {
    let room = source.room();
    room == "state" || (room != "proto" && below("state").expect("it is a floor").contains(room))
}

fn complain(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn a_floor_knows_only_those_below_it() {
    let mut complaints = Vec::new();
    for source in sources("src") {
        let room = source.room().to_owned();
        let allowed = allowed(&room);
        for (line, used) in source.rooms_used() {
            if used != room && !allowed.contains(used.as_str()) {
                complaints.push(format!("{}:{line}: {room} uses {used}", source.path));
            }
        }
    }
    complain(&complaints);
}

#[test]
fn the_core_knows_no_network_no_thread_no_clock_and_no_chance() {
    const FOREIGN: [&str; 9] = ["tokio", "tonic", "axum", "hyper", "hyper_util", "tower", "raft", "rand", "HashMap"];
    const CALLS: [&str; 4] = ["Instant::now", "SystemTime::now", "thread::spawn", "thread::Builder"];
    /// Files that may use one of them after all, and why.
    const EXCUSED: &[(&str, &str, &str)] =
        &[("src/lease/shards.rs", "HashMap", "the leader's deadlines: local, and nobody sees their order")];
    let excused = |path: &str, name: &str| EXCUSED.iter().any(|excuse| (excuse.0, excuse.1) == (path, name));
    let mut complaints = Vec::new();
    for source in sources("src").into_iter().filter(is_core) {
        for (line, text) in source.lines_without_tests() {
            let words = source::words(text);
            let found = FOREIGN.iter().filter(|name| words.contains(**name) && !excused(&source.path, name));
            let found = found.chain(CALLS.iter().filter(|call| text.contains(**call)));
            complaints.extend(found.map(|name| format!("{}:{line}: {name}", source.path)));
        }
    }
    complain(&complaints);
}

#[test]
fn one_file_of_the_api_names_tonic() {
    let api = sources("src/api").into_iter().filter(|source| source.words().contains("tonic"));
    assert_eq!(api.map(|source| source.path).collect::<Vec<_>>(), ["src/api/grpc.rs"]);
}

#[test]
fn nothing_is_left_to_do_and_nothing_is_unsafe() {
    /// Files that need it, and why.
    const UNSAFE: &[(&str, &str)] = &[];
    let mut complaints = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")).chain(sources("build.rs")) {
        let excused = UNSAFE.iter().any(|(path, _)| *path == source.path);
        for (line, text) in source.lines() {
            let words = source::words(text);
            if words.contains("unsafe") && !excused {
                complaints.push(format!("{}:{line}: unsafe", source.path));
            }
            for unfinished in ["todo!", "unimplemented!", "dbg!"] {
                if text.contains(unfinished) {
                    complaints.push(format!("{}:{line}: {unfinished}", source.path));
                }
            }
        }
    }
    complain(&complaints);
}

#[test]
fn files_are_short() {
    const MAX_LINES: usize = 900;
    /// Longer ones, with the length that they may have.
    const LONGER: &[(&str, usize)] = &[];
    let mut complaints = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")) {
        let allowed = LONGER.iter().find(|(path, _)| *path == source.path).map_or(MAX_LINES, |(_, lines)| *lines);
        let lines = source.lines().count();
        if lines > allowed {
            complaints.push(format!("{}: {lines} lines, {allowed} are allowed", source.path));
        }
    }
    complain(&complaints);
}
