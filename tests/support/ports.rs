//! Ports for servers that must know theirs beforehand.

use std::{
    net::TcpListener,
    sync::atomic::{AtomicU32, Ordering},
};

/// A port that was free a moment ago, and that nobody gets by chance before we use it again after a restart: it is not one of
/// those from which the system serves outgoing connections and port 0.
pub fn free_port() -> u16 {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 18_000;
    static DRAWN: AtomicU32 = AtomicU32::new(0);
    // Test programs that run at the same time begin at different places.
    let start = std::process::id().wrapping_mul(97);
    loop {
        let place = start.wrapping_add(DRAWN.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + place).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
