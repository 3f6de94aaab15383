//! All metrics, under etcd's names, so that dashboards and alerts made for etcd work. Only the outer layers record them.
//!
//! What is counted for every request costs an atomic operation or, as histograms do, [none](mod@sharded); the rest is counted once
//! per batch. What the database or the system knows is read when metrics are scraped.

pub mod process;
pub mod sharded;

use std::{
    sync::{Arc, LazyLock, OnceLock},
    time::Duration,
};

use prometheus::{
    CounterVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, exponential_buckets,
};

use process::ThreadTimes;
use sharded::{Durations, DurationsVec};

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
    pub feature_enabled: IntGaugeVec,
    pub heartbeat_send_failures: IntCounter,
    pub learner_promotions: IntCounter,
    pub learner_promotion_failures: IntCounterVec,
    pub read_indexes_failed: IntCounter,
    pub slow_read_indexes: IntCounter,
    pub client_requests: IntCounterVec,
    pub apply_seconds: DurationsVec,
    pub range_seconds: DurationsVec,
    pub request_seconds: DurationsVec,
    pub open_views: IntGauge,
    pub hash_seconds: Histogram,
    pub hash_revision_seconds: Histogram,
    pub backend_snapshot: Histogram,
    pub defragmentation: Histogram,
    pub defragmenting: IntGauge,
    pub known_peers: IntGaugeVec,
    pub peer_received_failures: IntCounterVec,
    pub round_trips: HistogramVec,
    pub snapshots_sending: IntGaugeVec,
    pub snapshot_send_seconds: HistogramVec,
    pub snapshots_receiving: IntGaugeVec,
    pub snapshot_receive_seconds: HistogramVec,
    pub snapshot_sync: Histogram,
    pub snapshot_save: Histogram,
    pub flush: Histogram,
    pub auth_revision: IntGauge,
    pub alarms: IntGaugeVec,
    pub put_bytes: IntGauge,
    pub last_compaction: IntGauge,
    pub compaction_slices: Histogram,
    pub compactions: Histogram,
    pub thread_cpu: CounterVec,
    pub log_groups: Histogram,
    pub apply_batches: Histogram,
    pub queue_length: IntGaugeVec,
    pub log_entries: IntGauge,
    pub log_bytes: IntGauge,
    pub table_bytes: IntGaugeVec,
    pub table_keys: IntGaugeVec,
    pub pending_compaction_bytes: IntGaugeVec,
    pub cache_lookups: IntCounterVec,
    pub watch_lag: IntGauge,
    pub memory_limit: IntGaugeVec,
    pub held_bytes_limit: IntGauge,
    pub slow_warnings: IntCounterVec,
}

/// Registered on first use.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

const MILLISECOND: f64 = 0.001;

/// The labels of a method.
const METHOD: [&str; 3] = ["grpc_type", "grpc_service", "grpc_method"];

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

fn duration_vec(name: &str, help: &str, first: f64, buckets: usize, labels: &[&str]) -> HistogramVec {
    let buckets = exponential_buckets(first, 2.0, buckets).expect("the buckets are constants");
    keep(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels))
}

/// For what is observed for every request.
fn sharded(name: &str, help: &str, first: Duration, bounds: usize, labels: &'static [&'static str]) -> DurationsVec {
    let durations = DurationsVec::new(name, help, first, bounds, labels).expect("names and labels are constants");
    REGISTRY.register(Box::new(durations.clone())).expect("each name is registered once");
    durations
}

/// Numbers from one to some thousands.
fn sizes(name: &str, help: &str) -> Histogram {
    durations(name, help, 1.0, 13)
}

fn times(name: &str, help: &str, labels: &[&str]) -> CounterVec {
    keep(CounterVec::new(Opts::new(name, help), labels))
}

