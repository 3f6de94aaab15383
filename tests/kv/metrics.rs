//! The metrics, beside those of a real etcd.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

use crate::{
    etcdctl::output,
    support::{
        Server, eventually, program,
        requirements::{etcd, etcdctl},
        time_limit,
    },
};

/// Metrics of etcd that do not exist here, by the beginnings of their names. docs/metrics.md gives the reasons.
const LEFT_OUT: [&str; 9] = [
    "go_",
    "promhttp_",
    "etcd_grpc_proxy_",
    "etcd_debugging_store_",
    "etcd_debugging_disk_backend_commit_",
    "etcd_debugging_mvcc_index_compaction_pause_",
    "etcd_debugging_snap_save_marshalling_",
    "etcd_server_go_version",
    "etcd_snap_fsync_",
];

/// A metric as it is exposed.
#[derive(Debug, Default, PartialEq)]
struct Metric {
    kind: String,
    /// The names of the labels of its series, without those of buckets.
    labels: BTreeSet<String>,
    /// The bounds of its buckets.
    bounds: BTreeSet<String>,
    /// The value of each series, by its labels; of a histogram, the number of observations.
    values: BTreeMap<String, f64>,
}

/// All metrics of a page, by name.
fn metrics(page: &str) -> BTreeMap<String, Metric> {
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    for line in page.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let metric = Metric { kind: kind.to_owned(), ..Metric::default() };
            assert!(metrics.insert(name.to_owned(), metric).is_none(), "{name} is exposed twice");
        } else if !line.starts_with('#') && !line.is_empty() {
            add(&mut metrics, line);
        }
    }
    metrics
}

fn add(metrics: &mut BTreeMap<String, Metric>, line: &str) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) =
        series.split_once('{').map_or((series, ""), |(name, labels)| (name, &labels[..labels.len() - 1]));
    let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    let base = base.filter(|base| metrics.contains_key(*base)).unwrap_or(name);
    let metric = metrics.get_mut(base).unwrap_or_else(|| panic!("{name} has no type"));
    let mut others = Vec::new();
    for (label, value) in
        labels.split("\",").filter(|label| !label.is_empty()).map(|label| label.split_once("=\"").unwrap())
    {
        if label == "le" {
            // Go writes large numbers with an exponent.
            let bound: f64 = value.trim_end_matches('"').parse().unwrap();
            metric.bounds.insert(format!("{bound:e}"));
        } else {
            metric.labels.insert(label.to_owned());
            others.push(format!("{label}={}", value.trim_end_matches('"')));
        }
    }
    if name == base || name.ends_with("_count") {
        metric.values.insert(others.join(","), value.parse().unwrap());
    }
}

fn scrape(server: &Server) -> BTreeMap<String, Metric> {
    let page = server.http("GET", "/metrics");
    assert_eq!(page.status, 200);
    metrics(&page.body)
}

fn is_left_out(name: &str) -> bool {
    LEFT_OUT.iter().any(|beginning| name.starts_with(beginning))
}

/// What differs in names, types, labels and buckets.
fn differences(ours: &BTreeMap<String, Metric>, theirs: &BTreeMap<String, Metric>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, etcd) in theirs.iter().filter(|(name, _)| !is_left_out(name)) {
        let Some(our) = ours.get(name) else {
            found.push(format!("{name} is missing"));
            continue;
        };
        if (&our.kind, &our.labels, &our.bounds) != (&etcd.kind, &etcd.labels, &etcd.bounds) {
            found.push(format!("{name}: {our:?} is not {etcd:?}"));
        }
    }
    for name in ours.keys().filter(|name| !name.starts_with("metastore_")) {
        if is_left_out(name) || !theirs.contains_key(name) {
            found.push(format!("{name} is no metric of etcd"));
        }
    }
    found
}

