//! The HTTP pages beside the JSON API: health, probes, version, beside a real etcd.

use crate::{client::request, pair::Pair};

#[test]
fn pages_are_answered_as_by_etcd() {
    let Some(mut pair) = Pair::start(&[]) else { return };
    let paths = [
        "/livez",
        "/livez?verbose",
        "/livez/",
        "/livez/serializable_read",
        "/livez/x",
        "/livez?exclude=serializable_read&verbose",
        "//livez",
        "/readyz",
        "/readyz?exclude=nope",
        "/readyz/data_corruption?verbose",
        "/readyz/linearizable_read",
        "/readyz/non_learner?verbose=0",
        "/readyz/serializable_read?exclude=serializable_read&verbose",
        "/health",
        "/health?serializable=true&exclude=NOSPACE",
        "/health/",
        "/version",
        "/",
        "/nope",
    ];
    for method in ["GET", "POST", "HEAD"] {
        for path in paths {
            pair.request(method, path, &[], b"", &[]);
        }
    }
    let alarm =
        |action: &str, alarm: &str| format!("{{\"action\":\"{action}\",\"alarm\":\"{alarm}\",\"memberID\":\"5\"}}");
    for name in ["CORRUPT", "NOSPACE"] {
        pair.post("/v3/maintenance/alarm", &[], alarm("ACTIVATE", name).as_bytes());
        for path in [
            "/livez",
            "/readyz/data_corruption",
            "/readyz/data_corruption?verbose",
            "/readyz?exclude=data_corruption",
            "/health",
            "/health?exclude=CORRUPT",
            "/health?exclude=NOSPACE&exclude=CORRUPT",
            "/health?exclude=%4EOSPACE",
        ] {
            pair.request("GET", path, &[], b"", &[]);
        }
        pair.post("/v3/maintenance/alarm", &[], alarm("DEACTIVATE", name).as_bytes());
    }
    // In etcd the order of the checks is random.
    let bodies = [&pair.ours, &pair.etcd].map(|server| {
        let body = request(server.address(), "GET", "/readyz?verbose", &[], b"").body;
        let mut lines: Vec<_> = body.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    });
    let [ours, theirs] = bodies;
    assert_eq!(ours.len(), 5, "{ours:?}");
    pair.compare("all checks", ours, theirs);
    pair.finish();
}
