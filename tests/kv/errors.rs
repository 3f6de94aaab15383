//! Every error that one member can be made to return, with etcd's code and message. (The table of all errors is tested next to
//! it, in `frontend/grpc/status.rs`.)

use metastore::proto::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, HashKvRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    request_op::Request,
};
use prost::Message;
use tonic::{Code, metadata::AsciiMetadataValue};

use crate::support::{Server, assert_refused};

const EMPTY_KEY: &str = "etcdserver: key is not provided";
const KEY_NOT_FOUND: &str = "etcdserver: key not found";
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
const FUTURE_REV: &str = "etcdserver: mvcc: required revision is a future revision";

fn put(key: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), ..PutRequest::default() }
}

fn range(key: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), ..RangeRequest::default() }
}

fn txn(ops: Vec<Request>) -> TxnRequest {
    let success = ops.into_iter().map(|request| RequestOp { request: Some(request) }).collect();
    TxnRequest { success, ..TxnRequest::default() }
}

/// A stream's first message. A stream that fails at once may fail before or after its response headers.
async fn first<T>(
    opened: Result<tonic::Response<tonic::Streaming<T>>, tonic::Status>,
) -> Result<Option<T>, tonic::Status> {
    opened?.into_inner().message().await
}

#[tokio::test]
async fn requests_without_a_key_are_refused() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    let refused = Code::InvalidArgument;
    assert_refused(kv.range(range("")).await, refused, EMPTY_KEY);
    assert_refused(first(kv.range_stream(range("")).await).await, refused, EMPTY_KEY);
    assert_refused(kv.put(put("")).await, refused, EMPTY_KEY);
    assert_refused(kv.delete_range(DeleteRangeRequest::default()).await, refused, EMPTY_KEY);
    assert_refused(kv.txn(txn(vec![Request::RequestPut(put(""))])).await, refused, EMPTY_KEY);
    let compare = TxnRequest { compare: vec![Compare::default()], ..TxnRequest::default() };
    assert_refused(kv.txn(compare).await, refused, EMPTY_KEY);
}

/// KV-26 and KV-28.
#[tokio::test]
async fn contradictions_in_a_request_are_refused() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    let refused = Code::InvalidArgument;
    for (ignore_value, ignore_lease) in [(true, false), (false, true), (true, true)] {
        assert_refused(kv.put(PutRequest { ignore_value, ignore_lease, ..put("a") }).await, refused, KEY_NOT_FOUND);
    }
    kv.put(put("a")).await.unwrap();
    let value = PutRequest { ignore_value: true, value: "1".into(), ..put("a") };
    assert_refused(kv.put(value).await, refused, "etcdserver: value is provided");
    let lease = PutRequest { ignore_lease: true, lease: 7, ..put("a") };
    assert_refused(kv.put(lease).await, refused, "etcdserver: lease is provided");
    let missing = PutRequest { lease: 404, ..put("a") };
    assert_refused(kv.put(missing).await, Code::NotFound, "etcdserver: requested lease not found");
    let unset = TxnRequest { failure: vec![RequestOp { request: None }], ..TxnRequest::default() };
    assert_refused(kv.txn(unset).await, refused, KEY_NOT_FOUND);
}

/// KV-27.
#[tokio::test]
async fn invalid_sort_options_are_refused() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    for (sort_order, sort_target) in [(3, 0), (0, 5), (-1, 0), (1, i32::MAX)] {
        let request = RangeRequest { sort_order, sort_target, ..range("a") };
        assert_refused(kv.range(request.clone()).await, Code::InvalidArgument, "etcdserver: invalid sort option");
        let in_txn = txn(vec![Request::RequestRange(request)]);
        assert_refused(kv.txn(in_txn).await, Code::InvalidArgument, "etcdserver: invalid sort option");
    }
}

/// KV-23, KV-24 and KV-53, as far as one server shows them; unit tests of the validation cover the rest.
#[tokio::test]
async fn transactions_that_are_too_large_or_write_twice_are_refused() {
    let server = Server::start(&["--max-txn-ops", "4"]);
    let mut kv = server.kv().await;
    let puts = |count: usize| (0..count).map(|nth| Request::RequestPut(put(&nth.to_string()))).collect::<Vec<_>>();
    kv.txn(txn(puts(4))).await.unwrap();
    let too_many = "etcdserver: too many operations in txn request";
    assert_refused(kv.txn(txn(puts(5))).await, Code::InvalidArgument, too_many);
    kv.txn(txn(vec![Request::RequestTxn(txn(puts(3)))])).await.unwrap();
    assert_refused(kv.txn(txn(vec![Request::RequestTxn(txn(puts(4)))])).await, Code::InvalidArgument, too_many);
    let twice = vec![Request::RequestPut(put("a")), Request::RequestPut(put("a"))];
    let duplicate = "etcdserver: duplicate key given in txn request";
    assert_refused(kv.txn(txn(twice)).await, Code::InvalidArgument, duplicate);
    let delete = DeleteRangeRequest { key: "a".into(), range_end: "\0".into(), prev_kv: false };
    let quirk = vec![Request::RequestDeleteRange(delete), Request::RequestPut(put("a"))];
    kv.txn(txn(quirk)).await.unwrap();
    assert_eq!(kv.range(range("a")).await.unwrap().into_inner().count, 1);
}

