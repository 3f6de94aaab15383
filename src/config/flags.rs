//! The table of all flags: name, kind of value, default, help text, and whether the flag is implemented.
//!
//! Parsing, `--help`, the warnings at startup and `docs/flags.md` all use this one table. Flags that are not implemented are
//! listed as well, so that a start command written for etcd starts metastore too. Their [`Status`](super::flag::Status) says what
//! happens instead:
//! * A flag that only tunes something is accepted, with a warning that says what is missing.
//! * A flag that promises protection, or decides which cluster the member belongs to, stops the start: to start without it
//!   would be dangerous.
//!
//! INVARIANTS
//! * Every default is a valid value of its kind.
//! * No name appears twice; metastore's own flags do not reuse names of etcd's.

use super::flag::{Flag, Kind, flag};

/// All flags, by section, in the order of `--help`.
pub const SECTIONS: &[(&str, &[Flag])] = &[
    ("Member", MEMBER),
    ("Clustering", CLUSTERING),
    ("Security", SECURITY),
    ("Logging and monitoring", LOGGING),
    ("Tuning", TUNING),
    ("metastore only", LIMITS),
    ("metastore only, client connections", CLIENT_CONNECTIONS),
    ("Short form", QUICKSTART),
    ("Process", PROCESS),
];

const MEMBER: &[Flag] = &[
    flag("name", Kind::Text, "default", "Human-readable name of this member; its key in --initial-cluster."),
    flag("data-dir", Kind::Text, "", "Data directory. Unset: `<name>.metastore` in the working directory."),
    flag("wal-dir", Kind::Text, "", "Separate directory for the log.").no_effect("the log stays in the data directory"),
    flag("snapshot-count", Kind::Unsigned, "10000", "Number of applied entries after which the log may be truncated."),
    flag(
        "snapshot-catchup-entries",
        Kind::Unsigned,
        "5000",
        "Entries that a truncation of the log keeps for slow members.",
    ),
    flag("max-snapshots", Kind::Unsigned, "5", "Snapshot files to keep.")
        .no_effect("there are no snapshot files to keep"),
    flag("max-wals", Kind::Unsigned, "5", "Log files to keep.")
        .no_effect("log segments are kept as long as they are needed"),
    flag("heartbeat-interval", Kind::Unsigned, "100", "Milliseconds between a leader's heartbeats."),
    flag(
        "election-timeout",
        Kind::Unsigned,
        "1000",
        "Milliseconds without a leader until an election; at least 5 heartbeats.",
    ),
    flag("initial-election-tick-advance", Kind::Bool, "true", "Hold the first election after a start early."),
    flag("listen-peer-urls", Kind::Urls, "http://localhost:2380", "URLs to listen on for other members."),
    flag("listen-client-urls", Kind::Urls, "http://localhost:2379", "URLs to listen on for clients."),
    flag(
        "listen-client-http-urls",
        Kind::Urls,
        "",
        "URLs to listen on for HTTP alone; with them, --listen-client-urls serves gRPC alone.",
    ),
    flag("listen-metrics-urls", Kind::Urls, "", "Additional URLs to listen on for metrics and health."),
    flag(
        "quota-backend-bytes",
        Kind::Signed,
        "0",
        "Size of the data at which writes are refused; 0 is 2 GiB, negative is no limit.",
    ),
    flag("backend-bbolt-freelist-type", Kind::Text, "", "Freelist type of bbolt.")
        .no_effect("the storage is not bbolt"),
    flag("backend-batch-interval", Kind::Duration, "0s", "Time between commits of the database.")
        .no_effect("every applied batch is written at once"),
    flag("backend-batch-limit", Kind::Signed, "0", "Operations between commits of the database.")
        .no_effect("every applied batch is written at once"),
    flag(
        "max-txn-ops",
        Kind::Unsigned,
        "128",
        "Maximum number of comparisons, and of operations per branch, in one transaction.",
    ),
    flag("max-request-bytes", Kind::Unsigned, "1572864", "Maximum size of a request."),
    flag(
        "max-concurrent-streams",
        Kind::Unsigned32,
        "4294967295",
        "Maximum number of concurrent HTTP/2 streams per connection; 0 is no limit.",
    ),
    flag("grpc-keepalive-min-time", Kind::Duration, "5s", "Minimum interval between a client's pings.")
        .no_effect("pings are answered up to 10,000 per second"),
    flag(
        "grpc-keepalive-interval",
        Kind::Duration,
        "2h",
        "How long a client may be silent before the server pings it; at least 1s.",
    ),
    flag(
        "grpc-keepalive-timeout",
        Kind::Duration,
        "20s",
        "How long a ping may stay unanswered before the connection is closed.",
    ),
    flag(
        "socket-reuse-port",
        Kind::Bool,
        "false",
        "Set SO_REUSEPORT on listeners, so that several processes can share a port.",
    ),
    flag("socket-reuse-address", Kind::Bool, "false", "Set SO_REUSEADDR on listeners; it is always set."),
    flag("raft-read-timeout", Kind::Duration, "5s", "Read timeout between members.").no_effect(LINKS),
    flag("raft-write-timeout", Kind::Duration, "5s", "Write timeout between members.").no_effect(LINKS),
    flag("memory-mlock", Kind::Bool, "false", "Lock the memory, so that it is never swapped out.")
        .no_effect("memory is not locked"),
    flag("feature-gates", Kind::Gates, "", "Feature gates to enable or disable: `A=true,B=false`."),
    flag("max-learners", Kind::Signed, "1", "Maximum number of learners in the cluster."),
];

