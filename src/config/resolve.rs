//! Resolves the texts of the flags into a [`Config`]. The checks are etcd's, in etcd's order, so that of two mistakes the same
//! one is reported.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    AutoCompaction, ClusterState, Config, Exit, NOT_VERIFIED, START_FAILED,
    access::AccessConfig,
    auth::AuthConfig,
    duration,
    flag::Status,
    flags,
    frontend::{self, FrontendConfig},
    gates::{FeatureGates, Gate},
    limits::Limits,
    parse::FlagValues,
    quick_api::QuickApiConfig,
    tls::{self, ListenUrls, TlsConfig},
    url_resolution,
    value::{self, count},
};
use crate::logging::{self, Format, Level, Notice, Output};
use crate::net::url::{self, Url, UrlAddress};

const DEFAULT_NAME: &str = "default";
const MAX_ELECTION_TIMEOUT_MS: u64 = 50_000;
const DEFAULT_QUOTA_BYTES: u64 = 2 << 30;
const RECOMMENDED_REQUEST_BYTES: u64 = 10 << 20;
const DEFAULT_SNAPSHOT_COUNT: u64 = 10_000;
const DEFAULT_COMPACTION_BATCH: i64 = 1_000;
const DEFAULT_COMPACTION_SLEEP: Duration = Duration::from_millis(10);
const DEFAULT_PROGRESS_INTERVAL: Duration = Duration::from_mins(10);
const MIN_PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
const DEFAULT_UNARY_WARNING: Duration = Duration::from_millis(300);

pub fn logs(values: &FlagValues) -> Result<logging::Settings, Exit> {
    let refuse = |error: String| Exit::verification_failed(Level::Warn, error);
    let logger = values.text("logger");
    if logger != "zap" {
        return Err(refuse(format!("unknown logger option {logger:?}")));
    }
    let level = values.text("log-level");
    let level = Level::parse(level).ok_or_else(|| Exit::usage_error(&format!("unrecognized level: {level:?}")))?;
    let format = match values.text("log-format") {
        "json" | "" => Format::Json,
        "console" => Format::Console,
        other => return Err(refuse(format!("unknown log format: {other}, supported values json, console"))),
    };
    let names: BTreeSet<_> = values.text("log-outputs").split(',').map(str::trim).collect();
    if names.len() > 1 && names.contains("default") {
        return Err(refuse("multi logoutput for \"default\" is not supported yet".to_owned()));
    }
    let audit = Some(values.text("audit-log")).filter(|path| !path.is_empty()).map(PathBuf::from);
    Ok(logging::Settings { level, format, outputs: names.into_iter().map(output).collect(), audit })
}

fn output(name: &str) -> Output {
    match name {
        // Under systemd, the journal captures stderr.
        "default" | "stderr" | "systemd/journal" => Output::Stderr,
        "stdout" => Output::Stdout,
        file => Output::File(PathBuf::from(file.strip_prefix("file://").unwrap_or(file))),
    }
}

