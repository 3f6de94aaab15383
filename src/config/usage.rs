//! Texts about the flags: `--version`, `--help`, and the tables of `docs/flags.md`, which a test keeps up to date.

use std::fmt::Write;

use super::{
    flag::{Flag, Kind, Status},
    flags, gates,
};
use crate::version::ETCD_VERSION;

/// Printed with `--help`, and below the message about an invalid argument.
pub const USAGE: &str = "Usage:

  metastore [serve] [flags]
    Start a server.

  metastore bench [flags]
    Run a load generator against any server that speaks etcd's protocol.

  metastore --version
    Show the version.

  metastore -h | --help
    Show all flags.

";

/// etcd's four lines, for programs that parse them, then one for metastore. There is no Go version, and the line says so.
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

/// All flags, as text.
#[must_use]
pub fn help() -> String {
    let mut text = String::new();
    for (section, flags) in flags::SECTIONS {
        push(&mut text, format_args!("\n{section}:\n"));
        for flag in *flags {
            push(
                &mut text,
                format_args!("  --{} '{}'\n    {}{}\n", flag.name, flag.default, flag.help, status_note(flag)),
            );
            if flag.kind == Kind::Gates {
                gates::names()
                    .for_each(|(name, enabled)| push(&mut text, format_args!("      {name} (default {enabled})\n")));
            }
        }
    }
    text
}

/// All flags, as Markdown tables for `docs/flags.md`.
#[must_use]
pub fn flag_table() -> String {
    let mut text = String::new();
    for (section, flags) in flags::SECTIONS {
        push(&mut text, format_args!("\n**{section}**\n\n| flag | default | meaning |\n| --- | --- | --- |\n"));
        for flag in *flags {
            let default = if flag.default.is_empty() { String::new() } else { format!("`{}`", flag.default) };
            push(&mut text, format_args!("| `--{}` | {default} | {}{} |\n", flag.name, flag.help, status_note(flag)));
        }
    }
    text
}

fn status_note(flag: &Flag) -> String {
    match flag.status {
        Status::Supported => String::new(),
        Status::NoEffect(reason) => format!(" Accepted, without effect: {reason}."),
        Status::Refused(why) => format!(" Refused: {why}."),
    }
}

fn push(text: &mut String, more: std::fmt::Arguments<'_>) {
    text.write_fmt(more).expect("writing to a string cannot fail");
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
    fn help_lists_every_flag() {
        let help = help();
        for flag in flags::all() {
            assert!(help.contains(&format!("\n  --{} '", flag.name)), "{}", flag.name);
        }
    }

    #[test]
    fn every_flag_is_documented() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/flags.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- flags -->\n", "\n<!-- /flags -->");
        let (before, rest) = page.split_once(begin).expect("the page has a marker where the tables begin");
        let (table, after) = rest.split_once(end).expect("the page has a marker where the tables end");
        if std::env::var_os("WRITE_DOCS").is_some() {
            std::fs::write(path, format!("{before}{begin}{}{end}{after}", flag_table())).unwrap();
        } else {
            assert_eq!(table, flag_table(), "run this test with WRITE_DOCS=1 to regenerate the tables");
        }
    }
}
