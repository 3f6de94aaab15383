//! Locks.

use etcd_client::{Client, Error, LockOptions, LockResponse};
use tokio::task::JoinHandle;

use super::{check_unknown, grant, line, support::Server, until_line, until_no_watches};

async fn lock(client: &mut Client, name: &str, lease: i64) -> Result<LockResponse, Error> {
    client.lock(name, Some(LockOptions::new().with_lease(lease))).await
}

/// Stands in line, and returns once its key is there.
async fn queue(server: &Server, name: &'static str, lease: i64) -> JoinHandle<Result<LockResponse, Error>> {
    let mut client = server.client().await;
    let mut expected = line(&mut client, name).await;
    expected.push(format!("{name}/{lease:x}"));
    let mut waiting = client.clone();
    let task = tokio::spawn(async move { lock(&mut waiting, name, lease).await });
    until_line(&mut client, name, &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
    task
}

fn held(response: &LockResponse) -> (&str, i64) {
    (std::str::from_utf8(response.key()).unwrap(), response.header().unwrap().revision())
}

#[tokio::test]
async fn a_lock_goes_from_one_to_the_next_in_the_order_of_their_coming() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for lease in [0xa, 0xb, 0xc, -0xd] {
        grant(&mut client, lease).await;
    }
    assert_eq!(held(&lock(&mut client, "l", 0xa).await.unwrap()), ("l/a", 2));
    let second = queue(&server, "l", 0xb).await;
    let third = queue(&server, "l", 0xc).await;
    assert_eq!(held(&lock(&mut client, "l", 0xa).await.unwrap()), ("l/a", 4), "whoever holds it holds it again");
    assert!(!second.is_finished() && !third.is_finished());
    client.unlock("l/a").await.unwrap();
    assert_eq!(held(&second.await.unwrap().unwrap()), ("l/b", 5), "as of when it was won");
    assert!(!third.is_finished());
    client.lease_revoke(0xb).await.unwrap();
    assert_eq!(held(&third.await.unwrap().unwrap()), ("l/c", 6));
    assert_eq!(held(&lock(&mut client, "other", -0xd).await.unwrap()), ("other/-d", 7));
    until_no_watches(&server).await;
}

#[tokio::test]
async fn who_brings_no_lease_gets_one_for_a_minute() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let locked = client.lock("l", None).await.unwrap();
    let (_, lease) = held(&locked).0.split_once('/').unwrap();
    let lease = i64::from_str_radix(lease, 16).unwrap();
    let found = client.lease_time_to_live(lease, None).await.unwrap();
    assert_eq!(found.granted_ttl(), 60);
    assert_eq!(client.get(locked.key(), None).await.unwrap().kvs()[0].lease(), lease);
}

#[tokio::test]
async fn errors_lose_their_code_and_keep_their_words() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    check_unknown(lock(&mut client, "l", 404).await, "etcdserver: requested lease not found");
    check_unknown(client.unlock("").await, "etcdserver: key is not provided");
    assert_eq!(client.unlock("missing").await.unwrap().header().unwrap().revision(), 1);
    assert!(line(&mut client, "l").await.is_empty());
}

#[tokio::test]
async fn who_goes_while_waiting_leaves_no_key_behind() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for lease in [1, 2, 3] {
        grant(&mut client, lease).await;
    }
    lock(&mut client, "l", 1).await.unwrap();
    let second = queue(&server, "l", 2).await;
    let third = queue(&server, "l", 3).await;
    second.abort();
    until_line(&mut client, "l", &["l/1", "l/3"]).await;
    assert_eq!(client.leases().await.unwrap().leases().len(), 3, "its lease stays");
    client.unlock("l/1").await.unwrap();
    third.await.unwrap().unwrap();
    until_no_watches(&server).await;
}

/// Trap 18.
#[tokio::test]
async fn who_lost_the_lease_while_waiting_hears_of_it_when_it_is_his_turn() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    grant(&mut client, 2).await;
    lock(&mut client, "l", 1).await.unwrap();
    let second = queue(&server, "l", 2).await;
    client.lease_revoke(2).await.unwrap();
    until_line(&mut client, "l", &["l/1"]).await;
    assert!(!second.is_finished());
    client.unlock("l/1").await.unwrap();
    check_unknown(second.await.unwrap(), "mutex: session is expired");
}

#[tokio::test]
async fn other_names_are_other_locks_but_any_key_below_a_name_counts() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    client.put("testa/foreign", "", None).await.unwrap();
    client.put("test/foreign", "", None).await.unwrap();
    let waiting = queue(&server, "test", 1).await;
    client.put("test/foreign", "again", None).await.unwrap();
    client.delete("testa/foreign", None).await.unwrap();
    assert!(!waiting.is_finished());
    client.delete("test/foreign", None).await.unwrap();
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_lock_has_one_holder_at_a_time_however_many_want_it() {
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
