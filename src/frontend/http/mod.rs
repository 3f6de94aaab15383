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

use std::{cell::RefCell, fmt::Write, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, any},
};
use percent::query_values;
use prometheus::TextEncoder;

use crate::{
    metrics::{METRICS, REGISTRY, process::Process},
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
    // It reads files, and asks threads that may be busy.
    let page = tokio::task::spawn_blocking(move || {
        service.refresh_metrics();
        let page = TextEncoder::new().encode_to_string(&REGISTRY.gather());
        page.map(|page| page + &constants(&service) + &process_metrics(&Process::read()))
    });
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8; escaping=underscores");
    match page.await {
        Ok(Ok(page)) => ([(header::CONTENT_TYPE, text)], page).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Appends a metric that has one value.
fn write_metric(out: &mut String, kind: &str, [name, help, labels]: [&str; 3], value: f64) {
    _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{labels} ");
    _ = if value.is_infinite() { writeln!(out, "+Inf") } else { writeln!(out, "{value}") };
}

/// Metrics of this process, as the system sees it.
#[allow(clippy::cast_precision_loss, reason = "metrics are floats")]
fn process_metrics(process: &Process) -> String {
    let out = RefCell::new(String::new());
    let gauge = |name, help, value| write_metric(&mut out.borrow_mut(), "gauge", [name, help, ""], value);
    let counter = |name, help, value| write_metric(&mut out.borrow_mut(), "counter", [name, help, ""], value);
    counter("process_cpu_seconds_total", "Processor time that the process has used.", process.cpu_seconds);
    gauge(
        "process_start_time_seconds",
        "When the process was started, in seconds of unix time.",
        process.start_time_seconds,
    );
    gauge("process_resident_memory_bytes", "Memory that the process holds.", process.resident_bytes as f64);
    gauge("process_virtual_memory_bytes", "Address space that the process uses.", process.virtual_bytes as f64);
    gauge("process_virtual_memory_max_bytes", "The limit for its address space.", process.virtual_limit_bytes as f64);
    gauge("process_open_fds", "Open file descriptors.", process.open_files as f64);
    gauge("process_max_fds", "The limit for open file descriptors.", process.open_files_limit as f64);
    gauge("os_fd_used", "Open file descriptors.", process.open_files as f64);
    gauge("os_fd_limit", "The limit for open file descriptors.", process.open_files_limit as f64);
    counter(
        "process_network_receive_bytes_total",
        "Bytes received by all network devices that the process sees.",
        process.received_bytes as f64,
    );
    counter(
        "process_network_transmit_bytes_total",
        "Bytes sent by all network devices that the process sees.",
        process.transmitted_bytes as f64,
    );
    out.into_inner()
}

/// Metrics that do not change while the process runs, and one that may be infinite.
fn constants(service: &Service) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, labels: &str, value: f64| {
        write_metric(&mut out, "gauge", [name, help, labels], value);
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
    let seconds = service.node().status().quota_full_seconds();
    gauge(
        "metastore_quota_full_seconds",
        "In how many seconds the quota will be used up, if the database grows as in the last ten minutes; +Inf if it does not grow.",
        "",
        seconds,
    );
    out
}
