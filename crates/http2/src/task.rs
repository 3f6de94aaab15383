//! The task that owns a connection and its socket.
//!
//! A turn reads once, does the pending work, and writes everything with one call. After a few turns, or one long turn, the task
//! yields to other connections, however much is left to do.
//!
//! The first response from another thread wakes the task. The task then yields once to the back of the run queue, so that it
//! finds more responses when it runs again.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use super::{connection::Connection, registry::ConnectionGuard, service::Service};

/// Bytes per read.
const READ_BYTES: usize = 64 << 10;
/// Buffers per vectored write.
const MAX_SLICES: usize = 64;
/// Bytes written per turn. Writing more takes long, above all over TLS.
const WRITE_BYTES: usize = 1 << 20;
/// Turns before the task yields.
const MAX_TURNS: usize = 4;
/// How long the client may take to read the last bytes before the socket is closed.
const LINGER: Duration = Duration::from_secs(1);

thread_local! {
    /// The read buffer of this thread's connections; the bytes of each read are copied out into one buffer of their size.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

#[allow(clippy::struct_excessive_bools, reason = "the flags are independent of each other")]
pub struct Task<S> {
    socket: S,
    connection: Connection,
    guard: ConnectionGuard,
    sleep: Pin<Box<Sleep>>,
    /// When `sleep` fires.
    timer_at: Instant,
    /// Bytes were written since the last flush.
    is_unflushed: bool,
    /// The task has yielded to the back of the run queue.
    has_yielded: bool,
    is_shutting_down: bool,
    /// The client has closed its sending side: nothing more is read.
    is_half_closed: bool,
    /// Everything has been written; further input is discarded.
    is_closing: bool,
}

enum Input {
    Bytes(Bytes),
    Nothing,
    End,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Task<S> {
    /// Serves a socket. `first` holds the bytes that were already read from it.
    pub fn new(socket: S, first: Bytes, service: Arc<dyn Service>, guard: ConnectionGuard) -> Self {
        let now = clock();
        let mut connection = Connection::new(service, guard.shared().clone(), guard.outbox().clone(), now);
        connection.set_info(guard.info().cloned());
        connection.receive(first, now);
        let timer_at = connection.next_timer();
        let sleep = Box::pin(tokio::time::sleep_until(timer_at.into()));
        Self {
            socket,
            connection,
            guard,
            sleep,
            timer_at,
            is_unflushed: false,
            has_yielded: false,
            is_shutting_down: false,
            is_half_closed: false,
            is_closing: false,
        }
    }

    /// Reads once, does the pending work, writes. The result says whether there may be more to do at once.
    fn turn(&mut self, context: &mut Context<'_>, now: Instant) -> io::Result<Turn> {
        let mut goes_on = false;
        if !self.is_half_closed && !self.connection.must_not_read() {
            match self.read(context)? {
                Input::Bytes(bytes) => {
                    self.connection.receive(bytes, now);
                    goes_on = true;
                }
                Input::End => {
                    self.is_half_closed = true;
                    self.connection.input_ended(now);
                }
                Input::Nothing => (),
            }
        }
        if !goes_on && !self.has_yielded && self.guard.outbox().has_pending() {
            self.has_yielded = true;
            return Ok(Turn::Yield);
        }
        self.has_yielded = false;
        goes_on |= self.connection.run(now);
        // Work that was held back because the output was full can continue once the output is written.
        let was_saturated = self.connection.is_saturated();
        if self.write(context, now)? || self.connection.was_long() {
            return Ok(Turn::Long);
        }
        goes_on |= was_saturated && !self.connection.is_saturated();
        Ok(if goes_on { Turn::Continue } else { Turn::Idle })
    }

    fn read(&mut self, context: &mut Context<'_>) -> io::Result<Input> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            match Pin::new(&mut self.socket).poll_read(context, &mut buffer) {
                Poll::Pending => Ok(Input::Nothing),
                Poll::Ready(Err(error)) => Err(error),
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => Ok(Input::End),
                Poll::Ready(Ok(())) => Ok(Input::Bytes(Bytes::copy_from_slice(buffer.filled()))),
            }
        })
    }

    /// Writes until everything is written or the socket would block. True if it stopped at [`WRITE_BYTES`].
    fn write(&mut self, context: &mut Context<'_>, now: Instant) -> io::Result<bool> {
        let mut taken = 0;
        while !self.connection.output().is_empty() && taken < WRITE_BYTES {
            let output = self.connection.output();
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = output.slices(&mut slices);
            match Pin::new(&mut self.socket).poll_write_vectored(context, &slices[..count]) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => {
                    let written = written?;
                    output.advance(written);
                    taken += written;
                }
            }
        }
        // TLS may buffer what it was given.
        self.is_unflushed |= taken > 0;
        if self.is_unflushed
            && let Poll::Ready(flushed) = Pin::new(&mut self.socket).poll_flush(context)
        {
            flushed?;
            self.is_unflushed = false;
        }
        let is_done = !self.is_unflushed && self.connection.output().is_empty();
        self.connection.wrote(taken, is_done, now);
        Ok(taken >= WRITE_BYTES)
    }

    /// Shuts the sending side down and waits a moment for the client to close: closing a socket that still has unread input may
    /// discard data that the client has not received yet.
    fn close(&mut self, context: &mut Context<'_>, now: Instant) -> Poll<io::Result<()>> {
        if !self.is_closing {
            self.is_closing = true;
            self.timer_at = now + LINGER;
            self.sleep.as_mut().reset(self.timer_at.into());
        }
        // A client that does not even read this is not waited for.
        if self.sleep.as_mut().poll(context).is_ready() {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.socket).poll_shutdown(context))?;
        loop {
            match self.read(context)? {
                Input::End => return Poll::Ready(Ok(())),
                Input::Bytes(_) => (),
                Input::Nothing => return Poll::Pending,
            }
        }
    }

    /// Polls the timer and arms it for the next deadline. True if it fired.
    fn poll_timer(&mut self, context: &mut Context<'_>, now: Instant) -> bool {
        let next = self.connection.next_timer();
        if next < self.timer_at {
            self.timer_at = next;
            self.sleep.as_mut().reset(next.into());
        }
        if self.sleep.as_mut().poll(context).is_pending() {
            return false;
        }
        self.connection.on_timer(now);
        self.timer_at = self.connection.next_timer();
        self.sleep.as_mut().reset(self.timer_at.into());
        true
    }
}

