//! The steps of etcd's guide to authentication, typed with etcdctl at both servers: the answers are the same.

use std::{path::Path, process::Command};

use test_support::{
    Server, program,
    requirements::{etcd, etcdctl},
};

/// Flags and commands; every step is made with the outcome of those before it.
const STEPS: &[&str] = &[
    "user list",
    "auth status",
    "user add root:pw",
    "user add root:pw",
    "user get root",
    "auth enable", // etcdctl adds the role root, and grants it.
    "auth status",
    "--user root:pw auth status",
    "user list",
    "--user root:wrong user list",
    "--user nobody:pw user list",
    "--user root:pw user list",
    "--user root:pw role list",
    "--user root:pw user add ann:newpass",
    "--user root:pw user add bob --no-password",
    "--user root:pw user list",
    "--user root:pw role add reader",
    "--user root:pw role add reader",
    "--user root:pw role grant-permission reader read foo",
    "--user root:pw role grant-permission reader read --prefix list/",
    "--user root:pw role grant-permission reader readwrite k1 k5",
    "--user root:pw role grant-permission reader write m --from-key",
    "--user root:pw role grant-permission nobody read foo",
    "--user root:pw role get reader",
    "--user root:pw role get nobody",
    "--user root:pw role get root",
    "--user root:pw user grant-role ann reader",
    "--user root:pw user grant-role ann reader",
    "--user root:pw user grant-role ann nobody",
    "--user root:pw user get ann",
    "--user root:pw user get ann --detail",
    "--user ann:newpass user get ann",
    "--user ann:newpass user get root",
    "--user ann:newpass role get reader",
    "--user ann:newpass role get root",
    "--user ann:newpass user list",
    "--user root:pw put foo bar",
    "put foo bar",
    "get foo",
    "--user ann:newpass get foo",
    "--user ann:newpass put foo x",
    "--user ann:newpass get fo",
    "--user ann:newpass put k3 1",
    "--user ann:newpass put k5 1",
    "--user ann:newpass get k1 k5",
    "--user ann:newpass get k1 k6",
    "--user ann:newpass del k1 k5 --prev-kv",
    "--user ann:newpass put m 1 --prev-kv",
    "--user ann:newpass put zzz 1",
    "--user ann:newpass get --prefix list/",
    "--user ann:newpass get --prefix \"\"",
    "--user ann:newpass watch foo --rev 1 --max-events-missing",
    "--user ann:newpass lease grant 100",
    "lease grant 100",
    "--user ann:newpass lease list",
    "--user ann:newpass compact 1",
    "--user ann:newpass member list",
    "member list",
    "--user ann:newpass alarm list",
    "--user ann:newpass alarm disarm",
    "--user ann:newpass defrag",
    "--user bob:pw get foo",
    "--user root:pw role revoke-permission reader foo",
    "--user root:pw role revoke-permission reader foo",
    "--user ann:newpass get foo",
    "--user root:pw user revoke-role ann reader",
    "--user root:pw user revoke-role ann reader",
    "--user ann:newpass get --prefix list/",
    "--user root:pw user revoke-role root root",
    "--user root:pw user delete root",
    "--user root:pw role delete root",
    "--user root:pw role delete reader",
    "--user root:pw user delete ann",
    "--user ann:newpass get foo",
    "--user root:pw auth disable",
    "auth status",
    "get foo",
    "user list",
    "user delete root",
];

/// What etcdctl prints, and its exit code.
fn answer(etcdctl: &Path, server: &Server, step: &str) -> String {
    let words = step.split(' ').filter(|word| !word.is_empty()).map(|word| if word == "\"\"" { "" } else { word });
    let ran = Command::new(etcdctl).arg(format!("--endpoints={}", server.url())).args(words).output().unwrap();
    // Log lines have times and addresses.
    let stderr = String::from_utf8_lossy(&ran.stderr)
        .lines()
        .filter(|line| !line.starts_with('{'))
        .collect::<Vec<_>>()
        .join("\n");
    let stdout = String::from_utf8_lossy(&ran.stdout).into_owned();
    let text = format!("{stdout} {stderr}").replace(&server.url(), "URL");
    let words = text.split_whitespace().map(|word| match word {
        // Leases get IDs that differ, and durations do.
        id if id.len() == 16 && id.chars().all(|c| c.is_ascii_hexdigit()) => "ID",
        took if took.ends_with("ms.") || took.ends_with("µs.") => "TIME",
        other => other,
    });
    format!("{:?} {}", ran.status.code(), words.collect::<Vec<_>>().join(" "))
}

#[test]
fn the_guide_to_authentication_works_as_with_etcd() {
    let (Some(etcd), Some(etcdctl)) = (etcd(), etcdctl()) else { return };
    let start = |program: &Path| Server::start_program(program, &["--bcrypt-cost=4"]);
    let (ours, theirs) = (start(&program()), start(&etcd));
    let mut differences = Vec::new();
    for step in STEPS {
        let (ours, theirs) = (answer(&etcdctl, &ours, step), answer(&etcdctl, &theirs, step));
        if ours != theirs {
            differences.push(format!("etcdctl {step}\n  ours:  {ours}\n  etcd:  {theirs}"));
        }
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}
