//! Runs the targets of `scripts/fuzz` without coverage guidance: their seeds and some thousands of random inputs.
//!
//! Inputs that once made a target fail are in `tests/fuzz/found`. The name of each file begins with the name of its target;
//! these inputs are tried first.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "fuzz/targets/mod.rs"]
mod targets;

use std::{env, fs, path::Path};

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use targets::{TARGETS, Target};

/// The seed of the random inputs unless `FUZZ_SEED` is set.
const DEFAULT_SEED: u64 = 7541;

/// The input that is being tried. Prints it if the target panics.
struct RunningInput<'a> {
    target: &'static str,
    description: String,
    input: &'a [u8],
}

impl Drop for RunningInput<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("target {}, {}: {:02x?}", self.target, self.description, self.input);
        }
    }
}

fn run_one(target: &Target, description: String, input: &[u8]) {
    let running = RunningInput { target: target.name, description, input };
    (target.run)(running.input);
}

fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).map_or(default, |value| value.parse().expect("the variable is a number"))
}

/// Random bytes, or a seed in which some bytes are changed, removed or repeated.
fn random_input(rng: &mut SmallRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = vec![0; rng.random_range(0..600)];
    rng.fill_bytes(&mut input);
    if rng.random_bool(0.4) {
        return input;
    }
    let mut changed = seeds[rng.random_range(0..seeds.len())].clone();
    for byte in input.iter().take(rng.random_range(1..9)) {
        let at = rng.random_range(0..changed.len());
        match rng.random_range(0..4) {
            0 => changed[at] = *byte,
            1 => changed[at] ^= 1 << (byte & 7),
            2 => drop(changed.drain(at..changed.len().min(at + usize::from(*byte & 7)))),
            _ => changed.extend_from_within(at..),
        }
        changed.truncate(4096);
        if changed.is_empty() {
            return input;
        }
    }
    changed
}

fn saved_inputs() -> Vec<(String, Vec<u8>)> {
    let folder = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

fn run_target(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let (seed, cases) = (number("FUZZ_SEED", DEFAULT_SEED), number("FUZZ_CASES", 2000));
    println!("FUZZ_SEED={seed} FUZZ_CASES={cases}");
    let (mut rng, seeds) = (SmallRng::seed_from_u64(seed), (target.seeds)());
    for (file, input) in saved_inputs().iter().filter(|(file, _)| file.starts_with(name)) {
        run_one(target, file.clone(), input);
    }
    for (nth, seed) in seeds.iter().enumerate() {
        run_one(target, format!("seed {nth} of the target"), seed);
    }
    for nth in 0..cases {
        run_one(target, format!("case {nth} of FUZZ_SEED={seed}"), &random_input(&mut rng, &seeds));
    }
}

#[test]
fn frames() {
    run_target("frames");
}

#[test]
fn headers() {
    run_target("headers");
}

#[test]
fn encoder() {
    run_target("encoder");
}

#[test]
fn connection() {
    run_target("connection");
}

#[test]
fn database() {
    run_target("database");
}

#[test]
fn permissions() {
    run_target("permissions");
}

#[test]
fn tokens() {
    run_target("tokens");
}
