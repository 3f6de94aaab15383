//! A pipe with the `h2` crate at one end and bytes at the other. The crate is polled by hand, without runtime or threads: output
//! that is not there after a poll will not come later.

use std::{
    pin::Pin,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// More than is written for one input.
pub const PIPE_BYTES: usize = 1 << 20;

/// A context whose waker does nothing.
pub fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

pub fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut context())
}

/// Our end of the pipe.
pub struct PipeEnd(pub DuplexStream);

impl PipeEnd {
    /// Writes all bytes; the pipe is large enough.
    pub fn write(&mut self, bytes: &[u8]) {
        let written = Pin::new(&mut self.0).poll_write(&mut context(), bytes);
        let Poll::Ready(written) = written else { panic!("the pipe is large enough") };
        // An error means that the other end is closed.
        assert!(written.is_err() || written.is_ok_and(|count| count == bytes.len()), "the pipe is large enough");
    }

    /// Reads everything that the other end has written.
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