const CLUSTERING: &[Flag] = &[
    flag(
        "initial-advertise-peer-urls",
        Kind::Urls,
        "http://localhost:2380",
        "Peer URLs to advertise to the other members.",
    ),
    flag("initial-cluster", Kind::Text, "", "Initial members: `name=url,…`. Unset: this member alone."),
    flag(
        "initial-cluster-state",
        Kind::Choice(&["new", "existing"]),
        "new",
        "`new` to bootstrap a cluster, `existing` to join one.",
    ),
    flag("initial-cluster-token", Kind::Text, "etcd-cluster", "Distinguishes clusters that have the same URLs."),
    flag(
        "advertise-client-urls",
        Kind::Urls,
        "http://localhost:2379",
        "Client URLs to advertise to clients and members.",
    ),
    flag("discovery-endpoints", Kind::Strings, "", "The cluster used for discovery of the other members.")
        .refused(DISCOVERY),
    flag("discovery-token", Kind::Text, "", "Discovery token of the cluster.").refused(DISCOVERY),
    flag("discovery-dial-timeout", Kind::Duration, "2s", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-request-timeout", Kind::Duration, "5s", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-keepalive-time", Kind::Duration, "2s", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-keepalive-timeout", Kind::Duration, "6s", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-insecure-transport", Kind::Bool, "true", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-insecure-skip-tls-verify", Kind::Bool, "false", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-cert", Kind::Text, "", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-key", Kind::Text, "", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-cacert", Kind::Text, "", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-user", Kind::Text, "", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-password", Kind::Text, "", "For discovery.").no_effect(NO_DISCOVERY),
    flag("discovery-srv", Kind::Text, "", "DNS domain used for discovery of the other members.").refused(DISCOVERY),
    flag("discovery-srv-name", Kind::Text, "", "Suffix of the DNS service name.").refused(DISCOVERY),
    flag("discovery-fallback", Kind::Choice(&["exit", "proxy"]), "exit", "What to do when discovery fails.")
        .no_effect(NO_DISCOVERY),
    flag("strict-reconfig-check", Kind::Bool, "true", "Refuse membership changes that would lose the quorum."),
    flag(
        "pre-vote",
        Kind::Bool,
        "true",
        "Run a pre-vote before an election, so that a returning member does not disturb the cluster.",
    ),
    flag(
        "auto-compaction-mode",
        Kind::Text,
        "periodic",
        "Unit of --auto-compaction-retention: `periodic` or `revision`.",
    ),
    flag(
        "auto-compaction-retention",
        Kind::Text,
        "0",
        "History to keep: hours, a duration, or a number of revisions; 0 is all.",
    ),
    flag("force-new-cluster", Kind::Bool, "false", "Become the sole member of the cluster, dropping all others."),
    flag("v2-deprecation", Kind::Choice(V2_STAGES), "write-only", "Stage of the deprecation of etcd's v2 store.")
        .no_effect("there is no v2 store"),
];

