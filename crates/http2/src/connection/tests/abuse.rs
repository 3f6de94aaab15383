//! Abusive clients: each is stopped, and costs little until it is.

use super::*;

/// Asserts that a flood ends the connection, and that `allowed` frames of it do not.
#[track_caller]
fn flood(allowed: u32, mut act: impl FnMut(&mut Client, u32)) {
    let mut client = Client::new();
    for nth in 0..allowed {
        act(&mut client, nth);
        client.take();
    }
    assert!(!client.connection.is_closed());
    assert!(client.connection.held() < 100_000, "{} bytes held", client.connection.held());
    client.now += Duration::from_secs(1);
    for nth in 0..=allowed + 5 {
        act(&mut client, allowed + nth);
        if client.connection.is_closed() {
            assert!(nth >= allowed / 2);
            return client.assert_ended(Code::EnhanceYourCalm);
        }
        client.take();
    }
    client.assert_ended(Code::EnhanceYourCalm);
}

#[test]
fn rapid_resets_by_the_client_end_the_connection() {
    flood(1000, |client, nth| {
        client.call(2 * nth + 1, "/t/Later", b"");
        client.frame(kind::RST_STREAM, 0, 2 * nth + 1, &8_u32.to_be_bytes());
    });
}

#[test]
fn rapid_resets_by_the_server_end_the_connection() {
    flood(1000, |client, nth| client.open(2 * nth + 1, "/t/Chat", &[("te", "wrong")], false));
}

#[test]
fn settings_pings_and_idle_frames_are_limited() {
    flood(97, |client, _| client.set(setting::INITIAL_WINDOW_SIZE, 100));
    flood(10_000, |client, _| client.frame(kind::PING, 0, 0, &[0; 8]));
    flood(10_000, |client, _| client.frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]));
    flood(10_000, |client, _| client.frame(0x55, 0, 1, &[]));
}

#[test]
fn empty_data_frames_are_limited() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[], false);
    for _ in 0..2000 {
        client.frame(kind::DATA, 0, 1, &[]);
    }
    assert!(!client.connection.is_closed());
    client.frame(kind::DATA, flag::PADDED, 1, &[3, 0, 0, 0]);
    client.assert_ended(Code::EnhanceYourCalm);
}

#[test]
fn endless_continuations_end_the_connection() {
    for piece in [&[][..], &[0; 16_384]] {
        let mut client = Client::new();
        client.frame(kind::HEADERS, 0, 1, &[]);
        let mut frames = 0;
        while !client.connection.is_closed() {
            client.frame(kind::CONTINUATION, 0, 1, piece);
            frames += 1;
            assert!(frames <= 64);
        }
        client.assert_ended(Code::EnhanceYourCalm);
    }
}

#[test]
fn a_header_list_that_is_too_long_is_refused_and_the_connection_stays_usable() {
    let mut client = Client::new();
    let long = "x".repeat(4000);
    let more: Vec<_> = (0..17).map(|_| ("a", long.as_str())).collect();
    let block = client.block("/t/Echo", &more);
    assert!(block.len() > 16_384);
    client.frame(kind::HEADERS, flag::END_STREAM, 1, &block[..16_384]);
    let mut rest = block[16_384..].chunks(16_384).peekable();
    while let Some(piece) = rest.next() {
        client.frame(kind::CONTINUATION, if rest.peek().is_none() { flag::END_HEADERS } else { 0 }, 1, piece);
    }
    let received = client.received();
    assert!(received[0].starts_with("1 :status=431"), "{received:?}");
    client.assert_healthy(1);
}

#[test]
fn more_streams_than_allowed_are_refused() {
    let mut client = Client::with(Limits { max_streams: 2, ..Limits::default() });
    client.open(1, "/t/Chat", &[], false);
    client.open(3, "/t/Chat", &[], false);
    client.open(5, "/t/Chat", &[], false);
    assert_eq!(client.received(), ["5 reset 7"]);
    client.frame(kind::RST_STREAM, 0, 1, &[0; 4]);
    client.assert_healthy(5);
}

#[test]
fn windows_that_open_byte_by_byte_end_the_connection() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 0);
    client.open(1, "/t/Pour", &[], false);
    client.message(1, &[0; 100], false);
    client.take();
    let mut updates = 0;
    while !client.connection.is_closed() {
        client.grant(1, 1);
        client.take();
        updates += 1;
        assert!(updates <= 2001);
    }
}

#[test]
fn unread_responses_make_calls_wait() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 0);
    let message = vec![b'x'; 16_000];
    for nth in 0..4000 {
        client.call(2 * nth + 1, "/t/Echo", &message);
        client.take();
    }
    let waiting = client.connection.ready.len();
    assert!(client.connection.sender.held_of_calls < CALLS_WAIT_BYTES + 20_000);
    assert!(waiting > 2900, "{waiting} calls wait");
    client.grant(0, 1 << 30);
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 20);
    let got = client.take();
    assert_eq!(
        got.iter().filter(|frame| frame.flags & flag::END_STREAM != 0 && frame.kind == kind::HEADERS).count(),
        4000
    );
    assert_eq!((client.connection.held(), client.connection.ready.len()), (0, 0));
}

