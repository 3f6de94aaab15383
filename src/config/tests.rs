use super::*;
use crate::net::url;

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Parsed, Exit> {
    from_process(
        arguments.iter().map(OsString::from),
        environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))),
    )
}

fn config(arguments: &[&str]) -> Config {
    run(arguments, &[]).unwrap().config
}

/// The level, message and error of the line that ends the start.
fn reason(arguments: &[&str]) -> (Level, String, String) {
    match run(arguments, &[]).unwrap_err() {
        Exit::Logged { notices, .. } => {
            let last = notices.last().unwrap();
            let error = last.fields.iter().find(|(name, _)| name == "error").unwrap().1.as_str().unwrap();
            (last.level, last.message.to_string(), error.to_owned())
        }
        plain @ Exit::Plain { .. } => panic!("not a log line: {plain:?}"),
    }
}

fn verification_error(arguments: &[&str]) -> String {
    let (level, message, error) = reason(arguments);
    assert_eq!((level, message.as_str()), (Level::Warn, NOT_VERIFIED));
    error
}

fn warnings(arguments: &[&str]) -> Vec<String> {
    let notices = run(arguments, &[]).unwrap().notices;
    let lines = notices.iter().filter(|notice| notice.level == Level::Warn).map(|notice| {
        let fields: Vec<_> = notice.fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!("{} {}", notice.message, fields.join(" ")).trim().to_owned()
    });
    lines.collect()
}

#[test]
fn every_setting_has_a_default() {
    let config = config(&[]);
    assert_eq!(config.name, "default");
    assert_eq!(config.data_dir, PathBuf::from("default.metastore"));
    assert_eq!(url::joined(&config.listen_client_urls), "http://localhost:2379");
    assert_eq!(url::joined(&config.advertise_client_urls), "http://localhost:2379");
    assert_eq!(url::joined(&config.listen_peer_urls), "http://localhost:2380");
    assert_eq!(config.initial_cluster, "default=http://localhost:2380");
    assert_eq!((config.heartbeat_interval, config.election_ticks()), (Duration::from_millis(100), 10));
    assert_eq!((config.snapshot_count, config.snapshot_catchup_entries), (10_000, 5_000));
    assert_eq!((config.max_txn_ops, config.max_request_bytes), (128, 1_572_864));
    assert_eq!(config.max_concurrent_streams, u32::MAX);
    assert_eq!(config.quota_bytes, Some(2 << 30));
    assert_eq!(config.auto_compaction, AutoCompaction::Off);
    assert_eq!(config.compaction_batch_limit, 1_000);
    assert_eq!(config.compaction_sleep_interval, Duration::from_millis(10));
    assert_eq!(config.watch_progress_notify_interval, Duration::from_mins(10));
    assert_eq!(config.warning_apply_duration, Duration::from_millis(100));
    assert_eq!(config.warning_unary_request_duration, Duration::from_millis(300));
    assert_eq!(config.value_cache_bytes, 16 << 20);
    assert!(config.pre_vote && !config.unsafe_no_fsync);
    assert_eq!(config.logs, logging::Settings::default());
    assert!(config.advance_first_election && config.strict_reconfig_check && !config.force_new_cluster);
    assert_eq!(config.max_learners, 1);
    let first = config.parse_initial_cluster().unwrap();
    assert_eq!(
        (first.state, first.name.as_str(), first.token.as_str()),
        (ClusterState::New, "default", "etcd-cluster")
    );
    assert_eq!((url::joined(first.own_urls()), first.members.len()), ("http://localhost:2380".into(), 1));
}

