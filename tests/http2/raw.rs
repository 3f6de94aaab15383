//! A client that writes frames by hand, over TCP.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const ENHANCE_YOUR_CALM: u32 = 11;
pub const INITIAL_WINDOW: u16 = 4;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long an answer may take.
fn read_timeout() -> Duration {
    test_support::scaled(Duration::from_secs(30))
}

pub struct Raw {
    stream: TcpStream,
    input: Vec<u8>,
    /// Bytes of data received since the last call of [`Raw::needs_window_update`].
    received: usize,
}

/// A received frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut out = vec![length[1], length[2], length[3], kind, flags];
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

pub fn setting(setting: u16, value: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&setting.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

/// A header block for a call, without any table entries.
pub fn block(path: &str) -> Vec<u8> {
    let mut out = vec![0x83, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    out.extend_from_slice(path.as_bytes());
    out.extend_from_slice(b"\x01\x04here"); // The authority.
    out.extend_from_slice(b"\x0f\x10\x10application/grpc");
    out
}

pub fn call(stream: u32, path: &str, message: &[u8]) -> Vec<u8> {
    let mut out = frame(HEADERS, END_HEADERS, stream, &block(path));
    out.extend(frame(DATA, END_STREAM, stream, &framed(message)));
    out
}

/// A message with its prefix.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0][..], &length, message].concat()
}

impl Raw {
    /// Connects without sending anything.
    pub fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(read_timeout())).unwrap();
        stream.set_write_timeout(Some(read_timeout())).unwrap();
        Self { stream, input: Vec::new(), received: 0 }
    }

    /// Connects and sends the client preface.
    pub fn handshake(address: &str) -> Self {
        let mut raw = Self::connect(address);
        raw.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
        raw
    }

    /// A second handle of the same connection, for writing.
    pub fn clone_handle(&self) -> Self {
        Self { stream: self.stream.try_clone().unwrap(), input: Vec::new(), received: 0 }
    }

    /// Whether so much data has arrived that the window should be opened.
    pub fn needs_window_update(&mut self) -> bool {
        self.received > 20_000 && std::mem::take(&mut self.received) > 0
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends byte by byte, with a pause after each, until the server sends something.
    pub fn send_slowly(&mut self, bytes: &[u8]) {
        self.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        for byte in bytes {
            if self.send(&[*byte]).is_err() || self.stream.peek(&mut [0]).is_ok() {
                break;
            }
        }
        self.stream.set_read_timeout(Some(read_timeout())).unwrap();
    }

    /// The next frame; None when the server has closed the connection.
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(head) = self.input.first_chunk::<9>() {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                if self.input.len() >= 9 + length {
                    let (kind, flags) = (head[3], head[4]);
                    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                    let payload = self.input[9..9 + length].to_vec();
                    self.input.drain(..9 + length);
                    self.received += if kind == DATA { length } else { 0 };
                    return Some(Frame { kind, flags, stream, payload });
                }
            }
            let mut buffer = [0; 8192];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no frame arrives: {error}"),
            }
        }
    }

    /// Lets the server take longer than other tests would wait: this client adds to a flood, and has no claim to be served soon.
    pub fn wait_patiently(&self) {
        self.stream.set_read_timeout(Some(10 * read_timeout())).unwrap();
    }

    /// The next frame of this kind; None when the server has closed the connection.
    pub fn wait_for(&mut self, kind: u8) -> Option<Frame> {
        loop {
            let frame = self.next()?;
            if frame.kind == kind {
                return Some(frame);
            }
        }
    }

    /// Sends frames until the server closes the connection, and returns the error code of its GOAWAY.
    pub fn flood(mut self, mut next: impl FnMut(u32) -> Vec<u8>) -> u32 {
        let mut reader = self.clone_handle();
        let goaway = std::thread::spawn(move || {
            let goaway = reader.wait_for(GOAWAY);
            let _ = reader.stream.shutdown(Shutdown::Both);
            goaway
        });
        let mut nth = 0;
        while !goaway.is_finished() && self.send(&next(nth)).is_ok() {
            nth += 1;
        }
        let goaway = goaway.join().unwrap().expect("GOAWAY before the end");
        u32::from_be_bytes(goaway.payload[4..8].try_into().unwrap())
    }
}
