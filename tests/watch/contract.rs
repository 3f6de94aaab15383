//! The watch protocol: the responses to every kind of request.

use prost::Message;

use http2::call::{Conversation, Step};
use metastore::proto::etcdserverpb::{WatchCreateRequest, watch_create_request::FilterType};

use crate::{
    client::Client,
    world::{World, between, from, on},
};

const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const EMPTY: &str = "mvcc: watcher range is empty";
const DUPLICATE: &str = "mvcc: duplicate watch ID provided on the WatchStream";

#[test]
fn a_watch_without_start_revision_receives_later_events_one_revision_at_a_time() {
    let mut world = World::new();
    world.put("a", "0");
    let mut client = world.client();
    assert_eq!(world.watch(&mut client, on("a")), ["created 0 @2"]);
    world.put("a", "1");
    world.put("b", "1");
    world.delete("a");
    world.txn(&[("a", Some("2")), ("b", Some("2"))]);
    assert_eq!(world.receive_text(&mut client), ["0: 3+a=1 @3", "0: 5-a @5", "0: 6*a=2 @6"]);
}

/// WATCH-7.
#[test]
fn the_events_of_one_revision_come_in_one_response_and_in_order() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, between("a", "z"));
    world.txn(&[("c", Some("1")), ("a", Some("1")), ("b", Some("1"))]);
    world.delete_range("a", "c");
    assert_eq!(world.receive_text(&mut client), ["0: 2*c=1 2*a=1 2*b=1 @2", "0: 3-a 3-b @3"]);
}

#[test]
fn revisions_of_one_batch_come_in_separate_responses() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, between("a", "z"));
    for value in ["1", "2"] {
        world.stage(metastore::state::Kind::Put, &crate::world::put("a", value));
    }
    world.publish();
    assert_eq!(world.receive_text(&mut client), ["0: 2*a=1 @2", "0: 3+a=2 @3"]);
}

/// WATCH-4 and WATCH-7.
#[test]
fn a_watch_from_a_past_revision_receives_whole_revisions_in_one_response() {
    let mut world = World::new();
    for value in 0..12 {
        world.put("a", &value.to_string());
    }
    world.put("b", "");
    let mut client = world.client();
    let received = world.watch(&mut client, from(3, on("a")));
    assert_eq!(received[0], "created 0 @14");
    assert_eq!(received[1], "0: 3+a=1 4+a=2 5+a=3 6+a=4 7+a=5 8+a=6 9+a=7 10+a=8 11+a=9 12+a=10 13+a=11 @14");
    assert_eq!(received.len(), 2, "the header of a replay has the current revision");
    world.put("a", "now");
    assert_eq!(world.receive_text(&mut client), ["0: 15+a=now @15"]);
}

/// FAULT-27.
#[test]
fn a_watch_from_a_future_revision_receives_nothing_before_it() {
    let mut world = World::new();
    let mut client = world.client();
    assert_eq!(world.watch(&mut client, from(4, on("a"))), ["created 0 @1"]);
    for value in ["1", "2", "3", "4"] {
        world.put("a", value);
    }
    assert_eq!(world.receive_text(&mut client), ["0: 4+a=3 @4", "0: 5+a=4 @5"]);
}

#[test]
fn an_empty_key_is_the_first_of_all_keys() {
    let mut world = World::new();
    let mut client = world.client();
    assert_eq!(world.watch(&mut client, between("", "\0")), ["created 0 @1"]);
    assert_eq!(world.watch(&mut client, on("")), ["created 1 @1"]);
    world.put("\0", "");
    world.put("x", "");
    let mut received = world.receive_text(&mut client);
    received.sort();
    assert_eq!(received, ["0: 2*\0= @2", "0: 3*x= @3", "1: 2*\0= @2"]);
}

#[test]
fn overlapping_watches_each_receive_all_events() {
    let mut world = World::new();
    world.put("b", "0");
    let mut client = world.client();
    let with_previous = WatchCreateRequest { prev_kv: true, ..between("a", "c") };
    world.watch(&mut client, with_previous);
    world.watch(&mut client, between("b", "\0"));
    world.watch(&mut client, on("b"));
    world.put("b", "1");
    let mut received = world.receive_text(&mut client);
    received.sort();
    assert_eq!(received, ["0: 3+b=1<0@2 @3", "1: 3+b=1 @3", "2: 3+b=1 @3"]);
}

