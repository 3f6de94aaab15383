//! From one text per flag to what they mean together. The checks are etcd's, in etcd's order, so that of two mistakes the
//! same one is told.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use super::{
    AutoCompaction, ClusterState, Config, Exit, NOT_VERIFIED, START_FAILED,
    bounds::Bounds,
    duration,
    flags::{self, Status},
    front::Front,
    gates::{FeatureGates, Gate},
    names,
    parse::Typed,
    urls::{self, Place, Url},
    value,
};
use crate::logging::{self, Format, Level, Notice, Output};

const DEFAULT_NAME: &str = "default";
const LONGEST_ELECTION_MS: u64 = 50_000;
const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;
const LARGE_REQUEST_BYTES: u64 = 10 << 20;
const DEFAULT_SNAPSHOT_COUNT: u64 = 10_000;
const DEFAULT_COMPACTION_BATCH: i64 = 1_000;
const DEFAULT_COMPACTION_SLEEP: Duration = Duration::from_millis(10);
const DEFAULT_PROGRESS_INTERVAL: Duration = Duration::from_mins(10);
const SHORTEST_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
const DEFAULT_UNARY_WARNING: Duration = Duration::from_millis(300);

/// How to log.
pub fn logs(typed: &Typed) -> Result<logging::Settings, Exit> {
    let refuse = |error: String| Exit::unverified(Level::Warn, error);
    let logger = typed.text("logger");
    if logger != "zap" {
        return Err(refuse(format!("unknown logger option {logger:?}")));
    }
    let level = typed.text("log-level");
    let level = Level::parse(level).ok_or_else(|| Exit::wrong(&format!("unrecognized level: {level:?}")))?;
    let format = match typed.text("log-format") {
        "json" | "" => Format::Json,
        "console" => Format::Console,
        other => return Err(refuse(format!("unknown log format: {other}, supported values json, console"))),
    };
    let names: BTreeSet<_> = typed.text("log-outputs").split(',').map(str::trim).collect();
    if names.len() > 1 && names.contains("default") {
        return Err(refuse("multi logoutput for \"default\" is not supported yet".to_owned()));
    }
    Ok(logging::Settings { level, format, outputs: names.into_iter().map(output).collect() })
}

fn output(name: &str) -> Output {
    match name {
        // Under systemd the journal takes what is written there.
        "default" | "stderr" | "systemd/journal" => Output::Stderr,
        "stdout" => Output::Stdout,
        file => Output::File(PathBuf::from(file.strip_prefix("file://").unwrap_or(file))),
    }
}

