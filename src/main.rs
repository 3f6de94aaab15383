//! Selects the subcommand, runs it, and returns its exit code.

use std::{env, process::ExitCode};

/// Chosen for its resident memory under load; see `bench/RESULTS.md`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1).peekable();
    if arguments.next_if(|argument| argument == "bench").is_some() {
        return metastore::bench::run(arguments);
    }
    match metastore::config::from_process(arguments, env::vars_os()) {
        Ok(parsed) => parsed.start_logging().map_or_else(|code| code, |config| metastore::server::run(&config)),
        Err(exit) => exit.report(),
    }
}