fn calls(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    keep(IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    keep(IntGaugeVec::new(Opts::new(name, help), labels))
}

impl Metrics {
    #[rustfmt::skip] // A table: one metric per line.
    #[allow(clippy::too_many_lines, reason = "it is a table")]
    fn register() -> Self {
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
            feature_enabled: gauges("etcd_server_feature_enabled", "Whether a feature gate is on: 1 or 0.", &["name", "stage"]),
            heartbeat_send_failures: counter("etcd_server_heartbeat_send_failures_total", "Heartbeats that the leader sent too late, because its raft thread was held up."),
            learner_promotions: counter("etcd_server_learner_promote_successes", "Learners that this member has promoted as the leader."),
            learner_promotion_failures: calls("etcd_server_learner_promote_failures", "Learners that this member did not promote as the leader.", &["Reason"]),
            read_indexes_failed: counter("etcd_server_read_indexes_failed_total", "How often waiting linearizable reads were given up because the leader changed."),
            slow_read_indexes: counter("etcd_server_slow_read_indexes_total", "How often linearizable reads were not confirmed by the leader in time."),
            client_requests: calls("etcd_server_client_requests_total", "Calls of clients, by the API version that they state.", &["type", "client_api_version"]),
            apply_seconds: sharded("etcd_server_apply_duration_seconds", "How long it takes to apply an entry. Puts that follow one another are measured together.", Duration::from_micros(100), 20, &["version", "op", "success"]),
            range_seconds: sharded("etcd_server_range_duration_seconds", "How long it takes to read a range.", Duration::from_micros(100), 20, &["success"]),
            request_seconds: sharded("etcd_server_request_duration_seconds", "How long reads and proposals take, from their admission to their outcome.", Duration::from_millis(1), 14, &["type", "success"]),
            open_views: gauge("etcd_mvcc_db_open_read_transactions", "Reads that keep a revision from being compacted."),
            hash_seconds: durations("etcd_mvcc_hash_duration_seconds", "How long it takes to hash all tables.", 10.0 * MILLISECOND, 15),
            hash_revision_seconds: durations("etcd_mvcc_hash_rev_duration_seconds", "How long it takes to hash the keys at a revision.", 10.0 * MILLISECOND, 15),
            backend_snapshot: durations("etcd_disk_backend_snapshot_duration_seconds", "How long it takes to make a copy of the database for another member.", 10.0 * MILLISECOND, 17),
            defragmentation: durations("etcd_disk_backend_defrag_duration_seconds", "How long defragmentations take.", 100.0 * MILLISECOND, 13),
            defragmenting: gauge("etcd_disk_defrag_inflight", "Whether a defragmentation is running: 1 or 0."),
            known_peers: gauges("etcd_network_known_peers", "The members of the cluster, this one included: each is 1.", &["Local", "Remote"]),
            peer_received_failures: calls("etcd_network_peer_received_failures_total", "How often what another member sent could not be read.", &["From"]),
            round_trips: duration_vec("etcd_network_peer_round_trip_time_seconds", "The smoothed time of round trips to another member, observed every 30 seconds.", 0.1 * MILLISECOND, 16, &["To"]),
            snapshots_sending: gauges("etcd_network_snapshot_send_inflights_total", "Snapshots that are being sent to another member.", &["To"]),
            snapshot_send_seconds: duration_vec("etcd_network_snapshot_send_total_duration_seconds", "How long it takes to send a snapshot and have it installed.", 100.0 * MILLISECOND, 10, &["To"]),
            snapshots_receiving: gauges("etcd_network_snapshot_receive_inflights_total", "Snapshots that are being received from another member.", &["From"]),
            snapshot_receive_seconds: duration_vec("etcd_network_snapshot_receive_total_duration_seconds", "How long it takes to receive a snapshot.", 100.0 * MILLISECOND, 10, &["From"]),
            snapshot_sync: durations("etcd_snap_db_fsync_duration_seconds", "How long the files of a received snapshot wait for the disk.", MILLISECOND, 14),
            snapshot_save: durations("etcd_snap_db_save_total_duration_seconds", "How long it takes to save a received snapshot.", 100.0 * MILLISECOND, 10),
            flush: durations("etcd_debugging_snap_save_total_duration_seconds", "How long a flush of the database takes, after which the log is truncated.", MILLISECOND, 14),
            auth_revision: gauge("etcd_debugging_auth_revision", "The revision of users and roles."),
            alarms: gauges("etcd_debugging_server_alarms", "Whether a member has raised an alarm: 1 or 0.", &["server_id", "alarm_type"]),
            put_bytes: gauge("etcd_debugging_mvcc_total_put_size_in_bytes", "Bytes of the keys and values of all puts seen by this member."),
            last_compaction: gauge("etcd_debugging_mvcc_db_compaction_last", "When the last compaction ended, in seconds of unix time."),
            compaction_slices: durations("etcd_debugging_mvcc_db_compaction_pause_duration_milliseconds", "Milliseconds of each slice of a compaction.", 1.0, 13),
            compactions: durations("etcd_debugging_mvcc_db_compaction_total_duration_milliseconds", "Milliseconds of compactions, with their pauses.", 100.0, 14),
            thread_cpu: times("metastore_thread_cpu_seconds_total", "Processor time of threads, by what they are for.", &["thread"]),
            log_groups: sizes("metastore_log_group_entries", "Entries that are written to the log and synced at a time."),
            apply_batches: sizes("metastore_apply_batch_entries", "Entries that are applied and written to the database at a time."),
            queue_length: gauges("metastore_queue_length", "What waits: messages of other members and proposals for raft, entries for the log, committed entries to be applied, long reads, password checks, hashes.", &["queue"]),
            log_entries: gauge("metastore_log_entries", "Entries in the log."),
            log_bytes: gauge("metastore_log_disk_bytes", "Disk space of the log."),
            table_bytes: gauges("metastore_table_bytes", "Size of each column family of the database, by what it is in: files, or memtables.", &["table", "in"]),
            table_keys: gauges("metastore_table_keys", "Keys in each column family of the database, as it estimates.", &["table"]),
            pending_compaction_bytes: gauges("metastore_table_pending_compaction_bytes", "Bytes of each column family that the database has yet to rewrite, as it estimates.", &["table"]),
            cache_lookups: calls("metastore_cache_lookups_total", "Lookups in the caches of values and of verified passwords, by outcome: hit, miss.", &["cache", "outcome"]),
            watch_lag: gauge("metastore_watch_lag_revisions", "How many revisions the watch that is furthest behind has yet to be sent."),
            memory_limit: gauges("metastore_memory_limit_bytes", "How much memory a part may take.", &["part"]),
            held_bytes_limit: gauge("metastore_http2_held_limit_bytes", "How many bytes may be held for clients."),
            slow_warnings: calls("metastore_slow_total", "What took longer than it should, whether it was logged or not: apply, wait, read, request, sync, heartbeat, read_index.", &["what"]),
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

/// Sets how often a cache had what was looked for, and how often not, since it was made.
pub fn set_cache_lookups(cache: &str, (hits, misses): (u64, u64)) {
    for (outcome, lookups) in [("hit", hits), ("miss", misses)] {
        let counter = METRICS.cache_lookups.with_label_values(&[cache, outcome]);
        // A cache that has replaced another one begins at zero.
        counter.inc_by(lookups.saturating_sub(counter.get()));
    }
}

/// Adds the processor time that threads have used since the last call.
pub fn refresh_thread_times() {
    static TIMES: LazyLock<ThreadTimes> = LazyLock::new(ThreadTimes::default);
    for (thread, seconds) in TIMES.since_last_time() {
        METRICS.thread_cpu.with_label_values(&[thread]).inc_by(seconds);
    }
}

/// Sets how much memory a part of the process may take.
pub fn set_memory_limit_bytes(part: &str, bytes: usize) {
    METRICS.memory_limit.with_label_values(&[part]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
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

/// The histogram of `--metrics=extensive`: how long calls take, by method. Not registered unless it is asked for.
static CALL_SECONDS: OnceLock<HistogramVec> = OnceLock::new();

/// Measures calls from now on, as `--metrics=extensive` asks. To be called before methods are registered.
pub fn measure_calls() {
    CALL_SECONDS.get_or_init(|| {
        let options = HistogramOpts::new("grpc_server_handling_seconds", "How long calls take.");
        keep(HistogramVec::new(options, &METHOD))
    });
}

/// The histogram of a method, if calls are measured.
#[must_use]
pub fn call_seconds(labels: &[&str; 3]) -> Option<Histogram> {
    CALL_SECONDS.get().map(|seconds| seconds.with_label_values(labels))
}

/// How many API versions of clients are counted apart: clients choose what they state.
const MAX_CLIENT_VERSIONS: usize = 64;
const MAX_VERSION_CHARS: usize = 16;

/// The counter of calls of a kind, `unary` or `stream`, by clients that state this API version; empty if they state none. Finding it
/// takes a lock.
#[must_use]
pub fn client_requests(kind: &str, version: &str) -> IntCounter {
    static KNOWN: parking_lot::Mutex<Vec<String>> = parking_lot::Mutex::new(Vec::new());
    let mut known = KNOWN.lock();
    let version = if version.is_empty() { "unknown" } else { version };
    let mut is_counted = known.iter().any(|other| other == version);
    if !is_counted && version.len() <= MAX_VERSION_CHARS && known.len() < MAX_CLIENT_VERSIONS {
        known.push(version.to_owned());
        is_counted = true;
    }
    METRICS.client_requests.with_label_values(&[kind, if is_counted { version } else { "other" }])
}

/// The histograms of reads, by success: found once.
struct ReadSeconds {
    ranges: [Arc<Durations>; 2],
    range_requests: [Arc<Durations>; 2],
    read_only_txns: [Arc<Durations>; 2],
}

static READS: LazyLock<ReadSeconds> = LazyLock::new(|| {
    let outcomes = ["false", "true"];
    let requests = |kind| outcomes.map(|success| METRICS.request_seconds.with(&[kind, success]));
    ReadSeconds {
        ranges: outcomes.map(|success| METRICS.range_seconds.with(&[success])),
        range_requests: requests("Range"),
        read_only_txns: requests("ReadonlyTxn"),
    }
});

/// Records a Range: how long reading took, and how long all took since it was admitted.
pub fn observe_range(is_success: bool, reading: Duration, total: Duration) {
    READS.ranges[usize::from(is_success)].observe(reading);
    READS.range_requests[usize::from(is_success)].observe(total);
}

/// Records a read-only transaction: how long it took since it was admitted.
pub fn observe_read_only_txn(is_success: bool, total: Duration) {
    READS.read_only_txns[usize::from(is_success)].observe(total);
}
