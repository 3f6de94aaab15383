//! The targets of `scripts/fuzz`, without coverage to guide them: their seeds, and some thousands of inputs made by chance.
//! Inputs that once broke a promise lie in `tests/fuzz/found`, each named after its target, and are tried first.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "fuzz/targets/mod.rs"]
mod targets;

use std::{env, fs, path::Path};

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use targets::{TARGETS, Target};

/// What chance begins with, unless it is said otherwise.
const SEED: u64 = 7541;

/// An input that is being tried. If that panics, it tells what it was.
struct Trial<'a> {
    target: &'static str,
    what: String,
    input: &'a [u8],
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("target {}, {}: {:02x?}", self.target, self.what, self.input);
        }
    }
}

fn try_one(target: &Target, what: String, input: &[u8]) {
    let trial = Trial { target: target.name, what, input };
    (target.run)(trial.input);
}

fn number(variable: &str, default: u64) -> u64 {
    env::var(variable).map_or(default, |value| value.parse().expect("the variable is a number"))
}

/// Bytes of no meaning, or a seed of which some are changed, left out, or said again.
fn input(chance: &mut SmallRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut input = vec![0; chance.random_range(0..600)];
    chance.fill_bytes(&mut input);
    if chance.random_bool(0.4) {
        return input;
    }
    let mut changed = seeds[chance.random_range(0..seeds.len())].clone();
    for byte in input.iter().take(chance.random_range(1..9)) {
        let at = chance.random_range(0..changed.len());
        match chance.random_range(0..4) {
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

fn found() -> Vec<(String, Vec<u8>)> {
    let folder = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    paths.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

fn by_chance(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let (seed, cases) = (number("FUZZ_SEED", SEED), number("FUZZ_CASES", 2000));
    println!("FUZZ_SEED={seed} FUZZ_CASES={cases}");
    let (mut chance, seeds) = (SmallRng::seed_from_u64(seed), (target.seeds)());
    for (file, input) in found().iter().filter(|(file, _)| file.starts_with(name)) {
        try_one(target, file.clone(), input);
    }
    for (nth, seed) in seeds.iter().enumerate() {
        try_one(target, format!("its seed {nth}"), seed);
    }
    for nth in 0..cases {
        try_one(target, format!("case {nth} of FUZZ_SEED={seed}"), &input(&mut chance, &seeds));
    }
}

#[test]
fn frames() {
    by_chance("frames");
}

#[test]
fn headers() {
    by_chance("headers");
}

#[test]
fn encoder() {
    by_chance("encoder");
}

#[test]
fn connection() {
    by_chance("connection");
}
