//! Handshakes with clients and members that connect.
//!
//! They run on threads of their own: signing takes a millisecond with some keys, and the disk may hang; neither must affect
//! clients that are connected already. A connection that does not complete its handshake costs a place in a queue; when the
//! queue is full, the oldest is closed in favour of a new one, so that silent connections cannot keep others out.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{runtime::Runtime, task::AbortHandle};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, server::NoServerSessionStorage},
};

use super::{
    HTTP2, KeyPair, Side, TlsSettings, parse, read_certificates, read_key,
    reload::{Loaded, Reloaded, expiry},
    verify::{ClientVerifier, check_address, common_name},
};
use crate::{
    error::StartError,
    metrics::METRICS,
    net::{
        stream::{Socket, Stream},
        tls_error,
    },
    repeats::Repeats,
};

/// Threads for handshakes with clients: one per this many processors, up to a maximum. Members have one.
const PROCESSORS_PER_THREAD: usize = 4;
const MAX_THREADS: usize = 4;

const HTTP1: &[u8] = b"http/1.1";

/// Performs TLS handshakes with clients or members that connect.
pub struct ServerTls {
    side: Side,
    checks_address: bool,
    files: Arc<Reloaded<ServerConfig>>,
    queue: Arc<Queue>,
    /// By address, and why.
    rejections: Mutex<Repeats<(Option<IpAddr>, String)>>,
    /// The threads for handshakes. None: dropped.
    threads: Option<Runtime>,
}

/// The handshakes in progress.
struct Queue {
    side: Side,
    limit: usize,
    handshakes: Mutex<Handshakes>,
}

#[derive(Default)]
struct Handshakes {
    /// In the order in which they began.
    running: BTreeMap<u64, AbortHandle>,
    next: u64,
}

/// A handshake's place in the queue. It is aborted when nothing awaits it any more.
struct Place {
    queue: Arc<Queue>,
    number: u64,
    task: AbortHandle,
}

impl ServerTls {
    /// Reads the files for the first time. At most `max_waiting` handshakes are in progress. Must be called in a runtime.
    pub fn open(settings: &TlsSettings, pair: &KeyPair, max_waiting: usize) -> Result<Self, StartError> {
        let refused = |error: String| StartError::Refused(error);
        let (side, checks_address) = (settings.side, settings.checks_address);
        let mut files = vec![pair.cert.clone(), pair.key.clone()];
        if settings.requires_client_certificate {
            files.extend(settings.trusted_ca.iter().chain(&settings.revocation_list).cloned());
        }
        let flag = if side == Side::Peers { "peer-cert-file" } else { "cert-file" };
        let (loaded_settings, loaded_pair) = (settings.clone(), pair.clone());
        let load = move || load(&loaded_settings, &loaded_pair);
        let files = Arc::new(Reloaded::open(side, flag, files, load).map_err(refused)?);
        let count = match side {
            Side::Peers => 1,
            Side::Clients => std::thread::available_parallelism().map_or(2, usize::from) / PROCESSORS_PER_THREAD,
        };
        let threads = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(count.clamp(1, MAX_THREADS))
            .thread_name(format!("tls-{}", side.name()))
            .enable_time()
            .build()
            .map_err(|error| refused(format!("cannot start threads for TLS handshakes: {error}")))?;
        let queue = Arc::new(Queue { side, limit: max_waiting, handshakes: Mutex::default() });
        Ok(Self { side, checks_address, files, queue, rejections: Mutex::default(), threads: Some(threads) })
    }

    /// To be called regularly.
    pub fn refresh(&self) {
        self.files.refresh();
    }

    /// Performs the handshake, within a time. True if HTTP/2 was negotiated. An error has been logged and counted.
    pub async fn accept(&self, socket: Socket, within: Duration) -> io::Result<(Stream, bool)> {
        self.accept_with(socket, within, self.checks_address).await
    }

    /// As [`Self::accept`], but a client's certificate must be valid for the address that it connects from.
    pub async fn accept_from_own_address(&self, socket: Socket, within: Duration) -> io::Result<(Stream, bool)> {
        self.accept_with(socket, within, true).await
    }

    async fn accept_with(&self, socket: Socket, within: Duration, checks_address: bool) -> io::Result<(Stream, bool)> {
        let address = socket.peer_address();
        let outcome = match tokio::time::timeout(within, self.shake_hands(socket, checks_address)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(("timeout", "tls: the handshake was not completed in time".to_owned())),
        };
        let (label, outcome) = match outcome {
            Ok(stream) => ("ok", Ok(stream)),
            Err((label, error)) => (label, Err(error)),
        };
        METRICS.tls_handshakes.with_label_values(&[self.side.name(), label]).inc();
        outcome.map_err(|error| {
            let key = (address.map(|address| address.ip()), error.clone());
            if let Some(repeated) = self.rejections.lock().should_log(key, Instant::now()) {
                let address = address.map_or_else(String::new, |address| address.to_string());
                let endpoint = self.side.name();
                tracing::warn!({ "remote-addr" = address, error, repeated }, "rejected connection on {endpoint} endpoint");
            }
            io::Error::other(error)
        })
    }

