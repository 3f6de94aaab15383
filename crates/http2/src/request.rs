//! Requests, read from header blocks (RFC 9113 §8, and gRPC over HTTP/2).
//!
//! A block that consists of indexes only keeps its meaning until the dynamic table changes. Most calls of a connection repeat the
//! blocks of earlier calls, so the last few blocks are cached together with the requests that they decode to.

use std::{borrow::Cow, sync::Arc, time::Duration};

use bytes::Bytes;
use http::HeaderMap;

use super::{
    hpack::{decoder::Fields, table::ENTRY_OVERHEAD},
    limits::HTTP_HANDLER_BYTES,
    message::{self, Encoding},
    service::{Method, Service},
};
use crate::call::{CallError, Code, MAX_METADATA_FIELDS, Metadata};

/// A request without its body.
pub struct Request {
    pub target: Target,
    /// For the handler. The deadline is not set: it is computed when the call arrives.
    pub metadata: Metadata,
    /// How long the caller waits.
    pub timeout: Option<Duration>,
    /// The compression of the request's messages.
    pub encoding: Encoding,
    /// Whether responses are compressed: they are if the request is and the client accepts gzip.
    pub compresses_responses: bool,
    /// The content type of the response, if the client named a codec: `application/grpc+proto`.
    pub content_type: Option<Arc<[u8]>>,
    pub content_length: Option<u64>,
    /// How many bytes are kept for it while its stream is open.
    pub weight: usize,
}

/// What handles a request.
pub enum Target {
    /// A registered gRPC method.
    Method(Arc<dyn Method>),
    /// The HTTP service behind the method table.
    Http(Box<http::request::Parts>),
    /// Nothing: it is refused because of its headers.
    Refused(Refused),
}

/// Why a request is refused, and the response.
pub struct Refused {
    /// The `reason` label of the metric.
    pub reason: &'static str,
    pub status: u16,
    /// The status that a gRPC client receives.
    pub refusal: CallError,
}

impl Refused {
    /// A call whose deadline had already passed when it arrived.
    #[must_use]
    pub fn expired() -> Self {
        let message = Cow::Borrowed("context deadline exceeded");
        Self { reason: "late", status: 200, refusal: CallError { code: Code::DeadlineExceeded, message } }
    }
}

/// A block that is not a valid request: its stream is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// The relevant fields of a block, collected in one pass.
#[derive(Default)]
struct Parts<'a> {
    method: Option<&'a [u8]>,
    scheme: Option<&'a [u8]>,
    path: Option<&'a [u8]>,
    authority: Option<&'a [u8]>,
    /// The number of `host` fields.
    hosts: usize,
    content_type: Option<&'a [u8]>,
    encoding: Option<&'a [u8]>,
    accepted: Option<&'a [u8]>,
    timeout: Option<Duration>,
    /// What is wrong with a field, if the request is a gRPC call. The last error counts.
    bad_field: Option<String>,
    /// The names that the service has given, and the first values of these fields.
    metadata_names: &'static [&'static str],
    metadata: [Option<&'a [u8]>; MAX_METADATA_FIELDS],
    content_length: Option<u64>,
}

/// Reads the request from a decoded block.
pub fn read(fields: &Fields, service: &dyn Service) -> Result<Request, Malformed> {
    let parts = Parts::gather(fields, service.metadata_fields())?;
    let (Some(method), Some(path), Some(_)) = (parts.method, parts.path, parts.scheme) else {
        if fields.is_truncated() {
            return Ok(parts.too_long());
        }
        return Err(Malformed("request without :method, :scheme or :path"));
    };
    if path.is_empty() {
        return Err(Malformed("empty :path"));
    }
    if fields.is_truncated() {
        return Ok(parts.too_long());
    }
    let text = std::str::from_utf8(path).map_err(|_| Malformed("path is not valid UTF-8"))?;
    let found = service.find(text);
    if (found.is_some() || parts.is_grpc())
        && let Some(refused) = parts.refuse_call(method)
    {
        return Ok(refused);
    }
    match found {
        Some(found) => Ok(parts.call(found)),
        None => match Some(text).filter(|_| parts.is_grpc()).and_then(|text| service.refuse(text)) {
            Some(refusal) => Ok(parts.refused("path", 200, refusal.code, refusal.message)),
            None => parts.http_request(method, text, fields),
        },
    }
}

/// Checks the fields of a trailers block.
pub fn check_trailers(fields: &Fields) -> Result<(), Malformed> {
    for (name, value) in fields.iter() {
        if name.starts_with(b":") {
            return Err(Malformed("pseudo-header in trailers"));
        }
        check_field(name, value)?;
    }
    Ok(())
}

/// The trailers for an HTTP service, and their weight in bytes.
pub fn trailers(fields: &Fields) -> Result<(HeaderMap, usize), Malformed> {
    let mut trailers = HeaderMap::new();
    let weight = keep(fields, &mut trailers)?;
    Ok((trailers, weight))
}

