//! Locks.

use etcd_client::{Client, Error, LockOptions, LockResponse};
use tokio::task::JoinHandle;

use super::{assert_unknown, grant, keys_below, support::Server, wait_for_keys, wait_for_watches};

async fn lock(client: &mut Client, name: &str, lease: i64) -> Result<LockResponse, Error> {
    client.lock(name, Some(LockOptions::new().with_lease(lease))).await
}

/// Starts to wait for the lock, and returns once its key exists.
async fn lock_in_background(
    server: &Server,
    name: &'static str,
    lease: i64,
) -> JoinHandle<Result<LockResponse, Error>> {
    let mut client = server.client().await;
    let mut expected = keys_below(&mut client, name).await;
    expected.push(format!("{name}/{lease:x}"));
    let mut waiting = client.clone();
    let task = tokio::spawn(async move { lock(&mut waiting, name, lease).await });
    wait_for_keys(&mut client, name, &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
    task
}

fn key_and_revision(response: &LockResponse) -> (&str, i64) {
    (std::str::from_utf8(response.key()).unwrap(), response.header().unwrap().revision())
}

#[tokio::test]
async fn a_lock_is_granted_in_the_order_of_the_requests() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for lease in [0xa, 0xb, 0xc, -0xd] {
        grant(&mut client, lease).await;
    }
    assert_eq!(key_and_revision(&lock(&mut client, "l", 0xa).await.unwrap()), ("l/a", 2));
    let second = lock_in_background(&server, "l", 0xb).await;
    let third = lock_in_background(&server, "l", 0xc).await;
    assert_eq!(
        key_and_revision(&lock(&mut client, "l", 0xa).await.unwrap()),
        ("l/a", 4),
        "the holder may lock it again"
    );
    assert!(!second.is_finished() && !third.is_finished());
    client.unlock("l/a").await.unwrap();
    assert_eq!(key_and_revision(&second.await.unwrap().unwrap()), ("l/b", 5), "the revision at which it was acquired");
    assert!(!third.is_finished());
    client.lease_revoke(0xb).await.unwrap();
    assert_eq!(key_and_revision(&third.await.unwrap().unwrap()), ("l/c", 6));
    assert_eq!(key_and_revision(&lock(&mut client, "other", -0xd).await.unwrap()), ("other/-d", 7));
    wait_for_watches(&server, 0).await;
}

#[tokio::test]
async fn without_a_lease_a_lock_gets_one_of_sixty_seconds() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let locked = client.lock("l", None).await.unwrap();
    let (_, lease) = key_and_revision(&locked).0.split_once('/').unwrap();
    let lease = i64::from_str_radix(lease, 16).unwrap();
    let found = client.lease_time_to_live(lease, None).await.unwrap();
    assert_eq!(found.granted_ttl(), 60);
    assert_eq!(client.get(locked.key(), None).await.unwrap().kvs()[0].lease(), lease);
}

#[tokio::test]
async fn errors_lose_their_code_and_keep_their_text() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    assert_unknown(lock(&mut client, "l", 404).await, "etcdserver: requested lease not found");
    assert_unknown(client.unlock("").await, "etcdserver: key is not provided");
    assert_eq!(client.unlock("missing").await.unwrap().header().unwrap().revision(), 1);
    assert!(keys_below(&mut client, "l").await.is_empty());
}

#[tokio::test]
async fn a_cancelled_lock_request_leaves_no_key_behind() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for lease in [1, 2, 3] {
        grant(&mut client, lease).await;
    }
    lock(&mut client, "l", 1).await.unwrap();
    let second = lock_in_background(&server, "l", 2).await;
    let third = lock_in_background(&server, "l", 3).await;
    second.abort();
    wait_for_keys(&mut client, "l", &["l/1", "l/3"]).await;
    assert_eq!(client.leases().await.unwrap().leases().len(), 3, "the lease is kept");
    client.unlock("l/1").await.unwrap();
    third.await.unwrap().unwrap();
    wait_for_watches(&server, 0).await;
}

/// CONCURRENCY-18 and FAULT-36.
#[tokio::test]
async fn a_waiter_whose_lease_is_lost_fails_when_the_lock_becomes_free() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    grant(&mut client, 2).await;
    lock(&mut client, "l", 1).await.unwrap();
    let second = lock_in_background(&server, "l", 2).await;
    client.lease_revoke(2).await.unwrap();
    wait_for_keys(&mut client, "l", &["l/1"]).await;
    assert!(!second.is_finished());
    client.unlock("l/1").await.unwrap();
    assert_unknown(second.await.unwrap(), "mutex: session is expired");
}

#[tokio::test]
async fn any_key_below_the_name_of_a_lock_holds_it() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    client.put("testa/foreign", "", None).await.unwrap();
    client.put("test/foreign", "", None).await.unwrap();
    let waiting = lock_in_background(&server, "test", 1).await;
    client.put("test/foreign", "again", None).await.unwrap();
    client.delete("testa/foreign", None).await.unwrap();
    assert!(!waiting.is_finished());
    client.delete("test/foreign", None).await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_contended_lock_has_one_holder_at_a_time() {
    let server = Server::start(&[]);
    let holders = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (mut client, holders) = (server.client().await, holders.clone());
        tasks.spawn(async move {
            use std::sync::atomic::Ordering;
            for _ in 0..10 {
                let locked = client.lock("l", None).await.unwrap();
                assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                assert_eq!(holders.fetch_sub(1, Ordering::SeqCst), 1);
                client.unlock(locked.key()).await.unwrap();
            }
        });
    }
    tasks.join_all().await;
}