/// WATCH-2, and a negative revision (FAULT-31).
#[test]
fn refusals_give_a_reason_and_do_not_end_the_stream() {
    let mut world = World::new();
    world.put("a", "");
    let mut client = world.client();
    let refused = |reason: &str| vec![format!("refused -1: {reason} @2")];
    assert_eq!(world.watch(&mut client, from(-1, on("a"))), refused(COMPACTED));
    assert_eq!(world.watch(&mut client, between("b", "a")), refused(EMPTY));
    assert_eq!(world.watch(&mut client, between("b", "b")), refused(EMPTY));
    assert_eq!(world.watch(&mut client, on("a")), ["created 0 @2"], "a refused watch takes no ID");
    let named = |id| WatchCreateRequest { watch_id: id, ..on("a") };
    assert_eq!(world.watch(&mut client, named(7)), ["created 7 @2"]);
    assert_eq!(world.watch(&mut client, named(7)), refused(DUPLICATE));
    assert_eq!(world.watch(&mut client, named(-1)), refused(DUPLICATE));
    assert_eq!(world.watch(&mut client, named(-2)), ["created -2 @2"]);
    assert_eq!(world.counts(), [1, 3, 0, 0]);
}

/// WATCH-12: permission is checked for the range as it was sent.
#[test]
fn the_first_failing_check_gives_the_reason_of_a_refusal() {
    let mut world = World::new();
    let mut client = Client::with_permission(
        world.hub.open(),
        1,
        Box::new(|key, range_end| {
            assert!(
                range_end.is_empty() || range_end == b"a" || range_end == b"\0",
                "the check gets the range as it was sent"
            );
            if key == b"mine" { Ok(()) } else { Err("no".into()) }
        }),
    );
    let watch = |world: &mut World, client: &mut Client, start, key: &str, end: &str, id| {
        let create = WatchCreateRequest { watch_id: id, ..from(start, between(key, end)) };
        world.watch(client, create).join("\n")
    };
    assert_eq!(watch(&mut world, &mut client, 0, "mine", "", 5), "created 5 @1");
    assert_eq!(watch(&mut world, &mut client, -1, "yours", "a", 5), format!("refused -1: {COMPACTED} @1"));
    assert_eq!(watch(&mut world, &mut client, 0, "yours", "a", 5), "refused -1: no @1");
    assert_eq!(watch(&mut world, &mut client, 0, "mine", "a", 5), format!("refused -1: {EMPTY} @1"));
    assert_eq!(watch(&mut world, &mut client, 0, "mine", "\0", 5), format!("refused -1: {DUPLICATE} @1"));
}

/// FAULT-31: watch 0 can be cancelled.
#[test]
fn automatic_ids_increase_and_skip_ids_in_use() {
    let mut world = World::new();
    let mut client = world.client();
    let named = |id| WatchCreateRequest { watch_id: id, ..on("a") };
    assert_eq!(world.watch(&mut client, named(1)), ["created 1 @1"]);
    assert_eq!(world.watch(&mut client, on("a")), ["created 0 @1"]);
    assert_eq!(world.watch(&mut client, on("a")), ["created 2 @1"]);
    client.cancel(2);
    client.cancel(0);
    assert_eq!(
        world.receive_text(&mut client),
        ["canceled 2 @1", "canceled 0 @1"],
        "watch 0 is a watch like any other"
    );
    assert_eq!(world.watch(&mut client, on("a")), ["created 3 @1"], "an automatic ID is not reused");
    assert_eq!(world.watch(&mut client, named(2)), ["created 2 @1"], "but a client may choose it");
}

#[test]
fn a_cancel_is_answered_once_and_nothing_follows_it() {
    let mut world = World::new();
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.put("a", "1");
    client.cancel(0);
    client.cancel(0);
    client.cancel(9);
    assert_eq!(world.receive_text(&mut client), ["0: 2*a=1 @2", "canceled 0 @2"]);
    world.put("a", "2");
    assert!(world.receive_text(&mut client).is_empty());
    assert_eq!(world.counts(), [1, 0, 0, 0]);
}

