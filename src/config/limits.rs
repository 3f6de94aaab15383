//! Limits on memory, threads, watches and connections. etcd has no flags for these, and for most of them no limit at all. The
//! defaults suit most deployments; a value outside the permitted range is refused with a message that states the range.

use std::time::Duration;

use super::{parse::FlagValues, value::count};
use crate::state::txn_decode::MAX_LEVELS;

const MIN_WRITE_BUFFER_BYTES: u64 = 64 << 10;
const MIN_SNAPSHOT_BYTES_PER_SECOND: u64 = 1 << 20;
const MIN_PEER_CONNECTIONS: u64 = 16;
const MIN_PEER_CONNECTIONS_BEFORE_HELLO: u64 = 2;
const MAX_THREADS: u64 = 1024;
/// What the answer with a single value takes in addition to the request that has written the value.
const ANSWER_OVERHEAD_BYTES: u64 = 512 << 10;
const DEFAULT_KEEPALIVE_INTERVAL: Duration = Duration::from_hours(2);
const DEFAULT_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
const MIN_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Memory for blocks of the database's files.
    pub block_cache_bytes: usize,
    /// Memory for each of the database's write buffers.
    pub write_buffer_bytes: usize,
    /// Bytes of log since the last flush of the database at which a flush starts.
    pub flush_log_bytes: u64,
    /// Maximum time from a write to a flush.
    pub flush_interval: Duration,
    /// Committed entries not yet applied at which requests are refused.
    pub max_apply_backlog: u64,
    /// Log kept in memory for members that lag behind.
    pub lagging_log_bytes: usize,
    /// Messages queued for one other member.
    pub peer_queue_bytes: usize,
    /// Maximum number of connections from one address to the peer port.
    pub peer_connections_per_address: usize,
    /// Maximum number of these that have not sent their hello yet.
    pub peer_connections_before_hello: usize,
    /// How long a connection to the peer port may take to send its hello.
    pub peer_hello_timeout: Duration,
    /// A member that sends more slowly is disconnected.
    pub peer_min_bytes_per_second: u64,
    /// Rate at which a snapshot is sent to another member.
    pub snapshot_bytes_per_second: u64,
    /// Memory for recent events.
    pub watch_ring_bytes: usize,
    /// Events queued for one watch stream.
    pub watch_pending_bytes: usize,
    /// Events queued for all watch streams together.
    pub all_watch_pending_bytes: usize,
    pub max_watches_per_stream: usize,
    /// Watches of all streams of this member.
    pub max_watches: usize,
    /// Leases at which this member grants no more.
    pub max_leases: usize,
    /// Levels of a nested transaction.
    pub max_txn_depth: usize,
    /// Bytes of the answer to a read.
    pub max_answer_bytes: usize,
    /// Hashes and defragmentations that may wait for each other.
    pub max_waiting_hashes: usize,
    /// Threads for client connections. None: one per processor, less one.
    pub api_threads: Option<usize>,
    /// Threads for long reads. None: one per processor.
    pub read_threads: Option<usize>,
    /// Maximum number of client connections. None: what the limit of open files leaves.
    pub max_connections: Option<usize>,
    /// The same for connections from one address. None: no limit of their own.
    pub max_connections_per_address: Option<usize>,
    /// A client that has been silent for this long is sent a keepalive ping.
    pub keepalive_interval: Duration,
    /// How long the client may take to answer the ping.
    pub keepalive_timeout: Duration,
}

