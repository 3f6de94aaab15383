//! The watches of one server, and what they have told.
//!
//! Two streams: one for watches that begin in the past or now, which can be asked how far they are, and one for those that
//! begin later, because a watch that has not begun keeps its whole stream from answering that question. The first watch of
//! each looks at a key of its own, so that no stream is ever without one.

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
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, transport::Channel};

use super::shortened;

/// The key that the first watch of each stream looks at.
pub const OWN_KEY: &[u8] = b"~watched";
/// How long may pass until something awaited has come.
const LIMIT: Duration = Duration::from_secs(20);
/// A server need not answer a question for progress; it is asked again after this long.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// What a watch told, as far as two servers have to agree on it.
#[derive(Debug, Clone, PartialEq)]
pub enum Note {
    Created {
        revision: i64,
    },
    Refused {
        reason: String,
        revision: i64,
    },
    Event(Event),
    /// Here a response was cut that goes on in the next one.
    Cut,
    Canceled {
        reason: String,
        compact_revision: i64,
        revision: i64,
    },
}

/// What has come on one stream since it was last looked at, by watch.
#[derive(Debug, Default)]
pub struct Notes {
    pub by_watch: BTreeMap<i64, Vec<Note>>,
    created: Vec<i64>,
    canceled: Vec<i64>,
    /// Canceled because of a compaction.
    lost: BTreeSet<i64>,
    progress: i64,
    /// Where the last response of a watch ended, to see that no revision is torn.
    ends: BTreeMap<i64, (i64, bool)>,
    ended: Option<String>,
}

/// One stream of watches.
pub struct Stream {
    requests: mpsc::UnboundedSender<WatchRequest>,
    notes: Arc<Mutex<Notes>>,
    arrived: Arc<Notify>,
}

impl Stream {
    /// A stream with its first watch.
    pub async fn open(channel: &Channel) -> Self {
        let (requests, receiver) = mpsc::unbounded_channel();
        let (notes, arrived) = (Arc::new(Mutex::new(Notes::default())), Arc::new(Notify::new()));
        let client = WatchClient::new(channel.clone()).max_decoding_message_size(usize::MAX);
        tokio::spawn(listen(client, receiver, Arc::clone(&notes), Arc::clone(&arrived)));
        let stream = Self { requests, notes, arrived };
        let first = WatchCreateRequest { key: OWN_KEY.into(), ..WatchCreateRequest::default() };
        assert_eq!(stream.create(first).await, 0, "the first watch has the first ID");
        stream
    }

    /// Creates a watch and waits for the answer: the ID, or -1.
    pub async fn create(&self, request: WatchCreateRequest) -> i64 {
        self.send(RequestUnion::CreateRequest(request));
        self.until("a watch is created", |notes| notes.created.pop()).await
    }

    /// Cancels a watch; where it is known to exist, waits for the answer.
    pub async fn cancel(&self, watch_id: i64, exists: bool) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
        if exists {
            self.until_canceled(watch_id).await;
        }
    }

    /// Waits until a watch has ended.
    pub async fn until_canceled(&self, watch_id: i64) {
        let ended = |notes: &mut Notes| {
            let at = notes.canceled.iter().position(|&id| id == watch_id)?;
            Some(notes.canceled.swap_remove(at))
        };
        self.until("a watch is canceled", ended).await;
    }

    /// Waits until all events up to `revision` have come.
    pub async fn until_progress(&self, revision: i64) {
        let asking = async {
            loop {
                self.send(RequestUnion::ProgressRequest(WatchProgressRequest {}));
                let answer = self.until("there is progress", |notes| (notes.progress >= revision).then_some(()));
                if timeout(ASK_AGAIN, answer).await.is_ok() {
                    return;
                }
            }
        };
        timeout(LIMIT, asking).await.unwrap_or_else(|_| panic!("no progress to {revision}: {:?}", self.notes.lock()));
    }

    /// Waits until the first watch has seen `revision`.
    pub async fn until_own_event(&self, revision: i64) {
        let seen = |notes: &mut Notes| {
            let own = notes.by_watch.get(&0)?;
            let is_it =
                |note: &Note| matches!(note, Note::Event(event) if event.kv.as_ref().unwrap().mod_revision == revision);
            own.iter().any(is_it).then_some(())
        };
        self.until("the first watch sees its event", seen).await;
    }

    /// Waits until both streams have told the same, forgets it and tells how much it was; else tells what differs.
    pub async fn agree(&self, other: &Self) -> Result<usize, String> {
        let agreed = |notes: &mut Notes| {
            let mut others = other.notes.lock();
            if notes.by_watch != others.by_watch {
                return None;
            }
            others.by_watch.clear();
            Some(std::mem::take(&mut notes.by_watch).values().map(Vec::len).sum())
        };
        let both = async {
            loop {
                if let Some(told) = agreed(&mut self.notes.lock()) {
                    return told;
                }
                _ = timeout(ASK_AGAIN, other.arrived.notified()).await;
            }
        };
        let told = timeout(LIMIT / 4, both).await;
        told.map_err(|_| difference(&self.notes.lock().by_watch, &other.notes.lock().by_watch))
    }

    /// Forgets what was told.
    pub fn forget(&self) {
        self.notes.lock().by_watch.clear();
    }

    fn send(&self, union: RequestUnion) {
        // A stream that has ended says so where its answer is awaited.
        _ = self.requests.send(WatchRequest { request_union: Some(union) });
    }

    async fn until<T>(&self, what: &str, mut found: impl FnMut(&mut Notes) -> Option<T>) -> T {
        let waiting = async {
            loop {
                let arrived = self.arrived.notified();
                {
                    let mut notes = self.notes.lock();
                    if let Some(found) = found(&mut notes) {
                        return found;
                    }
                    assert!(notes.ended.is_none(), "waiting until {what}, the stream ended: {:?}", notes.ended);
                }
                arrived.await;
            }
        };
        timeout(LIMIT, waiting).await.unwrap_or_else(|_| panic!("waited {LIMIT:?} until {what}"))
    }
}

