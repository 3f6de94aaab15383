//! The HTTP endpoints of the peer port.

use metastore::proto::{
    etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseTimeToLiveRequest},
    leasepb::{LeaseInternalRequest, LeaseInternalResponse},
};
use prost::Message;

use super::{
    harness::Cluster,
    support::{HttpResponse, http},
};

struct Port(String);

impl Port {
    fn get(&self, path: &str) -> HttpResponse {
        http(&self.0, "GET", path, "", b"")
    }

    fn post(&self, path: &str, message: &impl Message) -> HttpResponse {
        http(&self.0, "POST", path, "", &message.encode_to_vec())
    }

    fn hash(&self, headers: &str, body: &str) -> HttpResponse {
        http(&self.0, "GET", "/members/hashkv", headers, body.as_bytes())
    }
}

fn port(cluster: &Cluster, nth: usize) -> Port {
    Port(cluster.servers[nth].peer_address())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_peer_port_answers_as_etcds_does() {
    let cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    cluster.client(leader).await.put("a", "1", None).await.unwrap();
    cluster.assert_all_equal().await;
    let cluster_id = format!("{:x}", cluster.status(0).await.unwrap().header.unwrap().cluster_id);
    let signature = format!("\r\nx-etcd-cluster-id: {cluster_id}\r\n");
    let port = port(&cluster, cluster.others(leader)[0]);
    let members = port.get("/members");
    assert!(members.status == 200 && members.head.contains(&signature), "{members:?}");
    assert!(members.head.contains("\r\ncontent-type: application/json\r\n"));
    let listed: Vec<serde_json::Value> = serde_json::from_str(&members.body).unwrap();
    let mut ids = cluster.ids.clone();
    ids.sort_unstable();
    assert_eq!(listed.iter().map(|member| member["id"].as_u64().unwrap()).collect::<Vec<_>>(), ids);
    let first = listed.iter().find(|member| member["id"] == cluster.ids[0]).unwrap();
    assert_eq!((first["name"].as_str(), first["peerURLs"][0].as_str()), (Some("m0"), Some(&*cluster.proxies[0].url())));
    assert_eq!(port.get("/version").body, cluster.servers[0].http("GET", "/version").body);
    let downgrade = port.get("/downgrade/enabled");
    assert_eq!((downgrade.status, downgrade.body.as_str()), (200, "false"));
    for path in ["/members", "/version", "/downgrade/enabled", "/members/hashkv"] {
        for method in ["POST", "DELETE"] {
            let page = http(&port.0, method, path, "", b"");
            assert_eq!((page.status, page.body.as_str()), (405, "Method Not Allowed\n"), "{method} {path}");
            assert!(page.head.contains("\r\nallow: get\r\n"));
        }
    }
    assert_eq!(port.get("/leases").status, 405);
    assert_eq!((port.get("/nothing").status, port.get("/nothing").body.as_str()), (404, "404 page not found\n"));
    let promotion = http(&port.0, "POST", "/members/promote/nobody", "", b"");
    assert_eq!((promotion.status, promotion.body.as_str()), (404, "member nobody not found in cluster\n"));
    cluster.assert_all_equal().await;
}

/// KV-48: a request names its cluster, and a member of another cluster returns no hash that could be compared.
#[tokio::test(flavor = "multi_thread")]
async fn hashes_are_refused_to_other_clusters() {
    let cluster = Cluster::bootstrap(1, &[]);
    let mut client = cluster.client(0).await;
    client.put("a", "1", None).await.unwrap();
    client.put("a", "2", None).await.unwrap();
    let cluster_id = cluster.status(0).await.unwrap().header.unwrap().cluster_id;
    let port = port(&cluster, 0);
    let own = format!("X-Etcd-Cluster-ID: {cluster_id:x}\r\n");
    let answer = port.hash(&own, r#"{"revision":2}"#);
    assert_eq!(answer.status, 200);
    let request = metastore::proto::etcdserverpb::HashKvRequest { revision: 2 };
    let expected = cluster.servers[0].maintenance().await.hash_kv(request).await.unwrap().into_inner();
    let text =
        format!(r#"{{"header":{{"revision":3}},"hash":{},"compact_revision":-1,"hash_revision":2}}"#, expected.hash);
    assert_eq!(answer.body, text);
    assert_eq!(port.hash("", "{}").status, 200, "a request that names no cluster is answered");
    let other = port.hash("X-Etcd-Cluster-ID: 1\r\n", "{}");
    assert_eq!((other.status, other.body.as_str()), (412, "cluster ID mismatch\n"));
    client.compact(3, None).await.unwrap();
    for (body, answer) in [
        (r#"{"revision":2}"#, "mvcc: required revision has been compacted\n"),
        (r#"{"revision":9}"#, "mvcc: required revision is a future revision\n"),
        ("nonsense", "error unmarshalling request\n"),
        ("", "error unmarshalling request\n"),
    ] {
        let page = port.hash(&own, body);
        assert_eq!((page.status, page.body.as_str()), (400, answer), "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_leader_renews_leases_for_other_members() {
    let cluster = Cluster::bootstrap(3, &[]);
    let leader = cluster.leader().await;
    let options = etcd_client::LeaseGrantOptions::new().with_id(7);
    cluster.client(leader).await.lease_grant(30, Some(options)).await.unwrap();
    let (first, follower) = (port(&cluster, leader), port(&cluster, cluster.others(leader)[0]));
    let look =
        |id| LeaseInternalRequest { lease_time_to_live_request: Some(LeaseTimeToLiveRequest { id, keys: false }) };
    let renewed = first.post("/leases", &LeaseKeepAliveRequest { id: 7 });
    let expected = LeaseKeepAliveResponse { header: None, id: 7, ttl: 30 };
    assert_eq!((renewed.status, renewed.body.as_bytes()), (200, expected.encode_to_vec().as_slice()));
    let found = first.post("/leases/internal", &look(7));
    let found = LeaseInternalResponse::decode(found.body.as_bytes()).unwrap().lease_time_to_live_response.unwrap();
    assert!(found.header.is_some() && found.granted_ttl == 30 && (28..=30).contains(&found.ttl), "{found:?}");
    for path in ["/leases", "/leases/internal"] {
        let page = if path == "/leases" {
            first.post(path, &LeaseKeepAliveRequest { id: 8 })
        } else {
            first.post(path, &look(8))
        };
        assert_eq!((page.status, page.body.as_str()), (404, "lease not found\n"), "{path}");
        assert_eq!(http(&first.0, "POST", path, "", b"\xff").status, 400);
        assert_eq!(http(&first.0, "POST", path, "", &vec![0; (64 << 10) + 1]).status, 413);
    }
    let refused = follower.post("/leases", &LeaseKeepAliveRequest { id: 7 });
    assert_eq!((refused.status, refused.body.as_str()), (400, "not a primary lessor\n"));
    let refused = follower.post("/leases/internal", &look(7));
    assert_eq!((refused.status, refused.body.as_str()), (500, "not a primary lessor\n"));
    cluster.assert_all_equal().await;
}
