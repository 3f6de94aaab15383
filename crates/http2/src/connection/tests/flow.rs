//! Flow control, in both directions.

use super::*;

fn data_of(got: &[ReceivedFrame], stream: u32) -> usize {
    got.iter().filter(|frame| (frame.kind, frame.stream) == (kind::DATA, stream)).map(|frame| frame.payload.len()).sum()
}

fn has_ended(got: &[ReceivedFrame], stream: u32) -> bool {
    got.iter().any(|frame| frame.stream == stream && frame.flags & flag::END_STREAM != 0 && frame.kind <= kind::HEADERS)
}

#[test]
fn a_response_waits_for_its_streams_window() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 10);
    client.call(1, "/t/Echo", &[b'x'; 100]);
    let got = client.take();
    assert_eq!((data_of(&got, 1), has_ended(&got, 1)), (10, false));
    client.grant(1, 20);
    assert_eq!(data_of(&client.take(), 1), 20);
    client.set(setting::INITIAL_WINDOW_SIZE, 5); // The window is now minus five.
    client.grant(1, 5);
    assert_eq!(data_of(&client.take(), 1), 0);
    client.set(setting::INITIAL_WINDOW_SIZE, 1000);
    let got = client.take();
    assert_eq!((data_of(&got, 1), has_ended(&got, 1)), (75, true));
    assert_eq!(client.connection.sender.held, 0);
}

#[test]
fn streams_take_turns_at_the_connections_window() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 20);
    let sent = vec![b'x'; 60_000];
    for stream in [1, 3, 5] {
        client.open(stream, "/t/Echo", &[], false);
        let message = framed(&sent);
        for chunk in message.chunks(16_384) {
            client.frame(kind::DATA, 0, stream, chunk);
        }
        client.frame(kind::DATA, flag::END_STREAM, stream, &[]);
    }
    let got = client.take();
    assert_eq!([1, 3, 5].map(|stream| data_of(&got, stream)), [60_005, 5530, 0]);
    client.grant(0, 32_768);
    let got = client.take();
    assert_eq!([3, 5].map(|stream| data_of(&got, stream)), [16_384, 16_384]);
    client.grant(0, 1_000_000);
    let got = client.take();
    assert_eq!([3, 5].map(|stream| has_ended(&got, stream)), [true, true]);
}

#[test]
fn a_window_that_overflows_is_an_error() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.grant(1, 0x7fff_ffff);
    client.assert_reset(1, Code::FlowControl);
    let mut client = Client::new();
    client.grant(0, 0x7fff_ffff);
    client.assert_ended(Code::FlowControl);
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.grant(1, 0x7fff_0000);
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 20);
    client.assert_ended(Code::FlowControl);
}

#[test]
fn a_large_message_gets_the_window_that_it_needs() {
    let mut client = Client::new();
    client.open(1, "/t/Later", &[], false);
    let message = framed(&vec![b'x'; 1_500_000]);
    let mut window = usize::try_from(STREAM_WINDOW).unwrap();
    let mut sent = 0;
    while sent < message.len() {
        let length = (message.len() - sent).min(16_384);
        assert!(length <= window, "stuck after {sent} bytes");
        window -= length;
        client.frame(kind::DATA, 0, 1, &message[sent..sent + length]);
        sent += length;
        let got = client.take();
        let granted = got.iter().filter(|frame| (frame.kind, frame.stream) == (kind::WINDOW_UPDATE, 1));
        window += granted.map(|frame| number(&frame.payload) as usize).sum::<usize>();
    }
    client.take();
    assert_eq!(client.seen.replies.lock()[0].0.len(), 1_500_000);
    let held = 1_500_000 + crate::limits::STREAM_BYTES;
    assert_eq!(client.connection.held(), held, "the handler has it, and there is the stream itself");
}

#[test]
fn sending_more_than_the_window_resets_the_stream() {
    let mut client = Client::new();
    client.open(1, "/t/Later", &[], false);
    client.message(1, b"all of it", false);
    for _ in 0..8 {
        client.frame(kind::DATA, 0, 1, &[0; 16_384]);
    }
    client.assert_reset(1, Code::FlowControl);
}

#[test]
fn a_conversations_window_is_released_as_it_reads() {
    let mut client = Client::new();
    client.grant(0, 1 << 30);
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 30);
    client.open(1, "/t/Chat", &[], false);
    let (mut window, mut echoed) = (STREAM_WINDOW, 0);
    for _ in 0..1000 {
        client.message(1, &[b'x'; 1000], false);
        window -= 1005;
        let got = client.take();
        echoed += data_of(&got, 1);
        let granted = got.iter().filter(|frame| (frame.kind, frame.stream) == (kind::WINDOW_UPDATE, 1));
        window += granted.map(|frame| i64::from(number(&frame.payload))).sum::<i64>();
        assert!(window > 0);
    }
    assert_eq!(echoed, 1_005_000);
    assert!((STREAM_WINDOW + 1..=2 << 20).contains(&window), "{window}: the window of a fast reader grows");
}