impl Limits {
    pub fn read(values: &FlagValues) -> Result<Self, String> {
        let number = |flag: &str| values.get::<u64>(flag);
        let at_least = |flag: &str, least: u64| match number(flag) {
            value if value >= least => Ok(count(value)),
            value => Err(format!("--{flag} must be at least {least} (set to {value})")),
        };
        let unless_zero = |flag: &str| Some(number(flag)).filter(|&value| value > 0).map(count);
        // As in grpc-go: if either of the two is zero, both take their defaults.
        let mut keepalive = ["grpc-keepalive-interval", "grpc-keepalive-timeout"].map(|flag| values.duration(flag));
        if keepalive.iter().any(Duration::is_zero) {
            keepalive = [DEFAULT_KEEPALIVE_INTERVAL, DEFAULT_KEEPALIVE_TIMEOUT];
        }
        let non_zero_time = |flag: &str| match values.duration(flag) {
            time if time.is_zero() => Err(format!("--{flag} must be >0 (set to {})", values.text(flag))),
            time => Ok(time),
        };
        let flush_interval = non_zero_time("flush-interval")?;
        for (flag, most) in
            [("api-threads", MAX_THREADS), ("read-threads", MAX_THREADS), ("max-txn-depth", MAX_LEVELS as u64)]
        {
            let value = number(flag);
            if value > most {
                return Err(format!("--{flag} must be at most {most} (set to {value})"));
            }
        }
        Ok(Self {
            block_cache_bytes: count(number("block-cache-bytes")),
            write_buffer_bytes: at_least("write-buffer-bytes", MIN_WRITE_BUFFER_BYTES)?,
            flush_log_bytes: number("flush-log-bytes"),
            flush_interval,
            max_apply_backlog: number("max-apply-backlog"),
            lagging_log_bytes: count(number("laggard-log-bytes")),
            peer_queue_bytes: count(number("peer-queue-bytes")),
            peer_connections_per_address: at_least("peer-connections-per-address", MIN_PEER_CONNECTIONS)?,
            peer_connections_before_hello: at_least(
                "peer-connections-before-hello",
                MIN_PEER_CONNECTIONS_BEFORE_HELLO,
            )?,
            peer_hello_timeout: non_zero_time("peer-hello-timeout")?,
            peer_min_bytes_per_second: at_least("peer-min-bytes-per-second", 1)? as u64,
            snapshot_bytes_per_second: at_least("snapshot-bytes-per-second", MIN_SNAPSHOT_BYTES_PER_SECOND)? as u64,
            watch_ring_bytes: count(number("watch-ring-bytes")),
            watch_pending_bytes: at_least("watch-pending-bytes", 1)?,
            all_watch_pending_bytes: at_least("all-watch-pending-bytes", 1)?,
            max_watches_per_stream: at_least("max-watches-per-stream", 1)?,
            max_watches: at_least("max-watches", 1)?,
            max_leases: at_least("max-leases", 1)?,
            max_txn_depth: at_least("max-txn-depth", 1)?,
            max_answer_bytes: max_answer_bytes(values)?,
            max_waiting_hashes: at_least("max-waiting-hashes", 1)?,
            api_threads: unless_zero("api-threads"),
            read_threads: unless_zero("read-threads"),
            max_connections: unless_zero("max-connections"),
            max_connections_per_address: unless_zero("max-connections-per-address"),
            keepalive_interval: keepalive[0].max(MIN_KEEPALIVE_INTERVAL),
            keepalive_timeout: keepalive[1],
        })
    }
}

