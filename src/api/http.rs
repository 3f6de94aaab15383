//! The HTTP routes of the client port beside gRPC: /health, /version, /metrics.

use std::{fmt::Write, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};
use prometheus::{Encoder, TextEncoder};

use super::{Api, company::outcome, halt_process};
use crate::{
    error::Error,
    metrics::{self, METRICS, REGISTRY},
    mvcc::{Interval, Query},
    state::{CORRUPT, NOSPACE},
    version::ETCD_VERSION,
};

/// A health check fails after this time.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(7);

/// The routes of the client port that are not gRPC.
pub fn router(api: Arc<Api>) -> Router {
    let only_get =
        || any(|| async { (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")], "Method Not Allowed") });
    Router::new()
        .route("/health", only_get().get(health).head(method_not_allowed))
        .route("/version", only_get().get(version).head(method_not_allowed))
        .route("/metrics", any(metrics))
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 page not found\n") })
        .with_state(api)
}

async fn method_not_allowed() -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")], "Method Not Allowed").into_response()
}

async fn version(State(api): State<Arc<Api>>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], api.versions().write()).into_response()
}

async fn health(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let serializable = query.split('&').any(|pair| pair == "serializable=true");
    let excluded: Vec<&str> = query.split('&').filter_map(|pair| pair.strip_prefix("exclude=")).collect();
    match check_health(&api, serializable, &excluded).await {
        Ok(()) => {
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            ([(header::CONTENT_TYPE, plain)], r#"{"health":"true","reason":""}"#).into_response()
        }
        Err(reason) => {
            let body = format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}\n");
            let headers = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
            (StatusCode::SERVICE_UNAVAILABLE, headers, body).into_response()
        }
    }
}

async fn check_health(api: &Arc<Api>, serializable: bool, excluded: &[&str]) -> Result<(), String> {
    for alarm in api.readers().cluster.read().alarms.list(0) {
        let name = match alarm.alarm {
            NOSPACE => "NOSPACE",
            CORRUPT => "CORRUPT",
            _ => "UNKNOWN",
        };
        if !excluded.contains(&name) {
            return Err(format!("ALARM {name}"));
        }
    }
    if !serializable && api.node.status().leader() == 0 {
        return Err("RAFT NO LEADER".to_owned());
    }
    if !serializable {
        let barrier = outcome(|waiter| api.node.read_barrier(waiter));
        let result = tokio::time::timeout(HEALTH_TIMEOUT, barrier).await;
        result.unwrap_or(Err(Error::Timeout)).map_err(|error| format!("RANGE ERROR:{error}"))?;
    }
    let query = Query { limit: 1, keys_only: true, ..Query::all(Interval::From("\0".into())) };
    api.readers().keys.range(&query).map(|_| ()).map_err(|failure| format!("RANGE ERROR:{failure}"))
}

async fn metrics(State(api): State<Arc<Api>>) -> Response {
    refresh(&api);
    let mut body = Vec::new();
    let encoder = TextEncoder::new();
    if let Err(error) = encoder.encode(&REGISTRY.gather(), &mut body) {
        return (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response();
    }
    body.extend_from_slice(constants(&api).as_bytes());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores")], body).into_response()
}

/// Sets the metrics that are measured only when they are scraped.
fn refresh(api: &Api) {
    if let Err(halt) = api.node.measure() {
        halt_process(&halt);
    }
    let status = api.node.status();
    let keys = &api.readers().keys;
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    METRICS.proposals_committed.set(number(status.committed()));
    METRICS.proposals_applied.set(number(status.applied()));
    METRICS.db_total_bytes.set(status.total_bytes());
    METRICS.db_in_use_bytes.set(status.in_use_bytes());
    METRICS.is_leader.set(i64::from(status.leader() == api.header.member_id()));
    METRICS.current_revision.set(keys.head());
    METRICS.compact_revision.set(keys.compacted());
    METRICS.keys.set(i64::try_from(keys.keys()).unwrap_or(i64::MAX));
    METRICS.history_bytes.set(number(keys.history_bytes()));
    let (index, value_cache) = keys.memory();
    metrics::set_memory_bytes("index", index);
    metrics::set_memory_bytes("value_cache", value_cache);
    metrics::set_memory_bytes("watch_ring", api.hub.ring_bytes() as u64);
    metrics::set_memory_bytes("watch_pending", api.hub.pending_bytes() as u64);
}

/// Metrics that do not change while the process runs, and its resident memory.
fn constants(api: &Api) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, labels: &str, value: f64| {
        _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{labels} {value}");
    };
    let id = format!("{{server_id=\"{:x}\"}}", api.header.member_id());
    gauge("etcd_server_id", "The ID of this member.", &id, 1.0);
    let version = format!("{{server_version=\"{ETCD_VERSION}\"}}");
    gauge("etcd_server_version", "The version that this server speaks.", &version, 1.0);
    let cluster = api.readers().cluster.read().cluster_version.clone();
    if let Some((minor, _)) = cluster.rsplit_once('.') {
        let labels = format!("{{cluster_version=\"{minor}\"}}");
        gauge("etcd_cluster_version", "The version that all members speak.", &labels, 1.0);
    }
    if let Some(bytes) = resident_bytes() {
        gauge("process_resident_memory_bytes", "Memory that the process holds.", "", bytes);
    }
    out
}

#[allow(clippy::cast_precision_loss, reason = "a gauge is a float, and no process has 2^53 bytes")]
fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some((kilobytes * 1024) as f64)
}
