//! The task that owns a connection and its socket.
//!
//! A turn reads once, does what is waiting, and writes everything with one call. After a few turns, or a long one, it is
//! another connection's turn, however much there is still to do.
//!
//! Answers from another thread wake the task at the first of them. It then goes once to the back of the queue of tasks, and
//! finds more of them when it comes back.

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

use super::{connection::Connection, lobby::Seat, service::Service};

/// What is read at a time.
const READ_BYTES: usize = 64 << 10;
/// Pieces that are written at a time.
const MAX_SLICES: usize = 64;
/// So much is written in one turn: more takes long, over TLS above all.
const WRITE_BYTES: usize = 1 << 20;
/// Turns before it is another connection's.
const MAX_TURNS: usize = 4;
/// How long the other side may take to hear our last words.
const LINGER: Duration = Duration::from_secs(1);

thread_local! {
    /// Where this thread's connections read into; what has come is copied out in one piece of its size.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// A connection and its socket.
#[allow(clippy::struct_excessive_bools, reason = "each is a question about this task alone")]
pub struct Task<S> {
    socket: S,
    connection: Connection,
    guard: Seat,
    sleep: Pin<Box<Sleep>>,
    /// When `sleep` ends.
    timer_at: Instant,
    /// Something was written and not flushed.
    is_unflushed: bool,
    /// It has gone to the back of the queue.
    has_yielded: bool,
    is_shutting_down: bool,
    /// The other side has closed its side: nothing more is read.
    is_half_closed: bool,
    /// Everything is said; what still comes is thrown away.
    is_closing: bool,
}

/// What there was to be read.
enum Input {
    Bytes(Bytes),
    Nothing,
    End,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Task<S> {
    /// Serves a socket. `first` is what was read from it already.
    pub fn new(socket: S, first: Bytes, service: Arc<dyn Service>, guard: Seat) -> Self {
        let now = clock();
        let mut connection = Connection::new(service, guard.shared().clone(), guard.outbox().clone(), now);
        connection.receive(first, now);
        let timer_at = connection.next_alarm();
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

    /// Reads once, does what is waiting, writes. True if there may be more to do at once.
    fn turn(&mut self, context: &mut Context<'_>, now: Instant) -> io::Result<Turn> {
        let mut goes_on = false;
        if !self.is_half_closed && !self.connection.is_choked() {
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
        // What had to wait for the output can go on once that is written.
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

    /// Writes until everything is written, or the socket takes no more. True if it stopped because it was much.
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
        // TLS may keep back what it has taken.
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

    /// Tells the other side that nothing more will come, and waits a moment for it to hear that: a socket that is closed with
    /// something unread in it may take back what was written last.
    fn close(&mut self, context: &mut Context<'_>, now: Instant) -> Poll<io::Result<()>> {
        if !self.is_closing {
            self.is_closing = true;
            self.timer_at = now + LINGER;
            self.sleep.as_mut().reset(self.timer_at.into());
        }
        // Whoever hears nothing any more, not even this, is not waited for.
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

    /// Hears the alarm, and sees to it that the next one is heard. True if it rang.
    fn poll_timer(&mut self, context: &mut Context<'_>, now: Instant) -> bool {
        let next = self.connection.next_alarm();
        if next < self.timer_at {
            self.timer_at = next;
            self.sleep.as_mut().reset(next.into());
        }
        if self.sleep.as_mut().poll(context).is_pending() {
            return false;
        }
        self.connection.alarm(now);
        self.timer_at = self.connection.next_alarm();
        self.sleep.as_mut().reset(self.timer_at.into());
        true
    }
}

/// How a turn ended.
enum Turn {
    Continue,
    Idle,
    Yield,
    /// It took long, and there may be more.
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
                this.connection.leave(now);
            }
            if this.connection.is_dead() {
                return Poll::Ready(Ok(()));
            }
            if this.is_closing || (this.connection.is_over() && this.connection.output().is_empty()) {
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
            let is_over = this.connection.is_over() && this.connection.output().is_empty();
            // The letter that says so may have been taken in this very turn.
            let was_asked_meanwhile = !this.is_shutting_down && this.guard.outbox().shutdown_requested();
            if !timer_fired && !is_over && !was_asked_meanwhile && this.guard.outbox().register_waker(context.waker()) {
                return Poll::Pending;
            }
        }
        // A connection that is always busy never sleeps: what is due is done here.
        if this.connection.next_alarm() <= now {
            this.connection.alarm(now);
        }
        if is_long {
            // Only behind those that come next: what is ready elsewhere is not known yet, and tokio looks for that once in
            // 61 polls, unless a task steps aside like this.
            return pin!(tokio::task::yield_now()).poll(context).map(Ok);
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// What time it is, asked once a turn of all connections.
fn clock() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests;
