//! RangeStream: a Range whose result comes in several messages.

use metastore::proto::etcdserverpb::{
    CompactionRequest, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest, kv_client::KvClient,
    range_request::SortTarget, request_op, response_op,
};
use tonic::{Code, Streaming, transport::Channel};

use crate::support::{Server, assert_refused};

async fn fill(kv: &mut KvClient<Channel>, keys: usize, value_bytes: usize) {
    for nth in 0..keys {
        let (key, value) = (format!("{nth:05}").into(), vec![b'v'; value_bytes].into());
        kv.put(PutRequest { key, value, ..PutRequest::default() }).await.unwrap();
    }
}

fn whole() -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), ..RangeRequest::default() }
}

async fn open(
    kv: &mut KvClient<Channel>,
    request: RangeRequest,
) -> Streaming<metastore::proto::etcdserverpb::RangeStreamResponse> {
    kv.range_stream(request).await.unwrap().into_inner()
}

async fn chunks(kv: &mut KvClient<Channel>, request: RangeRequest) -> Vec<RangeResponse> {
    let mut stream = open(kv, request).await;
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        chunks.push(chunk.range_response.unwrap());
    }
    chunks
}

/// Merges all chunks into one response. KV-36: only the last one has a header, `more` and `count`.
fn merged(chunks: Vec<RangeResponse>) -> RangeResponse {
    let last = chunks.len() - 1;
    let mut all = RangeResponse::default();
    for (nth, chunk) in chunks.into_iter().enumerate() {
        if nth < last {
            assert!(chunk.header.is_none() && !chunk.more && chunk.count == 0 && !chunk.kvs.is_empty(), "chunk {nth}");
        }
        all.kvs.extend(chunk.kvs);
        (all.header, all.more, all.count) = (chunk.header, chunk.more, chunk.count);
    }
    assert!(all.kvs.is_sorted_by(|a, b| a.key < b.key), "chunks are disjoint and ascend");
    all
}

/// Streams with and without values have the same keys and counts.
#[tokio::test]
async fn a_keys_only_stream_equals_one_with_values() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    fill(&mut kv, 25, 10).await;
    for limit in [0, 25, 100] {
        let with_values = RangeRequest { limit, ..whole() };
        let keys_only = RangeRequest { keys_only: true, ..with_values.clone() };
        let parts = chunks(&mut kv, keys_only.clone()).await;
        assert!(parts.len() >= 2, "{} chunks", parts.len());
        let keys = merged(parts);
        assert_eq!(keys, kv.range(keys_only).await.unwrap().into_inner());
        let mut values = merged(chunks(&mut kv, with_values).await);
        assert!(keys.kvs.iter().all(|kv| kv.value.is_empty()));
        values.kvs.iter_mut().for_each(|kv| kv.value.clear());
        assert_eq!(keys, values);
        assert_eq!((keys.count, keys.more, keys.kvs.len()), (25, false, 25));
    }
}

/// A sort target without a sort order means ascending, as in Range. etcd loses keys beyond the tenth.
#[tokio::test]
async fn a_stream_with_a_sort_target_is_sorted_like_a_range() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    for nth in 0..400_u32 {
        let key = format!("{:02}", nth * 37 % 60).into();
        let value = format!("{:03}", nth * 7919 % 1000).into();
        kv.put(PutRequest { key, value, ..PutRequest::default() }).await.unwrap();
    }
    for target in [SortTarget::Version, SortTarget::Create, SortTarget::Mod, SortTarget::Value] {
        for (limit, keys_only) in [(0, false), (5, false), (10, false), (25, false), (60, false), (100, true)] {
            let request = RangeRequest { sort_target: target as i32, limit, keys_only, ..whole() };
            let parts = chunks(&mut kv, request.clone()).await;
            let largest = parts.iter().map(|part| part.kvs.len()).max().unwrap();
            let last = parts.len() - 1;
            assert!(parts[..last].iter().all(|part| part.header.is_none() && !part.more && part.count == 0));
            assert!(limit != 0 || parts.len() > 2 && largest <= 40, "{} chunks, {largest} keys", parts.len());
            let mut all = RangeResponse::default();
            for part in parts {
                all.kvs.extend(part.kvs);
                (all.header, all.more, all.count) = (part.header, part.more, part.count);
            }
            assert_eq!(all, kv.range(request).await.unwrap().into_inner(), "{target:?}, {limit}");
        }
        let counted = RangeRequest { sort_target: target as i32, count_only: true, ..whole() };
        assert_eq!(merged(chunks(&mut kv, counted).await).count, 60);
    }
}

