//! Builds the floors bottom-up, serves clients, stops top-down.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto, graceful::GracefulShutdown},
};
use prost::Message;
use tokio::{net::TcpListener, sync::oneshot};
use tower::ServiceExt;

use crate::{
    api::{
        self, Api, Limits, Table, grpc, header::Header, maintenance::ETCD_VERSION, pool::Pool, table::Handler, unary,
        unary::UnaryBody,
    },
    config::{AutoCompaction, Config, urls::Place},
    error::{Error, Halt},
    logging,
    node::{
        Node, Settings, Threads,
        applier::Quota,
        data_dir::{self, DataDir},
        identity::{ClusterId, MemberId, RequestIds},
        keeper::Habits,
        log::{self, Identity, LogStore, Position, SegmentLog},
        replica::Timing,
        retention::Policy,
    },
    proto::{
        etcdserverpb::Member,
        membershippb::{Attributes, ClusterMemberAttrSetRequest, ClusterVersionSetRequest},
    },
    state::{Kind, Machine, Members, Response},
    storage::{Engine, rocks::Rocks},
    watch,
};

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
/// Streams of one connection and the connection itself may have so much under way.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Larger header lists are refused.
const HEADER_LIST_BYTES: u32 = 64 << 10;
/// The server asks a silent client whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_hours(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

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
    if !DataDir::looks_initialised(&config.data_dir) {
        config.first_start().map_err(Failure::Refused)?; // Before anything is touched.
    }
    let mut listeners = Vec::new();
    for url in &config.listen_client_urls {
        listeners.push(bind(url).await?);
    }
    let mut stop =
        StopSignal::listen().map_err(|error| Failure::Refused(format!("cannot listen for signals: {error}")))?;
    let directory = DataDir::open(&config.data_dir)?;
    if !directory.is_initialised() {
        found_cluster(config, &directory)?;
    }
    let floors = build(config, &directory)?;
    publish(config, &floors).await?;
    tracing::info!("ready to serve client requests");
    let router = routes(&floors.api);
    let table = Arc::new(Table::new(floors.api.clone()));
    let graceful = Arc::new(GracefulShutdown::new());
    let (stopping, stopped) = tokio::sync::watch::channel(());
    let mut accepting = tokio::task::JoinSet::new();
    for listener in listeners {
        announce(&listener);
        let service = Service { table: table.clone(), router: router.clone() };
        accepting.spawn(accept(listener, service, config.max_concurrent_streams, graceful.clone(), stopped.clone()));
    }
    let signal = stop.wait().await;
    tracing::info!(signal, "received signal; shutting down");
    drop(stopping);
    accepting.join_all().await;
    floors.api.hub.stop(); // Watches end at once; their clients look for another member.
    if let Some(graceful) = Arc::into_inner(graceful) {
        let _ = tokio::time::timeout(DRAIN, graceful.shutdown()).await;
    }
    floors.api.node.stop();
    let _ = tokio::task::spawn_blocking(move || floors.threads.join()).await;
    tracing::info!({ "data-dir" = %config.data_dir.display() }, "closed etcd server");
    Ok(())
}

fn announce(listener: &TcpListener) {
    let address = listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
    tracing::info!(traffic = "grpc+http", address, "serving client traffic insecurely; this is strongly discouraged!");
}

async fn bind(url: &crate::config::urls::Url) -> Result<TcpListener, Failure> {
    match url.place() {
        Place::Tcp { host, port } => {
            let address = format!("{host}:{port}");
            TcpListener::bind(&address).await.map_err(|source| Failure::Bind { address, source })
        }
        Place::Unix(_) => Err(Failure::Refused(format!("{}: unix sockets are not supported yet", url.as_str()))),
    }
}

/// The first start of a cluster's only member: identity, log and database, all or nothing.
fn found_cluster(config: &Config, directory: &DataDir) -> Result<(), Failure> {
    let first = config.first_start().map_err(Failure::Refused)?;
    let member_id = MemberId::of_first(&first.peer_urls, &first.token);
    let cluster_id = ClusterId::of_founders(&[member_id]);
    let member = Member {
        id: member_id.get(),
        peer_ur_ls: first.peer_urls.iter().map(|url| url.as_str().to_owned()).collect(),
        ..Member::default()
    };
    tracing::info!(
        { "cluster-id" = %cluster_id, "local-member-id" = %member_id },
        "founding a cluster of one member"
    );
    // As if the entry that adds this member had been written, committed and forgotten: the first election is in term 2.
    let origin = Position { index: 1, term: 1 };
    let hard_state = raft::eraftpb::HardState { term: origin.term, commit: origin.index, ..Default::default() };
    let identity = Identity { cluster_id: cluster_id.get(), member_id: member_id.get() };
    directory.initialise(|draft| {
        SegmentLog::create(&log::Place::new(data_dir::log_in(draft)), identity, origin, &hard_state)?;
        let engine = Rocks::open(&data_dir::db_in(draft))?;
        let members = Members::new([member]);
        Machine::bootstrap(&engine, identity.cluster_id, &members, (origin.index, origin.term))
    })?;
    Ok(())
}

