//! What random operations do not reach: calls that wait for one another, and corner cases that need several steps.

use bytes::Bytes;
use metastore::proto::{
    etcdserverpb::{
        CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
        RequestOp, TxnRequest, WatchCreateRequest, request_op::Request,
    },
    v3electionpb::{CampaignRequest, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest, ResignRequest},
    v3lockpb::{LockRequest, UnlockRequest},
};
use test_support::{eventually_async, time_limit};
use tonic::Streaming;

use super::{
    answers::{Answer, Operation},
    etcd,
    pair::Pair,
};

/// A lease that was never granted.
const NO_LEASE: i64 = 404;

async fn pair() -> Option<Pair> {
    Some(Pair::start(&etcd()?, 0, 0).await)
}

fn assert_no_differences(pair: &Pair) {
    assert!(pair.differences.is_empty(), "{}", pair.differences.join("\n\n"));
}

fn put(key: &'static [u8], value: impl Into<Bytes>) -> PutRequest {
    PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }
}

fn range_all() -> Operation {
    Operation::Range(RangeRequest { key: b"\0"[..].into(), range_end: b"\0"[..].into(), ..RangeRequest::default() })
}

impl Pair {
    async fn with_leases(mut self, ids: &[i64]) -> Self {
        for &id in ids {
            self.ask(&Operation::LeaseGrant(LeaseGrantRequest { ttl: 600, id })).await;
        }
        self
    }

    /// Waits until both servers have this many keys with the prefix.
    async fn until_keys(&mut self, prefix: &str, keys: i64) {
        let mut end = prefix.as_bytes().to_vec();
        *end.last_mut().unwrap() += 1;
        let request = RangeRequest {
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: end.into(),
            ..RangeRequest::default()
        };
        let operation = Operation::Range(request);
        for clients in self.clients() {
            eventually_async(&format!("there are {keys} keys"), time_limit(), async || {
                let answer = clients.ask(&operation).await;
                if matches!(&answer, Answer::Range(answer) if answer.count == keys) { Ok(()) } else { Err(answer) }
            })
            .await;
        }
        self.ask(&operation).await;
    }
}

fn lock(lease: i64) -> Operation {
    Operation::Lock(LockRequest { name: b"m"[..].into(), lease })
}

