//! The node's clock: the system's monotonic clock, or one that a simulation sets.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Counts from a fixed start. Clones show the same time.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    System(Instant),
    /// Nanoseconds, set by the simulation.
    Simulated(Arc<AtomicU64>),
}

impl Default for Clock {
    fn default() -> Self {
        Self(Source::System(Instant::now()))
    }
}

impl Clock {
    /// A clock that shows the nanoseconds in this variable.
    #[must_use]
    pub fn simulated(nanos: Arc<AtomicU64>) -> Self {
        Self(Source::Simulated(nanos))
    }

    /// The time since the start.
    #[must_use]
    pub fn now(&self) -> Duration {
        match &self.0 {
            Source::System(started) => started.elapsed(),
            Source::Simulated(nanos) => Duration::from_nanos(nanos.load(Ordering::Relaxed)),
        }
    }
}
