//! Bounds of our own: how much memory, how many threads, watches and connections. etcd has no flag for these, and for most no
//! bound. Each has a default that nobody needs to change, and says what is allowed when it is changed to something else.

use std::time::Duration;

use super::{
    flags::{Flag, Kind, flag},
    parse::Typed,
    resolve,
};

/// The flags.
pub const FLAGS: &[Flag] = &[
    flag("value-cache-bytes", Kind::Unsigned, "16777216", "Memory for recently written and read values."),
    flag("block-cache-bytes", Kind::Unsigned, "16777216", "Memory for blocks of the database's files."),
    flag(
        "write-buffer-bytes",
        Kind::Unsigned,
        "16777216",
        "Memory for each of the database's two write buffers; at least 65536.",
    ),
    flag("flush-log-bytes", Kind::Unsigned, "33554432", "Log behind the database's last flush that starts a flush."),
    flag("flush-interval", Kind::Duration, "1m0s", "Longest time from a write to a flush of the database."),
    flag("max-apply-backlog", Kind::Unsigned, "5000", "Entries between commit and apply that are too many requests."),
    flag(
        "laggard-log-bytes",
        Kind::Unsigned,
        "201326592",
        "Log kept in memory for members that are behind; beyond, they get a snapshot.",
    ),
    flag(
        "peer-queue-bytes",
        Kind::Unsigned,
        "67108864",
        "Messages that may wait for one other member; more are lost and sent again.",
    ),
    flag(
        "peer-connections-per-address",
        Kind::Unsigned,
        "1024",
        "Connections from one address to the port for members; more are refused. At least 16.",
    ),
    flag(
        "peer-connections-before-hello",
        Kind::Unsigned,
        "16",
        "Of these, connections that have not said yet what they are; a new one closes the oldest. At least 2.",
    ),
    flag("peer-hello-timeout", Kind::Duration, "5s", "How long such a connection may take to say it."),
    flag(
        "peer-min-bytes-per-second",
        Kind::Unsigned,
        "65536",
        "A member that sends a message or a snapshot more slowly is disconnected, after a grace; at least 1.",
    ),
    flag(
        "snapshot-bytes-per-second",
        Kind::Unsigned,
        "134217728",
        "How fast a snapshot goes to another member; at least 1048576.",
    ),
    flag("watch-ring-bytes", Kind::Unsigned, "8388608", "Memory for recent events; older ones are read from disk."),
    flag(
        "watch-pending-bytes",
        Kind::Unsigned,
        "1048576",
        "Events that may wait for one watch stream; more make it lag behind.",
    ),
    flag(
        "all-watch-pending-bytes",
        Kind::Unsigned,
        "134217728",
        "The same, for all watch streams together; beyond it those lag behind for which more than a fair share waits.",
    ),
    flag("max-watches-per-stream", Kind::Unsigned, "1000000", "Watches of one stream; more are refused."),
    flag(
        "api-threads",
        Kind::Unsigned,
        "0",
        "Threads for clients' connections; 0 is one for each processor but one, most 1024.",
    ),
    flag("read-threads", Kind::Unsigned, "0", "Threads for long reads; 0 is one for each processor, most 1024."),
    flag(
        "max-connections",
        Kind::Unsigned,
        "0",
        "Client connections at a time, others wait; 0 is what the limit of open files leaves.",
    ),
];

