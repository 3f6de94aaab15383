//! Header blocks that we write: our own decoder and a client of the `h2` crate read the fields that were encoded, whatever table
//! sizes the peer asks for in between.

use std::{pin::Pin, task::Poll};

use bytes::Bytes;
use h2::client::{Builder, Connection, ResponseFuture, SendRequest};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http2::{
    frame::{self, flag, kind},
    hpack::{Decoder, Encoder, decoder::Fields},
};
use tokio::io::DuplexStream;

use super::{
    input::Input,
    pipe::{PIPE_BYTES, PipeEnd, context, poll},
};

const MAX_RESPONSES: usize = 32;

type List = Vec<(String, Vec<u8>)>;

/// Decisions: the size of the client's table, then responses, each with table size changes, headers and trailers.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let table_size = u32::from(input.short());
    let (mut encoder, mut decoder) = (Encoder::default(), Decoder::default());
    let mut client = Client::new(table_size);
    encoder.set_max_size(table_size as usize);
    for _ in 0..MAX_RESPONSES {
        if input.is_empty() {
            break;
        }
        for _ in 0..input.below(3) {
            encoder.set_max_size(usize::from(input.short()).min(table_size as usize));
        }
        let status = format!("{}", 200 + usize::from(input.byte()));
        let mut head = vec![(":status".to_owned(), status.into_bytes())];
        head.extend(fields(&mut input));
        let is_typical = input.byte() & 1 == 0;
        if is_typical {
            head = vec![field(":status", "200"), field("content-type", "application/grpc")];
        }
        let mut trailers = fields(&mut input);
        if is_typical {
            trailers.insert(0, field("grpc-status", "0"));
        }
        let blocks = [&head, &trailers].map(|list| write(&mut encoder, list, is_typical));
        for (block, list) in blocks.iter().zip([&head, &trailers]) {
            assert_eq!(&read(&mut decoder, block), list, "our own decoder");
        }
        let (read_head, read_trailers) = client.answer(&blocks);
        assert_eq!(read_head, map(&head), "the client's headers");
        assert_eq!(read_trailers, map(&trailers), "the client's trailers");
    }
}

fn field(name: &str, value: &str) -> (String, Vec<u8>) {
    (name.to_owned(), value.as_bytes().to_vec())
}

/// Fields that the client accepts. It has special rules for some names, which are not tested here.
fn fields(input: &mut Input) -> List {
    const NAMES: [&str; 7] = ["content-type", "grpc-status", "grpc-message", "date", "set-cookie", "x", "via"];
    const VALUES: [&str; 5] = ["application/grpc", "0", "", "gzip, deflate", "text/plain"];
    const SPECIAL: [&str; 9] = [
        "connection",
        "content-length",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
    ];
    let mut list = List::new();
    for _ in 0..input.below(8) {
        let known = input.pick(&NAMES);
        let name = if input.below(4) == 0 { String::from_utf8_lossy(input.piece()).into_owned() } else { known.into() };
        let value = if input.byte() & 1 == 0 { input.piece() } else { input.pick(&VALUES).as_bytes() };
        let is_valid = HeaderName::from_lowercase(name.as_bytes()).is_ok() && HeaderValue::from_bytes(value).is_ok();
        if is_valid && !SPECIAL.contains(&name.as_str()) {
            list.push((name, value.to_vec()));
        }
    }
    list
}

fn write(encoder: &mut Encoder, list: &[(String, Vec<u8>)], is_typical: bool) -> Vec<u8> {
    let mut block = Vec::new();
    encoder.begin(&mut block);
    let mut rest = list;
    if is_typical && rest[0].0 == ":status" {
        encoder.grpc_response_headers(&mut block);
        rest = &rest[2..];
    } else if is_typical {
        encoder.ok_trailers(&mut block);
        rest = &rest[1..];
    }
    for (name, value) in rest {
        encoder.field(name, value, &mut block);
    }
    block
}

