//! The command line of `metastore bench`; `plan` resolves and checks it.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};

/// Puts load on any server that speaks etcd's v3 API, and measures it.
///
/// Latencies are percentiles of an HDR histogram. With --rate, calls are due at fixed times whether or not the server
/// keeps up, and latency is measured from the time at which a call was due. With --server-pid, the server's CPU time per
/// operation and its memory are reported too. Ctrl-C ends the run early; what was measured until then is reported.
#[derive(Parser, Debug)]
#[command(name = "metastore bench", bin_name = "metastore bench", max_term_width = 100)]
#[command(after_help = "Examples:
  metastore bench put --clients 100 --duration 10s
  metastore bench range --clients 1000 --rate 20000 --endpoints 10.0.0.1:2379,10.0.0.2:2379
  metastore bench watch --watchers 1000 --streams 10 --rate 100 --server-pid $(pidof etcd)
  metastore bench load --key-space 1000000 --clients 200 --json

Exit codes: 0 success, 1 an operation failed, 2 invalid options.")]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Subcommand, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one value per process")]
pub(super) enum Command {
    /// Put load on a server.
    #[command(flatten)]
    Run(WorkloadArgs),
    /// Wait until the server answers a serializable range, and print the milliseconds that this took.
    #[command(hide = true)]
    Ready(ReadyArgs),
    /// Compare the JSON lines of two servers in a Markdown table.
    #[command(hide = true)]
    Compare(CompareArgs),
}

#[derive(Subcommand, Debug)]
pub(super) enum WorkloadArgs {
    /// Write random keys of the key space.
    Put(CallsArgs),
    /// Read one random key per call; fills the key space first.
    Range(RangeArgs),
    /// Read many consecutive keys per call; fills the key space first.
    List(ListArgs),
    /// Compare-and-swap random keys on their modification revision; fills the key space first.
    ///
    /// If another caller has changed the key first, the call reads its new revision instead. This is not a failure; the
    /// report shows how often it happened.
    Txn(CallsArgs),
    /// Write at a fixed rate and verify that every event reaches every watcher.
    ///
    /// An operation is an event; its latency is the time from when its put was due until a watcher received it. The clients
    /// are the writers; without --rate they write 100 times per second. The key space consists of the watched keys.
    Watch(WatchArgs),
    /// Keep leases alive, one stream per client.
    Lease(LeaseArgs),
    /// Write each key of the key space once, to measure memory, disk usage and restarts.
    Load(LoadArgs),
}

/// Servers, callers and connections.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Target")]
pub(super) struct TargetArgs {
    /// Comma-separated list of servers; connections are distributed over them.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',', default_value = "127.0.0.1:2379")]
    pub(super) endpoints: Vec<String>,
    /// Number of callers, each with one call in flight.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub(super) clients: u32,
    /// Connections, shared by the callers; for watches as many again. [default: as many as clients, up to 100]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=60_000))]
    pub(super) connections: Option<u32>,
    /// Threads of the load generator. [default: the number of cores]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
    pub(super) threads: Option<u32>,
    /// Give up after this long without any response; the calls in flight then count as failed.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub(super) timeout: Duration,
    /// Log in as this user, once for each connection; not for watch and lease.
    #[arg(long, value_name = "NAME:PASSWORD")]
    pub(super) user: Option<String>,
    #[command(flatten)]
    pub(super) tls: TlsArgs,
}

/// For endpoints that begin with `https://`.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "TLS, for https:// endpoints")]
pub(super) struct TlsArgs {
    /// CA certificates to verify the servers with. [default: those of the system]
    #[arg(long, value_name = "FILE")]
    pub(super) cacert: Option<PathBuf>,
    /// Client certificate to show.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(super) cert: Option<PathBuf>,
    /// Key of the client certificate.
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub(super) key: Option<PathBuf>,
}

#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Keys and values")]
pub(super) struct KeyArgs {
    /// Number of distinct keys.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = value_parser!(u64).range(1..))]
    pub(super) key_space: u64,
    /// Size of a key in bytes, including the prefix.
    #[arg(long, value_name = "BYTES", default_value_t = 24, value_parser = value_parser!(u32).range(1..=65_536))]
    pub(super) key_size: u32,
    /// Size of a value in bytes; the bytes are random.
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = value_parser!(u32).range(0..=64 << 20))]
    pub(super) value_size: u32,
    /// Prefix of every key.
    #[arg(long, value_name = "TEXT", default_value = "bench/")]
    pub(super) prefix: String,
    /// Seed of the random numbers: equal seeds result in equal requests.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) seed: u64,
}

/// Duration and rate.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Extent")]
pub(super) struct ExtentArgs {
    /// Measure this many operations (for watch: puts) instead of a duration.
    #[arg(long, value_name = "N", conflicts_with = "duration", value_parser = value_parser!(u64).range(1..))]
    pub(super) total: Option<u64>,
    /// Measure for this long. [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(super) duration: Option<Duration>,
    /// Run for this long before measuring begins.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    pub(super) warmup: Duration,
    /// Calls due per second, over all clients. [default: each client calls again as soon as it receives the response]
    #[arg(long, value_name = "PER-SECOND")]
    pub(super) rate: Option<f64>,
}

#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Report")]
pub(super) struct ReportArgs {
    /// Print one line of JSON instead of text.
    #[arg(long)]
    pub(super) json: bool,
    /// Name of this run, repeated in the report.
    #[arg(long, value_name = "TEXT")]
    pub(super) label: Option<String>,
    /// Measure the total CPU time and memory of these processes (servers on this machine).
    #[arg(long, value_name = "PID", value_delimiter = ',')]
    pub(super) server_pid: Vec<u32>,
}

