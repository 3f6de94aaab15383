//! The watches of one server, and what they have received.
//!
//! There are two streams: one for watches that begin in the past or now, on which progress can be requested, and one for those
//! that begin later, because a watch that has not begun prevents progress responses on its whole stream. The first watch of each
//! stream watches a key of its own, so that no stream is ever without a watch.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use metastore::proto::{
    etcdserverpb::{
        WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
        watch_client::WatchClient, watch_request::RequestUnion,
    },
    mvccpb::Event,
};
use parking_lot::Mutex;
use test_support::scaled;
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, transport::Channel};

use super::{
    answers::{Caller, Token},
    shortened,
};

/// The key of the first watch of each stream.
pub const OWN_KEY: &[u8] = b"~watched";
/// The longest that anything awaited may take.
const TIMEOUT: Duration = Duration::from_secs(20);
/// A server need not answer a progress request; it is repeated after this long.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A part of a watch response, as far as it must be equal on two servers.
#[derive(Debug, Clone, PartialEq)]
pub enum Notification {
    Created {
        revision: i64,
    },
    Refused {
        reason: String,
        revision: i64,
    },
    Event(Event),
    /// The end of a fragment: the response continues in the next one.
    Fragment,
    Canceled {
        reason: String,
        compact_revision: i64,
        revision: i64,
    },
}

/// What one stream has received since the last comparison.
#[derive(Debug, Default)]
pub struct Received {
    pub by_watch: BTreeMap<i64, Vec<Notification>>,
    created: Vec<i64>,
    canceled: Vec<i64>,
    /// Canceled because of a compaction.
    lost: BTreeSet<i64>,
    progress: i64,
    /// The last revision of each watch's last response, and whether that was a fragment, to check that no revision is split.
    ends: BTreeMap<i64, (i64, bool)>,
    ended: Option<String>,
}

/// One stream of watches.
pub struct Stream {
    requests: mpsc::UnboundedSender<WatchRequest>,
    received: Arc<Mutex<Received>>,
    arrived: Arc<Notify>,
}

impl Stream {
    /// A stream with its first watch.
    pub async fn open(channel: &Channel, token: &Token) -> Self {
        let (requests, outgoing) = mpsc::unbounded_channel();
        let (received, arrived) = (Arc::new(Mutex::new(Received::default())), Arc::new(Notify::new()));
        let client =
            WatchClient::with_interceptor(channel.clone(), token.clone()).max_decoding_message_size(usize::MAX);
        tokio::spawn(receive(client, outgoing, Arc::clone(&received), Arc::clone(&arrived)));
        let stream = Self { requests, received, arrived };
        let first = WatchCreateRequest { key: OWN_KEY.into(), ..WatchCreateRequest::default() };
        assert_eq!(stream.create(first).await, 0, "the first watch has the first ID");
        stream
    }

    /// Creates a watch and waits for the answer: the ID, or -1.
    pub async fn create(&self, request: WatchCreateRequest) -> i64 {
        self.send(RequestUnion::CreateRequest(request));
        self.wait_until("a watch is created", |received| received.created.pop()).await
    }

    /// Cancels a watch; where it is known to exist, waits for the answer.
    pub async fn cancel(&self, watch_id: i64, exists: bool) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
        if exists {
            self.until_canceled(watch_id).await;
        }
    }

    /// Waits until a watch is canceled.
    pub async fn until_canceled(&self, watch_id: i64) {
        let ended = |received: &mut Received| {
            let at = received.canceled.iter().position(|&id| id == watch_id)?;
            Some(received.canceled.swap_remove(at))
        };
        self.wait_until("a watch is canceled", ended).await;
    }

    /// Waits until all events up to `revision` have arrived.
    pub async fn until_progress(&self, revision: i64) {
        let asking = async {
            loop {
                self.send(RequestUnion::ProgressRequest(WatchProgressRequest {}));
                let answer =
                    self.wait_until("there is progress", |received| (received.progress >= revision).then_some(()));
                if timeout(RETRY_INTERVAL, answer).await.is_ok() {
                    return;
                }
            }
        };
        timeout(scaled(TIMEOUT), asking)
            .await
            .unwrap_or_else(|_| panic!("no progress to {revision}: {:?}", self.received.lock()));
    }

    /// Waits until the first watch has seen `revision`.
    pub async fn until_own_event(&self, revision: i64) {
        let seen = |received: &mut Received| {
            let own = received.by_watch.get(&0)?;
            let is_it = |notification: &Notification| {
                matches!(notification, Notification::Event(event)
                    if event.kv.as_ref().unwrap().mod_revision == revision)
            };
            own.iter().any(is_it).then_some(())
        };
        self.wait_until("the first watch sees its event", seen).await;
    }

    /// Waits until both streams have received the same, clears it and returns how much it was; on timeout returns the difference.
    pub async fn take_equal(&self, other: &Self) -> Result<usize, String> {
        let take_if_equal = |received: &mut Received| {
            let mut others = other.received.lock();
            if received.by_watch != others.by_watch {
                return None;
            }
            others.by_watch.clear();
            Some(std::mem::take(&mut received.by_watch).values().map(Vec::len).sum())
        };
        let both = async {
            loop {
                if let Some(count) = take_if_equal(&mut self.received.lock()) {
                    return count;
                }
                _ = timeout(RETRY_INTERVAL, other.arrived.notified()).await;
            }
        };
        let count = timeout(scaled(TIMEOUT / 4), both).await;
        count.map_err(|_| difference(&self.received.lock().by_watch, &other.received.lock().by_watch))
    }

    /// Discards what was received.
    pub fn clear_received(&self) {
        self.received.lock().by_watch.clear();
    }

    fn send(&self, union: RequestUnion) {
        // That a stream has ended is reported where an answer is awaited.
        _ = self.requests.send(WatchRequest { request_union: Some(union) });
    }

    async fn wait_until<T>(&self, what: &str, mut found: impl FnMut(&mut Received) -> Option<T>) -> T {
        let waiting = async {
            loop {
                let arrived = self.arrived.notified();
                {
                    let mut received = self.received.lock();
                    if let Some(found) = found(&mut received) {
                        return found;
                    }
                    assert!(received.ended.is_none(), "waiting until {what}, the stream ended: {:?}", received.ended);
                }
                arrived.await;
            }
        };
        timeout(scaled(TIMEOUT), waiting).await.unwrap_or_else(|_| panic!("waited {TIMEOUT:?} until {what}"))
    }
}

