//! What a client makes the server keep is counted for as long as it is kept, and released when the client does not read.

use super::*;
use crate::{fault::Code, limits::MIN_READ_BYTES, message};

const MIB: usize = 1 << 20;

impl Client {
    /// One of several clients of a server.
    fn on(shared: &Arc<Shared>) -> Self {
        let mut client = Self::new();
        client.connection = Connection::new(service(&client.seen), shared.clone(), Arc::default(), client.now);
        (client.encoder, client.decoder) = (Encoder::default(), Decoder::default());
        client.send(PREFACE);
        client.frame(kind::SETTINGS, 0, 0, &[]);
        client.frame(kind::SETTINGS, flag::ACK, 0, &[]);
        client.take();
        client
    }

    /// A call whose message is longer than a frame.
    fn large_call(&mut self, stream: u32, path: &str, bytes: usize) {
        self.open(stream, path, &[], false);
        let message = framed(&vec![b'x'; bytes]);
        let mut pieces = message.chunks(16_000).peekable();
        while let Some(piece) = pieces.next() {
            self.frame(kind::DATA, if pieces.peek().is_none() { flag::END_STREAM } else { 0 }, stream, piece);
            self.take();
        }
    }

    fn reply(&self) -> Reply {
        self.seen.replies.lock().pop().expect("a call waits").1
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.connection.on_timer(self.now);
    }
}

#[test]
fn a_message_is_counted_until_its_call_has_ended() {
    let mut client = Client::new();
    client.large_call(1, "/t/Later", MIB);
    assert!(client.connection.held() >= MIB, "a handler has it");
    client.reply().answer(Ok(Bytes::new()));
    client.take();
    assert_eq!(client.connection.held(), 0);
}

#[test]
fn a_call_that_was_reset_counts_until_its_handler_is_done() {
    let mut client = Client::new();
    client.large_call(1, "/t/Later", MIB);
    client.frame(kind::RST_STREAM, 0, 1, &8_u32.to_be_bytes());
    client.take();
    assert!(client.connection.streams.is_empty() && client.connection.held() >= MIB);
    let reply = client.reply();
    reply.run(|_| unreachable!("nothing waits for it"));
    client.take();
    assert_eq!(client.connection.held(), 0);
}

#[test]
fn what_calls_keep_is_counted_even_after_their_connection_has_ended() {
    let ledger = Ledger::new(64 * MIB);
    let mut client = Client::on(&Arc::new(Shared::new(Limits::default(), ledger.clone())));
    client.large_call(1, "/t/Later", MIB);
    let reply = client.reply();
    let seen = client.seen.clone();
    drop(client);
    assert!(ledger.held() >= MIB && !reply.is_wanted());
    reply.answer(Ok(vec![b'x'; 10 * MIB].into()));
    assert_eq!(ledger.held(), 0, "it was the last call of the connection");
    drop(seen);
}

#[test]
fn a_call_that_keeps_a_read_buffer_alive_counts_for_all_of_it() {
    let mut client = Client::new();
    let block = client.block("/t/Later", &[]);
    let mut read = frame_bytes(kind::HEADERS, flag::END_HEADERS, 1, &block);
    read.extend(frame_bytes(kind::DATA, flag::END_STREAM, 1, &framed(b"few")));
    read.extend(frame_bytes(0x77, 0, 0, &[0; 16_000]));
    client.send(&read);
    client.take();
    assert!(client.connection.held() >= 16_000, "{}", client.connection.held());
    let (message, reply) = client.seen.replies.lock().pop().unwrap();
    drop(message);
    client.take();
    assert!(client.connection.held() < 2000, "the read buffer is not referenced any more");
    drop(reply);
}

#[test]
fn a_first_response_is_refused_beyond_a_fair_share() {
    let ledger = Ledger::new(8 * MIB);
    let limits = Limits { max_held: MIB, ..Limits::default() };
    let shared = Arc::new(Shared::new(limits, ledger.clone()));
    let mut clients: Vec<_> = (0..4).map(|_| Client::on(&shared)).collect();
    for client in &mut clients {
        client.set(setting::INITIAL_WINDOW_SIZE, 0);
        let mut received = Vec::new();
        for (stream, bytes) in [(1, 3 * MIB), (3, MIB + MIB / 2)] {
            client.call(stream, "/t/Later", b"");
            received.extend(client.received());
            client.reply().answer(Ok(vec![b'x'; bytes].into()));
        }
        received.extend(client.received());
        assert!(received.iter().any(|line| line.starts_with("1 ") && line.contains("grpc-status=8")), "{received:?}");
        assert!(received.iter().all(|line| !line.starts_with("3 ") || !line.contains("grpc-status")), "{received:?}");
    }
    assert!(ledger.held() > 6 * MIB && ledger.held() <= 8 * MIB, "{}", ledger.held());
}

