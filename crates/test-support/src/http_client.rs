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
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    HttpResponse { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

/// An HTTP/1.1 response.
#[derive(Debug)]
pub struct HttpResponse {
    pub status: u16,
    /// The status line and headers, in lower case.
    pub head: String,
    pub body: String,
}

impl HttpResponse {
    /// The value of a metric without labels; zero if it is missing.
    pub fn metric(&self, metric: &str) -> f64 {
        let line = self.body.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}