/// The validated configuration.
///
/// # Errors
/// The log line that ends the start.
pub fn config(values: &FlagValues, logs: logging::Settings, notices: &mut Vec<Notice>) -> Result<Config, Notice> {
    refuse_unsupported(values)?;
    notices.extend(warnings(values));
    let verification_failed = |error: String| Notice::new(Level::Warn, NOT_VERIFIED).with("error", error);
    let start_failed = |error: String| Notice::new(Level::Fatal, START_FAILED).with("error", error);
    let mut addresses = Addresses::read(values).map_err(verification_failed)?;
    let limits = Limits::read(values).map_err(verification_failed)?;
    let (heartbeat_interval, election_timeout) = raft_times(values).map_err(verification_failed)?;
    addresses.check_advertised(values).map_err(verification_failed)?;
    let mode = compaction_mode(values).map_err(verification_failed)?;
    let feature_gates = feature_gates(values, notices).map_err(verification_failed)?;
    if values.nanoseconds("compact-hash-check-time") <= 0 {
        let text = values.text("compact-hash-check-time");
        return Err(verification_failed(format!("--compact-hash-check-time must be >0 (set to {text})")));
    }
    addresses.advertise_host(notices);
    let name = values.text("name").to_owned();
    if name == DEFAULT_NAME {
        notices.push(default_name());
    }
    let tls_versions = tls::protocol_versions(values).map_err(verification_failed)?;
    let auto_compaction = auto_compaction(mode, values.text("auto-compaction-retention"))
        .map_err(|error| start_failed(format!("error parsing CompactionRetention: {error}")))?;
    let max_request_bytes: u64 = values.get("max-request-bytes");
    if max_request_bytes > RECOMMENDED_REQUEST_BYTES {
        notices.push(large_request(max_request_bytes));
    }
    let max_concurrent_streams =
        value::unsigned_32(values.text("max-concurrent-streams")).expect("a text is checked when it is set");
    let auth = AuthConfig::read(values, notices).map_err(start_failed)?;
    let data_dir = data_dir(values, &name, notices);
    let tls = addresses.tls(values, tls_versions, &data_dir, notices).map_err(start_failed)?;
    Ok(Config {
        data_dir,
        initial_cluster: initial_cluster_text(values, &name, &addresses.advertise_peer),
        initial_cluster_state: cluster_state(values),
        initial_cluster_token: values.get("initial-cluster-token"),
        quick_api: QuickApiConfig::read(values, &addresses.listen_client).map_err(verification_failed)?,
        listen_client_urls: addresses.listen_client,
        listen_client_http_urls: addresses.listen_client_http,
        listen_metrics_urls: addresses.listen_metrics,
        advertise_client_urls: addresses.advertise_client,
        listen_peer_urls: addresses.listen_peer,
        initial_advertise_peer_urls: addresses.advertise_peer,
        advertise_peer_urls_is_set: values.is_set("initial-advertise-peer-urls"),
        name,
        heartbeat_interval,
        election_timeout,
        pre_vote: values.get("pre-vote"),
        advance_first_election: values.get("initial-election-tick-advance"),
        strict_reconfig_check: values.get("strict-reconfig-check"),
        max_learners: u64::try_from(values.get::<i64>("max-learners")).unwrap_or(0),
        force_new_cluster: values.get("force-new-cluster"),
        snapshot_count: or_default(values.get("snapshot-count"), DEFAULT_SNAPSHOT_COUNT),
        snapshot_catchup_entries: values.get("snapshot-catchup-entries"),
        max_txn_ops: count(values.get("max-txn-ops")),
        max_request_bytes: count(max_request_bytes),
        max_concurrent_streams,
        quota_bytes: quota(values.get("quota-backend-bytes")),
        auto_compaction,
        corrupt_check_interval: Some(values.duration("corrupt-check-time")).filter(|interval| !interval.is_zero()),
        compact_hash_check_interval: values.duration("compact-hash-check-time"),
        compaction_batch_limit: compaction_batch(values),
        compaction_sleep_interval: or_default(values.duration("compaction-sleep-interval"), DEFAULT_COMPACTION_SLEEP),
        watch_progress_notify_interval: progress_interval(values, notices),
        extensive_metrics: values.text("metrics") == "extensive",
        warning_apply_duration: values.duration("warning-apply-duration"),
        warning_unary_request_duration: or_default(
            values.duration("warning-unary-request-duration"),
            DEFAULT_UNARY_WARNING,
        ),
        unsafe_no_fsync: values.get("unsafe-no-fsync"),
        value_cache_bytes: count(values.get("value-cache-bytes")),
        socket_reuse_port: values.get("socket-reuse-port"),
        auth,
        limits,
        feature_gates,
        access: AccessConfig::read(values),
        frontend: FrontendConfig::read(values).map_err(verification_failed)?,
        tls,
        logs,
    })
}

/// Refuses flags that are not implemented, if starting without them would be insecure or would join the wrong cluster.
fn refuse_unsupported(values: &FlagValues) -> Result<(), Notice> {
    for flag in flags::all() {
        if let Status::Refused(why) = flag.status
            && !flag.same_value(values.text(flag.name), flag.default)
        {
            return Err(unsupported(flag.name, why));
        }
    }
    if values.text("grpc-server") == "tonic"
        && let Some(flag) = frontend::OWN_SERVER_FLAGS.iter().find(|flag| {
            let flag = flags::find(flag).expect("it is a flag");
            !flag.same_value(values.text(flag.name), flag.default)
        })
    {
        return Err(unsupported(
            flag,
            "--grpc-server=tonic cannot do this; it is a plain reference for --grpc-server=own",
        ));
    }
    Ok(())
}

fn unsupported(flag: &str, why: &str) -> Notice {
    Notice::new(Level::Fatal, NOT_VERIFIED).with("error", format!("--{flag}: {why}"))
}