/// Everything, checked; or the line to end the start with.
pub fn config(typed: &Typed, logs: logging::Settings, notices: &mut Vec<Notice>) -> Result<Config, Notice> {
    refuse_feigned_protection(typed)?;
    notices.extend(warnings(typed));
    let unverified = |error: String| Notice::new(Level::Warn, NOT_VERIFIED).with("error", error);
    let mut addresses = Addresses::read(typed).map_err(unverified)?;
    let bounds = Bounds::read(typed).map_err(unverified)?;
    let (heartbeat_interval, election_timeout) = raft_times(typed).map_err(unverified)?;
    addresses.check_advertised(typed).map_err(unverified)?;
    let mode = compaction_mode(typed).map_err(unverified)?;
    let feature_gates = feature_gates(typed, notices).map_err(unverified)?;
    if nanoseconds(typed, "compact-hash-check-time") <= 0 {
        let typed = typed.text("compact-hash-check-time");
        return Err(unverified(format!("--compact-hash-check-time must be >0 (set to {typed})")));
    }
    addresses.advertise_host(notices);
    let name = typed.text("name").to_owned();
    if name == DEFAULT_NAME {
        notices.push(default_name());
    }
    let auto_compaction = auto_compaction(mode, typed.text("auto-compaction-retention")).map_err(|error| {
        Notice::new(Level::Fatal, START_FAILED).with("error", format!("error parsing CompactionRetention: {error}"))
    })?;
    let max_request_bytes: u64 = typed.get("max-request-bytes");
    if max_request_bytes > LARGE_REQUEST_BYTES {
        notices.push(large_request(max_request_bytes));
    }
    let max_concurrent_streams =
        value::unsigned_32(typed.text("max-concurrent-streams")).expect("a text is checked when it is set");
    let front = Front::read(typed, &addresses.listen_client, notices).map_err(unverified)?;
    Ok(Config {
        data_dir: data_dir(typed, &name, notices),
        initial_cluster: initial_cluster_text(typed, &name, &addresses.advertise_peer),
        initial_cluster_state: cluster_state(typed),
        initial_cluster_token: typed.get("initial-cluster-token"),
        listen_client_urls: addresses.listen_client,
        advertise_client_urls: addresses.advertise_client,
        listen_peer_urls: addresses.listen_peer,
        initial_advertise_peer_urls: addresses.advertise_peer,
        says_where_it_is: typed.is_set("initial-advertise-peer-urls"),
        name,
        heartbeat_interval,
        election_timeout,
        pre_vote: typed.get("pre-vote"),
        advance_first_election: typed.get("initial-election-tick-advance"),
        strict_reconfig_check: typed.get("strict-reconfig-check"),
        max_learners: u64::try_from(typed.get::<i64>("max-learners")).unwrap_or(0),
        force_new_cluster: typed.get("force-new-cluster"),
        snapshot_count: or_default(typed.get("snapshot-count"), DEFAULT_SNAPSHOT_COUNT),
        snapshot_catchup_entries: typed.get("snapshot-catchup-entries"),
        max_txn_ops: count(typed.get("max-txn-ops")),
        max_request_bytes: count(max_request_bytes),
        max_concurrent_streams,
        quota_bytes: quota(typed.get("quota-backend-bytes")),
        auto_compaction,
        corrupt_check_interval: Some(time(typed, "corrupt-check-time")).filter(|interval| !interval.is_zero()),
        compact_hash_check_interval: time(typed, "compact-hash-check-time"),
        compaction_batch_limit: compaction_batch(typed),
        compaction_sleep_interval: or_default(time(typed, "compaction-sleep-interval"), DEFAULT_COMPACTION_SLEEP),
        watch_progress_notify_interval: progress_interval(typed, notices),
        warning_apply_duration: time(typed, "warning-apply-duration"),
        warning_unary_request_duration: or_default(
            time(typed, "warning-unary-request-duration"),
            DEFAULT_UNARY_WARNING,
        ),
        unsafe_no_fsync: typed.get("unsafe-no-fsync"),
        value_cache_bytes: count(typed.get("value-cache-bytes")),
        socket_reuse_port: typed.get("socket-reuse-port"),
        bounds,
        feature_gates,
        front,
        logs,
    })
}

/// A flag that promises what we cannot keep ends the start.
fn refuse_feigned_protection(typed: &Typed) -> Result<(), Notice> {
    for flag in flags::all() {
        if let Status::Refused(why) = flag.status
            && !flag.same(typed.text(flag.name), flag.default)
        {
            return Err(unsupported(flag.name, why));
        }
    }
    if list(typed, "listen-peer-urls").iter().any(Url::is_secure) {
        return Err(unsupported("listen-peer-urls", "TLS between members is not supported yet"));
    }
    Ok(())
}

fn unsupported(flag: &str, why: &str) -> Notice {
    Notice::new(Level::Fatal, NOT_VERIFIED).with("error", format!("--{flag}: {why}"))
}

fn warnings(typed: &Typed) -> Vec<Notice> {
    let mut notices = Vec::new();
    for (old, today) in &typed.old_spellings {
        notices.push(Notice::new(Level::Warn, format!("--{old} is deprecated: it is called --{today} today")));
    }
    if typed.is_set("max-snapshots") {
        let message = "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8.";
        notices.push(Notice::new(Level::Warn, message));
    }
    for flag in flags::all().filter(|flag| typed.is_set(flag.name)) {
        let Status::NotYet { harmless, lacks } = flag.status else {
            continue;
        };
        let text = typed.text(flag.name);
        if !flag.same(text, harmless) {
            let message = "flag is accepted, but has no effect yet";
            notices.push(Notice::new(Level::Warn, message).with("flag", flag.name).with("reason", lacks));
        }
    }
    notices
}

/// The four lists of URLs.
struct Addresses {
    listen_client: Vec<Url>,
    advertise_client: Vec<Url>,
    listen_peer: Vec<Url>,
    advertise_peer: Vec<Url>,
}

