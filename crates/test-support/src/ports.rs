//! Ports for servers that must know their port before they start.

use std::{
    net::TcpListener,
    sync::atomic::{AtomicU32, Ordering},
};

/// A port that was free when it was checked. It lies outside the ephemeral range, from which the system serves outgoing
/// connections and port 0, so that it is very likely still free after a restart.
pub fn free_port() -> u16 {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 18_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Test programs that run at the same time start at different ports.
    let start = std::process::id().wrapping_mul(97);
    let next = || {
        let offset = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        u16::try_from(FIRST + offset).unwrap()
    };
    let mut ports = (0..COUNT).map(|_| next());
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("some port is free")
}
