//! Configuration: from command-line flags and environment variables to one validated [`Config`].
//!
//! ```text
//! arguments, ETCD_ variables ──parse──► one text per flag ──resolve──► Config
//!                              │                            │
//!                              └─ error: Go's text, exit 2  └─ error: a log line, exit 1
//! ```
//!
//! The command line is compatible with etcd's to the letter, so that a start command, a systemd unit or a chart written for
//! etcd starts metastore. [`flags`] is the table of all flags, `parse` reads arguments and variables, `resolve` checks what
//! they mean together. Warnings about the configuration are returned as notices, because logging is itself configured here.
//!
//! Settings that matter only while there is no data (the initial members) are checked by [`Config::parse_initial_cluster`]; a
//! restart ignores them.

pub mod access;
pub mod auth;
pub mod duration;
pub mod flag;
pub mod flags;
pub mod frontend;
pub mod gates;
mod initial_cluster;
pub mod limits;
mod parse;
pub mod quick_api;
mod quickstart;
mod resolve;
pub mod tls;
pub mod url_resolution;
pub mod usage;
mod value;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use crate::{
    logging::{self, Level, Notice},
    net::url::Url,
};
use gates::FeatureGates;
pub use initial_cluster::InitialCluster;
use limits::Limits;
use parse::{FlagValues, Stop};
use quick_api::QuickApiConfig;

/// etcd's message for flags that contradict each other.
const NOT_VERIFIED: &str = "failed to verify flags";

/// etcd's message for a start that fails later, whatever the cause.
const START_FAILED: &str = "discovery failed";

/// The complete, validated configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is an independent flag")]
pub struct Config {
    /// The human-readable name of this member.
    pub name: String,
    pub data_dir: PathBuf,
    pub listen_client_urls: Vec<Url>,
    /// URLs for HTTP alone; if there are any, `listen_client_urls` are for gRPC alone.
    pub listen_client_http_urls: Vec<Url>,
    /// URLs for metrics and health, beside those for clients.
    pub listen_metrics_urls: Vec<Url>,
    /// None: there is no quick HTTP API.
    pub quick_api: Option<QuickApiConfig>,
    /// The client URLs that this member advertises to clients and other members.
    pub advertise_client_urls: Vec<Url>,
    pub listen_peer_urls: Vec<Url>,
    /// The peer URLs that this member advertises to other members, from the first start on.
    pub initial_advertise_peer_urls: Vec<Url>,
    /// Whether `initial_advertise_peer_urls` was set explicitly.
    pub advertise_peer_urls_is_set: bool,
    /// The initial members, as given; parsed by [`Config::parse_initial_cluster`].
    pub initial_cluster: String,
    /// Whether the first start bootstraps a new cluster or joins an existing one.
    pub initial_cluster_state: ClusterState,
    /// Distinguishes clusters that have the same URLs.
    pub initial_cluster_token: String,
    /// One raft tick.
    pub heartbeat_interval: Duration,
    /// How long a member waits without a leader before it campaigns.
    pub election_timeout: Duration,
    pub pre_vote: bool,
    /// Whether the first election after a start is held early.
    pub advance_first_election: bool,
    /// Whether membership changes that could lose the quorum are refused.
    pub strict_reconfig_check: bool,
    /// Maximum number of learners in the cluster.
    pub max_learners: u64,
    /// Whether to become the sole member of a cluster whose other members are lost.
    pub force_new_cluster: bool,
    /// Number of applied entries after which the log may be truncated.
    pub snapshot_count: u64,
    /// Entries that a truncation of the log keeps for slow members.
    pub snapshot_catchup_entries: u64,
    /// Maximum number of comparisons, and of operations per branch, in one transaction.
    pub max_txn_ops: usize,
    pub max_request_bytes: usize,
    /// Maximum number of concurrent HTTP/2 streams per connection.
    pub max_concurrent_streams: u32,
    /// Size of the data at which writes are refused. None: no limit.
    pub quota_bytes: Option<u64>,
    pub auto_compaction: AutoCompaction,
    /// Time between comparisons of the data with other members. None: never.
    pub corrupt_check_interval: Option<Duration>,
    /// Time between comparisons of compaction hashes, if feature gate `CompactHashCheck` is enabled.
    pub compact_hash_check_interval: Duration,
    /// Revisions that a compaction removes per batch.
    pub compaction_batch_limit: usize,
    /// How long a compaction sleeps between batches.
    pub compaction_sleep_interval: Duration,
    /// Time between progress notifications to watchers.
    pub watch_progress_notify_interval: Duration,
    /// An apply that takes longer is logged.
    pub warning_apply_duration: Duration,
    /// Whether calls are measured by method.
    pub extensive_metrics: bool,
    /// A request that takes longer is logged.
    pub warning_unary_request_duration: Duration,
    /// Whether log writes are acknowledged without waiting for fsync.
    pub unsafe_no_fsync: bool,
    /// Memory for recently written and read values.
    pub value_cache_bytes: usize,
    /// Whether other processes may listen on the same ports.
    pub socket_reuse_port: bool,
    /// Tokens and passwords.
    pub auth: auth::AuthConfig,
    /// Limits on memory, threads, watches and connections.
    pub limits: Limits,
    pub feature_gates: FeatureGates,
    /// Which web pages and host names may be used for HTTP.
    pub access: access::AccessConfig,
    /// Settings of the listeners for clients: HTTP/2 server, limits per connection.
    pub frontend: frontend::FrontendConfig,
    /// TLS, for clients and between members.
    pub tls: tls::TlsConfig,
    pub logs: logging::Settings,
}

