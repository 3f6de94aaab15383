//! Real `metastore` processes in temporary directories, for every test that drives a server from outside.
//!
//! The system chooses the client port: a server listens on port 0 and logs its address. Nothing here sleeps: a test waits for a
//! log line or for the end of the process, and a wait that times out fails with the whole log.

#![allow(clippy::unwrap_used, reason = "what fails in a test ends the test")]

pub mod ports;
pub mod process;

use std::{
    env, fmt,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use metastore::proto::etcdserverpb::{
    cluster_client::ClusterClient, kv_client::KvClient, maintenance_client::MaintenanceClient,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tonic::transport::Channel;

/// The time limit of every wait and request.
pub const TIMEOUT: Duration = Duration::from_mins(1);
const SERVING: &str = "\"msg\":\"serving client traffic ";

/// The program under test. Cargo names it to integration tests; a test program that is started by hand finds it beside itself.
#[must_use]
pub fn program() -> PathBuf {
    env::var_os("CARGO_BIN_EXE_metastore").map_or_else(
        || env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("metastore"),
        PathBuf::from,
    )
}

/// Reports that a test cannot run on this machine. Writes to stderr directly, because the test harness hides what passing tests
/// print.
pub fn skip(why: &str) {
    io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes()).unwrap();
}

/// A server with a directory of its own. Dropping it kills the process and removes the directory.
pub struct Server {
    /// Declared before `directory`, so that the process is killed before its directory is removed.
    process: Option<Process>,
    directory: TempDir,
    /// The flags for its name and its addresses.
    identity: Vec<String>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    address: String,
}

struct Process {
    child: KillOnDrop,
    log: Arc<Log>,
}

/// What a process has written to stderr so far.
#[derive(Default)]
struct Log {
    lines: Mutex<Lines>,
    grown: Condvar,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    fn read(&self, from: impl Read) {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            self.lines.lock().unwrap().lines.push(line);
            self.grown.notify_all();
        }
        self.lines.lock().unwrap().ended = true;
        self.grown.notify_all();
    }

    /// Waits for a line that contains `text`; returns the first one.
    fn wait_for(&self, text: &str) -> String {
        let deadline = Instant::now() + TIMEOUT;
        let mut lines = self.lines.lock().unwrap();
        loop {
            if let Some(line) = lines.lines.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !lines.ended && !left.is_zero(),
                "no line contains {text:?}; the log is\n{}",
                lines.lines.join("\n")
            );
            lines = self.grown.wait_timeout(lines, left).unwrap().0;
        }
    }
}

impl Log {
    /// Waits for the end of stderr, that is, of the process.
    fn wait_for_end(&self) {
        let deadline = Instant::now() + TIMEOUT;
        let mut lines = self.lines.lock().unwrap();
        while !lines.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the process does not end; the log is\n{}", lines.lines.join("\n"));
            lines = self.grown.wait_timeout(lines, left).unwrap().0;
        }
    }
}