fn read(decoder: &mut Decoder, block: &[u8]) -> List {
    let mut fields = Fields::default();
    decoder.decode(block, usize::MAX, &mut fields).expect("we can read what we write");
    let text = |name: &[u8]| String::from_utf8(name.to_vec()).expect("names are text");
    fields.iter().map(|(name, value)| (text(name), value.to_vec())).collect()
}

/// The same fields as a header map, without the status, as the client returns them.
fn map(list: &[(String, Vec<u8>)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in list.iter().filter(|(name, _)| name != ":status") {
        let name = HeaderName::from_lowercase(name.as_bytes()).expect("only valid names were generated");
        map.append(name, HeaderValue::from_bytes(value).expect("only valid values were generated"));
    }
    map
}

/// A client of the `h2` crate, and the server's end of its pipe.
struct Client {
    sender: SendRequest<Bytes>,
    connection: Pin<Box<Connection<DuplexStream, Bytes>>>,
    end: PipeEnd,
    stream: u32,
}

impl Client {
    fn new(table_size: u32) -> Self {
        let (theirs, ours) = tokio::io::duplex(PIPE_BYTES);
        let mut builder = Builder::new();
        builder.header_table_size(table_size).max_header_list_size(1 << 20);
        let mut handshake = Box::pin(builder.handshake(theirs));
        let Poll::Ready(Ok((sender, connection))) = poll(&mut handshake) else {
            panic!("the handshake completes at once")
        };
        let mut client = Self { sender, connection: Box::pin(connection), end: PipeEnd(ours), stream: 1 };
        let mut settings = Vec::new();
        frame::write_head(&mut settings, 0, kind::SETTINGS, 0, 0);
        frame::write_head(&mut settings, 0, kind::SETTINGS, flag::ACK, 0);
        client.run_client();
        client.end.write(&settings);
        client.run_client();
        client
    }

    fn run_client(&mut self) {
        if let Poll::Ready(end) = poll(&mut self.connection) {
            panic!("the connection has ended: {end:?}");
        }
        self.end.read();
    }

    /// Sends a request, answers it with these header blocks, and returns what the client has read.
    fn answer(&mut self, blocks: &[Vec<u8>; 2]) -> (HeaderMap, HeaderMap) {
        let mut request = Request::new(());
        *request.uri_mut() = http::Uri::from_static("http://a.b/c");
        let (mut response, _) = self.sender.send_request(request, true).expect("the connection is open");
        self.run_client();
        let mut bytes = Vec::new();
        for (block, end) in blocks.iter().zip([0, flag::END_STREAM]) {
            frame::write_head(&mut bytes, block.len(), kind::HEADERS, flag::END_HEADERS | end, self.stream);
            bytes.extend_from_slice(block);
        }
        self.stream += 2;
        self.end.write(&bytes);
        self.run_client();
        read_response(&mut response)
    }
}

fn read_response(response: &mut ResponseFuture) -> (HeaderMap, HeaderMap) {
    let Poll::Ready(Ok(response)) = poll(response) else { panic!("the client did not accept the response") };
    let (head, mut body) = response.into_parts();
    assert!(matches!(body.poll_data(&mut context()), Poll::Ready(None)), "there is no body");
    let Poll::Ready(Ok(Some(trailers))) = body.poll_trailers(&mut context()) else { panic!("there are trailers") };
    (head.headers, trailers)
}

/// Typical responses with the relevant table sizes in between, and decisions that generate many fields.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut typical = vec![0x10, 0];
    for size in [0_u16, 4096, 101, 102, 32] {
        typical.push(1);
        typical.extend_from_slice(&size.to_be_bytes());
        typical.extend_from_slice(&[0, 0, 0, 0]); // Status and no fields; then the typical fields and nothing more.
    }
    let decisions = (0..200_u8).map(|byte| byte.wrapping_mul(29) ^ 0x5a);
    vec![typical, decisions.collect()]
}