const SECURITY: &[Flag] = &[
    flag("cert-file", Kind::Text, "", "Server certificate for clients."),
    flag("key-file", Kind::Text, "", "Key of --cert-file."),
    flag("client-cert-file", Kind::Text, "", "Client certificate for connections of the server to itself.")
        .no_effect("this server does not connect to itself"),
    flag("client-key-file", Kind::Text, "", "Key of --client-cert-file.")
        .no_effect("this server does not connect to itself"),
    flag(
        "client-cert-auth",
        Kind::Bool,
        "false",
        "Require client certificates. With auth, their common names are the names of users.",
    ),
    flag(
        "trusted-ca-file",
        Kind::Text,
        "",
        "CA certificates to verify client certificates with; if set, they are required.",
    ),
    flag("client-crl-file", Kind::Text, "", "Revocation list for client certificates, DER or PEM."),
    flag("client-cert-allowed-hostname", Kind::Strings, "", "Host names accepted in client certificates."),
    flag("auto-tls", Kind::Bool, "false", "TLS for clients with a generated certificate."),
    flag("peer-cert-file", Kind::Text, "", "Certificate for connections from other members."),
    flag("peer-key-file", Kind::Text, "", "Key of --peer-cert-file."),
    flag(
        "peer-client-cert-file",
        Kind::Text,
        "",
        "Certificate for connections to other members. Unset: that of --peer-cert-file.",
    ),
    flag("peer-client-key-file", Kind::Text, "", "Key of --peer-client-cert-file."),
    flag("peer-client-cert-auth", Kind::Bool, "false", "Require certificates from other members."),
    flag(
        "peer-trusted-ca-file",
        Kind::Text,
        "",
        "CA certificates to verify certificates of members with; if set, members must show one.",
    ),
    flag("peer-auto-tls", Kind::Bool, "false", "TLS between members with generated certificates."),
    flag("peer-crl-file", Kind::Text, "", "Revocation list for certificates of members, DER or PEM."),
    flag("peer-cert-allowed-cn", Kind::Strings, "", "Common names accepted in certificates of members."),
    flag("peer-cert-allowed-hostname", Kind::Strings, "", "Host names accepted in certificates of members."),
    flag(
        "peer-skip-client-san-verification",
        Kind::Bool,
        "false",
        "Do not compare a member's certificate with the address that it connects from.",
    ),
    flag("self-signed-cert-validity", Kind::Unsigned, "1", "Validity of generated certificates, in years."),
    flag("cipher-suites", Kind::Strings, "", "Cipher suites for TLS 1.2, by Go's names. Unset: all."),
    flag("tls-min-version", Kind::Text, "TLS1.2", "Minimum TLS version: `TLS1.2` or `TLS1.3`."),
    flag("tls-max-version", Kind::Text, "", "Maximum TLS version: `TLS1.2` or `TLS1.3`. Unset: the latest."),
    flag(
        "cors",
        Kind::Origins,
        "*",
        "Origins of web pages that may read HTTP responses (CORS): `*`, or URLs with ports.",
    ),
    flag(
        "host-whitelist",
        Kind::Strings,
        "*",
        "Host names that HTTP requests without TLS may be addressed to; others are refused with status 421.",
    ),
    flag(
        "auth-token",
        Kind::Text,
        "simple",
        "Kind of auth token: `simple`, or `jwt,sign-method=RS256,pub-key=FILE,priv-key=FILE,ttl=5m`.",
    ),
    flag("auth-token-ttl", Kind::Unsigned, "300", "Seconds after its last use for which a simple token is valid."),
    flag("bcrypt-cost", Kind::Unsigned, "10", "Cost of bcrypt password hashes, from 4 to 31."),
];

const LOGGING: &[Flag] = &[
    flag("logger", Kind::Text, "zap", "Format of log lines; only `zap` is supported."),
    flag(
        "log-outputs",
        Kind::Strings,
        "default",
        "Comma-separated list of `default` (stderr), `stdout`, `stderr` and files.",
    ),
    flag("log-level", Kind::Text, "info", "`debug`, `info`, `warn`, `error`, `panic` or `fatal`."),
    flag("log-format", Kind::Text, "json", "`json` or `console`."),
    flag("enable-log-rotation", Kind::Bool, "false", "Rotate the log file.").no_effect("log files are not rotated"),
    flag("log-rotation-config-json", Kind::Text, ROTATION, "How to rotate the log file.")
        .no_effect("log files are not rotated"),
    flag("enable-pprof", Kind::Bool, "false", "Serve profiles over HTTP.").no_effect("no profiles are served"),
    flag(
        "metrics",
        Kind::Text,
        "basic",
        "`basic`, or `extensive` for a histogram of each method's calls; any other value counts as `basic`, as in etcd.",
    ),
    flag("enable-distributed-tracing", Kind::Bool, "false", "Send traces.").no_effect(TRACES),
    flag("distributed-tracing-address", Kind::Text, "localhost:4317", "Address that traces are sent to.")
        .no_effect(TRACES),
    flag("distributed-tracing-service-name", Kind::Text, "etcd", "Service name in traces.").no_effect(TRACES),
    flag("distributed-tracing-instance-id", Kind::Text, "", "Instance ID in traces.").no_effect(TRACES),
    flag("distributed-tracing-sampling-rate", Kind::Signed, "0", "Sampled traces per million.").no_effect(TRACES),
    flag("warning-apply-duration", Kind::Duration, "100ms", "An apply that takes longer is logged."),
    flag("warning-unary-request-duration", Kind::Duration, "300ms", "A request that takes longer is logged."),
];