/// WATCH-3.
#[test]
fn created_responses_come_in_the_order_of_the_requests_and_before_events() {
    let mut world = World::new();
    for value in 0..300 {
        world.put("a", &value.to_string());
    }
    let mut client = world.client();
    for start in 0..200 {
        client.create(from(if start % 3 == 0 { -1 } else { start + 2 }, on("a")));
    }
    let mut created = std::collections::HashSet::new();
    let mut last = -1;
    for response in world.receive(&mut client) {
        if response.created && !response.canceled {
            assert_eq!(response.watch_id, last + 1);
            last = response.watch_id;
            created.insert(response.watch_id);
        }
        assert!(response.canceled || created.contains(&response.watch_id), "nothing comes before the created response");
    }
    assert_eq!(last, 132);
}

#[test]
fn filtered_events_are_left_out() {
    let mut world = World::new();
    let mut client = world.client();
    let filtered = |filters: &[i32]| WatchCreateRequest { filters: filters.to_vec(), ..between("a", "z") };
    let (no_put, no_delete) = (FilterType::Noput as i32, FilterType::Nodelete as i32);
    world.watch(&mut client, filtered(&[no_put]));
    world.watch(&mut client, filtered(&[no_delete, 77]));
    world.watch(&mut client, filtered(&[no_delete, no_put]));
    world.put("a", "1");
    world.txn(&[("a", None), ("b", Some("2"))]);
    let mut received = world.receive_text(&mut client);
    received.sort();
    assert_eq!(received, ["0: 3-a @3", "1: 2*a=1 @2", "1: 3*b=2 @3"]);
    assert_eq!(world.watch(&mut client, from(1, filtered(&[no_put]))), ["created 3 @3", "3: 3-a @3"]);
}

#[test]
fn previous_values_are_sent_on_request_live_and_replayed() {
    let mut world = World::new();
    let mut client = world.client();
    let create = WatchCreateRequest { prev_kv: true, ..between("a", "z") };
    world.watch(&mut client, create.clone());
    world.put("a", "1");
    world.put("a", "2");
    world.txn(&[("b", Some("x")), ("a", Some("3"))]);
    world.delete("a");
    world.put("a", "4");
    let expected = ["2*a=1", "3+a=2<1@2", "4*b=x 4+a=3<2@3", "5-a<3@4", "6*a=4"];
    let live: Vec<String> = (2..).zip(expected).map(|(revision, events)| format!("0: {events} @{revision}")).collect();
    assert_eq!(world.receive_text(&mut client), live);
    let replayed = format!("1: {} @6", expected.join(" "));
    assert_eq!(world.watch(&mut client, from(1, create)), ["created 1 @6".into(), replayed]);
}

/// WATCH-9.
#[test]
fn previous_values_from_below_the_compact_revision_are_left_out() {
    let settings = metastore::watch::Settings { ring_bytes: 0, ..Default::default() };
    let mut world = World::with(settings);
    world.put("a", "1");
    world.put("a", "2");
    world.put("a", "3");
    world.compact(3);
    world.finish_compaction();
    let mut client = world.client();
    let create = WatchCreateRequest { prev_kv: true, ..from(3, on("a")) };
    assert_eq!(world.watch(&mut client, create), ["created 0 @4", "0: 3+a=2 4+a=3<2@3 @4"]);
}

/// WATCH-10.
#[test]
fn a_large_response_is_fragmented_if_the_client_asks_for_it() {
    let mut world = World::new();
    let mut client = Client::with_permission(world.hub.open(), 100, Box::new(|_, _| Ok(())));
    world.watch(&mut client, WatchCreateRequest { fragment: true, ..between("a", "z") });
    world.watch(&mut client, between("a", "z"));
    let value = "v".repeat(20);
    let large = "v".repeat(200);
    world.txn(&[("a", Some(&value)), ("b", Some(&value)), ("c", Some(&large)), ("d", Some("")), ("e", Some(""))]);
    world.put("f", &large);
    let received: Vec<String> =
        world.receive_text(&mut client).iter().map(|line| line.replace(&large, "LARGE")).collect();
    let value = format!("={value}");
    let whole: Vec<&String> = received.iter().filter(|line| line.starts_with('1')).collect();
    assert_eq!(whole[0], &format!("1: 2*a{value} 2*b{value} 2*c=LARGE 2*d= 2*e= @2"));
    let parts: Vec<&String> = received.iter().filter(|line| line.starts_with('0')).collect();
    assert_eq!(parts[0], &format!("0: 2*a{value} 2*b{value} … @2"));
    assert_eq!(parts[1], "0: 2*c=LARGE … @2");
    assert_eq!(parts[2], "0: 2*d= 2*e= @2");
    assert_eq!(parts[3], "0: 3*f=LARGE @3", "one event cannot be split");
    assert_eq!((received.len(), parts.len()), (6, 4));
    let first = received.iter().position(|line| line.starts_with('0')).unwrap();
    assert_eq!(received[first..first + 3].iter().collect::<Vec<_>>(), parts[..3], "parts are adjacent");
}

