//! Builds the floors bottom-up, serves clients, stops top-down.

mod bootstrap;
mod classic;
mod depot;
mod front;
mod own;
mod peers;
mod publish;
mod routes;
mod tls;

use std::{
    io,
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{
    api::{self, Api, Limits, Table, header::Header, pool::Pool},
    config::{AutoCompaction, Config},
    error::{Error, Halt},
    logging,
    node::{
        Node, Parts, Settings, Threads,
        applier::Quota,
        data_dir::DataDir,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        keeper::Habits,
        links::Links,
        log::{self, SegmentLog},
        replica::Timing,
        retention::Policy,
        snapshot::Shelf,
        transport::{self, Transport},
    },
    state::Machine,
    storage::{Engine, rocks::Rocks},
    watch,
};
use bootstrap::found_cluster;
use classic::Service;
use depot::Depot;
use front::{Door, bind, bind_all};
use publish::publish;

/// Flush the database when the log has grown by so much, or after so long: what a restart has to replay.
const FLUSH_AFTER_BYTES: u64 = 32 << 20;
const FLUSH_AFTER: Duration = Duration::from_mins(1);
/// What every request may take beyond two election timeouts.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Entries between commit and apply that are too many.
const BACKLOG: u64 = 5000;
/// How long clients get to end their calls when the server stops.
const DRAIN: Duration = Duration::from_millis(500);
/// What etcd takes for a quota of zero.
const DEFAULT_QUOTA_BYTES: i64 = 2 << 30;
/// How long a member that was removed goes on, so that its clients hear the outcome.
const REMOVED_GRACE: Duration = Duration::from_secs(1);
/// To connect to a member, on top of an election timeout.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// A copy of the database goes to another member no faster than this.
const SNAPSHOT_BYTES_PER_SECOND: u64 = 128 << 20;

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A disk, or what is on it.
    #[error(transparent)]
    Halt(#[from] Halt),
    /// What was asked for.
    #[error("{0}")]
    Refused(String),
    /// An address.
    #[error("listen tcp {address}: bind: {}", plain(.source))]
    Bind {
        /// Where we wanted to listen.
        address: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What the system says, in the words of other servers.
fn plain(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::AddrInUse { "address already in use".to_owned() } else { error.to_string() }
}

/// Runs a server until it is told to stop.
#[must_use]
pub fn run(config: &Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("api").build() {
        Ok(runtime) => runtime,
        Err(error) => return logging::fatal("discovery failed", error),
    };
    match runtime.block_on(serve(config)) {
        Ok(()) => {
            runtime.shutdown_timeout(Duration::from_millis(100));
            ExitCode::SUCCESS
        }
        Err(failure) => logging::fatal("discovery failed", failure),
    }
}

async fn serve(config: &Config) -> Result<(), Failure> {
    let begins = !DataDir::looks_initialised(&config.data_dir);
    // Checked before anything is touched.
    let first = if begins { Some(config.first_start().map_err(Failure::Refused)?) } else { None };
    let ports = bind_all(&config.listen_client_urls).await?;
    let mut peer_listeners = Vec::new();
    for url in &config.listen_peer_urls {
        peer_listeners.push(bind(url).await?);
    }
    let mut stop =
        StopSignal::listen().map_err(|error| Failure::Refused(format!("cannot listen for signals: {error}")))?;
    let directory = DataDir::open(&config.data_dir)?;
    if !directory.is_initialised() {
        let first = first.map_or_else(|| config.first_start().map_err(Failure::Refused), Ok)?;
        found_cluster(&first, &directory)?;
    }
    let (removed, mut is_removed) = tokio::sync::watch::channel(false);
    let floors = build(config, &directory, Arc::new(move || _ = removed.send_replace(true)))?;
    // HTTP between members comes with the members' own routes.
    peers::listen(peer_listeners, &floors.transport, |_stream| ())?;
    publish(config, &floors).await?;
    tracing::info!("ready to serve client requests");
    let service = Service { table: Arc::new(Table::new(floors.api.clone())), router: routes::routes(&floors.api) };
    let door = Arc::new(Door::new(config, service)?);
    let (stopping, stopped) = tokio::sync::watch::channel(());
    let mut accepting = tokio::task::JoinSet::new();
    for port in ports {
        port.announce();
        accepting.spawn(door.clone().accept(port, stopped.clone()));
    }
    tokio::select! {
        signal = stop.wait() => tracing::info!(signal, "received signal; shutting down"),
        _ = is_removed.wait_for(|removed| *removed) => {
            tokio::time::sleep(REMOVED_GRACE).await;
            tracing::warn!("this member was removed from the cluster; shutting down");
        }
    }
    drop(stopping);
    accepting.join_all().await;
    door.close();
    floors.api.hub.stop(); // Watches end at once; their clients look for another member.
    let _ = tokio::time::timeout(DRAIN, door.wait_until_empty()).await;
    hand_over(config, &floors).await;
    floors.transport.stop();
    floors.api.node.stop();
    let _ = tokio::task::spawn_blocking(move || floors.threads.join()).await;
    tracing::info!({ "data-dir" = %config.data_dir.display() }, "closed etcd server");
    Ok(())
}

/// Lets another voter lead before this one goes.
async fn hand_over(config: &Config, floors: &Floors) {
    let (node, this) = (&floors.api.node, floors.api.header.member_id());
    let electorate = node.readers().board.read().members.electorate();
    if node.status().leader() != this || electorate.voters == [this] {
        return;
    }
    let Some(to) = node.links().longest(|member| member != this && electorate.voters.contains(&member)) else {
        return tracing::warn!("{}", Error::Unhealthy);
    };
    node.transfer_leader(to);
    let moved = async {
        while node.status().leader() == this {
            tokio::time::sleep(config.heartbeat_interval).await;
        }
    };
    let to = format!("{to:x}");
    match tokio::time::timeout(REQUEST_TIMEOUT + 2 * config.election_timeout, moved).await {
        Ok(()) => tracing::info!(to, "leadership transferred"),
        Err(_) => tracing::warn!(to, "leadership transfer failed: another member will be elected"),
    }
}

/// All floors, running.
struct Floors {
    api: Arc<Api>,
    threads: Threads,
    transport: Arc<Transport>,
}

fn build(config: &Config, directory: &DataDir, farewell: Arc<dyn Fn() + Send + Sync>) -> Result<Floors, Failure> {
    let (log, recovered) = SegmentLog::open(&log::Place::new(directory.log_dir()))?;
    let identity = recovered.identity;
    let databases = directory.databases();
    databases.tidy()?;
    let value_cache_bytes = config.value_cache_bytes as u64;
    let engine: Arc<dyn Engine> = Arc::new(Rocks::open(&databases.current()?)?);
    let machine = Machine::open(engine.clone(), value_cache_bytes)?;
    let quota_bytes = match config.quota_bytes {
        None => -1,
        Some(0) => DEFAULT_QUOTA_BYTES,
        Some(bytes) => i64::try_from(bytes).unwrap_or(i64::MAX),
    };
    let watch_settings =
        watch::Settings { progress_interval: config.watch_progress_notify_interval, ..watch::Settings::default() };
    let (publisher, hub) = watch::Hub::start(machine.readers().keys, watch_settings);
    let member = MemberId::new(identity.member_id).ok_or_else(|| Failure::Refused("the log names no member".into()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let started_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let ids = Arc::new(RequestIds::new(member, started_ms));
    let settings = settings(config, identity.member_id, ids.clone(), quota_bytes);
    let (raft, shelf) = (Arc::new(Inbox::default()), Arc::new(Shelf::default()));
    let links = Arc::new(Links::default());
    let transport = Transport::new(transport::Parts {
        identity,
        raft: raft.clone(),
        links: links.clone(),
        shelf: shelf.clone(),
        depot: Box::new(Depot { databases: databases.clone(), value_cache_bytes }),
        farewell: farewell.clone(),
        patience: transport::Patience {
            dial: DIAL_TIMEOUT + config.election_timeout,
            write: DIAL_TIMEOUT + 2 * config.election_timeout,
            snapshot_rate: SNAPSHOT_BYTES_PER_SECOND,
        },
    });
    let parts = Parts {
        engine,
        machine,
        publisher,
        log: Box::new(log),
        recovered,
        post: Arc::new(transport.clone()),
        links,
        first_peers: Vec::new(),
        shelf,
        copies: databases.copies(),
        farewell,
        logger: logging::raft_logger(),
    };
    let (node, threads) = Node::start(&settings, raft, parts)?;
    let api = Api {
        header: Header::new(identity.cluster_id, identity.member_id, node.status().clone()),
        node,
        hub,
        limits: Limits {
            max_txn_ops: config.max_txn_ops,
            max_request_bytes: config.max_request_bytes,
            min_lease_seconds: api::lease::min_seconds(config.election_ticks(), config.heartbeat_interval),
        },
        ids,
        pool: Pool::start(std::thread::available_parallelism().map_or(2, usize::from)),
        quota_bytes,
        alarm_under_way: AtomicBool::new(false),
    };
    Ok(Floors { api: Arc::new(api), threads, transport })
}

fn settings(config: &Config, member_id: u64, ids: Arc<RequestIds>, quota_bytes: i64) -> Settings {
    let request_timeout = REQUEST_TIMEOUT + 2 * config.election_timeout;
    Settings {
        member_id,
        ids,
        timing: Timing {
            tick_ms: u64::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX),
            election_ticks: config.election_ticks(),
            pre_vote: config.pre_vote,
            patience_ms: u64::try_from(request_timeout.as_millis()).unwrap_or(u64::MAX),
            fixed_timeout: None,
        },
        request_timeout,
        catchup_entries: config.snapshot_catchup_entries,
        quota: Quota { bytes: quota_bytes },
        retention: match config.auto_compaction {
            AutoCompaction::Off => Policy::All,
            AutoCompaction::Periodic(period) => Policy::Period(period),
            AutoCompaction::Revisions(kept) => Policy::Revisions(i64::try_from(kept).unwrap_or(i64::MAX)),
        },
        habits: Habits {
            compaction_batch: config.compaction_batch_limit,
            compaction_pause: config.compaction_sleep_interval,
            flush_after_bytes: FLUSH_AFTER_BYTES,
            flush_after: FLUSH_AFTER,
            flush_after_entries: config.snapshot_count,
        },
        slow_apply: config.warning_apply_duration,
        backlog: BACKLOG,
    }
}

/// SIGTERM or SIGINT.
struct StopSignal {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignal {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "terminated",
            _ = self.interrupt.recv() => "interrupt",
        }
    }
}
