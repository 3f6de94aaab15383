//! Leases: keys attached to a lease are deleted when its time to live is over, unless a client keeps it alive.
//!
//! The module has two parts that do not use each other; the layer above connects them.
//!
//! * [`Leases`], in this file, is replicated: which leases there are, for how many seconds each was granted, and which keys
//!   are attached to it. It is changed only by applied entries and is independent of time.
//! * [`Deadlines`] holds the time at which each lease ends. It exists only on the leader, is not replicated, and decides
//!   nothing: for an expired lease a revocation is *proposed*, and the lease ends on every member when that entry is
//!   applied.
//!
//! ```text
//! grant 7, TTL 60     → stored, exists        a restarted member reads the table, then attaches
//! put a, b on lease 7 → attached              the live keys again: attachments are not stored,
//! put b on lease 8    → detached, attached    the record of every key contains its lease
//! revoke 7            → removed; "a" is returned, and the caller deletes it in the same batch
//! ```
//!
//! One thread owns [`Leases`] and writes; any number of [`Reader`]s read. They share one lock, which the writer holds for one
//! change of the table in memory and a reader for a limited number of leases or keys. So listing a million leases does not
//! delay writes, but the list is not consistent as of one moment: a lease that exists all the time is in it, one that is
//! granted or revoked meanwhile may or may not be.
//!
//! A lease with one key, by far the most common case, takes about 70 bytes plus the key, and on the leader about 75 more for
//! its deadline (`tests/lease_scale.rs` measures both).
//!
//! etcd can also store the remaining TTL of a lease, an option that is off by default. We never store it. A remaining TTL in
//! a table that etcd wrote is ignored: such a lease ends later than it should, but not too early.
//!
//! INVARIANTS
//! * A lease is in the table in memory if and only if it is in [`Table::Lease`] once the current batch is written.
//! * No lease has the ID 0: a key whose record contains lease 0 has no lease.
//! * The same commands in the same order produce the same results and the same batches on every member.

#![allow(clippy::missing_errors_doc, reason = "the doc comment of each function says when it fails")]

pub mod deadlines;
mod keys;
mod shards;
mod wheel;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use prost::Message;

use self::keys::Keys;
use crate::error::{Error, Halt};
use crate::proto::leasepb;
use crate::storage::{Batch, Engine, Table};

pub use self::deadlines::{Deadlines, Renewal};

/// The longest TTL that can be granted.
pub const MAX_TTL_SECONDS: i64 = 9_000_000_000;

/// How many leases or keys a reader copies while it holds the lock.
const READ_CHUNK: usize = 1024;

/// Any number except 0, including negative ones; chosen by the client or by the member that proposes the grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// In the record of a key: no lease.
    pub const NONE: Self = Self(0);

    /// The key of this lease in [`Table::Lease`].
    fn table_key(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

/// As etcdctl prints it: 16 hexadecimal characters, including the minus sign of a negative ID.
impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.unsigned_abs();
        if self.0 < 0 { write!(f, "-{digits:015x}") } else { write!(f, "{digits:016x}") }
    }
}

#[derive(Debug)]
struct Lease {
    ttl_seconds: i64,
    keys: Keys,
}

impl Lease {
    fn granted(ttl_seconds: i64) -> Self {
        Self { ttl_seconds, keys: Keys::default() }
    }
}

/// A tree, because lists have to be ordered, and because a hash table of this size would block all access while it grows.
type Shared = Arc<RwLock<BTreeMap<LeaseId, Lease>>>;

/// All leases; the writer's handle.
#[derive(Debug)]
pub struct Leases {
    reader: Reader,
}

impl Leases {
    /// Reads the leases from the database; fails if the table is corrupt. They come without their keys: the caller must
    /// [`Leases::attach`] all live keys that have a lease.
    pub fn restore(engine: &dyn Engine) -> Result<Self, Halt> {
        let mut found = Vec::new();
        let mut damage = None;
        engine.scan(Table::Lease, b"", b"", &mut |key, value| match decode(key, value) {
            Ok(lease) => {
                found.push(lease);
                ControlFlow::Continue(())
            }
            Err(reason) => {
                damage = Some(Halt::InvalidData(format!(
                    "the database is corrupt: invalid row {key:02x?} in the lease table: {reason}"
                )));
                ControlFlow::Break(())
            }
        })?;
        match damage {
            Some(halt) => Err(halt),
            None => Ok(Self { reader: Reader { leases: Arc::new(RwLock::new(found.into_iter().collect())) } }),
        }
    }

