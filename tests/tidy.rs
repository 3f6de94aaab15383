//! Rules for the source itself: layers depend only on layers below them, the core uses no clock, thread or network, the README
//! lists all metrics and environment variables, and a few conventions. `ARCHITECTURE.md` gives the reasons.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "tidy/readme.rs"]
mod readme;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/traps.rs"]
mod traps;

use std::collections::BTreeSet;

use source::{Source, sources};

/// The layers, top down. A module may use the modules of lower layers; modules of one layer do not use each other.
const LAYERS: &[&[&str]] = &[
    &["api", "http2"],
    &["node", "peer"],
    &["watch"],
    // Counts the memory held for clients, for all layers above.
    &["ledger"],
    // Only the outer layers measure: nothing below this line does.
    &["metrics"],
    &["state"],
    &["mvcc", "lease", "auth"],
    &["storage"],
    &["error", "proto", "call", "inbox", "urls", "version"],
];

/// The modules outside the layers, and the modules that each of them may use.
const OUTSIDE_LAYERS: &[(&str, &[&str])] = &[
    ("main", &["bench", "config", "server"]),
    ("lib", &[]),
    // The composition root.
    (
        "server",
        &[
            "api", "http2", "node", "peer", "watch", "ledger", "metrics", "state", "mvcc", "lease", "auth", "storage",
            "error", "proto",
        ],
    ),
    ("server", &["call", "config", "logging", "urls", "version"]),
    // A client: uses the wire format and the syntax of durations.
    ("bench", &["proto", "config"]),
    ("config", &["logging", "urls", "version"]),
    ("logging", &[]),
];

/// The modules below the layer of `module`; `None` if it belongs to no layer.
fn below(module: &str) -> Option<BTreeSet<&'static str>> {
    let layer = LAYERS.iter().position(|modules| modules.contains(&module))?;
    Some(LAYERS[layer + 1..].iter().copied().flatten().copied().collect())
}

fn allowed(module: &str) -> BTreeSet<&'static str> {
    below(module).unwrap_or_else(|| {
        let outside: Vec<_> = OUTSIDE_LAYERS.iter().filter(|(name, _)| *name == module).collect();
        assert!(!outside.is_empty(), "the module {module} belongs to no layer: add it to the lists in tests/tidy.rs");
        outside.into_iter().flat_map(|(_, modules)| modules.iter().copied()).collect()
    })
}

/// The layers from `state` down, which are synchronous and deterministic. (`proto` is generated and contains tonic's clients.)
fn is_core(source: &Source) -> bool {
    let module = source.module();
    module == "state" || (module != "proto" && below("state").expect("`state` is in a layer").contains(module))
}

fn assert_none(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[test]
fn a_layer_depends_only_on_layers_below_it() {
    let mut violations = Vec::new();
    for source in sources("src") {
        let module = source.module().to_owned();
        let allowed = allowed(&module);
        for (line, used) in source.modules_used() {
            if used != module && !allowed.contains(used.as_str()) {
                violations.push(format!("{}:{line}: {module} uses {used}", source.path));
            }
        }
    }
    assert_none(&violations);
}

#[test]
fn the_core_uses_no_network_thread_clock_or_randomness() {
    const FOREIGN: [&str; 9] = ["tokio", "tonic", "axum", "hyper", "hyper_util", "tower", "raft", "rand", "HashMap"];
    const CALLS: [&str; 4] = ["Instant::now", "SystemTime::now", "thread::spawn", "thread::Builder"];
    /// Files that may use one of them, and why.
    const EXCEPTIONS: &[(&str, &str, &str)] =
        &[("src/lease/shards.rs", "HashMap", "the leader's deadlines: local, and their order is never visible")];
    let is_exception = |path: &str, name: &str| EXCEPTIONS.iter().any(|entry| (entry.0, entry.1) == (path, name));
    let mut violations = Vec::new();
    for source in sources("src").into_iter().filter(is_core) {
        for (line, text) in source.lines_without_tests() {
            let names = source::names(text);
            let found = FOREIGN.iter().filter(|name| names.contains(**name) && !is_exception(&source.path, name));
            let found = found.chain(CALLS.iter().filter(|call| text.contains(**call)));
            violations.extend(found.map(|name| format!("{}:{line}: {name}", source.path)));
        }
    }
    assert_none(&violations);
}

#[test]
fn only_one_file_of_the_api_uses_tonic() {
    let api = sources("src/api").into_iter().filter(|source| source.names().contains("tonic"));
    assert_eq!(api.map(|source| source.path).collect::<Vec<_>>(), ["src/api/grpc.rs"]);
}

#[test]
fn no_code_is_unfinished_or_unsafe() {
    /// Files that need unsafe code, and why.
    const UNSAFE: &[(&str, &str)] = &[];
    let mut violations = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")).chain(sources("build.rs")) {
        let is_exception = UNSAFE.iter().any(|(path, _)| *path == source.path);
        for (line, text) in source.lines() {
            let names = source::names(text);
            if names.contains("unsafe") && !is_exception {
                violations.push(format!("{}:{line}: unsafe", source.path));
            }
            for unfinished in ["todo!", "unimplemented!", "dbg!"] {
                if text.contains(unfinished) {
                    violations.push(format!("{}:{line}: {unfinished}", source.path));
                }
            }
        }
    }
    assert_none(&violations);
}

#[test]
fn files_are_short() {
    const MAX_LINES: usize = 900;
    /// Files that may be longer, with their limits.
    const LONGER: &[(&str, usize)] = &[];
    let mut violations = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")) {
        let allowed = LONGER.iter().find(|(path, _)| *path == source.path).map_or(MAX_LINES, |(_, lines)| *lines);
        let lines = source.lines().count();
        if lines > allowed {
            violations.push(format!("{}: {lines} lines, the limit is {allowed}", source.path));
        }
    }
    assert_none(&violations);
}
