//! What is printed about the flags: the version, the help, and the table of the README, which a test holds to be this one.

use std::fmt::Write;

use super::{
    flags::{self, Flag, Kind, Status},
    gates,
};
use crate::version::ETCD_VERSION;

/// What stands below a wrong argument.
pub const SHORT: &str = "Usage:

  metastore [flags]
    Start a server.

  metastore bench [flags]
    Put load on any server that speaks etcd's protocol.

  metastore --version
    Show the version.

  metastore -h | --help
    Show all flags.

";

/// etcd's four lines, for programs that read them, and then ours. Nothing here was made by Go, and the lines say so.
#[must_use]
pub fn version() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: none (metastore)\nGo Version: none (Rust)\nGo OS/Arch: {}/{arch}\n\
         metastore Version: {}\n",
        std::env::consts::OS,
        env!("CARGO_PKG_VERSION"),
    )
}

/// Every flag, for people.
#[must_use]
pub fn list() -> String {
    let mut text = String::new();
    for (section, flags) in flags::SECTIONS {
        push(&mut text, format_args!("\n{section}:\n"));
        for flag in *flags {
            push(&mut text, format_args!("  --{} '{}'\n    {}{}\n", flag.name, flag.default, flag.help, state(flag)));
            if flag.kind == Kind::Gates {
                gates::names()
                    .for_each(|(name, open)| push(&mut text, format_args!("      {name} (default {open})\n")));
            }
        }
    }
    text
}

/// Every flag, as a table in Markdown.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::new();
    for (section, flags) in flags::SECTIONS {
        push(&mut text, format_args!("\n**{section}**\n\n| flag | default | meaning |\n| --- | --- | --- |\n"));
        for flag in *flags {
            let default = if flag.default.is_empty() { String::new() } else { format!("`{}`", flag.default) };
            push(&mut text, format_args!("| `--{}` | {default} | {}{} |\n", flag.name, flag.help, state(flag)));
        }
    }
    text
}

fn state(flag: &Flag) -> String {
    match flag.status {
        Status::Works => String::new(),
        Status::NotYet { lacks, .. } => format!(" Accepted, without effect: {lacks}."),
        Status::Refused(why) => format!(" Refused: {why}."),
    }
}

fn push(text: &mut String, more: std::fmt::Arguments<'_>) {
    text.write_fmt(more).expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_lines_of_the_version_are_etcds() {
        let version = version();
        let lines: Vec<_> = version.lines().collect();
        assert_eq!(lines[0], "etcd Version: 3.7.3");
        let starts = ["etcd Version: ", "Git SHA: ", "Go Version: ", "Go OS/Arch: linux/", "metastore Version: "];
        assert!(lines.len() == starts.len() && lines.iter().zip(starts).all(|(line, start)| line.starts_with(start)));
    }

    #[test]
    fn help_names_every_flag() {
        let list = list();
        for flag in flags::all() {
            assert!(list.contains(&format!("\n  --{} '", flag.name)), "{}", flag.name);
        }
    }

    #[test]
    fn the_readme_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- flags -->\n", "\n<!-- /flags -->");
        let (before, rest) = readme.split_once(begin).expect("the README marks where the table begins");
        let (table, after) = rest.split_once(end).expect("the README marks where the table ends");
        if std::env::var_os("WRITE_README").is_some() {
            std::fs::write(path, format!("{before}{begin}{}{end}{after}", markdown())).unwrap();
        } else {
            assert_eq!(table, markdown(), "run this test with WRITE_README=1 to write the table anew");
        }
    }
}