#[test]
fn a_client_whose_windows_open_too_slowly_is_dropped() {
    for (rate, is_kept) in [(MIN_READ_BYTES / 30, false), (MIN_READ_BYTES / 8, true)] {
        let mut client = Client::new();
        client.set(setting::INITIAL_WINDOW_SIZE, 0);
        client.grant(0, 1 << 30);
        client.call(1, "/t/Later", b"");
        client.take();
        client.reply().answer(Ok(vec![b'x'; 4 * MIB].into()));
        for _ in 0..20 {
            client.take();
            client.connection.wrote(0, true, client.now);
            client.grant(1, u32::try_from(rate).unwrap());
            client.wait(6);
        }
        assert_eq!(client.connection.is_dead(), !is_kept, "{rate} bytes in six seconds");
    }
}

#[test]
fn a_socket_that_is_read_too_slowly_is_dropped() {
    for (rate, is_kept) in [(MIN_READ_BYTES / 30, false), (MIN_READ_BYTES / 8, true)] {
        let mut client = Client::new();
        client.call(1, "/t/Echo", b"");
        client.connection.run(client.now);
        for _ in 0..20 {
            client.connection.wrote(rate, false, client.now);
            client.wait(6);
        }
        assert_eq!(client.connection.is_dead(), !is_kept, "{rate} bytes in six seconds");
    }
}

#[test]
fn output_that_the_socket_has_refused_is_counted() {
    let mut client = Client::new();
    client.call(1, "/t/Echo", &[b'x'; 10_000]);
    client.connection.run(client.now);
    assert_eq!(client.connection.held(), 0, "output counts only if the socket refuses it");
    client.connection.wrote(0, false, client.now);
    assert!(client.connection.shared.ledger.held() > 10_000);
    client.take();
    client.connection.wrote(10_100, true, client.now);
    assert_eq!(client.connection.shared.ledger.held(), 0);
}

#[test]
fn a_goaway_of_a_client_without_calls_ends_the_connection_at_once() {
    let goodbye = [0; 8];
    let mut client = Client::new();
    client.frame(kind::GOAWAY, 0, 0, &goodbye);
    client.assert_ended(Code::NoError);
    // A client with a call is waited for.
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.frame(kind::GOAWAY, 0, 0, &goodbye);
    client.take();
    assert!(!client.connection.is_closed());
    client.reply().answer(Ok(Bytes::new()));
    client.assert_ended(Code::NoError);
}

#[test]
fn a_connection_without_calls_ends_after_the_idle_timeout() {
    let limits = Limits { idle_timeout: Some(Duration::from_mins(1)), ..Limits::default() };
    let mut client = Client::with(limits);
    client.wait(40);
    client.open(1, "/t/Chat", &[], false);
    client.take();
    client.wait(100);
    assert_eq!(client.received(), [""; 0], "a stream is open");
    client.frame(kind::RST_STREAM, 0, 1, &8_u32.to_be_bytes());
    assert_eq!(client.connection.next_timer(), client.now + Duration::from_mins(1));
    client.wait(60);
    assert_eq!(client.received(), ["goaway 2147483647 0", "ping 0"]);
    client.frame(kind::PING, flag::ACK, 0, b"leaving.");
    client.assert_ended(Code::NoError);
}

#[test]
fn complete_requests_are_answered_after_the_client_has_closed_its_side() {
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.call(3, "/t/Later", b"");
    client.open(5, "/t/Chat", &[], false);
    client.open(7, "/t/Echo", &[], false);
    client.take();
    client.connection.input_ended(client.now);
    assert_eq!(client.seen.conversations.load(Ordering::Relaxed), 0, "the conversation cannot continue");
    client.reply().answer(Ok(Bytes::from_static(b"late")));
    assert_eq!(client.received(), [format!("3 {HEAD}"), "3 data 9".into(), "3 grpc-status=0 end".into()]);
    client.reply().answer(Ok(Bytes::from_static(b"last")));
    assert!(client.received().contains(&"1 data 9".to_owned()));
    assert!(client.connection.is_closed(), "nothing else can come");
    // But not longer than the read timeout.
    let mut client = Client::new();
    client.call(1, "/t/Later", b"");
    client.take();
    client.connection.input_ended(client.now);
    client.wait(61);
    assert!(client.connection.is_dead());
    // Without requests the connection ends at once.
    let mut client = Client::new();
    client.connection.input_ended(client.now);
    assert!(client.connection.is_closed());
}

