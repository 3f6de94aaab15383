//! Calls, conversations and plain HTTP requests, from beginning to end.

use super::*;
use crate::message::compress;

const OK_END: &str = "grpc-status=0 end";

#[test]
fn calls_of_one_read_are_answered_in_one_write() {
    let mut client = Client::new();
    let mut bytes = Vec::new();
    for stream in [1, 3] {
        let block = client.block("/t/Echo", &[]);
        bytes.extend(frame_bytes(kind::HEADERS, flag::END_HEADERS, stream, &block));
        bytes.extend(frame_bytes(kind::DATA, flag::END_STREAM, stream, &framed(b"abc")));
    }
    client.send(&bytes);
    let received = client.received();
    let expected = [1, 3].map(|n| [format!("{n} {HEAD}"), format!("{n} data 8"), format!("{n} {OK_END}")]);
    assert_eq!(received, expected.as_flattened());
    assert_eq!(*client.seen.handled.lock(), [call::Code::Ok; 2]);
}

#[test]
fn a_response_may_come_later_and_from_another_thread() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"a");
    client.call(3, "/t/Later", b"b");
    assert_eq!(client.received(), [""; 0]);
    let replies = std::mem::take(&mut *client.seen.replies.lock());
    let answering = std::thread::spawn(move || {
        for (message, reply) in replies.into_iter().rev() {
            reply.answer(Ok(message));
        }
    });
    answering.join().unwrap();
    let received = client.received();
    assert_eq!(received.len(), 6, "{received:?}");
    assert_eq!([&received[0], &received[3]], [&format!("3 {HEAD}"), &format!("1 {HEAD}")]);
}

#[test]
fn an_error_is_a_trailers_only_response_with_an_escaped_message() {
    let mut client = Client::new();
    client.call(1, "/t/Refuse", b"");
    assert_eq!(client.received(), [format!("1 {HEAD} grpc-status=5 grpc-message=no%C3%A4 end")]);
}

#[test]
fn a_dropped_reply_tells_the_client_that_the_server_stops() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.received();
    client.seen.replies.lock().clear();
    assert_eq!(client.received(), [format!("1 {HEAD} grpc-status=14 grpc-message=etcdserver: server stopped end")]);
}

#[test]
fn metadata_reaches_the_handler_even_if_blocks_repeat() {
    let mut client = Client::new();
    let more = [("token", "t.1"), ("version", "3.7.3"), ("token", "t.2"), ("grpc-timeout", "5S")];
    for stream in [1, 3, 5] {
        client.open(stream, "/t/Echo", &more, false);
        client.message(stream, b"", true);
        client.received();
    }
    for metadata in &*client.seen.metadata.lock() {
        let fields = metadata.fields.each_ref().map(|value| value.as_deref());
        assert_eq!(fields, [None, Some(&b"3.7.3"[..]), Some(b"t.1"), None], "the first value of each");
        assert_eq!(metadata.deadline, Some(client.now + Duration::from_secs(5)));
    }
    assert_eq!(client.seen.metadata.lock().len(), 3);
}

#[test]
fn blocks_of_indexes_are_recognised_until_the_table_changes() {
    let mut client = Client::new();
    // POST, http, then a path, an authority and a content type that are added to the table and referred to by index afterwards.
    let added = b"\x83\x86\x44\x07/t/Echo\x41\x04here\x5f\x10application/grpc";
    let (known, later) = (b"\x83\x86\xc0\xbf\xbe", b"\x83\x86\xc1\xc0\xbf");
    for (stream, block) in [(1, &added[..]), (3, known), (5, known), (7, known)] {
        client.frame(kind::HEADERS, flag::END_HEADERS, stream, block);
        client.message(stream, b"", true);
        assert_eq!(client.received().len(), 3, "stream {stream}");
    }
    // With one more entry, the same bytes have another meaning.
    client.frame(kind::HEADERS, flag::END_HEADERS, 9, b"\x83\x86\xc0\xbf\xbe\x40\x01a\x01b");
    client.message(9, b"", true);
    assert_eq!(client.received().len(), 3);
    client.frame(kind::HEADERS, flag::END_HEADERS, 11, later);
    client.message(11, b"", true);
    assert_eq!(client.received().len(), 3);
    client.frame(kind::HEADERS, flag::END_HEADERS, 13, known);
    client.assert_reset(13, Code::Protocol); // The path is missing.
}

