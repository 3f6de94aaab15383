//! The stock `etcdctl`.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use crate::support::{Server, requirements::etcdctl};

struct Etcdctl {
    binary: PathBuf,
    server: Server,
}

/// Runs a command against a server, with this standard input.
pub fn output(etcdctl: &Path, server: &Server, command: &str, input: &str) -> Output {
    let mut child = Command::new(etcdctl)
        .args(["--endpoints", server.address()])
        .args(command.split_whitespace())
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

impl Etcdctl {
    fn start() -> Option<Self> {
        Some(Self { binary: etcdctl()?, server: Server::start(&[]) })
    }

    fn output(&self, command: &str, input: &str) -> Output {
        output(&self.binary, &self.server, command, input)
    }

    /// The output of a command, which must succeed.
    #[track_caller]
    fn run(&self, command: &str) -> String {
        self.run_with(command, "")
    }

    #[track_caller]
    fn run_with(&self, command: &str, input: &str) -> String {
        let output = self.output(command, input);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The error output of a command, which must fail.
    #[track_caller]
    fn fail(&self, command: &str) -> String {
        let output = self.output(command, "");
        assert!(!output.status.success(), "{command} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn etcdctl_works_with_keys() {
    let Some(etcdctl) = Etcdctl::start() else { return };
    assert_eq!(etcdctl.run("put a 1"), "OK\n");
    assert_eq!(etcdctl.run("put a 2 --prev-kv"), "OK\na\n1\n");
    assert_eq!(etcdctl.run("put b 1"), "OK\n");
    assert_eq!(etcdctl.run("get a"), "a\n2\n");
    assert_eq!(etcdctl.run("get a --rev 2 --print-value-only"), "1\n");
    assert_eq!(etcdctl.run("get --from-key a --keys-only"), "a\n\nb\n\n");
    assert_eq!(etcdctl.run("get --prefix a --stream"), "a\n2\n");
    assert_eq!(etcdctl.run("get a z --order=DESCEND --limit=1"), "b\n1\n");
    let fields = etcdctl.run("get a z --count-only -w fields");
    assert!(fields.contains("\"Count\" : 2") && fields.contains("\"Revision\" : 4"), "{fields}");
    assert!(etcdctl.fail("get a --rev 99").contains("required revision is a future revision"));
    assert!(etcdctl.fail("put x 1 --lease=404").contains("requested lease not found"));
    assert_eq!(etcdctl.run("del a b"), "1\n");
    let txn = "mod(\"b\") > \"0\"\n\nput c 1\nget c\n\ndel b\n\n";
    assert_eq!(etcdctl.run_with("txn", txn), "SUCCESS\n\nOK\n\nc\n1\n");
    assert_eq!(etcdctl.run("compact 4 --physical"), "compacted revision 4\n");
    assert!(etcdctl.fail("compact 4").contains("required revision has been compacted"));
}

#[test]
fn etcdctl_maintains_a_member() {
    let Some(etcdctl) = Etcdctl::start() else { return };
    etcdctl.run("put foo bar");
    assert!(etcdctl.output("endpoint health", "").status.success());
    let status = etcdctl.run("endpoint status");
    assert!(status.contains(", 3.7.3, 3.7.0, ") && status.contains(", true, false, 2, "), "{status}");
    assert!(etcdctl.run("endpoint hashkv").contains(", 3305255506"));
    let members = etcdctl.run("member list");
    assert!(members.ends_with(", started, one, http://127.0.0.1:2380, http://127.0.0.1:2379, false\n"), "{members}");
    assert!(etcdctl.run("defrag").starts_with("Finished defragmenting etcd member"));
    assert_eq!(etcdctl.run("alarm list"), "");
    let member = members.split(',').next().unwrap();
    assert_eq!(etcdctl.run("alarm disarm"), "");
    let moved = etcdctl.output(&format!("move-leader {member}"), "");
    let output = format!("{}{}", String::from_utf8_lossy(&moved.stdout), String::from_utf8_lossy(&moved.stderr));
    assert!(output.contains(member), "{output}");
}