#[test]
fn the_window_of_padding_is_released_too() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[], false);
    let (mut window, mut padding) = (STREAM_WINDOW, vec![0; 256]);
    padding[0] = 255;
    for _ in 0..1500 {
        client.frame(kind::DATA, flag::PADDED, 1, &padding);
        window -= 256;
        let granted = client.take().into_iter().filter(|frame| (frame.kind, frame.stream) == (kind::WINDOW_UPDATE, 1));
        window += granted.map(|frame| i64::from(number(&frame.payload))).sum::<i64>();
        assert!(window > 0);
    }
}

#[test]
fn a_table_size_change_is_not_lost_if_a_stream_ends_without_trailers() {
    let mut client = Client::new();
    client.open(1, "/page", &[], true);
    assert_eq!(client.received().len(), 3);
    client.open(3, "/gone", &[], false);
    client.received();
    client.set(setting::HEADER_TABLE_SIZE, 0);
    client.frame(kind::DATA, flag::END_STREAM, 3, &[]); // The response ends with an empty frame.
    client.received();
    client.call(5, "/t/Echo", b"");
    let got = client.take();
    assert_eq!(got[0].payload[..2], [0x20, 0x20], "the next block starts with the new size");
    client.fields(&got[0]);
}

#[test]
fn a_conversation_pauses_while_the_client_does_not_read() {
    let mut client = Client::new();
    client.open(1, "/t/Pour", &[], false);
    client.message(1, &[0; 200], false); // 200,000 bytes in messages of 1,000.
    let mut got = data_of(&client.take(), 1);
    assert!((60_000..=65_535).contains(&got));
    let held = client.connection.sender.held;
    assert!((60_000..=70_000).contains(&held), "{held} bytes wait");
    while got < 201_000 {
        client.grant(0, 10_000);
        client.grant(1, 10_000);
        let more = data_of(&client.take(), 1);
        assert!(more > 0, "stuck at {got}");
        got += more;
    }
    assert_eq!((got, client.connection.sender.held), (201_000, 0));
}

/// A frame of the same length at the same position is not necessarily the same frame.
#[test]
fn a_message_is_not_appended_to_another_frame_at_the_same_position() {
    let mut client = Client::new();
    client.open(1, "/t/Chat", &[], false);
    client.message(1, b"first", false);
    client.received();
    client.message(1, &[b'x'; 20], false); // A frame of 34 bytes at the front of a buffer.
    assert_eq!(client.received(), ["1 data 25"]);
    client.frame(kind::PING, 0, 0, &[0; 8]); // Two frames of 17 bytes.
    client.frame(kind::PING, 0, 0, &[0; 8]);
    client.message(1, &[b'x'; 20], false);
    assert_eq!(client.received(), ["ping 1", "ping 1", "1 data 25"]);
}

#[test]
fn small_messages_of_one_stream_share_a_frame() {
    let mut client = Client::new();
    for stream in [1, 3] {
        client.open(stream, "/t/Chat", &[], false);
        client.received();
    }
    // What is already written is not changed, and a message of another stream starts another frame.
    for _ in 0..2 {
        for stream in [1, 1, 3, 1] {
            client.message(stream, &[b'x'; 100], false);
            client.message(stream, &[b'x'; 50], false);
        }
        let got = client.take();
        let frames: Vec<_> = got.iter().filter(|frame| frame.kind == kind::DATA).collect();
        let sizes: Vec<_> = frames.iter().map(|frame| (frame.stream, frame.payload.len())).collect();
        assert_eq!(sizes, [(1, 480), (3, 160)]);
        let mut deframer = message::Deframer::default();
        deframer.push_copy(&frames[0].payload);
        for length in [100, 50].repeat(3) {
            assert_eq!(deframer.take(message::Encoding::Identity, 100).unwrap().unwrap(), vec![b'x'; length]);
        }
    }
    // No frame is larger than allowed.
    client.grant(0, 1 << 20);
    client.open(5, "/t/Pour", &[], false);
    client.message(5, &[0; 40], false);
    let sizes: Vec<_> =
        client.take().iter().filter(|frame| frame.kind == kind::DATA).map(|frame| frame.payload.len()).collect();
    assert_eq!(sizes, [16 * 1005, 16 * 1005, 8 * 1005]);
}

#[test]
fn frames_are_as_large_as_the_client_accepts() {
    let mut client = Client::new();
    client.set(setting::MAX_FRAME_SIZE, 40_000);
    client.open(1, "/t/Echo", &[], false);
    for chunk in framed(&vec![b'x'; 50_000]).chunks(16_384) {
        client.frame(kind::DATA, 0, 1, chunk);
    }
    let got = client.take();
    let sizes: Vec<_> = got.iter().filter(|frame| frame.kind == kind::DATA).map(|frame| frame.payload.len()).collect();
    assert_eq!(sizes, [40_000, 10_005]);
}
