//! A long Range during writes and compactions: it reads one consistent view, and it does not block writers.
//!
//! That it does not block writers can only be shown with lists that take much longer than a sync of the log. When a list
//! begins, each writer has one write in flight, which may be acknowledged during the list even if the list blocks all later
//! writes. So only writes beyond those count. A list of 20,000 keys takes 5 to 30 ms, which may be no more than one or two
//! syncs: many such lists test consistency. A list of 100,000 keys takes 80 ms or more, and ten times as many writes as would
//! prove nothing are acknowledged during it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use metastore::proto::{
    etcdserverpb::{
        CompactionRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, kv_client::KvClient,
        request_op::Request,
    },
    mvccpb::KeyValue,
};
use tonic::{Code, transport::Channel};

use crate::support::Server;

const WRITERS: u64 = 8;

/// A transaction that puts the same value to key `nth` and to its counterpart, counted from the other end.
fn pair(keys: u64, nth: u64, value: &str) -> TxnRequest {
    let put = |nth: u64| {
        let request =
            PutRequest { key: format!("{nth:08}").into(), value: value.to_owned().into(), ..Default::default() };
        RequestOp { request: Some(Request::RequestPut(request)) }
    };
    TxnRequest { success: vec![put(nth), put(keys - 1 - nth)], ..TxnRequest::default() }
}

async fn load(kv: &mut KvClient<Channel>, keys: u64) {
    let pairs: Vec<u64> = (0..keys / 2).collect();
    for some in pairs.chunks(64) {
        let success = some.iter().flat_map(|&nth| pair(keys, nth, "0").success).collect();
        kv.txn(TxnRequest { success, ..TxnRequest::default() }).await.unwrap();
    }
}

/// Writes pairs until `stop` is set; counts the acknowledged writes.
async fn write(mut kv: KvClient<Channel>, keys: u64, writer: u64, written: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let nth = (writer * 7919 + turn * 104_729) % (keys / 2);
        kv.txn(pair(keys, nth, &format!("{writer}/{turn}"))).await.unwrap();
        written.fetch_add(1, Ordering::Relaxed);
    }
}

/// Compacts at the current revision over and over.
async fn compact(mut kv: KvClient<Channel>, stop: Arc<AtomicBool>) -> u32 {
    let mut compactions = 0;
    while !stop.load(Ordering::Relaxed) {
        let here = kv.range(RangeRequest { key: "x".into(), ..RangeRequest::default() }).await.unwrap();
        let revision = here.into_inner().header.unwrap().revision;
        match kv.compact(CompactionRequest { revision, physical: compactions % 2 == 0 }).await {
            Ok(_) => compactions += 1,
            Err(status) => assert_eq!(status.code(), Code::OutOfRange, "no write happened in between: {status}"),
        }
    }
    compactions
}

/// Asserts that a list is a consistent view: all keys, none newer than the header's revision, and no half of a transaction.
fn check(keys: u64, list: &RangeResponse) {
    let revision = list.header.as_ref().unwrap().revision;
    assert_eq!((list.count.cast_unsigned(), list.kvs.len() as u64, list.more), (keys, keys, false));
    assert!(list.kvs.is_sorted_by(|a, b| a.key < b.key));
    let newest = list.kvs.iter().map(|kv| kv.mod_revision).max().unwrap();
    assert!(newest <= revision, "{newest} is newer than {revision}");
    let half = list.kvs.len() / 2;
    let same = |(a, b): (&KeyValue, &KeyValue)| a.value == b.value && a.mod_revision == b.mod_revision;
    assert!(list.kvs[..half].iter().zip(list.kvs.iter().rev()).all(same), "only half of a transaction is visible");
}

/// A list through RangeStream; `None` if a compaction overtook it.
async fn stream(kv: &mut KvClient<Channel>) -> Option<RangeResponse> {
    let whole = RangeRequest { key: "0".into(), range_end: "1".into(), ..RangeRequest::default() };
    let mut chunks = kv.range_stream(whole).await.unwrap().into_inner();
    let mut all = RangeResponse::default();
    loop {
        match chunks.message().await {
            Ok(Some(chunk)) => {
                let chunk = chunk.range_response.unwrap();
                all.kvs.extend(chunk.kvs);
                (all.header, all.count, all.more) = (chunk.header, chunk.count, chunk.more);
            }
            Ok(None) => return Some(all),
            Err(status) => {
                assert_eq!(status.code(), Code::OutOfRange, "{status}");
                return None;
            }
        }
    }
}

/// Lists repeatedly; returns how many writes were acknowledged during the lists.
async fn lists_during_writes(keys: u64, lists: usize) -> u64 {
    let server = Server::start(&["--compaction-sleep-interval", "1ms"]);
    let mut kv = server.kv().await;
    load(&mut kv, keys).await;
    let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        writers.push(tokio::spawn(write(server.kv().await, keys, writer, written.clone(), stop.clone())));
    }
    let compactor = tokio::spawn(compact(server.kv().await, stop.clone()));
    let whole = RangeRequest { key: "0".into(), range_end: "1".into(), ..RangeRequest::default() };
    let (mut revision, mut during, mut streamed) = (0, 0, 0);
    for nth in 0..lists {
        let before = written.load(Ordering::Relaxed);
        let list = if nth % 3 == 2 { stream(&mut kv).await } else { None };
        streamed += usize::from(list.is_some());
        let list = match list {
            Some(list) => list,
            None => kv.range(whole.clone()).await.unwrap().into_inner(),
        };
        during += written.load(Ordering::Relaxed) - before;
        check(keys, &list);
        let now = list.header.unwrap().revision;
        assert!(now >= revision, "revisions do not go back");
        revision = now;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let compactions = compactor.await.unwrap();
    println!("{lists} lists of {keys} ({streamed} streamed) saw {during} writes; {compactions} compactions");
    assert!(compactions > 0 && during > 0, "{compactions} compactions, {during} writes during the lists");
    during
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_during_writes_and_compactions_is_consistent() {
    lists_during_writes(20_000, 12).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_does_not_block_writers() {
    assert_writers_are_not_blocked(4).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long"]
async fn a_long_list_during_writes_and_compactions_is_consistent_and_does_not_block_writers() {
    assert_writers_are_not_blocked(40).await;
}

async fn assert_writers_are_not_blocked(lists: usize) {
    let during = lists_during_writes(100_000, lists).await;
    let in_flight = lists as u64 * WRITERS;
    assert!(during > in_flight, "{during} writes, of which {in_flight} may have been in flight when a list began");
}
