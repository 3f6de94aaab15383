//! What tests need beside the program under test: other servers and clients, and rights on this machine.
//!
//! A test asks for it with [`require`]. Where it is missing, the test is skipped: it says so on stderr, and appends a line to the
//! file that `METASTORE_TEST_SKIPS` names, which `scripts/test` prints at its end. `METASTORE_TEST_REQUIRE` lists what must be
//! there (`METASTORE_TEST_REQUIRE=etcd,go`): a test that would be skipped for lack of it fails instead.

use std::{
    collections::BTreeSet,
    env,
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
};

/// What tests may need: the words of `METASTORE_TEST_REQUIRE`, and how to get each.
const NEEDS: [(&str, &str); 11] = [
    ("curl", "install curl"),
    ("deploy", "run scripts/check-deploy --install; it says what else is missing"),
    ("etcd", "install Go, with which scripts/peers builds etcd 3.7, or name one in METASTORE_TEST_ETCD"),
    ("etcdctl", "install Go, with which scripts/peers builds etcdctl, or name one in METASTORE_TEST_ETCDCTL"),
    ("go", "install Go"),
    ("h2spec", "install Go, with which scripts/test builds h2spec, or name one in METASTORE_TEST_H2SPEC"),
    ("loop", "run the tests as root, where loop devices, mkfs.ext4 and fsfreeze exist"),
    ("netns", "run the tests where `unshare --net --map-root-user true` works"),
    ("nghttp2", "install nghttp and h2load (Debian's nghttp2-client)"),
    (
        "python",
        "install Python, for which scripts/test installs grpcio, h2 and etcd3gw, or name one in METASTORE_TEST_PYTHON",
    ),
    ("tmpfs", "run the tests as root, where a tmpfs can be mounted"),
];

/// Passes on what was found, or records that the calling test is skipped because `need` is missing; `Err` says why it is. The
/// test fails instead if `METASTORE_TEST_REQUIRE` names `need`.
#[track_caller]
pub fn require<T>(need: &str, found: Result<T, String>) -> Option<T> {
    let (_, remedy) = NEEDS.iter().find(|(name, _)| *name == need).expect("NEEDS lists everything that tests need");
    let list = env::var("METASTORE_TEST_REQUIRE").unwrap_or_default();
    let required = required(&list).unwrap_or_else(|error| panic!("{error}"));
    match found {
        Ok(found) => Some(found),
        Err(why) => {
            assert!(
                !required.contains(need),
                "METASTORE_TEST_REQUIRE requires {need}, which is missing: {why}. To get it, {remedy}"
            );
            record_skip(need, &why);
            None
        }
    }
}

fn required(list: &str) -> Result<BTreeSet<&str>, String> {
    let words: BTreeSet<&str> = list.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    let unknown: Vec<_> = words.iter().filter(|word| NEEDS.iter().all(|(name, _)| name != *word)).collect();
    if unknown.is_empty() {
        return Ok(words);
    }
    let allowed = NEEDS.map(|(name, _)| name).join(", ");
    Err(format!("METASTORE_TEST_REQUIRE contains {unknown:?}; allowed are: {allowed}"))
}