#[test]
fn http_and_metrics_may_have_urls_of_their_own() {
    let config = config(&[
        "--listen-client-http-urls=http://[::1]:2,http://0.0.0.0:1",
        "--listen-metrics-urls=http://localhost:3",
    ]);
    assert_eq!(url::joined(&config.listen_client_http_urls), "http://0.0.0.0:1,http://[::1]:2");
    assert_eq!(url::joined(&config.listen_metrics_urls), "http://localhost:3");
    for flag in ["--listen-client-http-urls", "--listen-metrics-urls"] {
        let error = verification_error(&[&format!("{flag}=http://a.example:1")]);
        assert_eq!(error, "expected IP in URL for binding (http://a.example:1)");
    }
    for (flag, error) in [
        (
            "--listen-client-http-urls=http://localhost:2379",
            "cannot bind both --listen-client-urls and --listen-client-http-urls on the same url http://localhost:2379",
        ),
        (
            "--listen-client-http-urls=https://localhost:1",
            "TLS key/cert (--cert-file, --key-file) must be provided for client url https://localhost:1 with HTTPS scheme",
        ),
        (
            "--listen-metrics-urls=https://localhost:1",
            "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url",
        ),
        (
            "--listen-metrics-urls=unixs://metrics",
            "client TLS key/cert (--cert-file, --key-file) must be provided for metrics secure url",
        ),
    ] {
        assert_eq!(reason(&[flag]), (Level::Fatal, START_FAILED.to_owned(), error.to_owned()));
    }
}

#[test]
fn metrics_may_be_the_only_use_of_tls() {
    let files = ["--cert-file=c", "--key-file=k"];
    let secure = config(&[&files[..], &["--listen-metrics-urls=https://localhost:1"]].concat());
    assert!(secure.tls.clients.is_some_and(|clients| clients.server.is_some()));
    assert!(config(&[&files[..], &["--listen-metrics-urls=http://localhost:1"]].concat()).tls.clients.is_none());
}

#[test]
fn the_name_determines_data_directory_and_initial_cluster() {
    let config = config(&["--name=m1", "--initial-advertise-peer-urls=http://b:2,http://a:1"]);
    assert_eq!(config.data_dir, PathBuf::from("m1.metastore"));
    assert_eq!(config.initial_cluster, "m1=http://a:1,m1=http://b:2");
    assert_eq!(config.parse_initial_cluster().unwrap().own_urls().len(), 2);
}

#[test]
fn invalid_times_are_refused() {
    for (arguments, error) in [
        (&["--heartbeat-interval=0"][..], "--heartbeat-interval must be >0 (set to 0ms)"),
        (&["--election-timeout=0"], "--election-timeout must be >0 (set to 0ms)"),
        (
            &["--election-timeout=400"],
            "--election-timeout[400ms] should be at least as 5 times as --heartbeat-interval[100ms]",
        ),
        (&["--election-timeout=60000"], "--election-timeout[60000ms] is too long, and should be set less than 50000ms"),
        (&["--compact-hash-check-time=0s"], "--compact-hash-check-time must be >0 (set to 0s)"),
        (&["--client-read-timeout=999ms"], "--client-read-timeout must be at least 1s (set to 999ms)"),
        (&["--client-begin-timeout=0"], "--client-begin-timeout must be at least 1s (set to 0)"),
    ] {
        assert_eq!(verification_error(arguments), error);
    }
    assert_eq!(config(&["--election-timeout=50000", "--heartbeat-interval=300"]).election_ticks(), 166);
}

#[test]
fn urls_are_validated() {
    for (arguments, error) in [
        (
            &["--listen-client-urls=http://127.0.0.1:1"][..],
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ),
        (&["--listen-peer-urls=http://etcd-0:2380"], "expected IP in URL for binding (http://etcd-0:2380)"),
        (
            &["--advertise-client-urls=http://:2379"],
            "--advertise-client-urls \"http://:2379\" must be in the format \"host:port\", \"unix:/path/to/socket\" or \
             \"unixs:/path/to/socket\" (unexpected empty host (http://:2379))",
        ),
        (
            &["--initial-advertise-peer-urls=http://:2380"],
            "--initial-advertise-peer-urls \"http://:2380\" must be \"host:port\" (unexpected empty host (http://:2380))",
        ),
    ] {
        assert_eq!(verification_error(arguments), error);
    }
    assert!(
        verification_error(&["--listen-client-urls=", "--advertise-client-urls="]).starts_with("no valid URLs given")
    );
    assert!(config(&["--advertise-client-urls="]).advertise_client_urls.is_empty());
}

