//! Resolves and validates the arguments into a plan of the run.

use std::{num::NonZero, sync::Arc, thread, time::Duration};

use super::{
    arguments::{CallsArgs, ExtentArgs, LoadOrder, ReportArgs, TargetArgs, TlsArgs, WatchedKeys, WorkloadArgs},
    keys::KeySpace,
    kv::Listing,
    schedule::{Extent, Rate},
};
use crate::net::tls::{ClientTls, KeyPair, Side, TlsSettings};

/// Puts per second of `watch`, unless `--rate` is given.
const DEFAULT_WATCH_RATE: f64 = 100.0;
/// Unless `--connections` is given, there are as many connections as clients, but no more than this.
const MAX_DEFAULT_CONNECTIONS: u32 = 100;
/// How long to measure, unless `--duration` or `--total` is given.
const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// The plan of one run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) workload: Workload,
    pub(super) endpoints: Vec<String>,
    pub(super) clients: u32,
    pub(super) connections: u32,
    pub(super) threads: u32,
    pub(super) timeout: Duration,
    /// A user and its password.
    pub(super) user: Option<(String, String)>,
    pub(super) tls: TlsSettings,
    pub(super) keys: KeySpace,
    pub(super) extent: Extent,
    pub(super) warmup: Duration,
    pub(super) rate: Option<Rate>,
    pub(super) json: bool,
    pub(super) label: Option<String>,
    pub(super) server_pids: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Workload {
    Put,
    Range { serializable: bool },
    List(Listing),
    Txn,
    Watch { watchers: u32, streams: u32, watched: WatchedKeys },
    Lease { leases: u32, ttl: i64 },
    Load(LoadOrder),
}

impl Workload {
    /// The name of its subcommand.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Range { .. } => "range",
            Self::List(_) => "list",
            Self::Txn => "txn",
            Self::Watch { .. } => "watch",
            Self::Lease { .. } => "lease",
            Self::Load(_) => "load",
        }
    }

    /// Whether all keys of the key space must exist before it starts.
    pub(super) fn needs_keys(self) -> bool {
        matches!(self, Self::Range { .. } | Self::List(_) | Self::Txn)
    }
}

impl Plan {
    /// Applies defaults and refuses contradictory options.
    pub(super) fn resolve(asked: WorkloadArgs) -> Result<Self, String> {
        match asked {
            WorkloadArgs::Put(calls) => Self::of(Workload::Put, calls),
            WorkloadArgs::Txn(calls) => Self::of(Workload::Txn, calls),
            WorkloadArgs::Range(range) => Self::of(Workload::Range { serializable: range.serializable }, range.calls),
            WorkloadArgs::List(list) => {
                if list.list_keys > list.calls.keys.key_space {
                    let space = list.calls.keys.key_space;
                    return Err(format!("--list-keys {} is more than --key-space {space}", list.list_keys));
                }
                let (keys, keys_only, serializable) = (list.list_keys, list.keys_only, list.serializable);
                let limit = list.limit.unwrap_or(keys).min(keys);
                Self::of(Workload::List(Listing { keys, limit, keys_only, serializable }), list.calls)
            }
            WorkloadArgs::Watch(mut watch) => {
                let (watchers, watched) = (watch.watchers, watch.watched);
                if watch.calls.keys.value_size < 8 {
                    return Err("watch stores a time stamp in the value: --value-size must be 8 or more".to_owned());
                }
                // Watchers with keys of their own need as many keys; otherwise there is one.
                watch.calls.keys.key_space = if watched == WatchedKeys::Own { watchers.into() } else { 1 };
                watch.calls.extent.rate.get_or_insert(DEFAULT_WATCH_RATE);
                let streams = watch.streams.min(watchers);
                Self::of(Workload::Watch { watchers, streams, watched }, watch.calls)
            }
            WorkloadArgs::Lease(lease) => {
                let clients = lease.calls.target.clients;
                let leases = lease.leases.unwrap_or(clients);
                if leases < clients {
                    return Err(format!(
                        "--leases {leases} is less than --clients {clients}: each client needs a lease"
                    ));
                }
                Self::of(Workload::Lease { leases, ttl: lease.ttl }, lease.calls)
            }
            WorkloadArgs::Load(load) => {
                let total = Some(load.keys.key_space);
                let extent = ExtentArgs { total, duration: None, warmup: Duration::ZERO, rate: load.rate };
                let calls = CallsArgs { target: load.target, keys: load.keys, extent, report: load.report };
                Self::of(Workload::Load(load.order), calls)
            }
        }
    }

