//! Connections to the port for members: how many there may be, and which of them have said what they are.
//!
//! Anything that reaches the port can connect, and then say nothing. So a connection has a short time to say what it is, few
//! from one address may be in that time at once, and of those the oldest gives way to a new one: a member says it at once,
//! and is never kept out by connections that are silent. What has said it stays, within bounds.
//!
//! ```text
//! accepted ─▶ Unknown ─┬─▶ Http                        per address
//!                      └─▶ Stream ─▶ Guest             the oldest of too many guests gives way
//! ```

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Of all addresses together. Each stream has a thread.
const MOST_CONNECTIONS: usize = 4096;
/// Streams of members that are not known here, at once.
pub(super) const MOST_GUESTS: usize = 8;

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// From one address.
    pub per_address: usize,
    /// From one address that have not said what they are.
    pub before_hello: usize,
    /// How long they may take to say it.
    pub hello_timeout: Duration,
}

/// What a connection has said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Nothing yet.
    Unknown,
    /// It speaks HTTP.
    Http,
    /// A member's messages or a snapshot.
    Stream,
    /// A stream of a member that is not known here.
    Guest,
}

/// All that are open, so that they can be ended.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    limits: ConnectionLimits,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order in which they were accepted.
    open: BTreeMap<u64, Connection>,
    next: u64,
    closed: bool,
}

#[derive(Debug)]
struct Connection {
    address: IpAddr,
    stage: Stage,
    socket: OwnedFd,
}

/// One that is open, until this is dropped.
#[derive(Debug)]
pub struct Admitted {
    connections: Connections,
    number: u64,
    address: IpAddr,
    accepted: Instant,
}

/// Why a connection is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("this member ends")]
    Closed,
    #[error("there are {MOST_CONNECTIONS} connections already")]
    All,
    #[error("there are {0} connections from this address already (--peer-connections-per-address)")]
    Address(usize),
}

impl Connections {
    pub fn new(limits: ConnectionLimits) -> Self {
        Self { limits, state: Arc::default() }
    }

    /// Notes that a connection was accepted; says whether another one had to give way to it.
    pub fn admit(&self, socket: &impl AsFd, address: IpAddr) -> io::Result<Result<(Admitted, bool), Refusal>> {
        let socket = socket.as_fd().try_clone_to_owned()?;
        let mut state = self.state.lock();
        if state.closed {
            return Ok(Err(Refusal::Closed));
        }
        let is_here = |connection: &Connection| connection.address == address;
        let is_unknown = |connection: &Connection| connection.stage == Stage::Unknown;
        let here = state.count(is_here);
        let mut has_evicted = false;
        if state.count(|it| is_here(it) && is_unknown(it)) >= self.limits.before_hello
            || here >= self.limits.per_address
        {
            has_evicted = state.evict(|it| is_here(it) && is_unknown(it));
            if !has_evicted {
                return Ok(Err(Refusal::Address(here)));
            }
        }
        if state.open.len() >= MOST_CONNECTIONS {
            has_evicted = state.evict(is_unknown);
            if !has_evicted {
                return Ok(Err(Refusal::All));
            }
        }
        let number = state.next;
        state.next += 1;
        state.open.insert(number, Connection { address, stage: Stage::Unknown, socket });
        let admitted = Admitted { connections: self.clone(), number, address, accepted: Instant::now() };
        Ok(Ok((admitted, has_evicted)))
    }

    /// Ends them all, and lets no more in.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.open.values().for_each(Connection::end);
    }

    pub fn limits(&self) -> ConnectionLimits {
        self.limits
    }
}

impl State {
    fn count(&self, fits: impl Fn(&Connection) -> bool) -> usize {
        self.open.values().filter(|connection| fits(connection)).count()
    }

    /// Ends the oldest of these; false if there is none.
    fn evict(&mut self, fits: impl Fn(&Connection) -> bool) -> bool {
        let oldest = self.open.iter().find(|(_, connection)| fits(connection)).map(|(number, _)| *number);
        let evicted = oldest.and_then(|number| self.open.remove(&number));
        evicted.iter().for_each(Connection::end);
        evicted.is_some()
    }
}