const TUNING: &[Flag] = &[
    flag("enable-grpc-gateway", Kind::Bool, "true", "Serve the JSON API below `/v3/`."),
    flag(
        "corrupt-check-time",
        Kind::Duration,
        "0s",
        "Time between comparisons of the data with other members; 0 is never.",
    ),
    flag(
        "compact-hash-check-time",
        Kind::Duration,
        "1m",
        "Time between comparisons of compaction hashes, if feature gate CompactHashCheck is enabled.",
    ),
    flag("compaction-batch-limit", Kind::Signed, "0", "Revisions that a compaction processes per batch; 0 is 1000."),
    flag(
        "compaction-sleep-interval",
        Kind::Duration,
        "0s",
        "How long a compaction sleeps between batches, in ten parts; 0 is 10ms.",
    ),
    flag(
        "watch-progress-notify-interval",
        Kind::Duration,
        "0s",
        "Time between progress notifications, at least 100ms; 0 is 10m.",
    ),
    flag("downgrade-check-time", Kind::Duration, "5s", "Time between checks for a downgrade.")
        .no_effect("there are no downgrades"),
    flag("bootstrap-defrag-threshold-megabytes", Kind::Unsigned, "0", "Defragment at startup if that frees this much.")
        .no_effect("the storage does not fragment"),
    flag("unsafe-no-fsync", Kind::Bool, "false", "Do not wait for fsync. A crash loses acknowledged writes."),
];

