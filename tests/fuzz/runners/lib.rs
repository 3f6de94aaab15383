//! The targets, as the binaries in this directory run them under libFuzzer.

use std::{env, fs, path::Path};

#[path = "../targets/mod.rs"]
mod targets;

pub use targets::*;

/// Called before a target runs: writes its seeds to the directory that `scripts/fuzz` names, one file each.
pub fn begin(name: &str) {
    let Some(directory) = env::var_os("FUZZ_SEEDS") else { return };
    let target = TARGETS.iter().find(|target| target.name == name).expect("each binary is named after its target");
    for (nth, seed) in (target.seeds)().iter().enumerate() {
        fs::write(Path::new(&directory).join(format!("seed-{nth}")), seed).expect("the directory of seeds is writable");
    }
}
