//! Crashes: at each operation of a step, and again and again in a long life. All of it on files that keep the contract, and on the
//! operating system's type of file.

use std::panic;

use metastore::error::Halt;
use metastore::node::log::lossy::Loss;
use metastore::node::log::volatile::VolatileLog;
use metastore::node::log::{FileSystem, Group, LogStore, Recovered};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::ground::{
    CONTRACT, Ground, IDENTITY, OS_FILES, START, Step, Terms, a_varied_life_on, at, entry, expected, group, hard_state,
};

/// What a log held when it was opened after a crash, and what it took then, must survive a power cut: what was only in the
/// page cache must have become durable.
fn survives_another_crash(ground: &Ground, recovered: &Recovered) {
    let (mut log, ..) = ground.open().unwrap();
    let next = recovered.last_index() + 1;
    log.append(&group(next, next, 90, 10)).unwrap();
    drop(log);
    ground.files.crash(Loss::Unsynced).unwrap();
    let mut again = ground.open().unwrap().1;
    assert_eq!(again.entries.pop(), Some(entry(next, 90, 10)));
    assert_eq!(again, *recovered);
}

/// Breaks the disk at each operation that the last of `steps` needs, and crashes in several ways.
fn crash_at_each_operation(terms: Terms, steps: &[Step]) {
    let (last, before) = steps.split_last().unwrap();
    let states = [expected(before), expected(steps)];
    for operation in 1.. {
        for loss in [Loss::Nothing, Loss::Unsynced].into_iter().chain((0..12).map(Loss::Parts)) {
            let ground = Ground::on(terms);
            ground.take(before);
            let (mut log, ..) = ground.open().unwrap();
            ground.files.fail_at(operation);
            let outcome = last.take(&mut log);
            let done = outcome.is_ok();
            drop(log);
            ground.files.crash(loss).unwrap();
            let (_, recovered, _) = ground.open().unwrap_or_else(|halt| panic!("{operation} {loss:?}: {halt}"));
            let allowed = if done { &states[1..] } else { &states[..] };
            assert!(allowed.contains(&recovered), "{operation} {loss:?}: {recovered:?}");
            survives_another_crash(&ground, &recovered);
            if done && loss == Loss::Parts(11) {
                assert!(operation > 2, "the step was to need several operations");
                return;
            }
        }
    }
}

const BOTH: [Terms; 2] = [CONTRACT, OS_FILES];

#[test]
fn a_crash_at_any_step_of_a_rotation_leaves_the_log_before_or_after() {
    for terms in BOTH {
        let steps: Vec<_> = (4..=40).map(|index| Step::Append(terms.group(index, index, 1, 100))).collect();
        let rotates = |steps: &[Step]| {
            let ground = Ground::on(terms);
            ground.take(steps);
            ground.named("segment").len() == 2
        };
        let first = (1..steps.len()).find(|count| rotates(&steps[..*count])).unwrap();
        crash_at_each_operation(terms, &steps[..first]);
    }
}

#[test]
fn a_crash_at_any_step_of_an_oversized_group_leaves_the_log_before_or_after() {
    for terms in BOTH {
        let [first, oversized] = [terms.group(4, 8, 1, 100), terms.group(7, 12, 2, 1500)];
        crash_at_each_operation(terms, &[Step::Append(first), Step::Append(oversized)]);
    }
}

#[test]
fn a_crash_at_any_step_of_a_cut_leaves_the_log_before_or_after() {
    for terms in BOTH {
        let mut steps = a_varied_life_on(terms);
        steps.push(Step::Cut(at(28, 4)));
        crash_at_each_operation(terms, &steps);
    }
}

#[test]
fn a_crash_at_any_step_of_a_reset_leaves_the_log_before_or_after() {
    for terms in BOTH {
        let mut steps = a_varied_life_on(terms);
        steps.push(Step::Installing(Some(at(90, 5))));
        steps.push(Step::Reset(at(90, 5), hard_state(5, 90)));
        crash_at_each_operation(terms, &steps);
    }
}

#[test]
fn a_crash_at_any_step_of_creation_leaves_no_log_or_a_whole_one() {
    for terms in BOTH {
        crash_at_each_operation_of_creation(terms);
    }
}

fn crash_at_each_operation_of_creation(terms: Terms) {
    for operation in 1..100 {
        for seed in 0..12 {
            let ground = Ground::empty(terms);
            ground.files.fail_at(operation);
            let done = ground.create().is_ok();
            ground.files.crash(Loss::Parts(seed)).unwrap();
            match ground.open() {
                Ok((_, recovered, torn)) => assert_eq!((recovered, torn), (expected(&[]), false)),
                Err(halt) => {
                    assert!(!done && halt.to_string().contains("no log here"), "{operation} {seed}: {halt}");
                    ground.create().unwrap();
                    assert_eq!(ground.open().unwrap().1, expected(&[]));
                }
            }
            if done && seed == 11 {
                assert!(operation > 4, "creation was to need several operations");
                return;
            }
        }
    }
    panic!("creation never came to its end");
}