#[test]
fn unsupported_protection_is_refused() {
    for argument in ["--discovery-srv=example.com", "--discovery-endpoints=a:1", "--config-file=etcd.yml"] {
        let (level, message, error) = reason(&[argument]);
        assert_eq!((level, message.as_str()), (Level::Fatal, NOT_VERIFIED), "{argument}");
        let name = argument.split('=').next().unwrap();
        assert!(error.starts_with(&format!("{name}: ")) && error.contains("support"), "{error}");
    }
}

#[test]
fn a_refused_flag_is_accepted_with_its_default() {
    for argument in ["--discovery-srv=", "--auth-token=simple"] {
        assert!(run(&[argument], &[]).is_ok(), "{argument}");
    }
    assert!(run(&[], &[("ETCD_DISCOVERY_SRV", ""), ("ETCD_AUTO_TLS", "false")]).is_ok());
    assert!(run(&[], &[("ETCD_DISCOVERY_SRV", "example.com")]).is_err());
}

const SECURE: [&str; 2] =
    ["--listen-client-urls=https://127.0.0.1:2379", "--advertise-client-urls=https://127.0.0.1:2379"];
const PAIR: [&str; 2] = ["--cert-file=c", "--key-file=k"];
const PEER_PAIR: [&str; 2] = ["--peer-cert-file=pc", "--peer-key-file=pk"];

#[test]
fn a_secure_url_needs_certificate_and_key() {
    let (level, message, error) = reason(&SECURE);
    assert_eq!((level, message.as_str()), (Level::Fatal, START_FAILED));
    let text = "TLS key/cert (--cert-file, --key-file) must be provided for client url";
    assert_eq!(error, format!("{text} https://127.0.0.1:2379 with HTTPS scheme"));
    for (arguments, error) in [
        (&["--cert-file=c"][..], "KeyFile and CertFile must both be present[key: , cert: c]"),
        (&["--peer-key-file=k"], "KeyFile and CertFile must both be present[key: k, cert: ]"),
        (
            &["--peer-client-cert-file=c"],
            "ClientKeyFile and ClientCertFile must both be present or both absent: key: , cert: c]",
        ),
        (
            &["--listen-peer-urls=https://127.0.0.1:2380"],
            "cannot listen on TLS for https://127.0.0.1:2380: KeyFile and CertFile are not presented",
        ),
        (
            &["--peer-cert-allowed-cn=a,b", "--peer-cert-allowed-hostname=c"],
            "AllowedCNs and AllowedHostnames are mutually exclusive (cns=[\"a\" \"b\"], hostnames=[\"c\"])",
        ),
        (&["--cipher-suites=FOO"], "unexpected TLS cipher suite \"FOO\""),
        (&["--max-waiting-handshakes=0"], "--max-waiting-handshakes must be at least 1 (set to 0)"),
        (
            &["--peer-auto-tls", "--self-signed-cert-validity=0"],
            "selfSignedCertValidity is invalid,it should be greater than 0",
        ),
    ] {
        assert_eq!(reason(arguments), (Level::Fatal, START_FAILED.to_owned(), error.to_owned()));
    }
    let none_offered = reason(&["--cipher-suites=TLS_RSA_WITH_RC4_128_SHA"]).2;
    assert!(none_offered.contains("it offers TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"), "{none_offered}");
}