#[test]
fn compressed_calls_get_compressed_responses() {
    let mut client = Client::new();
    let text = [b'x'; 5000];
    let compressed = compress(&text);
    let message = [&message::prefix(compressed.len(), true).unwrap()[..], &compressed].concat();
    // A client that compresses does not have to accept compressed responses.
    for (stream, more) in [(3, None), (5, Some("br, identity"))] {
        let more = more.map(|accepted| ("grpc-accept-encoding", accepted));
        let more: Vec<_> = [("grpc-encoding", "gzip")].into_iter().chain(more).collect();
        client.open(stream, "/t/Echo", &more, false);
        client.frame(kind::DATA, flag::END_STREAM, stream, &message);
        let expected = [format!("{stream} {HEAD}"), format!("{stream} data 5005"), format!("{stream} {OK_END}")];
        assert_eq!(client.received(), expected);
    }
    client.open(7, "/t/Echo", &[("grpc-encoding", "gzip"), ("grpc-accept-encoding", "identity, gzip")], false);
    client.frame(kind::DATA, flag::END_STREAM, 7, &message);
    let got = client.take();
    assert_eq!(client.fields(&got[0]), [":status=200", "content-type=application/grpc", "grpc-encoding=gzip"]);
    let mut deframer = message::Deframer::default();
    deframer.push_copy(&got[1].payload);
    let answer = deframer.take(message::Encoding::Gzip, 5000).unwrap().unwrap();
    assert_eq!((got[1].payload[0], &answer[..]), (1, &text[..]));
}

#[test]
fn a_call_that_is_reset_in_the_same_read_never_runs() {
    let mut client = Client::new();
    client.call(1, "/t/Echo", b"");
    client.frame(kind::RST_STREAM, 0, 1, &8_u32.to_be_bytes());
    assert_eq!(client.received(), [""; 0]);
    assert_eq!(*client.seen.handled.lock(), [call::Code::Canceled]);
    assert!(client.seen.metadata.lock().is_empty());
}

#[test]
fn the_response_to_a_call_that_was_reset_is_dropped() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.received();
    client.frame(kind::RST_STREAM, 0, 1, &8_u32.to_be_bytes());
    client.call(3, "/t/Later", b""); // It reuses the index.
    client.received();
    let (_, reply) = client.seen.replies.lock().remove(0);
    reply.answer(Ok(Bytes::from_static(b"late")));
    assert_eq!(client.received(), [""; 0]);
}

#[test]
fn a_conversation_continues_until_either_side_ends_it() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[], false);
    client.message(1, b"one", false);
    assert_eq!(client.received(), [format!("1 {HEAD}"), "1 data 8".into()]);
    client.message(1, b"two", false);
    assert_eq!(client.received(), ["1 data 8"]);
    client.frame(kind::DATA, flag::END_STREAM, 1, &[]);
    assert_eq!(client.received(), [format!("1 {OK_END}")]);
    client.open(3, "/t/Chat", &[], false);
    client.received();
    assert_eq!(client.seen.conversations.load(Ordering::Relaxed), 1);
    client.frame(kind::RST_STREAM, 0, 3, &8_u32.to_be_bytes());
    assert_eq!(client.seen.conversations.load(Ordering::Relaxed), 0, "a reset reaches the handler");
    assert_eq!(*client.seen.handled.lock(), [call::Code::Ok, call::Code::Canceled]);
}

