//! Crashes: at each file operation of a step, and repeatedly during random steps. All tests run on files that guarantee only what
//! the log relies on, and on the file type of the operating system.

use std::panic;

use metastore::error::Halt;
use metastore::raft_log::fault_files::Loss;
use metastore::raft_log::simulated_log::VolatileLog;
use metastore::raft_log::{FileSystem, Group, LogStore, Recovered};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fixture::{
    CONTRACT, IDENTITY, OS_FILES, START, Setup, Step, TestLog, at, entry, expected, group, hard_state, varied_steps_on,
};

/// What a log recovered after a crash, and what is appended to it then, must survive a power failure: recovery must have made
/// durable what was only in the page cache.
fn assert_survives_another_crash(test_log: &TestLog, recovered: &Recovered) {
    let (mut log, ..) = test_log.open().unwrap();
    let next = recovered.last_index() + 1;
    log.append(&group(next, next, 90, 10)).unwrap();
    drop(log);
    test_log.files.crash(Loss::Unsynced).unwrap();
    let mut again = test_log.open().unwrap().1;
    assert_eq!(again.entries.pop(), Some(entry(next, 90, 10)));
    assert_eq!(again, *recovered);
}

/// Fails the disk at each operation of the last of `steps`, and crashes in several ways.
fn crash_at_each_operation(setup: Setup, steps: &[Step]) {
    let (last, before) = steps.split_last().unwrap();
    let states = [expected(before), expected(steps)];
    for operation in 1.. {
        for loss in [Loss::Nothing, Loss::Unsynced].into_iter().chain((0..12).map(Loss::Partial)) {
            let test_log = TestLog::with(setup);
            test_log.apply(before);
            let (mut log, ..) = test_log.open().unwrap();
            test_log.files.fail_at(operation);
            let outcome = last.apply(&mut log);
            let done = outcome.is_ok();
            drop(log);
            test_log.files.crash(loss).unwrap();
            let (_, recovered, _) = test_log.open().unwrap_or_else(|halt| panic!("{operation} {loss:?}: {halt}"));
            let allowed = if done { &states[1..] } else { &states[..] };
            assert!(allowed.contains(&recovered), "{operation} {loss:?}: {recovered:?}");
            assert_survives_another_crash(&test_log, &recovered);
            if done && loss == Loss::Partial(11) {
                assert!(operation > 2, "the step should need several operations");
                return;
            }
        }
    }
}

const SETUPS: [Setup; 2] = [CONTRACT, OS_FILES];

/// FAULT-4.
#[test]
fn a_crash_during_a_rotation_leaves_the_log_before_or_after() {
    for setup in SETUPS {
        let steps: Vec<_> = (4..=40).map(|index| Step::Append(setup.group(index, index, 1, 100))).collect();
        let rotates = |steps: &[Step]| {
            let test_log = TestLog::with(setup);
            test_log.apply(steps);
            test_log.files_with_extension("segment").len() == 2
        };
        let first = (1..steps.len()).find(|count| rotates(&steps[..*count])).unwrap();
        crash_at_each_operation(setup, &steps[..first]);
    }
}

#[test]
fn a_crash_during_an_oversized_group_leaves_the_log_before_or_after() {
    for setup in SETUPS {
        let [first, oversized] = [setup.group(4, 8, 1, 100), setup.group(7, 12, 2, 1500)];
        crash_at_each_operation(setup, &[Step::Append(first), Step::Append(oversized)]);
    }
}

#[test]
fn a_crash_during_a_truncation_leaves_the_log_before_or_after() {
    for setup in SETUPS {
        let mut steps = varied_steps_on(setup);
        steps.push(Step::Truncate(at(28, 4)));
        crash_at_each_operation(setup, &steps);
    }
}

#[test]
fn a_crash_during_a_reset_leaves_the_log_before_or_after() {
    for setup in SETUPS {
        let mut steps = varied_steps_on(setup);
        steps.push(Step::Installing(Some(at(90, 5))));
        steps.push(Step::Reset(at(90, 5), hard_state(5, 90)));
        crash_at_each_operation(setup, &steps);
    }
}

/// FAULT-15.
#[test]
fn a_crash_during_creation_leaves_no_log_or_a_complete_one() {
    for setup in SETUPS {
        crash_at_each_operation_of_creation(setup);
    }
}

fn crash_at_each_operation_of_creation(setup: Setup) {
    for operation in 1..100 {
        for seed in 0..12 {
            let test_log = TestLog::empty(setup);
            test_log.files.fail_at(operation);
            let done = test_log.create().is_ok();
            test_log.files.crash(Loss::Partial(seed)).unwrap();
            match test_log.open() {
                Ok((_, recovered, torn)) => assert_eq!((recovered, torn), (expected(&[]), false)),
                Err(halt) => {
                    assert!(!done && halt.to_string().contains("no log here"), "{operation} {seed}: {halt}");
                    test_log.create().unwrap();
                    assert_eq!(test_log.open().unwrap().1, expected(&[]));
                }
            }
            if done && seed == 11 {
                assert!(operation > 4, "creation should need several operations");
                return;
            }
        }
    }
    panic!("creation never completed");
}

