//! Locks and elections on one server, with stock clients.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

mod election;
mod lock;

use std::fmt;
use test_support as support;

use etcd_client::{Client, Error, GetOptions, LeaseGrantOptions};
use support::{Server, eventually_async, time_limit};

/// All failures of these services have the code `Unknown`.
fn assert_unknown<T: fmt::Debug>(outcome: Result<T, Error>, message: &str) {
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

/// The keys with the prefix `<name>/`, in the order of their creation.
async fn keys_below(client: &mut Client, name: &str) -> Vec<String> {
    let options = GetOptions::new().with_prefix();
    let found = client.get(format!("{name}/"), Some(options)).await.unwrap();
    let mut kvs = found.kvs().to_vec();
    kvs.sort_by_key(etcd_client::KeyValue::create_revision);
    kvs.iter().map(|kv| kv.key_str().unwrap().to_owned()).collect()
}

/// Waits until the keys with the prefix `<name>/` are these, in the order of their creation.
async fn wait_for_keys(client: &mut Client, name: &str, expected: &[&str]) {
    eventually_async(&format!("the keys below {name} are {expected:?}"), time_limit(), async || {
        let keys = keys_below(client, name).await;
        if keys == expected { Ok(()) } else { Err(keys) }
    })
    .await;
}

/// Waits until the server has so many open watches.
async fn wait_for_watches(server: &Server, count: u32) {
    eventually_async(&format!("there are {count} watches"), time_limit(), async || {
        let page = server.http("GET", "/metrics").body;
        let found = page.lines().find(|line| line.starts_with("etcd_debugging_mvcc_watcher_total "));
        let found = found.expect("the number of watches is always shown").to_owned();
        if found.ends_with(&format!(" {count}")) { Ok(()) } else { Err(found) }
    })
    .await;
}