#[test]
fn held_bytes_are_bounded() {
    let mut client = Client::with(Limits { max_held: 120_000, ..Limits::default() });
    for nth in 0..20 {
        client.open(2 * nth + 1, "/t/Echo", &[], false);
    }
    for nth in 0..20 {
        client.frame(kind::DATA, 0, 2 * nth + 1, &framed(&vec![b'x'; 20_000])[..16_000]);
    }
    assert!(client.connection.held() <= 120_000);
    let received = client.received();
    let refused = "grpc-status=8 grpc-message=grpc: too many bytes of requests and answers are under way";
    assert_eq!(received.iter().filter(|line| line.contains(refused)).count(), 14, "{received:?}");
    client.assert_healthy(50);
}

#[test]
fn responses_from_other_threads_are_bounded_too() {
    let mut client = Client::with(Limits { max_held: 100_000, ..Limits::default() });
    client.set(setting::INITIAL_WINDOW_SIZE, 0);
    for nth in 0..20 {
        client.call(2 * nth + 1, "/t/Later", b"");
    }
    client.take();
    for (_, reply) in std::mem::take(&mut *client.seen.replies.lock()) {
        reply.answer(Ok(vec![b'x'; 16_000].into()));
    }
    let received = client.received();
    assert_eq!(received.iter().filter(|line| line.contains("wait to be read")).count(), 15, "{received:?}");
    assert!(client.connection.held() <= 100_000);
}

#[test]
fn a_slow_preface_or_header_block_ends_the_connection() {
    let mut client = Client::before_preface(Limits::default());
    client.send(&PREFACE[..10]);
    client.now += Duration::from_secs(11);
    client.connection.on_timer(client.now);
    client.assert_ended(Code::EnhanceYourCalm);

    let mut client = Client::new();
    client.frame(kind::HEADERS, 0, 1, &[]);
    client.now += Duration::from_secs(11);
    client.connection.on_timer(client.now);
    client.assert_ended(Code::EnhanceYourCalm);
}

#[test]
fn a_client_that_reads_nothing_or_answers_no_ping_is_dropped() {
    let mut client = Client::new();
    client.call(1, "/t/Echo", b"");
    client.connection.run(client.now);
    client.connection.wrote(0, false, client.now);
    client.now += Duration::from_secs(61);
    client.connection.on_timer(client.now);
    assert!(client.connection.is_dead());

    let mut client = Client::new();
    client.now += Duration::from_hours(2);
    client.connection.on_timer(client.now);
    assert_eq!(client.received(), ["ping 0"]);
    client.now += Duration::from_secs(10);
    client.frame(kind::PING, flag::ACK, 0, b"there???");
    client.now += Duration::from_secs(20);
    client.connection.on_timer(client.now);
    assert!(!client.connection.is_closed(), "it has answered");
    client.now += Duration::from_hours(2);
    client.connection.on_timer(client.now);
    client.now += Duration::from_secs(20);
    client.connection.on_timer(client.now);
    assert!(client.connection.is_dead());
}

#[test]
fn a_closed_connection_holds_nothing() {
    let mut client = Client::with(Limits::default());
    client.open(1, "/t/Echo", &[], false);
    client.frame(kind::DATA, 0, 1, &framed(&vec![b'x'; 20_000])[..16_000]);
    client.take();
    let shared = client.connection.shared.clone();
    assert!(shared.ledger.held() > 0);
    drop(client);
    assert_eq!(shared.ledger.held(), 0);
}

/// HTTP responses that the client does not read are not even requested from the service.
#[test]
fn http_handlers_and_conversations_stop_where_too_much_is_held() {
    let mut client = Client::with(Limits { max_held: 2 << 20, ..Limits::default() });
    client.set(setting::INITIAL_WINDOW_SIZE, 0);
    for nth in 0..200 {
        let stream = 2 * nth + 1;
        client.open(stream, if nth % 2 == 0 { "/t/Pour" } else { "/large" }, &[], nth % 2 == 1);
        if nth % 2 == 0 {
            client.message(stream, &[0; 500], false);
        }
        client.received();
    }
    let held = client.connection.sender.held;
    assert!(client.connection.streams.len() == 200 && held < (1 << 20) + 70_000, "{held}");
    assert!(client.connection.held() < 2 << 20);
    // Calls have the other half.
    client.call(1001, "/t/Echo", b"small");
    assert_eq!(client.received(), [format!("1001 {HEAD}")]);
    // Once the client reads, it gets everything.
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 24);
    let mut got = Vec::new();
    for _ in 0..1000 {
        client.grant(0, 100_000);
        got.extend(client.take());
    }
    let ended = |stream| got.iter().any(|frame| frame.stream == stream && frame.flags & flag::END_STREAM != 0);
    assert!(ended(3) && ended(1001));
    assert_eq!((client.connection.sender.held, client.connection.stalled.len()), (0, 0));
}

