//! `metastore [serve]`: runs the server.

use std::{env, ffi::OsString, process::ExitCode};

use crate::{config, server};

pub fn run(arguments: &mut dyn Iterator<Item = OsString>) -> ExitCode {
    match config::from_process(arguments, env::vars_os()) {
        Ok(parsed) => parsed.start_logging().map_or_else(|code| code, |config| server::run(&config)),
        Err(exit) => exit.report(),
    }
}
