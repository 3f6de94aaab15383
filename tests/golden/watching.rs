//! Those who watch a machine: its hub, stepped by hand, and streams that a script gives names.

use std::{collections::BTreeMap, error::Error, sync::Arc, time::Duration};

use metastore::{
    mvcc::{Event, Reader},
    proto::etcdserverpb::{
        WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, watch_create_request::FilterType,
        watch_request::RequestUnion,
    },
    watch::{Gauges, Hub, HubCore, Publisher, Settings},
};

use crate::{
    client::{Client, FRAGMENT_BYTES, text},
    language::{self, Words},
};

type Output = Result<String, Box<dyn Error>>;

/// How often a stream says that nothing happened.
const PERIOD: Duration = Duration::from_secs(10);

/// A hub and its streams.
pub struct Watchers {
    reader: Reader,
    publisher: Publisher,
    hub: Arc<Hub>,
    core: HubCore,
    gauges: Gauges,
    now: Duration,
    streams: BTreeMap<String, Client>,
}

impl Watchers {
    pub fn new(reader: Reader, settings: Settings) -> Self {
        let gauges = Gauges::detached();
        let (publisher, hub, core) = Hub::assemble(reader.clone(), settings, gauges.clone());
        Self { reader, publisher, hub, core, gauges, now: Duration::ZERO, streams: BTreeMap::new() }
    }

    /// Makes events deliverable as soon as the head is published.
    pub fn append(&mut self, events: Vec<Event>, head: i64) {
        self.publisher.append(events, head);
    }

    /// What a command comes to; None if it is none of these.
    pub fn run(&mut self, name: &str, words: &mut Words) -> Option<Output> {
        Some(match name {
            "hub" => self.start_anew(words),
            "watch" => create(words).and_then(|create| self.ask(words, RequestUnion::CreateRequest(create))),
            "cancel" => words
                .expect_number()
                .and_then(|watch_id| self.ask(words, RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))),
            "progress" => self.ask(words, RequestUnion::ProgressRequest(WatchProgressRequest {})),
            "hear" => self.stream(words).map(|stream| self.hear(&stream)),
            "stall" => self.set_room(words, 0),
            "listen" => self.set_room(words, usize::MAX),
            "leave" => self.stream(words).map(|stream| self.leave(&stream)),
            "wait" => words.expect_number().and_then(|seconds| self.wait(seconds)),
            "counts" => Ok(self.counts()),
            _ => return None,
        })
    }

    /// Begins with a new hub, which remembers and keeps back as much as the script says. All streams are gone.
    fn start_anew(&mut self, words: &mut Words) -> Output {
        let bytes = |option: Option<String>, default| option.map_or(Ok(default), |text| text.parse());
        let default = Settings::default();
        let ring_bytes = bytes(words.option("ring"), default.ring_bytes)?;
        let pending_bytes = bytes(words.option("pending"), default.pending_bytes)?;
        let watches_per_stream = bytes(words.option("watches"), default.watches_per_stream)?;
        let settings = Settings { ring_bytes, pending_bytes, watches_per_stream, ..default };
        *self = Self::new(self.reader.clone(), settings);
        Ok(String::new())
    }

    /// The name of the stream that a command is about. It is opened if it is not open.
    fn stream(&mut self, words: &mut Words) -> Result<String, Box<dyn Error>> {
        let name = words.option("stream").unwrap_or_default();
        let fragment_bytes = words.option("parts").map_or(Ok(FRAGMENT_BYTES), |bytes| bytes.parse())?;
        if !self.streams.contains_key(&name) {
            let subscriber = self.hub.open_with_period(PERIOD);
            self.streams.insert(name.clone(), Client::with_gate(subscriber, fragment_bytes, Box::new(|_, _| Ok(()))));
        }
        Ok(name)
    }

    fn client(&mut self, name: &str) -> &mut Client {
        self.streams.get_mut(name).expect("it was opened")
    }

    /// Asks for something; shows what the stream hears then.
    fn ask(&mut self, words: &mut Words, request: RequestUnion) -> Output {
        let stream = self.stream(words)?;
        self.client(&stream).ask(request);
        Ok(self.hear(&stream))
    }

    fn hear(&mut self, stream: &str) -> String {
        let (hub, core, now) = (&self.hub, &mut self.core, self.now);
        let client = self.streams.get_mut(stream).expect("it was opened");
        let heard = client.hear(|| _ = hub.settle(core, now).unwrap());
        heard.iter().map(text).collect::<Vec<_>>().join("\n").replace('\0', "\\0")
    }

    /// From now on a client takes this many responses at a time.
    fn set_room(&mut self, words: &mut Words, room: usize) -> Output {
        let stream = self.stream(words)?;
        self.client(&stream).line.room = room;
        self.settle();
        Ok(String::new())
    }

    fn leave(&mut self, stream: &str) -> String {
        self.streams.remove(stream);
        self.settle();
        String::new()
    }

    fn wait(&mut self, seconds: i64) -> Output {
        self.now += Duration::from_secs(u64::try_from(seconds)?);
        self.settle();
        Ok(String::new())
    }

    /// Lets the hub do all that it can.
    pub fn settle(&mut self) {
        self.hub.settle(&mut self.core, self.now).unwrap();
    }

    fn counts(&mut self) -> String {
        self.settle();
        let Gauges { streams, watches, lagging, pending, .. } = &self.gauges;
        let [streams, watches, lagging, pending] = [streams, watches, lagging, pending].map(prometheus::IntGauge::get);
        format!("streams={streams} watches={watches} lagging={lagging} pending={pending}")
    }
}

/// `watch key [end] [from=] [id=] [prev_kv] [notify] [fragment] [no_put] [no_delete]`
fn create(words: &mut Words) -> Result<WatchCreateRequest, Box<dyn Error>> {
    let (key, range_end) = (words.word().unwrap_or_default(), words.word().unwrap_or_default());
    let filters = [("no_put", FilterType::Noput), ("no_delete", FilterType::Nodelete)];
    let filters = filters.into_iter().filter_map(|(name, filter)| words.flag(name).then_some(filter as i32)).collect();
    Ok(WatchCreateRequest {
        key: language::bytes(&key),
        range_end: language::bytes(&range_end),
        start_revision: words.number("from")?,
        progress_notify: words.flag("notify"),
        filters,
        prev_kv: words.flag("prev_kv"),
        watch_id: words.number("id")?,
        fragment: words.flag("fragment"),
    })
}
