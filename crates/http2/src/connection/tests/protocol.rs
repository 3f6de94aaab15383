//! Protocol errors and their consequences. The cases follow RFC 9113, section by section.

use proptest::prelude::*;

use super::*;

/// Asserts that the connection ends with this code after some frames.
#[track_caller]
fn ends_connection(code: Code, act: impl FnOnce(&mut Client)) {
    let mut client = Client::new();
    act(&mut client);
    client.assert_ended(code);
}

/// Asserts that stream 1 ends with this code after some frames.
#[track_caller]
fn resets_stream(code: Code, act: impl FnOnce(&mut Client)) {
    let mut client = Client::new();
    act(&mut client);
    client.assert_reset(1, code);
}

#[test]
fn the_preface_is_exact_and_settings_come_first() {
    for (bytes, code) in [(&b"GET / HTTP/1.1\r\n"[..], Code::Protocol), (b"PRI * HTTP/2.0\r\n\r\nXX", Code::Protocol)] {
        let mut client = Client::before_preface(Limits::default());
        client.send(bytes);
        client.assert_ended(code);
    }
    let mut client = Client::before_preface(Limits::default());
    client.send(PREFACE);
    client.frame(kind::PING, 0, 0, &[0; 8]);
    client.assert_ended(Code::Protocol);
}

#[test]
fn section_4_frames() {
    ends_connection(Code::FrameSize, |client| client.send(&frame::head(16_385, kind::DATA, 0, 1)));
    ends_connection(Code::Compression, |client| client.frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x80]));
    ends_connection(Code::Protocol, |client| {
        client.frame(kind::HEADERS, 0, 1, &[]);
        client.frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]);
    });
    ends_connection(Code::Protocol, |client| {
        client.frame(kind::HEADERS, 0, 1, &[]);
        client.frame(0x77, 0, 1, &[]);
    });
    ends_connection(Code::Protocol, |client| {
        client.frame(kind::HEADERS, 0, 1, &[]);
        client.frame(kind::CONTINUATION, flag::END_HEADERS, 3, &[]);
    });
    let mut client = Client::new();
    client.frame(0x77, 0xff, 1, b"unknown frame type");
    client.assert_healthy(0);
}

#[test]
fn section_5_1_states() {
    ends_connection(Code::Protocol, |client| client.message(1, b"", false));
    ends_connection(Code::Protocol, |client| client.frame(kind::RST_STREAM, 0, 1, &[0; 4]));
    ends_connection(Code::Protocol, |client| client.grant(1, 1));
    // A stream that was never opened cannot even be reset.
    ends_connection(Code::Protocol, |client| client.grant(1, 0));
    ends_connection(Code::FrameSize, |client| client.frame(kind::PRIORITY, 0, 1, &[0; 4]));
    ends_connection(Code::Protocol, |client| client.frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 1, 0]));
    ends_connection(Code::Protocol, |client| client.frame(kind::CONTINUATION, flag::END_HEADERS, 1, &[]));
    resets_stream(Code::StreamClosed, |client| {
        client.call(1, "/t/Later", b"");
        client.message(1, b"", true);
    });
    resets_stream(Code::StreamClosed, |client| {
        client.call(1, "/t/Later", b"");
        client.open(1, "/t/Later", &[], true);
    });
    resets_stream(Code::StreamClosed, |client| {
        client.call(1, "/t/Echo", b"");
        client.received();
        client.message(1, b"", true);
    });
    resets_stream(Code::StreamClosed, |client| {
        client.open(1, "/gone-without-waiting", &[], false);
        client.frame(kind::RST_STREAM, 0, 1, &[0; 4]);
        client.message(1, b"", true);
    });
    resets_stream(Code::StreamClosed, |client| {
        client.open(1, "/t/Echo", &[], false);
        client.message(1, b"", false);
        client.received();
        client.now += Duration::from_secs(2);
        client.connection.on_timer(client.now);
        assert_eq!(client.received(), ["1 reset 0"]);
        client.frame(kind::RST_STREAM, 0, 1, &[0; 4]);
        client.message(1, b"", true);
    });
    ends_connection(Code::StreamClosed, |client| {
        client.call(1, "/t/Echo", b"");
        client.received();
        client.open(1, "/t/Echo", &[], true);
    });
    ends_connection(Code::Protocol, |client| {
        client.open(5, "/t/Chat", &[], false);
        client.open(3, "/t/Chat", &[], false);
    });
    ends_connection(Code::Protocol, |client| client.open(2, "/t/Chat", &[], false));
}

