//! Limits for incoming connections at the peer port.
//!
//! Anything that can reach the port can connect and then send nothing. So a connection must identify itself within a short time,
//! the number of unidentified connections per address is limited, and at the limit the oldest of them is closed in favour of a
//! new one: a member identifies itself at once, so silent connections cannot keep it out. Identified connections stay open, up
//! to further limits.
//!
//! ```text
//! accepted ─▶ Unidentified ─┬─▶ Http                      limited per address
//!                           └─▶ Member, or UnknownMember  above the limit for unknown members the oldest is closed
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

/// The limit for all addresses together. Each stream has a thread.
const MAX_CONNECTIONS: usize = 4096;
/// The limit for streams of members that are not in this member's member list.
pub(super) const MAX_UNKNOWN_STREAMS: usize = 8;

/// Limits for incoming connections.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// The limit for connections from one address.
    pub per_address: usize,
    /// The limit for unidentified connections from one address.
    pub before_hello: usize,
    /// How long a connection may stay unidentified.
    pub hello_timeout: Duration,
}

/// What a connection has been identified as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionKind {
    /// Not identified yet.
    Unidentified,
    Http,
    /// A stream of messages, or a snapshot, from a member.
    Member,
    /// A stream of messages from a member that is not in this member's member list.
    UnknownMember,
}

/// All open connections, so that they can be closed.
#[derive(Debug, Clone)]
pub(super) struct AcceptedConnections {
    limits: ConnectionLimits,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order in which they were accepted.
    open: BTreeMap<u64, AcceptedConnection>,
    next: u64,
    closed: bool,
}

#[derive(Debug)]
struct AcceptedConnection {
    address: IpAddr,
    kind: ConnectionKind,
    socket: OwnedFd,
}

/// An open connection, which is counted until this is dropped.
#[derive(Debug)]
pub struct AdmittedConnection {
    connections: AcceptedConnections,
    number: u64,
    address: IpAddr,
    accepted: Instant,
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("this member is shutting down")]
    Closed,
    #[error("there are {MAX_CONNECTIONS} connections already, the maximum")]
    All,
    #[error("there are {0} connections from this address already (--peer-connections-per-address)")]
    Address(usize),
}

impl AcceptedConnections {
    pub fn new(limits: ConnectionLimits) -> Self {
        Self { limits, state: Arc::default() }
    }

    /// Registers a connection that was accepted; returns whether another one was closed in favour of it.
    pub fn admit(
        &self,
        socket: &impl AsFd,
        address: IpAddr,
    ) -> io::Result<Result<(AdmittedConnection, bool), Refusal>> {
        let socket = socket.as_fd().try_clone_to_owned()?;
        let mut state = self.state.lock();
        if state.closed {
            return Ok(Err(Refusal::Closed));
        }
        let is_here = |connection: &AcceptedConnection| connection.address == address;
        let is_unidentified = |connection: &AcceptedConnection| connection.kind == ConnectionKind::Unidentified;
        let here = state.count(is_here);
        let mut has_evicted = false;
        if state.count(|it| is_here(it) && is_unidentified(it)) >= self.limits.before_hello
            || here >= self.limits.per_address
        {
            has_evicted = state.evict(|it| is_here(it) && is_unidentified(it));
            if !has_evicted {
                return Ok(Err(Refusal::Address(here)));
            }
        }
        if state.open.len() >= MAX_CONNECTIONS {
            has_evicted = state.evict(is_unidentified);
            if !has_evicted {
                return Ok(Err(Refusal::All));
            }
        }
        let number = state.next;
        state.next += 1;
        state.open.insert(number, AcceptedConnection { address, kind: ConnectionKind::Unidentified, socket });
        let admitted = AdmittedConnection { connections: self.clone(), number, address, accepted: Instant::now() };
        Ok(Ok((admitted, has_evicted)))
    }

    /// Closes all connections, and refuses new ones.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.open.values().for_each(AcceptedConnection::close);
    }

    pub fn limits(&self) -> ConnectionLimits {
        self.limits
    }
}

impl State {
    fn count(&self, fits: impl Fn(&AcceptedConnection) -> bool) -> usize {
        self.open.values().filter(|connection| fits(connection)).count()
    }

    /// Closes the oldest connection that fits; false if there is none.
    fn evict(&mut self, fits: impl Fn(&AcceptedConnection) -> bool) -> bool {
        let oldest = self.open.iter().find(|(_, connection)| fits(connection)).map(|(number, _)| *number);
        let evicted = oldest.and_then(|number| self.open.remove(&number));
        evicted.iter().for_each(AcceptedConnection::close);
        evicted.is_some()
    }
}