    async fn shake_hands(
        &self,
        socket: Socket,
        checks_address: bool,
    ) -> Result<(Stream, bool), (&'static str, String)> {
        let threads = self.threads.as_ref().ok_or(("error", "the server is stopping".to_owned()))?;
        let files = self.files.clone();
        let address = socket.peer_address();
        let task = threads.spawn(async move {
            let stream = TlsAcceptor::from(files.current()).accept(socket).await.map_err(|it| tls_error::text(&it))?;
            let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            if let (true, Some(leaf), Some(address)) = (checks_address, leaf, address) {
                let leaf = leaf.clone();
                let check = tokio::task::spawn_blocking(move || check_address(&leaf, address.ip()));
                check.await.unwrap_or_else(|error| Err(error.to_string()))?;
            }
            Ok::<_, String>(stream)
        });
        let place = Queue::enter(&self.queue, task.abort_handle());
        let outcome = task.await;
        drop(place);
        match outcome {
            Ok(Ok(stream)) => {
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(HTTP2);
                Ok((Stream::Tls(Box::new(stream.into())), is_http2))
            }
            Ok(Err(error)) => Err(("error", error)),
            Err(_) => Err((
                "evicted",
                format!(
                    "tls: closed in favour of a newer connection: {} handshakes are in progress, the maximum \
                     (--max-waiting-handshakes)",
                    self.queue.limit
                ),
            )),
        }
    }
}

impl Drop for ServerTls {
    fn drop(&mut self) {
        if let Some(threads) = self.threads.take() {
            threads.shutdown_background(); // This is dropped in async code, where waiting is not allowed.
        }
    }
}

impl Queue {
    /// Adds a handshake, in favour of which the oldest is aborted if there are too many.
    fn enter(queue: &Arc<Self>, task: AbortHandle) -> Place {
        let mut handshakes = queue.handshakes.lock();
        if handshakes.running.len() >= queue.limit
            && let Some((_, oldest)) = handshakes.running.pop_first()
        {
            oldest.abort();
        }
        let number = handshakes.next;
        handshakes.next += 1;
        handshakes.running.insert(number, task.clone());
        queue.show(&handshakes);
        Place { queue: queue.clone(), number, task }
    }

    fn show(&self, handshakes: &Handshakes) {
        let waiting = i64::try_from(handshakes.running.len()).unwrap_or(i64::MAX);
        METRICS.tls_handshakes_waiting.with_label_values(&[self.side.name()]).set(waiting);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.task.abort(); // It has ended, or its deadline has passed.
        let mut handshakes = self.queue.handshakes.lock();
        handshakes.running.remove(&self.number);
        self.queue.show(&handshakes);
    }
}

fn load(settings: &TlsSettings, pair: &KeyPair) -> Result<Loaded<ServerConfig>, String> {
    let (chain, key) = (read_certificates(&pair.cert)?, read_key(&pair.key)?);
    let (expires, provider) = (expiry(&chain), settings.protocols.provider());
    let builder = ServerConfig::builder_with_provider(provider.clone());
    let builder = builder.with_protocol_versions(&settings.protocols.versions()).map_err(|error| error.to_string())?;
    let builder = if settings.requires_client_certificate {
        builder.with_client_cert_verifier(Arc::new(ClientVerifier::new(settings, &provider)?))
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| format!("{} and {}: {error}", pair.cert.display(), pair.key.display()))?;
    config.alpn_protocols = match settings.side {
        Side::Clients => vec![HTTP2.to_vec(), HTTP1.to_vec()],
        Side::Peers => vec![HTTP1.to_vec()],
    };
    if settings.requires_client_certificate {
        // A resumed session would not verify the certificate again, which may have expired or been revoked since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(Loaded { value: Arc::new(config), expires })
}

/// The common name of the certificate by which a client was verified; None if it has shown none.
#[must_use]
pub fn client_common_name(stream: &Stream) -> Option<Arc<str>> {
    let Stream::Tls(stream) = stream else { return None };
    let certificate = parse(stream.get_ref().1.peer_certificates()?.first()?)?;
    Some(common_name(certificate.subject()).into()).filter(|name: &Arc<str>| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_handshake_is_aborted_in_favour_of_a_new_one() {
        let queue = Arc::new(Queue { side: Side::Clients, limit: 2, handshakes: Mutex::default() });
        let endless = || tokio::spawn(std::future::pending::<()>());
        let tasks = [endless(), endless(), endless()];
        let places: Vec<_> = tasks.iter().map(|task| Queue::enter(&queue, task.abort_handle())).collect();
        let [first, second, third] = tasks;
        assert!(first.await.unwrap_err().is_cancelled());
        assert!(!second.is_finished() && !third.is_finished());
        drop(places);
        assert!(second.await.unwrap_err().is_cancelled() && third.await.unwrap_err().is_cancelled());
        assert!(queue.handshakes.lock().running.is_empty());
    }
}
