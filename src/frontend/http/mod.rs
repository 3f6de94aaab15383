//! The HTTP routes beside gRPC and the JSON API: /health, /livez, /readyz, /metrics, and for clients /version
//! and /debug/vars. The quick API is on a port of its own.

pub mod access;
pub mod debug_vars;
pub mod hyper_server;
pub mod metrics_page;
pub mod min_rate;
pub mod percent;
pub mod probes;
pub mod quick_api;
pub mod redirect;

use std::sync::Arc;

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, any},
};
use percent::query_values;

use crate::{metrics::METRICS, service::Service};

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
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8; escaping=underscores");
    match metrics_page::get(&service).await {
        Ok(page) => ([(header::CONTENT_TYPE, text)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}
