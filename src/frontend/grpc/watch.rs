//! Watch streams: decodes their requests, and encodes responses around events that are encoded already, the large ones in
//! fragments.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use bytes::Bytes;
use prost::Message;

use super::{Grpc, caller, decode_streamed, header::Header, status};
use crate::{
    error::Error,
    metrics::{self, WatchResponseCounts},
    proto::etcdserverpb::{WatchRequest, WatchResponse, watch_request::RequestUnion},
    service::watch::WatchStream,
    watch::{Events, NO_WATCH_ID, Response, Stopped},
};
use http2::call::{CallError, Conversation, Metadata, Step, StreamIo};

/// A Watch call.
pub struct WatchConversation {
    watches: WatchStream,
    header: Header,
    fragment_bytes: usize,
    /// Responses that were taken from the outbox and are not sent yet.
    pending: VecDeque<Response>,
    /// A response of which some fragments were sent, and the index of its first event that was not. No other response is sent in
    /// between.
    fragmented: Option<(Events, usize)>,
}

impl Grpc {
    pub fn watch(self: &Arc<Self>, metadata: Metadata) -> Result<Box<dyn Conversation>, CallError> {
        let watches = self.service.open_watch_stream(&caller(metadata), status::as_go_prints_it)?;
        Ok(Box::new(WatchConversation::new(watches, self.header.clone(), self.max_message_bytes())))
    }
}

impl WatchConversation {
    /// Responses of `fragment_bytes` and more are fragmented, where the client allows it.
    #[must_use]
    pub fn new(watches: WatchStream, header: Header, fragment_bytes: usize) -> Self {
        Self { watches, header, fragment_bytes, pending: VecDeque::new(), fragmented: None }
    }

    /// Passes requests to the hub, as long as there are any and the stream's outbox has capacity for the responses. Returns
    /// whether there were any.
    fn receive_requests(&mut self, io: &mut dyn StreamIo) -> Result<bool, CallError> {
        let mut received = false;
        while self.watches.can_request()
            && let Some(message) = io.receive()
        {
            received = true;
            let request: WatchRequest = decode_streamed(message)?;
            match request.request_union {
                Some(RequestUnion::CreateRequest(create)) => self.watches.create(&create, io.spare_bytes()),
                Some(RequestUnion::CancelRequest(cancel)) => self.watches.cancel(cancel.watch_id),
                Some(RequestUnion::ProgressRequest(_)) => self.watches.request_progress(),
                None => (), // A kind of request that this version does not know.
            }
        }
        Ok(received)
    }

    /// Sends pending responses while the stream has capacity. Returns whether all were sent.
    fn send_responses(&mut self, io: &mut dyn StreamIo) -> bool {
        if self.pending.is_empty() && self.fragmented.is_none() {
            return true;
        }
        let (started, mut sent) = (Instant::now(), WatchResponseCounts::default());
        let is_done = self.send_pending(io, &mut sent);
        metrics::observe_watch_send(sent, started.elapsed());
        is_done
    }

    fn send_pending(&mut self, io: &mut dyn StreamIo, sent: &mut WatchResponseCounts) -> bool {
        while io.can_send() {
            if let Some((events, next)) = self.fragmented.take() {
                let message = self.next_fragment(events, next);
                io.send(message);
            } else if let Some(response) = self.pending.pop_front() {
                count(&response, sent);
                let message = self.encode(response);
                io.send(message);
            } else {
                return true;
            }
        }
        self.pending.is_empty() && self.fragmented.is_none()
    }

