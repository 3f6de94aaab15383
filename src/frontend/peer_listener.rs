//! The peer port: raft streams, and HTTP for everything else. The first byte decides.

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::{
    error::StartError,
    net::{
        listener::{Port, Schemes},
        stream::{Socket, Stream},
        tls::{self, ServerTls},
    },
    node::transport::{AdmittedConnection, ConnectionKind, PREFACE, Transport},
};

/// How long tasks that still run when the port is closed may take to end.
const RUNTIME_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// The open peer port.
pub struct PeerListener {
    closing: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl PeerListener {
    /// Closes the port, and the HTTP connections that it has accepted.
    pub fn close(self) {
        drop(self.closing);
        let _ = self.thread.join(); // If the thread has panicked, the port is closed too.
    }
}

/// Serves the HTTP requests of a connection.
pub trait ServeHttp: Fn(Stream, AdmittedConnection) + Clone + Send + Sync + 'static {}

impl<F: Fn(Stream, AdmittedConnection) + Clone + Send + Sync + 'static> ServeHttp for F {}

/// Accepts peer connections on a thread of their own, so that clients cannot delay them. `tls` is needed if a port accepts TLS.
pub fn listen(
    ports: Vec<Port>,
    tls: Option<Arc<ServerTls>>,
    transport: &Arc<Transport>,
    serve_http: impl ServeHttp,
) -> Result<PeerListener, StartError> {
    let cannot = |error: io::Error| StartError::Refused(format!("cannot listen for peers: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    for port in &ports {
        let address = port.address();
        let Schemes { plain, secure } = port.schemes();
        tracing::info!(address, plain, secure, "serving peer traffic");
    }
    let ports: Vec<_> = {
        let _entered = runtime.enter();
        ports.into_iter().map(Port::move_to_this_runtime).collect::<Result<_, _>>().map_err(cannot)?
    };
    let connections = Connections { transport: transport.clone(), tls, serve_http };
    let (closing, closed) = oneshot::channel::<()>();
    let run = move || {
        runtime.block_on(async move {
            let mut accepting = tokio::task::JoinSet::new();
            for port in ports {
                accepting.spawn(accept(port, connections.clone()));
            }
            let _ = closed.await;
        });
        runtime.shutdown_timeout(RUNTIME_SHUTDOWN_TIMEOUT);
    };
    let thread = thread::Builder::new().name("peer".to_owned()).spawn(run).map_err(cannot)?;
    Ok(PeerListener { closing, thread })
}

/// What connections are passed to.
#[derive(Clone)]
struct Connections<F> {
    transport: Arc<Transport>,
    tls: Option<Arc<ServerTls>>,
    serve_http: F,
}

async fn accept(port: Port, connections: Connections<impl ServeHttp>) {
    loop {
        match port.accept().await {
            Ok(socket) => {
                let Some(address) = socket.peer_address() else { continue }; // It is closed already.
                let Some(admitted) = connections.transport.admit(&socket, address.ip()) else { continue };
                tokio::spawn(serve(connections.clone(), port.schemes(), socket, admitted));
            }
            Err(error) => {
                // Most likely out of file descriptors: open connections are still served, and some will be closed.
                tracing::warn!(%error, "cannot accept a peer connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Identifies a connection by its first byte, below TLS if there is TLS.
async fn serve(
    connections: Connections<impl ServeHttp>,
    schemes: Schemes,
    socket: Socket,
    admitted: AdmittedConnection,
) {
    let deadline = admitted.hello_deadline();
    let address = admitted.address();
    let Ok(mut stream) = connections.with_tls(schemes, socket, deadline).await else { return }; // Logged and counted there.
    match tokio::time::timeout_at(deadline.into(), stream.peek_byte()).await {
        Ok(Ok(Some(first))) if first == PREFACE[0] => pass_to_transport(&connections.transport, stream, admitted),
        Ok(Ok(Some(_))) => {
            admitted.set_kind(ConnectionKind::Http);
            (connections.serve_http)(stream, admitted);
        }
        Ok(Ok(None)) => tracing::debug!(%address, "peer connection closed before its first byte"),
        Ok(Err(error)) => tracing::debug!(%address, %error, "peer connection closed before its first byte"),
        Err(_) => connections.transport.record_hello_timeout(address),
    }
}

impl<F> Connections<F> {
    /// Performs the TLS handshake, if the connection begins with one.
    async fn with_tls(&self, schemes: Schemes, socket: Socket, deadline: Instant) -> io::Result<Stream> {
        let Some(tls) = self.tls.as_ref().filter(|_| schemes.secure) else { return Ok(Stream::Plain(socket)) };
        match tokio::time::timeout_at(deadline.into(), tls::begins_handshake(schemes, &socket)).await {
            Ok(Ok(true)) => (),
            _ => return Ok(Stream::Plain(socket)), // The caller sees what is wrong with it.
        }
        let left = deadline.saturating_duration_since(Instant::now());
        tls.accept(socket, left).await.map(|(stream, _)| stream)
    }
}

fn pass_to_transport(transport: &Arc<Transport>, stream: Stream, admitted: AdmittedConnection) {
    match stream.into_blocking() {
        Ok(stream) => transport.receive(stream, admitted),
        Err(error) => tracing::warn!(%error, "cannot pass a peer connection to the transport"),
    }
}
