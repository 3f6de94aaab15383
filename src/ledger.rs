//! The account of everything that clients make the server keep, in bytes.
//!
//! There is one ledger for the process. A connection of our own HTTP/2 adds what it holds (`http2/limits.rs` decides how
//! much that may be); whatever keeps something for clients outside a connection, such as the watch hub, adds to the same
//! ledger, so that the limit is one for all of it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::{
    call::{Code, Refusal},
    metrics::METRICS,
};

/// The sum of what is kept for clients, and the limit of it.
#[derive(Debug)]
pub struct Ledger {
    limit: usize,
    held: AtomicUsize,
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, held: AtomicUsize::new(0) })
    }

    /// How much may be kept in all.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How much is kept now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether more than half of the limit is taken: what can shrink should.
    #[must_use]
    pub fn is_scarce(&self) -> bool {
        self.held() > self.limit / 2
    }

    /// Whether so many more bytes stay within the limit.
    #[must_use]
    pub fn has_space_for(&self, bytes: usize) -> bool {
        self.held().saturating_add(bytes) <= self.limit
    }

    /// Replaces what was counted `before` by `now`. Refuses nothing: ask first.
    pub fn change(&self, before: usize, now: usize) {
        if now >= before {
            self.held.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.held.fetch_sub(before - now, Ordering::Relaxed);
        }
        METRICS.held_bytes.add(now.cast_signed() as i64 - before.cast_signed() as i64);
    }

    /// Counts something for as long as the charge lives.
    #[must_use]
    pub fn charge(self: &Arc<Self>, bytes: usize) -> Charge {
        let mut charge = Charge { ledger: self.clone(), bytes: 0 };
        charge.set(bytes);
        charge
    }
}

/// Bytes that are counted until this is dropped.
#[derive(Debug)]
pub struct Charge {
    ledger: Arc<Ledger>,
    bytes: usize,
}

impl Charge {
    /// Changes how much is counted.
    pub fn set(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.ledger.change(self.bytes, bytes);
            self.bytes = bytes;
        }
    }

    /// Counts so much more, if that stays within the limit.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let has_space = self.ledger.has_space_for(bytes);
        if has_space {
            self.set(self.bytes + bytes);
        }
        has_space
    }

    /// How much is counted.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What a call is told whose request finds no room.
#[must_use]
pub fn too_much() -> Refusal {
    METRICS.refused.with_label_values(&["held_bytes"]).inc();
    let message = "grpc: too many bytes of requests and answers are under way".into();
    Refusal { code: Code::ResourceExhausted, message }
}

/// What a call is told whose answer finds no room.
#[must_use]
pub fn unread() -> Refusal {
    METRICS.refused.with_label_values(&["held_bytes"]).inc();
    let message = "grpc: too many bytes of answers wait to be read".into();
    Refusal { code: Code::ResourceExhausted, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_is_counted_while_it_lives() {
        let ledger = Ledger::new(100);
        let mut charge = ledger.charge(40);
        assert!(ledger.has_space_for(60) && !ledger.has_space_for(61) && !ledger.is_scarce());
        assert!(!charge.try_grow(61) && charge.try_grow(20));
        assert_eq!((ledger.held(), charge.bytes(), ledger.is_scarce()), (60, 60, true));
        drop(charge);
        assert_eq!(ledger.held(), 0);
    }
}
