//! The one kind of stream: clients, other members, snapshots and the requests to other members all go through it, plain or with
//! TLS.
//!
//! ```text
//! accept ─▶ Socket ─┬────────────────────▶ Stream ──▶ HTTP
//!                   └─ TLS handshake ─▶ Stream ─┘  └─▶ BlockingStream ──▶ raft messages, snapshots
//! ```
//!
//! [`Stream`] is for tasks. Raft messages and snapshots are written and read by threads, through a [`BlockingStream`]; the peer
//! port turns one into the other once it knows what a connection is for.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper_util::client::legacy::connect::{Connected, Connection};
use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsStream, rustls};

/// A connection, before anything is known of what is spoken on it.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection, for tasks.
pub enum Stream {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Socket {
    /// Connects to a host and port.
    pub async fn connect(host: &str, port: u16) -> io::Result<Self> {
        TcpStream::connect((host, port)).await.map(Self::from)
    }

    /// The address of the other side; None for a socket file.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Waits for the first bytes and leaves them to be read. Not for socket files.
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.peek(buffer).await,
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn into_blocking(self) -> io::Result<std::net::TcpStream> {
        match self {
            Self::Tcp(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream)
            }
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl Stream {
    /// The address of the other side; None for a socket file.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Plain(socket) => socket.peer_address(),
            Self::Tls(stream) => stream.get_ref().0.peer_address(),
        }
    }

    /// Waits for the first byte and leaves it to be read; None at the end of the stream. Not for socket files.
    pub async fn peek_byte(&mut self) -> io::Result<Option<u8>> {
        match self {
            Self::Plain(socket) => {
                let mut first = [0];
                Ok((socket.peek(&mut first).await? > 0).then_some(first[0]))
            }
            Self::Tls(stream) => stream.fill_buf().await.map(|bytes| bytes.first().copied()),
        }
    }

    /// The same connection, for threads. Not for socket files.
    pub fn into_blocking(self) -> io::Result<BlockingStream> {
        let (socket, session) = match self {
            Self::Plain(socket) => return socket.into_blocking().map(BlockingStream::Plain),
            Self::Tls(stream) => match *stream {
                TlsStream::Server(stream) => {
                    let (socket, session) = stream.into_inner();
                    (socket, rustls::Connection::Server(session))
                }
                TlsStream::Client(stream) => {
                    let (socket, session) = stream.into_inner();
                    (socket, rustls::Connection::Client(session))
                }
            },
        };
        Ok(BlockingStream::Tls(Box::new(TlsSession { socket: socket.into_blocking()?, session: Mutex::new(session) })))
    }
}

impl From<TcpStream> for Socket {
    /// Answers are written as a whole, so there is nothing to wait for with a small one.
    fn from(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true); // Without it, it is merely slower.
        Self::Tcp(stream)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// Passes a call on to the variant that a stream is.
macro_rules! for_variant {
    ($stream:expr, $($variant:path)|+, $inner:ident => $call:expr) => {
        match $stream {
            $($variant($inner) => $call,)+
        }
    };
}

/// Reads and writes as the variants do.
macro_rules! pass_on {
    ($stream:ty, $($variant:path)|+) => {
        impl AsyncRead for $stream {
            fn poll_read(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                for_variant!(self.get_mut(), $($variant)|+, stream => Pin::new(stream).poll_read(context, buffer))
            }
        }

        impl AsyncWrite for $stream {
            fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
                for_variant!(self.get_mut(), $($variant)|+, stream => Pin::new(stream).poll_write(context, data))
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                pieces: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                for_variant!(
                    self.get_mut(), $($variant)|+, stream => Pin::new(stream).poll_write_vectored(context, pieces)
                )
            }

            fn is_write_vectored(&self) -> bool {
                for_variant!(self, $($variant)|+, stream => stream.is_write_vectored())
            }

            fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                for_variant!(self.get_mut(), $($variant)|+, stream => Pin::new(stream).poll_flush(context))
            }

            fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
                for_variant!(self.get_mut(), $($variant)|+, stream => Pin::new(stream).poll_shutdown(context))
            }
        }
    };
}

pass_on!(Socket, Self::Tcp | Self::Unix);
pass_on!(Stream, Self::Plain | Self::Tls);