enum Turn {
    Continue,
    Idle,
    Yield,
    /// It took long, and there may be more to do.
    Long,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Task<S> {
    type Output = io::Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let now = clock();
        let mut is_long = false;
        for _ in 0..MAX_TURNS {
            if !this.is_shutting_down && this.guard.outbox().shutdown_requested() {
                this.is_shutting_down = true;
                this.connection.shut_down(now);
            }
            if this.connection.is_dead() {
                return Poll::Ready(Ok(()));
            }
            if this.is_closing || (this.connection.is_closed() && this.connection.output().is_empty()) {
                return this.close(context, now);
            }
            match this.turn(context, now)? {
                Turn::Yield => break,
                Turn::Long => {
                    is_long = true;
                    break;
                }
                Turn::Continue => continue,
                Turn::Idle => (),
            }
            let timer_fired = this.poll_timer(context, now);
            let is_over = this.connection.is_closed() && this.connection.output().is_empty();
            // The shutdown notification may have been taken during this very turn.
            let was_asked_meanwhile = !this.is_shutting_down && this.guard.outbox().shutdown_requested();
            if !timer_fired && !is_over && !was_asked_meanwhile && this.guard.outbox().register_waker(context.waker()) {
                return Poll::Pending;
            }
        }
        // A connection that is always busy never reaches the timer poll above: its deadlines are handled here.
        if this.connection.next_timer() <= now {
            this.connection.on_timer(now);
        }
        if is_long {
            // Waking the own task would put it directly behind the tasks that are ready now. Tokio looks for newly ready I/O only
            // once in 61 polls, unless a task yields like this.
            return pin!(tokio::task::yield_now()).poll(context).map(Ok);
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// The current time, read once per poll.
fn clock() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests;