    /// The readers' handle. The writer reads through it too.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Grants a lease; fails if its TTL is too long or its ID exists. The proposer has chosen the ID and has raised the TTL to
    /// the minimum.
    pub fn grant(&mut self, batch: &mut Batch, id: LeaseId, ttl_seconds: i64) -> Result<(), Error> {
        if id == LeaseId::NONE {
            return Err(Error::LeaseNotFound);
        }
        if ttl_seconds > MAX_TTL_SECONDS {
            return Err(Error::LeaseTtlTooLarge);
        }
        if self.reader.exists(id) {
            return Err(Error::LeaseExists);
        }
        let stored = leasepb::Lease { id: id.0, ttl: ttl_seconds, remaining_ttl: 0 };
        batch.put(Table::Lease, &id.table_key(), stored.encode_to_vec());
        self.reader.leases.write().insert(id, Lease::granted(ttl_seconds));
        Ok(())
    }

    /// Revokes a lease; fails if there is none. Returns its keys in ascending order; the caller must delete them in the same
    /// batch and in one revision.
    pub fn revoke(&mut self, batch: &mut Batch, id: LeaseId) -> Result<Vec<Bytes>, Error> {
        let lease = self.reader.leases.write().remove(&id).ok_or(Error::LeaseNotFound)?;
        batch.delete(Table::Lease, &id.table_key());
        Ok(lease.keys.into_ascending())
    }

    /// Attaches a key to a lease; has no effect if it is attached already. The caller must detach it from its previous lease.
    ///
    /// Fails if there is no such lease. When a put is applied, the whole transaction fails with it; at a restart the caller
    /// logs it and continues, because the key itself is intact.
    pub fn attach(&mut self, id: LeaseId, key: &[u8]) -> Result<(), Error> {
        let mut leases = self.reader.leases.write();
        let lease = leases.get_mut(&id).ok_or(Error::LeaseNotFound)?;
        lease.keys.insert(key);
        Ok(())
    }

    /// Detaches a key from a lease. The lease may not exist any more: a revocation removes the lease before its keys.
    pub fn detach(&mut self, id: LeaseId, key: &[u8]) {
        if let Some(lease) = self.reader.leases.write().get_mut(&id) {
            lease.keys.remove(key);
        }
    }
}

/// Decodes a row of the lease table, or says what is wrong with it.
fn decode(key: &[u8], value: &[u8]) -> Result<(LeaseId, Lease), String> {
    let stored = leasepb::Lease::decode(value).map_err(|error| error.to_string())?;
    let id = LeaseId(stored.id);
    if id == LeaseId::NONE || key != id.table_key() {
        return Err(format!("it contains lease {id}"));
    }
    Ok((id, Lease::granted(stored.ttl)))
}

/// All leases; the readers' handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Reader {
    leases: Shared,
}

impl Reader {
    #[must_use]
    pub fn exists(&self, id: LeaseId) -> bool {
        self.leases.read().contains_key(&id)
    }

    /// The granted TTL of a lease, in seconds.
    #[must_use]
    pub fn lookup(&self, id: LeaseId) -> Option<i64> {
        self.leases.read().get(&id).map(|lease| lease.ttl_seconds)
    }

    /// The keys attached to a lease, in ascending order; None if there is no such lease, or if it is revoked while they are read.
    #[must_use]
    pub fn keys(&self, id: LeaseId) -> Option<Vec<Bytes>> {
        let mut keys: Vec<Bytes> = Vec::new();
        loop {
            let before = keys.len();
            let leases = self.leases.read();
            leases.get(&id)?.keys.read_after(keys.last().cloned().as_deref(), READ_CHUNK, &mut keys);
            if keys.len() < before + READ_CHUNK {
                return Some(keys);
            }
        }
    }

    /// The first and the last of the keys attached to a lease; None if there are none.
    #[must_use]
    pub fn key_bounds(&self, id: LeaseId) -> Option<(Bytes, Bytes)> {
        let leases = self.leases.read();
        let (first, last) = leases.get(&id)?.keys.bounds()?;
        Some((Bytes::copy_from_slice(first), Bytes::copy_from_slice(last)))
    }

