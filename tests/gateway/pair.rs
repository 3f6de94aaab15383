//! The same requests to our server and to a real etcd.

use std::{collections::BTreeSet, fmt::Write};

use crate::{
    client::{Answer, Headers, request},
    support::{Server, eventually, program, requirements, time_limit},
};

/// Both servers, started empty with the same names.
pub struct Pair {
    pub ours: Server,
    pub etcd: Server,
    /// The paths that were requested.
    pub asked: BTreeSet<String>,
    differences: String,
}

/// Fields whose values depend on the storage, the log, the time or chance.
const INCOMPARABLE: [&str; 7] =
    ["dbSize", "dbSizeInUse", "raftIndex", "raftAppliedIndex", "dbSizeQuota", "token", "raft_term"];

impl Pair {
    /// None if there is no etcd.
    pub fn start(arguments: &[&str]) -> Option<Self> {
        let etcd = requirements::etcd()?;
        let arguments = [&["--unsafe-no-fsync", "--bcrypt-cost=4"], arguments].concat();
        let [ours, etcd] = [program(), etcd].map(|program| Server::start_program(&program, &arguments));
        for server in [&ours, &etcd] {
            // It is set shortly after a server begins to serve.
            eventually("the storage version is set", time_limit(), || {
                let answer = request(server.address(), "POST", "/v3/maintenance/status", &[], b"");
                if answer.body.contains("\"storageVersion\":\"3.7.0\"") { Ok(()) } else { Err(answer.body) }
            });
        }
        Some(Self { ours, etcd, asked: BTreeSet::new(), differences: String::new() })
    }

    /// Posts a body to both, and notes whether they answer differently. Returns our answer.
    pub fn post(&mut self, path: &str, headers: Headers<'_>, body: &[u8]) -> Answer {
        self.post_masked(path, headers, body, &[])
    }

    /// The same, where fields with these names may have any value.
    pub fn post_masked(&mut self, path: &str, headers: Headers<'_>, body: &[u8], masked: &[&str]) -> Answer {
        self.request("POST", path, headers, body, masked)
    }

    pub fn request(&mut self, method: &str, path: &str, headers: Headers<'_>, body: &[u8], masked: &[&str]) -> Answer {
        self.asked.insert(path.to_owned());
        let [ours, theirs] =
            [&self.ours, &self.etcd].map(|server| request(server.address(), method, path, headers, body));
        let comparable = |answer: &Answer| Answer { body: comparable(&answer.body, masked), ..answer.clone() };
        if comparable(&ours) != comparable(&theirs) {
            let shown: String = String::from_utf8_lossy(body).chars().take(600).collect();
            let [ours, theirs] =
                [&ours, &theirs].map(|answer| format!("{answer:?}").chars().take(900).collect::<String>());
            writeln!(self.differences, "{method} {path} {headers:?}\n  {shown:?}\n  ours: {ours}\n  etcd: {theirs}\n")
                .unwrap();
        }
        ours
    }

    /// Notes a difference that was found in another way.
    pub fn compare<T: std::fmt::Debug + PartialEq>(&mut self, what: &str, ours: T, theirs: T) {
        if ours != theirs {
            writeln!(self.differences, "{what}\n  ours: {ours:?}\n  etcd: {theirs:?}\n").unwrap();
        }
    }

    /// Fails if there were differences.
    pub fn finish(self) {
        assert!(self.differences.is_empty(), "the answers differ:\n\n{}", self.differences);
    }
}

/// A body without insignificant space and without what cannot be compared.
pub fn comparable(body: &str, masked: &[&str]) -> String {
    // protojson puts one of two kinds of space into its texts, depending on the build.
    let mut out = compact(body).replace('\u{a0}', " ");
    for name in INCOMPARABLE.iter().chain(masked) {
        let key = format!("\"{name}\":");
        let mut from = 0;
        while let Some(found) = out[from..].find(&key) {
            let start = from + found + key.len();
            let length = out[start..].find([',', '}', ']']).unwrap_or(out.len() - start);
            out.replace_range(start..start + length, "?");
            from = start;
        }
    }
    out
}

/// JSON without space between its parts.
fn compact(body: &str) -> String {
    let (mut out, mut is_in_string, mut is_escaped) = (String::new(), false, false);
    for char in body.chars() {
        if is_in_string || !matches!(char, ' ') {
            out.push(char);
        }
        match char {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = is_in_string,
            '"' => is_in_string = !is_in_string,
            _ => (),
        }
    }
    out
}

#[test]
fn only_what_cannot_be_compared_is_masked() {
    let body = "{\"a b\": 1, \"token\":\"x\",\"c\":{\"dbSize\":\"5\"}}";
    assert_eq!(comparable(body, &["c"]), "{\"a b\":1,\"token\":?,\"c\":?}}");
    assert_eq!(comparable(body, &[]), "{\"a b\":1,\"token\":?,\"c\":{\"dbSize\":?}}");
}