impl AcceptedConnection {
    fn close(&self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both); // It may be closed already.
    }
}

impl AdmittedConnection {
    /// Notes what the connection was identified as.
    pub fn set_kind(&self, kind: ConnectionKind) {
        if let Some(connection) = self.connections.state.lock().open.get_mut(&self.number) {
            connection.kind = kind;
        }
    }

    /// Identifies the connection as that of an unknown member; returns whether another one was closed in favour of it.
    #[must_use]
    pub(super) fn set_unknown(&self) -> bool {
        let is_unknown = |connection: &AcceptedConnection| connection.kind == ConnectionKind::UnknownMember;
        let has_evicted = {
            let mut state = self.connections.state.lock();
            state.count(is_unknown) >= MAX_UNKNOWN_STREAMS && state.evict(is_unknown)
        };
        self.set_kind(ConnectionKind::UnknownMember);
        has_evicted
    }

    /// When the connection must have identified itself.
    #[must_use]
    pub fn hello_deadline(&self) -> Instant {
        self.accepted + self.connections.limits.hello_timeout
    }

    /// The remote address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// A number that identifies the connection.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// A function that closes the connection, for use by another thread.
    pub(super) fn closer(&self) -> impl Fn() + Send + use<> {
        let (connections, number) = (self.connections.clone(), self.number);
        move || {
            if let Some(connection) = connections.state.lock().open.get(&number) {
                connection.close();
            }
        }
    }
}

impl Drop for AdmittedConnection {
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

    fn connections(per_address: usize, before_hello: usize) -> AcceptedConnections {
        AcceptedConnections::new(ConnectionLimits { per_address, before_hello, hello_timeout: Duration::from_secs(5) })
    }

    /// Both ends of a connection.
    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        caller.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        (caller, listener.accept().unwrap().0)
    }

    #[track_caller]
    fn admit(
        connections: &AcceptedConnections,
        stream: &TcpStream,
        address: IpAddr,
    ) -> Result<(AdmittedConnection, bool), Refusal> {
        connections.admit(stream, address).unwrap()
    }

    #[test]
    fn the_oldest_unidentified_connection_is_closed_at_the_limit_and_an_identified_one_is_not() {
        let connections = connections(3, 2);
        let (mut member, accepted) = pair();
        let identified = admit(&connections, &accepted, HERE).unwrap();
        identified.0.set_kind(ConnectionKind::Member);
        assert!(!identified.1, "the limit is not reached");
        let first = pair();
        let mut held = vec![admit(&connections, &first.1, HERE).unwrap()];
        held.push(admit(&connections, &pair().1, HERE).unwrap());
        assert!(held.iter().all(|(_, has_evicted)| !has_evicted));
        let (third, has_evicted) = admit(&connections, &pair().1, HERE).unwrap();
        assert!(has_evicted, "two are unidentified already");
        let mut ended = first.0;
        assert_eq!(ended.read(&mut [0]).unwrap(), 0, "the oldest of them is closed");
        drop(held.remove(0));
        third.set_kind(ConnectionKind::Http);
        held[0].0.set_kind(ConnectionKind::Http);
        let refused = admit(&connections, &pair().1, HERE).unwrap_err();
        assert_eq!(refused, Refusal::Address(3));
        admit(&connections, &pair().1, THERE).expect("each address has a limit of its own");
        member.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert!(member.read(&mut [0]).is_err(), "the identified connection stays open");
        connections.close();
        member.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(member.read(&mut [0]).unwrap(), 0);
        assert_eq!(admit(&connections, &pair().1, THERE).unwrap_err(), Refusal::Closed);
    }

    #[test]
    fn the_oldest_of_too_many_streams_of_unknown_members_is_closed() {
        let connections = connections(100, 100);
        let mut streams: Vec<_> = (0..MAX_UNKNOWN_STREAMS).map(|_| pair()).collect();
        let mut admitted: Vec<_> = streams.iter().map(|(_, it)| admit(&connections, it, HERE).unwrap().0).collect();
        assert!(admitted.iter().all(|it| !it.set_unknown()));
        let last = pair();
        let newest = admit(&connections, &last.1, HERE).unwrap().0;
        assert!(newest.set_unknown());
        assert_eq!(streams[0].0.read(&mut [0]).unwrap(), 0);
        drop(admitted.remove(0));
        assert_eq!(connections.state.lock().count(|it| it.kind == ConnectionKind::UnknownMember), MAX_UNKNOWN_STREAMS);
    }
}