fn warnings(values: &FlagValues) -> Vec<Notice> {
    let mut notices = Vec::new();
    for (old, current) in &values.old_spellings {
        notices.push(Notice::new(Level::Warn, format!("--{old} is deprecated, use --{current}")));
    }
    if !["basic", "extensive"].contains(&values.text("metrics")) {
        let message = "--metrics is neither basic nor extensive: it counts as basic";
        notices.push(Notice::new(Level::Warn, message).with("value", values.text("metrics")));
    }
    if values.is_set("max-snapshots") {
        let message = "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8.";
        notices.push(Notice::new(Level::Warn, message));
    }
    for flag in flags::all().filter(|flag| values.is_set(flag.name)) {
        let Status::NoEffect(reason) = flag.status else {
            continue;
        };
        if !flag.same_value(values.text(flag.name), flag.default) {
            let message = "flag is accepted, but has no effect yet";
            notices.push(Notice::new(Level::Warn, message).with("flag", flag.name).with("reason", reason));
        }
    }
    notices
}

/// The lists of URLs.
struct Addresses {
    listen_client: Vec<Url>,
    listen_client_http: Vec<Url>,
    listen_metrics: Vec<Url>,
    advertise_client: Vec<Url>,
    listen_peer: Vec<Url>,
    advertise_peer: Vec<Url>,
}

impl Addresses {
    fn read(values: &FlagValues) -> Result<Self, String> {
        let addresses = Self {
            listen_client: list(values, "listen-client-urls"),
            listen_client_http: list(values, "listen-client-http-urls"),
            listen_metrics: list(values, "listen-metrics-urls"),
            advertise_client: list(values, "advertise-client-urls"),
            listen_peer: list(values, "listen-peer-urls"),
            advertise_peer: list(values, "initial-advertise-peer-urls"),
        };
        let bound = [
            &addresses.listen_peer,
            &addresses.listen_client,
            &addresses.listen_client_http,
            &addresses.listen_metrics,
        ];
        if let Some(url) = bound.into_iter().flatten().find(|url| !url.can_be_bound()) {
            return Err(format!("expected IP in URL for binding ({url})"));
        }
        if let Some(url) = addresses.advertise_peer.iter().find(|url| url.has_empty_host()) {
            let all = url::joined(&addresses.advertise_peer);
            let form = "must be \"host:port\"";
            return Err(format!("--initial-advertise-peer-urls {all:?} {form} (unexpected empty host ({url}))"));
        }
        if let Some(url) = addresses.advertise_client.iter().find(|url| url.has_empty_host()) {
            let all = url::joined(&addresses.advertise_client);
            let form = "must be in the format \"host:port\", \"unix:/path/to/socket\" or \"unixs:/path/to/socket\"";
            return Err(format!("--advertise-client-urls {all:?} {form} (unexpected empty host ({url}))"));
        }
        Ok(addresses)
    }

    /// A member that listens on all addresses and advertises the default URL advertises the host of the default route.
    fn advertise_host(&mut self, notices: &mut Vec<Notice>) {
        let pairs = [
            (&self.listen_peer, &mut self.advertise_peer, "http://localhost:2380"),
            (&self.listen_client, &mut self.advertise_client, "http://localhost:2379"),
        ];
        for (listen, advertise, default) in pairs {
            let [advertised] = advertise.as_mut_slice() else { continue };
            let Some(UrlAddress::Tcp { host, port }) = listen.first().map(Url::address) else { continue };
            if host != "0.0.0.0" || advertised.as_str() != default {
                continue;
            }
            match url_resolution::default_host() {
                Ok(host) => {
                    *advertised = Url::from_ip(host, *port);
                    let notice = Notice::new(Level::Info, "detected default host for advertise");
                    notices.push(notice.with("host", host.to_string()));
                }
                Err(error) => {
                    notices.push(Notice::new(Level::Info, "failed to detect default host").with("error", error));
                }
            }
        }
    }

    /// What the URLs to listen on need of TLS; and one address cannot be for gRPC alone and for HTTP alone.
    fn tls(
        &self,
        values: &FlagValues,
        versions: (bool, bool),
        data_dir: &Path,
        notices: &mut Vec<Notice>,
    ) -> Result<TlsConfig, String> {
        let listen = ListenUrls {
            clients: &[self.listen_client.as_slice(), &self.listen_client_http].concat(),
            peers: &self.listen_peer,
            metrics: &self.listen_metrics,
        };
        let tls = TlsConfig::read(values, versions, listen, data_dir, notices)?;
        let is_shared = |http: &&Url| self.listen_client.iter().any(|client| client.address() == http.address());
        match self.listen_client_http.iter().find(is_shared) {
            Some(url) => Err(format!(
                "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url {url}"
            )),
            None => Ok(tls),
        }
    }

