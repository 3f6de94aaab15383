//! What was typed, and what it means.
//!
//! ```text
//! arguments, ETCD_ variables ──parse──► one text per flag ──resolve──► Config
//!                              │                            │
//!                              └─ wrong: Go's words, exit 2 └─ wrong: a line of the log, exit 1
//! ```
//!
//! etcd's command line to the letter, so that a start command, a unit file or a chart written for etcd starts us. [`flags`] is
//! the table of all flags, `parse` reads arguments and variables, `resolve` checks what they mean together. What the start
//! has to say about them comes back as notices, because logging is itself configured here.
//!
//! What only matters when there is no data yet (who the first members are) is checked by [`Config::first_start`], for a
//! restart ignores it.

pub mod bounds;
pub mod duration;
mod first;
pub mod flags;
pub mod front;
pub mod gates;
pub mod names;
mod parse;
mod resolve;
mod short;
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
    urls::{self, Url},
};
use bounds::Bounds;
pub use first::FirstStart;
use gates::FeatureGates;
use parse::{Stop, Typed};

/// etcd's words for flags that contradict each other.
const NOT_VERIFIED: &str = "failed to verify flags";

/// etcd's words for a start that fails later, whatever the cause.
const START_FAILED: &str = "discovery failed";

/// Everything that can be configured, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag that people switch by itself")]
pub struct Config {
    /// What people call this member.
    pub name: String,
    /// Where the data lies.
    pub data_dir: PathBuf,
    /// Where clients connect to.
    pub listen_client_urls: Vec<Url>,
    /// Where clients are told to connect to.
    pub advertise_client_urls: Vec<Url>,
    /// Where members connect to.
    pub listen_peer_urls: Vec<Url>,
    /// Where members are told to connect to, from the first start on.
    pub initial_advertise_peer_urls: Vec<Url>,
    /// Whether that was typed.
    pub says_where_it_is: bool,
    /// The first members, as typed; read by [`Config::first_start`].
    pub initial_cluster: String,
    /// Whether the first start founds a cluster or joins one.
    pub initial_cluster_state: ClusterState,
    /// What keeps apart clusters whose URLs are alike.
    pub initial_cluster_token: String,
    /// One tick of raft.
    pub heartbeat_interval: Duration,
    /// How long without a leader until an election.
    pub election_timeout: Duration,
    /// Whether an election is asked for before it is held.
    pub pre_vote: bool,
    /// Whether the first election after a start is held early.
    pub advance_first_election: bool,
    /// Whether changes of the members that could cost the quorum are refused.
    pub strict_reconfig_check: bool,
    /// Most learners in the cluster.
    pub max_learners: u64,
    /// Whether to become the sole member of a cluster whose others are lost.
    pub force_new_cluster: bool,
    /// After so many applied entries a cut of the log is considered.
    pub snapshot_count: u64,
    /// How many entries a cut of the log leaves.
    pub snapshot_catchup_entries: u64,
    /// Most comparisons, and operations per branch, in one transaction.
    pub max_txn_ops: usize,
    /// Largest request.
    pub max_request_bytes: usize,
    /// Most HTTP/2 streams at a time per connection.
    pub max_concurrent_streams: u32,
    /// Space for data until writes are refused. None: no limit.
    pub quota_bytes: Option<u64>,
    /// What is forgotten without being asked.
    pub auto_compaction: AutoCompaction,
    /// Time between comparisons of the data with other members'. None: never.
    pub corrupt_check_interval: Option<Duration>,
    /// Time between comparisons of compaction hashes, if that gate is open.
    pub compact_hash_check_interval: Duration,
    /// Revisions that a compaction removes at a time.
    pub compaction_batch_limit: usize,
    /// How long a compaction rests in between.
    pub compaction_sleep_interval: Duration,
    /// Time between progress notices to watchers.
    pub watch_progress_notify_interval: Duration,
    /// An apply that takes longer is logged.
    pub warning_apply_duration: Duration,
    /// A request that takes longer is logged.
    pub warning_unary_request_duration: Duration,
    /// Whether the log does not wait for the disk.
    pub unsafe_no_fsync: bool,
    /// Memory for recently written and read values.
    pub value_cache_bytes: usize,
    /// Whether other processes may listen on the same ports.
    pub socket_reuse_port: bool,
    /// How much memory, how many threads, watches and connections.
    pub bounds: Bounds,
    /// Which features are switched on.
    pub feature_gates: FeatureGates,
    /// Who speaks HTTP/2 with clients, and what they may ask of him.
    pub front: front::Front,
    /// What is logged, how, and where to.
    pub logs: logging::Settings,
}

/// What a member without data does first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Founds a cluster.
    New,
    /// Joins one that runs.
    Existing,
}

/// What is forgotten without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Nothing.
    Off,
    /// What is older than this.
    Periodic(Duration),
    /// All but so many of the newest revisions.
    Revisions(u64),
}

