//! HTTP/1.1 by hand: whole answers, and answers that are read line by line while the request is still being sent.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use crate::support::time_limit;

/// A whole answer, of which some headers are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    /// `Grpc-Metadata-Content-Type`.
    pub metadata: String,
    /// `WWW-Authenticate`.
    pub authenticate: String,
    pub location: String,
    pub body: String,
}

/// Headers of a request, by name.
pub type Headers<'a> = &'a [(&'a str, &'a str)];

/// Posts a body and reads the whole answer.
pub fn post(address: &str, path: &str, headers: Headers<'_>, body: &[u8]) -> Answer {
    request(address, "POST", path, headers, body)
}

/// Sends a request and reads the whole answer.
pub fn request(address: &str, method: &str, path: &str, headers: Headers<'_>, body: &[u8]) -> Answer {
    let length = body.len().to_string();
    let headers = [headers, &[("Content-Length", length.as_str()), ("Connection", "close")]].concat();
    let mut exchange = Exchange::begin(address, method, path, &headers);
    // A server may refuse a body before it has read all of it.
    let _ = exchange.stream.write_all(body);
    exchange.read_head();
    let mut body = String::new();
    if method != "HEAD" {
        while let Some(piece) = exchange.read_piece() {
            body.push_str(&piece);
        }
    }
    Answer { body, ..exchange.head.clone() }
}

/// A request whose body is sent, and whose answer is read, piece by piece.
pub struct Exchange {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    pub head: Answer,
    /// How the end of the body is recognised: None if it is chunked.
    left: Option<usize>,
    /// What has been read of the body and is no whole line yet.
    line: String,
}

impl Exchange {
    /// Sends the head of a request.
    pub fn begin(address: &str, method: &str, path: &str, headers: Headers<'_>) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(time_limit())).unwrap();
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n");
        for (name, value) in headers {
            request.extend([*name, ": ", *value, "\r\n"]);
        }
        write!(stream, "{request}\r\n").unwrap();
        let head = Answer {
            status: 0,
            content_type: String::new(),
            metadata: String::new(),
            authenticate: String::new(),
            location: String::new(),
            body: String::new(),
        };
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader, head, left: Some(0), line: String::new() }
    }

    /// Posts a body whose end is sent later, or never.
    pub fn post_chunked(address: &str, path: &str) -> Self {
        Self::begin(address, "POST", path, &[("Transfer-Encoding", "chunked")])
    }

    /// Posts a whole body.
    pub fn post(address: &str, path: &str, headers: Headers<'_>, body: &str) -> Self {
        let length = body.len().to_string();
        let mut exchange =
            Self::begin(address, "POST", path, &[headers, &[("Content-Length", length.as_str())]].concat());
        exchange.stream.write_all(body.as_bytes()).unwrap();
        exchange
    }

    /// Sends a piece of the body; an empty one is its end.
    pub fn send_chunk(&mut self, piece: &str) {
        write!(self.stream, "{:x}\r\n{piece}\r\n", piece.len()).unwrap();
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn read_line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end_matches(['\r', '\n']).to_owned()
    }

    pub fn read_head(&mut self) {
        let status = self.read_line();
        self.head.status = status.split(' ').nth(1).unwrap_or_else(|| panic!("no status: {status:?}")).parse().unwrap();
        loop {
            let line = self.read_line();
            let Some((name, value)) = line.split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-type" => value.clone_into(&mut self.head.content_type),
                "grpc-metadata-content-type" => value.clone_into(&mut self.head.metadata),
                "www-authenticate" => value.clone_into(&mut self.head.authenticate),
                "location" => value.clone_into(&mut self.head.location),
                "content-length" => self.left = Some(value.parse().unwrap()),
                "transfer-encoding" => self.left = None,
                _ => (),
            }
        }
    }

    /// The next piece of the body; None at its end.
    fn read_piece(&mut self) -> Option<String> {
        let length = match self.left {
            Some(0) => return None,
            Some(left) => left,
            None => usize::from_str_radix(&self.read_line(), 16).unwrap(),
        };
        let mut piece = vec![0; length];
        self.reader.read_exact(&mut piece).unwrap();
        if self.left.is_none() {
            self.read_line();
        }
        if self.left.is_some() || length == 0 {
            self.left = Some(0);
        }
        (length > 0).then(|| String::from_utf8(piece).unwrap())
    }

    /// The next line of the answer; None at its end. The head is read first.
    pub fn next_line(&mut self) -> Option<String> {
        if self.head.status == 0 {
            self.read_head();
        }
        loop {
            if let Some((line, rest)) = self.line.split_once('\n') {
                let (line, rest) = (line.to_owned(), rest.to_owned());
                self.line = rest;
                return Some(line);
            }
            let piece = self.read_piece()?;
            self.line.push_str(&piece);
        }
    }

    /// Whether nothing arrives for so long.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let silent = self.reader.fill_buf().is_err();
        self.stream.set_read_timeout(Some(time_limit())).unwrap();
        silent
    }
}
