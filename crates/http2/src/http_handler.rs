//! Handles plain HTTP requests: those whose path names no registered method.
//!
//! The future of the response, and then its body, are polled on the connection's task, as conversations are stepped. The
//! request's body is a queue that the connection fills and the HTTP service drains; the stream's window is released as the queue
//! is drained.

use std::{
    sync::Arc,
    task::{Context, Poll, Waker},
};

use http_body::Body;

use super::{
    outbox::StreamWaker,
    request_body::BodySender,
    sender::{Ending, MAX_QUEUED_BYTES, Sender},
    service::{Response, ResponseBody},
    stream_handler::StepOutcome,
    streams::Stream,
};

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
        self.body_sender.abandon(); // The stream is gone, nothing is left to be woken.
    }
}

impl HttpHandler {
    #[must_use]
    pub fn new(response: Response, body_sender: BodySender, stream_waker: Arc<StreamWaker>) -> Self {
        let waker = Waker::from(stream_waker.clone());
        body_sender.set_writer(waker.clone());
        Self { response: Some(response), body: None, body_sender, stream_waker, waker }
    }

    /// Sends to the request's body.
    #[must_use]
    pub fn body_sender(&self) -> &BodySender {
        &self.body_sender
    }

    /// Does what can be done now.
    pub fn step<H>(&mut self, slot: u64, stream: &mut Stream<H>, sender: &mut Sender) -> StepOutcome {
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
    fn send_body<H>(
        &mut self,
        slot: u64,
        stream: &mut Stream<H>,
        sender: &mut Sender,
        context: &mut Context<'_>,
    ) -> bool {
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
