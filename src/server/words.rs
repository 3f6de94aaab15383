//! What is said in the log around the start and the stop, in etcd's words: scripts and tests wait for these lines.

use std::time::Duration;

use crate::{
    config::{ClusterState, Config, duration::Go},
    logging::{Level, Notice},
    urls::Url,
    version::ETCD_VERSION,
};

/// etcd advises no larger quota. It is no limit, here as there.
const ADVISED_QUOTA_BYTES: u64 = 8 << 30;

/// Before the data is opened: with what.
pub fn starting(config: &Config, is_initialised: bool) {
    let state = if config.initial_cluster_state == ClusterState::New { "new" } else { "existing" };
    Notice::new(Level::Info, "starting an etcd server")
        .with("etcd-version", ETCD_VERSION)
        .with("metastore-version", env!("CARGO_PKG_VERSION"))
        .with("member-initialized", is_initialised)
        .with("name", config.name.as_str())
        .with("data-dir", config.data_dir.display().to_string())
        .with("force-new-cluster", config.force_new_cluster)
        .with("heartbeat-interval", go(config.heartbeat_interval))
        .with("election-timeout", go(config.election_timeout))
        .with("initial-election-tick-advance", config.advance_first_election)
        .with("snapshot-count", config.snapshot_count)
        .with("snapshot-catchup-entries", config.snapshot_catchup_entries)
        .with("initial-advertise-peer-urls", texts(&config.initial_advertise_peer_urls))
        .with("listen-peer-urls", texts(&config.listen_peer_urls))
        .with("advertise-client-urls", texts(&config.advertise_client_urls))
        .with("listen-client-urls", texts(&config.listen_client_urls))
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
        let text = "an etcd has written into this directory; nothing of that is looked at";
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

/// When members are heard.
pub fn serving(config: &Config, member_id: u64) {
    Notice::new(Level::Info, "now serving peer/client/metrics")
        .with("local-member-id", format!("{member_id:x}"))
        .with("initial-advertise-peer-urls", texts(&config.initial_advertise_peer_urls))
        .with("listen-peer-urls", texts(&config.listen_peer_urls))
        .with("advertise-client-urls", texts(&config.advertise_client_urls))
        .with("listen-client-urls", texts(&config.listen_client_urls))
        .log();
}

/// At the begin (`closing`) and at the end (`closed`) of the stop.
pub fn ending(verb: &'static str, config: &Config) {
    Notice::new(Level::Info, format!("{verb} etcd server"))
        .with("name", config.name.as_str())
        .with("data-dir", config.data_dir.display().to_string())
        .with("advertise-peer-urls", texts(&config.initial_advertise_peer_urls))
        .with("advertise-client-urls", texts(&config.advertise_client_urls))
        .log();
}

fn go(duration: Duration) -> String {
    Go(duration).to_string()
}

fn texts(urls: &[Url]) -> Vec<&str> {
    urls.iter().map(Url::as_str).collect()
}
