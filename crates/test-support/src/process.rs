//! Server processes: ours, and a real etcd to compare it with.
//!
//! Both are started with the same command line, each with a directory and ports of its own. They advertise etcd's default
//! addresses instead of those they listen on, so that both compute the same cluster ID and member ID.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use crate::ports::free_port;
use tempfile::TempDir;

/// The time limit for a server to become ready.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Both servers log this message when they accept client requests.
const READY: &str = "ready to serve client requests";

/// A server process, its directory and its ports. Killed on drop.
pub struct Server {
    program: PathBuf,
    flags: Vec<String>,
    client_port: u16,
    peer_port: u16,
    directory: TempDir,
    child: Option<Child>,
}

impl Server {
    /// A fresh server of the program under test.
    pub fn ours(flags: &[&str]) -> Self {
        Self::start(&crate::program(), flags)
    }

    /// A fresh server of `program`, which accepts etcd's flags.
    pub fn start(program: &Path, flags: &[&str]) -> Self {
        let mut server = Self {
            program: program.to_owned(),
            flags: flags.iter().map(ToString::to_string).collect(),
            client_port: free_port(),
            peer_port: free_port(),
            directory: tempfile::tempdir().unwrap(),
            child: None,
        };
        server.run();
        server
    }

    /// The URL for clients.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Kills the process and starts it again on the same directory and ports.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.run();
    }

    fn run(&mut self) {
        let mut child = Command::new(&self.program)
            .arg("--data-dir")
            .arg(self.directory.path().join("data"))
            .args(["--listen-client-urls", &self.url()])
            .args(["--listen-peer-urls", &format!("http://127.0.0.1:{}", self.peer_port)])
            .args(["--advertise-client-urls", "http://localhost:2379"])
            .args(["--initial-advertise-peer-urls", "http://localhost:2380"])
            .args(["--initial-cluster", "default=http://localhost:2380"])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", self.program.display()));
        let (ready, is_ready) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        // Keeps reading after the server is ready: a full pipe would block it.
        thread::spawn(move || {
            let mut log = String::new();
            for line in lines.map_while(Result::ok) {
                if line.contains(READY) {
                    _ = ready.send(Ok(()));
                }
                log.push_str(&line);
                log.push('\n');
            }
            _ = ready.send(Err(log));
        });
        self.child = Some(child);
        match is_ready.recv_timeout(START_LIMIT) {
            Ok(Ok(())) => {}
            Ok(Err(log)) => panic!("{} ended before it was ready:\n{log}", self.program.display()),
            Err(mpsc::RecvTimeoutError::Timeout | mpsc::RecvTimeoutError::Disconnected) => {
                panic!("{} was not ready within {START_LIMIT:?}", self.program.display())
            }
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            _ = child.kill();
            _ = child.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The binary of a real etcd 3.7: the one named by `METASTORE_TEST_ETCD` or `ETCD_BIN`, or the one that `scripts/peers` builds.
pub fn etcd() -> Option<PathBuf> {
    let (etcd, version) = any_etcd()?;
    if version.starts_with("3.7.") {
        return Some(etcd);
    }
    eprintln!("{} is etcd {version}; only 3.7 answers as metastore does", etcd.display());
    None
}

/// Like [`etcd`], of any version; also returns the version.
pub fn any_etcd() -> Option<(PathBuf, String)> {
    let named = ["METASTORE_TEST_ETCD", "ETCD_BIN"].into_iter().find_map(env::var_os);
    let etcd = named.map(PathBuf::from).or_else(built_by_script)?;
    let output = Command::new(&etcd).env_remove("ETCD_BIN").arg("--version").output().ok()?.stdout;
    let output = String::from_utf8_lossy(&output);
    let version = output.lines().next()?.strip_prefix("etcd Version: ")?;
    Some((etcd, version.to_owned()))
}

fn built_by_script() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/peers");
    let output =
        Command::new(script).stderr(Stdio::inherit()).output().ok().filter(|output| output.status.success())?;
    let output = String::from_utf8(output.stdout).ok()?;
    output.lines().find_map(|line| line.strip_prefix("ETCD_BIN=")).map(PathBuf::from)
}
