//! The peer port: raft streams, and HTTP for everything else. The first byte decides.

use std::{io, sync::Arc, thread, time::Duration};

use tokio::{net::TcpListener, sync::oneshot};

use crate::{
    error::StartError,
    net::stream::Stream,
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

/// Accepts peer connections on a thread of their own, so that clients cannot delay them.
pub fn listen(
    listeners: Vec<TcpListener>,
    transport: &Arc<Transport>,
    serve_http: impl Fn(Stream, AdmittedConnection) + Clone + Send + 'static,
) -> Result<PeerListener, StartError> {
    let cannot = |error: io::Error| StartError::Refused(format!("cannot listen for peers: {error}"));
    let listeners: Vec<_> =
        listeners.into_iter().map(TcpListener::into_std).collect::<Result<_, _>>().map_err(cannot)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    for listener in &listeners {
        let address = listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
        tracing::info!(address, "serving peer traffic");
    }
    let transport = transport.clone();
    let (closing, closed) = oneshot::channel::<()>();
    let run = move || {
        runtime.block_on(async move {
            let mut accepting = tokio::task::JoinSet::new();
            for listener in listeners {
                let listener = TcpListener::from_std(listener).expect("this runs within a runtime");
                accepting.spawn(accept(listener, transport.clone(), serve_http.clone()));
            }
            let _ = closed.await;
        });
        runtime.shutdown_timeout(RUNTIME_SHUTDOWN_TIMEOUT);
    };
    let thread = thread::Builder::new().name("peer".to_owned()).spawn(run).map_err(cannot)?;
    Ok(PeerListener { closing, thread })
}

async fn accept(
    listener: TcpListener,
    transport: Arc<Transport>,
    serve_http: impl Fn(Stream, AdmittedConnection) + Clone + Send + 'static,
) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                let stream = Stream::from(stream);
                let Some(admitted) = transport.admit(&stream, address.ip()) else { continue };
                let (transport, serve_http) = (transport.clone(), serve_http.clone());
                tokio::spawn(async move {
                    match first_byte(&stream, &admitted).await {
                        Ok(first) if first == PREFACE[0] => pass_to_transport(&transport, stream, admitted),
                        Ok(_) => {
                            admitted.set_kind(ConnectionKind::Http);
                            serve_http(stream, admitted);
                        }
                        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                            transport.record_hello_timeout(address.ip());
                        }
                        Err(error) => tracing::debug!(%address, %error, "peer connection closed before its first byte"),
                    }
                });
            }
            Err(error) => {
                // Most likely out of file descriptors: open connections are still served, and some will be closed.
                tracing::warn!(%error, "cannot accept a peer connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn first_byte(stream: &Stream, admitted: &AdmittedConnection) -> io::Result<u8> {
    let mut first = [0];
    match tokio::time::timeout_at(admitted.hello_deadline().into(), stream.peek(&mut first)).await {
        Ok(Ok(1..)) => Ok(first[0]),
        Ok(Ok(_)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn pass_to_transport(transport: &Arc<Transport>, stream: Stream, admitted: AdmittedConnection) {
    match stream.into_blocking() {
        Ok(stream) => transport.receive(stream, admitted),
        Err(error) => tracing::warn!(%error, "cannot pass a peer connection to the transport"),
    }
}