/// All floors, running.
struct Floors {
    api: Arc<Api>,
    threads: Threads,
}

fn build(config: &Config, directory: &DataDir) -> Result<Floors, Failure> {
    let (log, recovered) = SegmentLog::open(&log::Place::new(directory.log_dir()))?;
    let Identity { cluster_id, member_id } = recovered.identity;
    let engine: Arc<dyn Engine> = Arc::new(Rocks::open(&directory.db_dir())?);
    let machine = Machine::open(engine.clone(), config.value_cache_bytes as u64)?;
    let quota_bytes = match config.quota_bytes {
        None => -1,
        Some(0) => DEFAULT_QUOTA_BYTES,
        Some(bytes) => i64::try_from(bytes).unwrap_or(i64::MAX),
    };
    let log: Box<dyn LogStore> = Box::new(log);
    let watch_settings =
        watch::Settings { progress_interval: config.watch_progress_notify_interval, ..watch::Settings::default() };
    let (publisher, hub) = watch::Hub::start(machine.readers().keys, watch_settings);
    let member = MemberId::new(member_id).ok_or_else(|| Failure::Refused("the log names no member".into()))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let started_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let ids = Arc::new(RequestIds::new(member, started_ms));
    let settings = settings(config, member_id, ids.clone(), quota_bytes);
    let (node, threads) = Node::start(&settings, engine, machine, publisher, log, &recovered, &logging::raft_logger())?;
    let api = Api {
        header: Header::new(cluster_id, member_id, node.status().clone()),
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
    Ok(Floors { api: Arc::new(api), threads })
}

fn settings(config: &Config, member_id: u64, ids: Arc<RequestIds>, quota_bytes: i64) -> Settings {
    Settings {
        member_id,
        ids,
        timing: Timing {
            tick_ms: u64::try_from(config.heartbeat_interval.as_millis()).unwrap_or(u64::MAX),
            election_ticks: config.election_ticks(),
            pre_vote: config.pre_vote,
        },
        request_timeout: REQUEST_TIMEOUT + 2 * config.election_timeout,
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
        },
        slow_apply: config.warning_apply_duration,
        backlog: BACKLOG,
    }
}

/// Tells the cluster who this member is and which version it speaks; when that is agreed, a leader exists.
async fn publish(config: &Config, floors: &Floors) -> Result<(), Failure> {
    let api = &floors.api;
    let attributes = Attributes {
        name: config.name.clone(),
        client_urls: config.advertise_client_urls.iter().map(|url| url.as_str().to_owned()).collect(),
    };
    let request =
        ClusterMemberAttrSetRequest { member_id: api.header.member_id(), member_attributes: Some(attributes) };
    agree(api, Kind::MemberAttributesSet, &request).await?;
    let member = format!("{:x}", api.header.member_id());
    tracing::info!({ "local-member-id" = member }, "published local member to cluster through raft");
    let version = ETCD_VERSION.rsplit_once('.').map_or_else(String::new, |(minor, _)| format!("{minor}.0"));
    if api.readers().board.read().cluster_version != version {
        agree(api, Kind::ClusterVersionSet, &ClusterVersionSetRequest { ver: version }).await?;
    }
    Ok(())
}

async fn agree(api: &Arc<Api>, kind: Kind, request: &impl Message) -> Result<Response, Failure> {
    loop {
        catch_up(api).await?;
        let (tell, told) = oneshot::channel();
        api.node.propose(
            api.ids.next(),
            kind,
            &request.encode_to_vec(),
            Box::new(move |outcome| _ = tell.send(outcome)),
        );
        match told.await.unwrap_or(Err(Error::Stopped)) {
            Ok(response) => return Ok(response),
            Err(error @ (Error::Timeout | Error::DeadlineExceeded | Error::TooManyRequests)) => {
                tracing::warn!(%error, "failed to publish local member to cluster through raft");
            }
            Err(error) => return Err(Failure::Refused(error.to_string())),
        }
    }
}

