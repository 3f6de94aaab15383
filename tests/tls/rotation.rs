//! A CA is replaced while clients call, without one failed call: first both are trusted, then certificates of the new one are
//! used, then the old one is trusted no more.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use metastore::proto::etcdserverpb::{PutRequest, kv_client::KvClient};
use rcgen::ExtendedKeyUsagePurpose;

use super::{
    authority::{Authority, SECURE, Wanted},
    members::{cluster, secure_url, start_all},
};
use crate::support::{Server, eventually_async, time_limit};

const CLIENTS: usize = 4;

/// Clients that connect anew for each call.
struct Callers {
    calls: Arc<AtomicU64>,
    stopped: Arc<AtomicBool>,
    tasks: tokio::task::JoinSet<()>,
}

impl Callers {
    fn start(authority: &Arc<Authority>, server: &Arc<Server>) -> Self {
        let mut callers = Self { calls: Arc::default(), stopped: Arc::default(), tasks: tokio::task::JoinSet::new() };
        for nth in 0..CLIENTS {
            let (calls, stopped) = (callers.calls.clone(), callers.stopped.clone());
            let (authority, server) = (authority.clone(), server.clone());
            callers.tasks.spawn(async move {
                while !stopped.load(Ordering::Relaxed) {
                    put(&authority, &server, &nth.to_string()).await.expect("every call succeeds");
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        callers
    }

    async fn progress(&self, more: u64) {
        let goal = self.calls.load(Ordering::Relaxed) + more;
        eventually_async("calls succeed", time_limit(), async || {
            let calls = self.calls.load(Ordering::Relaxed);
            if calls >= goal { Ok(()) } else { Err(calls) }
        })
        .await;
    }

    async fn stop(mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
    }
}

/// One call on a connection of its own.
async fn put(authority: &Authority, server: &Server, key: &str) -> Result<(), String> {
    let channel = authority.channel(server, Some("client")).await.map_err(|error| format!("{error:?}"))?;
    let put = PutRequest { key: key.as_bytes().to_vec().into(), value: "v".into(), ..PutRequest::default() };
    KvClient::new(channel).put(put).await.map(drop).map_err(|status| format!("{status:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_is_replaced_under_load_without_a_failed_call() {
    let (old, new) = (Arc::new(Authority::new()), Authority::new());
    let client = Wanted { purposes: &[ExtendedKeyUsagePurpose::ClientAuth], ..Wanted::default() };
    old.issue("client", client);
    let server = Arc::new(old.server(SECURE, &[old.flag("trusted-ca-file", "ca.pem")]));
    let callers = Callers::start(&old, &server);
    callers.progress(20).await;
    let read = |authority: &Authority| fs::read_to_string(authority.path("ca.pem")).unwrap();
    let both = read(&old) + &read(&new);
    old.replace("ca.pem", both.as_bytes());
    callers.progress(20).await;
    // The files of a pair are replaced one after the other: in between, the server uses the pair that matches. A client has to
    // read a pair that matches, too, so the callers pause.
    let (shown, serving) = (old.shown_certificate(&server), Wanted::default());
    let before = shown.await;
    new.issue_into(&old, "server", serving);
    callers.progress(20).await;
    assert_ne!(old.shown_certificate(&server).await, before, "the new certificate is used");
    callers.stop().await;
    new.issue_into(&old, "client", client);
    let callers = Callers::start(&old, &server);
    callers.progress(20).await;
    old.replace("ca.pem", read(&new).as_bytes());
    callers.progress(20).await;
    callers.stop().await;
    old.issue("client", client);
    put(&old, &server, "any").await.expect_err("the old CA is not trusted any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_use_a_new_ca_without_a_restart() {
    let (old, new) = (Authority::new(), Authority::new());
    old.issue("member", Wanted::default());
    let urls: Vec<_> = (0..3).map(|_| secure_url()).collect();
    let mut servers = cluster(&urls, |_| {
        vec![
            old.flag("peer-cert-file", "member.pem"),
            old.flag("peer-key-file", "member.key"),
            old.flag("peer-trusted-ca-file", "ca.pem"),
        ]
    });
    start_all(&mut servers);
    let read = |authority: &Authority| fs::read_to_string(authority.path("ca.pem")).unwrap();
    let new_only = read(&new);
    old.replace("ca.pem", (read(&old) + &new_only).as_bytes());
    new.issue_into(&old, "member", Wanted { serial: 2, ..Wanted::default() });
    old.replace("ca.pem", new_only.as_bytes());
    // This member connects anew to the others, and they to it: with the new certificates only, on all sides.
    servers[2].kill_and_restart();
    servers[0].client().await.put("after", "the change", None).await.unwrap();
    let found = servers[2].client().await.get("after", None).await.unwrap();
    assert_eq!(found.kvs()[0].value_str().unwrap(), "the change");
}
