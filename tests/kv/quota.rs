//! Exceeding the quota, and recovering from it.

use etcd_client::{AlarmAction, AlarmType, CompactionOptions, PutOptions};
use metastore::{
    node::quota::Quota,
    proto::etcdserverpb::{PutRequest, TxnRequest},
};
use tonic::Code;

use crate::support::{Server, assert_refused, eventually_async, time_limit};

const QUOTA: i64 = 8 << 20;
const VALUE_BYTES: usize = 64 << 10;

/// KV-31 and KV-32: full, then compacted, defragmented, disarmed, and usable again.
#[tokio::test]
async fn a_member_over_quota_refuses_puts_until_space_is_reclaimed_and_the_alarm_disarmed() {
    let server = Server::start(&[&format!("--quota-backend-bytes={QUOTA}")]);
    let mut client = server.client().await;
    let mut kv = server.kv().await;
    let put = || PutRequest { key: "full".into(), value: vec![b'v'; VALUE_BYTES].into(), ..PutRequest::default() };
    let refusal = eventually_async("a put is refused", time_limit(), async || kv.put(put()).await.err()).await;
    assert_eq!(refusal.code(), Code::ResourceExhausted);
    assert_eq!(refusal.message(), "etcdserver: mvcc: database space exceeded");
    let status = client.status().await.unwrap();
    assert!(status.db_size() + i64::try_from(VALUE_BYTES).unwrap() >= QUOTA, "{}", status.db_size());
    assert_eq!(status.db_size_quota(), QUOTA);
    assert_eq!(status.errors().len(), 1);
    assert_eq!(server.http("GET", "/health").status, 503);

    // Even small puts are refused: the alarm stays active although this member has space for a few bytes.
    assert!(client.put("a", "", Some(PutOptions::new())).await.is_err());
    let empty = kv.txn(TxnRequest::default()).await.unwrap().into_inner();
    let head = empty.header.unwrap().revision;
    client.delete("nothing", None).await.expect("deletions are free");

    client.compact(head, Some(CompactionOptions::new().with_physical())).await.unwrap();
    client.defragment().await.unwrap();
    let status = client.status().await.unwrap();
    assert!(status.db_size() < QUOTA / 2, "{} bytes are left", status.db_size());
    assert_refused(kv.put(put()).await, Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");

    let alarms = client.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap();
    let member = alarms.alarms()[0].member_id();
    let mut options = etcd_client::AlarmOptions::new();
    options.with_member(member);
    client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(options)).await.unwrap();
    kv.put(put()).await.expect("the quota admits puts again");
    assert_eq!(server.http("GET", "/health").status, 200);
}

/// A request that is both over quota and invalid fails because of the quota.
#[tokio::test]
async fn the_quota_is_checked_before_the_request() {
    let server = Server::start(&["--quota-backend-bytes=1"]);
    let mut kv = server.kv().await;
    let nothing = PutRequest::default();
    assert_refused(kv.put(nothing).await, Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
    let errors = server.client().await.status().await.unwrap();
    assert!(errors.errors()[0].ends_with("alarm:NOSPACE"), "{:?}", errors.errors());
}

/// KV-31: a request that would fill the quota exactly is refused. A request that costs nothing is always admitted.
#[test]
fn a_request_that_meets_the_quota_exactly_is_refused() {
    let quota = Quota { bytes: 100 };
    assert!(quota.admits(10, 89));
    assert!(!quota.admits(10, 90));
    assert!(quota.admits(0, 1000));
    assert!(Quota { bytes: -1 }.admits(10, 1000), "a negative quota is no limit");
}