const LIMITS: &[Flag] = &[
    flag("value-cache-bytes", Kind::Unsigned, "16777216", "Memory for recently written and read values."),
    flag("block-cache-bytes", Kind::Unsigned, "16777216", "Memory for blocks of the database's files."),
    flag(
        "write-buffer-bytes",
        Kind::Unsigned,
        "16777216",
        "Memory for each of the database's two write buffers; at least 65536.",
    ),
    flag(
        "flush-log-bytes",
        Kind::Unsigned,
        "33554432",
        "Bytes of log since the last flush of the database at which a flush starts.",
    ),
    flag("flush-interval", Kind::Duration, "1m0s", "Maximum time from a write to a flush of the database."),
    flag(
        "max-apply-backlog",
        Kind::Unsigned,
        "5000",
        "Committed entries not yet applied at which requests are refused as too many.",
    ),
    flag(
        "laggard-log-bytes",
        Kind::Unsigned,
        "201326592",
        "Log kept in memory for members that lag behind; beyond that they are sent a snapshot.",
    ),
    flag(
        "peer-queue-bytes",
        Kind::Unsigned,
        "67108864",
        "Messages queued for one other member; messages beyond that are dropped, and raft sends them again.",
    ),
    flag(
        "peer-connections-per-address",
        Kind::Unsigned,
        "1024",
        "Maximum number of connections from one address to the peer port, at least 16; more are refused.",
    ),
    flag(
        "peer-connections-before-hello",
        Kind::Unsigned,
        "16",
        "Maximum number of these that have not sent their hello yet, at least 2; a new one closes the oldest.",
    ),
    flag(
        "peer-hello-timeout",
        Kind::Duration,
        "5s",
        "How long a connection to the peer port may take to send its hello.",
    ),
    flag(
        "peer-min-bytes-per-second",
        Kind::Unsigned,
        "65536",
        "A member that sends a message or a snapshot more slowly is disconnected after a grace period; at least 1.",
    ),
    flag(
        "snapshot-bytes-per-second",
        Kind::Unsigned,
        "134217728",
        "Rate at which a snapshot is sent to another member; at least 1048576.",
    ),
    flag("watch-ring-bytes", Kind::Unsigned, "8388608", "Memory for recent events; older ones are read from disk."),
    flag(
        "watch-pending-bytes",
        Kind::Unsigned,
        "1048576",
        "Events queued for one watch stream; beyond that its watches fall behind and catch up later.",
    ),
    flag(
        "all-watch-pending-bytes",
        Kind::Unsigned,
        "134217728",
        "The same for all watch streams together; beyond it, only those that hold more than a fair share fall behind.",
    ),
    flag(
        "max-watches-per-stream",
        Kind::Unsigned,
        "1000000",
        "Maximum number of watches per stream; more are refused.",
    ),
    flag(
        "max-watches",
        Kind::Unsigned,
        "10000000",
        "Maximum number of watches of all streams of this member, at least 1; more are refused.",
    ),
    flag(
        "max-leases",
        Kind::Unsigned,
        "10000000",
        "Number of leases, at least 1, at which this member grants no more; grants that are under way may exceed it.",
    ),
    flag("max-txn-depth", Kind::Unsigned, "500", "Maximum number of levels of a nested transaction, from 1 to 500."),
    flag(
        "max-answer-bytes",
        Kind::Unsigned,
        "1073741824",
        "Maximum size of the answer to a read that is not a stream; at least 524288 more than --max-request-bytes.",
    ),
    flag(
        "max-waiting-hashes",
        Kind::Unsigned,
        "16",
        "Calls of Hash, HashKV and Defragment that may wait for each other, at least 1; more are refused.",
    ),
    flag(
        "api-threads",
        Kind::Unsigned,
        "0",
        "Threads for client connections, at most 1024; 0 is one per processor, less one.",
    ),
    flag("read-threads", Kind::Unsigned, "0", "Threads for long reads, at most 1024; 0 is one per processor."),
    flag(
        "max-connections",
        Kind::Unsigned,
        "0",
        "Maximum number of client connections, others wait; 0 is what the limit of open files leaves.",
    ),
    flag(
        "max-waiting-handshakes",
        Kind::Unsigned,
        "1024",
        "TLS handshakes in progress, with clients and with members each, at least 1; a new one closes the oldest.",
    ),
    flag(
        "max-connections-per-address",
        Kind::Unsigned,
        "0",
        "Maximum number of client connections from one address (of IPv6, its first half), others are closed; 0 is no limit.",
    ),
    flag(
        "max-waiting-logins",
        Kind::Unsigned,
        "1024",
        "Logins that may wait until their password is checked, at least 1; more are refused.",
    ),
    flag(
        "audit-log",
        Kind::Text,
        "",
        "File for audit lines. Unset: they are written to the log, by the logger `audit`.",
    ),
    flag(
        "max-capability-level",
        Kind::Unsigned,
        "1",
        "Highest capability level that this member takes part in: a lower one keeps the way back to an older version open.",
    ),
];

const CLIENT_CONNECTIONS: &[Flag] = &[
    flag("grpc-server", Kind::Choice(&["own", "tonic"]), "own", "The HTTP/2 server for clients: `own` or `tonic`."),
    flag(
        "max-resets-per-second",
        Kind::Unsigned32,
        "1000",
        "Calls in progress that one connection may cancel per second.",
    ),
    flag(
        "max-header-list-bytes",
        Kind::Unsigned32,
        "65536",
        "Maximum size of the header fields of a request, and 32 bytes for each field; from 8192 to 1048576.",
    ),
    flag(
        "max-connection-bytes",
        Kind::Unsigned,
        "268435456",
        "Memory that one connection may occupy: incomplete requests, unread responses, headers of open streams.",
    ),
    flag(
        "max-held-bytes",
        Kind::Unsigned,
        "2147483648",
        "The same for all connections together; beyond it, only connections that hold more than a fair share are refused.",
    ),
    flag(
        "client-begin-timeout",
        Kind::Duration,
        "10s",
        "How long a client may take to send its first byte, to complete the TLS handshake, a preface or a header block.",
    ),
    flag(
        "client-read-timeout",
        Kind::Duration,
        "1m0s",
        "How long a client may take to read 64 KiB of what is written to it, or to send the next piece of a request's body.",
    ),
    flag(
        "client-idle-timeout",
        Kind::Duration,
        "0s",
        "How long an HTTP/2 connection may stay open without a call; 0s means no limit.",
    ),
];

