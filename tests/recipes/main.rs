//! Locks and elections, as stock clients of one server see them.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

mod election;
mod lock;
#[path = "../support/mod.rs"]
mod support;

use std::{fmt, time::Duration};

use etcd_client::{Client, Error, GetOptions, LeaseGrantOptions};
use support::Server;

/// All failures of these services have this code.
fn check_unknown<T: fmt::Debug>(outcome: Result<T, Error>, message: &str) {
    match outcome {
        Err(Error::GRpcStatus(status)) => {
            assert_eq!((status.code() as i32, status.message()), (tonic::Code::Unknown as i32, message));
        }
        other => panic!("expected {message:?}, not {other:?}"),
    }
}

async fn grant(client: &mut Client, id: i64) {
    client.lease_grant(600, Some(LeaseGrantOptions::new().with_id(id))).await.unwrap();
}

/// The keys below a name, in the order in which they were created.
async fn line(client: &mut Client, name: &str) -> Vec<String> {
    let options = GetOptions::new().with_prefix();
    let found = client.get(format!("{name}/"), Some(options)).await.unwrap();
    let mut kvs = found.kvs().to_vec();
    kvs.sort_by_key(etcd_client::KeyValue::create_revision);
    kvs.iter().map(|kv| kv.key_str().unwrap().to_owned()).collect()
}

/// Waits until the keys below a name are these, by their creation.
async fn until_line(client: &mut Client, name: &str, expected: &[&str]) {
    while line(client, name).await != expected {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The watches that the server has open.
async fn until_no_watches(server: &Server) {
    while !server.http("GET", "/metrics").body.contains("\netcd_debugging_mvcc_watcher_total 0\n") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
