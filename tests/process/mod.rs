//! Servers as processes of their own: ours, and a real etcd to hold it against.
//!
//! Both are started with the same command line on a directory and on ports of their own. What they advertise is not where
//! they listen but etcd's defaults, the same for both, so that both come to the same cluster and member ID.

#![allow(dead_code, reason = "each test uses its part")]

use std::{
    env,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tempfile::TempDir;

/// How long a server may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Both servers log this line when they can be called.
const READY: &str = "ready to serve client requests";

/// A server process, its directory and where it listens. Killed when dropped.
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
        // All tests can be run with one server of HTTP/2 or the other.
        let server = env::var("METASTORE_TEST_GRPC_SERVER").ok().map(|name| format!("--grpc-server={name}"));
        let flags: Vec<&str> = server.as_deref().into_iter().chain(flags.iter().copied()).collect();
        Self::start(Path::new(env!("CARGO_BIN_EXE_metastore")), &flags)
    }

    /// A fresh server of `program`, which takes etcd's flags.
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

    /// Where clients go.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Kills the process and starts another one on the same directory and ports.
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
        // Reads on after the server is ready: nobody may wait for room in a pipe.
        thread::spawn(move || {
            let mut said = String::new();
            for line in lines.map_while(Result::ok) {
                if line.contains(READY) {
                    _ = ready.send(Ok(()));
                }
                said.push_str(&line);
                said.push('\n');
            }
            _ = ready.send(Err(said));
        });
        self.child = Some(child);
        match is_ready.recv_timeout(START_LIMIT) {
            Ok(Ok(())) => {}
            Ok(Err(said)) => panic!("{} ended before it served:\n{said}", self.program.display()),
            Err(mpsc::RecvTimeoutError::Timeout | mpsc::RecvTimeoutError::Disconnected) => {
                panic!("{} did not serve within {START_LIMIT:?}", self.program.display())
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

/// A port that was free a moment ago, and that nobody gets by chance before we use it again after a restart: it is not one of
/// those from which the system serves outgoing connections and port 0.
pub fn free_port() -> u16 {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 18_000;
    static DRAWN: AtomicU32 = AtomicU32::new(0);
    // Test programs that run at the same time begin at different places.
    let start = std::process::id().wrapping_mul(97);
    loop {
        let place = start.wrapping_add(DRAWN.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + place).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The real etcd, if one can be had that speaks as ours does: the one that is named, or what `scripts/peers` makes.
pub fn etcd() -> Option<PathBuf> {
    let (etcd, version) = any_etcd()?;
    if version.starts_with("3.7.") {
        return Some(etcd);
    }
    eprintln!("{} is etcd {version}, which does not answer as 3.7 does", etcd.display());
    None
}

/// The same, of whatever age, and its version.
pub fn any_etcd() -> Option<(PathBuf, String)> {
    let named = ["METASTORE_TEST_ETCD", "ETCD_BIN"].into_iter().find_map(env::var_os);
    let etcd = named.map(PathBuf::from).or_else(made_by_script)?;
    let said = Command::new(&etcd).env_remove("ETCD_BIN").arg("--version").output().ok()?.stdout;
    let said = String::from_utf8_lossy(&said);
    let version = said.lines().next()?.strip_prefix("etcd Version: ")?;
    Some((etcd, version.to_owned()))
}

fn made_by_script() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/peers");
    let output =
        Command::new(script).stderr(Stdio::inherit()).output().ok().filter(|output| output.status.success())?;
    let output = String::from_utf8(output.stdout).ok()?;
    output.lines().find_map(|line| line.strip_prefix("ETCD_BIN=")).map(PathBuf::from)
}