    /// A member with explicit listen URLs must also advertise client URLs.
    fn check_advertised(&self, values: &FlagValues) -> Result<(), String> {
        if values.is_set("listen-client-urls") && !values.is_set("advertise-client-urls") {
            return Err("--advertise-client-urls is required when --listen-client-urls is set explicitly".to_owned());
        }
        if self.listen_client.is_empty() {
            return Err("no valid URLs given: --listen-client-urls is empty".to_owned());
        }
        Ok(())
    }
}

fn list(values: &FlagValues, flag: &str) -> Vec<Url> {
    url::parse_list(values.text(flag)).expect("a text is checked when it is set")
}

fn raft_times(values: &FlagValues) -> Result<(Duration, Duration), String> {
    let heartbeat: u64 = values.get("heartbeat-interval");
    let election: u64 = values.get("election-timeout");
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
    if election > MAX_ELECTION_TIMEOUT_MS {
        return Err(format!(
            "--election-timeout[{election}ms] is too long, and should be set less than {MAX_ELECTION_TIMEOUT_MS}ms"
        ));
    }
    Ok((Duration::from_millis(heartbeat), Duration::from_millis(election)))
}

#[derive(Clone, Copy)]
enum CompactionMode {
    Periodic,
    Revision,
}

fn compaction_mode(values: &FlagValues) -> Result<CompactionMode, String> {
    match values.text("auto-compaction-mode") {
        "periodic" => Ok(CompactionMode::Periodic),
        "revision" => Ok(CompactionMode::Revision),
        "" => Err("undefined auto-compaction-mode".to_owned()),
        other => Err(format!("unknown auto-compaction-mode {other:?}")),
    }
}

/// A plain number counts hours or revisions. Anything else is a duration; in revision mode its nanoseconds count revisions.
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

fn feature_gates(values: &FlagValues, notices: &mut Vec<Notice>) -> Result<FeatureGates, String> {
    let mut gates = FeatureGates::parse(values.text("feature-gates")).expect("a text is checked when it is set");
    for (gate, enabled) in values.gates() {
        gates.set(*gate, *enabled);
    }
    if gates.is_enabled(Gate::LeaseCheckpointPersist) && !gates.is_enabled(Gate::LeaseCheckpoint) {
        let message = "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint";
        return Err(message.to_owned());
    }
    for (gate, reason) in gates.without_effect() {
        let message = "feature gate is accepted, but has no effect yet";
        notices.push(Notice::new(Level::Warn, message).with("feature-gate", gate).with("reason", reason));
    }
    Ok(gates)
}

fn data_dir(values: &FlagValues, name: &str, notices: &mut Vec<Notice>) -> PathBuf {
    let text = values.text("data-dir");
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
        .with("recommended-request-bytes", RECOMMENDED_REQUEST_BYTES)
}

/// Unless `--initial-cluster` is set, the initial cluster is this member alone. With the default name its URL is the default
/// one, as in etcd.
fn initial_cluster_text(values: &FlagValues, name: &str, advertised: &[Url]) -> String {
    if values.is_set("initial-cluster") {
        return values.get("initial-cluster");
    }
    if name == DEFAULT_NAME {
        return format!("{DEFAULT_NAME}=http://localhost:2380");
    }
    advertised.iter().map(|url| format!("{name}={url}")).collect::<Vec<_>>().join(",")
}

fn cluster_state(values: &FlagValues) -> ClusterState {
    if values.text("initial-cluster-state") == "existing" { ClusterState::Existing } else { ClusterState::New }
}

fn quota(bytes: i64) -> Option<u64> {
    match u64::try_from(bytes) {
        Ok(0) => Some(DEFAULT_QUOTA_BYTES),
        other => other.ok(),
    }
}

fn compaction_batch(values: &FlagValues) -> usize {
    let limit: i64 = values.get("compaction-batch-limit");
    let limit = if limit > 0 { limit } else { DEFAULT_COMPACTION_BATCH };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn progress_interval(values: &FlagValues, notices: &mut Vec<Notice>) -> Duration {
    if values.nanoseconds("watch-progress-notify-interval") == 0 {
        return DEFAULT_PROGRESS_INTERVAL;
    }
    let interval = values.duration("watch-progress-notify-interval");
    if interval < MIN_PROGRESS_INTERVAL {
        let minimum = duration::GoDuration(MIN_PROGRESS_INTERVAL).to_string();
        notices.push(
            Notice::new(Level::Warn, "adjusting watch progress notify interval to minimum period")
                .with("min-watch-progress-notify-interval", minimum),
        );
    }
    interval.max(MIN_PROGRESS_INTERVAL)
}

fn or_default<T: Default + PartialEq>(value: T, default: T) -> T {
    if value == T::default() { default } else { value }
}