fn run(etcdctl: &Path, server: &Server, command: &str, input: &str) -> String {
    let output = output(etcdctl, server, command, input);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A little of everything.
fn walk(etcdctl: &Path, server: &Server) {
    let etcdctl = |command: &str, input: &str| run(etcdctl, server, command, input);
    for command in ["put a 1", "get a", "get a --prefix", "get a --consistency s", "put a 2", "put a 333", "del a"] {
        etcdctl(command, "");
    }
    etcdctl("txn", "value(\"a\") = \"x\"\n\nput b 1\n\nput c 1\nput d 1\n\n");
    etcdctl("txn", "\n\nget b\n\nget c\n\n");
    let granted = etcdctl("lease grant 60", "");
    let lease = granted.split(' ').nth(1).unwrap();
    etcdctl(&format!("put e 1 --lease={lease}"), "");
    etcdctl(&format!("lease keep-alive --once {lease}"), "");
    etcdctl(&format!("lease timetolive {lease}"), "");
    etcdctl(&format!("lease revoke {lease}"), "");
    for command in ["compaction 4 --physical", "defrag", "endpoint hashkv", "endpoint status", "member list"] {
        etcdctl(command, "");
    }
    etcdctl("user add u:p", "");
    for path in ["/health", "/readyz"] {
        assert_eq!(server.http("GET", path).status, 200);
    }
}

/// Both servers, after the same walk.
fn walked(arguments: &[&str]) -> Option<[Server; 2]> {
    let (etcd, etcdctl) = (etcd()?, etcdctl()?);
    let servers = [program(), etcd].map(|program| Server::start_program(&program, arguments));
    for server in &servers {
        walk(&etcdctl, server);
    }
    Some(servers)
}

#[test]
fn metrics_have_the_names_types_labels_and_buckets_of_etcd() {
    let Some(servers) = walked(&["--metrics=extensive"]) else { return };
    let [ours, theirs] = servers.each_ref().map(scrape);
    assert!(theirs.len() > 120 && theirs.contains_key("grpc_server_handling_seconds"), "{}", theirs.len());
    let found = differences(&ours, &theirs);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn calls_are_measured_by_method_only_with_extensive_metrics() {
    let measured = |arguments: &[&str]| {
        let server = Server::start(arguments);
        let metrics = scrape(&server);
        (metrics.get("grpc_server_handling_seconds").map(|metric| metric.values.len()), server)
    };
    assert_eq!(measured(&["--metrics=basic"]).0, None);
    assert!(measured(&["--metrics=extensive"]).0.unwrap() > 45, "every method is there from the start");
    let (other, server) = measured(&["--metrics=other"]);
    assert_eq!(other, None, "as in etcd, any other value counts as basic");
    assert!(server.log().contains("--metrics is neither basic nor extensive"));
}

/// After the same walk, what is counted in the same way has the same value.
#[test]
fn counters_move_as_in_etcd() {
    const SAME: [&str; 16] = [
        "etcd_debugging_auth_revision",
        "etcd_debugging_lease_granted_total",
        "etcd_debugging_lease_renewed_total",
        "etcd_debugging_lease_revoked_total",
        "etcd_debugging_lease_ttl_total",
        "etcd_debugging_mvcc_compact_revision",
        "etcd_debugging_mvcc_current_revision",
        "etcd_debugging_mvcc_total_put_size_in_bytes",
        "etcd_disk_backend_defrag_duration_seconds",
        "etcd_mvcc_delete_total",
        "etcd_mvcc_hash_rev_duration_seconds",
        "etcd_mvcc_put_total",
        "etcd_mvcc_txn_total",
        "etcd_server_client_requests_total",
        "etcd_server_health_success",
        "etcd_server_range_duration_seconds",
    ];
    let Some(servers) = walked(&[]) else { return };
    let [ours, theirs] = servers.each_ref().map(scrape);
    let values = |metrics: &BTreeMap<String, Metric>, name: &str| {
        let values = metrics[name].values.iter().filter(|(_, value)| **value != 0.0);
        values.map(|(labels, value)| (labels.clone(), *value)).collect::<BTreeMap<_, _>>()
    };
    for name in SAME {
        assert_eq!(values(&ours, name), values(&theirs, name), "{name}");
    }
    for name in ["grpc_server_started_total", "grpc_server_handled_total", "grpc_server_msg_received_total"] {
        // The client cancels a stream as soon as it has what it wants; whether that comes first is chance.
        let [our, of_etcd] = [&ours, &theirs].map(|metrics| {
            let mut counts = values(metrics, name);
            counts.retain(|labels, _| !labels.contains("LeaseKeepAlive"));
            counts
        });
        assert_eq!(our, of_etcd, "{name}");
    }
    // What only the other one proposes is not compared.
    let operations = |metrics, name, label: &str| {
        let mut counts = values(metrics, name);
        counts.retain(|labels, _| {
            !["CapabilityLevelSet", "Cluster"].iter().any(|own| labels.contains(&format!("{label}={own}")))
        });
        counts
    };
    for (name, label) in
        [("etcd_server_apply_duration_seconds", "op"), ("etcd_server_request_duration_seconds", "type")]
    {
        assert_eq!(operations(&ours, name, label), operations(&theirs, name, label), "{name}");
    }
}

#[tokio::test]
async fn what_the_server_does_is_visible_in_its_own_metrics() {
    let server = Server::start(&["--quota-backend-bytes=100000000"]);
    let before = scrape(&server);
    let value = |metrics: &BTreeMap<String, Metric>, name: &str, labels: &str| {
        let metric = metrics.get(name).unwrap_or_else(|| panic!("{name} is missing"));
        *metric.values.get(labels).unwrap_or_else(|| panic!("{name}{{{labels}}} is missing: {metric:?}"))
    };
    assert!(value(&before, "metastore_quota_full_seconds", "").is_infinite(), "it does not grow");
    let mut client = server.client().await;
    for nth in 0..50 {
        client.put(format!("key {nth}"), vec![7; 1000], None).await.unwrap();
        client.get(format!("key {nth}"), None).await.unwrap();
    }
    let after = scrape(&server);
    let grown = |name, labels| value(&after, name, labels) - value(&before, name, labels);
    assert!(grown("metastore_log_group_entries", "") >= 50.0, "one write at a time is one sync each");
    assert!(grown("metastore_apply_batch_entries", "") >= 50.0);
    assert!(
        grown("metastore_table_bytes", "in=memtables,table=history")
            + grown("metastore_table_bytes", "in=files,table=history")
            > 0.0
    );
    assert!(value(&after, "metastore_log_disk_bytes", "") > 0.0);
    assert!(value(&after, "metastore_table_keys", "table=history") >= 50.0);
    let lookups =
        |outcome: &str| value(&after, "metastore_cache_lookups_total", &format!("cache=values,outcome={outcome}"));
    assert!(lookups("hit") + lookups("miss") >= 50.0, "each read looks its value up");
    for thread in ["api", "raft", "read", "background", "rocksdb", "watch"] {
        value(&after, "metastore_thread_cpu_seconds_total", &format!("thread={thread}"));
    }
    for part in ["block_cache", "log", "value_cache", "watch_pending", "watch_ring"] {
        assert!(value(&after, "metastore_memory_limit_bytes", &format!("part={part}")) > 0.0);
    }
    for queue in ["apply", "background", "hashes", "log", "passwords", "raft", "read_pool"] {
        assert!(value(&after, "metastore_queue_length", &format!("queue={queue}")) < 100.0, "{queue}");
    }
    assert!(value(&after, "metastore_http2_held_limit_bytes", "") > value(&after, "metastore_http2_held_bytes", ""));
    assert!(value(&after, "metastore_watch_lag_revisions", "").abs() < 0.5, "there are no watches");
}

#[tokio::test]
async fn a_raised_alarm_is_visible_until_it_is_cleared() {
    use metastore::proto::etcdserverpb::AlarmRequest;
    let server = Server::start(&[]);
    let mut maintenance = server.maintenance().await;
    let alarm = |action| AlarmRequest { action, member_id: 7, alarm: 1 };
    maintenance.alarm(alarm(1)).await.unwrap();
    let raised = BTreeMap::from([("alarm_type=NOSPACE,server_id=7".to_owned(), 1.0)]);
    assert_eq!(scrape(&server)["etcd_debugging_server_alarms"].values, raised);
    maintenance.alarm(alarm(2)).await.unwrap();
    assert!(!scrape(&server).contains_key("etcd_debugging_server_alarms"));
}

/// A client chooses its version, so it must not be able to make any number of series.
#[tokio::test]
async fn the_versions_that_clients_state_are_counted_apart_up_to_a_limit() {
    use metastore::proto::etcdserverpb::RangeRequest;
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    for nth in 0..100 {
        let mut request = tonic::Request::new(RangeRequest { key: "a".into(), ..RangeRequest::default() });
        request.metadata_mut().insert("client-api-version", format!("9.{nth}").parse().unwrap());
        kv.range(request).await.unwrap();
    }
    let counted = scrape(&server).remove("etcd_server_client_requests_total").unwrap().values;
    assert!((counted.values().sum::<f64>() - 100.0).abs() < 0.5, "{counted:?}");
    assert!(counted.len() < 80 && counted["client_api_version=other,type=unary"] > 30.0, "{counted:?}");
}

fn warnings(server: &Server, message: &str) -> Vec<serde_json::Value> {
    let lines: Vec<serde_json::Value> =
        server.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    lines.into_iter().filter(|line| line["msg"] == message && line["level"] == "warn").collect()
}

/// Every apply and every read is too slow for a limit of a nanosecond.
#[tokio::test]
async fn slow_requests_are_logged_with_their_parts_and_without_their_values() {
    let server = Server::start(&["--warning-apply-duration=1ns", "--warning-unary-request-duration=1ns"]);
    let mut client = server.client().await;
    client.put("some key", "a secret", None).await.unwrap();
    client.get("some key", None).await.unwrap();
    let limit = time_limit();
    let apply = eventually("the apply is logged", limit, || {
        let all = warnings(&server, "apply request took too long");
        all.into_iter().find(|line| line["request"].as_str().unwrap().contains("put:<"))
    });
    assert!(apply["request"].as_str().unwrap().ends_with(r#"put:<key:"some key" value_size:8 >"#), "{apply}");
    for (field, is_time) in [
        ("took", true),
        ("expected-duration", true),
        ("queue", true),
        ("log", true),
        ("apply", true),
        ("commit", true),
        ("prefix", false),
    ] {
        assert_eq!(apply[field].as_str().unwrap().ends_with('s'), is_time, "{field}: {apply}");
    }
    assert_eq!(apply["response"], "size:0");
    let read = eventually("the read is logged", limit, || {
        let all = warnings(&server, "apply request took too long");
        all.into_iter().find(|line| line["prefix"] == "read-only range ")
    });
    assert_eq!(read["request"], r#"key:"some key""#);
    assert!(read["response"].as_str().unwrap().starts_with("range_response_count:1 size:"), "{read}");
    for field in ["took", "read-index", "queue", "read"] {
        assert!(read[field].as_str().unwrap().ends_with('s'), "{field}: {read}");
    }
    let waited = eventually("the wait is logged", limit, || {
        warnings(&server, "request waited too long before it was applied")
            .into_iter()
            .find(|line| line["request"].as_str().unwrap().contains("put:<"))
    });
    assert!(waited["log"].as_str().is_some() && waited["queue"].as_str().is_some(), "{waited}");
    eventually("the call is logged", limit, || !warnings(&server, "request stats").is_empty());
    assert!(!server.log().contains("a secret"), "no value is logged");
}

/// A disk that makes everything slow does not flood the log: the next line says how many were left out.
#[tokio::test]
async fn warnings_are_limited_and_say_how_many_were_suppressed() {
    const PUTS: u32 = 200;
    let server = Server::start(&["--warning-apply-duration=1ns"]);
    let mut client = server.client().await;
    for nth in 0..PUTS {
        client.put(nth.to_string(), "1", None).await.unwrap();
    }
    let slow = scrape(&server)["etcd_server_slow_apply_total"].values[""];
    assert!(slow >= f64::from(PUTS), "all of them are counted: {slow}");
    let suppressed = eventually("a line says how many were suppressed", time_limit() + Duration::from_secs(15), || {
        // Whatever is applied next, once the interval is over.
        let lines = warnings(&server, "apply request took too long");
        lines.iter().map(|line| line["suppressed"].as_u64().unwrap()).find(|suppressed| *suppressed > 0).or_else(|| {
            put_once_more(&server);
            None
        })
    });
    let logged = warnings(&server, "apply request took too long").len();
    assert!(logged < 100 && suppressed > 0, "{logged} lines, {suppressed} suppressed");
}

/// One more put, by another client.
fn put_once_more(server: &Server) {
    let body = br#"{"key":"YQ==","value":"Yg=="}"#;
    assert_eq!(crate::support::http(server.address(), "POST", "/v3/kv/put", "", body).status, 200);
}