/// Each of these stands for one or more of the flags above. They have no environment variables: Kubernetes sets `ETCD_PORT`
/// for every service named `etcd`.
pub const QUICKSTART: &[Flag] = &[
    flag("id", Kind::Unsigned, "0", "Position of this member in --cluster, counted from 1; its name is `node<id>`."),
    flag("cluster", Kind::Text, "", "Peer URLs of all members, in the order of their IDs."),
    flag("grpc-addr", Kind::Text, "", "Address for clients: `host:port` or `:port`."),
    flag("join", Kind::Bool, "false", "Join a running cluster instead of bootstrapping one."),
    flag(
        "port",
        Kind::Unsigned,
        "0",
        "Port of the quick HTTP API (PUT, GET, DELETE /<key>), on the hosts of --listen-client-urls; 0 means none.",
    ),
    flag(
        "port-admin",
        Kind::Bool,
        "false",
        "At --port, POST and DELETE of a number add and remove members, instead of keys of that name.",
    ),
];

const PROCESS: &[Flag] = &[
    flag("config-file", Kind::Text, "", "YAML file that replaces flags and variables.")
        .refused("a configuration file is not supported yet, use flags or ETCD_ variables"),
    flag("version", Kind::Bool, "false", "Print the version and exit."),
];

/// Flags that etcd itself ignores.
pub const IGNORED: &[&str] = &[
    "cluster-active-size",
    "cluster-remove-delay",
    "cluster-sync-interval",
    "config",
    "force",
    "max-result-buffer",
    "max-retry-attempts",
    "peer-heartbeat-interval",
    "peer-election-timeout",
    "retry-interval",
    "snapshot",
    "v",
    "vv",
    "test.coverprofile",
    "test.outputdir",
];

/// Flags that were once spelled with the prefix `experimental-`, and still are in older manifests.
pub const FORMERLY_EXPERIMENTAL: &[&str] = &[
    "bootstrap-defrag-threshold-megabytes",
    "compact-hash-check-time",
    "compaction-batch-limit",
    "compaction-sleep-interval",
    "corrupt-check-time",
    "distributed-tracing-address",
    "distributed-tracing-instance-id",
    "distributed-tracing-sampling-rate",
    "distributed-tracing-service-name",
    "downgrade-check-time",
    "enable-distributed-tracing",
    "max-learners",
    "memory-mlock",
    "peer-skip-client-san-verification",
    "snapshot-catchup-entries",
    "warning-apply-duration",
    "warning-unary-request-duration",
    "watch-progress-notify-interval",
];

const DISCOVERY: &str = "discovery is not supported yet, and starting without it would bootstrap another cluster";
const NO_DISCOVERY: &str = "there is no discovery";
const TRACES: &str = "no traces are sent";
const LINKS: &str = "connections between members have their own timeouts";
const V2_STAGES: &[&str] = &["write-only", "write-only-skip-check", "write-only-drop-data", "gone"];
const ROTATION: &str = r#"{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}"#;

/// All flags, section by section.
pub fn all() -> impl Iterator<Item = &'static Flag> {
    SECTIONS.iter().flat_map(|(_, flags)| flags.iter())
}

/// The flag with exactly this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Flag> {
    all().find(|flag| flag.name == name)
}

/// The flag that an old spelling stands for.
#[must_use]
pub fn find_experimental(name: &str) -> Option<&'static Flag> {
    let current = name.strip_prefix("experimental-")?;
    FORMERLY_EXPERIMENTAL.contains(&current).then(|| find(current))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_valid_value() {
        for flag in all() {
            assert_eq!(flag.kind.check(flag.default), Ok(()), "{}", flag.name);
        }
    }

    #[test]
    fn no_name_appears_twice() {
        let mut names: Vec<_> = all().map(|flag| flag.name).chain(IGNORED.iter().copied()).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_old_spelling_maps_to_a_current_flag() {
        for name in FORMERLY_EXPERIMENTAL {
            assert!(find_experimental(&format!("experimental-{name}")).is_some(), "{name}");
        }
        assert!(find_experimental("experimental-name").is_none());
        assert!(find_experimental("max-learners").is_none());
    }

    #[test]
    fn a_variable_is_the_flag_name_in_upper_case() {
        assert_eq!(find("listen-client-urls").unwrap().variable(), "ETCD_LISTEN_CLIENT_URLS");
    }

    #[test]
    fn values_are_compared_by_meaning() {
        assert!(find("auto-tls").unwrap().same_value("false", "0"));
        assert!(find("raft-read-timeout").unwrap().same_value("5s", "5000ms"));
        assert!(!find("cert-file").unwrap().same_value("", "a"));
    }
}