/// Without caches, every read goes to the disk.
#[tokio::test]
async fn uncached_values_are_read_from_disk() {
    let mut server = Server::start(&["--value-cache-bytes=0", "--block-cache-bytes=0"]);
    fill(&mut server.kv().await, 500, 100).await;
    server.stop();
    server.restart();
    let mut kv = server.kv().await;
    let list = kv.range(whole()).await.unwrap().into_inner();
    assert_eq!(list.kvs.len(), 500);
    assert_eq!(merged(chunks(&mut kv, whole()).await), list);
    for kv_there in list.kvs.iter().step_by(50) {
        let get = RangeRequest { key: kv_there.key.clone(), ..RangeRequest::default() };
        let found = kv.range(get.clone()).await.unwrap().into_inner();
        assert_eq!(found.kvs, std::slice::from_ref(kv_there));
        let success = vec![RequestOp { request: Some(request_op::Request::RequestRange(get)) }];
        let txn = kv.txn(TxnRequest { success, ..TxnRequest::default() }).await.unwrap().into_inner();
        let Some(response_op::Response::ResponseRange(read)) = &txn.responses[0].response else { panic!("{txn:?}") };
        assert_eq!((&read.kvs, read.count), (&found.kvs, 1));
    }
}

#[tokio::test]
async fn the_merged_chunks_equal_a_range() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    let nothing = chunks(&mut kv, whole()).await;
    assert_eq!((nothing.len(), nothing[0].count, nothing[0].header.as_ref().unwrap().revision), (1, 0, 1));
    fill(&mut kv, 3000, 10).await;
    let answers = chunks(&mut kv, whole()).await;
    assert!(answers[0].kvs.len() <= 10, "the first chunk is small");
    assert!(answers.len() > 5, "{} chunks", answers.len());
    let requests = [
        whole(),
        RangeRequest { limit: 1, ..whole() },
        RangeRequest { limit: 10, ..whole() },
        RangeRequest { limit: 11, ..whole() },
        RangeRequest { limit: 2999, ..whole() },
        RangeRequest { limit: 3000, ..whole() },
        RangeRequest { limit: -1, ..whole() },
        RangeRequest { revision: 1500, ..whole() },
        RangeRequest { revision: 1500, limit: 700, keys_only: true, ..whole() },
        RangeRequest { serializable: true, sort_order: 1, ..whole() },
        RangeRequest { key: "00100".into(), range_end: "00200".into(), ..RangeRequest::default() },
        RangeRequest { key: "00100".into(), ..RangeRequest::default() },
        RangeRequest { key: "b".into(), range_end: "a".into(), ..RangeRequest::default() },
        RangeRequest { count_only: true, limit: 5, ..whole() },
    ];
    for request in requests {
        let plain = kv.range(request.clone()).await.unwrap().into_inner();
        assert_eq!(merged(chunks(&mut kv, request.clone()).await), plain, "{request:?}");
    }
}

/// KV-36: later writes are invisible, and the header has the revision at which the stream began.
#[tokio::test]
async fn a_stream_is_a_view_of_the_revision_at_which_it_began() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    fill(&mut kv, 2000, 10_000).await;
    let mut stream = open(&mut kv, whole()).await;
    let first = stream.message().await.unwrap().unwrap().range_response.unwrap();
    for key in ["01000", "zzz"] {
        kv.put(PutRequest { key: key.into(), value: "new".into(), ..PutRequest::default() }).await.unwrap();
    }
    let mut all = vec![first];
    while let Some(chunk) = stream.message().await.unwrap() {
        all.push(chunk.range_response.unwrap());
    }
    let all = merged(all);
    assert_eq!((all.count, all.kvs.len(), all.header.unwrap().revision), (2000, 2000, 2001));
    assert!(all.kvs.iter().all(|kv| kv.mod_revision <= 2001));
}

/// KV-37.
#[tokio::test]
async fn a_compaction_ends_a_stream_that_it_overtakes() {
    let server = Server::start(&[]);
    let mut kv = server.kv().await;
    fill(&mut kv, 3000, 10_000).await;
    let mut stream = open(&mut kv, whole()).await;
    let mut seen = stream.message().await.unwrap().unwrap().range_response.unwrap().kvs.len();
    kv.put(PutRequest { key: "a".into(), ..PutRequest::default() }).await.unwrap();
    // The client's flow-control window is far smaller than the result, so the server cannot have read all of it.
    kv.compact(CompactionRequest { revision: 3002, physical: true }).await.unwrap();
    let end = loop {
        match stream.message().await {
            Ok(Some(chunk)) => seen += chunk.range_response.unwrap().kvs.len(),
            other => break other,
        }
    };
    assert_refused(end, Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted");
    assert!(seen < 3000, "{seen} keys were received");
}

/// KV-38.
#[tokio::test]
async fn a_stream_handles_values_larger_than_a_chunk() {
    let server = Server::start(&["--max-request-bytes", "100000"]);
    let mut kv = server.kv().await;
    fill(&mut kv, 40, 99_000).await;
    let answers = chunks(&mut kv, whole()).await;
    let sizes: Vec<_> = answers.iter().map(|answer| answer.kvs.len()).collect();
    // Ten values exceed the target size about tenfold, so the chunks are halved until one is less than twice the target.
    assert_eq!((sizes[0], sizes[1], sizes[2]), (10, 5, 2), "{sizes:?}");
    assert!(sizes[3..].iter().all(|&size| size <= 2), "{sizes:?}");
    assert_eq!(merged(answers).count, 40);
}