#[test]
fn calls_go_on_while_streams_are_not_read() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 1000);
    client.grant(0, 1 << 30);
    for nth in 0..400 {
        client.open(2 * nth + 1, "/t/Pour", &[], false);
        client.message(2 * nth + 1, &[0; 1000], false);
        client.received();
    }
    assert!(client.connection.sender.held > CALLS_WAIT_BYTES);
    client.assert_healthy(1001);
}

#[test]
fn a_client_that_opens_no_window_is_dropped() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 0);
    for nth in 0..20 {
        client.open(2 * nth + 1, "/t/Pour", &[], false);
        client.message(2 * nth + 1, &[0; 1000], false);
        client.take();
        client.connection.wrote(1000, true, client.now);
    }
    for is_patient in [true, false] {
        client.now += Duration::from_secs(31);
        client.connection.on_timer(client.now);
        assert_eq!(client.connection.is_dead(), !is_patient);
        client.connection.wrote(0, true, client.now);
    }
}

#[test]
fn waiting_calls_are_counted_and_dropped_with_their_streams() {
    let mut client = Client::with(Limits { max_held: 40 << 20, ..Limits::default() });
    client.set(setting::INITIAL_WINDOW_SIZE, 0);
    for nth in 0..2000 {
        client.call(2 * nth + 1, "/t/Echo", &[b'x'; 16_000]);
        client.take();
    }
    let (held, ready) = (client.connection.held(), client.connection.ready.len());
    assert!(ready > 100 && held > CALLS_WAIT_BYTES + ready * 16_000, "{held} bytes for {ready} calls");
    let pinned = client
        .connection
        .streams
        .iter_mut()
        .any(|(_, stream)| matches!(&stream.handler, crate::handler::Handler::Ready(waiting) if !waiting.is_copy));
    assert!(!pinned, "waiting calls keep no read buffers");
    for nth in 1500..2000 {
        client.frame(kind::RST_STREAM, 0, 2 * nth + 1, &8_u32.to_be_bytes());
    }
    client.take();
    assert!(client.connection.held() < held - 400 * 16_000);
}

#[test]
fn request_headers_of_open_streams_are_counted() {
    let mut client = Client::with(Limits { max_held: 1 << 20, ..Limits::default() });
    let long = "x".repeat(50_000);
    for nth in 0..100 {
        let more = [("a", long.as_str())];
        let block = client.block("/page", &more);
        let mut pieces = block.chunks(16_384).peekable();
        let mut next = kind::HEADERS;
        while let Some(piece) = pieces.next() {
            let flags = if pieces.peek().is_none() { flag::END_HEADERS } else { 0 };
            client.frame(next, flags, 2 * nth + 1, piece);
            next = kind::CONTINUATION;
        }
        client.take();
    }
    let open = client.connection.streams.len();
    assert!((15..=21).contains(&open), "{open} streams are open");
    assert!(client.connection.held() <= 1 << 20);
}

#[test]
fn a_closed_connection_sends_nothing_more() {
    let mut client = Client::with(Limits { keepalive_interval: Duration::from_secs(1), ..Limits::default() });
    client.grant(0, 0);
    assert!(client.connection.is_closed());
    client.connection.run(client.now);
    client.connection.wrote(0, false, client.now);
    client.now += Duration::from_secs(30);
    client.connection.on_timer(client.now);
    assert!(client.connection.next_timer() > client.now, "the timer must not fire again and again");
    client.now += Duration::from_secs(31);
    client.connection.on_timer(client.now);
    assert!(client.connection.is_dead());
}

#[test]
fn missing_settings_or_a_slow_frame_end_the_connection() {
    let mut client = Client::before_preface(Limits::default());
    client.send(PREFACE);
    client.now += Duration::from_secs(11);
    client.connection.on_timer(client.now);
    client.assert_ended(Code::EnhanceYourCalm);

    let mut client = Client::new();
    let frame = frame_bytes(kind::HEADERS, flag::END_HEADERS, 1, &[0x83; 200]);
    for byte in &frame[..150] {
        client.send(&[*byte]);
        client.now += Duration::from_millis(100);
        client.connection.on_timer(client.now);
    }
    client.assert_ended(Code::EnhanceYourCalm);
}

/// A few bytes may expand to megabytes: they are decompressed in several turns.
#[test]
fn a_turn_decompresses_only_so_much() {
    let compressed = crate::message::compress(&vec![b'x'; 1 << 20]);
    let message = [&message::prefix(compressed.len(), true).unwrap()[..], &compressed].concat();
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 30);
    client.open(1, "/t/Pour", &[("grpc-encoding", "gzip")], false);
    for _ in 0..10 {
        client.frame(kind::DATA, 0, 1, &message);
    }
    for nth in 1..=10 {
        client.open(2 * nth + 1, "/t/Echo", &[("grpc-encoding", "gzip")], false);
        client.frame(kind::DATA, flag::END_STREAM, 2 * nth + 1, &message);
    }
    let mut turns = 0;
    while client.connection.run(client.now) && turns < 1000 {
        drain(client.connection.output());
        turns += 1;
        assert_eq!(client.connection.ready.len(), 10_usize.saturating_sub(turns));
    }
    assert!(turns >= 9, "{turns}");
}
