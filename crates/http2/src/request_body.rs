//! The body of a plain HTTP request: a queue that the connection fills and the HTTP service drains.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use parking_lot::Mutex;

/// An error in a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

pub struct RequestBody {
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    /// The trailers, if there are any.
    trailers: Option<HeaderMap>,
    is_over: bool,
    /// The stream was reset before its end.
    is_broken: bool,
    /// Bytes that were taken out and not yet released to the stream's window.
    taken: usize,
    /// The body was dropped: nothing will be taken any more.
    is_abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut queue = self.queue.lock();
        if let Some(piece) = queue.pieces.pop_front() {
            queue.taken += piece.len();
            if let Some(writer) = &queue.writer {
                writer.wake_by_ref();
            }
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        if queue.is_broken {
            return Poll::Ready(Some(Err("the stream was reset".into())));
        }
        if queue.is_over {
            return Poll::Ready(queue.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        queue.reader = Some(context.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        let queue = self.queue.lock();
        queue.is_over && queue.pieces.is_empty() && queue.trailers.is_none()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let mut queue = self.queue.lock();
        queue.is_abandoned = true;
        queue.taken += queue.pieces.drain(..).map(|piece| piece.len()).sum::<usize>();
    }
}

/// The connection's side of a request's body.
#[derive(Clone)]
pub struct BodySender {
    queue: Arc<Mutex<Queue>>,
}

impl BodySender {
    /// A body and its sender.
    #[must_use]
    pub fn new() -> (Self, RequestBody) {
        let queue = Arc::new(Mutex::new(Queue::default()));
        (Self { queue: queue.clone() }, RequestBody { queue })
    }

    fn change(&self, change: impl FnOnce(&mut Queue)) {
        let mut queue = self.queue.lock();
        change(&mut queue);
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    pub fn push(&self, data: &[u8]) {
        self.change(|queue| {
            if queue.is_abandoned {
                queue.taken += data.len();
            } else {
                queue.pieces.push_back(Bytes::copy_from_slice(data));
            }
        });
    }

    pub fn end(&self) {
        self.change(|queue| queue.is_over = true);
    }

    pub fn set_trailers(&self, trailers: HeaderMap) {
        self.queue.lock().trailers = Some(trailers);
    }

    /// The body will not be complete, unless it is already; nothing is to be woken any more.
    pub(super) fn abandon(&self) {
        self.change(|queue| {
            queue.is_broken = !queue.is_over;
            queue.writer = None;
        });
    }

    /// Has `writer` woken when pieces were taken.
    pub(super) fn set_writer(&self, writer: Waker) {
        self.queue.lock().writer = Some(writer);
    }

    /// How many bytes were taken since this was asked last.
    pub(super) fn take_consumed(&self) -> usize {
        std::mem::take(&mut self.queue.lock().taken)
    }
}
