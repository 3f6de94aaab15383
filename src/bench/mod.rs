//! A load generator for anything that speaks etcd's API.
//!
//! It stands beside the floors of the house: of all the rest it knows only the messages in `proto`, so what it says about
//! this server it says about etcd by the same means.
//!
//! ```text
//!   arguments ──▶ plan ──▶ conductor ──▶ worker (a thread, its own runtime) ──▶ callers ──▶ connections
//!   what was      what it     │  one phase at a time:                             │
//!   typed         means       │  fill, warm up, measure                           ├ kv       put, get, list, swap
//!                             │                                                   ├ lease    keep-alive streams
//!                             ◀── tally of each worker, merged ◀──────────────────┴ watch    streams of events
//!                             │
//!                          report ──▶ text, or a line of JSON ──▶ compare: two servers, medians, ratios
//! ```
//!
//! A worker owns its connections, its callers and its histogram, so a call takes no lock and wakes no other thread. Phases
//! do not overlap: every call of one is answered before the next begins, so the server's CPU time between two readings
//! belongs to exactly the calls that are counted.
//!
//! INVARIANTS
//! * With a rate, a latency counts from the moment at which the call was due, not from when a busy caller got round to it.
//! * A call that failed is counted as a failure, never as a fast answer, and the exit code says so.
//! * An answer is looked at: a missing key, a short list, an expired lease and a lost event are failures too.

#![allow(clippy::disallowed_methods, reason = "a load generator measures with the clock")]

mod arguments;
mod compare;
mod conductor;
mod keys;
mod kv;
mod lease;
mod measure;
mod plan;
mod process;
mod progress;
mod ready;
mod report;
mod schedule;
mod watch;
mod wire;
mod worker;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use arguments::{Arguments, Command};

/// Runs `metastore bench`; `args` are what follows the word `bench`. Exits with 2 for bad options, 1 if anything failed.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(std::iter::once(OsString::from("metastore bench")).chain(args)) {
        Ok(arguments) => arguments,
        Err(refusal) => {
            let code = if refusal.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
            // Nobody is left to be told when the terminal itself is gone.
            let _ = refusal.print();
            return code;
        }
    };
    match execute(arguments.command) {
        Ok(code) => code,
        Err(Failed::Usage(message)) => complain(&message, 2),
        Err(Failed::Run(message)) => complain(&message, 1),
    }
}

/// Why there is nothing to report.
enum Failed {
    /// The options contradict each other.
    Usage(String),
    /// The world did not cooperate.
    Run(String),
}

fn execute(command: Command) -> Result<ExitCode, Failed> {
    match command {
        Command::Ready(arguments) => ready::wait(&arguments).map_err(Failed::Run).map(|()| ExitCode::SUCCESS),
        Command::Compare(arguments) => {
            let table = compare::table(&arguments).map_err(Failed::Run)?;
            print!("{table}");
            Ok(ExitCode::SUCCESS)
        }
        Command::Run(asked) => {
            let plan = plan::Plan::resolve(asked).map_err(Failed::Usage)?;
            let report = conductor::conduct(&plan).map_err(Failed::Run)?;
            if plan.json {
                println!("{}", report.json());
            } else {
                print!("{}", report.text());
            }
            Ok(if report.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn complain(message: &str, code: u8) -> ExitCode {
    eprintln!("metastore bench: {message}");
    ExitCode::from(code)
}