#[test]
fn tls_versions_are_checked() {
    for (arguments, error) in [
        (&["--tls-min-version=TLS1.1"][..], "unexpected TLS version \"TLS1.1\" (must be one of: TLS1.2, TLS1.3)"),
        (
            &["--tls-min-version=TLS1.3", "--tls-max-version=TLS1.2"],
            "min version (TLS1.3) is greater than max version (TLS1.2)",
        ),
        (
            &["--tls-min-version=TLS1.3", "--cipher-suites=a"],
            "cipher suites cannot be configured when only TLS1.3 is enabled",
        ),
    ] {
        assert_eq!(verification_error(arguments), error);
    }
    let protocols = |more: &[&str]| config(more).tls.peers.protocols;
    assert_eq!((protocols(&[]).tls12, protocols(&[]).tls13), (true, true));
    assert!(!protocols(&["--tls-min-version=TLS1.3"]).tls12);
    assert!(!protocols(&["--tls-max-version=TLS1.2"]).tls13);
    let suites = protocols(&["--cipher-suites=TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305,TLS_AES_128_GCM_SHA256"]);
    assert_eq!(suites.cipher_suites, ["TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"]);
}

#[test]
fn certificates_are_demanded_as_configured() {
    let tls = |more: &[&str]| config(&[&SECURE[..], &PAIR, more].concat()).tls;
    let clients = |more: &[&str]| tls(more).clients.unwrap();
    assert!(!clients(&["--client-cert-auth=false"]).requires_client_certificate);
    assert!(clients(&["--client-cert-auth"]).requires_client_certificate);
    assert!(clients(&["--trusted-ca-file=ca"]).requires_client_certificate, "a trusted CA demands certificates");
    assert!(!tls(&["--trusted-ca-file=ca"]).certificates_name_users, "but they name no users");
    assert!(tls(&["--client-cert-auth"]).certificates_name_users);
    assert_eq!(config(&PAIR).tls.clients, None, "no URL asks for TLS");
    assert_eq!(warnings(&[&["--name=a", "--data-dir=d"], &PAIR[..]].concat()).len(), 1);
}

#[test]
fn members_show_the_certificate_that_is_for_connections_to_others() {
    let peers = |more: &[&str]| config(&[&PEER_PAIR[..], more].concat()).tls.peers;
    let plain = peers(&[]);
    assert_eq!((plain.server, plain.client.unwrap().cert.to_str()), (None, Some("pc")), "it may connect with TLS");
    let secure = "--listen-peer-urls=https://127.0.0.1:2380";
    let both = peers(&[secure, "--peer-client-cert-file=cc", "--peer-client-key-file=ck"]);
    assert_eq!(both.client.unwrap().cert.to_str(), Some("cc"));
    assert!(both.server.is_some() && both.checks_address && !both.requires_client_certificate);
    let lenient = peers(&[secure, "--peer-skip-client-san-verification", "--peer-trusted-ca-file=ca"]);
    assert!(!lenient.checks_address && lenient.requires_client_certificate);
}

#[test]
fn certificates_are_generated_unless_some_are_given() {
    let automatic = ["--auto-tls", "--peer-auto-tls", "--self-signed-cert-validity=3", "--data-dir=d"];
    let secure = [&SECURE[..], &["--listen-peer-urls=https://127.0.0.2:2380"], &automatic].concat();
    let tls = config(&secure).tls;
    let generated: Vec<_> = tls
        .generated
        .iter()
        .map(|it| (it.directory.to_str().unwrap(), it.hosts[0].as_str(), it.validity_years))
        .collect();
    assert_eq!(generated, [("d/fixtures/peer", "127.0.0.2", 3), ("d/fixtures/client", "127.0.0.1", 3)]);
    assert!(tls.peers.trusts_any_server && tls.peers.client.is_none());
    let given = [&secure[..], &PAIR, &PEER_PAIR].concat();
    assert_eq!(config(&given).tls.generated, []);
    assert_eq!(
        warnings(&[&given[..], &["--name=a"]].concat()),
        ["ignoring peer auto TLS since certs given", "ignoring client auto TLS since certs given"]
    );
}

