//! Both HTTP/2 servers give the same responses.

use std::time::Duration;

use metastore::proto::etcdserverpb::{PutRequest, RangeRequest, kv_client::KvClient};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, codec::CompressionEncoding, transport::Channel};

use crate::{odd_calls, support::Server};

async fn both() -> [(Server, KvClient<Channel>); 2] {
    let start = async |name| {
        let server = Server::start(&[&format!("--grpc-server={name}")]);
        let client = server.kv().await;
        (server, client)
    };
    [start("own").await, start("tonic").await]
}

#[tokio::test]
async fn compressed_calls_get_compressed_responses() {
    for (_server, client) in both().await {
        let mut client = client.send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
        let value = "repeated ".repeat(10_000);
        client.put(PutRequest { key: "a".into(), value: value.clone().into(), ..PutRequest::default() }).await.unwrap();
        let answer = client.range(RangeRequest { key: "a".into(), ..RangeRequest::default() }).await.unwrap();
        assert_eq!(answer.metadata().get("grpc-encoding").unwrap(), "gzip");
        assert_eq!(answer.into_inner().kvs[0].value, value.as_bytes());
    }
}

#[tokio::test]
async fn silent_clients_are_disconnected() {
    for name in ["own", "tonic"] {
        let server = Server::start(&[&format!("--grpc-server={name}"), "--client-begin-timeout=1s"]);
        for beginning in ["", "PRI * HTTP/2"] {
            let (mut silent, mut output) = (TcpStream::connect(server.address()).await.unwrap(), Vec::new());
            silent.write_all(beginning.as_bytes()).await.unwrap();
            let closed = tokio::time::timeout(Duration::from_mins(1), silent.read_to_end(&mut output)).await;
            assert!(closed.expect("the server must close the connection").is_ok());
            // A client that has started to speak HTTP/2 may receive a GOAWAY.
            assert!(output.is_empty() || !beginning.is_empty() && output.get(3) == Some(&4), "{output:?}");
        }
    }
}

/// hyper checks fewer of them than grpc-go does.
#[test]
fn odd_calls_get_the_responses_of_etcd() {
    for (name, calls) in [("own", odd_calls::all()), ("tonic", odd_calls::behind_hyper())] {
        let server = Server::start(&[&format!("--grpc-server={name}")]);
        let wrong: Vec<String> = calls
            .iter()
            .map(|call| (call, call.ask(server.address())))
            .filter(|(call, answer)| call.answer != *answer)
            .map(|(call, answer)| format!("{}\n    etcd: {}\n    {name}: {answer}", call.name(), call.answer))
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_with_the_same_text() {
    let mut messages = Vec::new();
    for (_server, mut client) in both().await {
        let value = vec![b'x'; 3 << 20].into();
        let refused = client.put(PutRequest { key: "a".into(), value, ..PutRequest::default() }).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        messages.push(refused.message().to_owned());
        client.range(RangeRequest { key: "a".into(), ..RangeRequest::default() }).await.unwrap();
    }
    assert_eq!(messages[0], messages[1]);
}

#[tokio::test]
async fn a_large_list_arrives_complete() {
    for (_server, mut client) in both().await {
        for nth in 0..20_u8 {
            let put =
                PutRequest { key: vec![b'k', nth].into(), value: vec![nth; 500_000].into(), ..PutRequest::default() };
            client.put(put).await.unwrap();
        }
        let range = RangeRequest { key: "k".into(), range_end: "l".into(), ..RangeRequest::default() };
        let mut waiting = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (mut client, range) = (client.clone(), range.clone());
            waiting.spawn(async move { client.range(range).await.unwrap().into_inner() });
        }
        for list in waiting.join_all().await {
            assert!(list.kvs.iter().zip(0..20_u8).all(|(kv, nth)| kv.value == vec![nth; 500_000]));
            assert_eq!(list.kvs.len(), 20);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn open_watches_are_told_that_the_server_stops() {
    for (mut server, _) in both().await {
        let mut client = server.client().await;
        let mut stream = client.watch("a", None).await.unwrap();
        tokio::task::block_in_place(|| server.stop());
        let mut last = stream.message().await;
        while let Ok(Some(_)) = last {
            last = stream.message().await;
        }
        assert!(last.as_ref().is_err_and(|error| error.to_string().contains("etcdserver: server stopped")), "{last:?}");
    }
}
