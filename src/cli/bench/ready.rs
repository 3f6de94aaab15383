//! Waits for a server to become ready, which means that it answers a serializable range.

use std::{
    io,
    net::{TcpStream, ToSocketAddrs},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::{runtime, time::timeout};

use crate::{
    net::tls::ClientTls,
    proto::etcdserverpb::{RangeRequest, kv_client::KvClient},
};

use super::{
    arguments::ReadyArgs,
    connections,
    plan::{endpoint_url, tls_settings},
};

/// Time between two attempts while the port refuses connections.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Waits until the server answers, and prints the milliseconds that this took.
pub(super) fn wait(arguments: &ReadyArgs) -> Result<(), String> {
    let started = Instant::now();
    let deadline = started + arguments.timeout;
    let url = endpoint_url(&arguments.endpoint)?;
    let authority = url.split_once("://").map_or(url.as_str(), |(_, authority)| authority);
    let tls = ClientTls::open(&tls_settings(arguments.tls.clone())).map(Arc::new).map_err(|error| error.to_string())?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("the runtime cannot be built: {error}"))?;
    let mut last_error = "no attempt was made".to_owned();
    while Instant::now() < deadline {
        if let Some(pid) = arguments.server_pid.filter(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            return Err(format!("{url}: process {pid} has ended; last error: {last_error}"));
        }
        let asked = match accepts(authority) {
            Ok(()) => runtime.block_on(ask(&url, deadline, &tls)),
            Err(error) => Err(error.to_string()),
        };
        match asked {
            Ok(()) => {
                println!("{:.1}", started.elapsed().as_secs_f64() * 1e3);
                return Ok(());
            }
            Err(reason) => last_error = reason,
        }
        thread::sleep(POLL_INTERVAL);
    }
    Err(format!("{url}: not ready within {:?}: {last_error}", arguments.timeout))
}

/// Tries a TCP connection, which is cheap enough to be repeated often without loading the server.
fn accepts(authority: &str) -> io::Result<()> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in authority.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            Ok(_) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn ask(url: &str, deadline: Instant, tls: &Arc<ClientTls>) -> Result<(), String> {
    let request = RangeRequest { key: "ready".into(), serializable: true, ..RangeRequest::default() };
    let asking = async {
        let channel = connections::connect(url, 1, tls).await?;
        KvClient::new(channel)
            .range(request)
            .await
            .map_err(|status| format!("{:?}: {}", status.code(), status.message()))
    };
    // A server may accept connections long before it answers: wait for the response rather than ask again.
    timeout(deadline.saturating_duration_since(Instant::now()), asking)
        .await
        .unwrap_or_else(|_| Err("it accepts connections but does not answer".to_owned()))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::arguments::TlsArgs;
    use super::*;

    fn arguments(listener: &TcpListener) -> ReadyArgs {
        let endpoint = listener.local_addr().unwrap().to_string();
        ReadyArgs {
            endpoint,
            timeout: Duration::from_millis(50),
            server_pid: None,
            tls: TlsArgs { cacert: None, cert: None, key: None },
        }
    }

    #[test]
    fn a_server_whose_port_refuses_is_not_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let arguments = arguments(&listener);
        drop(listener);
        assert!(wait(&arguments).unwrap_err().contains("refused"));
    }

    #[test]
    fn a_server_that_only_accepts_connections_is_not_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(wait(&arguments(&listener)).unwrap_err().contains("does not answer"));
    }

    #[test]
    fn a_server_that_has_ended_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let arguments = ReadyArgs { server_pid: Some(u32::MAX), ..arguments(&listener) };
        assert!(wait(&arguments).unwrap_err().contains("has ended"));
    }
}
