//! Disks that stand still: every write and every sync hangs, and nothing fails.
//!
//! A member's data lies on a file system of its own, in a file, which is frozen. That takes root and loop devices; where
//! they are missing, these tests say so and do nothing.

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
use crate::support::skip;

const SIZE_BYTES: u64 = 512 << 20;

/// A file system that can be frozen.
struct Disk {
    mount: TempDir,
    _image: TempDir,
}

/// A disk that stands still until this is dropped. Processes that wait for it cannot even be killed: thaw before.
struct Frozen(PathBuf);

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["-u", text(&self.0)]).expect("what was frozen can be thawed");
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
        // A directory of its own: what the file system puts there itself is not ours.
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
        // Lazily: a process may still be ending.
        let _ = run("umount", &["-l", text(self.mount.path())]);
    }
}

/// A cluster whose members each have such a disk; None, with a word about it, where that cannot be.
fn cluster_on_disks() -> Option<(Vec<Disk>, Cluster)> {
    let mut disks = Vec::new();
    for _ in 0..3 {
        match Disk::make() {
            Ok(disk) => disks.push(disk),
            Err(error) => {
                skip(&format!("no file system of one's own can be made here: {error}"));
                return None;
            }
        }
    }
    let mut cluster = Cluster::prepare(3, &[]);
    for (server, disk) in cluster.servers.iter_mut().zip(&disks) {
        server.move_to(&disk.home());
    }
    cluster.start_all();
    Some((disks, cluster))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_stands_still_gives_way() {
    let Some((disks, cluster)) = cluster_on_disks() else { return };
    let load = Load::start(8, &cluster.urls);
    load.progress(200).await;
    let old = cluster.leader().await;
    load.book().forget_gaps();
    let frozen = disks[old].freeze();
    cluster.leader_after(old).await;
    load.progress(200).await;
    println!("{:?} without service", load.book().longest_gap());
    assert!(load.book().longest_gap() < Duration::from_secs(8));
    drop(frozen);
    let book = load.stop().await;
    cluster.assert_all_equal().await;
    book.assert_kept(cluster.client(old).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_whose_disk_stands_still_stops_nobody_else() {
    let Some((disks, cluster)) = cluster_on_disks() else { return };
    let leader = cluster.leader().await;
    let slow = cluster.others(leader)[0];
    // Clients of the slow member wait for it; these ask the others.
    let mut client = cluster.client(leader).await;
    client.put("a", "0", None).await.unwrap();
    let frozen = disks[slow].freeze();
    for nth in 1..=100 {
        let put = client.put("a", nth.to_string(), None);
        tokio::time::timeout(Duration::from_secs(5), put).await.expect("two of three are enough").unwrap();
    }
    assert_eq!(cluster.leader_among(&cluster.others(slow)).await, leader, "nobody was disturbed");
    drop(frozen);
    cluster.assert_all_equal().await;
}

/// Fault 32.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_stands_still_ends_and_renews_no_lease() {
    let Some((disks, cluster)) = cluster_on_disks() else { return };
    let old = cluster.leader().await;
    let mut stuck = cluster.client(old).await;
    grant(&mut stuck, 1, 3).await;
    stuck.put("kept", "", Some(PutOptions::new().with_lease(1))).await.unwrap();
    let frozen = disks[old].freeze();
    // Something must be written for the disk to be missed.
    let mut writer = cluster.client(old).await;
    let writing = tokio::spawn(async move { writer.put("a", "1", None).await });
    let new = cluster.leader_after(old).await;
    let mut outside = cluster.client(new).await;
    keep_alive_despite(&mut stuck, &mut outside, 1, 3).await;
    drop(frozen);
    assert_eq!(renew(&mut outside, 1).await, 3);
    let _ = writing.await.unwrap(); // Agreed to or not, it has an answer.
    cluster.assert_all_equal().await;
    assert_eq!(outside.get("kept", None).await.unwrap().count(), 1, "nobody has ended the lease");
}
