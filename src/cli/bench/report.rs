//! The report of a run: as text, or as one line of JSON for `compare` and other programs.

use std::{fmt::Write, time::Duration};

use serde_json::{Value, json};

use super::{
    measure::{Latencies, Tally},
    plan::{Plan, Workload},
};

pub(super) struct Report {
    pub(super) plan: Plan,
    /// From the first call until the last response.
    pub(super) elapsed: Duration,
    pub(super) tally: Tally,
    /// Usage of the processes that `--server-pid` names.
    pub(super) server: Option<Used>,
    /// Usage of the load generator itself.
    pub(super) generator: Option<Used>,
    /// Whether the run was ended early by a signal.
    pub(super) interrupted: bool,
}

/// What a process has used during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) cpu: Duration,
    pub(super) resident_bytes: u64,
    pub(super) peak_resident_bytes: u64,
}

impl Report {
    /// The number of failed operations, including fill and warm-up.
    pub(super) fn failed(&self) -> u64 {
        self.tally.failed()
    }

    /// The operations that are reported: events for the watch workload, calls for all others.
    fn operations(&self) -> &Latencies {
        if self.watches() { &self.tally.events } else { &self.tally.calls }
    }

    fn watches(&self) -> bool {
        matches!(self.plan.workload, Workload::Watch { .. })
    }

    pub(super) fn text(&self) -> String {
        let operations = self.operations();
        let mut text = String::new();
        let early = if self.interrupted { ", ended early" } else { "" };
        let label = self.plan.label.as_deref().map(|label| format!(" ({label})")).unwrap_or_default();
        let mut line = |line: String| writeln!(text, "{line}").expect("writing to a string cannot fail");
        line(format!(
            "{}{label}: {} {} in {:.2} s{early}; {} failed",
            self.plan.workload.name(),
            thousands(operations.count()),
            self.plan.unit(),
            self.elapsed.as_secs_f64(),
            thousands(self.failed()),
        ));
        line(format!("  throughput  {}/s{}", rate(operations.count(), self.elapsed), self.offered()));
        line(format!("  latency     {}", percentiles(operations)));
        if self.watches() {
            let calls = &self.tally.calls;
            line(format!(
                "  puts        {} ({}/s), {}",
                thousands(calls.count()),
                rate(calls.count(), self.elapsed),
                percentiles(calls)
            ));
        }
        if self.plan.workload == Workload::Txn {
            let percent = 100.0 * ratio(self.tally.lost, self.tally.calls.count()).unwrap_or(0.0);
            line(format!("  lost swaps  {} ({percent:.1} %)", thousands(self.tally.lost)));
        }
        for (name, used) in [("server    ", self.server), ("generator ", self.generator)] {
            if let Some(used) = used {
                line(format!("  {name}  {}", self.usage(used)));
            }
        }
        for (kind, failures) in &self.tally.failures {
            line(format!("  FAILED      {kind} x {}: {}", thousands(failures.count), failures.examples.join(" | ")));
        }
        text
    }

    fn offered(&self) -> String {
        self.plan.rate.map_or_else(String::new, |rate| {
            let unit = if self.watches() { "puts" } else { "calls" };
            format!(" ({} {unit}/s were due)", rate.per_second())
        })
    }

    fn usage(&self, used: Used) -> String {
        let cores = used.cpu.as_secs_f64() / self.elapsed.as_secs_f64();
        let per = cpu_micros_per(used.cpu, self.operations().count())
            .map_or_else(|| "-".to_owned(), |per| format!("{per:.2}"));
        let unit = self.plan.unit().trim_end_matches('s');
        let (now, peak) = (used.resident_bytes >> 20, used.peak_resident_bytes >> 20);
        format!("{per} µs CPU per {unit}, {cores:.2} cores, {now} MiB resident, {peak} MiB at most")
    }

    /// One line of JSON; sizes are in bytes, times in the unit at the end of the name.
    pub(super) fn json(&self) -> String {
        let Plan { workload, clients, connections, threads, ref keys, .. } = self.plan;
        let operations = self.operations();
        let used = |used: Option<Used>| {
            used.map(|used| {
                json!({
                    "cpu_seconds": used.cpu.as_secs_f64(),
                    "cpu_us_per_operation": cpu_micros_per(used.cpu, operations.count()),
                    "resident_bytes": used.resident_bytes,
                    "peak_resident_bytes": used.peak_resident_bytes,
                })
            })
        };
        let failure = |(kind, failures): (&String, &super::measure::Failures)| json!({ "kind": kind, "count": failures.count, "examples": failures.examples });
        json!({
            "label": self.plan.label,
            "workload": workload.name(),
            "unit": self.plan.unit(),
            "clients": clients,
            "connections": connections,
            "threads": threads,
            "key_space": keys.count(),
            "key_size": keys.key_size(),
            "value_size": keys.value_size(),
            "rate": self.plan.rate.map(super::schedule::Rate::per_second),
            "interrupted": self.interrupted,
            "elapsed_seconds": self.elapsed.as_secs_f64(),
            "operations": operations.count(),
            "operations_per_second": per_second(operations.count(), self.elapsed),
            "latency_us": latencies(operations),
            "puts": self.watches().then(|| latencies(&self.tally.calls)),
            "lost_swaps": self.tally.lost,
            "failed": self.failed(),
            "failures": self.tally.failures.iter().map(failure).collect::<Vec<_>>(),
            "server": used(self.server),
            "generator": used(self.generator),
        })
        .to_string()
    }
}

fn latencies(latencies: &Latencies) -> Value {
    json!({
        "count": latencies.count(),
        "mean": latencies.mean_micros(),
        "p50": latencies.quantile_micros(0.5),
        "p90": latencies.quantile_micros(0.9),
        "p99": latencies.quantile_micros(0.99),
        "p999": latencies.quantile_micros(0.999),
        "max": latencies.max_micros(),
    })
}

