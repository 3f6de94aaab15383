//! Every flag there is: its name, what may be typed, what it is when nothing is typed, and how far it works.
//!
//! The one table that parsing, `--help`, the warnings and the README are made from. A flag whose effect is missing is still
//! here, so that a start command written for etcd starts us too; its [`Status`] says what happens instead:
//! * what only tunes is accepted, with a warning that says what it does not do yet;
//! * what promises protection, or decides which cluster this is, stops the start: to go on without it would be a lie.
//!
//! INVARIANTS
//! * Every default is a value of its own kind.
//! * No name appears twice; a name of ours is not one of etcd's.

use super::{
    bounds, duration, front,
    gates::FeatureGates,
    urls,
    value::{self, Value},
};

/// One flag.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// The name, without dashes.
    pub name: &'static str,
    /// What may be typed after it.
    pub kind: Kind,
    /// What counts when nothing is typed, as it would be typed.
    pub default: &'static str,
    /// One line for people.
    pub help: &'static str,
    /// How far it works.
    pub status: Status,
}

/// What may be typed as a flag's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anything.
    Text,
    /// `true` or `false`; the bare flag means `true`.
    Bool,
    /// A whole number from zero.
    Unsigned,
    /// The same, of 32 bits.
    Unsigned32,
    /// A whole number.
    Signed,
    /// Go's notation: `100ms`, `1h30m`.
    Duration,
    /// URLs, with commas between them.
    Urls,
    /// `*`, or URLs with commas between them.
    Origins,
    /// Words, with commas between them.
    Words,
    /// `Gate=true,Other=false`.
    Gates,
    /// One of these.
    Choice(&'static [&'static str]),
    /// Nothing is read from it: etcd forgot it long ago, and old start commands still carry it.
    Legacy,
}

/// How far a flag works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It does what it says.
    Works,
    /// It is accepted, and the start says what is missing, unless the value is the harmless one.
    NotYet {
        /// The value at which nothing is missing.
        harmless: &'static str,
        /// What is missing.
        lacks: &'static str,
    },
    /// Any value but the default stops the start; the text says why.
    Refused(&'static str),
}

/// The parts of the list, in order.
pub const SECTIONS: &[(&str, &[Flag])] = &[
    ("Member", MEMBER),
    ("Clustering", CLUSTERING),
    ("Security", SECURITY),
    ("Logging and monitoring", LOGGING),
    ("Tuning", TUNING),
    ("Of metastore alone", bounds::FLAGS),
    ("Of metastore alone, for clients", front::FLAGS),
    ("Short form", SHORT_FORM),
    ("Process", PROCESS),
];

