//! What a process has used, as Linux tells it: CPU time and resident memory.
//!
//! A thread's `schedstat` counts its run time in nanoseconds, but goes when the thread goes. The process's `stat` counts
//! in ticks of 10 ms and forgets no thread. So the sum over threads is taken, and the ticks wherever they show that threads
//! came and went unseen.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

/// Linux shows ticks of this length to programs, whatever it uses itself.
const TICK: Duration = Duration::from_millis(10);
/// The ticks and the threads are not read at the same moment; so far they may disagree.
const SLACK: Duration = Duration::from_millis(30);

/// What a process had used at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Usage {
    ticks: Duration,
    threads: BTreeMap<u32, Duration>,
    /// Bytes resident in memory.
    pub(super) resident_bytes: u64,
    /// The most bytes that ever were.
    pub(super) peak_resident_bytes: u64,
}

impl Usage {
    /// What process `pid` has used until now.
    pub(super) fn of(pid: u32) -> Result<Self, String> {
        let process = Path::new("/proc").join(pid.to_string());
        let read = |name: &str| {
            fs::read_to_string(process.join(name))
                .map_err(|error| format!("process {pid} cannot be looked at: {}/{name}: {error}", process.display()))
        };
        let odd = |name: &str| format!("process {pid}: {}/{name} is not understood", process.display());
        // First, for it is the one whose absence tells most clearly that there is no such process.
        let ticks = ticks(&read("stat")?).ok_or_else(|| odd("stat"))?;
        let threads = run_times(&process)?;
        let status = read("status")?;
        // A process that has ended and was not waited for has no memory.
        let resident_bytes = kilobytes(&status, "VmRSS:").ok_or_else(|| odd("status"))?;
        let peak_resident_bytes = kilobytes(&status, "VmHWM:").ok_or_else(|| odd("status"))?;
        Ok(Self { ticks, threads, resident_bytes, peak_resident_bytes })
    }

    /// What some processes have used together; None if there are none.
    pub(super) fn of_all(pids: &[u32]) -> Result<Option<Self>, String> {
        let mut all: Option<Self> = None;
        for &pid in pids {
            let one = Self::of(pid)?;
            let Some(sum) = &mut all else {
                all = Some(one);
                continue;
            };
            sum.ticks += one.ticks;
            sum.threads.extend(one.threads); // A thread's number is the system's, not its process's.
            sum.resident_bytes += one.resident_bytes;
            sum.peak_resident_bytes += one.peak_resident_bytes;
        }
        Ok(all)
    }

    /// What this process has used until now.
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
        let uncounted = self.threads.is_empty() || one_ended || ticks > threads + SLACK;
        if uncounted { ticks.max(threads) } else { threads }
    }
}

fn run_times(process: &Path) -> Result<BTreeMap<u32, Duration>, String> {
    let tasks = process.join("task");
    let entries = fs::read_dir(&tasks).map_err(|error| format!("{}: {error}", tasks.display()))?;
    // A thread may end while it is looked at; kernels without schedstat have none of these at all.
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

/// User and system time of a `stat`, fields 14 and 15; the name, field 2, may hold anything, brackets and blanks included.
fn ticks(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(TICK * user + TICK * system)
}

/// The bytes of a line of `status` that is given in kB.
fn kilobytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(ticks: u64, threads: &[(u32, u64)]) -> Usage {
        let threads = threads.iter().map(|(thread, millis)| (*thread, Duration::from_millis(*millis))).collect();
        Usage { ticks: Duration::from_millis(ticks), threads, resident_bytes: 0, peak_resident_bytes: 0 }
    }

    #[test]
    fn a_name_with_brackets_and_blanks_does_not_hide_the_ticks() {
        let stat = "17 (a) b (c) S 1 17 17 0 -1 4194560 900 0 0 0 250 50 0 0 20 0 9 0 100 0 0";
        assert_eq!(ticks(stat), Some(Duration::from_secs(3)));
        assert_eq!(ticks("17 (cut off) S 1 2"), None);
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn run_time_is_the_first_of_three_numbers() {
        assert_eq!(run_nanos("123456789 42 7\n"), Some(Duration::from_nanos(123_456_789)));
        assert_eq!(run_nanos(""), None);
        assert_eq!(run_nanos("x 1 2"), None);
    }

    #[test]
    fn memory_is_given_in_kilobytes() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(kilobytes(status, "VmRSS:"), Some(1 << 20));
        assert_eq!(kilobytes(status, "VmHWM:"), Some(2 << 20));
        assert_eq!(kilobytes(status, "VmSwap:"), None);
        assert_eq!(kilobytes("VmRSS: many kB", "VmRSS:"), None);
    }

    #[test]
    fn the_threads_are_added_up_while_all_of_them_live() {
        let before = usage(100, &[(1, 60), (2, 40)]);
        assert_eq!(usage(110, &[(1, 63), (2, 44)]).cpu_since(&before), Duration::from_millis(7));
        assert_eq!(usage(110, &[(1, 63), (2, 44), (3, 2)]).cpu_since(&before), Duration::from_millis(9));
    }

    #[test]
    fn the_ticks_count_when_a_thread_has_ended() {
        let before = usage(100, &[(1, 60), (2, 40)]);
        assert_eq!(usage(150, &[(1, 63)]).cpu_since(&before), Duration::from_millis(50));
    }

    #[test]
    fn the_ticks_count_when_a_thread_came_and_went_unseen() {
        let before = usage(100, &[(1, 60)]);
        assert_eq!(usage(200, &[(1, 63)]).cpu_since(&before), Duration::from_millis(100));
    }

    #[test]
    fn this_process_has_used_something() {
        let before = Usage::of_self().unwrap();
        assert!(before.resident_bytes > 0 && before.peak_resident_bytes >= before.resident_bytes);
        let mut sum = 0u64;
        while Usage::of_self().unwrap().cpu_since(&before) < Duration::from_millis(5) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(sum > 0);
    }

    #[test]
    fn a_process_that_does_not_exist_is_named() {
        assert!(Usage::of(u32::MAX).unwrap_err().contains("4294967295"));
    }
}
