//! One Watch stream: many watches, their creation, cancellation and progress, and large responses in parts.
//!
//! Requests go to the hub in the order in which they came, and everything the client hears comes out of the stream's outbox
//! in the order in which the hub put it there. So this file promises nothing about order; it reads requests, and writes
//! responses around events that are encoded already.

use std::{borrow::Cow, collections::VecDeque, sync::Arc, time::Instant};

use bytes::Bytes;
use prost::Message;

use super::{Api, decode_streamed, header::Header};
use crate::{
    call::{Code, Conversation, Line, Metadata, Refusal, Step},
    error::Error,
    metrics::{self, METRICS, Sent},
    mvcc::Interval,
    proto::etcdserverpb::{
        WatchCreateRequest, WatchRequest, WatchResponse, watch_create_request::FilterType, watch_request::RequestUnion,
    },
    watch::{self, Create, Events, NOBODY, Request, Response, Subscriber, Wishes},
};

/// Says whether the caller may watch from a key to a range end (as it was sent), or else what he is told.
pub type Gate = Box<dyn Fn(&[u8], &[u8]) -> Result<(), Cow<'static, str>> + Send>;

const EMPTY_RANGE: &str = "mvcc: watcher range is empty";

/// A watch keeps its key and its end for as long as it lives, and each of its comparisons reads them: no longer ones are
/// watched. Keys as such may be longer; a watch of a range that begins before them hears of them.
const MAX_KEY_BYTES: usize = 16 << 10;

/// The key that an empty key means, as the first of all keys.
const FIRST_KEY: &[u8] = &[0];

/// A Watch stream.
pub struct Watching {
    subscriber: Subscriber,
    header: Header,
    gate: Gate,
    fragment_bytes: usize,
    taken: VecDeque<Response>,
    /// A response of which some parts were sent, and its events from which on the rest was not. Nothing comes in between.
    parted: Option<(Events, usize)>,
    /// What the watches count for that were asked for in this step.
    charged: usize,
}

impl Api {
    /// `Watch/Watch`.
    pub fn watch(self: &Arc<Self>, _metadata: Metadata) -> Box<dyn Conversation> {
        let gate = Box::new(|_key: &[u8], _range_end: &[u8]| Ok(())); // Nobody has to say who he is yet.
        Box::new(Watching::new(self.hub.open(), self.header.clone(), gate, self.limits.max_message_bytes()))
    }
}

impl Watching {
    /// A stream without watches. Responses that may be split are, from `fragment_bytes` on.
    #[must_use]
    pub fn new(subscriber: Subscriber, header: Header, gate: Gate, fragment_bytes: usize) -> Self {
        Self { subscriber, header, gate, fragment_bytes, taken: VecDeque::new(), parted: None, charged: 0 }
    }

    /// Passes requests on, as long as there are any and their answers have somewhere to go. True if there were some.
    fn hear(&mut self, line: &mut dyn Line) -> Result<bool, Refusal> {
        let mut heard = false;
        while self.subscriber.may_ask()
            && let Some(message) = line.receive()
        {
            heard = true;
            let request: WatchRequest = decode_streamed(message)?;
            match request.request_union {
                Some(RequestUnion::CreateRequest(create)) => self.create(&create, line.spare()),
                Some(RequestUnion::CancelRequest(cancel)) => self.subscriber.ask(Request::Cancel(cancel.watch_id)),
                Some(RequestUnion::ProgressRequest(_)) => self.subscriber.ask(Request::Progress),
                None => (), // A kind of request that is not known yet.
            }
        }
        Ok(heard)
    }

    /// `spare` is what may be kept for the client beside what was before this step.
    fn create(&mut self, create: &WatchCreateRequest, spare: usize) {
        let request = match self.check(create) {
            Ok(create) if self.charged + watch::charge(&create.interval) > spare => {
                METRICS.refused.with_label_values(&["watches"]).inc();
                Request::Refuse(Error::TooManyRequests.to_string().into())
            }
            Ok(create) => {
                self.charged += watch::charge(&create.interval);
                Request::Create(create)
            }
            Err(reason) => Request::Refuse(reason),
        };
        self.subscriber.ask(request);
    }

