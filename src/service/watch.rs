//! Watch streams: which watches are admitted to a stream.
//!
//! Requests go to the hub in the order in which they arrived, and all responses come out of the stream's outbox in the order in
//! which the hub put them there. So the order is not decided here.

use std::{borrow::Cow, collections::VecDeque, sync::Arc, task::Waker};

use bytes::Bytes;

use super::{
    Caller, Operation, Service,
    auth::{TokenBarrier, audit},
};
use crate::{
    error::Error,
    metrics,
    mvcc::Interval,
    proto::etcdserverpb::{WatchCreateRequest, watch_create_request::FilterType},
    state::permission::Access,
    watch::{self, Create, Request, Response, Stopped, Subscriber, WatchOptions},
};

/// Whether the caller may watch from a key to a range end (as it was sent); the error is the cancel reason that the client gets.
pub type WatchPermission = Box<dyn Fn(&[u8], &[u8]) -> Result<(), Cow<'static, str>> + Send>;

const TOO_MANY_BYTES: &str =
    "etcdserver: the watches of this connection take too much memory (--max-connection-bytes, --max-held-bytes)";
const EMPTY_RANGE: &str = "mvcc: watcher range is empty";

/// The longest key and range end of a watch, because a watch keeps them for as long as it lives, and each of its comparisons
/// reads them. Keys themselves may be longer; a watch of a range that begins before them receives their events.
const MAX_KEY_BYTES: usize = 16 << 10;

/// The first of all keys, which an empty key stands for.
const FIRST_KEY: &[u8] = &[0];

/// A stream of watches. Dropping it cancels them all.
pub struct WatchStream {
    subscriber: Subscriber,
    permission: WatchPermission,
    /// None: the caller need not be identified.
    token: Option<TokenBarrier>,
    /// What the watches that were requested since [`WatchStream::begin_step`] count as held.
    requested_bytes: usize,
}

impl Service {
    /// `denial` writes an error as the reason for which a watch is refused.
    pub fn open_watch_stream(
        self: &Arc<Self>,
        caller: &Caller,
        denial: fn(&Error) -> String,
    ) -> Result<WatchStream, Error> {
        self.check_request(caller, &Operation::Watch)?;
        let (service, watcher) = (self.clone(), caller.clone());
        let permission = move |key: &[u8], range_end: &[u8]| {
            let checked = service.authorize_read(&watcher, |check| check.keys(Access::Read, key, range_end));
            checked.map(drop).map_err(|error| {
                let identity = service.identify(&watcher).unwrap_or_default();
                audit::denied(&watcher, &identity, Operation::Watch.name(), &error);
                denial(&error).into()
            })
        };
        let token = Some(TokenBarrier::new(self, caller));
        Ok(WatchStream { token, ..WatchStream::new(self.hub.open(), Box::new(permission)) })
    }
}

impl WatchStream {
    /// A stream without watches.
    #[must_use]
    pub fn new(subscriber: Subscriber, permission: WatchPermission) -> Self {
        Self { subscriber, permission, token: None, requested_bytes: 0 }
    }

    /// To be called when the bytes that may be held for the client are known anew.
    pub fn begin_step(&mut self) {
        self.requested_bytes = 0;
    }

    /// Whether the caller of the stream can be identified, so that requests can be made. If not, `waker` is woken when it can be.
    pub fn can_identify_caller(&mut self, waker: &Waker) -> bool {
        self.token.as_mut().is_none_or(|token| token.is_passed(waker))
    }

    /// Whether a request may be made now. If not, responses have to be taken first.
    #[must_use]
    pub fn can_request(&self) -> bool {
        self.subscriber.can_send_request()
    }

    /// Creates a watch. `spare` is how many bytes more than at the beginning of this step may be held for the client.
    pub fn create(&mut self, create: &WatchCreateRequest, spare: usize) {
        let request = match self.check(create) {
            Ok(create) if self.requested_bytes + watch::watch_cost(&create.interval) > spare => {
                metrics::refused("watches");
                Request::Refuse(TOO_MANY_BYTES.into())
            }
            Ok(create) => {
                self.requested_bytes += watch::watch_cost(&create.interval);
                Request::Create(create)
            }
            Err(reason) => Request::Refuse(reason),
        };
        self.subscriber.send_request(request);
    }

    /// Cancels a watch.
    pub fn cancel(&mut self, watch_id: i64) {
        self.subscriber.send_request(Request::Cancel(watch_id));
    }

    /// Asks for a progress notification of the whole stream.
    pub fn request_progress(&mut self) {
        self.subscriber.send_request(Request::Progress);
    }

    /// Takes some responses. If there are none, the waker is woken when there are, or when more requests may be made.
    pub fn take(&mut self, into: &mut VecDeque<Response>, waker: &Waker) -> Result<(), Stopped> {
        self.subscriber.take(into, waker)
    }

    /// The bytes held for this stream.
    #[must_use]
    pub fn held(&self) -> usize {
        self.subscriber.held()
    }

    /// Checks the request itself and the caller's permission. Clients can observe the order of the checks.
    fn check(&self, create: &WatchCreateRequest) -> Result<Create, Cow<'static, str>> {
        let key = if create.key.is_empty() { FIRST_KEY } else { &create.key };
        if create.start_revision < 0 {
            return Err(Error::Compacted.to_string().into());
        }
        (self.permission)(key, &create.range_end)?;
        if key.len().max(create.range_end.len()) > MAX_KEY_BYTES {
            metrics::refused("request_bytes");
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
}