    fn encode(&mut self, response: Response) -> Bytes {
        let response = match response {
            Response::Created { watch, revision } => {
                WatchResponse { watch_id: watch, created: true, ..self.with_header(revision) }
            }
            Response::Refused { reason, revision } => WatchResponse {
                watch_id: NO_WATCH_ID,
                created: true,
                canceled: true,
                cancel_reason: reason.into_owned(),
                ..self.with_header(revision)
            },
            Response::Canceled { watch, revision } => {
                WatchResponse { watch_id: watch, canceled: true, ..self.with_header(revision) }
            }
            Response::Compacted { watch, compacted } => {
                WatchResponse { watch_id: watch, canceled: true, compact_revision: compacted, ..self.with_header(0) }
            }
            Response::Progress { watch, revision } => WatchResponse { watch_id: watch, ..self.with_header(revision) },
            Response::Events(events) => return self.encode_events(events),
        };
        response.encode_to_vec().into()
    }

    /// The whole response, or its first fragment if it is large enough to be fragmented.
    fn encode_events(&mut self, events: Events) -> Bytes {
        let head = WatchResponse { watch_id: events.watch, ..self.with_header(events.revision) };
        let frames = events.frames.as_slice();
        let size = head.encoded_len() + frames.iter().map(Bytes::len).sum::<usize>();
        if events.fragment && size >= self.fragment_bytes && frames.len() >= 2 {
            return self.next_fragment(events, 0);
        }
        assemble(&head, frames, size)
    }

    /// The fragment that begins with the event `first`. The rest is what is sent next.
    fn next_fragment(&mut self, events: Events, first: usize) -> Bytes {
        let mut head = WatchResponse { watch_id: events.watch, fragment: true, ..self.with_header(events.revision) };
        let frames = &events.frames.as_slice()[first..];
        let mut size = head.encoded_len() + frames[0].len();
        let mut count = 1;
        while let Some(frame) = frames.get(count)
            && size + frame.len() < self.fragment_bytes
        {
            size += frame.len();
            count += 1;
        }
        head.fragment = count < frames.len();
        let message = assemble(&head, &frames[..count], size);
        if head.fragment {
            self.fragmented = Some((events, first + count));
        }
        message
    }

    fn with_header(&self, revision: i64) -> WatchResponse {
        WatchResponse { header: Some(self.header.at(revision)), ..WatchResponse::default() }
    }
}

fn count(response: &Response, sent: &mut WatchResponseCounts) {
    match response {
        Response::Events(events) => sent.events += events.frames.as_slice().len(),
        Response::Progress { .. } => sent.notices += 1,
        Response::Created { .. }
        | Response::Refused { .. }
        | Response::Canceled { .. }
        | Response::Compacted { .. } => sent.answers += 1,
    }
}

/// Assembles a response in one allocation. Its events are encoded already, and come last.
fn assemble(head: &WatchResponse, frames: &[Bytes], size: usize) -> Bytes {
    let mut out = Vec::with_capacity(size);
    head.encode_raw(&mut out);
    for frame in frames {
        out.extend_from_slice(frame);
    }
    out.into()
}

impl Conversation for WatchConversation {
    fn step(&mut self, io: &mut dyn StreamIo) -> Step {
        self.watches.begin_step();
        if !self.watches.can_identify_caller(io.waker()) {
            return Step::Wait;
        }
        loop {
            let could_request = self.watches.can_request();
            let received = match self.receive_requests(io) {
                Ok(received) => received,
                Err(error) => return Step::End(Err(error)),
            };
            // Responses that cannot be sent stay in the outbox, which is bounded.
            if !self.send_responses(io) || !io.can_send() {
                return Step::Wait;
            }
            if let Err(Stopped) = self.watches.take(&mut self.pending, io.waker()) {
                return Step::End(Err(Error::Stopped.into()));
            }
            // The outbox may have capacity now for requests that could not be passed on before.
            let can_receive = received || !could_request && self.watches.can_request();
            if self.pending.is_empty() && !can_receive {
                return Step::Wait;
            }
        }
    }

    fn held_bytes(&self) -> usize {
        let fragmented = self.fragmented.as_ref().map_or(0, |(events, _)| events.frames.cost());
        self.watches.held() + fragmented + self.pending.iter().map(Response::cost).sum::<usize>()
    }
}