const MEMBER: &[Flag] = &[
    flag("name", Kind::Text, "default", "A name for people; the key of this member in initial-cluster."),
    flag("data-dir", Kind::Text, "", "Where the data lies. Unset: `<name>.metastore` in the working directory."),
    flag("wal-dir", Kind::Text, "", "A directory of its own for the log.")
        .not_yet("the log stays in the data directory"),
    flag("snapshot-count", Kind::Unsigned, "10000", "After so many applied entries a cut of the log is considered."),
    flag(
        "snapshot-catchup-entries",
        Kind::Unsigned,
        "5000",
        "How many entries a cut of the log leaves for slow members.",
    ),
    flag("max-snapshots", Kind::Unsigned, "5", "Snapshot files to keep.")
        .not_yet("there are no snapshot files to keep"),
    flag("max-wals", Kind::Unsigned, "5", "Log files to keep.")
        .not_yet("log segments are kept as long as they are needed"),
    flag("heartbeat-interval", Kind::Unsigned, "100", "Milliseconds between a leader's heartbeats."),
    flag(
        "election-timeout",
        Kind::Unsigned,
        "1000",
        "Milliseconds without a leader until an election; at least 5 heartbeats.",
    ),
    flag("initial-election-tick-advance", Kind::Bool, "true", "Hold the first election early."),
    flag("listen-peer-urls", Kind::Urls, "http://localhost:2380", "Where other members connect to."),
    flag("listen-client-urls", Kind::Urls, "http://localhost:2379", "Where clients connect to."),
    flag("listen-client-http-urls", Kind::Urls, "", "Separate addresses for HTTP.")
        .not_yet("HTTP is served on --listen-client-urls only"),
    flag("listen-metrics-urls", Kind::Urls, "", "Extra addresses for metrics and health.")
        .not_yet("metrics and health are served on --listen-client-urls only"),
    flag(
        "quota-backend-bytes",
        Kind::Signed,
        "0",
        "Space for data until writes are refused: 0 is 2 GiB, negative no limit.",
    ),
    flag("backend-bbolt-freelist-type", Kind::Text, "", "A detail of bbolt.").not_yet("the storage is not bbolt"),
    flag("backend-batch-interval", Kind::Duration, "0s", "Time between commits of the database.")
        .not_yet("every applied batch is written at once"),
    flag("backend-batch-limit", Kind::Signed, "0", "Operations between commits of the database.")
        .not_yet("every applied batch is written at once"),
    flag("max-txn-ops", Kind::Unsigned, "128", "Most comparisons, and operations per branch, in one transaction."),
    flag("max-request-bytes", Kind::Unsigned, "1572864", "Largest request."),
    flag(
        "max-concurrent-streams",
        Kind::Unsigned32,
        "4294967295",
        "Most HTTP/2 streams at a time per connection; 0 is no limit.",
    ),
    flag("grpc-keepalive-min-time", Kind::Duration, "5s", "How often a client may ping.")
        .not_yet("pings are answered while they are fewer than 10,000 a second"),
    flag(
        "grpc-keepalive-interval",
        Kind::Duration,
        "2h",
        "How long a client may be silent before it is pinged; at least 1s.",
    ),
    flag(
        "grpc-keepalive-timeout",
        Kind::Duration,
        "20s",
        "How long a ping may stay unanswered before the connection ends.",
    ),
    flag("socket-reuse-port", Kind::Bool, "false", "SO_REUSEPORT on listeners: several processes share a port."),
    flag("socket-reuse-address", Kind::Bool, "false", "SO_REUSEADDR on listeners, which is always set."),
    flag("raft-read-timeout", Kind::Duration, "5s", "Read timeout between members.").not_yet(LINKS),
    flag("raft-write-timeout", Kind::Duration, "5s", "Write timeout between members.").not_yet(LINKS),
    flag("memory-mlock", Kind::Bool, "false", "Keep the memory out of swap.").not_yet("memory is not locked"),
    flag("feature-gates", Kind::Gates, "", "Features to switch: `A=true,B=false`."),
    flag("max-learners", Kind::Signed, "1", "Most learners in the cluster."),
];

const CLUSTERING: &[Flag] = &[
    flag("initial-advertise-peer-urls", Kind::Urls, "http://localhost:2380", "Where other members shall connect to."),
    flag("initial-cluster", Kind::Text, "", "`name=url,…` of all first members. Unset: this member alone."),
    flag("initial-cluster-state", Kind::Choice(&["new", "existing"]), "new", "A new cluster, or one to join."),
    flag("initial-cluster-token", Kind::Text, "etcd-cluster", "Keeps clusters apart whose URLs are alike."),
    flag("advertise-client-urls", Kind::Urls, "http://localhost:2379", "Where clients shall connect to."),
    flag("discovery-endpoints", Kind::Words, "", "A cluster to find the other members in.").refused(DISCOVERY),
    flag("discovery-token", Kind::Text, "", "The token of the cluster to be found.").refused(DISCOVERY),
    flag("discovery-dial-timeout", Kind::Duration, "2s", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-request-timeout", Kind::Duration, "5s", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-keepalive-time", Kind::Duration, "2s", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-keepalive-timeout", Kind::Duration, "6s", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-insecure-transport", Kind::Bool, "true", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-insecure-skip-tls-verify", Kind::Bool, "false", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-cert", Kind::Text, "", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-key", Kind::Text, "", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-cacert", Kind::Text, "", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-user", Kind::Text, "", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-password", Kind::Text, "", "For discovery.").not_yet(NO_DISCOVERY),
    flag("discovery-srv", Kind::Text, "", "A DNS domain to find the other members in.").refused(DISCOVERY),
    flag("discovery-srv-name", Kind::Text, "", "A suffix of the DNS service name.").refused(DISCOVERY),
    flag("discovery-fallback", Kind::Choice(&["exit", "proxy"]), "exit", "What to do when discovery fails.")
        .not_yet(NO_DISCOVERY),
    flag("strict-reconfig-check", Kind::Bool, "true", "Refuse member changes that would lose the quorum."),
    flag("pre-vote", Kind::Bool, "true", "Ask before an election, so that a returning member disturbs nobody."),
    flag(
        "auto-compaction-mode",
        Kind::Text,
        "periodic",
        "What auto-compaction-retention counts: `periodic` or `revision`.",
    ),
    flag(
        "auto-compaction-retention",
        Kind::Text,
        "0",
        "How much history to keep: hours or a duration, or revisions; 0 is all.",
    ),
    flag("force-new-cluster", Kind::Bool, "false", "Become the sole member, whoever else there was."),
    flag("v2-deprecation", Kind::Choice(V2_STAGES), "write-only", "A stage in the end of etcd's v2 store.")
        .not_yet("there never was a v2 store here"),
];