/// Chooses steps that raft could take.
struct Will {
    terms: Terms,
    dice: StdRng,
    term: u64,
}

impl Will {
    fn step(&mut self, log: &Recovered) -> Step {
        let last = log.last_index();
        match self.dice.random_range(0..100) {
            0..8 if last > log.truncated.index => {
                let index = self.dice.random_range(log.truncated.index + 1..=last);
                Step::Cut(at(index, log.term(index).unwrap()))
            }
            8..10 => {
                let snapshot = at(last + self.dice.random_range(1..50), self.term);
                Step::Reset(snapshot, hard_state(self.term, snapshot.index))
            }
            10..12 => Step::Installing(self.dice.random_bool(0.5).then(|| at(last + 5, self.term))),
            _ => Step::Append(self.group(log)),
        }
    }

    fn group(&mut self, log: &Recovered) -> Group {
        let mut first = log.last_index() + 1;
        let lowest = log.hard_state.commit.max(log.truncated.index) + 1;
        if self.dice.random_bool(0.1) {
            self.term += 1;
            first = self.dice.random_range(lowest..=first);
        }
        let mut group = Group::default();
        for index in first..first + self.dice.random_range(0..5) {
            let bytes = if self.dice.random_bool(0.02) { 10_000 } else { self.dice.random_range(0..200) };
            group.entries.push(self.terms.entry(index, self.term, bytes));
        }
        if group.is_empty() || self.dice.random_bool(0.3) {
            let commit = self.dice.random_range(log.hard_state.commit.max(log.truncated.index).min(first - 1)..first);
            group.hard_state = Some(hard_state(self.term, commit));
        }
        group
    }

    fn loss(&mut self) -> Loss {
        match self.dice.random_range(0..4) {
            0 => Loss::Nothing,
            1 => Loss::Unsynced,
            _ => Loss::Parts(self.dice.random()),
        }
    }
}

/// A life of appends, cuts, resets and crashes: also crashes while recovering from the crash before.
fn live(terms: Terms, seed: u64, crashes: usize) {
    let ground = Ground::on(terms);
    let mut will = Will { terms, dice: StdRng::seed_from_u64(seed), term: 1 };
    let mut model = VolatileLog::create(IDENTITY, START, &hard_state(1, 3));
    for crash in 0..crashes {
        ground.files.fail_at(will.dice.random_range(1..80));
        let mut in_flight = None;
        match ground.open() {
            Ok((mut log, recovered, _)) => {
                assert_eq!(recovered, model.open().unwrap(), "seed {seed}, crash {crash}");
                while in_flight.is_none() {
                    let step = will.step(&model.open().unwrap());
                    match step.take(&mut log) {
                        Ok(()) => step.take(&mut model).unwrap(),
                        Err(halt) => {
                            assert!(matches!(halt, Halt::Io { .. }), "seed {seed}, crash {crash}: {halt}");
                            in_flight = Some(step);
                        }
                    }
                }
            }
            Err(halt) => assert!(matches!(halt, Halt::Io { .. }), "seed {seed}, crash {crash}: {halt}"),
        }
        ground.files.crash(will.loss()).unwrap();
        let found = ground.open().unwrap_or_else(|halt| panic!("seed {seed}, crash {crash}: {halt}")).1;
        if let Some(step) = in_flight.filter(|_| found != model.open().unwrap()) {
            step.take(&mut model).unwrap();
        }
        assert_eq!(found, model.open().unwrap(), "seed {seed}, crash {crash}");
    }
}

#[test]
fn whatever_happens_the_log_holds_what_was_synced() {
    for seed in 0..20 {
        live(CONTRACT, seed, 25);
    }
    for seed in 100..108 {
        live(OS_FILES, seed, 25);
    }
}

#[test]
#[ignore = "long"]
fn whatever_happens_for_long_the_log_holds_what_was_synced() {
    for seed in 1000..2500 {
        live(CONTRACT, seed, 40);
    }
    for seed in 3000..3400 {
        live(OS_FILES, seed, 40);
    }
}

/// As layers over other file systems do: they let a file be opened so, and then write like always.
const NO_DURABLE_WRITES: Terms = Terms { ignores_durable_writes: true, ..OS_FILES };

#[test]
fn durable_writes_that_are_none_are_found_here() {
    let finds = |seed| panic::catch_unwind(|| live(NO_DURABLE_WRITES, seed, 25)).is_err();
    assert!((0..5).any(finds), "acknowledged groups were to be lost");
}

#[test]
fn where_the_file_system_is_not_known_durable_writes_are_not_relied_on() {
    let terms = Terms { os_files: Some(FileSystem::UNKNOWN), ..NO_DURABLE_WRITES };
    for seed in 200..205 {
        live(terms, seed, 25);
    }
}
