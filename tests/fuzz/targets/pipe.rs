//! The `h2` crate at one end of a pipe, and bytes at the other. It is polled by hand: no runtime, no thread, and what it has
//! not said by then it will not say.

use std::{
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// More than anybody writes in one try.
pub const PIPE_BYTES: usize = 1 << 20;

/// A context that wakes nobody.
pub fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// Polls once.
pub fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut context())
}

/// Our end of the pipe.
pub struct End(pub DuplexStream);

impl End {
    /// Writes everything; there is room.
    pub fn write(&mut self, bytes: &[u8]) {
        let written = Pin::new(&mut self.0).poll_write(&mut context(), bytes);
        let Poll::Ready(written) = written else { panic!("the pipe is wide") };
        // Whoever has hung up reads nothing.
        assert!(written.is_err() || written.is_ok_and(|count| count == bytes.len()), "the pipe is wide");
    }

    /// Takes what has been written to us.
    pub fn read(&mut self) -> Vec<u8> {
        let (mut taken, mut buffer) = (Vec::new(), vec![0; 4096]);
        loop {
            let mut part = ReadBuf::new(&mut buffer);
            let read = Pin::new(&mut self.0).poll_read(&mut context(), &mut part);
            if !matches!(read, Poll::Ready(Ok(()))) || part.filled().is_empty() {
                return taken;
            }
            taken.extend_from_slice(part.filled());
        }
    }
}