#[tokio::test]
async fn compacted_and_future_revisions_are_refused() {
    let server = Server::start(&[]);
    let (mut kv, mut maintenance) = (server.kv().await, server.maintenance().await);
    for _ in 0..4 {
        kv.put(put("a")).await.unwrap();
    }
    let compact = |revision| CompactionRequest { revision, physical: false };
    assert_refused(kv.compact(compact(6)).await, Code::OutOfRange, FUTURE_REV);
    assert_refused(kv.compact(compact(-1)).await, Code::OutOfRange, COMPACTED);
    kv.compact(compact(0)).await.expect("KV-10: once");
    assert_refused(kv.compact(compact(0)).await, Code::OutOfRange, COMPACTED);
    kv.compact(compact(4)).await.unwrap();
    let at = |revision| RangeRequest { revision, ..range("a") };
    assert_refused(kv.range(at(3)).await, Code::OutOfRange, COMPACTED);
    assert_refused(kv.range(at(6)).await, Code::OutOfRange, FUTURE_REV);
    // KV-9: a transaction takes a negative revision literally, whether it only reads or not.
    kv.range(at(-1)).await.unwrap();
    let in_txn = |revision| txn(vec![Request::RequestRange(at(revision))]);
    assert_refused(kv.txn(in_txn(-1)).await, Code::OutOfRange, COMPACTED);
    assert_refused(kv.txn(in_txn(6)).await, Code::OutOfRange, FUTURE_REV);
    assert_refused(kv.txn(txn(vec![Request::RequestTxn(in_txn(3))])).await, Code::OutOfRange, COMPACTED);
    assert_refused(first(kv.range_stream(at(3)).await).await, Code::OutOfRange, COMPACTED);
    let hash = |revision| HashKvRequest { revision };
    assert_refused(maintenance.hash_kv(hash(3)).await, Code::OutOfRange, COMPACTED);
    assert_refused(maintenance.hash_kv(hash(6)).await, Code::OutOfRange, FUTURE_REV);
    maintenance.hash_kv(hash(4)).await.expect("KV-8: at the compact revision there is a hash");
}

/// KV-30: the limit applies to the log entry (17 or 18 bytes around an encoded Put); a message may be 512 KiB larger.
#[tokio::test]
async fn requests_that_are_too_large_are_refused() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    // A one-byte key and a value whose length takes three bytes: together 7 bytes more than the value.
    let sized = |bytes: usize| PutRequest { value: vec![b'x'; bytes - 7].into(), ..put("a") };
    let limit = 1_572_864;
    assert_eq!(sized(limit).encoded_len(), limit);
    kv.put(sized(limit - 18)).await.unwrap();
    let too_large = "etcdserver: request is too large";
    assert_refused(kv.put(sized(limit - 16)).await, Code::InvalidArgument, too_large);
    let message_limit = limit + (512 << 10);
    assert_refused(
        kv.put(PutRequest { value: vec![b'x'; message_limit - 7].into(), ..put("a") }).await,
        Code::InvalidArgument,
        too_large,
    );
    let too_long = "grpc: received message larger than max (2097153 vs. 2097152)";
    assert_refused(
        kv.put(PutRequest { value: vec![b'x'; message_limit - 6].into(), ..put("a") }).await,
        Code::ResourceExhausted,
        too_long,
    );
}

#[tokio::test]
async fn request_metadata_is_checked() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    let mut request = tonic::Request::new(range("a"));
    let version = AsciiMetadataValue::try_from(&b"\xff"[..]).unwrap();
    request.metadata_mut().insert("client-api-version", version);
    assert_refused(kv.range(request).await, Code::InvalidArgument, "etcdserver: invalid client api version");
    let mut request = tonic::Request::new(range("a"));
    request.metadata_mut().insert("client-api-version", "3.7".parse().unwrap());
    request.metadata_mut().insert("hasleader", "true".parse().unwrap());
    kv.range(request).await.unwrap();
}

#[tokio::test]
async fn unsupported_options_of_a_range_stream_are_refused() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    let whole = || RangeRequest { range_end: "\0".into(), ..range("\0") };
    let orders = "RangeStream does not support custom sort orders";
    let filters = "RangeStream does not support revision filters";
    for (request, code, message) in [
        (RangeRequest { sort_order: 2, ..whole() }, Code::Unimplemented, orders),
        (RangeRequest { sort_order: 1, sort_target: 3, ..whole() }, Code::Unimplemented, orders),
        (RangeRequest { min_mod_revision: 1, ..whole() }, Code::Unimplemented, filters),
        (RangeRequest { max_create_revision: -1, ..whole() }, Code::Unimplemented, filters),
        (RangeRequest { sort_order: 9, ..whole() }, Code::InvalidArgument, "etcdserver: invalid sort option"),
        (RangeRequest { revision: 99, ..whole() }, Code::OutOfRange, FUTURE_REV),
    ] {
        assert_refused(first(kv.range_stream(request).await).await, code, message);
    }
    for accepted in [RangeRequest { sort_order: 1, ..whole() }, RangeRequest { sort_target: 4, ..whole() }] {
        assert!(first(kv.range_stream(accepted).await).await.unwrap().is_some());
    }
}
