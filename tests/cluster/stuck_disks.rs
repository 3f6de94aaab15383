//! Disks that hang: writes and syncs do not return, and nothing fails.
//!
//! Each member's data is on a file system of its own, in an image file, which can be frozen. That takes root and loop devices.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use etcd_client::PutOptions;
use tempfile::TempDir;

use super::{
    harness::Cluster,
    leases::{grant, keep_alive_despite, renew},
    load::Load,
};
use crate::support::{Server, require, scaled};

const SIZE_BYTES: u64 = 512 << 20;

/// A file system that can be frozen.
struct Disk {
    mount: TempDir,
    _image: TempDir,
}

/// A disk that is frozen until this is dropped. Processes that wait for it cannot be killed before that.
struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["-u", text(&self.0)]).expect("a frozen file system can be thawed");
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr)))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Disk {
    fn make() -> Result<Self, String> {
        let (image_dir, mount) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let image = image_dir.path().join("image");
        File::create(&image).unwrap().set_len(SIZE_BYTES).unwrap();
        run("mkfs.ext4", &["-q", "-F", text(&image)])?;
        run("mount", &["-o", "loop", text(&image), text(mount.path())])?;
        let disk = Self { mount, _image: image_dir };
        // A directory below the root of the file system, which contains `lost+found`.
        std::fs::create_dir(disk.home()).unwrap();
        Ok(disk)
    }

    fn home(&self) -> PathBuf {
        self.mount.path().join("home")
    }

    fn freeze(&self) -> Frozen {
        run("fsfreeze", &["-f", text(self.mount.path())]).unwrap();
        Frozen(self.mount.path().to_path_buf())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily, because a process may still be exiting.
        let _ = run("umount", &["-l", text(self.mount.path())]);
    }
}

/// A cluster whose members each have such a disk; `None` where such disks cannot be made.
fn cluster_on_disks() -> Option<(Vec<Disk>, Cluster)> {
    let disks = require("loop", (0..3).map(|_| Disk::make()).collect::<Result<Vec<_>, _>>())?;
    let mut cluster = Cluster::prepare(3, &[]);
    for (server, disk) in cluster.servers.iter_mut().zip(&disks) {
        server.move_to(&disk.home());
    }
    cluster.start_all();
    Some((disks, cluster))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_hangs_is_replaced() {
    let Some((disks, cluster)) = cluster_on_disks() else { return };
    let load = Load::start(8, &cluster.urls);
    load.progress(200).await;
    let old = cluster.leader().await;
    load.writes().reset_longest_gap();
    let frozen = disks[old].freeze();
    cluster.leader_after(old).await;
    load.progress(200).await;
    println!("{:?} without service", load.writes().longest_gap());
    assert!(load.writes().longest_gap() < scaled(Duration::from_secs(8)));
    drop(frozen);
    let writes = load.stop().await;
    cluster.assert_all_equal().await;
    writes.assert_kept(cluster.client(old).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_whose_disk_hangs_does_not_affect_the_others() {
    let Some((disks, cluster)) = cluster_on_disks() else { return };
    let leader = cluster.leader().await;
    let slow = cluster.others(leader)[0];
    // Clients of the stuck member have to wait; these are connected to the leader.
    let mut client = cluster.client(leader).await;
    client.put("a", "0", None).await.unwrap();
    let frozen = disks[slow].freeze();
    for nth in 1..=100 {
        let put = client.put("a", nth.to_string(), None);
        tokio::time::timeout(scaled(Duration::from_secs(5)), put).await.expect("two of three are enough").unwrap();
    }
    assert_eq!(cluster.leader_among(&cluster.others(slow)).await, leader, "the leader has not changed");
    drop(frozen);
    cluster.assert_all_equal().await;
}

/// A disk that hangs for a while makes a write slow in one of its parts.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_waits_for_a_slow_disk_is_logged_with_the_time_that_the_log_took() {
    const HANG: Duration = Duration::from_millis(1500);
    let Some(disk) = require("loop", Disk::make()) else { return };
    let mut server = Server::single(&["--election-timeout=50000", "--heartbeat-interval=1000"]);
    server.move_to(&disk.home());
    server.restart();
    let mut client = server.client().await;
    client.put("a", "0", None).await.unwrap();
    let frozen = disk.freeze();
    let writing = tokio::spawn(async move { client.put("a", "1", None).await });
    tokio::time::sleep(HANG).await; // The hang itself.
    drop(frozen);
    writing.await.unwrap().unwrap();
    let line: serde_json::Value =
        serde_json::from_str(&server.wait_for_log("request waited too long before it was applied")).unwrap();
    let seconds = |field: &str| {
        let text = line[field].as_str().unwrap();
        text.strip_suffix("ms").map_or_else(
            || text.trim_end_matches('s').parse::<f64>().unwrap(),
            |ms| ms.parse::<f64>().unwrap() / 1000.0,
        )
    };
    assert!(seconds("log") > 1.0 && seconds("log") <= seconds("took"), "{line}");
    assert!(line["request"].as_str().unwrap().contains("value_size:1"), "{line}");
    server.wait_for_log("slow fdatasync");
    let page = server.http("GET", "/metrics").body;
    for what in ["wait", "sync"] {
        assert!(page.contains(&format!("metastore_slow_total{{what=\"{what}\"}} 1")), "{what}: {page}");
    }
}

/// FAULT-32.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_hangs_neither_expires_nor_renews_leases() {
    let Some((disks, cluster)) = cluster_on_disks() else { return };
    let old = cluster.leader().await;
    let mut stuck = cluster.client(old).await;
    grant(&mut stuck, 1, 3).await;
    stuck.put("kept", "", Some(PutOptions::new().with_lease(1))).await.unwrap();
    let frozen = disks[old].freeze();
    // The hang is noticed only if something is written.
    let mut writer = cluster.client(old).await;
    let writing = tokio::spawn(async move { writer.put("a", "1", None).await });
    let new = cluster.leader_after(old).await;
    let mut outside = cluster.client(new).await;
    keep_alive_despite(&mut stuck, &mut outside, 1, 3).await;
    drop(frozen);
    assert_eq!(renew(&mut outside, 1).await, 3);
    let _ = writing.await.unwrap(); // Committed or not, it is answered.
    cluster.assert_all_equal().await;
    assert_eq!(outside.get("kept", None).await.unwrap().count(), 1, "the lease has not expired");
}
