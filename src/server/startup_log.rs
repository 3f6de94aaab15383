//! Log lines of the start and the stop, with etcd's texts: scripts and tests wait for them.

use std::time::Duration;

use crate::{
    config::{ClusterState, Config, duration::GoDuration},
    logging::{Level, Notice},
    net::url::Url,
    version::ETCD_VERSION,
};

/// The largest quota that etcd recommends. Here as there, it is not a limit.
const ADVISED_QUOTA_BYTES: u64 = 8 << 30;

/// Logs the configuration, before the data is opened.
pub fn starting(config: &Config, is_initialised: bool) {
    let state = if config.initial_cluster_state == ClusterState::New { "new" } else { "existing" };
    Notice::new(Level::Info, "starting an etcd server")
        .with("etcd-version", ETCD_VERSION)
        .with("metastore-version", env!("CARGO_PKG_VERSION"))
        .with("member-initialized", is_initialised)
        .with("name", config.name.as_str())
        .with("data-dir", config.data_dir.display().to_string())
        .with("force-new-cluster", config.force_new_cluster)
        .with("heartbeat-interval", go_duration(config.heartbeat_interval))
        .with("election-timeout", go_duration(config.election_timeout))
        .with("initial-election-tick-advance", config.advance_first_election)
        .with("snapshot-count", config.snapshot_count)
        .with("snapshot-catchup-entries", config.snapshot_catchup_entries)
        .with("initial-advertise-peer-urls", texts(&config.initial_advertise_peer_urls))
        .with("listen-peer-urls", texts(&config.listen_peer_urls))
        .with("advertise-client-urls", texts(&config.advertise_client_urls))
        .with("listen-client-urls", texts(&config.listen_client_urls))
        .with("listen-metrics-urls", texts(&config.listen_metrics_urls))
        .with("initial-cluster", config.initial_cluster.as_str())
        .with("initial-cluster-state", state)
        .with("initial-cluster-token", config.initial_cluster_token.as_str())
        .with("quota-backend-bytes", config.quota_bytes)
        .with("max-request-bytes", config.max_request_bytes)
        .with("max-concurrent-streams", config.max_concurrent_streams)
        .with("pre-vote", config.pre_vote)
        .with("v2-deprecation", "write-only")
        .log();
    quota(config.quota_bytes);
    for other in ["wal", "snap"].map(|name| config.data_dir.join("member").join(name)).iter().filter(|it| it.exists()) {
        let text = "the data directory contains files of etcd, which are ignored";
        Notice::new(Level::Warn, text).with("path", other.display().to_string()).log();
    }
    if config.unsafe_no_fsync {
        let text = "fsync is off (--unsafe-no-fsync): a crash of this machine loses acknowledged writes";
        Notice::new(Level::Warn, text).log();
    }
}

fn quota(bytes: Option<u64>) {
    let Some(bytes) = bytes else {
        return Notice::new(Level::Info, "disabled backend quota").log();
    };
    if bytes > ADVISED_QUOTA_BYTES {
        Notice::new(Level::Warn, "quota exceeds the maximum value")
            .with("quota-size-bytes", bytes)
            .with("quota-maximum-size-bytes", ADVISED_QUOTA_BYTES)
            .log();
    }
    Notice::new(Level::Info, "enabled backend quota").with("quota-size-bytes", bytes).log();
}

/// Logs that the ports for members and for metrics are open.
pub fn serving(config: &Config, member_id: u64) {
    Notice::new(Level::Info, "now serving peer/client/metrics")
        .with("local-member-id", format!("{member_id:x}"))
        .with("initial-advertise-peer-urls", texts(&config.initial_advertise_peer_urls))
        .with("listen-peer-urls", texts(&config.listen_peer_urls))
        .with("advertise-client-urls", texts(&config.advertise_client_urls))
        .with("listen-client-urls", texts(&config.listen_client_urls))
        .with("listen-metrics-urls", texts(&config.listen_metrics_urls))
        .log();
}

/// Logs the beginning (`closing`) and the end (`closed`) of the stop.
pub fn ending(verb: &'static str, config: &Config) {
    Notice::new(Level::Info, format!("{verb} etcd server"))
        .with("name", config.name.as_str())
        .with("data-dir", config.data_dir.display().to_string())
        .with("advertise-peer-urls", texts(&config.initial_advertise_peer_urls))
        .with("advertise-client-urls", texts(&config.advertise_client_urls))
        .log();
}

fn go_duration(duration: Duration) -> String {
    GoDuration(duration).to_string()
}

fn texts(urls: &[Url]) -> Vec<&str> {
    urls.iter().map(Url::as_str).collect()
}
