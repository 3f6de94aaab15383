//! How the process is told to stop, how it ends then, and whom it tells that it has begun.

use std::{env, io, os::unix::net::UnixDatagram, process, process::ExitCode};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM or SIGINT.
pub struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    /// From now on they end nothing by themselves.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Which came.
    pub async fn wait(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        }
    }
}

/// As Go prints it.
pub fn name(signal: SignalKind) -> &'static str {
    if signal == SignalKind::interrupt() { "interrupt" } else { "terminated" }
}

/// Ends the process by the signal that it was told to stop with, so that whoever started it sees that it was. The first
/// process of a container cannot be ended so, and has simply done its work.
pub fn end_by(signal: SignalKind) -> ExitCode {
    const FIRST: u32 = 1;
    if process::id() != FIRST {
        let _ = signal_hook::low_level::emulate_default_handler(signal.as_raw_value());
    }
    ExitCode::SUCCESS
}

/// Tells systemd, where it started us and wants to know, that clients are served.
pub fn tell_ready() {
    let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return };
    if let Err(error) = notify(&path) {
        tracing::warn!(%error, "failed to notify systemd for readiness");
    }
}

fn notify(path: &std::ffi::OsStr) -> io::Result<()> {
    use std::os::{linux::net::SocketAddrExt, unix::ffi::OsStrExt, unix::net::SocketAddr};
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address).map(drop)
}
