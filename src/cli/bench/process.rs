//! CPU time and resident memory of a process, read from Linux's `/proc`.
//!
//! The `schedstat` of a thread counts its run time in nanoseconds, but disappears when the thread ends. The `stat` of the
//! process counts in ticks of 10 ms, and includes ended threads. So the sum over the threads is used, except where the ticks
//! show that threads have started and ended in between.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

/// The length of a tick in `/proc`, whatever the kernel uses internally.
const TICK: Duration = Duration::from_millis(10);
/// Ticks and threads are not read at the same time, so they may differ by this much.
const TICK_TOLERANCE: Duration = Duration::from_millis(30);

/// What a process has used until some point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Usage {
    ticks: Duration,
    threads: BTreeMap<u32, Duration>,
    pub(super) resident_bytes: u64,
    pub(super) peak_resident_bytes: u64,
}

impl Usage {
    /// The usage of process `pid` until now.
    pub(super) fn of(pid: u32) -> Result<Self, String> {
        let process = Path::new("/proc").join(pid.to_string());
        let read = |name: &str| {
            fs::read_to_string(process.join(name)).map_err(|error| {
                format!("the usage of process {pid} cannot be read: {}/{name}: {error}", process.display())
            })
        };
        let malformed = |name: &str| format!("process {pid}: {}/{name} cannot be parsed", process.display());
        // Read first, because its absence shows most clearly that there is no such process.
        let ticks = ticks(&read("stat")?).ok_or_else(|| malformed("stat"))?;
        let threads = run_times(&process)?;
        let status = read("status")?;
        // A zombie process has no memory, and these lines are missing.
        let resident_bytes = kilobytes(&status, "VmRSS:").ok_or_else(|| malformed("status"))?;
        let peak_resident_bytes = kilobytes(&status, "VmHWM:").ok_or_else(|| malformed("status"))?;
        Ok(Self { ticks, threads, resident_bytes, peak_resident_bytes })
    }

    /// The total usage of several processes; None if there are none.
    pub(super) fn of_all(pids: &[u32]) -> Result<Option<Self>, String> {
        let mut all: Option<Self> = None;
        for &pid in pids {
            let one = Self::of(pid)?;
            let Some(sum) = &mut all else {
                all = Some(one);
                continue;
            };
            sum.ticks += one.ticks;
            sum.threads.extend(one.threads); // Thread IDs are unique in the system, not only in the process.
            sum.resident_bytes += one.resident_bytes;
            sum.peak_resident_bytes += one.peak_resident_bytes;
        }
        Ok(all)
    }

    pub(super) fn of_self() -> Result<Self, String> {
        Self::of(std::process::id())
    }

    /// The CPU time used since `before`.
    pub(super) fn cpu_since(&self, before: &Self) -> Duration {
        let ticks = self.ticks.saturating_sub(before.ticks);
        let mut threads = Duration::ZERO;
        for (thread, time) in &self.threads {
            threads += time.saturating_sub(before.threads.get(thread).copied().unwrap_or_default());
        }
        let one_ended = before.threads.keys().any(|thread| !self.threads.contains_key(thread));
        let threads_incomplete = self.threads.is_empty() || one_ended || ticks > threads + TICK_TOLERANCE;
        if threads_incomplete { ticks.max(threads) } else { threads }
    }
}

fn run_times(process: &Path) -> Result<BTreeMap<u32, Duration>, String> {
    let tasks = process.join("task");
    let entries = fs::read_dir(&tasks).map_err(|error| format!("{}: {error}", tasks.display()))?;
    // A thread may end while it is being read; on kernels without schedstat the file does not exist.
    Ok(entries.flatten().filter_map(|entry| run_time(&entry)).collect())
}

fn run_time(entry: &fs::DirEntry) -> Option<(u32, Duration)> {
    let thread = entry.file_name().to_str()?.parse().ok()?;
    Some((thread, run_nanos(&fs::read_to_string(entry.path().join("schedstat")).ok()?)?))
}

/// The first number of a `schedstat`: nanoseconds run.
fn run_nanos(schedstat: &str) -> Option<Duration> {
    schedstat.split_ascii_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// User and system time of a `stat`, fields 14 and 15. The name, field 2, may contain anything, also parentheses and spaces.
fn ticks(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(TICK * user + TICK * system)
}

/// The value, in bytes, of a line of `status` that is given in kB.
fn kilobytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn usage(ticks: u64, threads: &[(u32, u64)]) -> Usage {
        let threads = threads.iter().map(|(thread, millis)| (*thread, Duration::from_millis(*millis))).collect();
        Usage { ticks: Duration::from_millis(ticks), threads, resident_bytes: 0, peak_resident_bytes: 0 }
    }

    #[test]
    fn a_process_name_may_contain_parentheses_and_spaces() {
        let stat = "17 (a) b (c) S 1 17 17 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 9 0 100 0 0";
        assert_eq!(ticks(stat), Some(Duration::from_secs(3)));
        assert_eq!(ticks("17 (cut off) S 1 2"), None);
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn run_time_is_the_first_number_of_schedstat() {
        assert_eq!(run_nanos("123456789 42 7\n"), Some(Duration::from_nanos(123_456_789)));
        assert_eq!(run_nanos(""), None);
        assert_eq!(run_nanos("x 1 2"), None);
    }

    #[test]
    fn memory_is_parsed_from_kilobytes() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(kilobytes(status, "VmRSS:"), Some(1 << 20));
        assert_eq!(kilobytes(status, "VmHWM:"), Some(2 << 20));
        assert_eq!(kilobytes(status, "VmSwap:"), None);
        assert_eq!(kilobytes("VmRSS: many kB", "VmRSS:"), None);
    }

    #[test]
    fn thread_times_are_summed_while_no_thread_has_ended() {
        let before = usage(100, &[(1, 60), (2, 40)]);
        assert_eq!(usage(110, &[(1, 63), (2, 44)]).cpu_since(&before), Duration::from_millis(7));
        assert_eq!(usage(110, &[(1, 63), (2, 44), (3, 2)]).cpu_since(&before), Duration::from_millis(9));
    }

    #[test]
    fn ticks_are_used_if_a_thread_has_ended() {
        let before = usage(100, &[(1, 60), (2, 40)]);
        assert_eq!(usage(150, &[(1, 63)]).cpu_since(&before), Duration::from_millis(50));
    }

    #[test]
    fn ticks_are_used_if_a_thread_was_never_seen() {
        let before = usage(100, &[(1, 60)]);
        assert_eq!(usage(200, &[(1, 63)]).cpu_since(&before), Duration::from_millis(100));
    }

    #[test]
    fn the_usage_of_this_process_can_be_read() {
        let before = Usage::of_self().unwrap();
        assert!(before.resident_bytes > 0 && before.peak_resident_bytes >= before.resident_bytes);
        let (started, mut sum) = (Instant::now(), 0u64);
        while Usage::of_self().unwrap().cpu_since(&before) < Duration::from_millis(5) {
            assert!(started.elapsed() < Duration::from_mins(1), "the processor time of this process does not grow");
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
    }

    #[test]
    fn a_missing_process_is_named_in_the_error() {
        assert!(Usage::of(u32::MAX).unwrap_err().contains("4294967295"));
    }
}
