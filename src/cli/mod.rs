//! The subcommands: a thin module each. Without one, the server runs.

#[cfg(feature = "bench")]
pub mod bench;
mod serve;

use std::{
    ffi::{OsStr, OsString},
    process::ExitCode,
};

/// Runs one subcommand with the arguments behind its name.
type Run = fn(&mut dyn Iterator<Item = OsString>) -> ExitCode;

#[cfg(feature = "bench")]
const BENCH: Run = |arguments| bench::run(arguments);
#[cfg(not(feature = "bench"))]
const BENCH: Run = |_| {
    eprintln!("metastore bench: this build does not contain the load generator; build with --features bench");
    ExitCode::from(2)
};

const SUBCOMMANDS: &[(&str, Run)] = &[("serve", serve::run), ("bench", BENCH)];

/// Runs the subcommand that the first argument names, or the server if it names none.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.peekable();
    let named = |argument: &OsStr| SUBCOMMANDS.iter().find(|(name, _)| argument == *name).map(|(_, run)| *run);
    match arguments.peek().and_then(|argument| named(argument)) {
        Some(run) => run(&mut arguments.skip(1)),
        None => serve::run(&mut arguments),
    }
}
