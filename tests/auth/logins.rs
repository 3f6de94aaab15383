//! Many clients that log in at once starve nobody.

use std::time::{Duration, Instant};

use metastore::proto::etcdserverpb::PutRequest;
use prost::Message;
use test_support::Server;
use tokio::task::JoinSet;

use super::calls::{call, enable, log_in, set_up_users};

/// Puts keys until the returned task is aborted; the slowest of them is what it returns when it is told to stop.
async fn slowest_put(server: &Server, token: String, mut stop: tokio::sync::oneshot::Receiver<()>) -> Duration {
    let channel = server.channel().await;
    let mut slowest = Duration::ZERO;
    while stop.try_recv().is_err() {
        let put = PutRequest { key: "a/k".into(), value: "v".into(), ..PutRequest::default() };
        let started = Instant::now();
        call(&channel, "/etcdserverpb.KV/Put", Some(&token), put.encode_to_vec()).await.unwrap();
        slowest = slowest.max(started.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    slowest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_of_one_user_log_in_at_once() {
    let server = Server::start(&[]);
    let channel = server.channel().await;
    set_up_users(&channel).await;
    enable(&channel).await;
    let mut logins = JoinSet::new();
    for _ in 0..1000 {
        let channel = channel.clone();
        logins.spawn(async move { log_in(&channel, "writer", "writer").await });
    }
    let tokens = logins.join_all().await;
    assert!(tokens.iter().all(Result::is_ok), "{:?}", tokens.iter().find(|token| token.is_err()));
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_beyond_the_queue_are_refused_at_once_and_others_are_served_meanwhile() {
    let server = Server::start(&["--max-waiting-logins=20"]);
    let channel = server.channel().await;
    set_up_users(&channel).await;
    enable(&channel).await;
    let token = log_in(&channel, "writer", "writer").await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let mut logins = JoinSet::new();
    for nth in 0..300 {
        let channel = channel.clone();
        logins.spawn(async move {
            let started = Instant::now();
            let refused = log_in(&channel, "reader", &format!("wrong{nth}")).await.unwrap_err();
            (refused.message().to_owned(), started.elapsed())
        });
    }
    let putting = slowest_put(&server, token, stopped);
    let all = async {
        let outcomes = logins.join_all().await;
        stop.send(()).unwrap();
        outcomes
    };
    let (slowest, outcomes) = tokio::join!(putting, all);
    let (beyond, checked): (Vec<_>, Vec<_>) =
        outcomes.iter().partition(|(message, _)| message.ends_with("(--max-waiting-logins=20)"));
    assert!(beyond.len() > 200, "only {} were refused", beyond.len());
    let latest = beyond.iter().map(|(_, took)| *took).max().unwrap();
    assert!(latest < Duration::from_secs(1), "the last one was refused after {latest:?}");
    for (message, _) in checked {
        assert_eq!(message, "etcdserver: authentication failed, invalid user ID or password");
    }
    assert!(slowest < Duration::from_millis(500), "a put took {slowest:?} meanwhile");
}
