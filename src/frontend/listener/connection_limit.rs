//! The limits of client connections: of all together, beyond which new ones wait, and of those from one address, beyond which
//! they are closed. (If they waited, those of other addresses would wait behind them.)

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::StartError;
use http2::limits;

/// File descriptors that client connections leave free: for the database, the log, and connections to other members.
const RESERVED_FILES: u64 = 700;
/// As in etcd, the server does not start with a limit that is not above this.
const MIN_FILES: u64 = 150;
/// How often it is logged at most that an address has too many connections.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// The limits of client connections.
#[derive(Clone)]
pub struct ConnectionLimit {
    permits: Arc<Semaphore>,
    limit: usize,
    addresses: Option<Arc<Addresses>>,
}

/// A connection that is counted until this is dropped.
pub struct ConnectionPermit {
    _of_all: OwnedSemaphorePermit,
    _of_address: Option<AddressPermit>,
}

impl ConnectionLimit {
    /// The configured limit, but no more than the limit of open files leaves, which is raised to the hard limit; and the limit for
    /// each address, if there is one.
    pub fn new(configured: Option<usize>, per_address: Option<usize>) -> Result<Self, StartError> {
        let files = raise_file_limit();
        if files <= MIN_FILES {
            let text = "file descriptor limit of the process is too low; please set higher";
            return Err(StartError::Refused(format!("{text} (limit {files}, more than {MIN_FILES} are needed)")));
        }
        let left = files - RESERVED_FILES.min(files / 2);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let limit = configured.unwrap_or(left).min(left).min(Semaphore::MAX_PERMITS);
        let addresses = per_address.map(|limit| Arc::new(Addresses { limit, state: Mutex::default() }));
        Ok(Self { permits: Arc::new(Semaphore::new(limit)), limit, addresses })
    }

    /// Waits for a permit for one more connection, from an address if the client has one. None: the address has too many
    /// connections already.
    pub async fn acquire(&self, client: Option<IpAddr>) -> Option<ConnectionPermit> {
        let of_address = match (&self.addresses, client) {
            (Some(addresses), Some(client)) => Some(addresses.admit(client)?),
            _ => None, // There is no such limit, or the client uses a socket file.
        };
        if self.permits.available_permits() == 0 {
            limits::count_refusal("connections");
            tracing::warn!(limit = self.limit, "too many client connections; new ones wait until others end");
        }
        let of_all = self.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        Some(ConnectionPermit { _of_all: of_all, _of_address: of_address })
    }
}

/// How many connections each address has.
struct Addresses {
    limit: usize,
    state: Mutex<AddressCounts>,
}

#[derive(Default)]
struct AddressCounts {
    /// No address has the count 0.
    connections: HashMap<IpAddr, usize>,
    logged: Option<Instant>,
}

/// A connection that is counted for its address until this is dropped.
struct AddressPermit {
    addresses: Arc<Addresses>,
    address: IpAddr,
}

impl Addresses {
    fn admit(self: &Arc<Self>, client: IpAddr) -> Option<AddressPermit> {
        let address = counted_address(client);
        let mut state = self.state.lock();
        let connections = state.connections.entry(address).or_default();
        if *connections < self.limit {
            *connections += 1;
            return Some(AddressPermit { addresses: self.clone(), address });
        }
        limits::count_refusal("connections_per_address");
        if state.logged.is_none_or(|logged| logged.elapsed() >= LOG_INTERVAL) {
            state.logged = Some(Instant::now());
            let limit = self.limit;
            tracing::warn!(
                %client,
                limit,
                "too many connections from one address; more are closed (--max-connections-per-address)"
            );
        }
        None
    }
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        let mut state = self.addresses.state.lock();
        if let Some(connections) = state.connections.get_mut(&self.address) {
            *connections -= 1;
            if *connections == 0 {
                state.connections.remove(&self.address);
            }
        }
    }
}

/// The address that a client is counted by. One machine may use all IPv6 addresses whose first half is the same.
fn counted_address(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_beyond_the_limit_waits() {
        let limit = ConnectionLimit::new(Some(1), None).unwrap();
        let first = limit.acquire(None).await.unwrap();
        let mut second = Box::pin(limit.acquire(None));
        let waker = std::task::Waker::noop();
        assert!(second.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
        drop(first);
        assert!(second.await.is_some());
    }

    #[tokio::test]
    async fn a_connection_beyond_the_limit_of_its_address_is_refused() {
        let limit = ConnectionLimit::new(None, Some(2)).unwrap();
        let [first, second] = ["192.0.2.1", "192.0.2.2"].map(|address| Some(address.parse().unwrap()));
        let kept = (limit.acquire(first).await.unwrap(), limit.acquire(first).await.unwrap());
        assert!(limit.acquire(first).await.is_none());
        let other = limit.acquire(second).await;
        assert!(other.is_some() && limit.acquire(None).await.is_some(), "others are not concerned");
        drop(kept.0);
        assert!(limit.acquire(first).await.is_some());
        drop((kept.1, other));
        let addresses = limit.addresses.unwrap();
        assert!(addresses.state.lock().connections.is_empty(), "an address without connections is forgotten");
    }

    #[test]
    fn ipv6_addresses_count_by_their_first_half() {
        let counted = |address: &str| counted_address(address.parse().unwrap()).to_string();
        assert_eq!(counted("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(counted("2001:db8:1:2:7:8:9:a"), "2001:db8:1:2::");
        assert_eq!(counted("192.0.2.1"), "192.0.2.1");
        assert_eq!(counted("::ffff:192.0.2.1"), "192.0.2.1", "an IPv4 client of a port that serves both");
    }
}