const SMALLEST_WRITE_BUFFER: u64 = 64 << 10;
const SLOWEST_SNAPSHOT: u64 = 1 << 20;
const LEAST_PEER_CONNECTIONS: u64 = 16;
const LEAST_BEFORE_HELLO: u64 = 2;
const MOST_THREADS: u64 = 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_hours(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
const SHORTEST_KEEPALIVE: Duration = Duration::from_secs(1);

/// The bounds, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Memory for blocks of the database's files.
    pub block_cache_bytes: usize,
    /// Memory for each of the database's write buffers.
    pub write_buffer_bytes: usize,
    /// Log behind the database's last flush that starts a flush.
    pub flush_log_bytes: u64,
    /// Longest time from a write to a flush.
    pub flush_interval: Duration,
    /// Entries between commit and apply that are too many requests.
    pub max_apply_backlog: u64,
    /// Log kept in memory for members that are behind.
    pub laggard_log_bytes: usize,
    /// Messages that may wait for one other member.
    pub peer_queue_bytes: usize,
    /// Connections from one address to the port for members.
    pub peer_connections_per_address: usize,
    /// Of these, connections that have not said yet what they are.
    pub peer_connections_before_hello: usize,
    /// How long they may take to say it.
    pub peer_hello_timeout: Duration,
    /// A member that sends more slowly is disconnected.
    pub peer_min_bytes_per_second: u64,
    /// How fast a snapshot goes to another member.
    pub snapshot_bytes_per_second: u64,
    /// Memory for recent events.
    pub watch_ring_bytes: usize,
    /// Events that may wait for one stream.
    pub watch_pending_bytes: usize,
    /// Events that may wait for all streams together.
    pub all_watch_pending_bytes: usize,
    /// Watches of one stream.
    pub max_watches_per_stream: usize,
    /// Threads for clients' connections. None: one for each processor but one.
    pub api_threads: Option<usize>,
    /// Threads for long reads. None: one for each processor.
    pub read_threads: Option<usize>,
    /// Client connections at a time. None: what the limit of open files leaves.
    pub max_connections: Option<usize>,
    /// A client that was silent for so long is asked whether it is still there.
    pub keepalive_interval: Duration,
    /// How long it may take to answer that.
    pub keepalive_timeout: Duration,
}