impl Server {
    /// Starts a new cluster of one member and waits until it serves clients. `arguments` follow the flags for its name and
    /// addresses.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_in(&[], arguments)
    }

    /// Like `start`, with these environment variables.
    pub fn start_in(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let mut server = Self::member("one", "http://127.0.0.1:2380", "one=http://127.0.0.1:2380", arguments);
        server.environment = environment.iter().map(owned).collect();
        server.restart();
        server
    }

    /// One of several members, not started yet. It advertises `peer_url` to the other members, but listens on a port that the
    /// system chooses and that it logs.
    pub fn member(name: &str, peer_url: &str, initial_cluster: &str, arguments: &[&str]) -> Self {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        let anywhere = "http://127.0.0.1:0";
        Self {
            directory: tempfile::tempdir().unwrap(),
            identity: owned(&[
                "--name",
                name,
                "--listen-client-urls",
                anywhere,
                "--advertise-client-urls",
                "http://127.0.0.1:2379",
                "--listen-peer-urls",
                anywhere,
                "--initial-advertise-peer-urls",
                peer_url,
                "--initial-cluster",
                initial_cluster,
            ]),
            arguments: owned(arguments),
            environment: Vec::new(),
            process: None,
            address: String::new(),
        }
    }

    /// Moves a member that has not been started yet to another file system.
    pub fn move_to(&mut self, directory: &std::path::Path) {
        assert!(self.process.is_none() && !self.data_dir().exists(), "the member was started already");
        self.directory = tempfile::tempdir_in(directory).unwrap();
    }

    /// Starts the process on the existing data and waits until it serves clients. It must not be running.
    pub fn restart(&mut self) {
        self.launch();
        self.await_serving();
    }

    /// Waits until a launched process serves clients.
    pub fn await_serving(&mut self) {
        let line: serde_json::Value = serde_json::from_str(&self.wait_for_log(SERVING)).unwrap();
        line["address"].as_str().unwrap().clone_into(&mut self.address);
    }

    /// Starts the process without waiting for it to serve.
    pub fn launch(&mut self) {
        assert!(self.process.is_none(), "the previous process still runs");
        let mut child = Command::new(program())
            .args(&self.identity)
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(&self.arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Log::default());
        let (errors, reader) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || reader.read(errors));
        self.process = Some(Process { child: KillOnDrop(child), log });
    }

    /// Restarts with other arguments.
    pub fn restart_with(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
        self.restart();
    }

    /// Whether the process was started and not yet stopped by the test.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the process runs").child.0.id()
    }

    /// Waits until the process listens for other members; returns that address.
    pub fn peer_address(&self) -> String {
        let line: serde_json::Value =
            serde_json::from_str(&self.wait_for_log("\"msg\":\"serving peer traffic\"")).unwrap();
        line["address"].as_str().unwrap().to_owned()
    }

    /// Waits until the process ends by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("the process runs");
        process.log.wait_for_end();
        process.child.0.wait().unwrap()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("the process runs");
        process.child.0.kill().unwrap();
        process.child.0.wait().unwrap();
    }

    /// SIGTERM; returns when the process has ended because of it.
    pub fn stop(&mut self) {
        assert_eq!(self.end_with(Signal::TERM).signal(), Some(Signal::TERM.as_raw()));
    }

    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.pid()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Sends a signal and waits for the end of the process.
    pub fn end_with(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        let mut process = self.process.take().expect("the process runs");
        process.log.wait_for_end();
        process.child.0.wait().unwrap()
    }

    /// Waits for a log line that contains `text`; returns the first one.
    pub fn wait_for_log(&self, text: &str) -> String {
        self.process.as_ref().expect("the process runs").log.wait_for(text)
    }

    /// Waits until the process logs `text` and then exits with an error.
    pub fn wait_for_refusal(&mut self, text: &str) {
        self.wait_for_log(text);
        let status = self.wait_for_end();
        assert_eq!(status.code(), Some(1), "a failed start has exit code 1");
    }

    /// Sets the arguments of later starts.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
    }

    /// Removes the data directory.
    pub fn wipe(&mut self) {
        assert!(!self.is_running(), "the process still writes");
        std::fs::remove_dir_all(self.data_dir()).unwrap();
    }

    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// `host:port` for clients.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A stock client, of the `etcd-client` crate.
    pub async fn client(&self) -> etcd_client::Client {
        let options = etcd_client::ConnectOptions::new().with_timeout(TIMEOUT);
        etcd_client::Client::connect([self.url()], Some(options)).await.unwrap()
    }

    /// For services that have no client method here.
    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.url()).unwrap().timeout(TIMEOUT).connect().await.unwrap()
    }

    /// For requests that the stock client cannot send. Accepts responses of any size.
    pub async fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await).max_decoding_message_size(usize::MAX)
    }

    /// For requests that the stock client cannot send.
    pub async fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel().await)
    }

    /// For requests that the stock client cannot send.
    pub async fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel().await)
    }

    /// Sends one HTTP/1.1 request on a connection of its own.
    pub fn http(&self, method: &str, path: &str) -> HttpResponse {
        http(&self.address, method, path, "", b"")
    }
}

/// Sends one HTTP/1.1 request on a connection of its own. Each header in `headers` ends in `\r\n`.
pub fn http(address: &str, method: &str, path: &str, headers: &str, body: &[u8]) -> HttpResponse {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    HttpResponse { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

/// A process that is killed on drop.
pub struct KillOnDrop(pub Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // Fails if the process has ended already, which is no error here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP/1.1 response.
#[derive(Debug)]
pub struct HttpResponse {
    pub status: u16,
    /// The status line and headers, in lower case.
    pub head: String,
    pub body: String,
}

impl HttpResponse {
    /// The value of a metric without labels; zero if it is missing.
    pub fn metric(&self, metric: &str) -> f64 {
        let line = self.body.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}

/// Asserts that a call was refused with this code and message.
#[track_caller]
pub fn assert_refused<T: fmt::Debug>(answer: Result<T, tonic::Status>, code: tonic::Code, message: &str) {
    let status = answer.expect_err("the call is refused");
    assert_eq!((status.code(), status.message()), (code, message));
}
