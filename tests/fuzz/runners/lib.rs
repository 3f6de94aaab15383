//! The targets, as the programs beside this file run them under libFuzzer.

use std::{env, fs, path::Path};

#[path = "../targets/mod.rs"]
mod targets;

pub use targets::*;

/// Before a target is run: its seeds are written where `scripts/fuzz` wants them, a file each.
pub fn begin(name: &str) {
    let Some(folder) = env::var_os("FUZZ_SEEDS") else { return };
    let target = TARGETS.iter().find(|target| target.name == name).expect("each program has its target");
    for (nth, seed) in (target.seeds)().iter().enumerate() {
        fs::write(Path::new(&folder).join(format!("seed-{nth}")), seed).expect("the folder of seeds can be written to");
    }
}
