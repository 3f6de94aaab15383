//! The streams that come in, while they are served.

use std::{
    collections::BTreeMap,
    net::{Shutdown, TcpStream},
    sync::Arc,
};

use parking_lot::Mutex;

/// More streams than this at a time are no cluster's. Each has a thread.
pub(super) const MOST_STREAMS: usize = 1024;

/// All of them, so that they can be ended.
#[derive(Debug, Default, Clone)]
pub(super) struct Streams(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    served: BTreeMap<u64, TcpStream>,
    next: u64,
    closed: bool,
}

/// One that is being served, until this is dropped.
pub(super) struct Served {
    streams: Streams,
    number: u64,
}

impl Streams {
    /// Notes that a stream is served from now on; None if there are too many, or will be none any more.
    pub fn enter(&self, stream: &TcpStream) -> Option<Served> {
        let mut state = self.0.lock();
        if state.closed || state.served.len() >= MOST_STREAMS {
            return None;
        }
        let handle = stream.try_clone().ok()?;
        let number = state.next;
        state.next += 1;
        state.served.insert(number, handle);
        Some(Served { streams: self.clone(), number })
    }

    /// Ends them all, and lets no more in.
    pub fn close(&self) {
        let mut state = self.0.lock();
        state.closed = true;
        for stream in state.served.values() {
            let _ = stream.shutdown(Shutdown::Both); // It may have ended already.
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.streams.0.lock().served.remove(&self.number);
    }
}
