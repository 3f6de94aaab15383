//! The composition root: builds the layers bottom-up, serves clients, and stops the layers top-down.

mod signals;
mod startup_log;

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::signal::unix::SignalKind;

use crate::{
    cluster::{
        Cluster, bootstrap, capability, corruption_check, peer_client::PeerClient, publish::publish, round_trips,
        version,
    },
    config::{AutoCompaction, Config, auth::TokenKind, gates::Gate, limits::Limits},
    error::{Error, Halt, StartError},
    frontend::{
        grpc::Grpc,
        listener::{self, Acceptor, connection_limit::ConnectionLimit},
        peer_http, peer_listener,
        peer_listener::PeerListener,
        routes::Traffic,
    },
    logging,
    metrics::{self, METRICS},
    mvcc::compact,
    net::{
        listener::{Port, bind_all, bind_peer_ports},
        tls::{self, ClientTls, ServerTls, TlsSettings},
    },
    node::{
        Node, Parts, Settings, Threads,
        auto_compaction::Policy,
        background::BackgroundConfig,
        clock::Clock,
        data_dir::DataDir,
        identity::{MemberId, RequestIds},
        inbox::Inbox,
        low_priority::LowPriorityThreads,
        messages::Peer,
        quota::Quota,
        read_pool::ReadPool,
        replica::Timing,
        snapshot::OutboundSlot,
        snapshot_receiver::SnapshotReceiver,
        status::Connectivity,
        transport::{self, Transport},
    },
    raft_log::{LogLocation, SegmentLog},
    service::{
        RequestLimits, Service,
        auth::{Authentication, Tokens, jwt::Jwt, passwords::Passwords},
        lease,
    },
    slow_log::Thresholds,
    state::{Machine, Members},
    storage::{
        Engine,
        rocks::{MemoryLimits, Rocks},
    },
    watch,
};
use http2::ledger::Ledger;
use signals::StopSignal;

/// How long calls in progress may take to end when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a removed member keeps running, so that its clients receive the outcome of the removal.
const REMOVED_GRACE: Duration = Duration::from_secs(1);
/// How often changed certificates are looked for, if there are no connections.
const TLS_REFRESH_INTERVAL: Duration = Duration::from_mins(1);
/// Connections to `--listen-metrics-urls`. They have a limit of their own, so that many clients cannot keep probes out.
const METRICS_CONNECTIONS: usize = 128;
/// How long connecting to a member may take, in addition to an election timeout.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a transfer of a snapshot may stall because of the disk of its sender or receiver.
const SNAPSHOT_STALL: Duration = Duration::from_mins(1);
/// How long tasks that still run after everything has stopped may take to end.
const RUNTIME_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// Runs a server until a signal stops it.
#[must_use]
pub fn run(config: &Config) -> ExitCode {
    // One processor is left to the raft, log and apply work that all writes depend on.
    let api_threads = config.limits.api_threads.unwrap_or_else(|| processors().saturating_sub(1).max(1));
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = match builder.worker_threads(api_threads).enable_all().thread_name("api").build() {
        Ok(runtime) => runtime,
        Err(error) => return logging::fatal("discovery failed", error),
    };
    metrics::install_http2();
    export_settings(config);
    let end = runtime.block_on(serve(config));
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN_TIMEOUT);
    match end {
        Ok(signal) => signal.map_or(ExitCode::SUCCESS, signals::exit_by),
        Err(error) => logging::fatal("discovery failed", error),
    }
}

