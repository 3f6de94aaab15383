//! The probes of Kubernetes: `/livez`, `/readyz`, and each of their checks below them.

use std::{fmt::Write, sync::Arc};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::MethodRouter,
};

use super::{error, only_get, percent::query_values};
use crate::{
    metrics::METRICS,
    service::{Service, health::Check},
};

/// A probe, with its checks.
type Probe = (&'static str, &'static [(&'static str, Check)]);

const PROBES: [Probe; 2] = [
    ("livez", &[("serializable_read", Check::SerializableRead)]),
    (
        "readyz",
        &[
            ("data_corruption", Check::DataCorruption),
            ("serializable_read", Check::SerializableRead),
            ("linearizable_read", Check::LinearizableRead),
            ("non_learner", Check::NonLearner),
        ],
    ),
];

/// The routes of all probes.
pub fn routes() -> Router<Arc<Service>> {
    let mut router = Router::new();
    for (name, checks) in PROBES {
        router = router.route(&format!("/{name}"), all_checks((name, checks)));
        for nth in 0..checks.len() {
            router = router.route(&format!("/{name}/{}", checks[nth].0), one_check((name, &checks[nth..=nth])));
        }
    }
    router
}

/// All checks but those that the client excludes.
fn all_checks(probe: Probe) -> MethodRouter<Arc<Service>> {
    only_get().get(move |State(service): State<Arc<Service>>, RawQuery(query): RawQuery| async move {
        let query = query.unwrap_or_default();
        let excluded: Vec<String> = query_values(&query, "exclude").collect();
        run(&service, probe, &query, &excluded).await
    })
}

fn one_check(probe: Probe) -> MethodRouter<Arc<Service>> {
    only_get().get(move |State(service): State<Arc<Service>>, RawQuery(query): RawQuery| async move {
        run(&service, probe, &query.unwrap_or_default(), &[]).await
    })
}

async fn run(service: &Service, (probe, checks): Probe, query: &str, excluded: &[String]) -> Response {
    let (mut report, mut has_failed) = (String::new(), false);
    for (name, check) in checks.iter().filter(|(name, _)| excluded.iter().all(|excluded| excluded != name)) {
        let outcome = service.check(*check).await;
        let written = match &outcome {
            Ok(()) => writeln!(report, "[+]{name} ok"),
            Err(error) => writeln!(report, "[-]{name} failed: {error}"),
        };
        written.expect("writing to memory cannot fail");
        has_failed |= outcome.is_err();
        METRICS.health_check.with_label_values(&[probe, name]).set(i64::from(outcome.is_ok()));
        let status = if outcome.is_ok() { "success" } else { "error" };
        METRICS.health_checks.with_label_values(&[probe, name, status]).inc();
    }
    if has_failed {
        tracing::warn!(probe, report, "a health check has failed");
        return error(StatusCode::SERVICE_UNAVAILABLE, &report);
    }
    if query_values(query, "verbose").next().is_none() {
        report.clear();
    }
    report.push_str("ok\n");
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    let headers =
        [(header::CONTENT_TYPE, plain), (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))];
    (headers, report).into_response()
}