#[test]
fn flags_without_effect_are_reported() {
    let quiet = warnings(&["--name=a", "--data-dir=d", "--max-wals=5", "--enable-pprof=false", "--name=b"]);
    assert_eq!(quiet, [] as [&str; 0]);
    let logged = warnings(&[
        "--name=a",
        "--data-dir=d",
        "--max-wals=7",
        "--enable-pprof",
        "--max-snapshots=5",
        "--experimental-initial-corrupt-check=true",
        "--feature-gates=PriorityRequest=true",
    ]);
    let expected = [
        "--experimental-initial-corrupt-check is deprecated",
        "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8.",
        "flag is accepted, but has no effect yet flag=\"max-wals\"",
        "flag is accepted, but has no effect yet flag=\"enable-pprof\"",
        "feature gate is accepted, but has no effect yet feature-gate=\"PriorityRequest\"",
    ];
    assert_eq!(logged.len(), expected.len(), "{logged:?}");
    for (logged, expected) in logged.iter().zip(expected) {
        assert!(logged.starts_with(expected), "{logged}");
    }
}

#[test]
fn auto_compaction_takes_hours_durations_or_revisions() {
    let read = |mode: &str, retention: &str| {
        let mode = format!("--auto-compaction-mode={mode}");
        config(&[mode.as_str(), "--auto-compaction-retention", retention]).auto_compaction
    };
    assert_eq!(read("periodic", "0"), AutoCompaction::Off);
    assert_eq!(read("periodic", ""), AutoCompaction::Off);
    assert_eq!(read("periodic", "2"), AutoCompaction::Periodic(Duration::from_hours(2)));
    assert_eq!(read("periodic", "90m"), AutoCompaction::Periodic(Duration::from_mins(90)));
    assert_eq!(read("revision", "1000"), AutoCompaction::Revisions(1000));
    assert_eq!(read("revision", "1us"), AutoCompaction::Revisions(1000));
    assert_eq!(verification_error(&["--auto-compaction-mode="]), "undefined auto-compaction-mode");
    assert_eq!(verification_error(&["--auto-compaction-mode=foo"]), "unknown auto-compaction-mode \"foo\"");
    for (text, error) in [
        ("abc", "error parsing CompactionRetention: time: invalid duration \"abc\""),
        ("-1", "error parsing CompactionRetention: time: missing unit in duration \"-1\""),
        ("-1h", "error parsing CompactionRetention: the duration is negative: \"-1h\""),
        ("9999999999", "error parsing CompactionRetention: time: invalid duration \"9999999999\""),
    ] {
        let (level, message, found) = reason(&["--auto-compaction-retention", text]);
        assert_eq!((level, message.as_str(), found.as_str()), (Level::Fatal, START_FAILED, error));
    }
}

#[test]
fn zero_and_too_small_values_are_replaced() {
    assert_eq!(config(&["--snapshot-count=0"]).snapshot_count, 10_000);
    assert_eq!(config(&["--quota-backend-bytes=-1"]).quota_bytes, None);
    assert_eq!(config(&["--quota-backend-bytes=17"]).quota_bytes, Some(17));
    assert_eq!(config(&["--compaction-batch-limit=-5"]).compaction_batch_limit, 1000);
    let arguments = ["--name=a", "--data-dir=d", "--watch-progress-notify-interval=1ms"];
    assert_eq!(config(&arguments).watch_progress_notify_interval, Duration::from_millis(100));
    assert_eq!(
        warnings(&arguments),
        ["adjusting watch progress notify interval to minimum period min-watch-progress-notify-interval=\"100ms\""]
    );
    let large = warnings(&["--name=a", "--data-dir=d", "--max-request-bytes=20971520"]);
    assert!(large[0].starts_with("exceeded recommended request limit"), "{large:?}");
}

#[test]
fn log_flags_set_level_format_and_outputs() {
    let logs = config(&["--log-level=WARN", "--log-format=console", "--log-outputs=stdout,/tmp/b,stderr,/tmp/b"]).logs;
    assert_eq!((logs.level, logs.format), (Level::Warn, logging::Format::Console));
    let file = logging::Output::File("/tmp/b".into());
    assert_eq!(logs.outputs, [file, logging::Output::Stderr, logging::Output::Stdout]);
    for (argument, error) in [
        ("--log-format=foo", "unknown log format: foo, supported values json, console"),
        ("--logger=foo", "unknown logger option \"foo\""),
        ("--log-outputs=default,stdout", "multi logoutput for \"default\" is not supported yet"),
    ] {
        assert_eq!(verification_error(&[argument]), error);
    }
    assert!(matches!(run(&["--log-level=foo"], &[]), Err(Exit::Plain { code: 2, .. })));
}