#[test]
fn section_5_1_frames_for_closed_streams_are_tolerated() {
    let mut client = Client::new();
    client.call(1, "/t/Echo", b"");
    client.received();
    client.grant(1, 100);
    client.frame(kind::RST_STREAM, 0, 1, &[0; 4]);
    client.frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 0, 1]);
    client.assert_healthy(1);
}

/// Frames in flight for a stream that the server has reset are tolerated, however many calls end meanwhile.
#[test]
fn section_5_1_frames_for_streams_that_the_server_has_reset_are_tolerated_for_a_while() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[("te", "wrong")], false);
    client.open(3, "/t/Chat", &[], false);
    client.frame(kind::DATA, 0, 3, &[7, 0, 0, 0, 0]); // It is answered, and reset later.
    client.received();
    client.now += Duration::from_secs(2);
    client.connection.on_timer(client.now);
    assert_eq!(client.received(), ["3 reset 0"]);
    for nth in 0..500 {
        client.call(2 * nth + 5, "/t/Echo", b"");
    }
    client.received();
    for stream in [1, 3] {
        client.message(stream, b"on its way", false);
        client.frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, stream, &[0x00, 1, b'a', 1, b'b']);
        assert_eq!(client.received(), [""; 0]);
    }
    client.assert_healthy(2001);
}

#[test]
fn section_5_3_a_stream_does_not_depend_on_itself() {
    resets_stream(Code::Protocol, |client| {
        let block = client.block("/t/Chat", &[]);
        let payload = [&[0, 0, 0, 1, 0][..], &block].concat();
        client.frame(kind::HEADERS, flag::END_HEADERS | flag::PRIORITY, 1, &payload);
    });
    resets_stream(Code::Protocol, |client| {
        client.open(1, "/t/Chat", &[], false);
        client.frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 1, 0]);
    });
}

#[test]
fn section_6_5_settings() {
    ends_connection(Code::Protocol, |client| client.set(setting::ENABLE_PUSH, 2));
    ends_connection(Code::FlowControl, |client| client.set(setting::INITIAL_WINDOW_SIZE, 1 << 31));
    ends_connection(Code::Protocol, |client| client.set(setting::MAX_FRAME_SIZE, 16_383));
    ends_connection(Code::Protocol, |client| client.set(setting::MAX_FRAME_SIZE, 1 << 24));
    let mut client = Client::new();
    client.set(0x99, 7);
    assert_eq!(client.received(), ["settings 1"]);
}

#[test]
fn section_6_7_pings_are_answered() {
    let mut client = Client::new();
    client.frame(kind::PING, 0, 0, b"12345678");
    let got = client.take();
    let pong = ReceivedFrame { kind: kind::PING, flags: flag::ACK, stream: 0, payload: b"12345678".to_vec() };
    assert_eq!(got, [pong]);
}

#[test]
fn section_8_1_malformed_requests() {
    let wrong: [&[(&str, &str)]; 12] = [
        &[(":status", "200")],
        &[(":unknown", "x")],
        &[(":method", "POST")],
        &[("te", "gzip")],
        &[("connection", "close")],
        &[("transfer-encoding", "chunked")],
        &[("Upper", "case")],
        &[("", "nameless")],
        &[("a", "line\nbreak")],
        &[("a", " edge")],
        &[("content-length", "five")],
        &[("a", "b"), (":authority", "late")],
    ];
    for more in wrong {
        resets_stream(Code::Protocol, |client| client.open(1, "/t/Chat", more, false));
    }
    for (length, sent) in [("7", 8), ("9", 8)] {
        resets_stream(Code::Protocol, |client| {
            client.open(1, "/t/Later", &[("content-length", length)], false);
            client.message(1, &vec![0; sent - PREFIX_BYTES], true);
        });
    }
    resets_stream(Code::Protocol, |client| client.open(1, "", &[], false));
    resets_stream(Code::Protocol, |client| {
        client.open(1, "/page", &[], false);
        client.received(); // It was answered, but the client's side is still open.
        client.open(1, "/page", &[], false);
    });
    resets_stream(Code::Protocol, |client| {
        client.open(1, "/t/Chat", &[], false);
        client.frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x00, 1, b'a', 1, b'b']);
    });
    resets_stream(Code::Protocol, |client| {
        client.open(1, "/t/Chat", &[], false);
        client.frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &[0x83]);
    });
}

