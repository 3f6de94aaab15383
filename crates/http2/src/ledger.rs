//! Accounting of all memory that the server holds for clients, in bytes.
//!
//! There is one ledger for the process. Each connection of our own HTTP/2 adds what it holds (`http2/limits.rs` decides how
//! much that may be). Everything else that holds memory for clients outside a connection, such as the watch hub, is charged to
//! the same ledger, so that one limit applies to all of it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::{
    call::{CallError, Code},
    metrics,
};

/// The total of the bytes held for clients, and its limit.
#[derive(Debug)]
pub struct Ledger {
    limit: usize,
    held: AtomicUsize,
}

impl Ledger {
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, held: AtomicUsize::new(0) })
    }

    /// The maximum total, in bytes.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The current total, in bytes.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether more than half of the limit is used, so that buffers should be shrunk where possible.
    #[must_use]
    pub fn is_scarce(&self) -> bool {
        self.held() > self.limit / 2
    }

    /// Whether the total would stay within the limit with `bytes` more.
    #[must_use]
    pub fn has_space_for(&self, bytes: usize) -> bool {
        self.held().saturating_add(bytes) <= self.limit
    }

    /// Replaces an amount of `before` by `now`. Does not check the limit: callers must check it first.
    pub fn change(&self, before: usize, now: usize) {
        if now >= before {
            self.held.fetch_add(now - before, Ordering::Relaxed);
        } else {
            self.held.fetch_sub(before - now, Ordering::Relaxed);
        }
        metrics::held_bytes(now.cast_signed() as i64 - before.cast_signed() as i64);
    }

    /// Charges `bytes` until the returned charge is dropped.
    #[must_use]
    pub fn charge(self: &Arc<Self>, bytes: usize) -> Charge {
        let mut charge = Charge { ledger: self.clone(), bytes: 0 };
        charge.set(bytes);
        charge
    }
}

/// Bytes that are charged to a ledger until this is dropped.
#[derive(Debug)]
pub struct Charge {
    ledger: Arc<Ledger>,
    bytes: usize,
}

impl Charge {
    /// Changes the charged amount. Does not check the limit.
    pub fn set(&mut self, bytes: usize) {
        if bytes != self.bytes {
            self.ledger.change(self.bytes, bytes);
            self.bytes = bytes;
        }
    }

    /// Charges `bytes` more if the total stays within the limit; otherwise changes nothing and returns false.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let has_space = self.ledger.has_space_for(bytes);
        if has_space {
            self.set(self.bytes + bytes);
        }
        has_space
    }

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

/// The error of a call whose request would exceed the limit. Counts it as refused.
#[must_use]
pub fn request_over_limit() -> CallError {
    metrics::refused("held_bytes");
    let message = "grpc: too many bytes of requests and answers are under way".into();
    CallError { code: Code::ResourceExhausted, message }
}

/// The error of a call whose response would exceed the limit. Counts it as refused.
#[must_use]
pub fn response_over_limit() -> CallError {
    metrics::refused("held_bytes");
    let message = "grpc: too many bytes of answers wait to be read".into();
    CallError { code: Code::ResourceExhausted, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_counts_until_it_is_dropped() {
        let ledger = Ledger::new(100);
        let mut charge = ledger.charge(40);
        assert!(ledger.has_space_for(60) && !ledger.has_space_for(61) && !ledger.is_scarce());
        assert!(!charge.try_grow(61) && charge.try_grow(20));
        assert_eq!((ledger.held(), charge.bytes(), ledger.is_scarce()), (60, 60, true));
        drop(charge);
        assert_eq!(ledger.held(), 0);
    }
}