#[test]
fn streams_beyond_a_limit_that_the_client_cannot_know_are_no_flood() {
    let limits = Limits { max_streams: 10, ..Limits::default() };
    let mut client = Client::before_preface(limits.clone());
    client.send(PREFACE);
    client.frame(kind::SETTINGS, 0, 0, &[]);
    for nth in 0..2000 {
        client.open(2 * nth + 1, "/t/Later", &[], false);
    }
    client.take();
    assert!(!client.connection.is_closed());
    client.frame(kind::SETTINGS, flag::ACK, 0, &[]);
    for nth in 2000..4000 {
        client.open(2 * nth + 1, "/t/Later", &[], false);
    }
    client.assert_ended(Code::EnhanceYourCalm);
    // A client that never acknowledges the settings is assumed to know them after a while.
    let mut client = Client::before_preface(limits);
    client.send(PREFACE);
    client.frame(kind::SETTINGS, 0, 0, &[]);
    client.now += Duration::from_secs(11);
    for nth in 0..2000 {
        client.open(2 * nth + 1, "/t/Later", &[], false);
    }
    client.assert_ended(Code::EnhanceYourCalm);
}

#[test]
fn frames_for_streams_that_the_server_has_reset_are_limited() {
    let mut client = Client::with(Limits { max_streams: 1, ..Limits::default() });
    client.open(1, "/t/Later", &[], false);
    client.open(3, "/t/Later", &[], false);
    client.assert_refused_stream(3);
    let stray = frame_bytes(kind::DATA, 0, 3, b"x").repeat(1000);
    for _ in 0..10 {
        client.send(&stray);
        assert!(!client.connection.is_closed(), "some may be in flight");
    }
    client.send(&stray);
    client.assert_ended(Code::EnhanceYourCalm);
}

impl Client {
    #[track_caller]
    fn assert_refused_stream(&mut self, stream: u32) {
        let received = self.received();
        assert!(received.contains(&format!("{stream} reset {}", Code::RefusedStream as u32)), "{received:?}");
    }
}

/// Each reference by one byte refers to a name of 4,000 bytes.
#[test]
fn a_long_name_is_not_copied_for_every_reference() {
    let mut client = Client::new();
    let mut block = client.block("/t/Echo", &[]);
    block.extend([&b"\x40\x7f\xa1\x1e"[..], &[b'n'; 4000], b"\x00"].concat());
    block.extend(b"\x7e\x00".repeat(5000));
    client.frame(kind::HEADERS, flag::END_HEADERS, 1, &block);
    let received = client.received();
    assert!(received[0].starts_with("1 :status=431"), "{received:?}");
    assert!(client.connection.decoder.shares_names(), "entries with the same name share it");
}

#[test]
fn large_responses_are_compressed_on_another_thread() {
    let mut client = Client::new();
    client.set(setting::INITIAL_WINDOW_SIZE, 1 << 30);
    client.grant(0, 1 << 30);
    let more = [("grpc-encoding", "gzip"), ("grpc-accept-encoding", "gzip")];
    for (stream, bytes, is_elsewhere) in [(1, 1000, false), (3, 100_000, true)] {
        client.open(stream, "/t/Later", &more, false);
        client.message(stream, b"", true);
        client.take();
        client.reply().answer(Ok(vec![b'x'; bytes].into()));
        let received = client.received();
        assert_eq!(received.is_empty(), is_elsewhere, "{received:?}");
        let held = client.connection.held();
        assert!(!is_elsewhere || held > bytes, "{held}");
        let jobs = std::mem::take(&mut *client.seen.jobs.lock());
        assert_eq!(jobs.len(), usize::from(is_elsewhere));
        for job in jobs {
            job();
            let got = client.take();
            let data: Vec<u8> =
                got.iter().filter(|got| got.kind == kind::DATA).flat_map(|got| got.payload.clone()).collect();
            assert_eq!(data[0], 1, "the message is compressed");
            assert_eq!(message::decompress(&data[PREFIX_BYTES..], MIB).unwrap().len(), bytes);
        }
        assert_eq!(client.connection.held(), 0);
    }
    let handled = client.seen.handled.lock().clone();
    assert_eq!(handled, [call::Code::Ok; 2], "each is counted once");
}
