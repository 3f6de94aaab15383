//! The HTTP endpoints on the client port, next to gRPC.

use metastore::proto::etcdserverpb::AlarmRequest;

use crate::support::{HttpResponse, Server};

fn memory_bytes(metrics: &HttpResponse, part: &str) -> u64 {
    let start = format!("metastore_memory_bytes{{part=\"{part}\"}} ");
    let line = metrics.body.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("{part} is missing")).parse().unwrap()
}

#[tokio::test]
async fn health_version_and_metrics_are_served() {
    let server = Server::start(&[]);
    let health = server.http("GET", "/health");
    assert_eq!((health.status, health.body.as_str()), (200, r#"{"health":"true","reason":""}"#));
    let version = server.http("GET", "/version");
    let expected = r#"{"etcdserver":"3.7.3","etcdcluster":"3.7.0","storage":"3.7.0"}"#;
    assert_eq!((version.status, version.body.as_str()), (200, expected));
    assert!(version.head.contains("content-type: application/json"), "{}", version.head);
    server.client().await.put("a", "1", None).await.unwrap();
    let metrics = server.http("GET", "/metrics");
    assert_eq!(metrics.status, 200);
    assert!(metrics.head.contains("content-type: text/plain; version=0.0.4"), "{}", metrics.head);
    for line in [
        "etcd_server_has_leader 1",
        "etcd_server_is_leader 1",
        "etcd_mvcc_put_total 1",
        "etcd_debugging_mvcc_current_revision 2",
        "etcd_server_quota_backend_bytes 2147483648",
        "etcd_server_proposals_failed_total 0",
        r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
    ] {
        assert!(metrics.body.lines().any(|found| found == line), "{line} is missing");
    }
    for part in ["index", "memtables"] {
        let bytes = memory_bytes(&metrics, part);
        assert!((1..100 << 20).contains(&bytes), "{part}: {bytes}");
    }
    let log = memory_bytes(&metrics, "log");
    assert!(log < 1 << 20, "a sole member keeps only what is not applied yet: {log}");
    let page = include_str!("../../docs/metrics.md");
    for name in metrics.body.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        assert!(page.contains(&format!("| `{name}` |")), "docs/metrics.md does not list {name}");
    }
}

/// Metrics of calls that never happened are zero, not missing: dashboards rely on it.
#[test]
fn all_calls_are_counted_from_the_start() {
    let server = Server::start(&[]);
    let metrics = server.http("GET", "/metrics").body;
    let services = [
        ("etcdserverpb.KV", 6),
        ("etcdserverpb.Watch", 1),
        ("etcdserverpb.Lease", 5),
        ("etcdserverpb.Cluster", 5),
        ("etcdserverpb.Maintenance", 8),
        ("etcdserverpb.Auth", 17),
        ("grpc.health.v1.Health", 3),
        ("v3lockpb.Lock", 2),
        ("v3electionpb.Election", 5),
    ];
    for (name, each) in [
        ("grpc_server_started_total", 1),
        ("grpc_server_msg_received_total", 1),
        ("grpc_server_msg_sent_total", 1),
        ("grpc_server_handled_total", 17),
    ] {
        let series: Vec<&str> = metrics.lines().filter(|line| line.starts_with(&format!("{name}{{"))).collect();
        assert!(series.iter().all(|line| line.ends_with("} 0")), "{series:#?}");
        for (service, methods) in services {
            let label = format!("grpc_service=\"{service}\"");
            assert_eq!(
                series.iter().filter(|line| line.contains(&label)).count(),
                methods * each,
                "{name} of {service}"
            );
        }
    }
    let watch = r#"grpc_server_handled_total{grpc_code="Canceled",grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 0"#;
    assert!(metrics.lines().any(|line| line == watch));
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = Server::start(&[]);
    let missing = server.http("GET", "/nowhere");
    assert_eq!((missing.status, missing.body.as_str()), (404, "404 page not found\n"));
    for path in ["/health", "/version"] {
        for method in ["HEAD", "POST", "DELETE"] {
            let page = server.http(method, path);
            assert_eq!(page.status, 405, "{method} {path}");
            assert!(page.head.contains("allow: get"), "{}", page.head);
        }
    }
}

#[tokio::test]
async fn alarms_make_a_member_unhealthy_unless_they_are_excluded() {
    let server = Server::start(&[]);
    let mut maintenance = server.maintenance().await;
    maintenance.alarm(AlarmRequest { action: 1, member_id: 7, alarm: 1 }).await.unwrap();
    let page = server.http("GET", "/health");
    assert_eq!((page.status, page.body.trim_end()), (503, r#"{"health":"false","reason":"ALARM NOSPACE"}"#));
    assert_eq!(server.http("GET", "/health?exclude=NOSPACE").status, 200);
    maintenance.alarm(AlarmRequest { action: 1, member_id: 7, alarm: 2 }).await.unwrap();
    let page = server.http("GET", "/health?exclude=NOSPACE");
    assert_eq!((page.status, page.body.trim_end()), (503, r#"{"health":"false","reason":"ALARM CORRUPT"}"#));
    assert_eq!(server.http("GET", "/health?exclude=NOSPACE&exclude=CORRUPT&serializable=true").status, 200);
}