fn unlock(key: &'static [u8]) -> Operation {
    Operation::Unlock(UnlockRequest { key: key.into() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_are_held_awaited_and_lost_as_in_etcd() {
    let Some(pair) = pair().await else { return };
    let mut pair = pair.with_leases(&[11, 12, 13, -14]).await;
    for operation in [lock(11), lock(11), lock(NO_LEASE), unlock(b""), unlock(b"m/absent")] {
        pair.ask(&operation).await;
    }
    let second = pair.begin(&lock(12));
    pair.until_keys("m/", 2).await;
    let third = pair.begin(&lock(13));
    pair.until_keys("m/", 3).await;
    let fourth = pair.begin(&lock(-14));
    pair.until_keys("m/", 4).await;
    pair.ask(&range_all()).await;
    // One waiting client disconnects; the lease of another ends while it waits.
    fourth.cancel();
    pair.until_keys("m/", 3).await;
    pair.ask(&Operation::LeaseRevoke(LeaseRevokeRequest { id: 13 })).await;
    pair.until_keys("m/", 2).await;
    pair.ask(&unlock(b"m/b")).await;
    pair.finish(second).await;
    pair.ask(&unlock(b"m/c")).await;
    pair.finish(third).await;
    pair.ask(&range_all()).await;
    assert_no_differences(&pair);
}

type Leaders = Streaming<LeaderResponse>;

/// Expects both observers to report the same next leader.
async fn expect_same_leader((ours, theirs): &mut (Leaders, Leaders), value: &str) {
    let both = async { tokio::join!(ours.message(), theirs.message()) };
    let (ours, theirs) = tokio::time::timeout(time_limit(), both).await.expect("a leader is seen");
    let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
    assert_eq!(ours, theirs, "leader {value}");
    assert_eq!(theirs.unwrap().kv.unwrap().value, value);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn elections_are_won_observed_and_resigned_as_in_etcd() {
    let Some(pair) = pair().await else { return };
    let mut pair = pair.with_leases(&[11, 12]).await;
    let name = Bytes::from_static(b"e");
    let campaign = |lease, value: &'static [u8]| {
        Operation::Campaign(CampaignRequest { name: b"e"[..].into(), lease, value: value.into() })
    };
    let proclaim = |leader: Option<LeaderKey>, value: &'static [u8]| {
        Operation::Proclaim(ProclaimRequest { leader, value: value.into() })
    };
    let query_leader = Operation::Leader(LeaderRequest { name: name.clone() });
    for operation in [
        query_leader.clone(),
        campaign(NO_LEASE, b"x"),
        proclaim(None, b"x"),
        Operation::Resign(ResignRequest::default()),
    ] {
        pair.ask(&operation).await;
    }
    let first = pair.begin(&Operation::Observe(LeaderRequest { name }));
    let Answer::Campaign(won) = pair.ask(&campaign(11, b"one")).await else { panic!("there is no other candidate") };
    let leader = won.leader.unwrap();
    pair.finish(first).await;
    let [ours, theirs] = pair.clients();
    let mut observers = tokio::join!(ours.observe("e"), theirs.observe("e"));
    expect_same_leader(&mut observers, "one").await;
    pair.ask(&campaign(11, b"one")).await;
    pair.ask(&campaign(11, b"again")).await;
    expect_same_leader(&mut observers, "again").await;
    pair.ask(&proclaim(Some(leader.clone()), b"still")).await;
    expect_same_leader(&mut observers, "still").await;
    pair.ask(&query_leader).await;
    let second = pair.begin(&campaign(12, b"two"));
    pair.until_keys("e/", 2).await;
    let stale = LeaderKey { rev: leader.rev + 1, ..leader.clone() };
    let orphan = LeaderKey { lease: NO_LEASE, ..leader.clone() };
    for operation in [
        proclaim(Some(stale.clone()), b"x"),
        proclaim(Some(orphan), b"x"),
        Operation::Resign(ResignRequest { leader: Some(stale) }),
        query_leader.clone(),
        Operation::Resign(ResignRequest { leader: Some(leader.clone()) }),
        proclaim(Some(leader), b"x"),
    ] {
        pair.ask(&operation).await;
    }
    pair.finish(second).await;
    expect_same_leader(&mut observers, "two").await;
    pair.ask(&query_leader).await;
    pair.ask(&range_all()).await;
    assert_no_differences(&pair);
}

/// A single revision that is larger than a message may be is sent in fragments, split at the same places. (Where several
/// revisions together are larger, ours sends each in a response of its own, which a client cannot tell from events that
/// occurred one by one.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_revision_is_sent_in_the_same_fragments() {
    let Some(mut pair) = pair().await else { return };
    let keys: [&[u8]; 7] = [b"large/1", b"large/2", b"large/3", b"large/4", b"large/5", b"large/6", b"large/7"];
    for (key, bytes) in keys.into_iter().zip([400_000, 900_000, 1_500_000, 100, 700_000, 700_000, 697_000]) {
        pair.ask(&Operation::Put(put(key, vec![b'x'; bytes]))).await;
    }
    let (key, range_end) = (Bytes::from_static(b"large/"), Bytes::from_static(b"large0"));
    let fragmented =
        WatchCreateRequest { key, range_end, fragment: true, prev_kv: true, ..WatchCreateRequest::default() };
    let whole = WatchCreateRequest { fragment: false, ..fragmented.clone() };
    pair.watch(fragmented.clone()).await;
    pair.watch(whole).await;
    let WatchCreateRequest { key, range_end, .. } = fragmented.clone();
    pair.ask(&Operation::DeleteRange(DeleteRangeRequest { key, range_end, prev_kv: false })).await;
    let deleted_at = pair.generator.head();
    pair.compare_watches().await;
    pair.watch(WatchCreateRequest { start_revision: deleted_at, ..fragmented }).await;
    pair.compare_watches().await;
    assert_no_differences(&pair);
}

/// For the check against duplicate keys, a range end of `"\0"` is smaller than every key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_to_the_end_and_a_put_may_share_a_transaction() {
    let Some(mut pair) = pair().await else { return };
    pair.ask(&Operation::Put(put(b"b", "old"))).await;
    pair.watch(WatchCreateRequest {
        key: b"a"[..].into(),
        range_end: b"c"[..].into(),
        prev_kv: true,
        ..WatchCreateRequest::default()
    })
    .await;
    let delete = DeleteRangeRequest { key: b"a"[..].into(), range_end: b"\0"[..].into(), prev_kv: true };
    let operations = [Request::RequestDeleteRange(delete), Request::RequestPut(put(b"b", "new"))];
    let success = operations.map(|request| RequestOp { request: Some(request) }).into();
    pair.ask(&Operation::Txn(TxnRequest { success, ..TxnRequest::default() })).await;
    pair.ask(&range_all()).await;
    pair.compare_watches().await;
    // After that transaction: a compaction at its own revision crashes etcd.
    let revision = pair.generator.head();
    pair.ask(&Operation::Compact(CompactionRequest { revision, physical: true })).await;
    pair.ask(&range_all()).await;
    assert_no_differences(&pair);
}