/// A configuration, and what the log shall say about it.
#[derive(Debug)]
pub struct Parsed {
    /// What to do.
    pub config: Config,
    /// What to say once logging has started.
    pub notices: Vec<Notice>,
}

/// An end before the start.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    /// With text as it is: help, the version, an argument that is wrong.
    Plain {
        /// What to end with.
        code: u8,
        /// For the standard output.
        stdout: String,
        /// For the standard error stream.
        stderr: String,
    },
    /// With a last line of the log, and code 1.
    Logged {
        /// How to log.
        logs: logging::Settings,
        /// All lines, the reason last.
        notices: Vec<Notice>,
    },
}

/// Reads the command line (without the program's name) and the environment.
///
/// # Errors
/// If there is nothing to start: the [`Exit`] to take.
pub fn from_process(
    arguments: impl IntoIterator<Item = OsString>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Parsed, Exit> {
    let arguments = arguments.into_iter().map(utf8).collect::<Result<Vec<_>, _>>()?;
    if let Some(program @ ("gateway" | "grpc-proxy")) = arguments.first().map(String::as_str) {
        return Err(Exit::unverified(Level::Fatal, format!("the program `{program}` is not supported yet")));
    }
    let (mut typed, rest) = Typed::from_arguments(&arguments).map_err(Exit::from)?;
    if let Some(argument) = rest.first() {
        return Err(Exit::unverified(Level::Warn, format!("{argument:?} is not a valid flag")));
    }
    if typed.get("version") {
        return Err(Exit::Plain { code: 0, stdout: usage::version(), stderr: String::new() });
    }
    let environment = environment.into_iter().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ETCD_"));
    let environment =
        environment.map(|(name, value)| Ok((utf8(name)?, utf8(value)?))).collect::<Result<Vec<_>, Exit>>()?;
    let mut notices = Vec::new();
    if let Err(reason) = typed.add_environment(&environment, &mut notices) {
        notices.push(reason);
        return Err(Exit::Logged { logs: logging::Settings::default(), notices });
    }
    let logs = resolve::logs(&typed)?;
    if let Err(error) = short::expand(&mut typed) {
        let reason = Notice::new(Level::Fatal, NOT_VERIFIED).with("error", error);
        return Err(Exit::Logged { logs, notices: vec![reason] });
    }
    match resolve::config(&typed, logs.clone(), &mut notices) {
        Ok(config) => Ok(Parsed { config, notices }),
        Err(reason) => {
            notices.push(reason);
            Err(Exit::Logged { logs, notices })
        }
    }
}

fn utf8(text: OsString) -> Result<String, Exit> {
    text.into_string().map_err(|text| Exit::wrong(&format!("not UTF-8: {}", text.display())))
}

impl Parsed {
    /// Starts logging, says what there is to say, and gives the configuration.
    ///
    /// # Errors
    /// The code to end with, if a log cannot be opened; why has been said then.
    pub fn begin(self) -> Result<Config, ExitCode> {
        logging::start(&self.config.logs).map_err(|error| Exit::unverified(Level::Warn, error).leave())?;
        self.notices.iter().for_each(Notice::log);
        Ok(self.config)
    }
}

impl Exit {
    fn wrong(error: &str) -> Self {
        Self::Plain { code: 2, stdout: String::new(), stderr: format!("{error}\n{}", usage::SHORT) }
    }

    #[track_caller]
    fn unverified(level: Level, error: impl Into<String>) -> Self {
        let reason = Notice::new(level, NOT_VERIFIED).with("error", error.into());
        Self::Logged { logs: logging::Settings::default(), notices: vec![reason] }
    }

    /// Says it, and gives the code to end with.
    #[must_use]
    pub fn leave(self) -> ExitCode {
        match self {
            Self::Plain { code, stdout, stderr } => {
                // Whoever closed the other end has read enough.
                let _ = io::stderr().write_all(stderr.as_bytes());
                let _ = io::stdout().write_all(stdout.as_bytes());
                ExitCode::from(code)
            }
            Self::Logged { logs, notices } => {
                if let Err(error) = logging::start(&logs) {
                    return Self::unverified(Level::Warn, error).leave();
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
            Stop::Help => Self::Plain { code: 0, stdout: usage::list(), stderr: usage::SHORT.to_owned() },
            Stop::Wrong(error) => Self::wrong(&error),
        }
    }
}

impl Config {
    /// How many ticks make an election timeout.
    ///
    /// # Panics
    /// Never with a configuration that was checked.
    #[must_use]
    pub fn election_ticks(&self) -> usize {
        let ticks = self.election_timeout.as_millis() / self.heartbeat_interval.as_millis();
        usize::try_from(ticks).expect("an election timeout has at most 50000 milliseconds")
    }

    /// Reads and checks what counts only while there is no data: who founds the cluster, or which one to join. May take half
    /// a minute, where names must be looked up.
    ///
    /// # Errors
    /// In etcd's words where etcd refuses too.
    pub fn first_start(&self) -> Result<FirstStart, String> {
        FirstStart::read(self)
    }
}

#[cfg(test)]
mod tests;
