//! Leases of one server, through clients.

#![allow(clippy::disallowed_methods, reason = "leases depend on real time")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod many;

use std::time::{Duration, Instant};
use test_support as support;

use etcd_client::{
    AlarmAction, AlarmType, Client, Error, GetOptions, LeaseGrantOptions, LeaseTimeToLiveOptions, PutOptions,
};
use metastore::proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, lease_client::LeaseClient};
use support::{Server, eventually_async, scaled, time_limit};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

/// The shortest TTL that is granted with default flags.
const MIN_TTL: i64 = 2;
/// No key outlives its lease by more than this.
const MAX_DELAY: Duration = Duration::from_millis(1500);

async fn grant(client: &mut Client, id: i64, ttl: i64) -> Result<(i64, i64), Error> {
    let options = LeaseGrantOptions::new().with_id(id);
    client.lease_grant(ttl, Some(options)).await.map(|granted| (granted.id(), granted.ttl()))
}

async fn put(client: &mut Client, key: &str, lease: i64) -> Result<(), Error> {
    client.put(key, "v", Some(PutOptions::new().with_lease(lease))).await.map(drop)
}

/// All keys, and the revision.
async fn keys(client: &mut Client) -> (Vec<String>, i64) {
    let found = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    let keys = found.kvs().iter().map(|kv| kv.key_str().unwrap().to_owned()).collect();
    (keys, found.header().unwrap().revision())
}

/// The remaining TTL, the granted TTL and the keys of a lease.
async fn time_to_live(client: &mut Client, id: i64) -> (i64, i64, Vec<String>) {
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let found = client.lease_time_to_live(id, Some(options)).await.unwrap();
    let mut keys: Vec<_> = found.keys().iter().map(|key| String::from_utf8(key.clone()).unwrap()).collect();
    keys.sort();
    (found.ttl(), found.granted_ttl(), keys)
}

async fn leases(client: &mut Client) -> Vec<i64> {
    client.leases().await.unwrap().leases().iter().map(etcd_client::LeaseStatus::id).collect()
}

/// Waits until a lease is gone.
async fn until_gone(client: &mut Client, id: i64) {
    eventually_async(&format!("lease {id} is gone"), time_limit(), async || {
        let (left, granted, _) = time_to_live(client, id).await;
        if granted == 0 { Ok(()) } else { Err(format!("{left} of {granted} seconds left")) }
    })
    .await;
}

fn check_refused<T: std::fmt::Debug>(outcome: Result<T, Error>, code: tonic::Code, message: &str) {
    match outcome {
        Err(Error::GRpcStatus(status)) => {
            assert_eq!((status.code() as i32, status.message()), (code as i32, message));
        }
        other => panic!("expected {code:?}, not {other:?}"),
    }
}

/// A keep-alive stream.
struct KeepAlive {
    requests: Option<mpsc::UnboundedSender<LeaseKeepAliveRequest>>,
    answers: Streaming<LeaseKeepAliveResponse>,
}

impl KeepAlive {
    /// Opens a stream. The response headers arrive with the first answer, so a first request is necessary.
    async fn open(server: &Server, first: i64) -> Self {
        let (requests, queue) = mpsc::unbounded_channel();
        requests.send(LeaseKeepAliveRequest { id: first }).unwrap();
        let mut client = LeaseClient::new(server.channel().await);
        let answers = client.lease_keep_alive(UnboundedReceiverStream::new(queue)).await.unwrap().into_inner();
        Self { requests: Some(requests), answers }
    }

    fn send(&self, id: i64) {
        self.requests.as_ref().unwrap().send(LeaseKeepAliveRequest { id }).unwrap();
    }

    /// The lease and TTL of the next answer.
    async fn next(&mut self) -> Option<(i64, i64)> {
        self.answers.message().await.unwrap().map(|answer| (answer.id, answer.ttl))
    }
}

#[tokio::test]
async fn a_grant_returns_id_and_ttl_and_takes_no_revision() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let (chosen, ttl) = grant(&mut client, 0, 1).await.unwrap();
    assert!(chosen > 0 && ttl == MIN_TTL);
    for (id, asked, granted) in
        [(1, 0, MIN_TTL), (-1, -5, MIN_TTL), (i64::MIN, 60, 60), (7, 9_000_000_000, 9_000_000_000)]
    {
        assert_eq!(grant(&mut client, id, asked).await.unwrap(), (id, granted));
    }
    let too_large = grant(&mut client, 8, 9_000_000_001).await;
    check_refused(too_large, tonic::Code::OutOfRange, "etcdserver: too large lease TTL");
    let taken = grant(&mut client, -1, 5).await;
    check_refused(taken, tonic::Code::FailedPrecondition, "etcdserver: lease already exists");
    assert_eq!(keys(&mut client).await, (vec![], 1));
}

