//! Builds the floors bottom-up, serves clients, stops top-down.

mod bootstrap;
mod classic;
mod depot;
mod front;
mod inspection;
mod joining;
mod listen;
mod own;
mod pace;
mod peers;
mod publish;
mod routes;
mod signals;
mod takeover;
mod tls;
mod versions;
mod words;

use std::{
    io,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{net::TcpListener, signal::unix::SignalKind};

use crate::{
    api::{self, Api, Limits, Table, company::Company, header::Header, pool::Pool, slow::Slow},
    config::{AutoCompaction, Config, gates::Gate},
    error::{Error, Halt},
    ledger::Ledger,
    logging,
    metrics::METRICS,
    mvcc::compact,
    node::{
        Node, Parts, Settings, Threads,
        applier::Quota,
        clock::Clock,
        data_dir::DataDir,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        keeper::Habits,
        links::Links,
        log::{self, SegmentLog},
        peers::Peer,
        replica::Timing,
        retention::Policy,
        snapshot::Shelf,
        transport::{self, Transport},
    },
    peer::Client,
    state::{Machine, Members},
    storage::{
        Engine,
        rocks::{Caches, Rocks},
    },
    watch,
};
use classic::Service;
use depot::Depot;
use front::{Door, Port, bind_all};
use listen::{Slots, bind_for_members};
use peers::Ear;
use publish::publish;
use signals::StopSignal;
use tls::Tls;

/// What every request may take beyond two election timeouts.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long clients get to end their calls when the server stops.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a member that was removed goes on, so that its clients hear the outcome.
const REMOVED_GRACE: Duration = Duration::from_secs(1);
/// To connect to a member, on top of an election timeout.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the disk of a member that sends or receives a snapshot may keep the other one waiting.
const SNAPSHOT_STALL: Duration = Duration::from_mins(1);
/// What still runs when everything has stopped gets so long to end.
const LAST_TASKS: Duration = Duration::from_millis(100);

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
    #[error("listen {address}: bind: {}", plain(.source))]
    Bind {
        /// The network, and where in it we wanted to listen.
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
    // One processor is left to the thread that orders and stores what all the others write.
    let api_threads = config.bounds.api_threads.unwrap_or_else(|| processors().saturating_sub(1).max(1));
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = match builder.worker_threads(api_threads).enable_all().thread_name("api").build() {
        Ok(runtime) => runtime,
        Err(error) => return logging::fatal("discovery failed", error),
    };
    let end = runtime.block_on(serve(config));
    runtime.shutdown_timeout(LAST_TASKS);
    match end {
        Ok(signal) => signal.map_or(ExitCode::SUCCESS, signals::end_by),
        Err(failure) => logging::fatal("discovery failed", failure),
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Serves until the end; returns the signal that it was told to stop with, if it was.
async fn serve(config: &Config) -> Result<Option<SignalKind>, Failure> {
    let client = Client::new(DIAL_TIMEOUT + config.election_timeout);
    let begins = !DataDir::looks_initialised(&config.data_dir);
    // Before anything is touched, and before others who start can take an open port for a member that may answer.
    let known = if begins { Some(bootstrap::origin(config, &client).await?) } else { None };
    let tls = config.front.tls.as_ref().map(Tls::open).transpose()?;
    let ports = bind_all(&config.listen_client_urls, config.socket_reuse_port).await?;
    let mut peer_listeners = Vec::new();
    for url in &config.listen_peer_urls {
        peer_listeners.push(bind_for_members(url, config.socket_reuse_port).await?);
    }
    let slots = Slots::new(config.bounds.max_connections)?;
    let directory = DataDir::open(&config.data_dir)?;
    words::starting(config, directory.is_initialised());
    bootstrap::prepare(config, &client, known, &directory).await?;
    let (removed, is_removed) = tokio::sync::watch::channel(false);
    let floors = build(config, &directory, client, Arc::new(move || _ = removed.send_replace(true))).await?;
    // Until here a signal ends the process by itself, whatever it waits for: there is nothing to hand over yet.
    let stop = StopSignal::listen().map_err(|error| Failure::Refused(format!("cannot listen for signals: {error}")))?;
    let mut ends = Ends { stop, is_removed };
    let ear = match open_to_members(config, &floors, peer_listeners).await {
        Ok(ear) => ear,
        Err(failure) => {
            floors.stop().await;
            return Err(failure);
        }
    };
    let end = tokio::select! {
        published = publish(config, &floors.api) => published.err().map(|error| Err(Failure::Refused(error.to_string()))),
        end = ends.wait() => Some(match end {
            End::Signal(signal) => Ok(Some(signal)),
            End::Removed => Err(Failure::Refused("server is stopping: this member was removed".to_owned())),
        }),
    };
    if let Some(end) = end {
        ear.close();
        floors.stop().await;
        return end;
    }
    tokio::spawn(versions::watch_over(floors.api.clone()));
    inspection::start(config, &floors.api);
    let doors = Doors::open(config, &floors.api, tls, ports, &slots);
    signals::tell_ready();
    let vigil = tokio::spawn(keep_vigil(floors.api.clone(), config.election_timeout));
    let end = ends.wait().await;
    if let End::Removed = end {
        tokio::time::sleep(REMOVED_GRACE).await;
    }
    words::ending("closing", config);
    vigil.abort();
    doors.close(&floors.api).await;
    hand_over(&floors).await;
    ear.close();
    floors.stop().await;
    words::ending("closed", config);
    Ok(match end {
        End::Signal(signal) => Some(signal),
        End::Removed => None,
    })
}

/// Looks for the leader once per election timeout, for all streams that want one.
async fn keep_vigil(api: Arc<Api>, election_timeout: Duration) {
    loop {
        tokio::time::sleep(election_timeout).await;
        api.vigil.look(api.node.status().leader() != 0);
    }
}

/// Lets other members in, once nothing speaks against this one.
async fn open_to_members(config: &Config, floors: &Floors, listeners: Vec<TcpListener>) -> Result<Ear, Failure> {
    if config.feature_gates.is_open(Gate::InitialCorruptCheck) {
        inspection::before_serving(&floors.api).await.map_err(Failure::Refused)?;
    }
    let routes = api::peer::router(floors.api.clone());
    let serve_http = move |stream, admitted| {
        let serving = api::peer::serve(stream, routes.clone());
        tokio::spawn(async move {
            serving.await;
            drop(admitted);
        });
    };
    let ear = peers::listen(listeners, &floors.transport, serve_http)?;
    words::serving(config, floors.api.header.member_id());
    Ok(ear)
}

/// Why a member ends.
enum End {
    Signal(SignalKind),
    Removed,
}

/// What a member ends for.
struct Ends {
    stop: StopSignal,
    is_removed: tokio::sync::watch::Receiver<bool>,
}

impl Ends {
    async fn wait(&mut self) -> End {
        let end = tokio::select! {
            signal = self.stop.wait() => End::Signal(signal),
            _ = self.is_removed.wait_for(|removed| *removed) => End::Removed,
        };
        match &end {
            End::Signal(signal) => tracing::info!(signal = signals::name(*signal), "received signal; shutting down"),
            End::Removed => tracing::warn!("this member was removed from the cluster; shutting down"),
        }
        end
    }
}

/// Where clients come in.
struct Doors {
    accepting: tokio::task::JoinSet<()>,
    door: Arc<Door>,
    stopping: tokio::sync::watch::Sender<()>,
}

impl Doors {
    fn open(config: &Config, api: &Arc<Api>, tls: Option<Tls>, ports: Vec<Port>, slots: &Slots) -> Self {
        let service = Service {
            table: Arc::new(Table::new(api.clone())),
            router: routes::routes(api),
            timeout: config.front.read_timeout,
        };
        let door = Arc::new(Door::new(config, tls, service));
        let (stopping, stopped) = tokio::sync::watch::channel(());
        let mut accepting = tokio::task::JoinSet::new();
        for port in ports {
            tracing::info!("ready to serve client requests");
            port.announce();
            accepting.spawn(door.clone().accept(port, slots.clone(), stopped.clone()));
        }
        Self { accepting, door, stopping }
    }

    async fn close(self, api: &Arc<Api>) {
        drop(self.stopping);
        self.accepting.join_all().await;
        self.door.close();
        api.hub.stop(); // Watches end at once; their clients look for another member.
        let _ = tokio::time::timeout(DRAIN, self.door.wait_until_empty()).await;
    }
}

/// Lets another voter lead before this one goes.
async fn hand_over(floors: &Floors) {
    let (node, this) = (&floors.api.node, floors.api.header.member_id());
    let electorate = node.readers().board.read().members.electorate();
    if node.status().leader() != this || electorate.voters == [this] {
        return;
    }
    let Some(to) = node.links().longest(|member| member != this && electorate.voters.contains(&member)) else {
        return tracing::warn!("{}", Error::Unhealthy);
    };
    let moved = floors.api.move_leadership(to, |leader| leader != this).await;
    let to = format!("{to:x}");
    if moved.is_ok() {
        tracing::info!(to, "leadership transferred");
    } else {
        tracing::warn!(to, "leadership transfer failed: another member will be elected");
    }
}

/// All floors, running.
struct Floors {
    api: Arc<Api>,
    threads: Threads,
    transport: Arc<Transport>,
}

impl Floors {
    /// Ends everything below the clients.
    async fn stop(self) {
        self.transport.stop();
        self.api.node.stop();
        let _ = tokio::task::spawn_blocking(move || self.threads.join()).await;
    }
}

/// How long any request may take.
fn request_timeout(config: &Config) -> Duration {
    REQUEST_TIMEOUT + 2 * config.election_timeout
}

async fn build(
    config: &Config,
    directory: &DataDir,
    client: Client,
    farewell: Arc<dyn Fn() + Send + Sync>,
) -> Result<Floors, Failure> {
    let place = log::Place::new(directory.log_dir());
    let place = if config.unsafe_no_fsync { place.without_syncs() } else { place };
    let (log, recovered) = SegmentLog::open(&place)?;
    let identity = recovered.identity;
    let databases = directory.databases();
    let database = databases.present()?;
    databases.tidy()?;
    let value_cache_bytes = config.value_cache_bytes as u64;
    let bounds = &config.bounds;
    let caches = Caches { block_bytes: bounds.block_cache_bytes, write_bytes: bounds.write_buffer_bytes };
    let engine: Arc<dyn Engine> = Arc::new(Rocks::open_with(&database, caches)?);
    let machine = Machine::open(engine.clone(), value_cache_bytes)?;
    bootstrap::refuse_anothers_data(config, identity.member_id, machine.members(), &client).await?;
    let quota_bytes = config.quota_bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    METRICS.quota_bytes.set(quota_bytes.max(0));
    let watch_settings = watch::Settings {
        ring_bytes: bounds.watch_ring_bytes,
        pending_bytes: bounds.watch_pending_bytes,
        all_pending_bytes: bounds.all_watch_pending_bytes,
        progress_interval: config.watch_progress_notify_interval,
        watches_per_stream: bounds.max_watches_per_stream,
    };
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
        speech: versions::speech(),
        raft: raft.clone(),
        links: links.clone(),
        shelf: shelf.clone(),
        depot: Box::new(Depot { databases: databases.clone(), value_cache_bytes, caches }),
        farewell: farewell.clone(),
        hurries: config.advance_first_election,
        patience: transport::Patience {
            dial: DIAL_TIMEOUT + config.election_timeout,
            write: DIAL_TIMEOUT + 2 * config.election_timeout,
            stall: SNAPSHOT_STALL,
            snapshot_rate: bounds.snapshot_bytes_per_second,
            queue_bytes: bounds.peer_queue_bytes,
            min_bytes_per_second: bounds.peer_min_bytes_per_second,
        },
        connections: transport::ConnectionLimits {
            per_address: bounds.peer_connections_per_address,
            before_hello: bounds.peer_connections_before_hello,
            hello_timeout: bounds.peer_hello_timeout,
        },
        max_request_bytes: config.max_request_bytes as u64,
    });
    let introduced = Members::introduced(engine.as_ref())?.into_iter();
    let parts = Parts {
        engine,
        machine,
        publisher,
        log: Box::new(log),
        recovered,
        post: Arc::new(transport.clone()),
        links,
        first_peers: introduced.map(|member| Peer { id: member.id, urls: member.peer_ur_ls }).collect(),
        shelf,
        copies: databases.copies(),
        farewell,
        logger: logging::raft_logger(),
    };
    let (node, threads) = Node::start(&settings, raft, parts)?;
    let read_threads = bounds.read_threads.unwrap_or_else(processors);
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
        pool: Pool::start(read_threads),
        ledger: Ledger::new(config.front.max_held_bytes),
        company: Company {
            client,
            strict: config.strict_reconfig_check,
            max_learners: config.max_learners,
            patience: settings.request_timeout,
            tick: config.heartbeat_interval,
            runtime: tokio::runtime::Handle::current(),
        },
        quota_bytes,
        vigil: Arc::default(),
        fast_keep_alive: config.feature_gates.is_open(Gate::FastLeaseKeepAlive),
        slow: Slow { call: config.warning_unary_request_duration, read: config.warning_apply_duration },
    };
    Ok(Floors { api: Arc::new(api), threads, transport })
}