/// WATCH-10.
#[test]
fn the_fragment_limit_is_exact_and_fragments_wait_until_they_can_be_sent() {
    let mut world = World::new();
    world.txn(&[("a", Some("12345")), ("b", Some("12345"))]);
    let create = || WatchCreateRequest { fragment: true, ..from(2, between("a", "z")) };
    let mut client = world.client();
    world.watch(&mut client, on("x"));
    client.create(create());
    client.line.bytes = 0;
    let size = {
        let created = world.receive(&mut client);
        assert_eq!(created.len(), 2);
        created[1].encoded_len() - 2 // The ID of watch 0 is not encoded.
    };
    for (limit, parts) in [(size + 1, 1), (size, 2)] {
        let mut client = Client::with_permission(world.hub.open(), limit, Box::new(|_, _| Ok(())));
        client.create(create());
        client.line.capacity = 1;
        let mut responses = Vec::new();
        for _ in 0..=parts {
            responses.extend(world.receive(&mut client));
            client.create(on("later"));
        }
        assert_eq!(responses.len(), 1 + parts, "limit {limit}");
        let flags: Vec<bool> = responses[1..].iter().map(|response| response.fragment).collect();
        assert_eq!(flags, if parts == 1 { vec![false] } else { vec![true, false] });
    }
}

/// WATCH-6.
#[test]
fn a_half_closed_stream_stays_alive_and_unknown_requests_are_ignored() {
    let mut world = World::new();
    let mut client = world.client();
    client.line.requests.push_back(bytes::Bytes::new());
    client.line.requests.push_back(bytes::Bytes::from_static(&[0x7a, 0]));
    client.create(on("a"));
    client.line.ended = true;
    assert_eq!(world.receive_text(&mut client), ["created 0 @1"]);
    world.put("a", "1");
    assert_eq!(world.receive_text(&mut client), ["0: 2*a=1 @2"]);
}

#[test]
fn a_malformed_request_ends_only_its_own_stream() {
    let mut world = World::new();
    let (mut client, mut other) = (world.client(), world.client());
    world.watch(&mut other, on("a"));
    client.line.requests.push_back(bytes::Bytes::from_static(&[0x0a, 0x7f]));
    let Step::End(Err(refusal)) = client.conversation.step(&mut client.line) else {
        panic!("the stream should have ended")
    };
    assert_eq!(refusal.code, http2::call::Code::Internal);
    drop(client);
    world.put("a", "1");
    assert_eq!(world.receive_text(&mut other), ["0: 2*a=1 @2"]);
    assert_eq!(world.counts(), [1, 1, 0, 0]);
}

/// FAULT-47.
#[test]
fn watches_beyond_the_limit_of_a_stream_are_refused() {
    let settings = metastore::watch::Settings { watches_per_stream: 2, ..Default::default() };
    let mut world = World::with(settings);
    let mut client = world.client();
    world.watch(&mut client, on("a"));
    world.watch(&mut client, on("a"));
    let refused = "refused -1: etcdserver: too many watches on this stream (--max-watches-per-stream=2) @1";
    assert_eq!(world.watch(&mut client, on("a")), [refused]);
    client.cancel(0);
    client.create(on("a"));
    assert_eq!(world.receive_text(&mut client), ["canceled 0 @1", "created 2 @1"]);
}

/// FAULT-47.
#[test]
fn watches_beyond_the_limit_of_a_member_are_refused() {
    let mut world = World::with(metastore::watch::Settings { watches: 2, ..Default::default() });
    let (mut client, mut other) = (world.client(), world.client());
    world.watch(&mut client, on("a"));
    world.watch(&mut other, on("a"));
    let refused = "refused -1: etcdserver: too many watches on this member (--max-watches=2) @1";
    assert_eq!(world.watch(&mut other, on("a")), [refused]);
    client.cancel(0);
    assert_eq!(world.receive_text(&mut client), ["canceled 0 @1"]);
    assert_eq!(world.watch(&mut other, on("a")), ["created 1 @1"]);
}
