//! All metrics, under etcd's names, so that dashboards and alerts made for etcd work. Only the outer layers record them.

use std::{sync::LazyLock, time::Duration};

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, exponential_buckets,
};

/// The registry that `/metrics` exposes.
pub static REGISTRY: LazyLock<Registry> = LazyLock::new(Registry::new);

pub struct Metrics {
    pub has_leader: IntGauge,
    pub is_leader: IntGauge,
    pub is_learner: IntGauge,
    pub capability_level: IntGauge,
    pub leader_changes: IntCounter,
    pub proposals_failed: IntCounter,
    pub proposals_pending: IntGauge,
    pub proposals_committed: IntGauge,
    pub proposals_applied: IntGauge,
    pub quota_bytes: IntGauge,
    pub health_successes: IntCounter,
    pub health_failures: IntCounter,
    pub health_check: IntGaugeVec,
    pub health_checks: IntCounterVec,
    pub db_total_bytes: IntGauge,
    pub db_in_use_bytes: IntGauge,
    pub wal_fsync: Histogram,
    pub wal_write: Histogram,
    pub wal_write_bytes: IntGauge,
    pub backend_commit: Histogram,
    pub puts: IntCounter,
    pub deletes: IntCounter,
    pub ranges: IntCounter,
    pub txns: IntCounter,
    pub keys: IntGauge,
    pub current_revision: IntGauge,
    pub compact_revision: IntGauge,
    pub compacted_keys: IntCounter,
    pub compaction_hashes: IntCounterVec,
    pub history_bytes: IntGauge,
    pub watch_streams: IntGauge,
    pub watchers: IntGauge,
    pub slow_watchers: IntGauge,
    pub events: IntCounter,
    pub pending_events: IntGauge,
    pub watch_sends: Histogram,
    pub watch_sends_per_event: Histogram,
    pub watch_control_sends: Histogram,
    pub watch_progress_sends: Histogram,
    pub leases_granted: IntCounter,
    pub leases_renewed: IntCounter,
    pub leases_revoked: IntCounter,
    pub leases_expired: IntCounter,
    pub lease_ttls: Histogram,
    pub client_sent_bytes: IntCounter,
    pub client_received_bytes: IntCounter,
    pub slow_applies: IntCounter,
    pub log_first_index: IntGauge,
    pub memory: IntGaugeVec,
    pub peer_sent_bytes: IntCounterVec,
    pub peer_received_bytes: IntCounterVec,
    pub peer_sent_failures: IntCounterVec,
    pub active_peers: IntGaugeVec,
    pub disconnected_peers: IntCounterVec,
    pub peer_refused: IntCounterVec,
    pub tls_handshakes: IntCounterVec,
    pub tls_handshakes_waiting: IntGaugeVec,
    pub certificate_expiry: IntGaugeVec,
    pub snapshots_sent: IntCounterVec,
    pub snapshot_send_failures: IntCounterVec,
    pub snapshots_received: IntCounterVec,
    pub snapshot_receive_failures: IntCounterVec,
    pub snapshots_in_progress: IntGauge,
    pub started: IntCounterVec,
    pub handled: IntCounterVec,
    pub received: IntCounterVec,
    pub sent: IntCounterVec,
    pub connections: IntGauge,
    pub held_bytes: IntGauge,
    pub refused: IntCounterVec,
}

/// Registered on first use.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

const MILLISECOND: f64 = 0.001;

fn keep<C: prometheus::core::Collector + Clone + 'static>(metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("names and labels are constants");
    REGISTRY.register(Box::new(metric.clone())).expect("each name is registered once");
    metric
}

fn counter(name: &str, help: &str) -> IntCounter {
    keep(IntCounter::new(name, help))
}

fn gauge(name: &str, help: &str) -> IntGauge {
    keep(IntGauge::new(name, help))
}