async fn receive(
    mut client: WatchClient<Caller>,
    requests: mpsc::UnboundedReceiver<WatchRequest>,
    received: Arc<Mutex<Received>>,
    arrived: Arc<Notify>,
) {
    let result: Result<(), Status> = async {
        let mut responses = client.watch(UnboundedReceiverStream::new(requests)).await?.into_inner();
        while let Some(response) = responses.message().await? {
            received.lock().record(response);
            arrived.notify_one();
        }
        Ok(())
    }
    .await;
    received.lock().ended = Some(format!("{result:?}"));
    arrived.notify_one();
}

impl Received {
    fn record(&mut self, response: WatchResponse) {
        let id = response.watch_id;
        let revision = response.header.expect("every response has a header").revision;
        if response.created && response.canceled {
            self.created.push(-1);
            self.push(-1, Notification::Refused { reason: response.cancel_reason, revision });
        } else if response.created {
            self.created.push(id);
            self.ends.remove(&id);
            self.lost.remove(&id);
            self.push(id, Notification::Created { revision });
        } else if response.canceled {
            let (reason, compact_revision) = (response.cancel_reason, response.compact_revision);
            // After a cancellation because of compaction the client cancels the watch again; etcd answers that, ours need not.
            if compact_revision > 0 {
                self.lost.insert(id);
            } else if self.lost.remove(&id) {
                return;
            }
            self.canceled.push(id);
            self.push(id, Notification::Canceled { reason, compact_revision, revision });
        } else if response.events.is_empty() {
            self.progress = self.progress.max(revision);
        } else {
            self.record_events(response, revision);
        }
    }

    fn record_events(&mut self, response: WatchResponse, revision: i64) {
        let id = response.watch_id;
        let at = |event: &Event| event.kv.as_ref().expect("an event has a key").mod_revision;
        let (first, last) = (at(&response.events[0]), at(response.events.last().unwrap()));
        let (before, in_parts) = self.ends.insert(id, (last, response.fragment)).unwrap_or_default();
        assert!(before < first || (in_parts && before == first), "watch {id} received {before} and then {first} again");
        assert!(response.events.is_sorted_by_key(at), "watch {id} received events out of order");
        assert!(revision >= last, "a header of {revision} with an event of {last}");
        for event in response.events {
            self.push(id, Notification::Event(event));
        }
        if response.fragment {
            self.push(id, Notification::Fragment);
        }
    }

    fn push(&mut self, id: i64, notification: Notification) {
        self.by_watch.entry(id).or_default().push(notification);
    }
}

fn difference(ours: &BTreeMap<i64, Vec<Notification>>, theirs: &BTreeMap<i64, Vec<Notification>>) -> String {
    let ids: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let none = Vec::new();
    let mut text = String::new();
    for id in ids {
        let (ours, theirs) = (ours.get(id).unwrap_or(&none), theirs.get(id).unwrap_or(&none));
        if ours != theirs {
            let same = ours.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
            _ = write!(
                text,
                "watch {id}: {} notifications and {}; after {same} equal ones\n  ours: {:?}\n  etcd: {:?}\n",
                ours.len(),
                theirs.len(),
                ours.get(same).map(|notification| shortened(&format!("{notification:?}"))),
                theirs.get(same).map(|notification| shortened(&format!("{notification:?}")))
            );
        }
    }
    text
}