#[tokio::test]
async fn a_missing_lease_fails_puts_and_revocations_and_has_ttl_minus_one() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let not_found = "etcdserver: requested lease not found";
    check_refused(put(&mut client, "k", 5).await, tonic::Code::NotFound, not_found);
    check_refused(client.lease_revoke(5).await, tonic::Code::NotFound, not_found);
    check_refused(client.lease_revoke(0).await, tonic::Code::NotFound, not_found);
    assert_eq!(time_to_live(&mut client, 5).await, (-1, 0, vec![]));
    assert_eq!(keys(&mut client).await, (vec![], 1));
}

/// LEASE-14.
#[tokio::test]
async fn a_revoked_lease_takes_its_keys_in_one_revision_or_none() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 5, 60).await.unwrap();
    grant(&mut client, 6, 60).await.unwrap();
    let revoked = client.lease_revoke(6).await.unwrap();
    assert_eq!(revoked.header().unwrap().revision(), 1);
    for key in ["c", "a", "b"] {
        put(&mut client, key, 5).await.unwrap();
    }
    assert_eq!(time_to_live(&mut client, 5).await.2, ["a", "b", "c"]);
    let revoked = client.lease_revoke(5).await.unwrap();
    assert_eq!(revoked.header().unwrap().revision(), 5);
    assert_eq!(keys(&mut client).await, (vec![], 5));
    assert!(leases(&mut client).await.is_empty());
}

#[tokio::test]
async fn a_key_belongs_to_the_lease_of_its_last_put() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for id in [1, 2] {
        grant(&mut client, id, 60).await.unwrap();
        for key in ["moved", "freed", "deleted", "kept"] {
            put(&mut client, key, id).await.unwrap();
        }
    }
    put(&mut client, "moved", 1).await.unwrap();
    put(&mut client, "freed", 0).await.unwrap();
    client.delete("deleted", None).await.unwrap();
    client.put("kept", "w", Some(PutOptions::new().with_ignore_lease())).await.unwrap();
    assert_eq!(time_to_live(&mut client, 1).await.2, ["moved"]);
    assert_eq!(time_to_live(&mut client, 2).await.2, ["kept"]);
    client.lease_revoke(2).await.unwrap();
    assert_eq!(keys(&mut client).await.0, ["freed", "moved"]);
    client.lease_revoke(1).await.unwrap();
    assert_eq!(keys(&mut client).await.0, ["freed"]);
}

/// LEASE-13.
#[tokio::test]
async fn one_stream_renews_many_leases_and_returns_ttl_zero_for_missing_ones() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1, 1).await.unwrap();
    grant(&mut client, -2, 100).await.unwrap();
    let mut stream = KeepAlive::open(&server, 1).await;
    assert_eq!(stream.next().await, Some((1, MIN_TTL)));
    for id in [404, -2, 1, -2, 0] {
        stream.send(id);
    }
    stream.requests = None; // Requests sent before are still answered.
    let mut received = Vec::new();
    while let Some(answer) = stream.next().await {
        received.push(answer);
    }
    assert_eq!(received, [(404, 0), (-2, 100), (1, MIN_TTL), (-2, 100), (0, 0)]);
}

/// FAULT-33.
#[tokio::test]
async fn a_lease_can_be_renewed_as_soon_as_it_is_granted() {
    let server = Server::start(&[]);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let mut client = server.client().await;
        tasks.spawn(async move {
            for _ in 0..20 {
                let (id, ttl) = grant(&mut client, 0, 30).await.unwrap();
                let (mut renewals, mut answers) = client.lease_keep_alive(id).await.unwrap();
                renewals.keep_alive().await.unwrap();
                assert_eq!(answers.message().await.unwrap().unwrap().ttl(), ttl);
                let (left, granted, _) = time_to_live(&mut client, id).await;
                assert!((ttl - 2..=ttl).contains(&left) && granted == ttl);
            }
        });
    }
    tasks.join_all().await;
}

#[tokio::test]
async fn leases_are_listed_by_remaining_ttl() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for (id, ttl) in [(1, 300), (2, 100), (-3, 200), (4, 250)] {
        grant(&mut client, id, ttl).await.unwrap();
    }
    assert_eq!(leases(&mut client).await, [2, -3, 4, 1]);
    client.lease_revoke(-3).await.unwrap();
    assert_eq!(leases(&mut client).await, [2, 4, 1]);
}