fn durations(name: &str, help: &str, first: f64, buckets: usize) -> Histogram {
    let buckets = exponential_buckets(first, 2.0, buckets).expect("the buckets are constants");
    keep(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
}

fn calls(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    keep(IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    keep(IntGaugeVec::new(Opts::new(name, help), labels))
}

impl Metrics {
    #[rustfmt::skip] // A table: one metric per line.
    fn register() -> Self {
        const METHOD: [&str; 3] = ["grpc_type", "grpc_service", "grpc_method"];
        let metrics = Self {
            has_leader: gauge("etcd_server_has_leader", "Whether a leader is known: 1 or 0."),
            is_leader: gauge("etcd_server_is_leader", "Whether this member leads: 1 or 0."),
            capability_level: gauge("metastore_capability_level", "The capability level of the cluster: which kinds of log entries it uses."),
            is_learner: gauge("etcd_server_is_learner", "Whether this member is a learner: 1 or 0."),
            leader_changes: counter("etcd_server_leader_changes_seen_total", "How often leadership changed, as seen here."),
            proposals_failed: counter("etcd_server_proposals_failed_total", "Proposals that were not answered in time."),
            proposals_pending: gauge("etcd_server_proposals_pending", "Proposals that wait for their outcome."),
            proposals_committed: gauge("etcd_server_proposals_committed_total", "The commit index."),
            proposals_applied: gauge("etcd_server_proposals_applied_total", "The applied index."),
            quota_bytes: gauge("etcd_server_quota_backend_bytes", "The quota of the database in bytes."),
            health_successes: counter("etcd_server_health_success", "Successful requests of /health."),
            health_failures: counter("etcd_server_health_failures", "Failed requests of /health."),
            health_check: gauges("etcd_server_healthcheck", "The result of each check of /livez and /readyz: 1 or 0.", &["type", "name"]),
            health_checks: calls("etcd_server_healthchecks_total", "Checks made for /livez and /readyz.", &["type", "name", "status"]),
            db_total_bytes: gauge("etcd_mvcc_db_total_size_in_bytes", "Size of the database in bytes."),
            db_in_use_bytes: gauge("etcd_mvcc_db_total_size_in_use_in_bytes", "Bytes of the database that hold data."),
            wal_fsync: durations("etcd_disk_wal_fsync_duration_seconds", "How long the log waits for the disk.", MILLISECOND, 14),
            wal_write: durations("etcd_disk_wal_write_duration_seconds", "How long writes of the log take before the wait for the disk.", MILLISECOND, 14),
            wal_write_bytes: gauge("etcd_disk_wal_write_bytes_total", "Bytes written to the log."),
            backend_commit: durations("etcd_disk_backend_commit_duration_seconds", "How long writes of the database take.", MILLISECOND, 14),
            puts: counter("etcd_mvcc_put_total", "Puts seen by this member."),
            deletes: counter("etcd_mvcc_delete_total", "Deletions seen by this member."),
            ranges: counter("etcd_mvcc_range_total", "Ranges seen by this member."),
            txns: counter("etcd_mvcc_txn_total", "Transactions seen by this member."),
            keys: gauge("etcd_debugging_mvcc_keys_total", "Keys in the index."),
            current_revision: gauge("etcd_debugging_mvcc_current_revision", "The revision of the key space."),
            compact_revision: gauge("etcd_debugging_mvcc_compact_revision", "The revision of the last compaction."),
            compacted_keys: counter("etcd_debugging_mvcc_db_compaction_keys_total", "Records removed by compactions."),
            watch_streams: gauge("etcd_debugging_mvcc_watch_stream_total", "Open watch streams."),
            watchers: gauge("etcd_debugging_mvcc_watcher_total", "Open watches."),
            slow_watchers: gauge("etcd_debugging_mvcc_slow_watcher_total", "Watches that are catching up."),
            events: counter("etcd_debugging_mvcc_events_total", "Events sent by this member."),
            pending_events: gauge("etcd_debugging_mvcc_pending_events_total", "Events that wait to be sent."),
            watch_sends: durations("etcd_debugging_server_watch_send_loop_watch_stream_duration_seconds", "How long it takes to send the pending events of a watch stream.", MILLISECOND, 14),
            watch_sends_per_event: durations("etcd_debugging_server_watch_send_loop_watch_stream_duration_per_event_seconds", "The same, for each event.", MILLISECOND, 14),
            watch_control_sends: durations("etcd_debugging_server_watch_send_loop_control_stream_duration_seconds", "How long it takes to answer what a watch stream asked for.", MILLISECOND, 14),
            watch_progress_sends: durations("etcd_debugging_server_watch_send_loop_progress_duration_seconds", "How long it takes to send progress notices.", MILLISECOND, 14),
            leases_granted: counter("etcd_debugging_lease_granted_total", "Leases granted."),
            leases_renewed: counter("etcd_debugging_lease_renewed_total", "Renewals seen by the leader."),
            leases_revoked: counter("etcd_debugging_lease_revoked_total", "Leases revoked."),
            leases_expired: counter("etcd_debugging_server_lease_expired_total", "Leases that expired."),
            lease_ttls: durations("etcd_debugging_lease_ttl_total", "Seconds for which leases were granted.", 1.0, 24),
            client_sent_bytes: counter("etcd_network_client_grpc_sent_bytes_total", "Bytes of messages sent to clients."),
            client_received_bytes: counter("etcd_network_client_grpc_received_bytes_total", "Bytes of messages received from clients."),
            slow_applies: counter("etcd_server_slow_apply_total", "Batches that took long to apply."),
            peer_sent_bytes: calls("etcd_network_peer_sent_bytes_total", "Bytes sent to other members.", &["To"]),
            peer_received_bytes: calls("etcd_network_peer_received_bytes_total", "Bytes received from other members.", &["From"]),
            peer_sent_failures: calls("etcd_network_peer_sent_failures_total", "How often sending to another member failed.", &["To"]),
            active_peers: gauges("etcd_network_active_peers", "Whether another member is connected: 1 or 0.", &["Local", "Remote"]),
            disconnected_peers: calls("etcd_network_disconnected_peers_total", "How often the connection to another member was lost.", &["Local", "Remote"]),
            peer_refused: calls("metastore_peer_refused_total", "Connections, messages and snapshots that the peer port refused, by reason.", &["reason"]),
            tls_handshakes: calls("metastore_tls_handshakes_total", "TLS handshakes that clients and members began, by outcome: ok, error, timeout, evicted.", &["side", "outcome"]),
            tls_handshakes_waiting: gauges("metastore_tls_handshakes_waiting", "TLS handshakes in progress.", &["side"]),
            certificate_expiry: gauges("metastore_certificate_expiry_timestamp_seconds", "When the certificate of a flag expires, in seconds of unix time.", &["flag"]),
            snapshots_sent: calls("etcd_network_snapshot_send_success", "Snapshots that another member has installed.", &["To"]),
            snapshot_send_failures: calls("etcd_network_snapshot_send_failures", "Snapshots that another member did not install.", &["To"]),
            snapshots_received: calls("etcd_network_snapshot_receive_success", "Snapshots of another member that were received.", &["From"]),
            snapshot_receive_failures: calls("etcd_network_snapshot_receive_failures", "Snapshots of another member that could not be received.", &["From"]),
            snapshots_in_progress: gauge("etcd_server_snapshot_apply_in_progress_total", "Whether a snapshot is being installed: 1 or 0."),
            log_first_index: gauge("metastore_log_first_index", "The index of the first entry in the log."),
            memory: gauges("metastore_memory_bytes", "About how much memory each part takes.", &["part"]),
            compaction_hashes: calls("metastore_compaction_hashes_total", "Compactions whose hash was remembered, or left out because the history is too large.", &["outcome"]),
            history_bytes: gauge("metastore_history_bytes", "Bytes of all records that compaction has not removed; equal on members whose compactions are equally far."),
            started: calls("grpc_server_started_total", "Calls that began.", &METHOD),
            handled: calls("grpc_server_handled_total", "Calls that ended.", &["grpc_type", "grpc_service", "grpc_method", "grpc_code"]),
            received: calls("grpc_server_msg_received_total", "Messages received.", &METHOD),
            sent: calls("grpc_server_msg_sent_total", "Messages sent.", &METHOD),
            connections: gauge("metastore_http2_connections", "Open connections of clients."),
            held_bytes: gauge("metastore_http2_held_bytes", "Bytes held for clients: requests that are not answered, answers that are not read, watches."),
            refused: calls("metastore_http2_refused_total", "Calls, streams and connections that were refused or ended because a limit was reached or a rule was broken.", &["reason"]),
        };
        for outcome in ["remembered", "left_out"] {
            metrics.compaction_hashes.with_label_values(&[outcome]);
        }
        metrics.current_revision.set(1);
        metrics.compact_revision.set(-1);
        metrics
    }
}

/// Counts a request that was refused because a limit was reached, by the limit.
pub fn refused(reason: &str) {
    METRICS.refused.with_label_values(&[reason]).inc();
}

/// Records that the known leader changed; zero means that no leader is known.
pub fn leader_changed(before: u64, now: u64) {
    METRICS.has_leader.set(i64::from(now != 0));
    if before != now && now != 0 {
        METRICS.leader_changes.inc();
    }
}

/// The number of responses of each kind that a watch stream was sent at a time.
#[derive(Debug, Default, Clone, Copy)]
pub struct WatchResponseCounts {
    pub events: usize,
    /// Responses to its requests.
    pub answers: usize,
    /// Progress notifications.
    pub notices: usize,
}

/// Records how long it took to send responses to a watch stream.
pub fn observe_watch_send(sent: WatchResponseCounts, took: Duration) {
    let seconds = took.as_secs_f64();
    if sent.events > 0 {
        METRICS.watch_sends.observe(seconds);
        #[allow(clippy::cast_precision_loss, reason = "the number of events is far below 2^53")]
        METRICS.watch_sends_per_event.observe(seconds / sent.events as f64);
    } else if sent.answers > 0 {
        METRICS.watch_control_sends.observe(seconds);
    } else if sent.notices > 0 {
        METRICS.watch_progress_sends.observe(seconds);
    }
}

/// Sets the memory usage of one part of the process.
pub fn set_memory_bytes(part: &str, bytes: u64) {
    METRICS.memory.with_label_values(&[part]).set(bytes.cast_signed());
}

/// Records that a group of entries was written to the log and synced.
pub fn observe_log_write(bytes: u64, write: Duration, sync: Duration) {
    METRICS.wal_write_bytes.add(bytes.cast_signed());
    METRICS.wal_write.observe(write.as_secs_f64());
    METRICS.wal_fsync.observe(sync.as_secs_f64());
}

/// Counts what the server of HTTP/2 tells.
struct Http2Metrics;

impl http2::metrics::Metrics for Http2Metrics {
    fn refused(&self, reason: &'static str) {
        refused(reason);
    }

    fn connection_opened(&self) {
        METRICS.connections.inc();
    }

    fn connection_closed(&self) {
        METRICS.connections.dec();
    }

    fn held_bytes(&self, change: i64) {
        METRICS.held_bytes.add(change);
    }
}

/// Has the server of HTTP/2 count here. To be called before it serves.
pub fn install_http2() {
    http2::metrics::install(&Http2Metrics);
}
