//! A Watch stream: many watches, their creation, cancellation and progress, and the fragmentation of large responses.
//!
//! Requests go to the hub in the order in which they arrived, and all responses come out of the stream's outbox in the order in
//! which the hub put them there. So the order is not decided here: this module decodes requests, and encodes responses around
//! events that are encoded already.

use std::{borrow::Cow, collections::VecDeque, sync::Arc, time::Instant};

use bytes::Bytes;
use prost::Message;

use super::{Api, decode_streamed, header::Header};
use crate::{
    call::{CallError, Code, Conversation, Metadata, Step, StreamIo},
    error::Error,
    metrics::{self, METRICS, WatchResponseCounts},
    mvcc::Interval,
    proto::etcdserverpb::{
        WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType, watch_request::RequestUnion,
    },
    watch::{self, Create, Events, NO_WATCH_ID, Request, Response, Subscriber, WatchOptions},
};

/// Whether the caller may watch from a key to a range end (as it was sent); the error is the cancel reason that the client gets.
pub type Gate = Box<dyn Fn(&[u8], &[u8]) -> Result<(), Cow<'static, str>> + Send>;

const EMPTY_RANGE: &str = "mvcc: watcher range is empty";

/// The longest key and range end of a watch, because a watch keeps them for as long as it lives, and each of its comparisons
/// reads them. Keys themselves may be longer; a watch of a range that begins before them receives their events.
const MAX_KEY_BYTES: usize = 16 << 10;

/// The first of all keys, which an empty key stands for.
const FIRST_KEY: &[u8] = &[0];

/// A Watch stream.
pub struct Watching {
    subscriber: Subscriber,
    header: Header,
    gate: Gate,
    fragment_bytes: usize,
    /// Responses that were taken from the outbox and are not sent yet.
    pending: VecDeque<Response>,
    /// A response of which some fragments were sent, and the index of its first event that was not. No other response is sent in
    /// between.
    fragmented: Option<(Events, usize)>,
    /// What the watches that were requested in this step count as held.
    charged: usize,
}

impl Api {
    /// `Watch/Watch`.
    pub fn watch(self: &Arc<Self>, _metadata: Metadata) -> Box<dyn Conversation> {
        let gate = Box::new(|_key: &[u8], _range_end: &[u8]| Ok(())); // There is no authentication yet.
        Box::new(Watching::new(self.hub.open(), self.header.clone(), gate, self.limits.max_message_bytes()))
    }
}

impl Watching {
    /// A stream without watches. Responses of `fragment_bytes` and more are fragmented, where the client allows it.
    #[must_use]
    pub fn new(subscriber: Subscriber, header: Header, gate: Gate, fragment_bytes: usize) -> Self {
        Self { subscriber, header, gate, fragment_bytes, pending: VecDeque::new(), fragmented: None, charged: 0 }
    }

    /// Passes requests to the hub, as long as there are any and the stream's outbox has capacity for the responses. Returns
    /// whether there were any.
    fn receive_requests(&mut self, line: &mut dyn StreamIo) -> Result<bool, CallError> {
        let mut received = false;
        while self.subscriber.can_send_request()
            && let Some(message) = line.receive()
        {
            received = true;
            let request: WatchRequest = decode_streamed(message)?;
            match request.request_union {
                Some(RequestUnion::CreateRequest(create)) => self.create(&create, line.spare_bytes()),
                Some(RequestUnion::CancelRequest(cancel)) => {
                    self.subscriber.send_request(Request::Cancel(cancel.watch_id))
                }
                Some(RequestUnion::ProgressRequest(_)) => self.subscriber.send_request(Request::Progress),
                None => (), // A kind of request that this version does not know.
            }
        }
        Ok(received)
    }

    /// `spare` is how many bytes more than before this step may be held for the client.
    fn create(&mut self, create: &WatchCreateRequest, spare: usize) {
        let request = match self.check(create) {
            Ok(create) if self.charged + watch::watch_cost(&create.interval) > spare => {
                METRICS.refused.with_label_values(&["watches"]).inc();
                Request::Refuse(Error::TooManyRequests.to_string().into())
            }
            Ok(create) => {
                self.charged += watch::watch_cost(&create.interval);
                Request::Create(create)
            }
            Err(reason) => Request::Refuse(reason),
        };
        self.subscriber.send_request(request);
    }

    /// Checks the request itself and the caller's permission. Clients can observe the order of the checks.
    fn check(&self, create: &WatchCreateRequest) -> Result<Create, Cow<'static, str>> {
        let key = if create.key.is_empty() { FIRST_KEY } else { &create.key };
        if create.start_revision < 0 {
            return Err(Error::Compacted.to_string().into());
        }
        (self.gate)(key, &create.range_end)?;
        if key.len().max(create.range_end.len()) > MAX_KEY_BYTES {
            return Err(Error::RequestTooLarge.to_string().into());
        }
        // Copies: a watch must not keep the buffer in which its request was received.
        let interval = Interval::new(Bytes::copy_from_slice(key), Bytes::copy_from_slice(&create.range_end));
        if matches!(&interval, Interval::Range(start, end) if start >= end) {
            return Err(EMPTY_RANGE.into());
        }
        let filtered = |filter: FilterType| create.filters.contains(&(filter as i32));
        let options = WatchOptions {
            no_put: filtered(FilterType::Noput),
            no_delete: filtered(FilterType::Nodelete),
            previous: create.prev_kv,
            progress: create.progress_notify,
            fragment: create.fragment,
        };
        Ok(Create { id: create.watch_id, interval, start: create.start_revision, options })
    }

    /// Sends pending responses while the line has capacity. Returns whether all were sent.
    fn send_responses(&mut self, line: &mut dyn StreamIo) -> bool {
        if self.pending.is_empty() && self.fragmented.is_none() {
            return true;
        }
        let (started, mut sent) = (Instant::now(), WatchResponseCounts::default());
        let is_done = self.send_pending(line, &mut sent);
        metrics::observe_watch_send(sent, started.elapsed());
        is_done
    }

    fn send_pending(&mut self, line: &mut dyn StreamIo, sent: &mut WatchResponseCounts) -> bool {
        while line.can_send() {
            if let Some((events, next)) = self.fragmented.take() {
                let message = self.next_fragment(events, next);
                line.send(message);
            } else if let Some(response) = self.pending.pop_front() {
                count(&response, sent);
                let message = self.encode(response);
                line.send(message);
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

impl Conversation for Watching {
    fn step(&mut self, line: &mut dyn StreamIo) -> Step {
        self.charged = 0;
        loop {
            let could_ask = self.subscriber.can_send_request();
            let received = match self.receive_requests(line) {
                Ok(received) => received,
                Err(refusal) => return Step::End(Err(refusal)),
            };
            // Responses that cannot be sent stay in the outbox, which is bounded.
            if !self.send_responses(line) || !line.can_send() {
                return Step::Wait;
            }
            if let Err(watch::Stopped) = self.subscriber.take(&mut self.pending, line.waker()) {
                let message = Error::Stopped.to_string().into();
                return Step::End(Err(CallError { code: Code::Unavailable, message }));
            }
            // The outbox may have capacity now for requests that could not be passed on before.
            let can_receive = received || !could_ask && self.subscriber.can_send_request();
            if self.pending.is_empty() && !can_receive {
                return Step::Wait;
            }
        }
    }

    fn held_bytes(&self) -> usize {
        let fragmented = self.fragmented.as_ref().map_or(0, |(events, _)| events.frames.cost());
        self.subscriber.held() + fragmented + self.pending.iter().map(Response::cost).sum::<usize>()
    }
}
