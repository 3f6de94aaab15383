//! A load generator for any server that implements etcd's API.
//!
//! It is a client and uses nothing of the server but the messages in `proto`, so metastore and etcd are measured in exactly
//! the same way.
//!
//! ```text
//!   arguments ──▶ plan ──▶ runner ──▶ worker (a thread, its own runtime) ──▶ callers ──▶ connections
//!   command       checked     │  one phase at a time:                          │
//!   line          plan        │  fill, warm up, measure                        ├ kv       put, get, list, swap
//!                             │                                                ├ lease    keep-alive streams
//!                             ◀── tally of each worker, merged ◀───────────────┴ watch    streams of events
//!                             │
//!                          report ──▶ text, or a line of JSON ──▶ compare: two servers, medians, ratios
//! ```
//!
//! A worker owns its connections, its callers and its histogram, so a call takes no lock and wakes no other thread. Phases
//! do not overlap: every call of a phase is answered before the next phase begins, so the server's CPU time between two
//! readings belongs to exactly the calls that are counted.
//!
//! INVARIANTS
//! * With a rate, latency is measured from the time at which the call was due, not from when a busy caller started it.
//! * A failed call is counted as a failure, never as a fast answer, and the exit code reports it.
//! * Responses are verified: a missing key, a short list, an expired lease and a lost event are failures too.

#![allow(clippy::disallowed_methods, reason = "a load generator measures with the clock")]

mod arguments;
mod compare;
mod connections;
mod keys;
mod kv;
mod lease;
mod measure;
mod plan;
mod process;
mod progress;
mod ready;
mod report;
mod runner;
mod schedule;
mod watch;
mod worker;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use arguments::{Arguments, Command};

/// Runs `metastore bench`; `args` are the arguments after `bench`. The exit code is 2 for invalid options, 1 for failures.
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(std::iter::once(OsString::from("metastore bench")).chain(args)) {
        Ok(arguments) => arguments,
        Err(refusal) => {
            let code = if refusal.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
            // An error here means that the terminal is gone.
            let _ = refusal.print();
            return code;
        }
    };
    match execute(arguments.command) {
        Ok(code) => code,
        Err(BenchError::Usage(message)) => exit_with_error(&message, 2),
        Err(BenchError::Run(message)) => exit_with_error(&message, 1),
    }
}

/// Why there is no report.
enum BenchError {
    /// Invalid options.
    Usage(String),
    /// The run failed.
    Run(String),
}

fn execute(command: Command) -> Result<ExitCode, BenchError> {
    match command {
        Command::Ready(arguments) => ready::wait(&arguments).map_err(BenchError::Run).map(|()| ExitCode::SUCCESS),
        Command::Compare(arguments) => {
            let table = compare::table(&arguments).map_err(BenchError::Run)?;
            print!("{table}");
            Ok(ExitCode::SUCCESS)
        }
        Command::Run(asked) => {
            let plan = plan::Plan::resolve(asked).map_err(BenchError::Usage)?;
            let report = runner::run_plan(&plan).map_err(BenchError::Run)?;
            if plan.json {
                println!("{}", report.json());
            } else {
                print!("{}", report.text());
            }
            Ok(if report.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn exit_with_error(message: &str, code: u8) -> ExitCode {
    eprintln!("metastore bench: {message}");
    ExitCode::from(code)
}