const SECURITY: &[Flag] = &[
    flag("cert-file", Kind::Text, "", "The certificate shown to clients."),
    flag("key-file", Kind::Text, "", "Its key."),
    flag("client-cert-file", Kind::Text, "", "The certificate shown when the server dials itself.").refused(TLS),
    flag("client-key-file", Kind::Text, "", "Its key.").refused(TLS),
    flag("client-cert-auth", Kind::Bool, "false", "Ask clients for certificates."),
    flag("trusted-ca-file", Kind::Text, "", "Who signs clients' certificates; they are asked for then."),
    flag("client-crl-file", Kind::Text, "", "Revoked client certificates.").refused(TLS),
    flag("client-cert-allowed-hostname", Kind::Words, "", "Names that client certificates must carry.").refused(TLS),
    flag("auto-tls", Kind::Bool, "false", "TLS for clients with a certificate of our own making.").refused(TLS),
    flag("peer-cert-file", Kind::Text, "", "The certificate shown to members.").refused(TLS),
    flag("peer-key-file", Kind::Text, "", "Its key.").refused(TLS),
    flag("peer-client-cert-file", Kind::Text, "", "The certificate shown when dialling members.").refused(TLS),
    flag("peer-client-key-file", Kind::Text, "", "Its key.").refused(TLS),
    flag("peer-client-cert-auth", Kind::Bool, "false", "Ask members for certificates.").refused(TLS),
    flag("peer-trusted-ca-file", Kind::Text, "", "Who signs members' certificates.").refused(TLS),
    flag("peer-auto-tls", Kind::Bool, "false", "TLS between members with certificates of our own making.").refused(TLS),
    flag("peer-crl-file", Kind::Text, "", "Revoked member certificates.").refused(TLS),
    flag("peer-cert-allowed-cn", Kind::Words, "", "Names that member certificates must carry.").refused(TLS),
    flag("peer-cert-allowed-hostname", Kind::Words, "", "Host names that member certificates must carry.").refused(TLS),
    flag("peer-skip-client-san-verification", Kind::Bool, "false", "Do not compare members' names.").refused(TLS),
    flag("self-signed-cert-validity", Kind::Unsigned, "1", "Years, for certificates of our own making.").refused(TLS),
    flag("cipher-suites", Kind::Words, "", "TLS cipher suites.").refused(TLS),
    flag("tls-min-version", Kind::Text, "TLS1.2", "Oldest TLS version.").refused(TLS),
    flag("tls-max-version", Kind::Text, "", "Newest TLS version.").refused(TLS),
    flag("cors", Kind::Origins, "*", "Web pages that may ask: `*`, or URLs.").refused(ORIGINS),
    flag("host-whitelist", Kind::Words, "*", "Host names that plain HTTP may ask for.").refused(HOSTS),
    flag("auth-token", Kind::Text, "simple", "How logins are remembered.").refused(TOKENS),
    flag("auth-token-ttl", Kind::Unsigned, "300", "Seconds that a login lasts.").not_yet(AUTH),
    flag("bcrypt-cost", Kind::Unsigned, "10", "How hard passwords are hashed.").not_yet(AUTH),
];

const LOGGING: &[Flag] = &[
    flag("logger", Kind::Text, "zap", "The form of log lines; only `zap`."),
    flag("log-outputs", Kind::Words, "default", "`default` (stderr), `stdout`, `stderr`, files; several with commas."),
    flag("log-level", Kind::Text, "info", "`debug`, `info`, `warn`, `error`, `panic` or `fatal`."),
    flag("log-format", Kind::Text, "json", "`json` or `console`."),
    flag("enable-log-rotation", Kind::Bool, "false", "Rotate the log file.").not_yet("log files are not rotated"),
    flag("log-rotation-config-json", Kind::Text, ROTATION, "How to rotate the log file.")
        .not_yet("log files are not rotated"),
    flag("enable-pprof", Kind::Bool, "false", "Profiles over HTTP.").not_yet("no profiles are served"),
    flag("metrics", Kind::Text, "basic", "`basic` or `extensive`.").not_yet("there are no histograms per call"),
    flag("enable-distributed-tracing", Kind::Bool, "false", "Send traces.").not_yet(TRACES),
    flag("distributed-tracing-address", Kind::Text, "localhost:4317", "Where traces go.").not_yet(TRACES),
    flag("distributed-tracing-service-name", Kind::Text, "etcd", "Under which name.").not_yet(TRACES),
    flag("distributed-tracing-instance-id", Kind::Text, "", "Under which identity.").not_yet(TRACES),
    flag("distributed-tracing-sampling-rate", Kind::Signed, "0", "How many of a million.").not_yet(TRACES),
    flag("warning-apply-duration", Kind::Duration, "100ms", "An apply that takes longer is logged."),
    flag("warning-unary-request-duration", Kind::Duration, "300ms", "A request that takes longer is logged."),
];

