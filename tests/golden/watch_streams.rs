//! The watch hub of a state machine, stepped manually, and its named watch streams.

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
    parse::{self, Args},
};

type Output = Result<String, Box<dyn Error>>;

/// The interval of progress notifications.
const PERIOD: Duration = Duration::from_secs(10);

pub struct WatchHarness {
    reader: Reader,
    publisher: Publisher,
    hub: Arc<Hub>,
    core: HubCore,
    gauges: Gauges,
    now: Duration,
    streams: BTreeMap<String, Client>,
}

impl WatchHarness {
    pub fn new(reader: Reader, settings: Settings) -> Self {
        let gauges = Gauges::detached();
        let (publisher, hub, core) = Hub::assemble(reader.clone(), settings, gauges.clone());
        Self { reader, publisher, hub, core, gauges, now: Duration::ZERO, streams: BTreeMap::new() }
    }

    /// Makes events deliverable as soon as the head is published.
    pub fn append(&mut self, events: Vec<Event>, head: i64) {
        self.publisher.append(events, head);
    }

    /// Runs a watch command; None if it is not one.
    pub fn run(&mut self, name: &str, args: &mut Args) -> Option<Output> {
        Some(match name {
            "hub" => self.replace_hub(args),
            "watch" => create(args).and_then(|create| self.send_request(args, RequestUnion::CreateRequest(create))),
            "cancel" => args.expect_number().and_then(|watch_id| {
                self.send_request(args, RequestUnion::CancelRequest(WatchCancelRequest { watch_id }))
            }),
            "progress" => self.send_request(args, RequestUnion::ProgressRequest(WatchProgressRequest {})),
            "receive" => self.stream(args).map(|stream| self.receive(&stream)),
            "stall" => self.set_capacity(args, 0),
            "resume" => self.set_capacity(args, usize::MAX),
            "leave" => self.stream(args).map(|stream| self.leave(&stream)),
            "wait" => args.expect_number().and_then(|seconds| self.wait(seconds)),
            "counts" => Ok(self.counts()),
            _ => return None,
        })
    }

    /// Starts a new hub with the limits given in the script. Closes all streams.
    fn replace_hub(&mut self, args: &mut Args) -> Output {
        let bytes = |option: Option<String>, default| option.map_or(Ok(default), |text| text.parse());
        let default = Settings::default();
        let ring_bytes = bytes(args.option("ring"), default.ring_bytes)?;
        let pending_bytes = bytes(args.option("pending"), default.pending_bytes)?;
        let watches_per_stream = bytes(args.option("watches"), default.watches_per_stream)?;
        let settings = Settings { ring_bytes, pending_bytes, watches_per_stream, ..default };
        *self = Self::new(self.reader.clone(), settings);
        Ok(String::new())
    }

    /// The name of the stream that a command uses. Opens the stream if it is not open.
    fn stream(&mut self, args: &mut Args) -> Result<String, Box<dyn Error>> {
        let name = args.option("stream").unwrap_or_default();
        let fragment_bytes = args.option("parts").map_or(Ok(FRAGMENT_BYTES), |bytes| bytes.parse())?;
        if !self.streams.contains_key(&name) {
            let subscriber = self.hub.open_with_period(PERIOD);
            self.streams
                .insert(name.clone(), Client::with_permission(subscriber, fragment_bytes, Box::new(|_, _| Ok(()))));
        }
        Ok(name)
    }

    fn client(&mut self, name: &str) -> &mut Client {
        self.streams.get_mut(name).expect("the stream was opened")
    }

    /// Sends a request; shows the responses that the stream receives.
    fn send_request(&mut self, args: &mut Args, request: RequestUnion) -> Output {
        let stream = self.stream(args)?;
        self.client(&stream).ask(request);
        Ok(self.receive(&stream))
    }

    fn receive(&mut self, stream: &str) -> String {
        let (hub, core, now) = (&self.hub, &mut self.core, self.now);
        let client = self.streams.get_mut(stream).expect("the stream was opened");
        let received = client.receive(|| _ = hub.settle(core, now).unwrap());
        received.iter().map(text).collect::<Vec<_>>().join("\n").replace('\0', "\\0")
    }

    /// Sets how many responses a client takes at a time.
    fn set_capacity(&mut self, args: &mut Args, capacity: usize) -> Output {
        let stream = self.stream(args)?;
        self.client(&stream).line.capacity = capacity;
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

    /// Steps the hub until it has nothing left to do.
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
fn create(args: &mut Args) -> Result<WatchCreateRequest, Box<dyn Error>> {
    let (key, range_end) = (args.word().unwrap_or_default(), args.word().unwrap_or_default());
    let filters = [("no_put", FilterType::Noput), ("no_delete", FilterType::Nodelete)];
    let filters = filters.into_iter().filter_map(|(name, filter)| args.flag(name).then_some(filter as i32)).collect();
    Ok(WatchCreateRequest {
        key: parse::bytes(&key),
        range_end: parse::bytes(&range_end),
        start_revision: args.number("from")?,
        progress_notify: args.flag("notify"),
        filters,
        prev_kv: args.flag("prev_kv"),
        watch_id: args.number("id")?,
        fragment: args.flag("fragment"),
    })
}
