//! Maintenance of one member.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use etcd_client::{AlarmAction, AlarmType, Client, CompactionOptions, GetOptions};
use metastore::proto::etcdserverpb::{
    AlarmRequest, DefragmentRequest, MemberListRequest, MoveLeaderRequest, PutRequest, StatusRequest,
};
use tokio::task::JoinSet;
use tonic::Code;

use crate::support::{Server, assert_refused, eventually_async, scaled, time_limit};

/// KV-41 and WATCH-19.
#[tokio::test]
async fn status_describes_a_member() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    kv.put(PutRequest { key: "a".into(), ..PutRequest::default() }).await.unwrap();
    let mut maintenance = server.maintenance().await;
    let status = maintenance.status(StatusRequest {}).await.unwrap().into_inner();
    let header = status.header.unwrap();
    assert_eq!((status.version.as_str(), status.storage_version.as_str()), ("3.7.3", "3.7.0"));
    assert_eq!((header.revision, status.leader), (2, header.member_id));
    assert_eq!((status.raft_term, header.raft_term), (2, 2));
    assert!(status.raft_applied_index > 0 && status.raft_applied_index <= status.raft_index);
    assert_eq!(status.db_size_quota, 2_147_483_648, "the default is shown");
    assert!(status.db_size_in_use <= status.db_size);
    assert_eq!((status.errors.len(), status.is_learner), (0, false));
    let downgrade = status.downgrade_info.expect("it is always set");
    assert!(!downgrade.enabled && downgrade.target_version.is_empty());
}

#[tokio::test]
async fn a_disabled_quota_is_shown_as_given() {
    let server = Server::start(&["--quota-backend-bytes=-1"]);
    let status = server.maintenance().await.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.db_size_quota, -1);
}

/// KV-34.
#[tokio::test]
async fn alarms_are_raised_listed_and_cleared_one_by_one() {
    let mut server = Server::start(&[]);
    let mut maintenance = server.maintenance().await;
    let request = |action, member_id, alarm| AlarmRequest { action, member_id, alarm };
    for raised in [request(1, 5, 1), request(1, 9, 7), request(1, 5, 0)] {
        maintenance.alarm(raised).await.unwrap();
    }
    let status = maintenance.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.errors, ["memberID:5 alarm:NOSPACE", "memberID:9 alarm:7"]);
    let cleared = maintenance.alarm(request(2, 0, 1)).await.unwrap().into_inner();
    assert!(cleared.alarms.is_empty(), "no wildcard");
    server.kill();
    server.restart();
    let mut maintenance = server.maintenance().await;
    let all = maintenance.alarm(request(0, 0, 0)).await.unwrap().into_inner();
    assert_eq!((all.alarms.len(), all.header.unwrap().revision), (2, 1));
    let cleared = maintenance.alarm(request(2, 5, 1)).await.unwrap().into_inner();
    assert_eq!(cleared.alarms.len(), 1);
    let unknown = maintenance.alarm(request(3, 0, 0)).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unknown, "etcd crashes; we answer: {unknown}");
    let mut client = server.client().await;
    let left = client.alarm(AlarmAction::Get, AlarmType::Nospace, None).await.unwrap();
    assert!(left.alarms().is_empty());
}

/// KV-33.
#[tokio::test]
async fn the_corrupt_alarm_blocks_writes_but_not_reads() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    client.put("a", "1", None).await.unwrap();
    let mut maintenance = server.maintenance().await;
    maintenance.alarm(AlarmRequest { action: 1, member_id: 5, alarm: 2 }).await.unwrap();
    let mut kv = server.kv().await;
    let put = PutRequest { key: "a".into(), ..PutRequest::default() };
    assert_refused(kv.put(put).await, Code::DataLoss, "etcdserver: corrupt cluster");
    assert!(client.delete("a", None).await.is_err());
    assert!(client.compact(2, None).await.is_err());
    assert_eq!(client.get("a", None).await.unwrap().count(), 1);
    let read = etcd_client::Txn::new().and_then([etcd_client::TxnOp::get("a", None)]);
    assert!(client.txn(read).await.unwrap().succeeded());
    client.hash_kv(0).await.unwrap();
    client.defragment().await.unwrap();
}