const TUNING: &[Flag] = &[
    flag("enable-grpc-gateway", Kind::Bool, "true", "The JSON API.").not_yet("there is no JSON API").harmless("false"),
    flag("corrupt-check-time", Kind::Duration, "0s", "Time between comparisons with other members; 0 is never."),
    flag(
        "compact-hash-check-time",
        Kind::Duration,
        "1m",
        "Time between comparisons of compaction hashes, with feature gate CompactHashCheck.",
    ),
    flag(
        "compaction-batch-limit",
        Kind::Signed,
        "0",
        "Revisions that a compaction looks at between two rests; 0 is 1000.",
    ),
    flag(
        "compaction-sleep-interval",
        Kind::Duration,
        "0s",
        "How long a compaction rests in between, in ten parts; 0 is 10ms.",
    ),
    flag(
        "watch-progress-notify-interval",
        Kind::Duration,
        "0s",
        "Time between progress notices; 0 is 10m, least 100ms.",
    ),
    flag("downgrade-check-time", Kind::Duration, "5s", "Time between looks at a downgrade.")
        .not_yet("there are no downgrades"),
    flag("bootstrap-defrag-threshold-megabytes", Kind::Unsigned, "0", "Defragment at the start if it frees so much.")
        .not_yet("the storage does not fragment"),
    flag("unsafe-no-fsync", Kind::Bool, "false", "Do not wait for the disk. A crash loses acknowledged writes."),
];

/// What stands for several of the flags above. None of these has a variable: `ETCD_PORT` is what Kubernetes sets for every
/// service that is called `etcd`.
pub const SHORT_FORM: &[Flag] = &[
    flag("id", Kind::Unsigned, "0", "Which member of --cluster this is, counted from 1; its name is `node<id>`."),
    flag("cluster", Kind::Text, "", "The members' peer URLs, in the order of their IDs."),
    flag("grpc-addr", Kind::Text, "", "`host:port` or `:port` for clients."),
    flag("join", Kind::Bool, "false", "Join a cluster that runs, instead of founding one."),
    flag("port", Kind::Unsigned, "0", "A port for a quick HTTP API.").not_yet("there is no quick HTTP API"),
];

const PROCESS: &[Flag] = &[
    flag("config-file", Kind::Text, "", "A YAML file instead of flags and variables.")
        .refused("a file in the place of all flags is not supported yet: use flags or ETCD_ variables"),
    flag("version", Kind::Bool, "false", "Print the version and exit."),
];

/// Flags that etcd itself ignores.
pub const LEGACY: &[&str] = &[
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

/// Flags of today that were once spelled with `experimental-` in front, and still are in older manifests.
pub const ONCE_EXPERIMENTAL: &[&str] = &[
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

const TLS: &str = "this part of TLS is not supported yet, and a start without it would only look protected";
const ORIGINS: &str = "a list of origins is not supported yet, and a start without it would only look protected";
const HOSTS: &str = "a list of hosts is not supported yet, and a start without it would only look protected";
const TOKENS: &str = "only `simple` is supported yet, and a start with another kind would only look protected";
const AUTH: &str = "users and logins are not supported";
const DISCOVERY: &str = "discovery is not supported yet, and a start without it would found another cluster";
const NO_DISCOVERY: &str = "there is no discovery";
const TRACES: &str = "no traces are sent";
const LINKS: &str = "links between members keep time by themselves";
const V2_STAGES: &[&str] = &["write-only", "write-only-skip-check", "write-only-drop-data", "gone"];
const ROTATION: &str = r#"{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}"#;

pub(super) const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, default, help, status: Status::Works }
}

impl Flag {
    const fn not_yet(mut self, lacks: &'static str) -> Self {
        self.status = Status::NotYet { harmless: self.default, lacks };
        self
    }