fn settings(config: &Config, member_id: u64, ids: Arc<RequestIds>, quota_bytes: i64) -> Settings {
    let request_timeout = request_timeout(config);
    Settings {
        member_id,
        ids,
        clock: Clock::default(),
        timing: Timing {
            tick_ms: u64::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX),
            election_ticks: config.election_ticks(),
            pre_vote: config.pre_vote,
            patience_ms: u64::try_from(request_timeout.as_millis()).unwrap_or(u64::MAX),
            fixed_timeout: None,
        },
        request_timeout,
        catchup_entries: config.snapshot_catchup_entries,
        laggard_log_bytes: config.bounds.laggard_log_bytes,
        quota: Quota { bytes: quota_bytes },
        retention: match config.auto_compaction {
            AutoCompaction::Off => Policy::All,
            AutoCompaction::Periodic(period) => Policy::Period(period),
            AutoCompaction::Revisions(kept) => Policy::Revisions(i64::try_from(kept).unwrap_or(i64::MAX)),
        },
        habits: Habits {
            compaction_batch: config.compaction_batch_limit,
            compaction_pause: config.compaction_sleep_interval,
            compaction_range: compact::RANGE,
            hashed_bytes: if config.feature_gates.is_open(Gate::CompactHashCheck) {
                u64::MAX
            } else {
                compact::HASHED_BYTES
            },
            flush_after_bytes: config.bounds.flush_log_bytes,
            flush_after: config.bounds.flush_interval,
            flush_after_entries: config.snapshot_count,
        },
        slow_apply: config.warning_apply_duration,
        backlog: config.bounds.max_apply_backlog,
    }
}