/// Exports what the configuration says.
fn export_settings(config: &Config) {
    if config.extensive_metrics {
        metrics::measure_calls();
    }
    for (name, stage, is_on) in config.feature_gates.states() {
        METRICS.feature_enabled.with_label_values(&[name, stage]).set(i64::from(is_on));
    }
    let limits = &config.limits;
    for (part, bytes) in [
        ("value_cache", config.value_cache_bytes),
        ("block_cache", limits.block_cache_bytes),
        ("watch_ring", limits.watch_ring_bytes),
        ("watch_pending", limits.all_watch_pending_bytes),
        ("log", limits.lagging_log_bytes),
    ] {
        metrics::set_memory_limit_bytes(part, bytes);
    }
    METRICS.held_bytes_limit.set(i64::try_from(config.frontend.max_held_bytes).unwrap_or(i64::MAX));
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Serves until the server stops. Returns the signal that stopped it; None if this member was removed.
async fn serve(config: &Config) -> Result<Option<SignalKind>, StartError> {
    let outbound = Arc::new(ClientTls::open(&config.tls.peers)?);
    let client = PeerClient::new(DIAL_TIMEOUT + config.election_timeout, outbound.clone());
    let is_first_start = !DataDir::looks_initialised(&config.data_dir);
    // Before the data directory is touched, and before a port is open: other members that are starting would take an open port
    // for a member that may answer.
    let plan = if is_first_start { Some(bootstrap::plan(config, &client).await?) } else { None };
    let tls = Tls::open(config, outbound)?;
    let ports = bind_all(&config.listen_client_urls, config.socket_reuse_port).await?;
    let http_ports = bind_all(&config.listen_client_http_urls, config.socket_reuse_port).await?;
    let quick_urls = config.quick_api.as_ref().map_or(&[][..], |quick_api| &quick_api.listen_urls);
    let quick_ports = bind_all(quick_urls, config.socket_reuse_port).await?;
    let peer_ports = bind_peer_ports(&config.listen_peer_urls, config.socket_reuse_port).await?;
    let limits = &config.limits;
    let connection_limit = ConnectionLimit::new(limits.max_connections, limits.max_connections_per_address)?;
    let directory = DataDir::open(&config.data_dir)?;
    startup_log::starting(config, directory.is_initialised());
    bootstrap::prepare(config, &client, plan, &directory).await?;
    let (removed, is_removed) = tokio::sync::watch::channel(false);
    let running = build(config, &directory, client, &tls, Arc::new(move || _ = removed.send_replace(true))).await?;
    // Until here a signal ends the process at once: there is nothing to shut down in order yet.
    let stop =
        StopSignal::listen().map_err(|error| StartError::Refused(format!("cannot listen for signals: {error}")))?;
    let mut stop_events = StopEvents { signals: stop, is_removed };
    let mut frontends = Frontends::new(config, &running.service, &tls);
    let peer_listener = match serve_peers_and_metrics(config, &running, peer_ports, &tls, &mut frontends).await {
        Ok(peer_listener) => peer_listener,
        Err(error) => {
            running.stop().await;
            return Err(error);
        }
    };
    let published = tokio::select! {
        published = publish(config, &running.service.cluster) => {
            published.map_err(|error| Err(StartError::Refused(error.to_string())))
        }
        reason = stop_events.wait() => Err(match reason {
            StopReason::Signal(signal) => Ok(Some(signal)),
            StopReason::Removed => Err(StartError::Refused("server is stopping: this member was removed".to_owned())),
        }),
    };
    let attributes = match published {
        Ok(attributes) => attributes,
        Err(end) => {
            frontends.close(&running.service).await;
            peer_listener.close();
            running.stop().await;
            return end;
        }
    };
    tokio::spawn(capability::maintain(running.service.cluster.clone(), attributes));
    tokio::spawn(version::update_periodically(running.service.cluster.clone()));
    tokio::spawn(round_trips::measure(running.service.cluster.clone()));
    corruption_check::start(config, &running.service.cluster);
    if http_ports.is_empty() {
        frontends.open(Traffic::GrpcAndHttp, ports, &connection_limit);
    } else {
        frontends.open(Traffic::Grpc, ports, &connection_limit);
        frontends.open(Traffic::Http, http_ports, &connection_limit);
    }
    if let Some(quick_api) = &config.quick_api {
        let numbers_are_members = quick_api.numbers_are_members;
        frontends.open(Traffic::Quick { numbers_are_members }, quick_ports, &connection_limit);
    }
    tokio::spawn(tls.refresh_periodically());
    signals::notify_ready();
    let leader_watch = tokio::spawn(poll_leader(running.service.clone(), config.election_timeout));
    let reason = stop_events.wait().await;
    if let StopReason::Removed = reason {
        tokio::time::sleep(REMOVED_GRACE).await;
    }
    startup_log::ending("closing", config);
    leader_watch.abort();
    frontends.close(&running.service).await;
    transfer_leadership(&running).await;
    peer_listener.close();
    running.stop().await;
    startup_log::ending("closed", config);
    Ok(match reason {
        StopReason::Signal(signal) => Some(signal),
        StopReason::Removed => None,
    })
}

/// Checks once per election timeout whether there is a leader, for all streams that require one.
async fn poll_leader(service: Arc<Service>, election_timeout: Duration) {
    loop {
        tokio::time::sleep(election_timeout).await;
        service.leader_watch.poll(service.node().status().leader() != 0);
    }
}

/// The certificates of this server.
struct Tls {
    /// None: no listen URL asks for TLS.
    clients: Option<Arc<ServerTls>>,
    peers: Option<Arc<ServerTls>>,
    outbound: Arc<ClientTls>,
}

impl Tls {
    /// Generates what is to be generated, and reads all files for the first time.
    fn open(config: &Config, outbound: Arc<ClientTls>) -> Result<Self, StartError> {
        config.tls.generated.iter().try_for_each(tls::generate)?;
        let server = |settings: &TlsSettings| {
            let pair = settings.server.as_ref();
            let opened = pair.map(|pair| ServerTls::open(settings, pair, config.tls.max_waiting_handshakes));
            opened.transpose().map(|tls| tls.map(Arc::new))
        };
        let clients = config.tls.clients.as_ref().map(server).transpose()?.flatten();
        Ok(Self { clients, peers: server(&config.tls.peers)?, outbound })
    }

    /// Notices changed files although there are no connections, and that certificates expire.
    async fn refresh_periodically(self) {
        let tls = Arc::new(self);
        loop {
            tokio::time::sleep(TLS_REFRESH_INTERVAL).await;
            let tls = tls.clone();
            let refresh = move || {
                tls.clients.iter().chain(&tls.peers).for_each(|server| server.refresh());
                tls.outbound.refresh();
            };
            let _ = tokio::task::spawn_blocking(refresh).await; // The disk may hang.
        }
    }
}

/// Starts to serve other members, after the initial corruption check, and metrics.
async fn serve_peers_and_metrics(
    config: &Config,
    running: &RunningServer,
    ports: Vec<Port>,
    tls: &Tls,
    frontends: &mut Frontends<'_>,
) -> Result<PeerListener, StartError> {
    if config.feature_gates.is_enabled(Gate::InitialCorruptCheck) {
        corruption_check::check_before_serving(&running.service.cluster).await.map_err(StartError::Refused)?;
    }
    // Not earlier, as in etcd: before this there is nothing to ask, and a probe that is refused says so.
    let metrics_ports = bind_all(&config.listen_metrics_urls, config.socket_reuse_port).await?;
    let limit = ConnectionLimit::new(Some(METRICS_CONNECTIONS), None)?;
    let routes = peer_http::router(running.service.clone());
    let serve_http = move |stream, admitted| {
        let serving = peer_http::serve(stream, routes.clone());
        tokio::spawn(async move {
            serving.await;
            drop(admitted);
        });
    };
    let peer_listener = peer_listener::listen(ports, tls.peers.clone(), &running.transport, serve_http)?;
    frontends.open(Traffic::Metrics, metrics_ports, &limit);
    startup_log::serving(config, running.service.cluster.member_id);
    Ok(peer_listener)
}

/// Why a member stops.
enum StopReason {
    Signal(SignalKind),
    Removed,
}

/// The events that stop a member.
struct StopEvents {
    signals: StopSignal,
    is_removed: tokio::sync::watch::Receiver<bool>,
}

impl StopEvents {
    async fn wait(&mut self) -> StopReason {
        let reason = tokio::select! {
            signal = self.signals.wait() => StopReason::Signal(signal),
            _ = self.is_removed.wait_for(|removed| *removed) => StopReason::Removed,
        };
        match &reason {
            StopReason::Signal(signal) => {
                tracing::info!(signal = signals::name(*signal), "received signal; shutting down");
            }
            StopReason::Removed => tracing::warn!("this member was removed from the cluster; shutting down"),
        }
        reason
    }
}

/// The listeners for clients and for metrics, and the connections that they have accepted.
struct Frontends<'a> {
    config: &'a Config,
    grpc: Arc<Grpc>,
    tls: Option<Arc<ServerTls>>,
    accept_tasks: tokio::task::JoinSet<()>,
    acceptors: Vec<Arc<Acceptor>>,
    stopping: tokio::sync::watch::Sender<()>,
}

