//! What the operating system knows of this process, read when metrics are scraped: processor time, memory, descriptors, traffic.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;

/// `USER_HZ`: the unit of times in `/proc`, the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;
/// A limit that is none is exported as Go does: the largest number.
const UNLIMITED: u64 = u64::MAX;

/// The state of the process.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Process {
    pub cpu_seconds: f64,
    pub start_time_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    pub virtual_limit_bytes: u64,
    pub open_files: u64,
    pub open_files_limit: u64,
    /// Of all network devices of the process's network namespace.
    pub received_bytes: u64,
    pub transmitted_bytes: u64,
}

impl Process {
    /// Reads everything; what cannot be read is zero.
    #[must_use]
    pub fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (stat, status, limits) = (text("/proc/self/stat"), text("/proc/self/status"), text("/proc/self/limits"));
        let (received_bytes, transmitted_bytes) = traffic(&text("/proc/self/net/dev"));
        let times = TaskTimes::parse(&stat).unwrap_or_default();
        Self {
            cpu_seconds: seconds(times.used),
            start_time_seconds: boot_time(&text("/proc/stat")) + seconds(times.started),
            resident_bytes: kilobytes(&status, "VmRSS:") * 1024,
            virtual_bytes: kilobytes(&status, "VmSize:") * 1024,
            virtual_limit_bytes: limit(&limits, "Max address space"),
            // Less the descriptor of the directory itself.
            open_files: fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64).saturating_sub(1),
            open_files_limit: limit(&limits, "Max open files"),
            received_bytes,
            transmitted_bytes,
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "metrics are floats, and no process runs for 2^53 ticks")]
fn seconds(ticks: u64) -> f64 {
    ticks as f64 / TICKS_PER_SECOND
}

/// The times in a `stat` file of a process or thread, in ticks.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct TaskTimes {
    /// In user and kernel mode.
    used: u64,
    /// When it was started, since the system was.
    started: u64,
}

impl TaskTimes {
    fn parse(stat: &str) -> Option<Self> {
        // The name, in parentheses, may contain anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self { used: number(11)? + number(12)?, started: number(19)? })
    }
}

/// When the system was started, in seconds of unix time.
fn boot_time(stat: &str) -> f64 {
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or_default()
}

fn kilobytes(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or_default()
}

/// The soft limit.
fn limit(limits: &str, name: &str) -> u64 {
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let soft = line.and_then(|rest| rest.split_ascii_whitespace().next());
    soft.map_or(0, |soft| soft.parse().unwrap_or(UNLIMITED))
}

/// Received and transmitted bytes, of all devices.
fn traffic(devices: &str) -> (u64, u64) {
    let counters = devices.lines().filter_map(|line| line.split_once(':')).map(|(_, counters)| {
        let counters: Vec<u64> = counters.split_ascii_whitespace().map(|number| number.parse().unwrap_or(0)).collect();
        let at = |nth: usize| counters.get(nth).copied().unwrap_or(0);
        (at(0), at(8))
    });
    counters.fold((0, 0), |total, device| (total.0 + device.0, total.1 + device.1))
}

/// Measures the processor time of threads, by what they are for.
#[derive(Default)]
pub struct ThreadTimes(Mutex<CountedThreads>);

#[derive(Default)]
struct CountedThreads {
    /// What was counted of each thread that was there last time: by its ID and the time of its start.
    counted: HashMap<(u64, u64), u64>,
}

impl ThreadTimes {
    /// What the threads of each kind have used since the last call, in seconds.
    pub fn since_last_time(&self) -> BTreeMap<String, f64> {
        let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let threads = tasks.filter_map(|task| {
            let id = task.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(task.path().join("stat")).ok()?; // It may have ended meanwhile.
            let name = stat.split_once('(')?.1.rsplit_once(')')?.0.to_owned();
            Some((id, name, TaskTimes::parse(&stat)?))
        });
        self.0.lock().since_last_time(threads)
    }
}

impl CountedThreads {
    fn since_last_time(
        &mut self,
        threads: impl IntoIterator<Item = (u64, String, TaskTimes)>,
    ) -> BTreeMap<String, f64> {
        let (mut counted, mut used_since) = (HashMap::new(), BTreeMap::<String, u64>::new());
        for (id, name, TaskTimes { used, started }) in threads {
            let before = self.counted.get(&(id, started)).copied().unwrap_or(0);
            *used_since.entry(kind(&name).to_owned()).or_default() += used.saturating_sub(before);
            counted.insert((id, started), used);
        }
        self.counted = counted;
        used_since.into_iter().map(|(name, ticks)| (name, seconds(ticks))).collect()
    }
}

/// What a thread is for, by its name.
fn kind(name: &str) -> &str {
    const PREFIXES: [(&str, &str); 6] = [
        ("to-", "peer_send"),
        ("from-peer", "peer_receive"),
        ("snapshot-", "snapshot_send"),
        ("rocksdb", "rocksdb"),
        ("watch", "watch"),
        ("metastore", "main"),
    ];
    let known = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix));
    // Threads of a pool are numbered.
    known.map_or_else(|| name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-'), |(_, kind)| kind)
}

/// The time, as metrics have it.
#[must_use]
pub fn unix_seconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_after_a_name_with_parentheses() {
        let fields: Vec<String> = (3..=52).map(|field: u32| field.to_string()).collect();
        let stat = format!("7 (a) b (c)) {}", fields.join(" "));
        assert_eq!(TaskTimes::parse(&stat), Some(TaskTimes { used: 14 + 15, started: 22 }));
        assert_eq!(TaskTimes::parse("7 (a) S 1"), None);
    }

    #[test]
    fn a_thread_is_counted_from_where_it_was_and_a_new_one_from_its_start() {
        let mut threads = CountedThreads::default();
        let thread = |id, name: &str, used, started| (id, name.to_owned(), TaskTimes { used, started });
        threads.since_last_time([thread(1, "to-ab", 100, 5), thread(2, "read-0", 50, 5), thread(3, "read-1", 50, 5)]);
        let now =
            threads.since_last_time([thread(1, "to-cd", 30, 9), thread(2, "read-0", 70, 5), thread(4, "raft", 10, 9)]);
        let expected = [("peer_send", 0.3), ("raft", 0.1), ("read", 0.2)];
        assert_eq!(now, expected.map(|(name, seconds)| (name.to_owned(), seconds)).into());
    }

    #[test]
    fn traffic_is_that_of_all_devices() {
        let devices = "Inter-| Receive | Transmit\n face |bytes\n  lo: 10 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\neth0:1 0 0 0 0 0 0 0 2 0\n";
        assert_eq!(traffic(devices), (11, 22));
    }

    #[test]
    fn a_limit_may_be_unlimited() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files  1024  4096  files\nMax address space  unlimited  unlimited  bytes\n";
        assert_eq!((limit(limits, "Max open files"), limit(limits, "Max address space")), (1024, UNLIMITED));
    }

    #[test]
    fn this_process_is_read() {
        let process = Process::read();
        assert!(process.resident_bytes > 1 << 20 && process.virtual_bytes >= process.resident_bytes, "{process:?}");
        assert!(process.open_files >= 3 && process.open_files_limit >= process.open_files, "{process:?}");
        // A test does not run for a day, and the two clocks may differ a little.
        #[allow(clippy::cast_precision_loss, reason = "it is the time")]
        let age = unix_seconds() as f64 - process.start_time_seconds;
        assert!((-60.0..24.0 * 3600.0).contains(&age), "{process:?}");
        assert!(!ThreadTimes::default().since_last_time().is_empty());
    }
}