impl Connection {
    fn end(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both); // It may have ended already.
    }
}

impl Admitted {
    /// It has said what it is.
    pub fn set_stage(&self, stage: Stage) {
        if let Some(connection) = self.connections.state.lock().open.get_mut(&self.number) {
            connection.stage = stage;
        }
    }

    /// It is a stream of a member that is not known here; says whether another one had to give way to it.
    #[must_use]
    pub(super) fn set_guest(&self) -> bool {
        let is_guest = |connection: &Connection| connection.stage == Stage::Guest;
        let has_evicted = {
            let mut state = self.connections.state.lock();
            state.count(is_guest) >= MOST_GUESTS && state.evict(is_guest)
        };
        self.set_stage(Stage::Guest);
        has_evicted
    }

    /// Until when it has to say what it is.
    #[must_use]
    pub fn hello_deadline(&self) -> Instant {
        self.accepted + self.connections.limits.hello_timeout
    }

    /// Where it comes from.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Tells it from all others.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Ends it, from another thread.
    pub(super) fn ender(&self) -> impl Fn() + Send + use<> {
        let (connections, number) = (self.connections.clone(), self.number);
        move || {
            if let Some(connection) = connections.state.lock().open.get(&number) {
                connection.end();
            }
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.connections.state.lock().open.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V6(std::net::Ipv6Addr::LOCALHOST);

    fn connections(per_address: usize, before_hello: usize) -> Connections {
        Connections::new(ConnectionLimits { per_address, before_hello, hello_timeout: Duration::from_secs(5) })
    }

    /// Both ends of a connection.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        caller.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (caller, listener.accept().unwrap().0)
    }

    #[track_caller]
    fn admit(connections: &Connections, stream: &TcpStream, address: IpAddr) -> Result<(Admitted, bool), Refusal> {
        connections.admit(stream, address).unwrap()
    }

    #[test]
    fn the_oldest_silent_connection_gives_way_and_one_that_has_spoken_does_not() {
        let connections = connections(3, 2);
        let (mut silent, accepted) = pair();
        let spoken = admit(&connections, &accepted, HERE).unwrap();
        spoken.0.set_stage(Stage::Stream);
        assert!(!spoken.1, "there is room");
        let first = pair();
        let mut held = vec![admit(&connections, &first.1, HERE).unwrap()];
        held.push(admit(&connections, &pair().1, HERE).unwrap());
        assert!(held.iter().all(|(_, has_evicted)| !has_evicted));
        let (third, has_evicted) = admit(&connections, &pair().1, HERE).unwrap();
        assert!(has_evicted, "two are silent already");
        let mut ended = first.0;
        assert_eq!(ended.read(&mut [0]).unwrap(), 0, "the oldest of them is closed");
        drop(held.remove(0));
        third.set_stage(Stage::Http);
        held[0].0.set_stage(Stage::Http);
        let refused = admit(&connections, &pair().1, HERE).unwrap_err();
        assert_eq!(refused, Refusal::Address(3));
        admit(&connections, &pair().1, THERE).expect("another address has room of its own");
        silent.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(silent.read(&mut [0]).is_err(), "what has spoken is not disturbed");
        connections.close();
        silent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(silent.read(&mut [0]).unwrap(), 0);
        assert_eq!(admit(&connections, &pair().1, THERE).unwrap_err(), Refusal::Closed);
    }

    #[test]
    fn the_oldest_of_too_many_guests_gives_way() {
        let connections = connections(100, 100);
        let mut guests: Vec<_> = (0..MOST_GUESTS).map(|_| pair()).collect();
        let mut admitted: Vec<_> = guests.iter().map(|(_, it)| admit(&connections, it, HERE).unwrap().0).collect();
        assert!(admitted.iter().all(|it| !it.set_guest()));
        let last = pair();
        let newest = admit(&connections, &last.1, HERE).unwrap().0;
        assert!(newest.set_guest());
        assert_eq!(guests[0].0.read(&mut [0]).unwrap(), 0);
        drop(admitted.remove(0));
        assert_eq!(connections.state.lock().count(|it| it.stage == Stage::Guest), MOST_GUESTS);
    }
}