    const fn harmless(mut self, value: &'static str) -> Self {
        if let Status::NotYet { lacks, .. } = self.status {
            self.status = Status::NotYet { harmless: value, lacks };
        }
        self
    }

    const fn refused(mut self, what: &'static str) -> Self {
        self.status = Status::Refused(what);
        self
    }

    /// The environment variable that stands for the flag.
    #[must_use]
    pub fn variable(&self) -> String {
        variable(self.name)
    }

    /// Whether two texts mean the same value.
    #[must_use]
    pub fn same(&self, a: &str, b: &str) -> bool {
        match self.kind {
            Kind::Bool => bool::read(a) == bool::read(b),
            Kind::Unsigned | Kind::Unsigned32 => u64::read(a) == u64::read(b),
            Kind::Signed => i64::read(a) == i64::read(b),
            Kind::Duration => duration::parse(a) == duration::parse(b),
            Kind::Urls => urls::parse_list(a) == urls::parse_list(b),
            Kind::Text | Kind::Origins | Kind::Words | Kind::Gates | Kind::Choice(_) | Kind::Legacy => a == b,
        }
    }
}

impl Kind {
    /// Whether the bare flag means `true` and never takes the next argument.
    #[must_use]
    pub fn may_stand_alone(self) -> bool {
        matches!(self, Self::Bool | Self::Legacy)
    }

    /// Whether `text` is such a value; says why not.
    ///
    /// # Errors
    /// In the words of Go's flag package, or of etcd for etcd's own kinds.
    pub fn check(self, text: &str) -> Result<(), String> {
        match self {
            Self::Text | Self::Words | Self::Legacy => Ok(()),
            Self::Bool => bool::read(text).map(drop),
            Self::Unsigned => u64::read(text).map(drop),
            Self::Unsigned32 => value::unsigned_32(text).map(drop),
            Self::Signed => i64::read(text).map(drop),
            Self::Duration => duration::parse(text).map(drop).map_err(|_| value::PARSE_ERROR.to_owned()),
            Self::Urls => urls::parse_list(text).map(drop),
            Self::Origins if text == "*" => Ok(()),
            Self::Origins => urls::parse_each(text).map(drop),
            Self::Gates => FeatureGates::parse(text).map(drop),
            Self::Choice(values) if values.contains(&text) => Ok(()),
            Self::Choice(_) => Err("invalid value".to_owned()),
        }
    }
}

/// Every flag, section by section.
pub fn all() -> impl Iterator<Item = &'static Flag> {
    SECTIONS.iter().flat_map(|(_, flags)| flags.iter())
}

/// The flag of that name, exactly.
#[must_use]
pub fn find(name: &str) -> Option<&'static Flag> {
    all().find(|flag| flag.name == name)
}

/// The flag that an old spelling stands for.
#[must_use]
pub fn find_experimental(name: &str) -> Option<&'static Flag> {
    let modern = name.strip_prefix("experimental-")?;
    ONCE_EXPERIMENTAL.contains(&modern).then(|| find(modern))?
}

/// The environment variable that stands for a flag.
#[must_use]
pub fn variable(flag: &str) -> String {
    format!("ETCD_{}", flag.replace(['-', '.'], "_").to_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_value_of_its_kind() {
        for flag in all() {
            assert_eq!(flag.kind.check(flag.default), Ok(()), "{}", flag.name);
            if let Status::NotYet { harmless, .. } = flag.status {
                assert_eq!(flag.kind.check(harmless), Ok(()), "{}", flag.name);
            }
        }
    }

    #[test]
    fn no_name_appears_twice() {
        let mut names: Vec<_> = all().map(|flag| flag.name).chain(LEGACY.iter().copied()).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_old_spelling_leads_to_a_flag_of_today() {
        for name in ONCE_EXPERIMENTAL {
            assert!(find_experimental(&format!("experimental-{name}")).is_some(), "{name}");
        }
        assert!(find_experimental("experimental-name").is_none());
        assert!(find_experimental("max-learners").is_none());
    }

    #[test]
    fn a_variable_is_the_name_in_capitals() {
        assert_eq!(find("listen-client-urls").unwrap().variable(), "ETCD_LISTEN_CLIENT_URLS");
    }

    #[test]
    fn values_are_compared_by_meaning() {
        assert!(find("auto-tls").unwrap().same("false", "0"));
        assert!(find("raft-read-timeout").unwrap().same("5s", "5000ms"));
        assert!(!find("cert-file").unwrap().same("", "a"));
    }
}
