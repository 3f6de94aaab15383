//! Stopping a server, and log lines that operators and tools rely on.

use std::{
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

use etcd_client::LockOptions;
use rustix::process::Signal;

use crate::support::{Server, scaled};

/// The time limit for a stop.
const LIMIT: Duration = Duration::from_millis(1500);

#[tokio::test]
async fn running_without_fsync_is_warned_about() {
    let server = Server::start(&["--unsafe-no-fsync"]);
    let line = server.wait_for_log("fsync is off");
    assert!(line.contains("\"warn\"") && line.contains("loses acknowledged writes"), "{line}");
    server.client().await.put("k", "v", None).await.unwrap();
}

/// Open streams, a call that waits forever and an idle connection do not delay a stop.
#[tokio::test]
async fn a_server_ends_at_once_and_by_the_signal_it_received() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::start(&[]);
        let mut client = server.client().await;
        client.put("k", "v", None).await.unwrap();
        let mut watch = client.watch("k", None).await.unwrap();
        let lease = client.lease_grant(60, None).await.unwrap().id();
        let (mut renewals, mut answers) = client.lease_keep_alive(lease).await.unwrap();
        renewals.keep_alive().await.unwrap();
        assert_eq!(answers.message().await.unwrap().unwrap().ttl(), 60);
        let held = client.lock("lock", Some(LockOptions::new().with_lease(lease))).await.unwrap();
        let mut other = server.client().await;
        let waiting = tokio::spawn(async move { other.lock("lock", None).await });
        let idle = std::net::TcpStream::connect(server.address()).unwrap();

        let (started, status) = (Instant::now(), server.end_with(signal));
        let took = started.elapsed();
        assert_eq!(status.signal(), Some(signal.as_raw()), "{status}");
        assert!(took < scaled(LIMIT), "it took {took:?}");
        let rest = async { while let Ok(Some(_)) = watch.message().await {} };
        tokio::time::timeout(scaled(LIMIT), rest).await.expect("the watch has ended");
        assert!(tokio::time::timeout(scaled(LIMIT), waiting).await.expect("the call has ended").unwrap().is_err());
        drop((held, idle));
    }
}

#[test]
fn log_lines_that_tools_wait_for_are_written() {
    let server = Server::start(&["--quota-backend-bytes=9000000000", "--snapshot-catchup-entries=77"]);
    let starting = server.wait_for_log("\"starting an etcd server\"");
    for part in [r#""snapshot-catchup-entries":77"#, r#""v2-deprecation":"write-only""#, r#""name":"one""#] {
        assert!(starting.contains(part), "{starting}");
    }
    let quota = server.wait_for_log("quota exceeds the maximum value");
    assert!(quota.contains(r#""quota-size-bytes":9000000000,"quota-maximum-size-bytes":8589934592"#), "{quota}");
    for line in ["enabled backend quota", "serving peer traffic", "now serving peer/client/metrics"] {
        server.wait_for_log(line);
    }
    server.wait_for_log("published local member to cluster through raft");
    server.wait_for_log("ready to serve client requests");
}