/// Returns when everything that was ever acknowledged can be read here. After a crash that is when the log is replayed; until
/// then the node is too far behind to take proposals, the server's own included.
async fn catch_up(api: &Arc<Api>) -> Result<(), Failure> {
    loop {
        let (tell, told) = oneshot::channel();
        api.node.read_barrier(Box::new(move |outcome| _ = tell.send(outcome)));
        match told.await.unwrap_or(Err(Error::Stopped)) {
            Ok(()) => return Ok(()),
            Err(error @ (Error::Timeout | Error::DeadlineExceeded)) => {
                let (applied, committed) = (api.node.status().applied(), api.node.status().committed());
                tracing::warn!(%error, applied, committed, "still catching up with the log");
            }
            Err(error) => return Err(Failure::Refused(error.to_string())),
        }
    }
}

/// Everything on the client port that the method table does not hold.
fn routes(api: &Arc<Api>) -> axum::Router {
    let (health, health_service) = tonic_health::server::health_reporter();
    tokio::spawn(async move { health.set_service_status("", tonic_health::ServingStatus::Serving).await });
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
        .build_v1()
        .expect("the descriptors were made by the build");
    let grpc = tonic::service::Routes::new(health_service).add_service(reflection).into_axum_router();
    let grpc = grpc.fallback(|| async { grpc::unknown_method() });
    let plain = api::http::router(api.clone());
    axum::Router::new().fallback(move |request: axum::extract::Request| {
        let content = request.headers().get(http::header::CONTENT_TYPE);
        let is_grpc = content.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        let router = if is_grpc { grpc.clone() } else { plain.clone() };
        router.oneshot(request)
    })
}

/// What one connection is served with.
#[derive(Clone)]
struct Service {
    table: Arc<Table>,
    router: axum::Router,
}

type Answer = Result<http::Response<Body>, std::convert::Infallible>;

/// The body of a response: small and plain for a unary call, boxed for everything else.
enum Body {
    Unary(UnaryBody),
    Other(axum::body::Body),
}

impl Service {
    /// The table's methods first: they are what everybody waits for. Everything but a plain unary call is boxed, so that
    /// the future of one is small.
    async fn answer(self, request: http::Request<Incoming>) -> Answer {
        let Some(method) = self.table.find(request.uri().path()).cloned() else {
            let response = Box::pin(self.router.oneshot(request.map(axum::body::Body::new))).await;
            return response.map(|response| response.map(Body::Other));
        };
        method.started();
        if let Handler::Unary(handler) = method.handler
            && !grpc::is_compressed(request.headers())
        {
            let metadata = grpc::metadata(request.headers());
            let response = unary::serve(self.table, method, handler, metadata, request.into_body()).await;
            return Ok(response.map(Body::Unary));
        }
        let response = Box::pin(grpc::serve(self.table, method, request)).await;
        Ok(response.map(|body| Body::Other(axum::body::Body::new(body))))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        match self.get_mut() {
            Self::Unary(body) => Pin::new(body).poll_frame(context),
            Self::Other(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Unary(body) => body.is_end_stream(),
            Self::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Unary(body) => body.size_hint(),
            Self::Other(body) => body.size_hint(),
        }
    }
}

async fn accept(
    listener: TcpListener,
    service: Service,
    max_streams: u32,
    graceful: Arc<GracefulShutdown>,
    mut stopped: tokio::sync::watch::Receiver<()>,
) {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http2()
        .timer(hyper_util::rt::TokioTimer::new())
        .max_concurrent_streams(max_streams)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(HEADER_LIST_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    let builder = Arc::new(builder);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.changed() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                let (builder, service, watcher) = (builder.clone(), service.clone(), graceful.watcher());
                tokio::spawn(async move {
                    let answer = hyper::service::service_fn(move |request| service.clone().answer(request));
                    let connection = builder.serve_connection(TokioIo::new(stream), answer).into_owned();
                    log_end(Patient::new(watcher.watch(connection)).await, peer);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: what is open goes on, and closing some makes room.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// A connection that lets the tasks of its calls go first.
///
/// The first answer wakes the connection, and the scheduler would run it at once, to write that one answer. Going to the
/// back of the queue first, it finds the answers of all calls that were ready, and writes them with one system call.
struct Patient<C> {
    connection: Pin<Box<C>>,
    waited: bool,
}

impl<C> Patient<C> {
    fn new(connection: C) -> Self {
        Self { connection: Box::pin(connection), waited: false }
    }
}

impl<C: Future> Future for Patient<C> {
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<C::Output> {
        self.waited = !self.waited;
        if self.waited {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.connection.as_mut().poll(context)
    }
}

fn log_end(outcome: Result<(), Box<dyn std::error::Error + Send + Sync>>, peer: SocketAddr) {
    if let Err(error) = outcome {
        tracing::debug!(%peer, %error, "a connection ended badly");
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
