//! The documentation lists exactly the metrics and environment variables that exist, its links resolve, and the README is short.
//! (A test in `config` checks the list of flags.)

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

use metastore::config::flags;

use crate::source::paths;

/// The pages with a list between markers, and the marker of each.
const METRICS_PAGE: (&str, &str) = ("docs/metrics.md", "metrics");
const ENVIRONMENT_PAGE: (&str, &str) = ("docs/environment.md", "environment");
const LIMITS_PAGE: (&str, &str) = ("docs/limits.md", "limits");

/// The files that define metrics, each with its help text.
const METRICS: [&str; 2] = ["src/metrics/mod.rs", "src/frontend/http/metrics_page.rs"];
/// The prefixes of metric names.
const PREFIXES: [&str; 5] = ["etcd_", "grpc_", "metastore_", "os_", "process_"];

/// Variables that are read but not meant to be set by users: Cargo's own in a build, and those that one script sets for another.
const PRIVATE: [&str; 6] =
    ["OUT_DIR", "CARGO_MANIFEST_DIR", "CARGO_PKG_VERSION", "WANT_PROTOC", "WANT_NGHTTP2", "FUZZ_SEEDS"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// A file of code on one line, so that arguments follow one another however the code is formatted.
fn read_on_one_line(path: &str) -> String {
    read(path).split_whitespace().collect::<Vec<_>>().join(" ").replace("( \"", "(\"")
}

/// A page, split at the markers around its list: the text before it, the list, the text after it.
fn split((page, mark): (&str, &str)) -> [String; 3] {
    let text = read(page);
    let (begin, end) = (format!("<!-- {mark} -->\n"), format!("<!-- /{mark} -->"));
    let (before, rest) = text.split_once(&begin).expect("the page marks where the list begins");
    let (list, after) = rest.split_once(&end).expect("the page marks where the list ends");
    [before.to_owned() + &begin, list.to_owned(), end + after]
}

/// The metrics that a file defines, each with its help text: two literals in a row, the first of which begins with one of
/// [`PREFIXES`].
fn metrics(text: &str) -> Vec<(&str, &str)> {
    let named = |call: &'_ str| PREFIXES.iter().any(|prefix| call.starts_with(prefix));
    let calls = text.split("(\"").filter(|call| named(call));
    calls.filter_map(|call| call.split_once("\", \"")).map(|(name, rest)| (name, until_quote(rest))).collect()
}

fn until_quote(text: &str) -> &str {
    text.split('"').next().expect("a split has a first part")
}

/// Every metric, as a table in Markdown.
fn table() -> String {
    let files = METRICS.map(read_on_one_line);
    let mut found: Vec<_> = files.iter().flat_map(|text| metrics(text)).collect();
    found.sort_unstable();
    assert!(found.windows(2).all(|pair| pair[0].0 != pair[1].0), "each metric is defined once");
    let rows = found.iter().map(|(name, help)| format!("| `{name}` | {help} |\n"));
    format!("\n| metric | meaning |\n| --- | --- |\n{}\n", rows.collect::<String>())
}

#[test]
fn every_metric_is_documented() {
    let [before, list, after] = split(METRICS_PAGE);
    if env::var_os("WRITE_DOCS").is_some() {
        fs::write(root().join(METRICS_PAGE.0), before + &table() + &after).unwrap();
    } else {
        assert_eq!(list, table(), "run this test with WRITE_DOCS=1 to update the table");
    }
}

/// The texts in backquotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// What is wrong with a row of the table of limits.
fn limit_errors(row: &str, metrics: &BTreeSet<&str>, code: &str) -> Vec<String> {
    let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
    let [what, flag, default, beyond, counted] = cells[..] else { return vec![format!("not five cells: {row}")] };
    let mut errors = Vec::new();
    let named = flag.strip_prefix("`--").and_then(|flag| flag.strip_suffix('`')).and_then(flags::find);
    match named {
        None => errors.push(format!("{what}: {flag} is no flag")),
        Some(flag) if format!("`{}`", flag.default) != default => {
            errors.push(format!("{what}: the default is {}, not {default}", flag.default));
        }
        Some(_) => (),
    }
    if beyond.is_empty() || quoted(counted).is_empty() {
        errors.push(format!("{what}: what happens, and what counts it?"));
    }
    for counter in quoted(counted) {
        // A reason is a literal where it is counted.
        let reason = counter.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        let exists = match reason {
            Some(reason) => code.contains(&format!("\"{}\"", reason.trim_start_matches("peer: "))),
            None => metrics.contains(counter),
        };
        if !exists {
            errors.push(format!("{what}: {counter} does not exist"));
        }
    }
    errors
}

#[test]
fn every_limit_has_a_flag_and_a_metric() {
    let [_, list, _] = split(LIMITS_PAGE);
    let files = METRICS.map(read_on_one_line);
    let metrics: BTreeSet<&str> = files.iter().flat_map(|text| metrics(text)).map(|(name, _)| name).collect();
    let code = ["src", "crates/http2/src"].map(|under| paths(&root().join(under))).concat();
    let code: String = code.iter().map(read).collect();
    let rows: Vec<&str> = list.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(rows.len() > 20, "{rows:?}");
    let errors: Vec<String> = rows.iter().flat_map(|row| limit_errors(row, &metrics, &code)).collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
fn errors_in_the_table_of_limits_are_found() {
    let metrics = BTreeSet::from(["etcd_x"]);
    let errors = |row| limit_errors(row, &metrics, r#"count("leases")"#);
    assert_eq!(errors("| leases | `--max-leases` | `10000000` | error | `{leases}`, `etcd_x` |"), [] as [&str; 0]);
    assert_eq!(
        errors("| leases | `--max-leases` | `1` | error | `{leases}` |"),
        ["leases: the default is 10000000, not `1`"]
    );
    assert_eq!(errors("| a | `--no` | `1` | error | `{leases}` |"), ["a: `--no` is no flag"]);
    assert_eq!(errors("| a | `--max-leases` | `10000000` | | |").len(), 1);
    assert_eq!(errors("| a | `--max-leases` | `10000000` | x | `{b}`, `etcd_y` |").len(), 2);
    assert_eq!(errors("| a | b |").len(), 1);
}

/// Variables that a script reads with a default value: `${NAME-`, `${NAME:-`.
fn read_by_script(text: &str) -> impl Iterator<Item = &str> {
    text.split("${").skip(1).filter_map(|rest| {
        let (name, rest) = rest.split_at(rest.find(|c| !is_variable_char(c)).unwrap_or(rest.len()));
        let is_name = name.starts_with(|first: char| first.is_ascii_uppercase());
        (is_name && (rest.starts_with('-') || rest.starts_with(":-"))).then_some(name)
    })
}

/// Variables that a program reads: literals in upper case with an underscore, in files that read variables. (etcd's variables
/// for flags are not found: they are all that begin with `ETCD_`, and no file that names one of them reads it by that name.)
fn read_by_program(text: &str) -> impl Iterator<Item = &str> {
    let reads = ["env::var(", "env::var_os"].iter().any(|call| text.contains(call));
    let literals = text.split('"').filter(|literal| literal.contains('_') && literal.chars().all(is_variable_char));
    literals.filter(move |_| reads)
}

fn is_variable_char(c: char) -> bool {
    c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'
}

fn variables() -> BTreeSet<String> {
    let owned = |names: &mut dyn Iterator<Item = &str>| names.map(str::to_owned).collect::<Vec<_>>();
    let scripts = fs::read_dir(root().join("scripts")).unwrap().map(|entry| entry.unwrap().path());
    let mut found: BTreeSet<String> = scripts.flat_map(|path| owned(&mut read_by_script(&read(path)))).collect();
    let programs = ["src", "crates", "tests", "build.rs"].map(|under| paths(&root().join(under)));
    let programs = programs.concat().into_iter().filter(|path: &PathBuf| !path.ends_with("tests/tidy/docs.rs"));
    found.extend(programs.flat_map(|path| owned(&mut read_by_program(&read(path)))));
    found.retain(|name| !PRIVATE.contains(&name.as_str()));
    found
}

#[test]
fn every_environment_variable_is_documented() {
    let [_, list, _] = split(ENVIRONMENT_PAGE);
    let rows = list.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let listed: Vec<String> = rows.map(|(name, _)| name.to_owned()).collect();
    let unique: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(unique.len(), listed.len(), "each is listed once");
    let found = variables();
    let (unlisted, unread): (Vec<_>, Vec<_>) =
        (found.difference(&unique).collect(), unique.difference(&found).collect());
    assert!(unlisted.is_empty() && unread.is_empty(), "not listed: {unlisted:?}; listed, but never read: {unread:?}");
}

#[test]
fn variables_and_metrics_are_found_in_text() {
    let script = "x=${A_B-} ${C:-$D} ${E_F} ${#G_H[@]} ${I_J+x} ${K2_L:-} ${1-}";
    assert_eq!(read_by_script(script).collect::<Vec<_>>(), ["A_B", "C", "K2_L"]);
    assert_eq!(read_by_program("env::var(\"A_B\"); f(\"C_D\", \"e_f\", \"G\")").collect::<Vec<_>>(), ["A_B", "C_D"]);
    assert_eq!(read_by_program("f(\"A_B\")").count(), 0);
    let source = "a: gauge(\"etcd_a\", \"Some (a).\"),\nb: calls(\"grpc_b\", \"B.\", &[\"To\"]), f(\"etcd_c\")";
    assert_eq!(metrics(source), [("etcd_a", "Some (a)."), ("grpc_b", "B.")]);
}

/// The README is what a newcomer reads: one to three screens.
#[test]
fn the_readme_is_short() {
    let lines = read("README.md").lines().count();
    assert!(lines <= 120, "{lines} lines");
}

/// All Markdown files of the repository, by their paths in it.
fn markdown() -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![root().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            let is_ours = !name.starts_with('.') && name != "target" && extension != "metastore";
            if is_ours && entry.file_type().unwrap().is_dir() {
                directories.push(path);
            } else if is_ours && extension == "md" {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// A text without its code: fenced blocks and spans between backticks.
fn without_code(text: &str) -> String {
    let mut is_fenced = false;
    let prose = text.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        is_fenced ^= is_fence;
        !is_fence && !is_fenced
    });
    prose.collect::<Vec<_>>().join("\n").split('`').step_by(2).collect::<Vec<_>>().join("code")
}

/// The targets of links, `[text](target)`.
fn links(text: &str) -> Vec<String> {
    let text = without_code(text);
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned()).collect()
}

/// The anchors of the headings of a page, as hosting sites make them: in lower case, without punctuation, with hyphens for spaces.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut is_fenced = false;
    let headings = text.lines().filter(|line| {
        is_fenced ^= line.trim_start().starts_with("```");
        !is_fenced && line.starts_with('#')
    });
    let anchor = |heading: &str| {
        let kept = heading.trim_start_matches('#').trim().chars();
        let kept = kept.filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect::<String>().to_lowercase()
    };
    headings.map(anchor).collect()
}

#[test]
fn relative_links_resolve() {
    let mut broken = Vec::new();
    for page in markdown() {
        for link in links(&read(&page)) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let here = Path::new(&page).parent().expect("a page is in a directory");
            let target = if path.is_empty() { root().join(&page) } else { root().join(here).join(path) };
            let has_anchor = || anchors(&fs::read_to_string(&target).unwrap()).contains(anchor);
            if !target.exists() || !anchor.is_empty() && !has_anchor() {
                broken.push(format!("{page}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn links_and_anchors_are_found_in_text() {
    let text =
        "# A `b` c: D-e!\n[x](y.md#z), `[no](link)` and [w](https://v)\n```\n# no heading [u](t)\n```\n## 5. É\n";
    assert_eq!(links(text), ["y.md#z", "https://v"]);
    assert_eq!(anchors(text).into_iter().collect::<Vec<_>>(), ["5-é", "a-b-c-d-e"]);
}
