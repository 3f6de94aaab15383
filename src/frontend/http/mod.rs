//! The HTTP routes of the client port beside gRPC: /health, /version, /metrics.

pub mod hyper_server;
pub mod min_rate;

use std::{fmt::Write, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};
use prometheus::{Encoder, TextEncoder};

use crate::{metrics::REGISTRY, service::Service, version::ETCD_VERSION};

/// The routes of the client port that are not gRPC.
pub fn router(service: Arc<Service>) -> Router {
    let only_get =
        || any(|| async { (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")], "Method Not Allowed") });
    Router::new()
        .route("/health", only_get().get(health).head(method_not_allowed))
        .route("/version", only_get().get(version).head(method_not_allowed))
        .route("/metrics", any(metrics))
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 page not found\n") })
        .with_state(service)
}

async fn method_not_allowed() -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET")], "Method Not Allowed").into_response()
}

async fn version(State(service): State<Arc<Service>>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], service.cluster.versions().write()).into_response()
}

async fn health(State(service): State<Arc<Service>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let serializable = query.split('&').any(|pair| pair == "serializable=true");
    let excluded: Vec<&str> = query.split('&').filter_map(|pair| pair.strip_prefix("exclude=")).collect();
    match service.check_health(serializable, &excluded).await {
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

async fn metrics(State(service): State<Arc<Service>>) -> Response {
    service.refresh_metrics();
    let mut body = Vec::new();
    let encoder = TextEncoder::new();
    if let Err(error) = encoder.encode(&REGISTRY.gather(), &mut body) {
        return (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response();
    }
    body.extend_from_slice(constants(&service).as_bytes());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores")], body).into_response()
}

/// Metrics that do not change while the process runs, and its resident memory.
fn constants(service: &Service) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, labels: &str, value: f64| {
        _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name}{labels} {value}");
    };
    let id = format!("{{server_id=\"{:x}\"}}", service.cluster.member_id);
    gauge("etcd_server_id", "The ID of this member.", &id, 1.0);
    let version = format!("{{server_version=\"{ETCD_VERSION}\"}}");
    gauge("etcd_server_version", "The etcd version that this server implements.", &version, 1.0);
    let cluster = service.cluster.versions().cluster;
    if let Some((minor, _)) = cluster.rsplit_once('.') {
        let labels = format!("{{cluster_version=\"{minor}\"}}");
        gauge("etcd_cluster_version", "The cluster version: the lowest of all members.", &labels, 1.0);
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
