//! What the server counts. The program that it is a part of says where to.

use std::sync::OnceLock;

/// Receives what is counted. Called often, from many threads.
pub trait Metrics: Send + Sync {
    /// Something of a client's was refused, for a reason that is a label: a flood, a limit, a fault.
    fn refused(&self, reason: &'static str);
    fn connection_opened(&self);
    fn connection_closed(&self);
    /// So many bytes more are held for clients; fewer if it is negative.
    fn held_bytes(&self, change: i64);
}

static METRICS: OnceLock<&'static dyn Metrics> = OnceLock::new();

/// Sets where to count, once and before anything is served. Until then nothing is counted.
pub fn install(metrics: &'static dyn Metrics) {
    METRICS.get_or_init(|| metrics);
}

pub(crate) fn refused(reason: &'static str) {
    METRICS.get().inspect(|metrics| metrics.refused(reason));
}

pub(crate) fn connection_opened() {
    METRICS.get().inspect(|metrics| metrics.connection_opened());
}

pub(crate) fn connection_closed() {
    METRICS.get().inspect(|metrics| metrics.connection_closed());
}

pub(crate) fn held_bytes(change: i64) {
    METRICS.get().inspect(|metrics| metrics.held_bytes(change));
}
