//! Elections.

use etcd_client::{CampaignResponse, Client, Error, LeaderKey, LeaderResponse, ProclaimOptions, ResignOptions};
use metastore::proto::v3electionpb::{ProclaimRequest, ResignRequest, election_client::ElectionClient};
use tokio::task::JoinHandle;

use super::{
    assert_unknown, grant, keys_below,
    support::{Server, assert_refused},
    wait_for_keys, wait_for_watches,
};

/// Starts a campaign, and returns once its key exists.
async fn campaign_in_background(
    server: &Server,
    name: &'static str,
    value: &'static str,
    lease: i64,
) -> JoinHandle<Result<CampaignResponse, Error>> {
    let mut client = server.client().await;
    let mut expected = keys_below(&mut client, name).await;
    expected.push(format!("{name}/{lease:x}"));
    let mut waiting = client.clone();
    let task = tokio::spawn(async move { waiting.campaign(name, value, lease).await });
    wait_for_keys(&mut client, name, &expected.iter().map(String::as_str).collect::<Vec<_>>()).await;
    task
}

async fn proclaim(client: &mut Client, leader: &LeaderKey, value: &str) -> Result<(), Error> {
    client.proclaim(value, Some(ProclaimOptions::new().with_leader(leader.clone()))).await.map(drop)
}

/// Key, value, revision of the header.
fn key_value_revision(response: &LeaderResponse) -> (&str, &str, i64) {
    let kv = response.kv().unwrap();
    (kv.key_str().unwrap(), kv.value_str().unwrap(), response.header().unwrap().revision())
}

#[tokio::test]
async fn the_first_candidate_leads_until_it_resigns_or_its_lease_ends() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for lease in [1, 2, 3] {
        grant(&mut client, lease).await;
    }
    assert_unknown(client.leader("e").await, "election: no leader");
    let first = client.campaign("e", "one", 1).await.unwrap();
    let leader = first.leader().unwrap().clone();
    assert_eq!((leader.name(), leader.key(), leader.rev(), leader.lease()), (&b"e"[..], &b"e/1"[..], 2, 1));
    let second = campaign_in_background(&server, "e", "two", 2).await;
    let third = campaign_in_background(&server, "e", "three", 3).await;
    assert_eq!(key_value_revision(&client.leader("e").await.unwrap()), ("e/1", "one", 4));
    client.resign(Some(ResignOptions::new().with_leader(leader.clone()))).await.unwrap();
    let second = second.await.unwrap().unwrap();
    assert_eq!(
        (second.header().unwrap().revision(), second.leader().unwrap().rev()),
        (3, 3),
        "the revision at which it campaigned"
    );
    assert!(!third.is_finished());
    client.resign(Some(ResignOptions::new().with_leader(leader))).await.unwrap();
    client.lease_revoke(2).await.unwrap();
    third.await.unwrap().unwrap();
    assert_eq!(key_value_revision(&client.leader("e").await.unwrap()), ("e/3", "three", 6));
    wait_for_watches(&server, 0).await;
}

#[tokio::test]
async fn a_repeated_campaign_keeps_its_key_and_replaces_the_value() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    let first = client.campaign("e", "one", 1).await.unwrap();
    let again = client.campaign("e", "one", 1).await.unwrap();
    assert_eq!((again.leader().unwrap().rev(), again.header().unwrap().revision()), (2, 2));
    let again = client.campaign("e", "other", 1).await.unwrap();
    assert_eq!(again.leader().unwrap().rev(), first.leader().unwrap().rev());
    assert_eq!(again.header().unwrap().revision(), 2, "the header precedes the new value");
    assert_eq!(key_value_revision(&client.leader("e").await.unwrap()), ("e/1", "other", 3));
}