/// Adds the regular (not pseudo) header fields to `into`; returns their weight in bytes.
fn keep(fields: &Fields, into: &mut HeaderMap) -> Result<usize, Malformed> {
    let mut weight = 0;
    for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with(b":")) {
        weight += name.len() + value.len() + ENTRY_OVERHEAD;
        let name = http::HeaderName::from_bytes(name).map_err(|_| Malformed("invalid header name"))?;
        let value = http::HeaderValue::from_bytes(value).map_err(|_| Malformed("invalid header value"))?;
        into.append(name, value);
    }
    Ok(weight)
}

fn check_field(name: &[u8], value: &[u8]) -> Result<(), Malformed> {
    let is_token = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'!' | b'#'..=b'\'' | b'*' | b'+' | b'^' | b'`' | b'|' | b'~');
    if name.is_empty() || !name.iter().all(is_token) {
        return Err(Malformed("invalid character in a header name"));
    }
    let is_edge = |byte: Option<&u8>| byte.is_some_and(|byte| matches!(byte, b' ' | b'\t'));
    if value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n')) || is_edge(value.first()) || is_edge(value.last()) {
        return Err(Malformed("invalid character in a header value"));
    }
    Ok(())
}

impl<'a> Parts<'a> {
    fn gather(fields: &'a Fields, metadata_names: &'static [&'static str]) -> Result<Self, Malformed> {
        let mut parts = Self { metadata_names, ..Self::default() };
        let mut is_past_pseudo = false;
        for (name, value) in fields.iter() {
            if let Some(name) = name.strip_prefix(b":") {
                if is_past_pseudo {
                    return Err(Malformed("pseudo-header after a regular header"));
                }
                parts.pseudo(name, value)?;
            } else {
                is_past_pseudo = true;
                check_field(name, value)?;
                parts.field(name, value)?;
            }
        }
        Ok(parts)
    }

    fn pseudo(&mut self, name: &[u8], value: &'a [u8]) -> Result<(), Malformed> {
        let place = match name {
            b"method" => &mut self.method,
            b"scheme" => &mut self.scheme,
            b"path" => &mut self.path,
            b"authority" => &mut self.authority,
            _ => return Err(Malformed("unknown pseudo-header")),
        };
        if place.replace(value).is_some() {
            return Err(Malformed("duplicate pseudo-header"));
        }
        Ok(())
    }

    fn field(&mut self, name: &[u8], value: &'a [u8]) -> Result<(), Malformed> {
        match name {
            b"content-type" => self.content_type = Some(value),
            b"te" if value != b"trailers" => return Err(Malformed("TE other than trailers")),
            b"connection" | b"proxy-connection" | b"keep-alive" | b"transfer-encoding" | b"upgrade" => {
                return Err(Malformed("connection-specific header"));
            }
            b"content-length" => {
                let length =
                    std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
                let length =
                    length.and_then(|text| text.parse().ok()).ok_or(Malformed("content-length is not a number"))?;
                if self.content_length.replace(length).is_some_and(|before| before != length) {
                    return Err(Malformed("conflicting content-length headers"));
                }
            }
            b"grpc-encoding" => self.encoding = Some(value),
            b"grpc-accept-encoding" => self.accepted = Some(value),
            b"grpc-timeout" => match message::timeout(value) {
                Ok(timeout) => self.timeout = Some(timeout),
                Err(fault) => self.bad_field = Some(format!("malformed grpc-timeout: {fault}")),
            },
            b"host" => self.hosts += 1,
            _ if let Some(nth) = self.metadata_names.iter().position(|known| known.as_bytes() == name) => {
                _ = self.metadata[nth].get_or_insert(value);
            }
            _ if name.ends_with(b"-bin") => {
                if let Err(place) = message::check_base64(value) {
                    self.bad_field = Some(format!(
                        "malformed binary metadata {:?} in header {:?}: illegal base64 data at input byte {place}",
                        excerpt(value),
                        excerpt(name)
                    ));
                }
            }
            _ => (),
        }
        Ok(())
    }

    fn is_grpc(&self) -> bool {
        self.content_type.and_then(codec).is_some()
    }

    /// Refuses a gRPC call because of its fields, whichever method it names. The order of the checks is grpc-go's.
    fn refuse_call(&self, method: &[u8]) -> Option<Request> {
        if self.hosts > 1 {
            let text = format!(
                "num values of :authority: {}, num values of host: {}, both must only have 1 value as per HTTP/2 spec",
                usize::from(self.authority.is_some()),
                self.hosts
            );
            return Some(self.refused("host", 400, Code::Internal, text));
        }
        if !self.is_grpc() {
            let content_type = self.content_type.unwrap_or_default();
            let text = format!("invalid gRPC request content-type {:?}", excerpt(content_type));
            return Some(self.refused("content_type", 415, Code::InvalidArgument, text));
        }
        if let Some(fault) = &self.bad_field {
            return Some(self.refused("field", 400, Code::Internal, fault.clone()));
        }
        if self.authority.is_none() && self.hosts == 0 {
            return Some(self.refused("host", 400, Code::Internal, "no host or :authority header present"));
        }
        if method != b"POST" {
            let text = format!("Received a HEADERS frame with :method {:?} which should be POST", excerpt(method));
            return Some(self.refused("method", 405, Code::Internal, text));
        }
        None
    }

    /// A call of a registered method.
    fn call(&self, found: Arc<dyn Method>) -> Request {
        let encoding = match self.encoding {
            None | Some(b"" | b"identity") => Encoding::Identity,
            Some(b"gzip") => Encoding::Gzip,
            Some(other) => {
                let text = format!("grpc: Decompressor is not installed for grpc-encoding {:?}", excerpt(other));
                return self.refused("encoding", 200, Code::Unimplemented, text);
            }
        };
        let compresses_responses = encoding == Encoding::Gzip && self.accepts_gzip();
        Request { encoding, compresses_responses, timeout: self.timeout, ..self.request(Target::Method(found)) }
    }

    fn accepts_gzip(&self) -> bool {
        let mut accepted = self.accepted.unwrap_or_default().split(|&byte| byte == b',');
        accepted.any(|encoding| encoding.trim_ascii() == b"gzip")
    }

    fn too_long(&self) -> Request {
        self.refused("header_list", 431, Code::ResourceExhausted, "header list too large")
    }

    fn refused(&self, reason: &'static str, status: u16, code: Code, message: impl Into<Cow<'static, str>>) -> Request {
        let refusal = CallError { code, message: message.into() };
        self.request(Target::Refused(Refused { reason, status, refusal }))
    }

    fn request(&self, target: Target) -> Request {
        let metadata =
            Metadata { fields: self.metadata.map(|value| value.map(Bytes::copy_from_slice)), ..Metadata::default() };
        let codec = self.content_type.and_then(codec).filter(|codec| !codec.is_empty());
        let content_type: Option<Arc<[u8]>> = codec.map(|codec| [GRPC, b"+", codec].concat().into());
        let weight = metadata.fields.iter().flatten().map(Bytes::len).sum::<usize>()
            + content_type.as_ref().map_or(0, |content_type| content_type.len());
        Request {
            target,
            metadata,
            timeout: None,
            encoding: Encoding::Identity,
            compresses_responses: false,
            content_type,
            content_length: self.content_length,
            weight,
        }
    }

    /// A request for the HTTP service.
    fn http_request(&self, method: &[u8], path: &str, fields: &Fields) -> Result<Request, Malformed> {
        const NO_URI: Malformed = Malformed("invalid request URI");
        let mut uri = http::Uri::builder().path_and_query(path);
        if let (Some(authority), Some(scheme)) = (self.authority, self.scheme) {
            uri = uri.authority(authority).scheme(scheme);
        }
        let (mut parts, ()) = http::Request::new(()).into_parts();
        parts.uri = uri.build().map_err(|_| NO_URI)?;
        parts.method = http::Method::from_bytes(method).map_err(|_| Malformed("invalid :method"))?;
        parts.version = http::Version::HTTP_2;
        let weight = HTTP_HANDLER_BYTES + keep(fields, &mut parts.headers)?;
        let timeout = self.timeout.filter(|_| self.is_grpc());
        let request = self.request(Target::Http(Box::new(parts)));
        Ok(Request { timeout, weight: request.weight + weight, ..request })
    }
}

/// Client input as quoted in an error message: only a prefix, long enough to recognise it.
fn excerpt(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(&bytes[..bytes.len().min(64)])
}

/// The content type of gRPC calls and responses that name no codec.
pub const GRPC: &[u8] = b"application/grpc";

/// The codec in the content type of a gRPC call, usually empty; `None` if the content type is not gRPC's. As in grpc-go, the
/// comparison is case-sensitive, and what follows a semicolon counts as a codec.
#[must_use]
pub fn codec(content_type: &[u8]) -> Option<&[u8]> {
    match content_type.strip_prefix(GRPC)? {
        [] => Some(&[]),
        [b'+' | b';', codec @ ..] => Some(codec),
        _ => None,
    }
}

/// A cache of the last few blocks and the requests that they decode to.
#[derive(Default)]
pub struct BlockCache {
    known: [Option<(Bytes, Arc<Request>)>; 4],
    next: usize,
    /// The change counter of the dynamic table when the entries were made.
    table_changes: u64,
}

impl BlockCache {
    /// The request that a block decodes to, if the block is cached and the table has not changed.
    #[must_use]
    pub fn get(&self, block: &[u8], table_changes: u64) -> Option<&Arc<Request>> {
        if table_changes != self.table_changes {
            return None;
        }
        self.known.iter().flatten().find(|(known, _)| known == block).map(|(_, request)| request)
    }

    /// Caches a block of indexes.
    pub fn insert(&mut self, block: &[u8], request: &Arc<Request>, table_changes: u64) {
        if table_changes != self.table_changes {
            *self = Self { table_changes, ..Self::default() };
        }
        self.known[self.next] = Some((Bytes::copy_from_slice(block), request.clone()));
        self.next = (self.next + 1) % self.known.len();
    }
}
