//! A disk with little space left.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{DefragmentRequest, PutRequest, RangeRequest};
use tonic::Code;

use crate::support::{Server, eventually_async, require, time_limit};

/// A mounted in-memory file system.
struct Disk(tempfile::TempDir);

impl Disk {
    fn make(size: &str) -> Result<Self, String> {
        let mount = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(mount.path()).status();
        match made {
            Ok(status) if status.success() => Ok(Self(mount)),
            failure => Err(format!("mount -t tmpfs: {failure:?}")),
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn free_bytes(&self) -> u64 {
        let disk = rustix::fs::statvfs(self.path()).unwrap();
        disk.f_bavail * disk.f_frsize
    }

    /// Fills the disk up to `left` bytes, after background writes have stopped, which would fail otherwise.
    async fn fill(&self, left: u64) -> PathBuf {
        let (mut free, mut since) = (self.free_bytes(), Instant::now());
        eventually_async("nothing is written for half a second", time_limit(), async || {
            let before = std::mem::replace(&mut free, self.free_bytes());
            since = if free == before { since } else { Instant::now() };
            since.elapsed() > Duration::from_millis(500)
        })
        .await;
        let filler = self.path().join("filler");
        fs::write(&filler, vec![1; usize::try_from(free - left).unwrap()]).unwrap();
        filler
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily, because the process may not have ended yet.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// KV-45: a defragmentation without enough space does not start, and the server keeps working.
#[tokio::test]
async fn a_defragmentation_without_enough_space_is_refused_and_does_no_harm() {
    const VALUE_BYTES: usize = 256 << 10;
    let Some(disk) = require("tmpfs", Disk::make("320m")) else { return };
    let mut server = Server::single(&[]);
    server.move_to(disk.path());
    server.restart();
    let mut kv = server.kv().await;
    for nth in 0..240_u8 {
        // Incompressible values.
        let value: Vec<u8> =
            (0..VALUE_BYTES / 8).flat_map(|at| incompressible(u64::from(nth) << 32 | at as u64)).collect();
        let put = PutRequest { key: vec![nth].into(), value: value.into(), ..PutRequest::default() };
        kv.put(put).await.unwrap();
    }
    // Less than the data, but more than a flush and a log segment.
    let filler = disk.fill(40 << 20).await;
    let mut maintenance = server.maintenance().await;
    let refusal = maintenance.defragment(DefragmentRequest {}).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unknown);
    assert!(refusal.message().contains("bytes of free disk space"), "{refusal}");
    let put = PutRequest { key: "after".into(), value: "still working".into(), ..PutRequest::default() };
    kv.put(put).await.unwrap();
    let found = kv.range(RangeRequest { key: "after".into(), ..RangeRequest::default() }).await.unwrap().into_inner();
    assert_eq!(found.kvs[0].value, "still working");
    fs::remove_file(&filler).unwrap();
    maintenance.defragment(DefragmentRequest {}).await.unwrap();
}

/// Bytes without a pattern that a compressor could use.
fn incompressible(nth: u64) -> [u8; 8] {
    let mixed = (nth ^ (nth >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes()
}
