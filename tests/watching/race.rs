//! Watches that begin while somebody writes, with all threads running.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    task::{Wake, Waker},
    thread::{self, Thread},
};

use metastore::{
    mvcc::{
        Reader,
        compact::{Compaction, Progress},
    },
    watch::{Hub, Settings},
};

use crate::{
    client::Client,
    world::{World, from, on},
};

/// Wakes a thread that is parked.
struct Parked(Thread);

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// What the writer has to know.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    /// Nobody begins a watch below.
    needed: AtomicI64,
}

/// Puts one key until told to stop, and forgets what nobody needs.
fn write(mut world: World, orders: &Orders) {
    use metastore::storage::Engine;
    while !orders.stop.load(Ordering::Relaxed) {
        let head = world.put("a", "value");
        let needed = orders.needed.load(Ordering::Relaxed);
        if head % 5000 == 0 && needed > world.reader.compacted() {
            world.compact(needed);
            let mut compaction = Compaction::pending(world.machine.shared());
            while compaction.as_mut().is_some_and(|compaction| compaction.step(1000).unwrap() != Progress::Done) {
                thread::yield_now(); // Somebody reads history below.
            }
            world.engine.flush().unwrap();
        }
        thread::yield_now();
    }
}

/// Begins a watch near the head, and listens for a while.
fn watch_once(hub: &Hub, reader: &Reader, orders: &Orders, nth: i64) {
    let mut client = Client::new(hub.open());
    client.line.waker = Waker::from(Arc::new(Parked(thread::current())));
    let head = reader.head();
    orders.needed.store((head - 100).max(1), Ordering::Relaxed);
    let start = match nth % 4 {
        0 => 0,
        1 => head + 1,
        2 => head,
        _ => (head - nth % 100).max(1),
    };
    client.create(from(start, on("a")));
    let (mut next, mut told_of) = (None, 0);
    while told_of < 5 {
        client.step();
        let responses = std::mem::take(&mut client.line.sent);
        if responses.is_empty() {
            thread::park();
        }
        for response in responses {
            let revision = response.header.as_ref().unwrap().revision;
            if response.created {
                next = Some(if start == 0 { revision + 1 } else { start.max(2) });
            }
            assert!(!response.canceled);
            for event in response.events {
                let told = event.kv.unwrap().mod_revision;
                assert_eq!(Some(told), next, "start {start}, head {head}");
                next = Some(told + 1);
                told_of += 1;
            }
        }
    }
}

fn race(watches: i64) {
    let mut world = World::new();
    let (publisher, hub) = Hub::start(world.reader.clone(), Settings { ring_bytes: 1 << 16, ..Settings::default() });
    world.publisher = publisher;
    let reader = world.reader.clone();
    let orders = Arc::new(Orders::default());
    let writer = thread::spawn({
        let orders = orders.clone();
        move || write(world, &orders)
    });
    for nth in 0..watches {
        watch_once(&hub, &reader, &orders, nth);
    }
    orders.stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    hub.stop();
}

#[test]
fn a_watch_that_begins_while_somebody_writes_misses_and_repeats_nothing() {
    race(500);
}

#[test]
#[ignore = "long"]
fn ten_thousand_watches_that_begin_while_somebody_writes_miss_and_repeat_nothing() {
    race(10_000);
}