/// Generates random steps that raft could take.
struct StepGenerator {
    setup: Setup,
    rng: StdRng,
    term: u64,
}

impl StepGenerator {
    fn step(&mut self, log: &Recovered) -> Step {
        let last = log.last_index();
        match self.rng.random_range(0..100) {
            0..8 if last > log.truncated.index => {
                let index = self.rng.random_range(log.truncated.index + 1..=last);
                Step::Truncate(at(index, log.term(index).unwrap()))
            }
            8..10 => {
                let snapshot = at(last + self.rng.random_range(1..50), self.term);
                Step::Reset(snapshot, hard_state(self.term, snapshot.index))
            }
            10..12 => Step::Installing(self.rng.random_bool(0.5).then(|| at(last + 5, self.term))),
            _ => Step::Append(self.group(log)),
        }
    }

    fn group(&mut self, log: &Recovered) -> Group {
        let mut first = log.last_index() + 1;
        let lowest = log.hard_state.commit.max(log.truncated.index) + 1;
        if self.rng.random_bool(0.1) {
            self.term += 1;
            first = self.rng.random_range(lowest..=first);
        }
        let mut group = Group::default();
        for index in first..first + self.rng.random_range(0..5) {
            let bytes = if self.rng.random_bool(0.02) { 10_000 } else { self.rng.random_range(0..200) };
            group.entries.push(self.setup.entry(index, self.term, bytes));
        }
        if group.is_empty() || self.rng.random_bool(0.3) {
            let commit = self.rng.random_range(log.hard_state.commit.max(log.truncated.index).min(first - 1)..first);
            group.hard_state = Some(hard_state(self.term, commit));
        }
        group
    }

    fn loss(&mut self) -> Loss {
        match self.rng.random_range(0..4) {
            0 => Loss::Nothing,
            1 => Loss::Unsynced,
            _ => Loss::Partial(self.rng.random()),
        }
    }
}

/// Random appends, truncations, resets and crashes, including crashes during the recovery from an earlier crash.
fn run_random_steps(setup: Setup, seed: u64, crashes: usize) {
    let test_log = TestLog::with(setup);
    let mut generator = StepGenerator { setup, rng: StdRng::seed_from_u64(seed), term: 1 };
    let mut model = VolatileLog::create(IDENTITY, START, &hard_state(1, 3));
    for crash in 0..crashes {
        test_log.files.fail_at(generator.rng.random_range(1..80));
        let mut in_flight = None;
        match test_log.open() {
            Ok((mut log, recovered, _)) => {
                assert_eq!(recovered, model.open().unwrap(), "seed {seed}, crash {crash}");
                while in_flight.is_none() {
                    let step = generator.step(&model.open().unwrap());
                    match step.apply(&mut log) {
                        Ok(()) => step.apply(&mut model).unwrap(),
                        Err(halt) => {
                            assert!(matches!(halt, Halt::Io { .. }), "seed {seed}, crash {crash}: {halt}");
                            in_flight = Some(step);
                        }
                    }
                }
            }
            Err(halt) => assert!(matches!(halt, Halt::Io { .. }), "seed {seed}, crash {crash}: {halt}"),
        }
        test_log.files.crash(generator.loss()).unwrap();
        let found = test_log.open().unwrap_or_else(|halt| panic!("seed {seed}, crash {crash}: {halt}")).1;
        if let Some(step) = in_flight.filter(|_| found != model.open().unwrap()) {
            step.apply(&mut model).unwrap();
        }
        assert_eq!(found, model.open().unwrap(), "seed {seed}, crash {crash}");
    }
}

#[test]
fn the_log_holds_what_was_synced_after_random_crashes() {
    for seed in 0..20 {
        run_random_steps(CONTRACT, seed, 25);
    }
    for seed in 100..108 {
        run_random_steps(OS_FILES, seed, 25);
    }
}

#[test]
#[ignore = "long"]
fn the_log_holds_what_was_synced_after_many_random_crashes() {
    for seed in 1000..2500 {
        run_random_steps(CONTRACT, seed, 40);
    }
    for seed in 3000..3400 {
        run_random_steps(OS_FILES, seed, 40);
    }
}

/// As file systems layered over others do: they accept the flags at open, and then write as without them.
const NO_DURABLE_WRITES: Setup = Setup { ignores_durable_writes: true, ..OS_FILES };

#[test]
fn durable_writes_that_are_not_durable_are_detected() {
    let failure = |seed| panic::catch_unwind(|| run_random_steps(NO_DURABLE_WRITES, seed, 25)).err();
    let cause = (0..5).find_map(failure).expect("acknowledged groups should be lost");
    let text = cause.downcast::<String>().expect("the panic has a formatted message");
    assert!(text.contains("seed ") && text.contains(", crash "), "not one of the checks has failed: {text}");
}

#[test]
fn durable_writes_are_not_relied_on_if_the_file_system_is_unknown() {
    let setup = Setup { os_files: Some(FileSystem::UNKNOWN), ..NO_DURABLE_WRITES };
    for seed in 200..205 {
        run_random_steps(setup, seed, 25);
    }
}