impl<'a> Frontends<'a> {
    /// Nothing is open yet.
    fn new(config: &'a Config, service: &Arc<Service>, tls: &Tls) -> Self {
        Self {
            config,
            grpc: Arc::new(Grpc::new(service.clone())),
            tls: tls.clients.clone(),
            accept_tasks: tokio::task::JoinSet::new(),
            acceptors: Vec::new(),
            stopping: tokio::sync::watch::Sender::new(()),
        }
    }

    /// Accepts connections at these ports.
    fn open(&mut self, traffic: Traffic, ports: Vec<Port>, limit: &ConnectionLimit) {
        if ports.is_empty() {
            return;
        }
        let acceptor = Arc::new(Acceptor::new(traffic, self.config, self.tls.clone(), &self.grpc));
        for port in ports {
            listener::announce(&port, traffic);
            let stopped = self.stopping.subscribe();
            self.accept_tasks.spawn(acceptor.clone().accept(port, limit.clone(), stopped));
        }
        self.acceptors.push(acceptor);
    }

    async fn close(self, service: &Service) {
        drop(self.stopping);
        self.accept_tasks.join_all().await;
        self.acceptors.iter().for_each(|acceptor| acceptor.close());
        service.hub.stop(); // Watches end at once; their clients then connect to another member.
        let emptied = async {
            for acceptor in &self.acceptors {
                acceptor.wait_until_empty().await;
            }
        };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, emptied).await;
    }
}