    fn of(workload: Workload, calls: CallsArgs) -> Result<Self, String> {
        let CallsArgs { target, keys, extent, report } = calls;
        let TargetArgs { endpoints, clients, connections, threads, timeout, user, tls } = target;
        let ReportArgs { json, label, server_pid } = report;
        let streams = if let Workload::Watch { streams, .. } = workload { streams } else { 0 };
        let callers = clients.max(streams);
        let connections = connections.unwrap_or(MAX_DEFAULT_CONNECTIONS).min(callers);
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = threads.unwrap_or_else(|| u32::try_from(cores).unwrap_or(u32::MAX)).min(connections);
        if timeout.is_zero() {
            return Err("--timeout must be greater than zero".to_owned());
        }
        Ok(Self {
            workload,
            endpoints: endpoints.iter().map(|endpoint| endpoint_url(endpoint)).collect::<Result<_, _>>()?,
            clients,
            connections,
            threads,
            timeout,
            user: user.map(|user| login(workload, &user)).transpose()?,
            tls: tls_settings(tls),
            keys: KeySpace::new(&keys.prefix, keys.key_size, keys.key_space, keys.value_size, keys.seed)?,
            extent: measured_extent(&extent)?,
            warmup: extent.warmup,
            rate: extent.rate.map(Rate::new).transpose()?,
            json,
            label,
            server_pids: server_pid,
        })
    }

    /// Reads the certificates.
    pub(super) fn open_tls(&self) -> Result<Arc<ClientTls>, String> {
        ClientTls::open(&self.tls).map(Arc::new).map_err(|error| error.to_string())
    }

    /// What the figures of the report count.
    pub(super) fn unit(&self) -> &'static str {
        match self.workload {
            Workload::Watch { .. } => "events",
            Workload::Put
            | Workload::Range { .. }
            | Workload::List(_)
            | Workload::Txn
            | Workload::Lease { .. }
            | Workload::Load(_) => "operations",
        }
    }
}

/// The name and the password of `--user`.
fn login(workload: Workload, user: &str) -> Result<(String, String), String> {
    if matches!(workload, Workload::Watch { .. } | Workload::Lease { .. }) {
        return Err("--user is for single calls, not for watch and lease".to_owned());
    }
    let (name, password) = user.split_once(':').ok_or_else(|| format!("--user {user:?} must be NAME:PASSWORD"))?;
    Ok((name.to_owned(), password.to_owned()))
}

fn measured_extent(extent: &ExtentArgs) -> Result<Extent, String> {
    match (extent.total, extent.duration) {
        (Some(total), _) => Ok(Extent::Calls(total)),
        (None, Some(Duration::ZERO)) => Err("--duration must be greater than zero".to_owned()),
        (None, duration) => Ok(Extent::Time(duration.unwrap_or(DEFAULT_DURATION))),
    }
}

/// The certificates for `https://` endpoints.
pub(super) fn tls_settings(arguments: TlsArgs) -> TlsSettings {
    let TlsArgs { cacert, cert, key } = arguments;
    TlsSettings {
        trusted_ca: cacert,
        client: cert.zip(key).map(|(cert, key)| KeyPair { cert, key }),
        ..TlsSettings::without_files(Side::Clients)
    }
}

