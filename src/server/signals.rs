//! Signals that stop the process, its exit by signal, and the readiness notification for systemd.

use std::{env, io, os::unix::net::UnixDatagram, process, process::ExitCode};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM or SIGINT.
pub struct StopSignal {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignal {
    /// Installs the handlers: from now on the signals no longer end the process by themselves.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The first signal that is received.
    pub async fn wait(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        }
    }
}

/// The name of a signal, as Go prints it.
pub fn name(signal: SignalKind) -> &'static str {
    if signal == SignalKind::interrupt() { "interrupt" } else { "terminated" }
}

/// Ends the process by the signal that stopped it, so that its parent process sees that. The init process of a container cannot
/// end that way; it exits with success.
pub fn exit_by(signal: SignalKind) -> ExitCode {
    const INIT: u32 = 1;
    if process::id() != INIT {
        let _ = signal_hook::low_level::emulate_default_handler(signal.as_raw_value());
    }
    ExitCode::SUCCESS
}

/// Notifies systemd that clients are served, if it has started this process and waits for that.
pub fn notify_ready() {
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
