//! Arguments in, exit code out.

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    let mut args = env::args_os().skip(1);
    match args.next() {
        Some(word) if word == "bench" => metastore::bench::run(args),
        _ => {
            eprintln!("usage: metastore bench WORKLOAD");
            ExitCode::from(2)
        }
    }
}