/// Makes another voter the leader before this member stops.
async fn transfer_leadership(running: &RunningServer) {
    let (node, this) = (running.service.node(), running.service.cluster.member_id);
    let voters_and_learners = node.readers().cluster.read().members.voters_and_learners();
    if node.status().leader() != this || voters_and_learners.voters == [this] {
        return;
    }
    let Some(to) =
        node.connectivity().longest_connected(|member| member != this && voters_and_learners.voters.contains(&member))
    else {
        return tracing::warn!("{}", Error::Unhealthy);
    };
    let moved = running.service.cluster.move_leadership(to, |leader| leader != this).await;
    let to = format!("{to:x}");
    if moved.is_ok() {
        tracing::info!(to, "leadership transferred");
    } else {
        tracing::warn!(to, "leadership transfer failed: another member will be elected");
    }
}

/// All layers below the frontends, running.
struct RunningServer {
    service: Arc<Service>,
    threads: Threads,
    transport: Arc<Transport>,
}

impl RunningServer {
    /// Stops everything below the frontends.
    async fn stop(self) {
        self.transport.stop();
        self.service.node().stop();
        let _ = tokio::task::spawn_blocking(move || self.threads.join()).await;
    }
}

async fn build(
    config: &Config,
    directory: &DataDir,
    client: PeerClient,
    tls: &Tls,
    on_removed: Arc<dyn Fn() + Send + Sync>,
) -> Result<RunningServer, StartError> {
    let place = LogLocation::new(directory.log_dir());
    let place = if config.unsafe_no_fsync { place.without_syncs() } else { place };
    let (log, recovered) = SegmentLog::open(&place)?;
    let identity = recovered.identity;
    let databases = directory.databases();
    let database = databases.current_existing()?;
    databases.remove_unused()?;
    let value_cache_bytes = config.value_cache_bytes as u64;
    let limits = &config.limits;
    let caches = MemoryLimits { block_bytes: limits.block_cache_bytes, write_bytes: limits.write_buffer_bytes };
    let engine: Arc<dyn Engine> = Arc::new(Rocks::open_with(&database, caches)?);
    let known_level = config.auth.max_capability_level;
    let machine = open_machine(engine.clone(), value_cache_bytes, known_level)?;
    bootstrap::refuse_data_of_another_member(config, identity.member_id, machine.members(), &client).await?;
    let quota_bytes = config.quota_bytes.map_or(-1, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
    METRICS.quota_bytes.set(quota_bytes.max(0));
    let (publisher, hub) = watch::Hub::start(machine.readers().keys, watch_settings(config));
    let member = MemberId::new(identity.member_id)
        .ok_or_else(|| StartError::Refused("the raft log contains no member ID".into()))?;
    let ids = Arc::new(request_ids(member));
    let settings = settings(config, identity.member_id, ids.clone(), quota_bytes);
    let (raft, outbound_slot) = (Arc::new(Inbox::default()), Arc::new(OutboundSlot::default()));
    let connectivity = Arc::new(Connectivity::default());
    let transport = Transport::new(transport::TransportParts {
        identity,
        protocol_version: version::protocol_version(),
        raft: raft.clone(),
        connectivity: connectivity.clone(),
        outbound_slot: outbound_slot.clone(),
        snapshot_store: Box::new(SnapshotReceiver {
            databases: databases.clone(),
            value_cache_bytes,
            caches,
            known_level,
        }),
        on_removed: on_removed.clone(),
        advance_first_election: config.advance_first_election,
        tls: tls.outbound.clone(),
        limits: transport_limits(config),
        connections: peer_connection_limits(limits),
        max_request_bytes: config.max_request_bytes as u64,
    });
    let join_contacts = Members::join_contacts(engine.as_ref())?.into_iter();
    let parts = Parts {
        engine,
        machine,
        publisher,
        log: Box::new(log),
        recovered,
        message_sender: Arc::new(transport.clone()),
        connectivity,
        first_peers: join_contacts.map(|member| Peer { id: member.id, urls: member.peer_ur_ls }).collect(),
        outbound_slot,
        copies: databases.copies(),
        on_removed,
        logger: logging::raft_logger(),
    };
    let (node, threads) = Node::start(&settings, raft, parts)?;
    let read_threads = limits.read_threads.unwrap_or_else(processors);
    let cluster = Cluster {
        node,
        ids,
        cluster_id: identity.cluster_id,
        member_id: identity.member_id,
        client,
        strict_reconfig_check: config.strict_reconfig_check,
        known_level,
        max_learners: config.max_learners,
        request_timeout: settings.request_timeout,
        heartbeat_interval: config.heartbeat_interval,
        runtime: tokio::runtime::Handle::current(),
        read_pool: ReadPool::start(read_threads),
        scans: scans("peer-scans", config)?,
    };
    let service = Arc::new(service(config, cluster, hub, quota_bytes)?);
    Ok(RunningServer { service, threads, transport })
}

/// The IDs of this run's requests: they begin with the time, so that no run repeats those of an earlier one.
fn request_ids(member: MemberId) -> RequestIds {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    RequestIds::new(member, u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Opens the state machine of a member that knows no more than this capability level.
fn open_machine(engine: Arc<dyn Engine>, value_cache_bytes: u64, known_level: u64) -> Result<Machine, Halt> {
    let mut machine = Machine::open(engine, value_cache_bytes)?;
    machine.limit_level(known_level)?;
    Ok(machine)
}

/// Reads the keys of tokens, and starts the threads that check passwords.
fn authentication(config: &Config) -> Result<Authentication, StartError> {
    let tokens = match &config.auth.tokens {
        TokenKind::Simple => Tokens::Simple,
        TokenKind::Jwt(jwt) => Tokens::Jwt(Arc::new(Jwt::open(jwt).map_err(StartError::Refused)?)),
        TokenKind::None => Tokens::None,
    };
    // Half of the processors are left to what serves requests, whatever the scheduler thinks of priorities.
    let threads = (processors() / 2).max(1);
    let passwords = Passwords::start(config.auth.bcrypt_cost, config.auth.max_waiting_logins, threads)
        .map_err(|error| StartError::Refused(format!("cannot start the threads that check passwords: {error}")))?;
    let certificates_name_users = config.tls.certificates_name_users;
    Ok(Authentication { tokens, passwords: Arc::new(passwords), certificates_name_users })
}

fn service(config: &Config, cluster: Cluster, hub: Arc<watch::Hub>, quota_bytes: i64) -> Result<Service, StartError> {
    Ok(Service {
        cluster: Arc::new(cluster),
        hub,
        limits: RequestLimits {
            max_txn_ops: config.max_txn_ops,
            max_txn_depth: config.limits.max_txn_depth,
            max_request_bytes: config.max_request_bytes,
            max_answer_bytes: config.limits.max_answer_bytes,
            max_leases: config.limits.max_leases,
            min_lease_seconds: lease::min_seconds(config.election_ticks(), config.heartbeat_interval),
        },
        authentication: authentication(config)?,
        scans: scans("scans", config)?,
        ledger: Ledger::new(config.frontend.max_held_bytes),
        quota_bytes,
        leader_watch: Arc::default(),
        fast_keep_alive: config.feature_gates.is_enabled(Gate::FastLeaseKeepAlive),
        thresholds: thresholds(config),
    })
}

fn thresholds(config: &Config) -> Thresholds {
    Thresholds { call: config.warning_unary_request_duration, apply: config.warning_apply_duration }
}

/// A thread for hashes.
fn scans(name: &str, config: &Config) -> Result<LowPriorityThreads, StartError> {
    LowPriorityThreads::start(name, 1, config.limits.max_waiting_hashes)
        .map_err(|error| StartError::Refused(format!("cannot start the thread for hashes: {error}")))
}

fn watch_settings(config: &Config) -> watch::Settings {
    watch::Settings {
        ring_bytes: config.limits.watch_ring_bytes,
        pending_bytes: config.limits.watch_pending_bytes,
        all_pending_bytes: config.limits.all_watch_pending_bytes,
        progress_interval: config.watch_progress_notify_interval,
        watches_per_stream: config.limits.max_watches_per_stream,
        watches: config.limits.max_watches,
    }
}

fn peer_connection_limits(limits: &Limits) -> transport::ConnectionLimits {
    transport::ConnectionLimits {
        per_address: limits.peer_connections_per_address,
        before_hello: limits.peer_connections_before_hello,
        hello_timeout: limits.peer_hello_timeout,
    }
}

fn transport_limits(config: &Config) -> transport::TransportLimits {
    transport::TransportLimits {
        dial: DIAL_TIMEOUT + config.election_timeout,
        write: DIAL_TIMEOUT + 2 * config.election_timeout,
        stall: SNAPSHOT_STALL,
        snapshot_rate: config.limits.snapshot_bytes_per_second,
        queue_bytes: config.limits.peer_queue_bytes,
        min_bytes_per_second: config.limits.peer_min_bytes_per_second,
    }
}

fn settings(config: &Config, member_id: u64, ids: Arc<RequestIds>, quota_bytes: i64) -> Settings {
    let request_timeout = config.request_timeout();
    Settings {
        member_id,
        ids,
        clock: Clock::default(),
        timing: Timing {
            tick_ms: u64::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX),
            election_ticks: config.election_ticks(),
            pre_vote: config.pre_vote,
            request_timeout_ms: u64::try_from(request_timeout.as_millis()).unwrap_or(u64::MAX),
            fixed_timeout: None,
        },
        request_timeout,
        catchup_entries: config.snapshot_catchup_entries,
        lagging_log_bytes: config.limits.lagging_log_bytes,
        quota: Quota { bytes: quota_bytes },
        retention: match config.auto_compaction {
            AutoCompaction::Off => Policy::All,
            AutoCompaction::Periodic(period) => Policy::Period(period),
            AutoCompaction::Revisions(kept) => Policy::Revisions(i64::try_from(kept).unwrap_or(i64::MAX)),
        },
        background_config: BackgroundConfig {
            compaction_batch: config.compaction_batch_limit,
            compaction_pause: config.compaction_sleep_interval,
            compaction_range: compact::RANGE_DELETE_MIN,
            hashed_bytes: if config.feature_gates.is_enabled(Gate::CompactHashCheck) {
                u64::MAX
            } else {
                compact::MAX_HASHED_HISTORY_BYTES
            },
            flush_after_bytes: config.limits.flush_log_bytes,
            flush_after: config.limits.flush_interval,
            flush_after_entries: config.snapshot_count,
        },
        thresholds: thresholds(config),
        backlog: config.limits.max_apply_backlog,
        token_ttl: config.auth.simple_token_ttl,
    }
}