fn percentiles(latencies: &Latencies) -> String {
    if latencies.count() == 0 {
        return "none".to_owned();
    }
    let mut text = String::new();
    for (name, quantile) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)] {
        let time = time(latencies.quantile_micros(quantile));
        write!(text, "{name} {time}  ").expect("writing to a string cannot fail");
    }
    text + "max " + &time(latencies.max_micros())
}

/// Formats a time given in microseconds with three digits and a suitable unit.
pub(super) fn time(micros: f64) -> String {
    match micros {
        ..1e3 => format!("{} µs", three_digits(micros)),
        1e3..1e6 => format!("{} ms", three_digits(micros / 1e3)),
        _ => format!("{} s", three_digits(micros / 1e6)),
    }
}

/// Formats a non-negative number with three digits; the integer part is never rounded to fewer.
pub(super) fn three_digits(number: f64) -> String {
    let decimals = match number {
        ..9.995 => 2,
        9.995..99.95 => 1,
        _ => 0,
    };
    format!("{number:.decimals$}")
}

/// Formats a number with its digits in groups of three.
pub(super) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive and far below 2^64")]
fn rate(count: u64, elapsed: Duration) -> String {
    match per_second(count, elapsed) {
        slow @ ..100.0 => three_digits(slow),
        fast => thousands(fast.round() as u64),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 operations")]
fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64().max(1e-9)
}

/// CPU time per operation in microseconds, if there was an operation.
#[allow(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 operations")]
fn cpu_micros_per(cpu: Duration, operations: u64) -> Option<f64> {
    (operations > 0).then(|| cpu.as_secs_f64() * 1e6 / operations as f64)
}

#[allow(clippy::cast_precision_loss, reason = "a run has far fewer than 2^52 operations")]
fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::{
            arguments::{Arguments, Command},
            measure::Failure,
        },
        *,
    };

    fn report(arguments: &str, tally: Tally) -> Report {
        let words = format!("bench {arguments}");
        let Command::Run(asked) = Arguments::try_parse_from(words.split(' ')).unwrap().command else {
            panic!("{words} is not a workload");
        };
        let plan = Plan::resolve(asked).unwrap();
        let used = Used { cpu: Duration::from_millis(100), resident_bytes: 5 << 20, peak_resident_bytes: 6 << 20 };
        let elapsed = Duration::from_secs(2);
        Report { plan, elapsed, tally, server: Some(used), generator: None, interrupted: false }
    }

    fn thousand_calls() -> Tally {
        let mut tally = Tally::new();
        tally.calls.record_many(Duration::from_micros(1500), 1000);
        tally
    }

    #[test]
    fn the_text_report_of_a_run_without_failures() {
        let text = report("put --clients 4 --label first", thousand_calls()).text();
        assert_eq!(
            text,
            "put (first): 1,000 operations in 2.00 s; 0 failed\n\
             \x20 throughput  500/s\n\
             \x20 latency     p50 1.50 ms  p90 1.50 ms  p99 1.50 ms  p99.9 1.50 ms  max 1.50 ms\n\
             \x20 server      100.00 µs CPU per operation, 0.05 cores, 5 MiB resident, 6 MiB at most\n"
        );
    }

    #[test]
    fn failures_are_shown_by_kind_with_examples() {
        let mut tally = thousand_calls();
        tally.fail(Failure::wrong_answer("asked for 3 keys, got 2"));
        let report = report("put", tally);
        assert_eq!(report.failed(), 1);
        assert!(report.text().contains("FAILED      WrongAnswer x 1: asked for 3 keys, got 2"));
    }

    #[test]
    fn a_watch_counts_events_and_shows_its_puts_separately() {
        let mut tally = thousand_calls();
        tally.events.record_many(Duration::from_millis(3), 50_000);
        let report = report("watch --rate 500", tally);
        let text = report.text();
        assert!(text.contains("50,000 events"), "{text}");
        assert!(text.contains("25,000/s (500 puts/s were due)"), "{text}");
        assert!(text.contains("puts        1,000 (500/s), p50 1.50 ms"), "{text}");
        assert!(text.contains("2.00 µs CPU per event,"), "{text}");
    }

    #[test]
    fn json_is_one_line_with_all_figures() {
        let line = report("range --label r --clients 2", thousand_calls()).json();
        assert!(!line.contains('\n'));
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["label"], "r");
        assert_eq!(value["operations"], 1000);
        assert_eq!(value["operations_per_second"], 500.0);
        assert_eq!(value["server"]["cpu_us_per_operation"], 100.0);
        assert_eq!(value["generator"], Value::Null);
        assert!((value["latency_us"]["p99"].as_f64().unwrap() / 1500.0 - 1.0).abs() < 0.001);
    }

    #[test]
    fn a_run_without_operations_is_reported() {
        let report = report("txn", Tally::new());
        assert!(report.text().contains("latency     none"));
        assert!(report.text().contains("- µs CPU per operation"));
        let value: Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(value["server"]["cpu_us_per_operation"], Value::Null);
    }

    #[test]
    fn times_and_numbers_have_three_digits() {
        assert_eq!(time(0.0), "0.00 µs");
        assert_eq!(time(450.4), "450 µs");
        assert_eq!(time(5543.0), "5.54 ms");
        assert_eq!(time(2_500_000.0), "2.50 s");
        assert_eq!(three_digits(9.999), "10.0");
        assert_eq!(three_digits(99.96), "100");
        assert_eq!(three_digits(37_700.2), "37700");
        assert_eq!(
            [thousands(0), thousands(999), thousands(1000), thousands(1_234_567)],
            ["0", "999", "1,000", "1,234,567"]
        );
    }
}
