//! Arguments in, exit code out.

use std::{env, process::ExitCode};

/// Chosen for its resident memory under load; see `bench/RESULTS.md`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    metastore::cli::run(env::args_os().skip(1))
}
