//! The registry of open connections, through which all of them are shut down. Their number is limited where they are accepted.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    limits::{Limits, Shared},
    outbox::Outbox,
};
use crate::{call::ConnectionInfo, ledger::Ledger, metrics};

/// The open connections.
pub struct ConnectionRegistry {
    shared: Arc<Shared>,
    open: Mutex<Connections>,
    next: AtomicU64,
    emptied: Notify,
}

#[derive(Default)]
struct Connections {
    outboxes: HashMap<u64, Arc<Outbox>>,
    is_shutting_down: bool,
}

/// The registration of one connection, which ends when this is dropped.
pub struct ConnectionGuard {
    registry: Arc<ConnectionRegistry>,
    number: u64,
    outbox: Arc<Outbox>,
    info: Option<ConnectionInfo>,
}

impl ConnectionRegistry {
    #[must_use]
    pub fn new(limits: Limits, ledger: Arc<Ledger>) -> Arc<Self> {
        let shared = Arc::new(Shared::new(limits, ledger));
        Arc::new(Self { shared, open: Mutex::default(), next: AtomicU64::new(0), emptied: Notify::new() })
    }

    /// Shared by all connections.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Registers a connection. `None` during a shutdown.
    #[must_use]
    pub fn register(self: &Arc<Self>) -> Option<ConnectionGuard> {
        let mut open = self.open.lock();
        if open.is_shutting_down {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let outbox: Arc<Outbox> = Arc::default();
        open.outboxes.insert(number, outbox.clone());
        metrics::connection_opened();
        Some(ConnectionGuard { registry: self.clone(), number, outbox, info: None })
    }

    /// Asks all connections to end, and accepts no new ones.
    pub fn shut_down(&self) {
        let mut open = self.open.lock();
        open.is_shutting_down = true;
        let outboxes: Vec<_> = open.outboxes.values().cloned().collect();
        drop(open);
        for outbox in outboxes {
            outbox.request_shutdown();
        }
    }

    /// Returns when no connection is left.
    pub async fn wait_until_empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.open.lock().outboxes.is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

impl ConnectionGuard {
    /// The same registration, of a connection to which this is attached.
    #[must_use]
    pub fn with_info(self, info: ConnectionInfo) -> Self {
        let mut guard = self;
        guard.info = Some(info);
        guard
    }

    /// What is attached to the connection.
    #[must_use]
    pub fn info(&self) -> Option<&ConnectionInfo> {
        self.info.as_ref()
    }

    /// Where responses for this connection are put.
    #[must_use]
    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.outbox
    }

    /// Shared by all connections.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.registry.shared
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        metrics::connection_closed();
        let mut open = self.registry.open.lock();
        open.outboxes.remove(&self.number);
        if open.outboxes.is_empty() {
            self.registry.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shutdown_reaches_all_open_connections() {
        let registry = ConnectionRegistry::new(Limits::default(), Ledger::new(usize::MAX));
        let (first, second) = (registry.register().unwrap(), registry.register().unwrap());
        drop(first);
        let third = registry.register().unwrap();
        registry.shut_down();
        assert!(second.outbox().shutdown_requested() && third.outbox().shutdown_requested());
        let waiting = tokio::spawn({
            let registry = registry.clone();
            async move { registry.wait_until_empty().await }
        });
        drop((second, third));
        waiting.await.unwrap();
        assert!(registry.register().is_none(), "no connection is registered during a shutdown");
    }
}