/// Nothing that a pool of connections would have to know.
impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// A connection, for threads.
#[derive(Debug)]
pub enum BlockingStream {
    Plain(std::net::TcpStream),
    Tls(Box<TlsSession>),
}

/// A connection with TLS. One thread reads and writes it, so the lock is never waited for.
#[derive(Debug)]
pub struct TlsSession {
    socket: std::net::TcpStream,
    session: Mutex<rustls::Connection>,
}

impl BlockingStream {
    pub fn connect(address: &SocketAddr, timeout: Duration) -> io::Result<Self> {
        let stream = std::net::TcpStream::connect_timeout(address, timeout)?;
        stream.set_nodelay(true)?;
        Ok(Self::Plain(stream))
    }

    /// Performs the handshake of a client on a plain connection, until a deadline.
    pub fn start_tls(self, session: rustls::ClientConnection, deadline: Instant) -> io::Result<Self> {
        let socket = match self {
            Self::Plain(socket) => socket,
            Self::Tls(_) => return Err(io::Error::other("the connection has TLS already")),
        };
        let mut session = rustls::Connection::Client(session);
        while session.is_handshaking() {
            if session.complete_io(&mut Until { socket: &socket, deadline })? == (0, 0) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Self::Tls(Box::new(TlsSession { socket, session: Mutex::new(session) })))
    }

    fn tcp(&self) -> &std::net::TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(tls) => &tls.socket,
        }
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.tcp().peer_addr()
    }

    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.tcp().set_read_timeout(timeout)
    }

    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.tcp().set_write_timeout(timeout)
    }

    /// How long written bytes may stay unacknowledged: so a peer is noticed that is gone without closing the connection.
    pub fn set_unacknowledged_timeout(&self, timeout: Duration) -> io::Result<()> {
        sockopt::set_tcp_user_timeout(self.tcp(), u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX))?;
        Ok(())
    }

    /// Has the system probe a silent connection, for the first time after `idle` and then every second.
    pub fn set_keepalive(&self, idle: Duration) -> io::Result<()> {
        sockopt::set_socket_keepalive(self.tcp(), true)?;
        sockopt::set_tcp_keepidle(self.tcp(), idle.max(Duration::from_secs(1)))?;
        sockopt::set_tcp_keepintvl(self.tcp(), Duration::from_secs(1))?;
        Ok(())
    }

    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if let (Self::Tls(tls), Shutdown::Write | Shutdown::Both) = (self, how) {
            let mut session = tls.session.lock();
            session.send_close_notify();
            tls.flush(&mut session)?;
        }
        self.tcp().shutdown(how)
    }
}

impl TlsSession {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut session = self.session.lock();
        while session.wants_read() {
            if session.complete_io(&mut &self.socket)?.0 == 0 {
                break;
            }
        }
        session.reader().read(buffer)
    }

    fn write(&self, write: impl FnOnce(&mut rustls::Writer<'_>) -> io::Result<usize>) -> io::Result<usize> {
        let mut session = self.session.lock();
        let count = write(&mut session.writer())?;
        self.flush(&mut session)?;
        Ok(count)
    }

    /// Sends what is encrypted. Nothing is read meanwhile: the other side may have nothing to say.
    fn flush(&self, session: &mut rustls::Connection) -> io::Result<()> {
        while session.wants_write() {
            session.write_tls(&mut &self.socket)?;
        }
        Ok(())
    }
}

/// A socket whose reads and writes fail at a deadline, however slowly the other side proceeds.
struct Until<'a> {
    socket: &'a std::net::TcpStream,
    deadline: Instant,
}

impl Until<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// A read or write at the deadline fails with the same error wherever it happens.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer).map_err(timed_out)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(data).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for BlockingStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp().as_fd()
    }
}

impl Read for BlockingStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Read for &BlockingStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            BlockingStream::Plain(stream) => (&*stream).read(buffer),
            BlockingStream::Tls(tls) => tls.read(buffer),
        }
    }
}

impl Write for BlockingStream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(data),
            Self::Tls(tls) => tls.write(|writer| writer.write(data)),
        }
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write_vectored(pieces),
            Self::Tls(tls) => tls.write(|writer| writer.write_vectored(pieces)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(tls) => tls.flush(&mut tls.session.lock()),
        }
    }
}
