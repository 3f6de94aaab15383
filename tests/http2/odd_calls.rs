//! Unusual and malformed calls, written by hand, and etcd 3.7.3's responses.
//!
//! The responses were recorded from a real etcd, and `tests/differential` compares them again where an etcd is available.

use http2::hpack::{Decoder, decoder::Fields};

use super::raw::{self, Raw};

const RANGE: &str = "/etcdserverpb.KV/Range";
const STREAM: &str = "/etcdserverpb.KV/RangeStream";
const WATCH: &str = "/etcdserverpb.Watch/Watch";

/// The key `a`.
const KEY: &[u8] = b"\x0a\x01a";
/// Bytes that are not a message: a field whose length exceeds the input.
const GARBAGE: &[u8] = b"\x0a";

pub struct Odd {
    path: &'static str,
    method: &'static str,
    authority: Option<&'static str>,
    content_type: &'static str,
    more: Vec<(&'static str, &'static str)>,
    body: Vec<u8>,
    /// Whether the client ends the stream.
    ends: bool,
    /// The response's fields, without `:status: 200` and the default content type; then whether the stream was reset.
    pub answer: &'static str,
}

fn odd(path: &'static str, answer: &'static str) -> Odd {
    Odd {
        path,
        method: "POST",
        authority: Some("here"),
        content_type: "application/grpc",
        more: Vec::new(),
        body: raw::framed(KEY),
        ends: true,
        answer,
    }
}

impl Odd {
    fn with_body(self, body: &[&[u8]]) -> Self {
        Self { body: body.concat(), ..self }
    }

    fn with_content_type(self, content_type: &'static str) -> Self {
        Self { content_type, ..self }
    }

    fn with_field(mut self, name: &'static str, value: &'static str) -> Self {
        self.more.push((name, value));
        self
    }

    fn without_authority(self) -> Self {
        Self { authority: None, ..self }
    }

    fn without_end(self) -> Self {
        Self { ends: false, ..self }
    }

    fn with_method(self, method: &'static str) -> Self {
        Self { method, ..self }
    }

    pub fn name(&self) -> String {
        let Self { path, method, authority, content_type, more, body, ends, .. } = self;
        format!("{method} {path} at {authority:?}, {content_type}, {more:?}, {body:02x?}, ended: {ends}")
    }

    /// Makes the call; returns the response in the form of [`Odd::answer`].
    pub fn ask(&self, address: &str) -> String {
        let mut block = Vec::new();
        let usual = [(":method", self.method), (":scheme", "http"), (":path", self.path)];
        let fields = usual
            .into_iter()
            .chain(self.authority.map(|authority| (":authority", authority)))
            .chain([("content-type", self.content_type), ("te", "trailers")])
            .chain(self.more.iter().copied());
        for (name, value) in fields {
            block.push(0x10); // A literal that is never indexed.
            for text in [name, value] {
                block.push(u8::try_from(text.len()).ok().filter(|&length| length < 127).unwrap());
                block.extend_from_slice(text.as_bytes());
            }
        }
        let mut client = Raw::handshake(address);
        let mut bytes = raw::frame(raw::HEADERS, raw::END_HEADERS, 1, &block);
        bytes.extend(raw::frame(raw::DATA, if self.ends { raw::END_STREAM } else { 0 }, 1, &self.body));
        client.send(&bytes).unwrap();
        self.read_answer(&mut client)
    }

