//! Network namespaces: a program in one of its own can use any port, whatever else runs on the machine.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use crate::{process::Process, requirements::require};

/// A program in a network namespace of its own, with only the loopback interface; `None` where there can be none.
pub fn command(program: &Path) -> Option<Command> {
    let works = isolated(Path::new("true")).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    let why = || "unshare --net --map-root-user does not work".to_owned();
    require("netns", works.then(|| isolated(program)).ok_or_else(why))
}

fn isolated(program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--net",
        "--map-root-user",
        "sh",
        "-c",
        "ip link set lo up && exec \"$0\"",
        program.to_str().unwrap(),
    ]);
    command
}

/// A program in the namespace of a process. (Before its first log line, that process may not be in its namespace yet.)
pub fn command_beside(process: &Process, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--preserve-credentials", "--user", "--net", "--target", &process.pid().to_string()]);
    command.arg(program);
    command
}
