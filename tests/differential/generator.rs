//! Generates operations from a seed: mostly sensible ones on few keys, so that they interact, and some odd ones of every kind.
//!
//! What is never generated, because etcd has no answer that could be compared:
//!
//! * a transaction that deletes up to `"\0"` and puts: depending on what follows, etcd's process crashes;
//! * an alarm action that does not exist: etcd's process crashes;
//! * a streamed range with a sort target and no sort order: etcd's pages overlap or miss keys;
//! * a watch with fragments: where they are split depends on how much history is sent at a time (`directed` has one).
//!
//! A sorted range inside a transaction covers few keys, because above twelve etcd leaves the order of ties open.

use bytes::Bytes;
use metastore::proto::etcdserverpb::{
    AlarmRequest, CompactionRequest, Compare, DeleteRangeRequest, DowngradeRequest, HashKvRequest, LeaseGrantRequest,
    LeaseKeepAliveRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, MemberListRequest, MoveLeaderRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, compare::TargetUnion, request_op::Request,
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::answers::{Answer, Operation};

/// The member's ID where etcd's default addresses are advertised.
const MEMBER: u64 = 0x8e9e_05c5_2164_694d;
/// Both servers refuse transactions with more operations than this on one level.
pub const MAX_TXN_OPS: usize = 12;
/// etcd stores the hashes of this many compactions.
const STORED_HASHES: usize = 10;

/// One step of the test.
#[derive(Debug, Clone)]
pub enum Action {
    Ask(Operation),
    Watch(WatchCreateRequest),
    /// Cancels the watch of this stream and ID.
    Cancel((usize, i64)),
}

/// Generates actions; the answers to earlier ones determine which make sense.
pub struct Generator {
    rng: StdRng,
    head: i64,
    compacted: i64,
    /// The compactions since the servers were started.
    compactions: Vec<i64>,
    /// The compactions before that.
    compactions_before: Vec<i64>,
    leases: Vec<i64>,
    /// The existing watches, as (stream, ID).
    watches: Vec<(usize, i64)>,
    next_watch: i64,
    /// The active alarms, as (member, type).
    alarms: Vec<(u64, i32)>,
}

impl Generator {
    pub fn new(seed: u64) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            head: 1,
            compacted: -1,
            compactions: Vec::new(),
            compactions_before: Vec::new(),
            leases: Vec::new(),
            watches: Vec::new(),
            next_watch: 1000,
            alarms: Vec::new(),
        }
    }

    /// The newest known revision.
    pub fn head(&self) -> i64 {
        self.head
    }

    /// The compact revision; -1 before the first compaction.
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// Whether etcd may answer HashKV at this revision with a hash that it stored at a compaction.
    pub fn etcd_may_have_stored_hash(&self, revision: i64) -> bool {
        self.compactions.iter().rev().take(STORED_HASHES).any(|&compaction| compaction == revision)
    }

    /// Whether there was a compaction at this revision before the servers were restarted.
    pub fn was_compacted_before_the_restart(&self, revision: i64) -> bool {
        self.compactions_before.contains(&revision)
    }

    /// The servers were restarted and lost what they had only in memory.
    pub fn forget_volatile_state(&mut self) {
        self.watches.clear();
        self.compactions_before = std::mem::take(&mut self.compactions);
    }

    /// Takes note of an answer.
    pub fn observe(&mut self, operation: &Operation, answer: &Answer) {
        self.head = self.head.max(answer.revision().unwrap_or_default());
        match (operation, answer) {
            (Operation::Compact(request), Answer::Compact(_)) => {
                self.compacted = request.revision;
                self.compactions.push(request.revision);
            }
            (Operation::LeaseGrant(request), Answer::LeaseGrant(_)) => self.leases.push(request.id),
            (Operation::LeaseRevoke(request), Answer::LeaseRevoke(_)) => self.leases.retain(|&id| id != request.id),
            (Operation::Alarm(request), Answer::Alarm(answer)) if request.action == 1 => {
                self.alarms.extend(answer.alarms.iter().map(|alarm| (alarm.member_id, alarm.alarm)));
            }
            (Operation::Alarm(request), Answer::Alarm(_)) if request.action == 2 => {
                self.alarms.retain(|&alarm| alarm != (request.member_id, request.alarm));
            }
            _ => {}
        }
    }

    /// Records whether a watch exists; returns whether it did before.
    pub fn record_watch(&mut self, watch: (usize, i64), lives: bool) -> bool {
        let known = self.watches.contains(&watch);
        self.watches.retain(|&other| other != watch);
        if lives {
            self.watches.push(watch);
        }
        known
    }

    /// True with a probability of one in `times`.
    fn once_in(&mut self, times: u32) -> bool {
        self.rng.random_ratio(1, times)
    }

    fn percent(&mut self, percent: u32) -> bool {
        self.rng.random_ratio(percent, 100)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.rng).expect("the slice is not empty")
    }

    pub fn next_action(&mut self) -> Action {
        // Alarms block nearly everything, so they are soon disarmed.
        if !self.alarms.is_empty() && self.once_in(8) {
            let (member_id, alarm) = self.alarms[0];
            return Action::Ask(Operation::Alarm(AlarmRequest { action: 2, member_id, alarm }));
        }
        Action::Ask(match self.rng.random_range(0..1000) {
            0..240 => Operation::Range(self.range()),
            240..300 => Operation::RangeStream(self.range_to_stream()),
            300..520 => Operation::Put(self.put()),
            520..590 => Operation::DeleteRange(self.delete_range()),
            590..790 => Operation::Txn(self.txn()),
            790..810 => Operation::Compact(self.compaction()),
            810..870 => Operation::HashKv(HashKvRequest { revision: self.revision() }),
            870..940 => self.lease_call(),
            940..955 => self.rare_call(),
            955..985 if self.watches.len() < 24 => return Action::Watch(self.watch()),
            _ => return Action::Cancel(self.watch_to_cancel()),
        })
    }

    fn key(&mut self) -> Bytes {
        if self.once_in(60) {
            return Bytes::new();
        }
        if self.percent(15) {
            let odd: [&[u8]; 8] = [b"\0", b"a", b"a\0", b"a\0b", b"k", b"k1\xff", b"\xff", b"\xff\xff"];
            return Bytes::from_static(self.pick(&odd));
        }
        Bytes::from(format!("k{:02}", self.rng.random_range(0..40)))
    }

    fn range_end(&mut self, key: &Bytes) -> Bytes {
        match self.rng.random_range(0..100) {
            0..40 => Bytes::new(),
            40..52 => Bytes::from_static(b"\0"),
            52..70 => Bytes::from(format!("k{}", self.rng.random_range(0..5))),
            70..78 => Bytes::from_static(b"l"),
            78..81 => key.clone(),
            81..84 => Bytes::from_static(b"\0\0"),
            84..87 => Bytes::from([key.as_ref(), b"\0"].concat()),
            _ => self.key(),
        }
    }

    /// A current, past, future, compacted or invalid revision.
    fn revision(&mut self) -> i64 {
        match self.rng.random_range(0..100) {
            0..40 => 0,
            40..80 => self.rng.random_range(self.compacted().max(1)..=self.head.max(self.compacted() + 1)),
            80..85 => self.head,
            85..88 => self.head + 1,
            88..91 => self.compacted(),
            91..94 => self.compacted() - 1,
            94..96 => self.rng.random_range(1..=self.head),
            96..98 => -self.rng.random_range(1..5),
            98 => i64::MAX,
            _ => i64::MIN,
        }
    }

    fn limit(&mut self) -> i64 {
        match self.rng.random_range(0..100) {
            0..55 => 0,
            55..90 => self.rng.random_range(1..12),
            90..95 => -1,
            95..98 => i64::MAX,
            _ => i64::MIN,
        }
    }

    fn range(&mut self) -> RangeRequest {
        let key = self.key();
        let mut request = RangeRequest {
            range_end: self.range_end(&key),
            key,
            limit: self.limit(),
            revision: self.revision(),
            serializable: self.percent(50),
            keys_only: self.percent(20),
            count_only: self.percent(10),
            ..RangeRequest::default()
        };
        if self.percent(50) {
            request.sort_order = self.rng.random_range(0..3);
            request.sort_target = self.rng.random_range(0..5);
        } else if self.percent(4) {
            request.sort_order = self.pick(&[-1, 0, 3, i32::MAX]);
            request.sort_target = self.pick(&[-1, 0, 5, i32::MIN]);
        }
        if self.percent(25) {
            let filters = [
                &mut request.min_mod_revision,
                &mut request.max_mod_revision,
                &mut request.min_create_revision,
                &mut request.max_create_revision,
            ];
            for filter in filters {
                if self.percent(40) {
                    *filter = self.revision();
                }
            }
        }
        request
    }

    fn range_to_stream(&mut self) -> RangeRequest {
        let request = self.range();
        let sorted = request.sort_order == 0 && (1..5).contains(&request.sort_target);
        if self.percent(80) {
            // Only what streams support.
            let RangeRequest { key, range_end, limit, revision, serializable, keys_only, count_only, .. } = request;
            let plain = RangeRequest { key, range_end, limit, revision, ..RangeRequest::default() };
            return RangeRequest { serializable, keys_only, count_only, ..plain };
        }
        RangeRequest { sort_target: if sorted { 0 } else { request.sort_target }, ..request }
    }

    fn value(&mut self) -> Bytes {
        match self.rng.random_range(0..1000) {
            0..800 => Bytes::from(format!("v{}", self.rng.random_range(0..10))),
            800..900 => Bytes::new(),
            // Around the size limits of a request and of a message.
            900 => vec![b'x'; 1_572_864 - self.rng.random_range(0..60)].into(),
            901 => vec![b'x'; 2_097_152 - self.rng.random_range(0..60)].into(),
            902..920 => vec![b'y'; self.rng.random_range(1000..100_000)].into(),
            _ => vec![b'z'; self.rng.random_range(1..300)].into(),
        }
    }

    fn lease(&mut self) -> i64 {
        match self.rng.random_range(0..100) {
            0..80 if !self.leases.is_empty() => self.leases[self.rng.random_range(0..self.leases.len())],
            _ => self.pick(&[1, 2, 7, 0x1234_5678_90ab_cdef, -1, -77, i64::MIN, i64::MAX, 404]),
        }
    }

    fn put(&mut self) -> PutRequest {
        let (ignore_value, ignore_lease) = (self.percent(10), self.percent(10));
        PutRequest {
            key: self.key(),
            value: if ignore_value && self.percent(90) { Bytes::new() } else { self.value() },
            lease: if self.percent(if ignore_lease { 5 } else { 20 }) { self.lease() } else { 0 },
            prev_kv: self.percent(30),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete_range(&mut self) -> DeleteRangeRequest {
        let key = self.key();
        let mut range_end = self.range_end(&key);
        // Rarely all keys at once, or there would never be many.
        if range_end.as_ref() == b"\0" && self.percent(80) {
            range_end = Bytes::new();
        }
        DeleteRangeRequest { key, range_end, prev_kv: self.percent(40) }
    }

    fn txn(&mut self) -> TxnRequest {
        let mut txn = self.txn_of_depth(3);
        if puts(&txn) {
            bound_deletes(&mut txn);
        }
        txn
    }

    fn txn_of_depth(&mut self, depth: u32) -> TxnRequest {
        let most = if self.once_in(25) { MAX_TXN_OPS + 2 } else { 3 };
        let [compares, successes, failures] = [0; 3].map(|none: usize| self.rng.random_range(none..=most));
        TxnRequest {
            compare: (0..compares.min(if self.percent(70) { 1 } else { 9 })).map(|_| self.compare()).collect(),
            success: (0..successes).map(|_| self.request_op(depth)).collect(),
            failure: (0..failures).map(|_| self.request_op(depth)).collect(),
        }
    }

    fn request_op(&mut self, depth: u32) -> RequestOp {
        let request = match self.rng.random_range(0..100) {
            0..30 => {
                let mut range = self.range();
                if (range.sort_order, range.sort_target) != (0, 0) {
                    (range.key, range.range_end) = (Bytes::from_static(b"k1"), Bytes::from_static(b"k2"));
                }
                Request::RequestRange(range)
            }
            30..75 => Request::RequestPut(self.put()),
            75..88 => Request::RequestDeleteRange(self.delete_range()),
            88 if self.once_in(3) => return RequestOp { request: None },
            _ if depth > 0 => Request::RequestTxn(self.txn_of_depth(depth - 1)),
            _ => Request::RequestPut(self.put()),
        };
        RequestOp { request: Some(request) }
    }

    fn compare(&mut self) -> Compare {
        let key = self.key();
        let target = if self.percent(4) { self.pick(&[-1, 5, i32::MAX]) } else { self.rng.random_range(0..5) };
        let union = if self.percent(85) { target } else { self.rng.random_range(0..6) };
        Compare {
            range_end: if self.percent(70) { Bytes::new() } else { self.range_end(&key) },
            key,
            target,
            result: if self.percent(4) { self.pick(&[-1, 4, i32::MIN]) } else { self.rng.random_range(0..4) },
            target_union: match union {
                0 => Some(TargetUnion::Version(self.rng.random_range(-1..4))),
                1 => Some(TargetUnion::CreateRevision(self.revision())),
                2 => Some(TargetUnion::ModRevision(self.revision())),
                3 => Some(TargetUnion::Value(self.value())),
                4 => Some(TargetUnion::Lease(if self.percent(50) { 0 } else { self.lease() })),
                _ => None,
            },
        }
    }

    fn compaction(&mut self) -> CompactionRequest {
        let revision = match self.rng.random_range(0..100) {
            0..70 => self.rng.random_range(self.compacted().max(0)..=self.head.max(self.compacted())),
            70..80 => self.head,
            _ => self.revision(),
        };
        CompactionRequest { revision, physical: self.percent(30) }
    }

    /// A lease call. TTLs are longer than the test, or too long and refused.
    fn lease_call(&mut self) -> Operation {
        let id = self.lease();
        match self.rng.random_range(0..100) {
            0..45 => {
                let ttl = match self.rng.random_range(0..10) {
                    0 => self.pick(&[9_000_000_000, 9_000_000_001, i64::MAX]),
                    _ => self.rng.random_range(600..100_000),
                };
                let id = if self.percent(30) { self.rng.random_range(1..1000) } else { id };
                Operation::LeaseGrant(LeaseGrantRequest { ttl, id })
            }
            45..65 => Operation::LeaseRevoke(LeaseRevokeRequest { id }),
            65..85 => Operation::LeaseTimeToLive(LeaseTimeToLiveRequest { id, keys: self.percent(70) }),
            85..95 => Operation::LeaseKeepAlive(LeaseKeepAliveRequest { id }),
            _ => Operation::LeaseLeases,
        }
    }

    fn rare_call(&mut self) -> Operation {
        match self.rng.random_range(0..20) {
            0..6 => Operation::Alarm(AlarmRequest {
                action: self.rng.random_range(0..3),
                member_id: self.pick(&[0, 7, MEMBER]),
                alarm: self.pick(&[0, 1, 1, 2, 9]),
            }),
            6..12 => Operation::Status,
            12..14 => Operation::MemberList(MemberListRequest { linearizable: self.percent(50) }),
            14 => Operation::MoveLeader(MoveLeaderRequest { target_id: self.pick(&[0, 7, MEMBER]) }),
            15 => Operation::Defragment,
            _ => Operation::Downgrade(DowngradeRequest {
                action: self.pick(&[0, 0, 0, 2, 3, -1]),
                version: self.pick(&["", "3", "3.6", "3.6.0", "3.5.0", "3.7.0", "4.0.0", "v3.6.0", "x"]).to_owned(),
            }),
        }
    }

    fn watch(&mut self) -> WatchCreateRequest {
        let key = self.key();
        let id = match self.rng.random_range(0..10) {
            0..6 => 0,
            6 => -5,
            7 if !self.watches.is_empty() => self.watches[0].1,
            _ => {
                self.next_watch += 1;
                self.next_watch
            }
        };
        let start = if self.percent(30) { 0 } else { self.revision() };
        WatchCreateRequest {
            range_end: self.range_end(&key),
            key,
            // Not far in the future, or no event would ever arrive.
            start_revision: start.min(self.head + 20),
            filters: if self.percent(70) {
                Vec::new()
            } else {
                vec![self.pick(&[0, 1, 2, -1]), self.pick(&[0, 1, 1, 5])]
            },
            prev_kv: self.percent(50),
            watch_id: id,
            progress_notify: self.percent(20),
            fragment: false,
        }
    }

    fn watch_to_cancel(&mut self) -> (usize, i64) {
        if self.watches.is_empty() || self.percent(15) {
            return self.pick(&[(0, 77_777), (1, -1), (0, -404)]);
        }
        self.watches[self.rng.random_range(0..self.watches.len())]
    }
}

pub fn operations(txn: &mut TxnRequest) -> impl Iterator<Item = &mut Request> {
    txn.success.iter_mut().chain(&mut txn.failure).filter_map(|op| op.request.as_mut())
}

fn puts(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|op| match &op.request {
        Some(Request::RequestPut(_)) => true,
        Some(Request::RequestTxn(txn)) => puts(txn),
        _ => false,
    })
}

/// Gives deletes without an end a range end.
fn bound_deletes(txn: &mut TxnRequest) {
    for request in operations(txn) {
        match request {
            Request::RequestDeleteRange(delete) if delete.range_end.as_ref() == b"\0" => {
                delete.range_end = Bytes::from_static(b"l");
            }
            Request::RequestTxn(txn) => bound_deletes(txn),
            _ => {}
        }
    }
}
