//! The limit of client connections.

use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::StartError;
use http2::limits;

/// File descriptors that client connections leave free: for the database, the log, and connections to other members.
const RESERVED_FILES: u64 = 700;
/// As in etcd, the server does not start with a limit that is not above this.
const MIN_FILES: u64 = 150;

/// The limit of client connections.
#[derive(Clone)]
pub struct ConnectionLimit {
    permits: Arc<Semaphore>,
    limit: usize,
}

impl ConnectionLimit {
    /// The configured limit, but no more than the limit of open files leaves, which is raised to the hard limit.
    pub fn new(configured: Option<usize>) -> Result<Self, StartError> {
        let files = raise_file_limit();
        if files <= MIN_FILES {
            let text = "file descriptor limit of the process is too low; please set higher";
            return Err(StartError::Refused(format!("{text} (limit {files}, more than {MIN_FILES} are needed)")));
        }
        let left = files - RESERVED_FILES.min(files / 2);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let limit = configured.unwrap_or(left).min(left).min(Semaphore::MAX_PERMITS);
        Ok(Self { permits: Arc::new(Semaphore::new(limit)), limit })
    }

    /// Waits for a permit for one more connection. It is released when the permit is dropped.
    pub async fn acquire(&self) -> OwnedSemaphorePermit {
        if self.permits.available_permits() == 0 {
            limits::count_refusal("connections");
            tracing::warn!(limit = self.limit, "too many client connections; new ones wait until others end");
        }
        self.permits.clone().acquire_owned().await.expect("the semaphore is never closed")
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
        let limit = ConnectionLimit::new(Some(1)).unwrap();
        let first = limit.acquire().await;
        let mut second = Box::pin(limit.acquire());
        let waker = std::task::Waker::noop();
        assert!(second.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
        drop(first);
        drop(second.await);
    }
}