#[test]
fn trailers_end_the_clients_side() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[], false);
    client.frame(kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, 1, &[0x00, 1, b'a', 1, b'b']);
    assert_eq!(client.received(), [format!("1 {HEAD} grpc-status=0 end")]);
}

#[test]
fn a_header_block_may_come_in_pieces() {
    let mut client = Client::new();
    let block = client.block("/t/Echo", &[("a", "b")]);
    client.frame(kind::HEADERS, 0, 1, &block[..3]);
    client.frame(kind::CONTINUATION, 0, 1, &[]);
    client.frame(kind::CONTINUATION, flag::END_HEADERS, 1, &block[3..]);
    client.message(1, b"", true);
    assert_eq!(client.received().len(), 3);
}

/// Frames that a client might send, sensible or not.
fn client_frames() -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        Just(b"\x83\x86\x44\x07/t/Echo\x41\x04here\x5f\x10application/grpc".to_vec()),
        Just(b"\x83\x86\x44\x07/t/Chat\x41\x04here\x5f\x10application/grpc".to_vec()),
        Just(b"\x83\x86\x84".to_vec()),
        Just(b"\x83\x86\xc0\xbf\xbe".to_vec()),
        Just(framed(b"message")),
        Just(framed(b"message")[..7].to_vec()),
        (0_u32..200_000).prop_map(|number| number.to_be_bytes().to_vec()),
        (1_u16..8, 0_u32..200_000)
            .prop_map(|(setting, value)| [&setting.to_be_bytes()[..], &value.to_be_bytes()].concat()),
        Just(vec![0; 8]),
    ];
    let fitting = (0_u8..11, prop::sample::select(vec![0_u8, 1, 4, 5, 8, 0x20, 0x25, 0xff]), 0_u32..12, payload);
    fitting.prop_map(|(kind, flags, stream, payload)| frame_bytes(kind, flags, stream, &payload))
}

fn exchange(pieces: &[Vec<u8>]) -> (Vec<ReceivedFrame>, bool, usize) {
    let mut client = Client::new();
    let mut got = Vec::new();
    for piece in pieces {
        client.send(piece);
        got.extend(client.take());
    }
    (got, client.connection.is_closed(), client.connection.held())
}

/// What is written if everything is received before anything is processed.
fn receive_all_first(pieces: &[Vec<u8>]) -> Vec<ReceivedFrame> {
    let mut client = Client::new();
    for piece in pieces {
        client.send(piece);
    }
    client.take()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000)
    ))]

    /// Whatever is sent, nothing panics, and only valid frames come back.
    #[test]
    fn arbitrary_frames_do_not_panic(frames in prop::collection::vec(client_frames(), 0..30), cut in 1_usize..50) {
        let bytes: Vec<u8> = frames.concat();
        let pieces: Vec<Vec<u8>> = bytes.chunks(cut).map(<[u8]>::to_vec).collect();
        let (got, is_over, held) = exchange(&pieces);
        prop_assert_eq!(got.iter().any(|frame| frame.kind == kind::GOAWAY), is_over);
        prop_assert!(held < 100_000);
    }

    /// Splitting the bytes into different reads makes no difference.
    #[test]
    fn splitting_the_input_makes_no_difference(
        frames in prop::collection::vec(client_frames(), 0..30),
        cut in 1_usize..50,
    ) {
        let bytes: Vec<u8> = frames.concat();
        let pieces: Vec<Vec<u8>> = bytes.chunks(cut).map(<[u8]>::to_vec).collect();
        prop_assert_eq!(receive_all_first(&frames), receive_all_first(&pieces));
        prop_assert_eq!(receive_all_first(&frames), receive_all_first(&[bytes]));
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(pieces: Vec<Vec<u8>>) {
        exchange(&pieces);
    }
}