impl Addresses {
    fn read(typed: &Typed) -> Result<Self, String> {
        let addresses = Self {
            listen_client: list(typed, "listen-client-urls"),
            advertise_client: list(typed, "advertise-client-urls"),
            listen_peer: list(typed, "listen-peer-urls"),
            advertise_peer: list(typed, "initial-advertise-peer-urls"),
        };
        for url in addresses.listen_peer.iter().chain(&addresses.listen_client) {
            if !url.can_be_bound() {
                return Err(format!("expected IP in URL for binding ({url})"));
            }
        }
        if let Some(url) = addresses.advertise_peer.iter().find(|url| url.lacks_host()) {
            let all = urls::joined(&addresses.advertise_peer);
            let form = "must be \"host:port\"";
            return Err(format!("--initial-advertise-peer-urls {all:?} {form} (unexpected empty host ({url}))"));
        }
        if let Some(url) = addresses.advertise_client.iter().find(|url| url.lacks_host()) {
            let all = urls::joined(&addresses.advertise_client);
            let form = "must be in the format \"host:port\", \"unix:/path/to/socket\" or \"unixs:/path/to/socket\"";
            return Err(format!("--advertise-client-urls {all:?} {form} (unexpected empty host ({url}))"));
        }
        Ok(addresses)
    }

    /// Who listens on every address and advertises none of his own is found where the default route leaves this machine.
    fn advertise_host(&mut self, notices: &mut Vec<Notice>) {
        let pairs = [
            (&self.listen_peer, &mut self.advertise_peer, "http://localhost:2380"),
            (&self.listen_client, &mut self.advertise_client, "http://localhost:2379"),
        ];
        for (listen, advertise, unasked) in pairs {
            let [advertised] = advertise.as_mut_slice() else { continue };
            let Some(Place::Tcp { host, port }) = listen.first().map(Url::place) else { continue };
            if host != "0.0.0.0" || advertised.as_str() != unasked {
                continue;
            }
            match names::default_host() {
                Ok(host) => {
                    *advertised = Url::of_host(host, *port);
                    let notice = Notice::new(Level::Info, "detected default host for advertise");
                    notices.push(notice.with("host", host.to_string()));
                }
                Err(error) => {
                    notices.push(Notice::new(Level::Info, "failed to detect default host").with("error", error));
                }
            }
        }
    }

    /// Who listens somewhere special must say where clients find that.
    fn check_advertised(&self, typed: &Typed) -> Result<(), String> {
        if typed.is_set("listen-client-urls") && !typed.is_set("advertise-client-urls") {
            return Err("--advertise-client-urls is required when --listen-client-urls is set explicitly".to_owned());
        }
        if self.listen_client.is_empty() {
            return Err("no valid URLs given: --listen-client-urls is empty".to_owned());
        }
        Ok(())
    }
}

fn list(typed: &Typed, flag: &str) -> Vec<Url> {
    urls::parse_list(typed.text(flag)).expect("a text is checked when it is set")
}

fn raft_times(typed: &Typed) -> Result<(Duration, Duration), String> {
    let heartbeat: u64 = typed.get("heartbeat-interval");
    let election: u64 = typed.get("election-timeout");
    if heartbeat == 0 {
        return Err("--heartbeat-interval must be >0 (set to 0ms)".to_owned());
    }
    if election == 0 {
        return Err("--election-timeout must be >0 (set to 0ms)".to_owned());
    }
    if heartbeat.saturating_mul(5) > election {
        return Err(format!(
            "--election-timeout[{election}ms] should be at least as 5 times as --heartbeat-interval[{heartbeat}ms]"
        ));
    }
    if election > LONGEST_ELECTION_MS {
        return Err(format!(
            "--election-timeout[{election}ms] is too long, and should be set less than {LONGEST_ELECTION_MS}ms"
        ));
    }
    Ok((Duration::from_millis(heartbeat), Duration::from_millis(election)))
}

#[derive(Clone, Copy)]
enum CompactionMode {
    Periodic,
    Revision,
}

fn compaction_mode(typed: &Typed) -> Result<CompactionMode, String> {
    match typed.text("auto-compaction-mode") {
        "periodic" => Ok(CompactionMode::Periodic),
        "revision" => Ok(CompactionMode::Revision),
        "" => Err("undefined auto-compaction-mode".to_owned()),
        other => Err(format!("unknown auto-compaction-mode {other:?}")),
    }
}

/// A plain number counts hours or revisions; anything else is a duration, whose nanoseconds count as revisions.
fn auto_compaction(mode: CompactionMode, text: &str) -> Result<AutoCompaction, String> {
    const HOUR: u64 = 3600;
    let too_long = || format!("time: invalid duration {text:?}");
    let retention = match text.parse::<u64>() {
        _ if text.is_empty() => 0,
        Ok(hours) if matches!(mode, CompactionMode::Periodic) => {
            hours.checked_mul(HOUR * 1_000_000_000).ok_or_else(too_long)?
        }
        Ok(revisions) => revisions,
        Err(_) => {
            let nanos = duration::parse(text)?;
            u64::try_from(nanos).map_err(|_| format!("the duration is negative: {text:?}"))?
        }
    };
    Ok(match mode {
        _ if retention == 0 => AutoCompaction::Off,
        CompactionMode::Periodic => AutoCompaction::Periodic(Duration::from_nanos(retention)),
        CompactionMode::Revision => AutoCompaction::Revisions(retention),
    })
}