async fn listen(
    mut client: WatchClient<Channel>,
    requests: mpsc::UnboundedReceiver<WatchRequest>,
    notes: Arc<Mutex<Notes>>,
    arrived: Arc<Notify>,
) {
    let result: Result<(), Status> = async {
        let mut responses = client.watch(UnboundedReceiverStream::new(requests)).await?.into_inner();
        while let Some(response) = responses.message().await? {
            notes.lock().take(response);
            arrived.notify_one();
        }
        Ok(())
    }
    .await;
    notes.lock().ended = Some(format!("{result:?}"));
    arrived.notify_one();
}

impl Notes {
    fn take(&mut self, response: WatchResponse) {
        let id = response.watch_id;
        let revision = response.header.expect("every response has a header").revision;
        if response.created && response.canceled {
            self.created.push(-1);
            self.note(-1, Note::Refused { reason: response.cancel_reason, revision });
        } else if response.created {
            self.created.push(id);
            self.ends.remove(&id);
            self.lost.remove(&id);
            self.note(id, Note::Created { revision });
        } else if response.canceled {
            let (reason, compact_revision) = (response.cancel_reason, response.compact_revision);
            // What was canceled because of a compaction is canceled again by its client; etcd answers that, ours need not.
            if compact_revision > 0 {
                self.lost.insert(id);
            } else if self.lost.remove(&id) {
                return;
            }
            self.canceled.push(id);
            self.note(id, Note::Canceled { reason, compact_revision, revision });
        } else if response.events.is_empty() {
            self.progress = self.progress.max(revision);
        } else {
            self.take_events(response, revision);
        }
    }

    fn take_events(&mut self, response: WatchResponse, revision: i64) {
        let id = response.watch_id;
        let at = |event: &Event| event.kv.as_ref().expect("an event has a key").mod_revision;
        let (first, last) = (at(&response.events[0]), at(response.events.last().unwrap()));
        let (before, in_parts) = self.ends.insert(id, (last, response.fragment)).unwrap_or_default();
        assert!(before < first || (in_parts && before == first), "watch {id} was told {before} and then {first} again");
        assert!(response.events.is_sorted_by_key(at), "watch {id} was told events out of order");
        assert!(revision >= last, "a header of {revision} with an event of {last}");
        for event in response.events {
            self.note(id, Note::Event(event));
        }
        if response.fragment {
            self.note(id, Note::Cut);
        }
    }

    fn note(&mut self, id: i64, note: Note) {
        self.by_watch.entry(id).or_default().push(note);
    }
}

fn difference(ours: &BTreeMap<i64, Vec<Note>>, theirs: &BTreeMap<i64, Vec<Note>>) -> String {
    let ids: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
    let none = Vec::new();
    let mut told = String::new();
    for id in ids {
        let (ours, theirs) = (ours.get(id).unwrap_or(&none), theirs.get(id).unwrap_or(&none));
        if ours != theirs {
            let same = ours.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
            _ = write!(
                told,
                "watch {id}: {} notes and {}; after {same} equal ones\n  ours: {:?}\n  etcd: {:?}\n",
                ours.len(),
                theirs.len(),
                ours.get(same).map(|note| shortened(&format!("{note:?}"))),
                theirs.get(same).map(|note| shortened(&format!("{note:?}")))
            );
        }
    }
    told
}
