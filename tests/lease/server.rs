//! A server process in a directory of its own.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use etcd_client::Client;
use tempfile::TempDir;
use tonic::transport::Channel;

pub struct Server {
    dir: TempDir,
    child: Child,
    pub address: String,
}

impl Server {
    /// Starts a server and waits until it serves.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (child, address) = spawn(dir.path());
        Self { dir, child, address }
    }

    /// Kills it on the spot.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again where it left off, at another address.
    pub fn restart(&mut self) {
        (self.child, self.address) = spawn(self.dir.path());
    }

    pub async fn client(&self) -> Client {
        Client::connect([&self.address], None).await.unwrap()
    }

    /// For what the stock client does not show.
    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.address.clone()).unwrap().connect().await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path) -> (Child, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_metastore"))
        .args(["--listen-client-urls", "http://127.0.0.1:0", "--advertise-client-urls", "http://127.0.0.1:0"])
        .arg("--data-dir")
        .arg(dir.join("data"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let serving = lines.by_ref().find(|line| line.as_ref().unwrap().contains("serving client traffic"));
    let serving: serde_json::Value =
        serde_json::from_str(&serving.expect("it serves sooner or later").unwrap()).unwrap();
    let address = format!("http://{}", serving["address"].as_str().unwrap());
    std::thread::spawn(move || lines.for_each(drop)); // A full pipe would stop it.
    (child, address)
}