#[tokio::test]
async fn a_sole_member_leads_and_is_listed() {
    let server = Server::start(&[]);
    let answer =
        server.cluster().await.member_list(MemberListRequest { linearizable: true }).await.unwrap().into_inner();
    let header = answer.header.unwrap();
    assert_eq!(header.revision, 0, "no revision in headers of this service");
    let [member] = answer.members.as_slice() else { panic!("{:?}", answer.members) };
    assert_eq!((member.id, member.name.as_str(), member.is_learner), (header.member_id, "one", false));
    assert_eq!(member.peer_ur_ls, ["http://127.0.0.1:2380"]);
    assert_eq!(member.client_ur_ls, ["http://127.0.0.1:2379"]);
    let mut maintenance = server.maintenance().await;
    let to_itself = maintenance.move_leader(MoveLeaderRequest { target_id: member.id }).await.unwrap();
    assert_eq!(to_itself.into_inner().header, None);
    let to_unknown = maintenance.move_leader(MoveLeaderRequest { target_id: 404 }).await;
    assert_refused(to_unknown, Code::FailedPrecondition, "etcdserver: bad leader transferee");
    let defragmented = maintenance.defragment(DefragmentRequest {}).await.unwrap();
    assert_eq!(defragmented.into_inner().header, None);
}

/// Clients that read and write while something else happens, and what they observe.
#[derive(Default)]
struct Traffic {
    stop: AtomicBool,
    rounds: AtomicUsize,
    worst: Mutex<Duration>,
}

impl Traffic {
    /// Puts a key and reads it back until `stop` is set. Returns the number of rounds.
    async fn drive(self: Arc<Self>, mut client: Client, key: String) -> usize {
        for round in 0.. {
            if self.stop.load(Ordering::Relaxed) {
                return round;
            }
            let begun = Instant::now();
            client.put(&*key, round.to_string(), None).await.unwrap();
            let got = client.get(&*key, None).await.unwrap();
            assert_eq!(got.kvs()[0].value_str().unwrap(), round.to_string());
            let mut worst = self.worst.lock().unwrap();
            *worst = begun.elapsed().max(*worst);
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        unreachable!()
    }
}

/// Requests do not wait while files are rewritten.
#[tokio::test]
async fn reads_and_writes_continue_during_a_defragmentation() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for nth in 0..600 {
        let noise: Vec<u8> = (0..8192).map(|_| rand::random()).collect();
        client.put(format!("old{:03}", nth % 200), noise, None).await.unwrap();
    }
    client.compact(601, Some(CompactionOptions::new().with_physical())).await.unwrap();
    let before = client.status().await.unwrap().db_size();

    let traffic = Arc::new(Traffic::default());
    let mut tasks = JoinSet::new();
    for nth in 0..4 {
        tasks.spawn(traffic.clone().drive(server.client().await, format!("new{nth}")));
    }
    let mut overlapping = 0;
    eventually_async("requests complete while files are rewritten", time_limit(), async || {
        let rounds = traffic.rounds.load(Ordering::Relaxed);
        client.defragment().await.unwrap();
        overlapping += usize::from(traffic.rounds.load(Ordering::Relaxed) > rounds + 4);
        if overlapping == 5 { Ok(()) } else { Err(format!("{overlapping} defragmentations with requests")) }
    })
    .await;
    traffic.stop.store(true, Ordering::Relaxed);
    assert!(tasks.join_all().await.iter().all(|&rounds| rounds > 0));
    let worst = *traffic.worst.lock().unwrap();
    assert!(worst < scaled(Duration::from_secs(5)), "a request waited {worst:?}");
    let head = client.put("end", "", None).await.unwrap().header().unwrap().revision();
    client.compact(head, Some(CompactionOptions::new().with_physical())).await.unwrap();
    client.defragment().await.unwrap();
    let after = client.status().await.unwrap().db_size();
    assert!(after < before, "{before} bytes became {after}");
    let left = client.get("old", Some(GetOptions::new().with_prefix().with_count_only())).await.unwrap();
    assert_eq!(left.count(), 200);
}