fn feature_gates(typed: &Typed, notices: &mut Vec<Notice>) -> Result<FeatureGates, String> {
    let mut gates = FeatureGates::parse(typed.text("feature-gates")).expect("a text is checked when it is set");
    for (gate, open) in typed.gates() {
        gates.set(*gate, *open);
    }
    if gates.is_open(Gate::LeaseCheckpointPersist) && !gates.is_open(Gate::LeaseCheckpoint) {
        let message = "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint";
        return Err(message.to_owned());
    }
    for (gate, lacks) in gates.without_effect() {
        let message = "feature gate is accepted, but has no effect yet";
        notices.push(Notice::new(Level::Warn, message).with("feature-gate", gate).with("reason", lacks));
    }
    Ok(gates)
}

fn data_dir(typed: &Typed, name: &str, notices: &mut Vec<Notice>) -> PathBuf {
    let text = typed.text("data-dir");
    if !text.is_empty() {
        return PathBuf::from(text);
    }
    let text = format!("{name}.metastore");
    let notice = Notice::new(Level::Warn, "'data-dir' was empty; using default").with("data-dir", text.as_str());
    notices.push(notice);
    PathBuf::from(text)
}

fn default_name() -> Notice {
    let message = "it isn't recommended to use default name, please set a value for --name. \
                   Note that etcd might run into issue when multiple members have the same default name";
    Notice::new(Level::Warn, message).with("name", DEFAULT_NAME)
}

fn large_request(bytes: u64) -> Notice {
    Notice::new(Level::Warn, "exceeded recommended request limit")
        .with("max-request-bytes", bytes)
        .with("recommended-request-bytes", LARGE_REQUEST_BYTES)
}

/// A name of one's own makes a cluster of one's own; the default name stays with the default URL, as in etcd.
fn initial_cluster_text(typed: &Typed, name: &str, advertised: &[Url]) -> String {
    if typed.is_set("initial-cluster") {
        return typed.get("initial-cluster");
    }
    if name == DEFAULT_NAME {
        return format!("{DEFAULT_NAME}=http://localhost:2380");
    }
    advertised.iter().map(|url| format!("{name}={url}")).collect::<Vec<_>>().join(",")
}

fn cluster_state(typed: &Typed) -> ClusterState {
    if typed.text("initial-cluster-state") == "existing" { ClusterState::Existing } else { ClusterState::New }
}

fn quota(bytes: i64) -> Option<u64> {
    match u64::try_from(bytes) {
        Ok(0) => Some(DEFAULT_QUOTA_BYTES),
        other => other.ok(),
    }
}

fn compaction_batch(typed: &Typed) -> usize {
    let limit: i64 = typed.get("compaction-batch-limit");
    let limit = if limit > 0 { limit } else { DEFAULT_COMPACTION_BATCH };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn progress_interval(typed: &Typed, notices: &mut Vec<Notice>) -> Duration {
    if nanoseconds(typed, "watch-progress-notify-interval") == 0 {
        return DEFAULT_PROGRESS_INTERVAL;
    }
    let asked = time(typed, "watch-progress-notify-interval");
    if asked < SHORTEST_PROGRESS_INTERVAL {
        let shortest = duration::Go(SHORTEST_PROGRESS_INTERVAL).to_string();
        notices.push(
            Notice::new(Level::Warn, "adjusting watch progress notify interval to minimum period")
                .with("min-watch-progress-notify-interval", shortest),
        );
    }
    asked.max(SHORTEST_PROGRESS_INTERVAL)
}

fn nanoseconds(typed: &Typed, flag: &str) -> i64 {
    duration::parse(typed.text(flag)).expect("a text is checked when it is set")
}

/// A duration flag. Less than no time is no time.
pub fn time(typed: &Typed, flag: &str) -> Duration {
    Duration::from_nanos(u64::try_from(nanoseconds(typed, flag)).unwrap_or(0))
}

fn or_default<T: Default + PartialEq>(value: T, default: T) -> T {
    if value == T::default() { default } else { value }
}

pub fn count(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