#[test]
fn an_inconsistent_initial_cluster_is_refused() {
    for (arguments, error) in [
        (
            &["--name=x", "--initial-cluster=y=http://localhost:2380"][..],
            "couldn't find local name \"x\" in the initial cluster configuration",
        ),
        (&["--initial-cluster="], "couldn't find local name \"default\" in the initial cluster configuration"),
        (
            &["--initial-cluster=default"],
            "error setting up initial cluster: URL scheme must be http, https, unix, or unixs: ",
        ),
        (
            &["--name=a=b"],
            "error setting up initial cluster: parse \"b=http://localhost:2380\": first path segment in URL cannot contain \
             colon",
        ),
        (
            &["--initial-cluster=default=http://localhost:2381"],
            "--initial-cluster has default=http://localhost:2381 but missing from \
             --initial-advertise-peer-urls=http://localhost:2380 (resolved urls: \"http://localhost:2380\" != \
             \"http://localhost:2381\")",
        ),
        (
            &["--initial-cluster=default=http://localhost:2380,default=http://localhost:2381"],
            "--initial-cluster has default=http://localhost:2381 but missing from \
             --initial-advertise-peer-urls=http://localhost:2380 (len([\"http://localhost:2380\"]) != \
             len([\"http://localhost:2380\" \"http://localhost:2381\"]))",
        ),
        (
            &["--initial-advertise-peer-urls=http://localhost:2380,http://localhost:2381"],
            "--initial-advertise-peer-urls has http://localhost:2381 but missing from \
             --initial-cluster=default=http://localhost:2380,default=http://localhost:2381",
        ),
        (
            &["--initial-cluster=default=http://localhost:2380,default=http://localhost:2380"],
            "failed to resolve http://localhost:2380 to match --initial-cluster=default=http://localhost:2380 \
             (len([\"http://localhost:2380\"]) != len([\"http://localhost:2380\" \"http://localhost:2380\"]))",
        ),
        (
            &["--initial-cluster=default=http://localhost:2380,b=http://localhost:2380"],
            "initial cluster b=http://localhost:2380,default=http://localhost:2380 has duplicate url",
        ),
        (
            &["--initial-cluster-state=existing", "--initial-cluster=b=http://localhost:2380"],
            "couldn't find local name \"default\" in the initial cluster configuration",
        ),
        (
            &["--initial-cluster-state=existing", "--initial-cluster=default=http://a:1,b=http://a:1"],
            "initial cluster b=http://a:1,default=http://a:1 has duplicate url",
        ),
    ] {
        assert_eq!(config(arguments).parse_initial_cluster().unwrap_err(), error);
    }
}