#[test]
fn a_server_that_ends_first_tells_the_client_to_stop() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[], false);
    client.frame(kind::DATA, 0, 1, &[7, 0, 0, 0, 0]);
    let text = "grpc: received unexpected payload format 7";
    let refused = |stream: u32| format!("{stream} {HEAD} grpc-status=13 grpc-message={text} end");
    assert_eq!(client.received(), [refused(1)]);
    client.message(1, b"unaware", true);
    assert_eq!((client.received().len(), client.connection.streams.len()), (0, 0));
    // A client that keeps sending is told to stop, and so is one that does nothing.
    for wait in [false, true] {
        let stream = if wait { 5 } else { 3 };
        client.open(stream, "/t/Chat", &[], false);
        client.frame(kind::DATA, 0, stream, &[7, 0, 0, 0, 0]);
        assert_eq!(client.received(), [refused(stream)]);
        if wait {
            client.now += Duration::from_millis(1100);
            client.connection.on_timer(client.now);
        } else {
            for _ in 0..5 {
                client.frame(kind::DATA, 0, stream, &[0; 16_384]);
            }
        }
        assert_eq!(client.received(), [format!("{stream} reset 0")]);
        client.message(stream, b"unaware", true);
        assert_eq!((client.received().len(), client.connection.streams.len()), (0, 0));
    }
}

#[test]
fn a_unary_call_whose_end_comes_later_is_answered_too() {
    let mut client = Client::new();
    client.open(1, "/t/Echo", &[], false);
    client.message(1, b"", false);
    assert_eq!(client.received().last().unwrap(), &format!("1 {OK_END}"));
    client.frame(kind::DATA, flag::END_STREAM, 1, &[]);
    assert_eq!((client.received().len(), client.connection.streams.len()), (0, 0));
    client.open(3, "/t/Later", &[], false);
    client.message(3, b"", false);
    client.received();
    client.frame(kind::DATA, flag::END_STREAM, 3, &[]);
    client.seen.replies.lock().pop().unwrap().1.answer(Ok(Bytes::new()));
    assert_eq!(client.received().last().unwrap(), &format!("3 {OK_END}"));
}

#[test]
fn malformed_calls_are_refused_with_the_texts_of_grpc() {
    let mut client = Client::new();
    let refused = |status: u16, code: u8, text: &str| {
        format!(":status={status} content-type=application/grpc grpc-status={code} grpc-message={text}")
    };
    client.open(1, "/t/Echo", &[("grpc-encoding", "br")], true);
    let text = "grpc: Decompressor is not installed for grpc-encoding \"br\"";
    let received = refused(200, 12, text).replace(" grpc-status", " grpc-accept-encoding=gzip grpc-status");
    assert_eq!(client.received(), [format!("1 {received} end")]);
    client.open(3, "/t/Echo", &[("grpc-timeout", "5 years")], true);
    let text = "malformed grpc-timeout: transport: timeout unit is not recognized: \"5 years\"";
    assert_eq!(client.received(), [format!("3 {} end", refused(400, 13, text))]);
    client.open(11, "/t/Echo", &[("grpc-timeout", &"%".repeat(10_000))], true);
    assert!(client.received()[0].len() < 400, "quoted input is truncated");
    client.open(13, "/t/Echo", &[], true);
    assert_eq!(client.received(), [format!("13 {HEAD} grpc-status=2 grpc-message=EOF end")]);
    client.open(15, "/t/Echo", &[("content-type", "text/html")], true);
    let received = client.received();
    assert!(received[0].starts_with("15 :status=415"), "{received:?}");
    client.open(19, "/t/Nothing", &[], true);
    assert_eq!(client.received(), [format!("19 {} end", refused(200, 12, "nothing like that"))]);
    client.open(21, "/t/Echo", &[("x-bin", "a!")], true);
    let text = "malformed binary metadata \"a!\" in header \"x-bin\": illegal base64 data at input byte 1";
    assert_eq!(client.received(), [format!("21 {} end", refused(400, 13, text))]);
    client.open(23, "/t/Echo", &[], false);
    client.frame(kind::DATA, 0, 23, &[0, 0xff, 0, 0, 0]);
    let text = format!("grpc: received message larger than max ({} vs. {})", 0xff00_0000_u32, 2 << 20);
    assert_eq!(client.received()[0], format!("23 {HEAD} grpc-status=8 grpc-message={text} end"));
}