#[tokio::test]
async fn a_lease_expires_unless_it_is_renewed() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let granted = Instant::now();
    for id in [1, 2, 3] {
        grant(&mut client, id, MIN_TTL).await.unwrap();
        put(&mut client, &format!("a{id}"), id).await.unwrap();
        put(&mut client, &format!("b{id}"), id).await.unwrap();
    }
    let (_, before) = keys(&mut client).await;
    let mut stream = KeepAlive::open(&server, 3).await;
    let mut renewed = Instant::now();
    let limit = Duration::from_secs(2) + MAX_DELAY;
    eventually_async("the leases that are not renewed have expired", limit, async || {
        let left = leases(&mut client).await;
        if left == [3] {
            return Ok(());
        }
        stream.send(3);
        renewed = Instant::now();
        assert_eq!(stream.next().await, Some((3, MIN_TTL)));
        Err(left)
    })
    .await;
    assert!(granted.elapsed() >= Duration::from_secs(2), "early");
    assert_eq!(
        keys(&mut client).await,
        (vec!["a3".to_owned(), "b3".to_owned()], before + 2),
        "one revision per expired lease"
    );
    until_gone(&mut client, 3).await;
    let lived = renewed.elapsed();
    assert!(lived >= Duration::from_secs(2) && lived < scaled(Duration::from_secs(2) + MAX_DELAY), "{lived:?}");
}

/// LEASE-16 and FAULT-33. While the CORRUPT alarm is active nothing is changed, so expired leases stay.
#[tokio::test]
async fn a_renewal_of_an_expired_lease_waits_until_it_is_revoked_and_does_not_revive_it() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1, MIN_TTL).await.unwrap();
    put(&mut client, "k", 1).await.unwrap();
    client.alarm(AlarmAction::Activate, AlarmType::Corrupt, None).await.unwrap();
    // The time that is left becomes negative a second after the end.
    let has_expired = async || time_to_live(&mut client, 1).await.0 < 0;
    eventually_async("the lease has expired", time_limit(), has_expired).await;
    assert_eq!(time_to_live(&mut client, 1).await, (-1, MIN_TTL, vec!["k".to_owned()]));
    assert_eq!(leases(&mut client).await, [1]);
    let mut waiting = tokio::spawn(async move {
        let mut stream = KeepAlive::open(&server, 1).await;
        (stream.next().await, server)
    });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "the renewal waits");
    client.alarm(AlarmAction::Deactivate, AlarmType::Corrupt, None).await.unwrap();
    let (received, server) = waiting.await.unwrap();
    assert_eq!(received, Some((1, 0)));
    assert_eq!(keys(&mut client).await.0, Vec::<String>::new());
    drop(server);
}

/// LEASE-15, LEASE-17, and FAULT-34 for a negative ID.
#[tokio::test]
async fn leases_and_their_keys_survive_a_crash_and_their_deadlines_reset() {
    let mut server = Server::start(&[]);
    let mut client = server.client().await;
    for (id, ttl) in [(-7, 3), (i64::MIN, 1000), (9, 50)] {
        grant(&mut client, id, ttl).await.unwrap();
        put(&mut client, &format!("on{id}"), id).await.unwrap();
    }
    put(&mut client, "on9", -7).await.unwrap();
    let ends_soon = async || time_to_live(&mut client, -7).await.0 <= 1;
    eventually_async("the shortest lease ends within a second", time_limit(), ends_soon).await;
    server.kill();
    server.restart();
    let restarted = Instant::now();
    let mut client = server.client().await;
    assert_eq!(leases(&mut client).await, [-7, 9, i64::MIN]);
    let (left, granted, keys_on) = time_to_live(&mut client, -7).await;
    assert!(left >= 3 && granted == 3, "the full TTL and an election timeout");
    assert_eq!(keys_on, ["on-7", "on9"]);
    assert_eq!(time_to_live(&mut client, i64::MIN).await.2, ["on-9223372036854775808"]);
    until_gone(&mut client, -7).await;
    let lived = restarted.elapsed();
    let earliest = Duration::from_millis(3500); // The clock starts when it becomes leader, a moment before it serves.
    assert!(lived >= earliest && lived < scaled(Duration::from_secs(4) + MAX_DELAY), "{lived:?}");
    assert_eq!(keys(&mut client).await.0, ["on-9223372036854775808"]);
}

/// Without the feature gate every renewal waits until all committed entries are applied; the answers are the same.
#[tokio::test]
async fn keep_alives_have_the_same_answers_without_fast_lease_keep_alive() {
    let server = Server::start(&["--feature-gates=FastLeaseKeepAlive=false"]);
    let mut client = server.client().await;
    assert_eq!(grant(&mut client, 7, 60).await.unwrap(), (7, 60));
    let (mut renewals, mut answers) = client.lease_keep_alive(7).await.unwrap();
    renewals.keep_alive().await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().ttl(), 60);
    assert!(client.lease_keep_alive(8).await.is_err(), "the lease does not exist");
}