#[test]
fn an_initial_cluster_may_have_several_members() {
    let cluster = "--initial-cluster=c=http://c:1,a=http://10.0.0.1:2, a=http://10.0.0.1:1,,b=http://b:1";
    let mine = "--initial-advertise-peer-urls=http://10.0.0.1:1,http://10.0.0.1:2";
    let first = config(&["--name=a", cluster, mine, "--initial-cluster-token=t"]).parse_initial_cluster().unwrap();
    assert_eq!(first.members.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(url::joined(first.own_urls()), "http://10.0.0.1:1,http://10.0.0.1:2");
    assert_eq!(url::joined(&first.urls_of_others()), "http://b:1,http://c:1");
    assert_eq!((first.state, first.token.as_str()), (ClusterState::New, "t"));
    // What a joining member advertises is not compared with the initial cluster.
    let joins = config(&["--name=b", cluster, "--initial-cluster-state=existing"]).parse_initial_cluster().unwrap();
    assert_eq!(joins.state, ClusterState::Existing);
    assert_eq!(url::joined(&joins.urls_of_others()), "http://10.0.0.1:1,http://10.0.0.1:2,http://c:1");
}

const CLUSTER: &str = "--cluster=http://127.0.0.1:9021,http://127.0.0.1:9022,http://db3.example:9023";

#[test]
fn the_short_form_expands_to_the_long_one() {
    let short = config(&["--id=2", CLUSTER, "--grpc-addr=:2379"]);
    assert_eq!((short.name.as_str(), short.data_dir.to_str()), ("node2", Some("node2.metastore")));
    assert_eq!(url::joined(&short.listen_client_urls), "http://0.0.0.0:2379");
    assert_eq!(url::joined(&short.advertise_client_urls), "http://127.0.0.1:2379");
    assert_eq!(url::joined(&short.listen_peer_urls), "http://127.0.0.1:9022");
    let long = config(&[
        "--name=node2",
        "--initial-cluster=node1=http://127.0.0.1:9021,node2=http://127.0.0.1:9022,node3=http://db3.example:9023",
        "--initial-advertise-peer-urls=http://127.0.0.1:9022",
        "--listen-peer-urls=http://127.0.0.1:9022",
        "--listen-client-urls=http://0.0.0.0:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
    ]);
    assert_eq!(short, long);
    assert_eq!(short.parse_initial_cluster().unwrap().state, ClusterState::New);
    let joining = config(&["--id=3", CLUSTER, "--join", "--grpc-addr=db3.example:1", "--data-dir=d", "--name=node3"]);
    assert_eq!((joining.initial_cluster_state, joining.data_dir.to_str()), (ClusterState::Existing, Some("d")));
    assert_eq!(url::joined(&joining.listen_peer_urls), "http://0.0.0.0:9023", "a name cannot be bound");
    assert_eq!(url::joined(&joining.listen_client_urls), "http://0.0.0.0:1");
    assert_eq!(url::joined(&joining.advertise_client_urls), "http://db3.example:1");
    let quick = config(&["--id=1", CLUSTER, "--data-dir=d", "--grpc-addr=:2379", "--port=9121"]).quick_api.unwrap();
    assert_eq!((url::joined(&quick.listen_urls).as_str(), quick.numbers_are_members), ("http://0.0.0.0:9121", false));
    assert_eq!(config(&["--data-dir=d"]).quick_api, None);
    let quick = config(&["--data-dir=d", "--port=1", "--port-admin"]).quick_api.unwrap();
    assert_eq!((url::joined(&quick.listen_urls).as_str(), quick.numbers_are_members), ("http://localhost:1", true));
    let kubernetes = run(&["--data-dir=d", "--name=a"], &[("ETCD_PORT", "tcp://10.0.0.1:2379")]).unwrap();
    assert_eq!(kubernetes.config.name, "a", "the short form has no variables");
}

#[test]
fn an_invalid_short_form_is_refused() {
    for (arguments, error) in [
        (&["--id=1"][..], "--id is part of the short form, which needs --id and --cluster: --cluster is missing"),
        (&["--grpc-addr=:1"], "--grpc-addr is part of the short form, which needs --id and --cluster: --id is missing"),
        (&["--id=0", CLUSTER], "--id=0 is not a member of --cluster: 1 to 3 are allowed"),
        (&["--id=4", CLUSTER], "--id=4 is not a member of --cluster: 1 to 3 are allowed"),
        (&["--id=1", "--cluster=http://a"], "--cluster: URL address does not have the form \"host:port\": http://a"),
        (&["--id=1", CLUSTER, "--grpc-addr=2379"], "--grpc-addr=2379: missing port; expected `host:port` or `:port`"),
        (&["--id=1", CLUSTER, "--grpc-addr=:x"], "--grpc-addr=:x: invalid port; expected `host:port` or `:port`"),
        (&["--id=1", CLUSTER, "--name=one"], "--name=one contradicts --id=1, which means --name=node1"),
        (
            &["--id=1", CLUSTER, "--join", "--initial-cluster-state=new"],
            "--initial-cluster-state=new contradicts --join=true, which means --initial-cluster-state=existing",
        ),
        (
            &["--id=1", CLUSTER, "--grpc-addr=:2379", "--listen-client-urls=http://127.0.0.1:2379"],
            "--listen-client-urls=http://127.0.0.1:2379 contradicts --grpc-addr=:2379, which means \
             --listen-client-urls=http://0.0.0.0:2379",
        ),
    ] {
        assert_eq!(reason(arguments), (Level::Fatal, NOT_VERIFIED.to_owned(), error.to_owned()));
    }
}

#[test]
fn a_gate_may_require_another() {
    assert_eq!(
        verification_error(&["--feature-gates=LeaseCheckpointPersist=true"]),
        "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint"
    );
    let gates = config(&["--feature-gates=InitialCorruptCheck=true"]).feature_gates;
    assert!(gates.is_enabled(gates::Gate::InitialCorruptCheck));
}

#[test]
fn positional_arguments_are_refused_before_anything_else() {
    assert_eq!(verification_error(&["--version", "positional"]), "\"positional\" is not a valid flag");
    let (level, _, error) = reason(&["grpc-proxy", "start"]);
    assert_eq!((level, error.as_str()), (Level::Fatal, "the program `grpc-proxy` is not supported yet"));
}

#[test]
fn version_help_and_usage_errors_are_printed_as_plain_text() {
    let Err(Exit::Plain { code: 0, stdout, stderr }) = run(&["--version"], &[("ETCD_NAME", "a")]) else {
        panic!("--version exits");
    };
    assert!(stdout.starts_with("etcd Version: 3.7.3\n") && stderr.is_empty());
    let Err(Exit::Plain { code: 0, stdout, stderr }) = run(&["-h"], &[]) else {
        panic!("help exits");
    };
    assert!(stdout.contains("--listen-client-urls") && stderr.starts_with("Usage:"));
    let Err(Exit::Plain { code: 2, stdout, stderr }) = run(&["-x"], &[]) else {
        panic!("an unknown flag exits");
    };
    assert!(stdout.is_empty() && stderr.starts_with("flag provided but not defined: -x\nUsage:\n"));
}

#[test]
fn a_conflict_is_logged_after_earlier_notices() {
    let Err(Exit::Logged { notices, .. }) = run(&["--name=a"], &[("ETCD_FOO", "1"), ("ETCD_NAME", "a")]) else {
        panic!("a conflict exits");
    };
    assert_eq!(notices.iter().map(|notice| notice.level).collect::<Vec<_>>(), [Level::Warn, Level::Fatal]);
}

#[test]
fn a_member_listening_on_all_addresses_advertises_the_default_route() {
    let arguments = ["--name=x", "--listen-peer-urls=http://0.0.0.0:7000"];
    let parsed = run(&arguments, &[]).unwrap();
    let notice = parsed.notices.iter().find(|notice| notice.message.contains("default host")).unwrap();
    if let Ok(host) = url_resolution::default_host() {
        let url = Url::from_ip(host, 7000);
        assert_eq!(notice.message, "detected default host for advertise");
        assert_eq!(parsed.config.initial_cluster, format!("x={url}"));
        assert_eq!(parsed.config.initial_advertise_peer_urls, [url]);
    } else {
        assert_eq!(notice.message, "failed to detect default host");
        assert_eq!(url::joined(&parsed.config.initial_advertise_peer_urls), "http://localhost:2380");
    }
    // An explicit advertised URL is kept, and with a specific listen address there is nothing to detect.
    for arguments in [
        ["--listen-peer-urls=http://0.0.0.0:7000", "--initial-advertise-peer-urls=http://10.0.0.1:7000"],
        ["--listen-peer-urls=http://127.0.0.1:7000", "--name=x"],
    ] {
        let notices = run(&arguments, &[]).unwrap().notices;
        assert!(notices.iter().all(|notice| !notice.message.contains("default host")));
    }
}