/// Written to stderr directly, because the test harness hides what passing tests print.
fn record_skip(need: &str, why: &str) {
    let program = env::current_exe().unwrap();
    let program = program.file_stem().unwrap_or_default().to_string_lossy();
    // Cargo appends a hash to the names of test programs, and the harness names a test's thread after it.
    let suite = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    let line = format!("{suite} {}: {need} is missing: {why}\n", thread::current().name().unwrap_or("unknown"));
    io::stderr().write_all(format!("skipped: {line}").as_bytes()).unwrap();
    if let Some(file) = env::var_os("METASTORE_TEST_SKIPS") {
        let mut file =
            OpenOptions::new().create(true).append(true).open(file).expect("METASTORE_TEST_SKIPS can be written");
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// A program in `PATH`.
pub fn installed(need: &str, program: &str) -> Option<PathBuf> {
    let places = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&places).map(|place| place.join(program)).find(|path| path.is_file());
    require(need, found.ok_or_else(|| format!("{program} is not in PATH")))
}

/// A real etcd 3.7.
pub fn etcd() -> Option<PathBuf> {
    let found = any_etcd().and_then(|(etcd, version)| {
        let is_same = version.starts_with("3.7.");
        is_same.then_some(etcd).ok_or_else(|| format!("there is only etcd {version}, which answers in other ways"))
    });
    require("etcd", found)
}

/// A real etcd of any version, and its version: the one that `METASTORE_TEST_ETCD` or `ETCD_BIN` names, or the one of
/// `scripts/peers`.
pub fn any_etcd() -> Result<(PathBuf, String), String> {
    let etcd = peer(&["METASTORE_TEST_ETCD", "ETCD_BIN"])?;
    let output = Command::new(&etcd).env_remove("ETCD_BIN").arg("--version").output();
    let output = output.map_err(|error| format!("{}: {error}", etcd.display()))?.stdout;
    let output = String::from_utf8_lossy(&output);
    let version = output.lines().next().and_then(|line| line.strip_prefix("etcd Version: "));
    let version = version.ok_or_else(|| format!("{} --version prints {output:?}", etcd.display()))?;
    Ok((etcd, version.to_owned()))
}

/// The stock `etcdctl`: the one that `METASTORE_TEST_ETCDCTL` or `ETCDCTL_BIN` names, or the one of `scripts/peers`.
pub fn etcdctl() -> Option<PathBuf> {
    require("etcdctl", peer(&["METASTORE_TEST_ETCDCTL", "ETCDCTL_BIN"]))
}

/// An `h2spec`, which tests servers of HTTP/2.
pub fn h2spec() -> Option<PathBuf> {
    require("h2spec", named_by(&["METASTORE_TEST_H2SPEC"]))
}

/// A Python interpreter with the packages grpcio, h2 and etcd3gw.
pub fn python() -> Option<PathBuf> {
    require("python", named_by(&["METASTORE_TEST_PYTHON"]))
}

/// The program that the first of these variables names which is set.
fn named_by(variables: &[&str]) -> Result<PathBuf, String> {
    let path = variables.iter().find_map(env::var_os).map(PathBuf::from);
    let path = path.ok_or_else(|| format!("{} is not set", variables.join(" or ")))?;
    // Otherwise a test that starts it would fail with an error that does not say which variable is wrong.
    assert!(path.is_file(), "{} names {}, which is not a file", variables.join(" or "), path.display());
    Ok(path)
}

/// The same, or the program that `scripts/peers` prints behind the last of these names.
fn peer(variables: &[&str]) -> Result<PathBuf, String> {
    named_by(variables).or_else(|_| {
        let printed = peers().as_ref().map_err(Clone::clone)?;
        let name = variables.last().expect("there is a name");
        let path = printed.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        path.map(PathBuf::from).ok_or_else(|| format!("scripts/peers does not print {name}"))
    })
}

/// What `scripts/peers` prints. It builds what is missing, which takes a minute.
fn peers() -> &'static Result<String, String> {
    static PRINTED: OnceLock<Result<String, String>> = OnceLock::new();
    PRINTED.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/peers");
        let output = Command::new(script).stderr(Stdio::inherit()).output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(format!("scripts/peers ended with {}", output.status));
        }
        String::from_utf8(output.stdout).map_err(|error| error.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_words_are_refused_with_a_list_of_the_known_ones() {
        assert_eq!(required("go, etcd,").unwrap(), BTreeSet::from(["etcd", "go"]));
        assert!(required("").unwrap().is_empty());
        let refusal = required("go,golang").unwrap_err();
        assert!(refusal.contains("[\"golang\"]") && refusal.contains("curl, deploy, etcd, etcdctl, go, h2spec"), "{refusal}");
    }

    /// Even if no test asks for anything.
    #[test]
    fn the_words_of_this_run_are_known() {
        assert_eq!(required(&env::var("METASTORE_TEST_REQUIRE").unwrap_or_default()).err(), None);
    }
}
