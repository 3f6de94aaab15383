//! The one kind of stream: clients, other members, and the requests to other members all go through it. It is plain today; TLS is to
//! become another variant, which nothing above has to know of.
//!
//! [`Stream`] is for tasks. Raft messages and snapshots are written and read by threads, through a [`BlockingStream`]; the peer
//! port turns one into the other once it knows what a connection is for.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::client::legacy::connect::{Connected, Connection};
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// A connection, for tasks.
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
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

    /// The same connection, for threads. Not for socket files.
    pub fn into_blocking(self) -> io::Result<BlockingStream> {
        match self {
            Self::Tcp(stream) => {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(BlockingStream::Plain(stream))
            }
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl From<TcpStream> for Stream {
    /// Answers are written as a whole, so there is nothing to wait for with a small one.
    fn from(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true); // Without it, it is merely slower.
        Self::Tcp(stream)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, data),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(context, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

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
}

impl BlockingStream {
    pub fn connect(address: &SocketAddr, timeout: Duration) -> io::Result<Self> {
        let stream = std::net::TcpStream::connect_timeout(address, timeout)?;
        stream.set_nodelay(true)?;
        Ok(Self::Plain(stream))
    }

    fn tcp(&self) -> &std::net::TcpStream {
        let Self::Plain(stream) = self;
        stream
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
        self.tcp().shutdown(how)
    }
}

impl AsFd for BlockingStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp().as_fd()
    }
}

impl Read for BlockingStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp().read(buffer)
    }
}

impl Read for &BlockingStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tcp().read(buffer)
    }
}

impl Write for BlockingStream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.tcp().write(data)
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.tcp().write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.tcp().flush()
    }
}
