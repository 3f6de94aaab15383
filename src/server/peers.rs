//! The port for members: raft's streams, and HTTP for everything else, told apart by the first byte.

use std::{io, net::TcpStream, sync::Arc, thread, time::Duration};

use tokio::{net::TcpListener, sync::oneshot};

use super::Failure;
use crate::node::transport::{Admitted, PREFACE, Stage, Transport};

/// What runs when the port is closed gets so long to end.
const LAST_TASKS: Duration = Duration::from_millis(100);

/// The port, as long as it is open.
pub struct Ear {
    closing: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Ear {
    /// Closes the port, and ends whatever came in there over HTTP.
    pub fn close(self) {
        drop(self.closing);
        let _ = self.thread.join(); // If it has panicked, it is closed.
    }
}

/// Accepts members on a thread of its own, so that no client can keep them waiting.
pub fn listen(
    listeners: Vec<TcpListener>,
    transport: &Arc<Transport>,
    serve_http: impl Fn(tokio::net::TcpStream, Admitted) + Clone + Send + 'static,
) -> Result<Ear, Failure> {
    let cannot = |error: io::Error| Failure::Refused(format!("cannot listen for peers: {error}"));
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
                let listener = TcpListener::from_std(listener).expect("a runtime runs here");
                accepting.spawn(accept(listener, transport.clone(), serve_http.clone()));
            }
            let _ = closed.await;
        });
        runtime.shutdown_timeout(LAST_TASKS);
    };
    let thread = thread::Builder::new().name("peer".to_owned()).spawn(run).map_err(cannot)?;
    Ok(Ear { closing, thread })
}

async fn accept(
    listener: TcpListener,
    transport: Arc<Transport>,
    serve_http: impl Fn(tokio::net::TcpStream, Admitted) + Clone + Send + 'static,
) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                let Some(admitted) = transport.admit(&stream, address.ip()) else { continue };
                let (transport, serve_http) = (transport.clone(), serve_http.clone());
                tokio::spawn(async move {
                    match first_byte(&stream, &admitted).await {
                        Ok(first) if first == PREFACE[0] => hand_over(&transport, stream, admitted),
                        Ok(_) => {
                            admitted.set_stage(Stage::Http);
                            serve_http(stream, admitted);
                        }
                        Err(error) if error.kind() == io::ErrorKind::TimedOut => transport.note_silent(address.ip()),
                        Err(error) => tracing::debug!(%address, %error, "a connection to the peer port ended early"),
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: what is open goes on, and closing some makes room.
                tracing::warn!(%error, "cannot accept a peer's connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn first_byte(stream: &tokio::net::TcpStream, admitted: &Admitted) -> io::Result<u8> {
    let mut first = [0];
    match tokio::time::timeout_at(admitted.hello_deadline().into(), stream.peek(&mut first)).await {
        Ok(Ok(1..)) => Ok(first[0]),
        Ok(Ok(_)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn hand_over(transport: &Arc<Transport>, stream: tokio::net::TcpStream, admitted: Admitted) {
    let stream: io::Result<TcpStream> = stream.into_std();
    match stream {
        Ok(stream) => transport.receive(stream, admitted),
        Err(error) => tracing::warn!(%error, "cannot take over a peer's stream"),
    }
}
