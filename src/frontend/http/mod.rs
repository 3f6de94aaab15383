//! The HTTP routes beside gRPC and the JSON API: /health, /livez, /readyz, /metrics, and for clients /version
//! and /debug/vars. The quick API is on a port of its own.

pub mod access;
pub mod debug_vars;
pub mod hyper_server;
pub mod min_rate;
pub mod percent;
pub mod probes;
pub mod quick_api;
pub mod redirect;

use std::{fmt::Write, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, any},
};
use percent::query_values;
use prometheus::{Encoder, TextEncoder};

use crate::{
    metrics::{METRICS, REGISTRY},
    service::Service,
    version::ETCD_VERSION,
};

/// The routes for clients.
pub fn client_routes(service: Arc<Service>) -> Router {
    metrics_and_health()
        .route("/version", only_get().get(version))
        .route("/debug/vars", only_get().get(debug_vars::variables))
        .with_state(service)
}

/// The routes of `--listen-metrics-urls`.
pub fn metrics_routes(service: Arc<Service>) -> Router {
    metrics_and_health().with_state(service)
}

fn metrics_and_health() -> Router<Arc<Service>> {
    Router::new()
        .route("/health", only_get().get(health))
        .route("/metrics", any(metrics))
        .merge(probes::routes())
        .fallback(|| async { error(StatusCode::NOT_FOUND, "404 page not found") })
}

/// A route of which GET is the only method. To axum, HEAD would be one, too.
fn only_get() -> MethodRouter<Arc<Service>> {
    any(method_not_allowed).head(method_not_allowed)
}

async fn method_not_allowed() -> Response {
    let mut response = error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
    response
}

/// An error as Go's HTTP server words it.
pub fn error(status: StatusCode, text: &str) -> Response {
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    let headers =
        [(header::CONTENT_TYPE, plain), (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))];
    (status, headers, format!("{text}\n")).into_response()
}

async fn version(State(service): State<Arc<Service>>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], service.cluster.versions().write()).into_response()
}

async fn health(State(service): State<Arc<Service>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let serializable = query_values(&query, "serializable").next().is_some_and(|value| value == "true");
    let excluded: Vec<String> = query_values(&query, "exclude").collect();
    let outcome = service.check_health(serializable, &excluded).await;
    if outcome.is_ok() {
        METRICS.health_successes.inc();
    } else {
        METRICS.health_failures.inc();
    }
    match outcome {
        Ok(()) => {
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            ([(header::CONTENT_TYPE, plain)], r#"{"health":"true","reason":""}"#).into_response()
        }
        Err(reason) => {
            let body = format!("{{\"health\":\"false\",\"reason\":\"{reason}\"}}");
            error(StatusCode::SERVICE_UNAVAILABLE, &body)
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
