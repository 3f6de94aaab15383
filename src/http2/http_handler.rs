//! Handles plain HTTP requests: those whose path names no registered method.
//!
//! The future of the response, and then its body, are polled on the connection's task, as conversations are stepped. The
//! request's body is a queue that the connection fills and the HTTP service drains; the stream's window is released as the queue
//! is drained.

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

use super::{
    outbox::StreamWaker,
    sender::{Ending, MAX_QUEUED_BYTES, Sender},
    service::{BoxError, Response, ResponseBody},
    stream_handler::StepOutcome,
    streams::Stream,
};

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

    fn take_consumed(&self) -> usize {
        std::mem::take(&mut self.queue.lock().taken)
    }
}

/// Handles one HTTP request.
pub struct HttpHandler {
    response: Option<Response>,
    body: Option<ResponseBody>,
    body_sender: BodySender,
    stream_waker: Arc<StreamWaker>,
    waker: Waker,
}

impl Drop for HttpHandler {
    fn drop(&mut self) {
        self.body_sender.change(|queue| {
            queue.is_broken = !queue.is_over;
            queue.writer = None; // The stream is gone, nothing is left to be woken.
        });
    }
}

impl HttpHandler {
    #[must_use]
    pub fn new(response: Response, body_sender: BodySender, stream_waker: Arc<StreamWaker>) -> Self {
        let waker = Waker::from(stream_waker.clone());
        body_sender.queue.lock().writer = Some(waker.clone());
        Self { response: Some(response), body: None, body_sender, stream_waker, waker }
    }

    /// Sends to the request's body.
    #[must_use]
    pub fn body_sender(&self) -> &BodySender {
        &self.body_sender
    }

    /// Does what can be done now.
    pub fn step(&mut self, slot: u64, stream: &mut Stream, sender: &mut Sender) -> StepOutcome {
        self.stream_waker.rearm();
        let waker = self.waker.clone();
        let mut context = Context::from_waker(&waker);
        // The response is not polled while there is no room for it: it would wait here without being counted.
        let is_full = sender.is_full() || sender.is_saturated();
        if let Some(response) = &mut self.response
            && !is_full
            && let Poll::Ready(response) = response.as_mut().poll(&mut context)
        {
            self.response = None;
            let (parts, body) = response.into_parts();
            sender.head(stream.id, &mut stream.outbound, &parts, body.is_end_stream());
            self.body = (!body.is_end_stream()).then_some(body);
        }
        let is_stalled = self.send_body(slot, stream, sender, &mut context) || is_full;
        StepOutcome { consumed: self.body_sender.take_consumed(), is_stalled, received: 0, has_more: false }
    }

    /// Sends what is available while there is room. True if it stopped because the connection has too much to write.
    fn send_body(&mut self, slot: u64, stream: &mut Stream, sender: &mut Sender, context: &mut Context<'_>) -> bool {
        let Some(body) = &mut self.body else { return false };
        let (id, out) = (stream.id, &mut stream.outbound);
        while out.queued() < MAX_QUEUED_BYTES {
            if !sender.can_send(out) {
                return true;
            }
            let ending = match body.as_mut().poll_frame(context) {
                Poll::Pending => return false,
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        sender.data(slot, id, out, data);
                        continue;
                    }
                    Err(frame) => match frame.into_trailers() {
                        Ok(trailers) => Ending::Trailers(trailers),
                        Err(_) => continue, // An unknown kind of frame.
                    },
                },
                Poll::Ready(Some(Err(_))) => Ending::Broken,
                Poll::Ready(None) => Ending::Plain,
            };
            self.body = None;
            sender.end(slot, id, out, ending);
            return false;
        }
        false
    }
}