    /// All leases by ascending ID, with their granted TTLs in seconds.
    #[must_use]
    pub fn all(&self) -> Vec<(LeaseId, i64)> {
        let mut all: Vec<(LeaseId, i64)> = Vec::with_capacity(self.len());
        loop {
            let before = all.len();
            let from = all.last().map_or(Bound::Unbounded, |&(id, _)| Bound::Excluded(id));
            let leases = self.leases.read();
            let chunk = leases.range((from, Bound::Unbounded)).take(READ_CHUNK);
            all.extend(chunk.map(|(&id, lease)| (id, lease.ttl_seconds)));
            if all.len() < before + READ_CHUNK {
                return all;
            }
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.leases.read().len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::Memory;

    /// Leases and their engine; every step writes its own batch.
    struct Fixture {
        engine: Memory,
        leases: Leases,
    }

    impl Fixture {
        fn new() -> Self {
            let engine = Memory::default();
            let leases = Leases::restore(&engine).unwrap();
            Self { engine, leases }
        }

        fn grant(&mut self, id: i64, ttl_seconds: i64) -> Result<(), Error> {
            let mut batch = Batch::default();
            let granted = self.leases.grant(&mut batch, LeaseId(id), ttl_seconds);
            assert_eq!(batch.is_empty(), granted.is_err(), "a refusal writes nothing");
            self.engine.write(&batch).unwrap();
            granted
        }

        fn revoke(&mut self, id: i64) -> Result<Vec<Bytes>, Error> {
            let mut batch = Batch::default();
            let keys = self.leases.revoke(&mut batch, LeaseId(id));
            assert_eq!(batch.is_empty(), keys.is_err(), "a refusal writes nothing");
            self.engine.write(&batch).unwrap();
            keys
        }

        fn keys(&self, id: i64) -> Option<String> {
            let keys = self.leases.reader().keys(LeaseId(id))?;
            let keys: Vec<_> = keys.iter().map(|key| std::str::from_utf8(key).unwrap()).collect();
            Some(keys.join(" "))
        }

        fn restart(self, keep_batches: usize) -> Self {
            let engine = self.engine.crash(keep_batches);
            let leases = Leases::restore(&engine).unwrap();
            Self { engine, leases }
        }
    }

    #[test]
    fn an_id_prints_as_etcdctl_prints_it() {
        assert_eq!(LeaseId(0x694d_71dd_b1f3_1e02).to_string(), "694d71ddb1f31e02");
        assert_eq!(LeaseId(5).to_string(), "0000000000000005");
        assert_eq!(LeaseId(-5).to_string(), "-000000000000005");
        assert_eq!(LeaseId(i64::MIN).to_string(), "-8000000000000000");
    }

    #[test]
    fn a_grant_is_refused_for_its_ttl_before_its_id() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.grant(1, MAX_TTL_SECONDS), Ok(()));
        assert_eq!(fixture.grant(1, MAX_TTL_SECONDS + 1), Err(Error::LeaseTtlTooLarge));
        assert_eq!(fixture.grant(1, 5), Err(Error::LeaseExists));
        assert_eq!(fixture.grant(0, 5), Err(Error::LeaseNotFound));
        assert_eq!(fixture.leases.reader().all(), [(LeaseId(1), MAX_TTL_SECONDS)]);
    }

    #[test]
    fn a_revoke_returns_the_keys_in_byte_order_and_the_id_is_free_again() {
        let mut fixture = Fixture::new();
        fixture.grant(1, 10).unwrap();
        for key in ["b", "a\u{ff}", "ab", "B", "a", ""] {
            fixture.leases.attach(LeaseId(1), key.as_bytes()).unwrap();
        }
        assert_eq!(fixture.revoke(1).unwrap(), ["", "B", "a", "ab", "a\u{ff}", "b"]);
        assert_eq!(fixture.revoke(1), Err(Error::LeaseNotFound));
        assert_eq!(fixture.leases.attach(LeaseId(1), b"a"), Err(Error::LeaseNotFound));
        fixture.grant(1, 20).unwrap();
        assert_eq!(fixture.leases.reader().lookup(LeaseId(1)), Some(20));
        assert_eq!(fixture.revoke(1).unwrap(), Vec::<Bytes>::new());
    }