#[tokio::test]
async fn only_the_leader_can_proclaim() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    let first = client.campaign("e", "one", 1).await.unwrap();
    let leader = first.leader().unwrap().clone();
    proclaim(&mut client, &leader, "two").await.unwrap();
    assert_eq!(key_value_revision(&client.leader("e").await.unwrap()), ("e/1", "two", 3));
    let other = LeaderKey::new().with_name("e").with_key("e/1").with_rev(3).with_lease(1);
    assert_unknown(proclaim(&mut client, &other, "three").await, "election: not leader");
    let dead = leader.clone().with_lease(404);
    assert_unknown(proclaim(&mut client, &dead, "three").await, "etcdserver: requested lease not found");
    proclaim(&mut client, &leader.with_lease(0), "three").await.unwrap();
    let lease = client.leader("e").await.unwrap().kv().unwrap().lease();
    assert_eq!(client.lease_time_to_live(lease, None).await.unwrap().granted_ttl(), 60, "the key has a new lease");
}

#[tokio::test]
async fn the_leader_field_is_required() {
    let server = Server::start(&[]);
    let mut client = ElectionClient::new(server.channel().await);
    let text = "\"leader\" field must be provided";
    assert_refused(client.proclaim(ProclaimRequest::default()).await, tonic::Code::Unknown, text);
    assert_refused(client.resign(ResignRequest::default()).await, tonic::Code::Unknown, text);
}

#[tokio::test]
async fn a_cancelled_campaign_leaves_no_key_behind() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    grant(&mut client, 2).await;
    client.campaign("e", "one", 1).await.unwrap();
    campaign_in_background(&server, "e", "two", 2).await.abort();
    wait_for_keys(&mut client, "e", &["e/1"]).await;
    wait_for_watches(&server, 0).await;
}

/// CONCURRENCY-18.
#[tokio::test]
async fn a_candidate_whose_lease_is_lost_wins_with_a_missing_key() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    grant(&mut client, 1).await;
    grant(&mut client, 2).await;
    client.campaign("e", "one", 1).await.unwrap();
    let second = campaign_in_background(&server, "e", "two", 2).await;
    client.lease_revoke(2).await.unwrap();
    client.lease_revoke(1).await.unwrap();
    assert_eq!(second.await.unwrap().unwrap().leader().unwrap().key(), b"e/2");
    assert_unknown(client.leader("e").await, "election: no leader");
}

#[tokio::test]
async fn observers_receive_every_leader_and_every_proclaimed_value() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for lease in [1, 2, 3] {
        grant(&mut client, lease).await;
    }
    let mut early = server.client().await;
    let early = tokio::spawn(async move {
        let mut stream = early.observe("e").await.unwrap();
        let mut received = Vec::new();
        for _ in 0..22 {
            let response = stream.message().await.unwrap().unwrap();
            let (key, value, _) = key_value_revision(&response);
            received.push(format!("{key} {value}"));
        }
        received
    });
    wait_for_watches(&server, 1).await;
    let leader = client.campaign("e", "0", 1).await.unwrap().leader().unwrap().clone();
    let mut late = client.observe("e").await.unwrap();
    assert_eq!(key_value_revision(&late.message().await.unwrap().unwrap()), ("e/1", "0", 2));
    for value in 1..=20 {
        proclaim(&mut client, &leader, &value.to_string()).await.unwrap();
        let received = late.message().await.unwrap().unwrap();
        assert_eq!(key_value_revision(&received), ("e/1", value.to_string().as_str(), 2 + value));
    }
    let second = campaign_in_background(&server, "e", "next", 2).await;
    client.resign(Some(ResignOptions::new().with_leader(leader))).await.unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(key_value_revision(&late.message().await.unwrap().unwrap()), ("e/2", "next", 24));
    let mut expected: Vec<String> = (0..=20).map(|value| format!("e/1 {value}")).collect();
    expected.push("e/2 next".to_owned());
    assert_eq!(early.await.unwrap(), expected);
    // A compaction does not affect an observer that has received the compacted revisions.
    client.compact(24, None).await.unwrap();
    client.lease_revoke(2).await.unwrap();
    client.campaign("e", "last", 3).await.unwrap();
    assert_eq!(key_value_revision(&late.message().await.unwrap().unwrap()), ("e/3", "last", 26));
}