    fn read_answer(&self, client: &mut Raw) -> String {
        let (mut decoder, mut fields, mut fields_seen) = (Decoder::default(), Fields::default(), Vec::new());
        loop {
            let frame = client.next().expect("the server stays");
            if frame.stream != 1 {
                continue;
            }
            if frame.kind == raw::RST_STREAM {
                let code = u32::from_be_bytes(frame.payload[..4].try_into().unwrap());
                fields_seen.push(format!("reset {code}"));
                return fields_seen.join(" ");
            }
            if frame.kind == raw::HEADERS {
                decoder.decode(&frame.payload, usize::MAX, &mut fields).unwrap();
                for (name, value) in fields.iter() {
                    let field = format!("{}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value));
                    // An empty message means nothing.
                    let is_usual = [":status=200", "content-type=application/grpc", "grpc-message="].contains(&&*field);
                    let is_relevant =
                        [&b":status"[..], b"content-type", b"grpc-status", b"grpc-message"].contains(&name);
                    if is_relevant && !is_usual {
                        // hyper's server escapes more characters.
                        fields_seen.push(field.replace("%20", " ").replace("%22", "\""));
                    }
                }
            }
            if frame.flags & raw::END_STREAM != 0 && matches!(frame.kind, raw::HEADERS | raw::DATA) && self.ends {
                return fields_seen.join(" ");
            }
        }
    }
}

/// All calls.
pub fn all() -> Vec<Odd> {
    [paths(), content_types(), hosts(), fields(), messages(), garbage()].into_iter().flatten().collect()
}

/// The calls for which hyper leaves the response to our code.
pub fn behind_hyper() -> Vec<Odd> {
    [paths(), garbage()].into_iter().flatten().filter(|odd| odd.ends).collect()
}

/// Paths without a method.
fn paths() -> Vec<Odd> {
    vec![
        odd("/nope/Foo", "grpc-status=12 grpc-message=unknown service nope"),
        odd("/nope/Foo", "grpc-status=12 grpc-message=unknown service nope reset 0").without_end(),
        odd("/a/b/c", "grpc-status=12 grpc-message=unknown service a/b"),
        odd("/etcdserverpb.KV/Nope", "grpc-status=12 grpc-message=unknown method Nope for service etcdserverpb.KV"),
        odd("/etcdserverpb.KV/", "grpc-status=12 grpc-message=unknown method  for service etcdserverpb.KV"),
        odd("/etcdserverpb.KV/Range/", "grpc-status=12 grpc-message=unknown service etcdserverpb.KV/Range"),
        odd("//etcdserverpb.KV/Range", "grpc-status=12 grpc-message=unknown service /etcdserverpb.KV"),
        odd("/v3lockpb.Lock/X", "grpc-status=12 grpc-message=unknown method X for service v3lockpb.Lock"),
        odd(
            "/grpc.health.v1.Health/X",
            "grpc-status=12 grpc-message=unknown method X for service grpc.health.v1.Health",
        ),
        odd("/noslash", "grpc-status=12 grpc-message=malformed method name: \"/noslash\""),
        odd("/", "grpc-status=12 grpc-message=malformed method name: \"/\""),
        odd("//", "grpc-status=12 grpc-message=unknown service "),
    ]
}

/// The codec is repeated in the response. The content type is compared case-sensitively.
fn content_types() -> Vec<Odd> {
    vec![
        odd(RANGE, "content-type=application/grpc+proto grpc-status=0").with_content_type("application/grpc+proto"),
        odd(RANGE, "content-type=application/grpc+json grpc-status=0").with_content_type("application/grpc+json"),
        odd(RANGE, "content-type=application/grpc+charset=x grpc-status=0")
            .with_content_type("application/grpc;charset=x"),
        odd(RANGE, "grpc-status=0").with_content_type("application/grpc+"),
        odd(RANGE, "content-type=application/grpc+proto grpc-status=3 grpc-message=etcdserver: key is not provided")
            .with_content_type("application/grpc+proto")
            .with_body(&[&raw::framed(b"")]),
        odd("/nope/Foo", "content-type=application/grpc+proto grpc-status=12 grpc-message=unknown service nope")
            .with_content_type("application/grpc+proto"),
        odd(
            RANGE,
            ":status=405 content-type=application/grpc+proto grpc-status=13 grpc-message=Received a HEADERS frame with \
             :method \"GET\" which should be POST",
        )
        .with_content_type("application/grpc+proto")
        .with_method("GET"),
        odd(RANGE, ":status=415 grpc-status=3 grpc-message=invalid gRPC request content-type \"Application/GRPC\"")
            .with_content_type("Application/GRPC"),
        odd(RANGE, ":status=415 grpc-status=3 grpc-message=invalid gRPC request content-type \"application/grpcx\"")
            .with_content_type("application/grpcx"),
        odd(RANGE, ":status=415 grpc-status=3 grpc-message=invalid gRPC request content-type \"text/plain\"")
            .with_content_type("text/plain")
            .with_method("GET"),
    ]
}

/// A call names its host exactly once.
fn hosts() -> Vec<Odd> {
    const MISSING: &str = ":status=400 grpc-status=13 grpc-message=no host or :authority header present";
    const TWO: &str = ":status=400 grpc-status=13 grpc-message=num values of :authority: 0, num values of host: 2, both \
                       must only have 1 value as per HTTP/2 spec";
    vec![
        odd(RANGE, MISSING).without_authority(),
        odd(RANGE, ":status=400 grpc-status=13 grpc-message=no host or :authority header present reset 0")
            .without_authority()
            .without_end(),
        odd(RANGE, MISSING).without_authority().with_method("GET"),
        odd("/nope/Foo", MISSING).without_authority(),
        odd(
            RANGE,
            ":status=400 content-type=application/grpc+proto grpc-status=13 grpc-message=no host or :authority header \
             present",
        )
        .without_authority()
        .with_content_type("application/grpc+proto"),
        odd(RANGE, ":status=415 grpc-status=3 grpc-message=invalid gRPC request content-type \"text/plain\"")
            .without_authority()
            .with_content_type("text/plain"),
        odd(
            RANGE,
            ":status=400 grpc-status=13 grpc-message=malformed grpc-timeout: transport: timeout string is too short: \
             \"x\"",
        )
        .without_authority()
        .with_field("grpc-timeout", "x"),
        odd(RANGE, "grpc-status=0").without_authority().with_field("host", "y"),
        odd(RANGE, "grpc-status=0").without_authority().with_field("host", ""),
        odd(RANGE, "grpc-status=0").with_field("host", "y"),
        Odd { authority: Some(""), ..odd(RANGE, "grpc-status=0") },
        odd(RANGE, TWO).without_authority().with_field("host", "y").with_field("host", "z"),
        odd(RANGE, TWO).without_authority().with_content_type("text/plain").with_field("host", "y").with_field("host", "z"),
        odd(
            RANGE,
            ":status=400 grpc-status=13 grpc-message=num values of :authority: 1, num values of host: 2, both must only \
             have 1 value as per HTTP/2 spec",
        )
        .with_field("host", "y")
        .with_field("host", "z"),
    ]
}

/// Binary metadata, timeouts and compression.
fn fields() -> Vec<Odd> {
    const BASE64: &str = ":status=400 grpc-status=13 grpc-message=malformed binary metadata \"!!\" in header \"x-bin\": \
                          illegal base64 data at input byte 0";
    vec![
        odd(RANGE, "grpc-status=0").with_field("x-bin", "YQ==").with_field("y-bin", "YQ").with_field("z-bin", ""),
        odd(RANGE, BASE64).with_field("x-bin", "!!"),
        odd("/nope/Foo", BASE64).with_field("x-bin", "!!"),
        odd(RANGE, BASE64).with_field("grpc-timeout", "x").with_field("x-bin", "!!"),
        odd(
            RANGE,
            ":status=400 grpc-status=13 grpc-message=malformed binary metadata \"Zg=\" in header \"grpc-trace-bin\": \
             illegal base64 data at input byte 2",
        )
        .with_field("grpc-trace-bin", "Zg="),
        odd(
            RANGE,
            ":status=400 grpc-status=13 grpc-message=malformed grpc-timeout: transport: timeout unit is not recognized: \
             \"5s\"",
        )
        .with_field("x-bin", "!!")
        .with_field("grpc-timeout", "5s"),
        odd(
            RANGE,
            ":status=400 grpc-status=13 grpc-message=malformed grpc-timeout: transport: timeout string is too long: \
             \"123456789S\"",
        )
        .with_field("grpc-timeout", "123456789S"),
        odd(
            RANGE,
            ":status=400 grpc-status=13 grpc-message=malformed grpc-timeout: strconv.ParseUint: parsing \"-1\": invalid \
             syntax",
        )
        .with_field("grpc-timeout", "-1S"),
        odd(RANGE, "grpc-status=12 grpc-message=grpc: Decompressor is not installed for grpc-encoding \"foo\"")
            .with_field("grpc-encoding", "foo"),
        odd("/nope/Foo", "grpc-status=12 grpc-message=unknown service nope").with_field("grpc-encoding", "foo"),
    ]
}

/// No message, a part of one, or more than one.
fn messages() -> Vec<Odd> {
    const NONE: &str = "grpc-status=13 grpc-message=cardinality violation: received no request message from \
                        non-client-streaming RPC";
    const MANY: &str = "grpc-status=13 grpc-message=cardinality violation: received multiple request messages for \
                        non-client-streaming RPC";
    let (whole, empty) = (raw::framed(KEY), raw::framed(b""));
    let cut = &whole[..whole.len() - 1];
    vec![
        odd(RANGE, "grpc-status=2 grpc-message=EOF").with_body(&[]),
        odd(RANGE, "grpc-status=2 grpc-message=EOF").with_body(&[&[0, 0]]),
        odd(RANGE, "grpc-status=2 grpc-message=unexpected EOF").with_body(&[cut]),
        odd(RANGE, "grpc-status=0").with_body(&[&whole, &whole]),
        odd(RANGE, "grpc-status=0").with_body(&[&whole, cut]),
        odd("/v3lockpb.Lock/Lock", "grpc-status=2 grpc-message=EOF").with_body(&[]),
        odd("/v3lockpb.Lock/Lock", "grpc-status=2 grpc-message=unexpected EOF").with_body(&[cut]),
        odd("/v3lockpb.Lock/Unlock", "grpc-status=2 grpc-message=etcdserver: key is not provided")
            .with_body(&[&empty, &empty]),
        odd(STREAM, NONE).with_body(&[]),
        odd(STREAM, NONE).with_body(&[&[0, 0]]),
        odd(STREAM, MANY).with_body(&[&whole, &whole]),
        odd(STREAM, MANY).with_body(&[&empty, &empty]),
        odd(STREAM, "grpc-status=13 grpc-message=unexpected EOF").with_body(&[cut]),
        odd(STREAM, "grpc-status=13 grpc-message=unexpected EOF").with_body(&[&whole, cut]),
        odd("/etcdserverpb.Maintenance/Snapshot", NONE).with_body(&[]),
        odd("/v3electionpb.Election/Observe", NONE).with_body(&[]),
        odd("/v3electionpb.Election/Observe", MANY).with_body(&[&empty, &empty]),
        odd("/grpc.health.v1.Health/Watch", NONE).with_body(&[]),
        odd(WATCH, "grpc-status=13 grpc-message=unexpected EOF").with_body(&[cut]),
        odd("/etcdserverpb.Lease/LeaseKeepAlive", "grpc-status=13 grpc-message=unexpected EOF").with_body(&[cut]),
        odd("/etcdserverpb.Lease/LeaseKeepAlive", "grpc-status=0").with_body(&[&[0, 0]]),
    ]
}

/// Messages that cannot be decoded, for every service.
fn garbage() -> Vec<Odd> {
    const UNARY: &str =
        "grpc-status=13 grpc-message=grpc: error unmarshalling request: proto: cannot parse invalid wire-format data";
    const STREAMED: &str = "grpc-status=13 grpc-message=grpc: failed to unmarshal the received message: proto: cannot \
                            parse invalid wire-format data";
    let unary = [
        RANGE,
        "/etcdserverpb.KV/Put",
        "/etcdserverpb.KV/DeleteRange",
        "/etcdserverpb.KV/Txn",
        "/etcdserverpb.KV/Compact",
        "/etcdserverpb.Lease/LeaseGrant",
        "/etcdserverpb.Lease/LeaseRevoke",
        "/etcdserverpb.Lease/LeaseTimeToLive",
        "/etcdserverpb.Lease/LeaseLeases",
        "/etcdserverpb.Cluster/MemberAdd",
        "/etcdserverpb.Cluster/MemberRemove",
        "/etcdserverpb.Cluster/MemberUpdate",
        "/etcdserverpb.Cluster/MemberList",
        "/etcdserverpb.Cluster/MemberPromote",
        "/etcdserverpb.Maintenance/Alarm",
        "/etcdserverpb.Maintenance/Status",
        "/etcdserverpb.Maintenance/Defragment",
        "/etcdserverpb.Maintenance/Hash",
        "/etcdserverpb.Maintenance/HashKV",
        "/etcdserverpb.Maintenance/MoveLeader",
        "/etcdserverpb.Maintenance/Downgrade",
        "/etcdserverpb.Auth/AuthStatus",
        "/etcdserverpb.Auth/RoleGrantPermission",
        "/etcdserverpb.Auth/UserAdd",
        "/v3lockpb.Lock/Lock",
        "/v3lockpb.Lock/Unlock",
        "/v3electionpb.Election/Campaign",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
    ];
    let streamed = [
        STREAM,
        WATCH,
        "/etcdserverpb.Lease/LeaseKeepAlive",
        "/etcdserverpb.Maintenance/Snapshot",
        "/v3electionpb.Election/Observe",
        "/grpc.health.v1.Health/Watch",
    ];
    let unary = unary.into_iter().map(|path| odd(path, UNARY));
    let streamed = streamed.into_iter().map(|path| odd(path, STREAMED));
    let text = "grpc-status=13 grpc-message=grpc: error unmarshalling request: string field contains invalid UTF-8";
    let no_text = odd("/etcdserverpb.Auth/UserAdd", text).with_body(&[&raw::framed(b"\x0a\x01\xff")]);
    unary.chain(streamed).map(|odd| odd.with_body(&[&raw::framed(GARBAGE)])).chain([no_text]).collect()
}