/// What a member without data does at its first start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Bootstraps a new cluster.
    New,
    /// Joins a running cluster.
    Existing,
}

/// Which history is compacted automatically.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoCompaction {
    Off,
    /// Everything older than this.
    Periodic(Duration),
    /// Everything but this many of the newest revisions.
    Revisions(u64),
}

/// A configuration, and the notices to log about it.
#[derive(Debug)]
pub struct Parsed {
    pub config: Config,
    /// To be logged once logging has started.
    pub notices: Vec<Notice>,
}

/// Why the process exits before the server starts, and with which output.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    /// Plain text: help, the version, an invalid argument.
    Plain { code: u8, stdout: String, stderr: String },
    /// A log line, and exit code 1.
    Logged {
        logs: logging::Settings,
        /// All lines, the reason last.
        notices: Vec<Notice>,
    },
}

/// Parses the command line (without the program name) and the environment.
///
/// # Errors
/// The [`Exit`] to take if the server is not to be started.
pub fn from_process(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Parsed, Exit> {
    let arguments = arguments.into_iter().map(utf8).collect::<Result<Vec<_>, _>>()?;
    if let Some(program @ ("gateway" | "grpc-proxy")) = arguments.first().map(String::as_str) {
        return Err(Exit::verification_failed(Level::Fatal, format!("the program `{program}` is not supported yet")));
    }
    let (mut values, rest) = FlagValues::from_arguments(&arguments).map_err(Exit::from)?;
    if let Some(argument) = rest.first() {
        return Err(Exit::verification_failed(Level::Warn, format!("{argument:?} is not a valid flag")));
    }
    if values.get("version") {
        return Err(Exit::Plain { code: 0, stdout: usage::version(), stderr: String::new() });
    }
    let environment = environment.into_iter().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ETCD_"));
    let environment =
        environment.map(|(name, value)| Ok((utf8(name)?, utf8(value)?))).collect::<Result<Vec<_>, Exit>>()?;
    let mut notices = Vec::new();
    if let Err(reason) = values.add_environment(&environment, &mut notices) {
        notices.push(reason);
        return Err(Exit::Logged { logs: logging::Settings::default(), notices });
    }
    let logs = resolve::logs(&values)?;
    if let Err(error) = quickstart::expand(&mut values) {
        let reason = Notice::new(Level::Fatal, NOT_VERIFIED).with("error", error);
        return Err(Exit::Logged { logs, notices: vec![reason] });
    }
    match resolve::config(&values, logs.clone(), &mut notices) {
        Ok(config) => Ok(Parsed { config, notices }),
        Err(reason) => {
            notices.push(reason);
            Err(Exit::Logged { logs, notices })
        }
    }
}

fn utf8(text: OsString) -> Result<String, Exit> {
    text.into_string().map_err(|text| Exit::usage_error(&format!("not UTF-8: {}", text.display())))
}

impl Parsed {
    /// Starts logging, logs the notices, and returns the configuration.
    ///
    /// # Errors
    /// The exit code, if a log output cannot be opened; the reason has been logged to stderr then.
    pub fn start_logging(self) -> Result<Config, ExitCode> {
        logging::start(&self.config.logs).map_err(|error| Exit::verification_failed(Level::Warn, error).report())?;
        self.notices.iter().for_each(Notice::log);
        Ok(self.config)
    }
}

impl Exit {
    fn usage_error(error: &str) -> Self {
        Self::Plain { code: 2, stdout: String::new(), stderr: format!("{error}\n{}", usage::USAGE) }
    }

    #[track_caller]
    fn verification_failed(level: Level, error: impl Into<String>) -> Self {
        let reason = Notice::new(level, NOT_VERIFIED).with("error", error.into());
        Self::Logged { logs: logging::Settings::default(), notices: vec![reason] }
    }

    /// Prints or logs the reason, and returns the exit code.
    #[must_use]
    pub fn report(self) -> ExitCode {
        match self {
            Self::Plain { code, stdout, stderr } => {
                // A reader that has closed its end of the pipe needs no more output.
                let _ = io::stderr().write_all(stderr.as_bytes());
                let _ = io::stdout().write_all(stdout.as_bytes());
                ExitCode::from(code)
            }
            Self::Logged { logs, notices } => {
                if let Err(error) = logging::start(&logs) {
                    return Self::verification_failed(Level::Warn, error).report();
                }
                notices.iter().for_each(Notice::log);
                ExitCode::FAILURE
            }
        }
    }
}

impl From<Stop> for Exit {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Help => Self::Plain { code: 0, stdout: usage::help(), stderr: usage::USAGE.to_owned() },
            Stop::Invalid(error) => Self::usage_error(&error),
        }
    }
}

/// How long every request may take, in addition to two election timeouts.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

impl Config {
    /// How long any request may take.
    #[must_use]
    pub fn request_timeout(&self) -> Duration {
        REQUEST_TIMEOUT + 2 * self.election_timeout
    }

    /// The election timeout in raft ticks.
    ///
    /// # Panics
    /// Never with a validated configuration.
    #[must_use]
    pub fn election_ticks(&self) -> usize {
        let ticks = self.election_timeout.as_millis() / self.heartbeat_interval.as_millis();
        usize::try_from(ticks).expect("an election timeout has at most 50000 milliseconds")
    }

    /// Parses and checks the settings that matter only while there is no data: the members of the cluster to bootstrap or to
    /// join. May take half a minute if host names must be resolved.
    ///
    /// # Errors
    /// With etcd's texts where etcd refuses too.
    pub fn parse_initial_cluster(&self) -> Result<InitialCluster, String> {
        InitialCluster::read(self)
    }
}

#[cfg(test)]
mod tests;