/// The URL of an endpoint, which may be given without the scheme.
pub(super) fn endpoint_url(endpoint: &str) -> Result<String, String> {
    let endpoint = endpoint.trim().trim_end_matches('/');
    let (scheme, authority) = match endpoint.split_once("://") {
        Some((scheme @ ("http" | "https"), authority)) => (scheme, authority),
        _ => ("http", endpoint),
    };
    let parsed: http::uri::Authority =
        authority.parse().map_err(|error| format!("{endpoint:?} is not an endpoint: {error}"))?;
    if parsed.port_u16().is_none() {
        return Err(format!("{endpoint:?} is not an endpoint: it needs a port, as in 127.0.0.1:2379"));
    }
    Ok(format!("{scheme}://{authority}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::arguments::{Arguments, Command},
        *,
    };

    fn plan(arguments: &str) -> Result<Plan, String> {
        let words = format!("bench {arguments}");
        match Arguments::try_parse_from(words.split(' ')).expect("these are known options").command {
            Command::Run(asked) => Plan::resolve(asked),
            other @ (Command::Ready(_) | Command::Compare(_)) => panic!("{other:?} is not a workload"),
        }
    }

    fn refusal(arguments: &str) -> String {
        plan(arguments).expect_err("the options are contradictory")
    }

    #[test]
    fn defaults_are_applied() {
        let one = plan("put").unwrap();
        assert_eq!((one.clients, one.connections, one.threads), (1, 1, 1));
        assert_eq!(one.extent, Extent::Time(Duration::from_secs(10)));
        let many = plan("range --serializable --clients 1000 --threads 4 --total 7").unwrap();
        assert_eq!((many.clients, many.connections, many.threads), (1000, 100, 4));
        assert_eq!(many.extent, Extent::Calls(7));
        assert_eq!(many.workload, Workload::Range { serializable: true });
        assert_eq!(many.endpoints, ["http://127.0.0.1:2379"]);
    }

    #[test]
    fn threads_never_exceed_connections_nor_connections_callers() {
        let plan = plan("put --clients 3 --connections 50 --threads 8").unwrap();
        assert_eq!((plan.connections, plan.threads), (3, 3));
    }

    #[test]
    fn a_list_returns_all_of_its_keys_or_up_to_the_limit() {
        for (asked, limit) in [("", 50), (" --limit 7", 7), (" --limit 70", 50)] {
            let plan = plan(&format!("list --list-keys 50 --keys-only{asked}")).unwrap();
            let listing = Listing { keys: 50, limit, keys_only: true, serializable: false };
            assert_eq!(plan.workload, Workload::List(listing));
        }
    }

    #[test]
    fn a_load_writes_every_key_once_without_warmup() {
        let plan = plan("load --key-space 77 --order random").unwrap();
        assert_eq!(plan.extent, Extent::Calls(77));
        assert_eq!(plan.warmup, Duration::ZERO);
        assert_eq!(plan.workload, Workload::Load(LoadOrder::Random));
    }

    #[test]
    fn the_number_of_watchers_limits_streams_keys_and_connections() {
        let own = plan("watch --watchers 50 --streams 100 --watched own").unwrap();
        assert_eq!(own.keys.count(), 50);
        assert_eq!(own.connections, 50);
        assert_eq!(own.workload, Workload::Watch { watchers: 50, streams: 50, watched: WatchedKeys::Own });
        assert!(own.rate.is_some());
        assert_eq!(plan("watch --watchers 50").unwrap().keys.count(), 1);
    }

    #[test]
    fn contradictory_options_are_refused_by_name() {
        assert!(refusal("list --list-keys 11 --key-space 10").contains("--list-keys 11 is more than --key-space 10"));
        assert!(refusal("lease --clients 10 --leases 9").contains("each client needs a lease"));
        assert!(refusal("watch --value-size 7").contains("--value-size"));
        assert!(refusal("put --rate 0").contains("--rate"));
        assert!(refusal("put --rate NaN").contains("--rate"));
        assert!(refusal("put --duration 0s").contains("--duration"));
        assert!(refusal("put --timeout 0s").contains("--timeout"));
        assert!(refusal("put --key-size 8 --key-space 1000").contains("--key-size"));
    }

    #[test]
    fn endpoints_may_omit_the_scheme_but_not_the_port() {
        assert_eq!(endpoint_url("10.0.0.1:2379").unwrap(), "http://10.0.0.1:2379");
        assert_eq!(endpoint_url("http://[::1]:2379/").unwrap(), "http://[::1]:2379");
        assert!(endpoint_url("localhost").unwrap_err().contains("port"));
        assert!(endpoint_url("").unwrap_err().contains("endpoint"));
        assert_eq!(endpoint_url("https://localhost:2379/").unwrap(), "https://localhost:2379");
    }
}
