//! Watches that start during writes, with all threads running.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    task::{Wake, Waker},
    thread::{self, Thread},
    time::Instant,
};

use metastore::{
    mvcc::{
        Reader,
        compact::{Compaction, CompactionProgress},
    },
    watch::{Hub, Settings},
};

use crate::{
    client::Client,
    support::time_limit,
    world::{World, from, on},
};

/// Wakes a parked thread.
struct ThreadWaker(Thread);

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Controls the writer.
#[derive(Default)]
struct WriterControl {
    stop: AtomicBool,
    /// No watch starts below this revision.
    needed: AtomicI64,
}

/// Puts one key until `stop` is set, and compacts revisions that are not needed.
fn write(mut world: World, control: &WriterControl) {
    use metastore::storage::Engine;
    while !control.stop.load(Ordering::Relaxed) {
        let head = world.put("a", "value");
        let needed = control.needed.load(Ordering::Relaxed);
        if head % 5000 == 0 && needed > world.reader.compacted() {
            world.compact(needed);
            let mut compaction = Compaction::pending(world.machine.shared());
            while compaction
                .as_mut()
                .is_some_and(|compaction| compaction.step(1000).unwrap() != CompactionProgress::Done)
            {
                thread::yield_now(); // Waits for a reader of the history.
            }
            world.engine.flush().unwrap();
        }
        thread::yield_now();
    }
}

/// Starts a watch near the current revision and reads a few events.
fn watch_once(hub: &Hub, reader: &Reader, control: &WriterControl, nth: i64) {
    let mut client = Client::new(hub.open());
    client.line.waker = Waker::from(Arc::new(ThreadWaker(thread::current())));
    let head = reader.head();
    control.needed.store((head - 100).max(1), Ordering::Relaxed);
    let start = match nth % 4 {
        0 => 0,
        1 => head + 1,
        2 => head,
        _ => (head - nth % 100).max(1),
    };
    client.create(from(start, on("a")));
    let (mut next, mut received) = (None, 0);
    while received < 5 {
        client.step();
        let responses = std::mem::take(&mut client.line.sent);
        if responses.is_empty() {
            let (limit, parked) = (time_limit(), Instant::now());
            thread::park_timeout(limit);
            assert!(parked.elapsed() < limit, "waited {limit:?} for the events from {next:?} on");
        }
        for response in responses {
            let revision = response.header.as_ref().unwrap().revision;
            if response.created {
                next = Some(if start == 0 { revision + 1 } else { start.max(2) });
            }
            assert!(!response.canceled);
            for event in response.events {
                let revision = event.kv.unwrap().mod_revision;
                assert_eq!(Some(revision), next, "start {start}, head {head}");
                next = Some(revision + 1);
                received += 1;
            }
        }
    }
}

fn race(watches: i64) {
    let mut world = World::new();
    let (publisher, hub) = Hub::start(world.reader.clone(), Settings { ring_bytes: 1 << 16, ..Settings::default() });
    world.publisher = publisher;
    let reader = world.reader.clone();
    let control = Arc::new(WriterControl::default());
    let writer = thread::spawn({
        let control = control.clone();
        move || write(world, &control)
    });
    for nth in 0..watches {
        watch_once(&hub, &reader, &control, nth);
    }
    control.stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    hub.stop();
}

/// FAULT-30.
#[test]
fn a_watch_that_starts_during_writes_misses_and_repeats_nothing() {
    race(500);
}

#[test]
#[ignore = "long"]
fn ten_thousand_watches_that_start_during_writes_miss_and_repeat_nothing() {
    race(10_000);
}
