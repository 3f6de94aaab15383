//! The IDs of members, clusters and requests.
//!
//! The ID of an initial member is a digest of its peer URLs and the cluster token; the cluster ID is a digest of the initial
//! members' IDs. So members with the same configuration agree on both without communicating. For a member that is added later
//! the time takes the token's place; its ID is part of the proposal. Once generated, IDs are read from disk, never generated
//! again.
//!
//! INVARIANTS
//! * No ID is zero: in raft, zero means "none".
//! * The order in which URLs or members are given makes no difference.

use std::{
    fmt,
    num::NonZeroU64,
    sync::atomic::{AtomicU64, Ordering},
};

use sha1::{Digest, Sha1};

/// Printed as hexadecimal digits without leading zeros, as everywhere in etcd.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(NonZeroU64);

/// Printed like a [`MemberId`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(NonZeroU64);

impl MemberId {
    /// None for zero.
    #[must_use]
    pub fn new(id: u64) -> Option<Self> {
        NonZeroU64::new(id).map(Self)
    }

    #[must_use]
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// The ID of an initial member. URLs are hashed as they are printed.
    #[must_use]
    pub fn of_initial<T: fmt::Display>(peer_urls: &[T], cluster_token: &str) -> Self {
        Self::digest(peer_urls, cluster_token)
    }

    /// The ID of a member that is added to a running cluster at this time.
    #[must_use]
    pub fn of_added<T: fmt::Display>(peer_urls: &[T], unix_seconds: i64) -> Self {
        Self::digest(peer_urls, &unix_seconds.to_string())
    }

    fn digest<T: fmt::Display>(peer_urls: &[T], suffix: &str) -> Self {
        let mut urls: Vec<_> = peer_urls.iter().map(ToString::to_string).collect();
        urls.sort_unstable();
        Self(first_digits(&(urls.concat() + suffix)))
    }
}

impl ClusterId {
    /// None for zero.
    #[must_use]
    pub fn new(id: u64) -> Option<Self> {
        NonZeroU64::new(id).map(Self)
    }

    #[must_use]
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// The ID of the cluster with these initial members.
    #[must_use]
    pub fn of_initial_members(members: &[MemberId]) -> Self {
        let mut members = members.to_vec();
        members.sort_unstable();
        let bytes: Vec<u8> = members.iter().flat_map(|member| member.get().to_be_bytes()).collect();
        Self(first_digits(bytes))
    }
}

/// The first eight bytes of the digest, as a number.
fn first_digits(bytes: impl AsRef<[u8]>) -> NonZeroU64 {
    let digest = Sha1::digest(bytes);
    let first = digest.first_chunk().expect("a digest has twenty bytes");
    NonZeroU64::new(u64::from_be_bytes(*first)).expect("eight zero bytes occur once in 2^64 digests")
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Generates request IDs, which no other member and no earlier run of this one generates.
///
/// ```text
/// 63        48 47                    8 7       0
/// └ member ──┘ └ start, milliseconds ┘ └ count ┘
/// ```
///
/// The count carries into the milliseconds: after 256 requests in the first millisecond, the IDs of the next begin.
#[derive(Debug)]
pub struct RequestIds {
    member: u64,
    last: AtomicU64,
}

impl RequestIds {
    const MEMBER_SHIFT: u32 = 48;
    const COUNT_BITS: u32 = 8;
    const LOW: u64 = (1 << Self::MEMBER_SHIFT) - 1;

    /// For a run of this member that started at this Unix time.
    #[must_use]
    pub fn new(member: MemberId, started_unix_ms: u64) -> Self {
        let start = (started_unix_ms << Self::COUNT_BITS) & Self::LOW;
        Self { member: member.get() << Self::MEMBER_SHIFT, last: AtomicU64::new(start) }
    }

    pub fn next(&self) -> u64 {
        // Relaxed: only the IDs have to be distinct, nothing else is ordered by them.
        let count = self.last.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        self.member | (count & Self::LOW)
    }

    /// The next ID as a lease ID, which is positive.
    pub fn next_lease(&self) -> i64 {
        loop {
            let id = self.next() & u64::MAX >> 1;
            if id != 0 {
                return id.cast_signed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(urls: &[&str], token: &str) -> String {
        MemberId::of_initial(urls, token).to_string()
    }

    /// The initial members of a cluster, with one URL each.
    fn initial_members(ports: &[u16], token: &str) -> Vec<MemberId> {
        ports.iter().map(|port| MemberId::of_initial(&[format!("http://127.0.0.1:{port}")], token)).collect()
    }

    #[test]
    fn a_single_member_has_etcds_well_known_ids() {
        let member = MemberId::of_initial(&["http://localhost:2380"], "etcd-cluster");
        assert_eq!(member.to_string(), "8e9e05c52164694d");
        assert_eq!(ClusterId::of_initial_members(&[member]).to_string(), "cdf818194e3a8c32");
    }

    #[test]
    fn three_initial_members_agree_on_all_ids() {
        for (ports, token, members, cluster) in [
            (
                [12380, 22380, 32380],
                "etcd-cluster-1",
                ["8211f1d0f64f3269", "91bc3c398fb3c146", "fd422379fda50e48"],
                "ef37ad9dc622a7c4",
            ),
            (
                [31242, 31244, 31246],
                "vtok",
                ["3e92f49912e8d3d0", "50bc5f0ec5787b50", "14537261b6539675"],
                "c659677da0a39d53",
            ),
        ] {
            let mut ids = initial_members(&ports, token);
            assert_eq!(ids.iter().map(ToString::to_string).collect::<Vec<_>>(), members);
            ids.reverse();
            assert_eq!(ClusterId::of_initial_members(&ids).to_string(), cluster, "their order makes no difference");
        }
    }

    #[test]
    fn several_urls_are_one_member_in_any_order_and_zeros_are_dropped() {
        let urls = ["http://10.0.0.1:2381", "http://10.0.0.1:2380"];
        assert_eq!(first(&urls, "tok"), "6a7f44eed714194f");
        let cluster = ClusterId::of_initial_members(&[MemberId::of_initial(&urls, "tok")]);
        assert_eq!(cluster.to_string(), "f0cec8ec9cdafa4");
    }

    #[test]
    fn a_member_added_later_has_the_time_in_its_id() {
        let id = MemberId::of_added(&["http://127.0.0.1:32380"], 1_700_000_000);
        assert_eq!(id.to_string(), "70b1e742d9081e54");
    }

    #[test]
    fn no_id_is_zero() {
        assert_eq!(MemberId::new(0), None);
        assert_eq!(ClusterId::new(0), None);
        assert_eq!(MemberId::new(7).map(MemberId::get), Some(7));
    }

    #[test]
    fn a_request_id_holds_the_member_the_start_and_a_count_that_carries() {
        let member = MemberId::new(0xffff_0000_0000_1234).unwrap();
        let ids = RequestIds::new(member, 0xabcd_0000_0000_0001);
        assert_eq!(ids.next(), 0x1234_0000_0000_0101);
        assert_eq!(ids.next(), 0x1234_0000_0000_0102);
        let last = (0..254).map(|_| ids.next()).last();
        assert_eq!(last, Some(0x1234_0000_0000_0200), "the count carries");
        let full = RequestIds::new(member, (1 << 40) - 1);
        assert_eq!((0..256).map(|_| full.next()).last(), Some(0x1234_0000_0000_0000), "but never into the member");
    }

    #[test]
    fn a_lease_id_is_positive() {
        let ids = RequestIds::new(MemberId::new(0x8001).unwrap(), 1);
        assert_eq!(ids.next_lease(), 0x0001_0000_0000_0101);
    }
}