/// What can be written must be readable: a value may be as long as a request.
fn max_answer_bytes(values: &FlagValues) -> Result<usize, String> {
    let bytes = values.get::<u64>("max-answer-bytes");
    let least = values.get::<u64>("max-request-bytes").saturating_add(ANSWER_OVERHEAD_BYTES);
    if bytes >= least {
        return Ok(count(bytes));
    }
    Err(format!(
        "--max-answer-bytes must be at least {least}, which is {ANSWER_OVERHEAD_BYTES} more than --max-request-bytes \
         (set to {bytes})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Limits, String> {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let (values, _) = FlagValues::from_arguments(&arguments).unwrap_or_else(|_| panic!("{arguments:?}"));
        Limits::read(&values)
    }

    #[test]
    fn every_limit_has_a_default() {
        let limits = read(&[]).unwrap();
        assert_eq!((limits.watch_ring_bytes, limits.watch_pending_bytes), (8 << 20, 1 << 20));
        assert_eq!((limits.all_watch_pending_bytes, limits.max_watches_per_stream), (128 << 20, 1_000_000));
        assert_eq!((limits.block_cache_bytes, limits.write_buffer_bytes), (16 << 20, 16 << 20));
        assert_eq!((limits.flush_log_bytes, limits.flush_interval), (32 << 20, Duration::from_mins(1)));
        assert_eq!(limits.max_apply_backlog, 5000);
        assert_eq!((limits.lagging_log_bytes, limits.peer_queue_bytes), (192 << 20, 64 << 20));
        assert_eq!(limits.snapshot_bytes_per_second, 128 << 20);
        assert_eq!((limits.peer_connections_per_address, limits.peer_connections_before_hello), (1024, 16));
        assert_eq!((limits.peer_hello_timeout, limits.peer_min_bytes_per_second), (Duration::from_secs(5), 64 << 10));
        assert_eq!((limits.read_threads, limits.max_connections), (None, None));
        assert_eq!((limits.max_watches, limits.max_leases), (10_000_000, 10_000_000));
        assert_eq!((limits.max_txn_depth, limits.max_answer_bytes), (500, 1 << 30));
        assert_eq!((limits.max_waiting_hashes, limits.max_connections_per_address), (16, None));
    }

    #[test]
    fn flags_override_the_defaults() {
        let limits = read(&["--watch-ring-bytes=0", "--read-threads=3", "--max-connections=7", "--flush-interval=2s"]);
        let limits = limits.unwrap();
        assert_eq!((limits.watch_ring_bytes, limits.read_threads, limits.max_connections), (0, Some(3), Some(7)));
        assert_eq!(limits.flush_interval, Duration::from_secs(2));
    }

    #[test]
    fn keepalive_flags_are_adjusted_as_in_grpc() {
        for (arguments, interval, timeout) in [
            (vec![], 7200, 20),
            (vec!["--grpc-keepalive-interval=30s", "--grpc-keepalive-timeout=3s"], 30, 3),
            (vec!["--grpc-keepalive-interval=10ms"], 1, 20),
            (vec!["--grpc-keepalive-interval=0s", "--grpc-keepalive-timeout=3s"], 7200, 20),
        ] {
            let limits = read(&arguments).unwrap();
            let seconds = (limits.keepalive_interval.as_secs(), limits.keepalive_timeout.as_secs());
            assert_eq!(seconds, (interval, timeout), "{arguments:?}");
        }
    }

    #[test]
    fn a_limit_out_of_range_is_refused() {
        for (argument, error) in [
            ("--max-watches-per-stream=0", "--max-watches-per-stream must be at least 1 (set to 0)"),
            ("--watch-pending-bytes=0", "--watch-pending-bytes must be at least 1 (set to 0)"),
            ("--all-watch-pending-bytes=0", "--all-watch-pending-bytes must be at least 1 (set to 0)"),
            ("--write-buffer-bytes=1000", "--write-buffer-bytes must be at least 65536 (set to 1000)"),
            ("--api-threads=1025", "--api-threads must be at most 1024 (set to 1025)"),
            ("--max-watches=0", "--max-watches must be at least 1 (set to 0)"),
            ("--max-leases=0", "--max-leases must be at least 1 (set to 0)"),
            ("--max-waiting-hashes=0", "--max-waiting-hashes must be at least 1 (set to 0)"),
            ("--max-txn-depth=0", "--max-txn-depth must be at least 1 (set to 0)"),
            ("--max-txn-depth=501", "--max-txn-depth must be at most 500 (set to 501)"),
            (
                "--max-answer-bytes=2097151",
                "--max-answer-bytes must be at least 2097152, which is 524288 more than --max-request-bytes (set to \
                 2097151)",
            ),
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
