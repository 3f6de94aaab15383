//! HTTP/1.1, one request a connection.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::wait::time_limit;

/// Sends one HTTP/1.1 request on a connection of its own. Each header in `headers` ends in `\r\n`.
pub fn http(address: &str, method: &str, path: &str, headers: &str, body: &[u8]) -> HttpResponse {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(time_limit())).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = &answer[end + 4..];
    let body = if head.contains("\r\ntransfer-encoding: chunked") { joined_chunks(body) } else { body.to_vec() };
    HttpResponse { status, head, body: String::from_utf8_lossy(&body).into_owned() }
}

/// The body that was sent in chunks: each after its length, and an empty one at the end.
fn joined_chunks(mut chunks: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = chunks.windows(2).position(|bytes| bytes == b"\r\n").unwrap();
        let length = usize::from_str_radix(std::str::from_utf8(&chunks[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            return body;
        }
        body.extend_from_slice(&chunks[end + 2..end + 2 + length]);
        chunks = &chunks[end + 2 + length + 2..];
    }
}

/// An HTTP/1.1 response.
#[derive(Debug)]
pub struct HttpResponse {
    pub status: u16,
    /// The status line and headers, in lower case.
    pub head: String,
    /// Without the sizes of the chunks in which it may have been sent.
    pub body: String,
}

impl HttpResponse {
    /// The value of a metric without labels; zero if it is missing.
    pub fn metric(&self, metric: &str) -> f64 {
        let line = self.body.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}