impl Bounds {
    /// Reads and checks them.
    pub fn read(typed: &Typed) -> Result<Self, String> {
        let number = |flag: &str| typed.get::<u64>(flag);
        let at_least = |flag: &str, least: u64| match number(flag) {
            value if value >= least => Ok(resolve::count(value)),
            value => Err(format!("--{flag} must be at least {least} (set to {value})")),
        };
        let unless_zero = |flag: &str| Some(number(flag)).filter(|&value| value > 0).map(resolve::count);
        // As in gRPC itself: without one of the two, both are as if nothing had been typed.
        let mut keepalive =
            ["grpc-keepalive-interval", "grpc-keepalive-timeout"].map(|flag| resolve::time(typed, flag));
        if keepalive.iter().any(Duration::is_zero) {
            keepalive = [KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT];
        }
        let some_time = |flag: &str| match resolve::time(typed, flag) {
            time if time.is_zero() => Err(format!("--{flag} must be >0 (set to {})", typed.text(flag))),
            time => Ok(time),
        };
        let flush_interval = some_time("flush-interval")?;
        for flag in ["api-threads", "read-threads"] {
            let threads = number(flag);
            if threads > MOST_THREADS {
                return Err(format!("--{flag} must be at most {MOST_THREADS} (set to {threads})"));
            }
        }
        Ok(Self {
            block_cache_bytes: resolve::count(number("block-cache-bytes")),
            write_buffer_bytes: at_least("write-buffer-bytes", SMALLEST_WRITE_BUFFER)?,
            flush_log_bytes: number("flush-log-bytes"),
            flush_interval,
            max_apply_backlog: number("max-apply-backlog"),
            laggard_log_bytes: resolve::count(number("laggard-log-bytes")),
            peer_queue_bytes: resolve::count(number("peer-queue-bytes")),
            peer_connections_per_address: at_least("peer-connections-per-address", LEAST_PEER_CONNECTIONS)?,
            peer_connections_before_hello: at_least("peer-connections-before-hello", LEAST_BEFORE_HELLO)?,
            peer_hello_timeout: some_time("peer-hello-timeout")?,
            peer_min_bytes_per_second: at_least("peer-min-bytes-per-second", 1)? as u64,
            snapshot_bytes_per_second: at_least("snapshot-bytes-per-second", SLOWEST_SNAPSHOT)? as u64,
            watch_ring_bytes: resolve::count(number("watch-ring-bytes")),
            watch_pending_bytes: at_least("watch-pending-bytes", 1)?,
            all_watch_pending_bytes: at_least("all-watch-pending-bytes", 1)?,
            max_watches_per_stream: at_least("max-watches-per-stream", 1)?,
            api_threads: unless_zero("api-threads"),
            read_threads: unless_zero("read-threads"),
            max_connections: unless_zero("max-connections"),
            keepalive_interval: keepalive[0].max(SHORTEST_KEEPALIVE),
            keepalive_timeout: keepalive[1],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Bounds, String> {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let (typed, _) = Typed::from_arguments(&arguments).unwrap_or_else(|_| panic!("{arguments:?}"));
        Bounds::read(&typed)
    }

    #[test]
    fn unasked_every_bound_has_its_default() {
        let bounds = read(&[]).unwrap();
        assert_eq!((bounds.watch_ring_bytes, bounds.watch_pending_bytes), (8 << 20, 1 << 20));
        assert_eq!((bounds.all_watch_pending_bytes, bounds.max_watches_per_stream), (128 << 20, 1_000_000));
        assert_eq!((bounds.block_cache_bytes, bounds.write_buffer_bytes), (16 << 20, 16 << 20));
        assert_eq!((bounds.flush_log_bytes, bounds.flush_interval), (32 << 20, Duration::from_mins(1)));
        assert_eq!(bounds.max_apply_backlog, 5000);
        assert_eq!((bounds.laggard_log_bytes, bounds.peer_queue_bytes), (192 << 20, 64 << 20));
        assert_eq!(bounds.snapshot_bytes_per_second, 128 << 20);
        assert_eq!((bounds.peer_connections_per_address, bounds.peer_connections_before_hello), (1024, 16));
        assert_eq!((bounds.peer_hello_timeout, bounds.peer_min_bytes_per_second), (Duration::from_secs(5), 64 << 10));
        assert_eq!((bounds.read_threads, bounds.max_connections), (None, None));
    }

    #[test]
    fn what_is_typed_counts() {
        let bounds = read(&["--watch-ring-bytes=0", "--read-threads=3", "--max-connections=7", "--flush-interval=2s"]);
        let bounds = bounds.unwrap();
        assert_eq!((bounds.watch_ring_bytes, bounds.read_threads, bounds.max_connections), (0, Some(3), Some(7)));
        assert_eq!(bounds.flush_interval, Duration::from_secs(2));
    }

    #[test]
    fn silence_is_broken_as_in_grpc() {
        for (arguments, interval, timeout) in [
            (vec![], 7200, 20),
            (vec!["--grpc-keepalive-interval=30s", "--grpc-keepalive-timeout=3s"], 30, 3),
            (vec!["--grpc-keepalive-interval=10ms"], 1, 20),
            (vec!["--grpc-keepalive-interval=0s", "--grpc-keepalive-timeout=3s"], 7200, 20),
        ] {
            let bounds = read(&arguments).unwrap();
            let seconds = (bounds.keepalive_interval.as_secs(), bounds.keepalive_timeout.as_secs());
            assert_eq!(seconds, (interval, timeout), "{arguments:?}");
        }
    }

    #[test]
    fn a_bound_that_nothing_could_keep_is_refused() {
        for (argument, error) in [
            ("--max-watches-per-stream=0", "--max-watches-per-stream must be at least 1 (set to 0)"),
            ("--watch-pending-bytes=0", "--watch-pending-bytes must be at least 1 (set to 0)"),
            ("--all-watch-pending-bytes=0", "--all-watch-pending-bytes must be at least 1 (set to 0)"),
            ("--write-buffer-bytes=1000", "--write-buffer-bytes must be at least 65536 (set to 1000)"),
            ("--api-threads=1025", "--api-threads must be at most 1024 (set to 1025)"),
            ("--read-threads=1025", "--read-threads must be at most 1024 (set to 1025)"),
            ("--peer-connections-per-address=15", "--peer-connections-per-address must be at least 16 (set to 15)"),
            ("--peer-connections-before-hello=1", "--peer-connections-before-hello must be at least 2 (set to 1)"),
            ("--peer-min-bytes-per-second=0", "--peer-min-bytes-per-second must be at least 1 (set to 0)"),
            ("--peer-hello-timeout=0s", "--peer-hello-timeout must be >0 (set to 0s)"),
            ("--flush-interval=0s", "--flush-interval must be >0 (set to 0s)"),
        ] {
            assert_eq!(read(&[argument]), Err(error.to_owned()));
        }
    }
}