#[test]
fn a_deadline_ends_a_call_and_a_conversation() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[("grpc-timeout", "100m")], false);
    client.open(3, "/t/Later", &[("grpc-timeout", "200m")], false);
    client.message(3, b"", true);
    client.received();
    client.now += Duration::from_millis(101);
    assert!(client.connection.next_timer() <= client.now);
    client.connection.on_timer(client.now);
    assert_eq!(client.received(), ["1 reset 8"]);
    assert_eq!(client.seen.conversations.load(Ordering::Relaxed), 0);
    client.now += Duration::from_millis(100);
    client.connection.on_timer(client.now);
    assert_eq!(client.received(), ["3 reset 8"]);
    assert_eq!(*client.seen.handled.lock(), [call::Code::Canceled; 2]);
    // Deadlines apply to HTTP handlers, too.
    client.open(5, "/page", &[("grpc-timeout", "100m")], false);
    client.received();
    client.now += Duration::from_millis(101);
    client.connection.on_timer(client.now);
    assert_eq!(client.received(), ["5 reset 8"]);
}

#[test]
fn a_call_whose_deadline_has_passed_on_arrival_does_not_run() {
    let mut client = Client::new();
    for (stream, path) in [(1, "/t/Later"), (3, "/t/Chat"), (5, "/page")] {
        client.open(stream, path, &[("grpc-timeout", "1n")], false);
        client.message(stream, b"", true);
        let received = client.received();
        assert_eq!(received, [format!("{stream} {HEAD} grpc-status=4 grpc-message=context deadline exceeded end")]);
    }
    assert!(client.seen.replies.lock().is_empty() && client.seen.handled.lock().is_empty());
}

#[test]
fn other_paths_are_answered_by_the_http_service() {
    let mut client = Client::new();
    client.open(1, "/page", &[], true);
    assert_eq!(client.received(), ["1 :status=200 x-method=POST", "1 data 4", "1 data 0 end"]);
    client.open(3, "/gone", &[], false);
    assert_eq!(client.received(), ["3 :status=404 x-method=POST"]);
    client.frame(kind::DATA, 0, 3, b"both");
    assert_eq!(client.received(), ["3 data 4"]);
    client.frame(kind::DATA, flag::END_STREAM, 3, b"ways");
    assert_eq!(client.received(), ["3 data 4", "3 data 0 end"]);
}

#[test]
fn after_a_goaway_of_the_client_calls_end_and_the_connection_closes() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.frame(kind::GOAWAY, 0, 0, &[0; 8]);
    client.received();
    assert!(!client.connection.is_closed());
    client.seen.replies.lock().pop().unwrap().1.answer(Ok(Bytes::new()));
    let received = client.received();
    assert_eq!(received[2..], [format!("1 {OK_END}"), "goaway 1 0".into()]);
    assert!(client.connection.is_closed());
}

#[test]
fn a_shutdown_lets_calls_end_and_accepts_no_new_ones() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.received();
    client.connection.shut_down(client.now);
    assert_eq!(client.received(), ["goaway 2147483647 0", "ping 0"]);
    client.call(3, "/t/Later", b""); // It was in flight.
    client.received();
    client.now += Duration::from_millis(200);
    client.connection.on_timer(client.now);
    assert_eq!(client.received(), ["goaway 3 0"]);
    client.call(5, "/t/Later", b"");
    // Frames for it are ignored.
    client.open(7, "/t/Chat", &[], false);
    client.message(7, b"ignored", false);
    client.frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 7, &[0x00, 1, b'a', 1, b'b']);
    assert_eq!(client.received(), [""; 0]);
    for (message, reply) in std::mem::take(&mut *client.seen.replies.lock()) {
        reply.answer(Ok(message));
    }
    let received = client.received();
    assert_eq!(received.iter().filter(|line| line.ends_with(OK_END)).count(), 2, "{received:?}");
    assert!(client.connection.is_closed());
}

#[test]
fn a_shutdown_completes_when_the_last_stream_is_reset() {
    for by_client in [true, false] {
        let mut client = Client::new();
        client.open(1, "/t/Chat", &[], false);
        client.connection.shut_down(client.now);
        client.now += Duration::from_millis(200);
        client.connection.on_timer(client.now);
        client.received();
        assert!(!client.connection.is_closed());
        if by_client {
            client.frame(kind::RST_STREAM, 0, 1, &8_u32.to_be_bytes());
        } else {
            client.grant(1, 0);
        }
        client.received();
        assert!(client.connection.is_closed());
    }
}
