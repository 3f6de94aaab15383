//! Keys and transactions, through a stock client.

use etcd_client::{
    CompactionOptions, Compare, CompareOp, DeleteOptions, GetOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp,
    TxnOpResponse,
};

use crate::support::Server;

#[tokio::test]
async fn a_stock_client_puts_gets_and_deletes() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let put = client.put("a", "1", None).await.unwrap();
    assert_eq!(put.header().unwrap().revision(), 2);
    let put = client.put("a", "2", Some(PutOptions::new().with_prev_key())).await.unwrap();
    assert_eq!(put.prev_key().unwrap().value(), b"1");
    for key in ["b", "c", "d"] {
        client.put(key, key.to_uppercase(), None).await.unwrap();
    }
    let options = GetOptions::new().with_prefix().with_sort(SortTarget::Mod, SortOrder::Descend).with_limit(2);
    let got = client.get("", Some(options.with_all_keys())).await.unwrap();
    let keys: Vec<_> = got.kvs().iter().map(|kv| kv.key_str().unwrap()).collect();
    assert_eq!((keys, got.count(), got.more()), (vec!["d", "c"], 4, true));
    let old = client.get("a", Some(GetOptions::new().with_revision(2))).await.unwrap();
    assert_eq!((old.kvs()[0].value(), old.header().unwrap().revision()), (&b"1"[..], 6), "KV-1");
    let options = DeleteOptions::new().with_range("c").with_prev_key();
    let deleted = client.delete("a", Some(options)).await.unwrap();
    assert_eq!((deleted.deleted(), deleted.prev_kvs().len()), (2, 2));
    assert_eq!(client.get("a", None).await.unwrap().count(), 0);
}

#[tokio::test]
async fn headers_name_cluster_member_and_term() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    let member = client.member_list().await.unwrap().members()[0].id();
    let put = client.put("a", "1", None).await.unwrap();
    let header = put.header().unwrap();
    assert_eq!(header.member_id(), member);
    assert_ne!(header.cluster_id(), 0);
    assert_eq!((header.raft_term(), header.revision()), (2, 2));
}

#[tokio::test]
async fn a_stock_client_runs_transactions() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    client.put("a", "1", None).await.unwrap();
    let txn = || {
        Txn::new()
            .when([Compare::value("a", CompareOp::Equal, "1")])
            .and_then([TxnOp::put("a", "2", None), TxnOp::get("a", None)])
            .or_else([TxnOp::delete("a", None)])
    };
    let first = client.txn(txn()).await.unwrap();
    assert!(first.succeeded());
    let answers = first.op_responses();
    let [TxnOpResponse::Put(put), TxnOpResponse::Get(get)] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!((put.header().unwrap().revision(), get.kvs()[0].value()), (3, &b"2"[..]));
    let second = client.txn(txn()).await.unwrap();
    assert!(!second.succeeded());
    let answers = second.op_responses();
    let [TxnOpResponse::Delete(deleted)] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!(deleted.deleted(), 1);
    let nested = Txn::new().and_then([TxnOp::txn(Txn::new().and_then([TxnOp::put("b", "1", None)]))]);
    assert_eq!(client.txn(nested).await.unwrap().header().unwrap().revision(), 5);
    let only_reads = Txn::new().and_then([TxnOp::get("b", None)]);
    assert_eq!(client.txn(only_reads).await.unwrap().header().unwrap().revision(), 5);
}

#[tokio::test]
async fn a_physical_compaction_is_complete_when_it_is_answered() {
    let server = Server::start(&[]);
    let mut client = server.client().await;
    for nth in 0..50 {
        client.put("a", nth.to_string(), None).await.unwrap();
    }
    let physical = || Some(CompactionOptions::new().with_physical());
    let compacted = client.compact(50, physical()).await.unwrap();
    assert_eq!(compacted.header().unwrap().revision(), 51);
    let metrics = server.http("GET", "/metrics").body;
    assert!(metrics.contains("etcd_debugging_mvcc_db_compaction_keys_total 48\n"), "{metrics}");
    let again = client.compact(50, physical()).await.unwrap_err().to_string();
    assert!(again.contains("required revision has been compacted"), "{again}");
    let at = |revision| Some(GetOptions::new().with_revision(revision));
    assert_eq!(client.get("a", at(50)).await.unwrap().kvs()[0].value(), b"48");
    assert!(client.get("a", at(49)).await.is_err(), "KV-8");
    assert_eq!(client.get("a", at(-1)).await.unwrap().kvs()[0].value(), b"49", "KV-9");
}

#[tokio::test]
async fn acknowledged_writes_survive_a_kill() {
    let mut server = Server::start(&[]);
    let client = server.client().await;
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let mut client = client.kv_client();
            tokio::spawn(async move {
                for nth in 0..20 {
                    client.put(format!("{writer:02}/{nth:02}"), "x", None).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let before = client.kv_client().get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    server.kill();
    server.restart();
    let mut client = server.client().await;
    let after = client.get("", Some(GetOptions::new().with_all_keys())).await.unwrap();
    assert_eq!((after.count(), after.header().unwrap().revision()), (320, 321));
    let rows = |answer: &etcd_client::GetResponse| {
        answer.kvs().iter().map(|kv| (kv.key().to_vec(), kv.create_revision())).collect::<Vec<_>>()
    };
    let differing: Vec<_> = rows(&before).into_iter().zip(rows(&after)).filter(|(a, b)| a != b).collect();
    assert!(differing.is_empty(), "before and after: {differing:?}");
    assert_eq!(after.kvs().len(), before.kvs().len());
    assert!(after.header().unwrap().raft_term() > before.header().unwrap().raft_term());
    let compacted = client.compact(300, None).await.unwrap();
    assert_eq!(compacted.header().unwrap().revision(), 321);
    server.kill();
    server.restart();
    let mut client = server.client().await;
    assert!(client.get("00/00", Some(GetOptions::new().with_revision(299))).await.is_err());
    assert_eq!(client.put("a", "1", None).await.unwrap().header().unwrap().revision(), 322);
    server.stop();
}