    #[test]
    fn a_moved_key_is_on_its_new_lease_only() {
        let mut fixture = Fixture::new();
        fixture.grant(1, 10).unwrap();
        fixture.grant(2, 10).unwrap();
        for key in [b"a", b"b", b"b"] {
            fixture.leases.attach(LeaseId(1), key).unwrap();
        }
        assert_eq!(fixture.keys(1).as_deref(), Some("a b"));
        fixture.leases.attach(LeaseId(2), b"b").unwrap();
        fixture.leases.detach(LeaseId(1), b"b");
        assert_eq!(fixture.keys(1).as_deref(), Some("a"));
        assert_eq!(fixture.keys(2).as_deref(), Some("b"));
        assert_eq!(fixture.revoke(1).unwrap(), ["a"]);
        fixture.leases.detach(LeaseId(1), b"a");
        assert_eq!(fixture.keys(1), None);
        assert_eq!(fixture.keys(2).as_deref(), Some("b"));
    }

    #[test]
    fn a_restart_reads_the_leases_and_their_keys_are_attached_again() {
        let mut fixture = Fixture::new();
        let ids = [i64::MIN, -1, 1, i64::MAX];
        for id in ids {
            fixture.grant(id, 10).unwrap();
            fixture.leases.attach(LeaseId(id), b"key").unwrap();
        }
        fixture.grant(3, 10).unwrap();
        fixture.revoke(3).unwrap();
        fixture.revoke(i64::MAX).unwrap();
        let mut found = fixture.restart(6);
        assert_eq!(found.leases.reader().all(), ids.map(|id| (LeaseId(id), 10)), "the last batch was lost");
        assert_eq!(found.keys(-1).as_deref(), Some(""));
        assert_eq!(found.leases.attach(LeaseId(3), b"key"), Err(Error::LeaseNotFound));
        found.leases.attach(LeaseId(i64::MIN), b"key").unwrap();
        assert_eq!(found.revoke(i64::MIN).unwrap(), ["key"]);
        assert_eq!(found.revoke(-1).unwrap(), Vec::<Bytes>::new());
    }

    #[test]
    fn a_corrupt_table_is_an_error_that_ends_the_process() {
        let seven = leasepb::Lease { id: 7, ttl: 10, remaining_ttl: 0 }.encode_to_vec();
        for (key, value) in [(8_i64.to_be_bytes().as_slice(), seven.as_slice()), (b"7", &seven), (&[0, 7], b"\xff")] {
            let engine = Memory::default();
            let mut batch = Batch::default();
            batch.put(Table::Lease, key, value.to_vec());
            engine.write(&batch).unwrap();
            let Err(Halt::InvalidData(reason)) = Leases::restore(&engine) else { panic!("{key:?} was accepted") };
            assert!(reason.starts_with("the database is corrupt: invalid row ["), "{reason}");
        }
    }

    #[test]
    fn lists_longer_than_a_chunk_are_complete_and_ordered() {
        let mut fixture = Fixture::new();
        let mut batch = Batch::default();
        let count = 2 * READ_CHUNK;
        for number in (0..count).rev() {
            let id = LeaseId(i64::try_from(number).unwrap() - 1500);
            if id != LeaseId::NONE {
                fixture.leases.grant(&mut batch, id, 10).unwrap();
            }
            fixture.leases.attach(LeaseId(500), format!("{number:06}").as_bytes()).unwrap_or_default();
        }
        let all = fixture.leases.reader().all();
        assert_eq!(all.len(), count - 1);
        assert!(all.is_sorted());
        let keys = fixture.leases.reader().keys(LeaseId(500)).unwrap();
        assert_eq!(keys.len(), 2001, "the keys attached since the lease was granted");
        assert!(keys.is_sorted());
    }

    #[test]
    fn readers_see_the_changes_of_the_writer() {
        let mut fixture = Fixture::new();
        let reader = fixture.leases.reader().clone();
        assert!(reader.is_empty());
        fixture.grant(1, 10).unwrap();
        assert!(reader.exists(LeaseId(1)));
        assert_eq!(reader.lookup(LeaseId(1)), Some(10));
        assert_eq!(reader.lookup(LeaseId(2)), None);
        fixture.revoke(1).unwrap();
        assert!(!reader.exists(LeaseId(1)));
    }
}