/// Options of every workload but `load`.
#[derive(Args, Debug, Clone)]
pub(super) struct CallsArgs {
    #[command(flatten)]
    pub(super) target: TargetArgs,
    #[command(flatten)]
    pub(super) keys: KeyArgs,
    #[command(flatten)]
    pub(super) extent: ExtentArgs,
    #[command(flatten)]
    pub(super) report: ReportArgs,
}

/// Options of `range`.
#[derive(Args, Debug)]
pub(super) struct RangeArgs {
    /// Use serializable instead of linearizable reads.
    #[arg(long)]
    pub(super) serializable: bool,
    #[command(flatten)]
    pub(super) calls: CallsArgs,
}

/// Options of `list`.
#[derive(Args, Debug)]
pub(super) struct ListArgs {
    /// Keys per call; at most the key space.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = value_parser!(u64).range(1..))]
    pub(super) list_keys: u64,
    /// Return this many of them; the others are only counted. [default: all]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    pub(super) limit: Option<u64>,
    /// Return keys without values.
    #[arg(long)]
    pub(super) keys_only: bool,
    /// Use serializable instead of linearizable reads.
    #[arg(long)]
    pub(super) serializable: bool,
    #[command(flatten)]
    pub(super) calls: CallsArgs,
}

/// Options of `watch`; the clients are the writers, and without --rate there are 100 puts per second.
#[derive(Args, Debug)]
pub(super) struct WatchArgs {
    /// Number of watchers.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = value_parser!(u32).range(1..=10_000_000))]
    pub(super) watchers: u32,
    /// Number of streams, shared by the watchers; the streams share the connections.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub(super) streams: u32,
    /// Whether all watchers watch one key, or each a key of its own.
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = WatchedKeys::One)]
    pub(super) watched: WatchedKeys,
    #[command(flatten)]
    pub(super) calls: CallsArgs,
}

/// Which keys the watchers of `watch` watch.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WatchedKeys {
    /// All watch the same key: a put causes as many events as there are watchers.
    One,
    /// Each watches a key of its own: a put causes one event.
    Own,
}

/// Options of `lease`.
#[derive(Args, Debug)]
pub(super) struct LeaseArgs {
    /// Number of leases to keep alive, distributed over the clients. [default: one per client]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=10_000_000))]
    pub(super) leases: Option<u32>,
    /// TTL of the leases in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = value_parser!(i64).range(2..=9_000_000_000))]
    pub(super) ttl: i64,
    #[command(flatten)]
    pub(super) calls: CallsArgs,
}

/// Options of `load`.
#[derive(Args, Debug)]
pub(super) struct LoadArgs {
    /// The order in which the keys are written.
    #[arg(long, value_enum, default_value_t = LoadOrder::Sequential)]
    pub(super) order: LoadOrder,
    /// Calls due per second, over all clients. [default: each client calls again as soon as it receives the response]
    #[arg(long, value_name = "PER-SECOND")]
    pub(super) rate: Option<f64>,
    #[command(flatten)]
    pub(super) target: TargetArgs,
    #[command(flatten)]
    pub(super) keys: KeyArgs,
    #[command(flatten)]
    pub(super) report: ReportArgs,
}

/// The order of `load`.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoadOrder {
    /// Ascending.
    Sequential,
    /// Shuffled; each key exactly once.
    Random,
}

/// Options of `ready`.
#[derive(Args, Debug)]
pub(super) struct ReadyArgs {
    /// The server.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:2379")]
    pub(super) endpoint: String,
    /// Fail after this long.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub(super) timeout: Duration,
    /// Fail at once when this process (the server) ends.
    #[arg(long, value_name = "PID")]
    pub(super) server_pid: Option<u32>,
    #[command(flatten)]
    pub(super) tls: TlsArgs,
}

/// Options of `compare`.
#[derive(Args, Debug)]
pub(super) struct CompareArgs {
    /// JSON lines of the baseline server.
    pub(super) theirs: PathBuf,
    /// JSON lines of the server that is compared with it.
    pub(super) ours: PathBuf,
}

/// Parses `1500ms`, `10s`, `2m`, `1h`; fractions are allowed.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("a time needs a unit: us, ms, s, m or h, as in 10s".to_owned()),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    Duration::try_from_secs_f64(number * unit).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(arguments: &str) -> String {
        Arguments::try_parse_from(arguments.split(' ')).unwrap_err().to_string()
    }

    #[test]
    fn the_argument_definition_is_valid() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for invalid in ["10", "s", "", "tens", "-1s", "1e400s", "NaNs", "1d", "9µs"] {
            assert!(parse_duration(invalid).is_err(), "{invalid:?} was accepted");
        }
    }

    #[test]
    fn out_of_range_options_are_refused_with_the_range() {
        assert!(refusal("bench put --clients 0").contains("1..="));
        assert!(refusal("bench put --key-size 0").contains("1..=65536"));
        assert!(refusal("bench put --duration 10").contains("needs a unit"));
        assert!(refusal("bench put --total 5 --duration 1s").contains("cannot be used with"));
        assert!(refusal("bench lease --ttl 1").contains("2..="));
        assert!(refusal("bench load --total 5").contains("unexpected argument '--total'"));
        assert!(refusal("bench range --serialisable").contains("--serializable"));
    }
}