    /// Checks what can be checked by looking at the request alone, and who asks. The order can be observed.
    fn check(&self, create: &WatchCreateRequest) -> Result<Create, Cow<'static, str>> {
        let key = if create.key.is_empty() { FIRST_KEY } else { &create.key };
        if create.start_revision < 0 {
            return Err(Error::Compacted.to_string().into());
        }
        (self.gate)(key, &create.range_end)?;
        if key.len().max(create.range_end.len()) > MAX_KEY_BYTES {
            return Err(Error::RequestTooLarge.to_string().into());
        }
        // Copies: a watch shall not keep the buffer in which its request came.
        let interval = Interval::new(Bytes::copy_from_slice(key), Bytes::copy_from_slice(&create.range_end));
        if matches!(&interval, Interval::Range(start, end) if start >= end) {
            return Err(EMPTY_RANGE.into());
        }
        let filtered = |filter: FilterType| create.filters.contains(&(filter as i32));
        let wishes = Wishes {
            no_put: filtered(FilterType::Noput),
            no_delete: filtered(FilterType::Nodelete),
            previous: create.prev_kv,
            progress: create.progress_notify,
            fragment: create.fragment,
        };
        Ok(Create { id: create.watch_id, interval, start: create.start_revision, wishes })
    }

    /// Sends what was taken, while there is room. True if all is sent.
    fn speak(&mut self, line: &mut dyn Line) -> bool {
        if self.taken.is_empty() && self.parted.is_none() {
            return true;
        }
        let (started, mut sent) = (Instant::now(), Sent::default());
        let is_done = self.speak_of(line, &mut sent);
        metrics::watch_sent(sent, started.elapsed());
        is_done
    }

    fn speak_of(&mut self, line: &mut dyn Line, sent: &mut Sent) -> bool {
        while line.has_room() {
            if let Some((events, next)) = self.parted.take() {
                let message = self.next_part(events, next);
                line.send(message);
            } else if let Some(response) = self.taken.pop_front() {
                count(&response, sent);
                let message = self.encode(response);
                line.send(message);
            } else {
                return true;
            }
        }
        self.taken.is_empty() && self.parted.is_none()
    }

    fn encode(&mut self, response: Response) -> Bytes {
        let response = match response {
            Response::Created { watch, revision } => {
                WatchResponse { watch_id: watch, created: true, ..self.with_header(revision) }
            }
            Response::Refused { reason, revision } => WatchResponse {
                watch_id: NOBODY,
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

    /// The whole response, or its first part if it is so large that it has to be split.
    fn encode_events(&mut self, events: Events) -> Bytes {
        let head = WatchResponse { watch_id: events.watch, ..self.with_header(events.revision) };
        let frames = events.frames.as_slice();
        let size = head.encoded_len() + frames.iter().map(Bytes::len).sum::<usize>();
        if events.fragment && size >= self.fragment_bytes && frames.len() >= 2 {
            return self.next_part(events, 0);
        }
        assemble(&head, frames, size)
    }

    /// The part that begins with the event `first`. What is left behind it is the next thing that is sent.
    fn next_part(&mut self, events: Events, first: usize) -> Bytes {
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
            self.parted = Some((events, first + count));
        }
        message
    }

    fn with_header(&self, revision: i64) -> WatchResponse {
        WatchResponse { header: Some(self.header.at(revision)), ..WatchResponse::default() }
    }
}

fn count(response: &Response, sent: &mut Sent) {
    match response {
        Response::Events(events) => sent.events += events.frames.as_slice().len(),
        Response::Progress { .. } => sent.notices += 1,
        Response::Created { .. }
        | Response::Refused { .. }
        | Response::Canceled { .. }
        | Response::Compacted { .. } => sent.answers += 1,
    }
}

/// Writes a response in one allocation: its events are encoded, and come last.
fn assemble(head: &WatchResponse, frames: &[Bytes], size: usize) -> Bytes {
    let mut out = Vec::with_capacity(size);
    head.encode_raw(&mut out);
    for frame in frames {
        out.extend_from_slice(frame);
    }
    out.into()
}

impl Conversation for Watching {
    fn step(&mut self, line: &mut dyn Line) -> Step {
        self.charged = 0;
        loop {
            let could_ask = self.subscriber.may_ask();
            let heard = match self.hear(line) {
                Ok(heard) => heard,
                Err(refusal) => return Step::End(Err(refusal)),
            };
            // What cannot be sent stays where it is bounded.
            if !self.speak(line) || !line.has_room() {
                return Step::Wait;
            }
            if let Err(watch::Stopped) = self.subscriber.take(&mut self.taken, line.waker()) {
                let message = Error::Stopped.to_string().into();
                return Step::End(Err(Refusal { code: Code::Unavailable, message }));
            }
            // Requests that could not be passed on a moment ago may be by now.
            let can_hear = heard || !could_ask && self.subscriber.may_ask();
            if self.taken.is_empty() && !can_hear {
                return Step::Wait;
            }
        }
    }

    fn held(&self) -> usize {
        let parted = self.parted.as_ref().map_or(0, |(events, _)| events.frames.cost());
        self.subscriber.held() + parted + self.taken.iter().map(Response::cost).sum::<usize>()
    }
}
