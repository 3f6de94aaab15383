//! A running cluster moves from plain connections between members to TLS, member by member, while clients write.

use std::sync::{Arc, Mutex};

use super::{
    authority::{Authority, Wanted},
    load::Load,
    members::{cluster, start_all},
};
use crate::support::{Server, eventually_async, free_url, time_limit};

const WRITERS: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn a_running_cluster_moves_to_tls() {
    let authority = Authority::new();
    authority.issue("member", Wanted::default());
    let plain: Vec<_> = (0..3).map(|_| free_url()).collect();
    let secure: Vec<_> = plain.iter().map(|url| url.replace("http://", "https://")).collect();
    let mut servers = cluster(&plain, |_| Vec::new());
    start_all(&mut servers);
    let urls = Arc::new(Mutex::new(servers.iter().map(Server::url).collect::<Vec<_>>()));
    let load = Load::start(WRITERS, &urls);
    load.progress(50).await;

    // 1: every member accepts both, and can speak TLS to the others.
    let files = [
        authority.flag("peer-cert-file", "member.pem"),
        authority.flag("peer-key-file", "member.key"),
        authority.flag("peer-trusted-ca-file", "ca.pem"),
    ];
    for nth in 0..3 {
        let both = format!("--listen-peer-urls={},{}", plain[nth], secure[nth]);
        restart(&mut servers, nth, &urls, &[&[both], &files[..]].concat()).await;
        load.progress(50).await;
    }
    // 2: every member is known by its new URL.
    for nth in 0..3 {
        let mut client = servers[nth].client().await;
        let members = client.member_list().await.unwrap();
        let name = format!("m{nth}");
        let id = members.members().iter().find(|member| member.name() == name).unwrap().id();
        client.member_update(id, [secure[nth].clone()]).await.unwrap();
        load.progress(50).await;
    }
    // 3: no member accepts plain connections any more.
    for (nth, url) in secure.iter().enumerate() {
        let only = format!("--listen-peer-urls={url}");
        restart(&mut servers, nth, &urls, &[&[only], &files[..]].concat()).await;
        load.progress(50).await;
    }
    let writes = load.stop().await;
    for server in &servers {
        writes.assert_kept(server.client().await).await;
        let log = server.log();
        assert!(log.contains("\"secure\":true") && log.contains("\"plain\":false"), "{log}");
    }
}

/// Restarts a member with these flags, and waits until it has caught up.
async fn restart(servers: &mut [Server], nth: usize, urls: &Mutex<Vec<String>>, flags: &[String]) {
    servers[nth].stop();
    servers[nth].restart_with(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    urls.lock().unwrap()[nth] = servers[nth].url();
    let client = servers[nth].client().await;
    eventually_async("the member answers linearizable reads", time_limit(), async || {
        client.clone().get("any", None).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}
