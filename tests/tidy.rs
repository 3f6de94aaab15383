//! Rules for the source itself: layers depend only on layers below them, the core uses no clock, thread or network, the
//! documentation lists all flags, metrics and variables, tests name the facts that they cover, and a few conventions.
//! `ARCHITECTURE.md` gives the reasons.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "tidy/docs.rs"]
mod docs;
#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/suites.rs"]
mod suites;
#[path = "tidy/traps.rs"]
mod traps;

use std::collections::{BTreeMap, BTreeSet};

use source::{Source, sources};

/// The layers, top down. A module may use the modules of lower layers; modules of one layer do not use each other.
const LAYERS: &[&[&str]] = &[
    &["cli"],
    // The composition root.
    &["server"],
    &["frontend"],
    &["service"],
    &["cluster"],
    &["node"],
    &["raft_log", "watch"],
    // Flags and the variables that stand for them.
    &["config"],
    &["logging", "net"],
    // What took too long: counted and logged.
    &["slow_log"],
    // Only the outer layers measure: nothing below this line does.
    &["metrics"],
    &["state"],
    &["mvcc", "lease", "auth"],
    &["storage"],
    &["error", "proto", "inbox", "repeats", "version"],
];

/// Uses that the order would allow, but that are not wanted, and why.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    ("node", &["config", "logging"], "it is configured by values"),
    ("raft_log", &["config", "net", "logging", "state", "mvcc", "storage", "proto"], "it stores entries as bytes"),
];

/// The modules below the layer of `module`.
fn below(module: &str) -> BTreeSet<&'static str> {
    let layer = LAYERS.iter().position(|modules| modules.contains(&module));
    let layer =
        layer.unwrap_or_else(|| panic!("the module {module} belongs to no layer: add it to LAYERS in tests/tidy.rs"));
    LAYERS[layer + 1..].iter().copied().flatten().copied().collect()
}

fn allowed(module: &str) -> BTreeSet<&'static str> {
    match module {
        "main" => BTreeSet::from(["cli"]),
        "lib" => BTreeSet::new(),
        module => {
            let forbidden = FORBIDDEN.iter().filter(|(name, ..)| *name == module).flat_map(|(_, modules, _)| *modules);
            let forbidden: BTreeSet<&str> = forbidden.copied().collect();
            below(module).difference(&forbidden).copied().collect()
        }
    }
}

/// The layers from `state` down, which are synchronous and deterministic. (`proto` is generated and contains tonic's clients.)
fn is_core(source: &Source) -> bool {
    let module = source.module();
    module == "state" || (module != "proto" && below("state").contains(module))
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

/// Operations are free of any protocol: of the HTTP/2 crate they use the ledger alone, and the layers below use nothing of it.
#[test]
fn only_frontends_know_http2() {
    let mut violations = Vec::new();
    for source in
        sources("src").into_iter().filter(|source| !["frontend", "server", "metrics"].contains(&source.module()))
    {
        for used in source.crate_paths("http2") {
            if source.module() != "service" || !used.starts_with("ledger") {
                violations.push(format!("{}: http2::{used}", source.path));
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
fn only_the_adapters_use_tonic() {
    let frontend = sources("src/frontend").into_iter().filter(|source| source.names().contains("tonic"));
    let paths: Vec<String> = frontend.map(|source| source.path).collect();
    // The adapter, what starts it, and gRPC reflection, which is tonic's own.
    let adapters = ["src/frontend/grpc/mod.rs", "src/frontend/grpc/tonic.rs", "src/frontend/http/hyper_server.rs"];
    let others: Vec<_> = paths.iter().filter(|path| !adapters.contains(&path.as_str())).collect();
    assert_eq!(others, ["src/frontend/listener/mod.rs", "src/frontend/routes.rs"]);
    for source in sources("src/service").into_iter().chain(sources("src/cluster")) {
        assert!(!source.names().contains("tonic"), "{}", source.path);
    }
}

/// Files of one directory form no circle by their uses of each other. A module and its own children may know each other.
#[test]
fn sibling_files_form_no_circles() {
    let violations = ["src", "crates/http2/src", "crates/bbolt/src"].map(circles).concat();
    assert_none(&violations);
}

fn circles(root: &str) -> Vec<String> {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let all = sources(root);
    let names: BTreeSet<String> = all.iter().map(source::Source::module_path).collect();
    for source in &all {
        let from = source.module_path();
        for used in source.paths_used() {
            // The longest prefix that is a module.
            let mut used = used.as_str();
            while !names.contains(used) {
                let Some((parent, _)) = used.rsplit_once("::") else { break };
                used = parent;
            }
            // Both seen as children of the deepest directory that they share.
            let (mut a, mut b) = (from.split("::").peekable(), used.split("::").peekable());
            let mut shared = Vec::new();
            while let (Some(x), Some(y)) = (a.peek(), b.peek())
                && x == y
            {
                shared.push(*x);
                a.next();
                b.next();
            }
            if let (Some(x), Some(y)) = (a.next(), b.next()) {
                let child = |name| shared.iter().copied().chain([name]).collect::<Vec<_>>().join("::");
                edges.entry(child(x)).or_default().insert(child(y));
            }
        }
    }
    let mut violations = Vec::new();
    for (from, direct) in &edges {
        for used in direct {
            if used > from && edges.get(used).is_some_and(|back| back.contains(from)) {
                violations.push(format!("{from} and {used} use each other"));
            }
        }
    }
    violations
}

#[test]
fn no_code_is_unfinished_or_unsafe() {
    /// Files that need unsafe code, and why.
    const UNSAFE: &[(&str, &str)] =
        &[("tests/allocations.rs", "a counting allocator, which cannot be written without")];
    let mut violations = Vec::new();
    for source in sources("src").into_iter().chain(sources("crates")).chain(sources("tests")).chain(sources("build.rs"))
    {
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
    for source in sources("src").into_iter().chain(sources("crates")).chain(sources("tests")) {
        let allowed = LONGER.iter().find(|(path, _)| *path == source.path).map_or(MAX_LINES, |(_, lines)| *lines);
        let lines = source.lines().count();
        if lines > allowed {
            violations.push(format!("{}: {lines} lines, the limit is {allowed}", source.path));
        }
    }
    assert_none(&violations);
}
