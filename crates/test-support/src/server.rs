//! Servers of etcd's API: `metastore`, or a real etcd to compare it with.

use std::{
    env, fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use metastore::proto::etcdserverpb::{
    cluster_client::ClusterClient, kv_client::KvClient, maintenance_client::MaintenanceClient,
};
use rustix::process::Signal;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{
    http_client::{HttpResponse, http},
    ports::free_port,
    process::Process,
    wait::time_limit,
};

/// What `metastore` logs, with its address, when it serves clients.
const SERVING: &str = "\"msg\":\"serving client traffic ";
/// What both programs log when they serve clients.
const READY: &str = "ready to serve client requests";
/// An address with a port that the system chooses.
const ANY_PORT: &str = "http://127.0.0.1:0";

/// The program under test. Cargo names it to integration tests; a test program that is started by hand finds it beside itself.
#[must_use]
pub fn program() -> PathBuf {
    env::var_os("CARGO_BIN_EXE_metastore").map_or_else(
        || env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("metastore"),
        PathBuf::from,
    )
}

/// A server with a directory of its own. Dropping it kills the process and removes the directory.
pub struct Server {
    /// Declared before `directory`, so that the process is killed before its directory is removed.
    process: Option<Process>,
    directory: TempDir,
    data_dir: PathBuf,
    program: PathBuf,
    /// The flags for its name and its addresses.
    identity: Vec<String>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// `host:port` for clients: known from the beginning, or logged by each process.
    address: String,
    logs_address: bool,
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
        let mut server = Self::single(arguments);
        server.environment = environment.iter().map(owned).collect();
        server.restart();
        server
    }

    /// The only member of a cluster, not started yet.
    pub fn single(arguments: &[&str]) -> Self {
        Self::member("one", "http://127.0.0.1:2380", "one=http://127.0.0.1:2380", arguments)
    }

    /// One of several members, not started yet. It advertises `peer_url` to the other members, but listens on a port that the
    /// system chooses and that it logs.
    pub fn member(name: &str, peer_url: &str, initial_cluster: &str, arguments: &[&str]) -> Self {
        let advertised =
            [("--advertise-client-urls", "http://127.0.0.1:2379"), ("--initial-advertise-peer-urls", peer_url)];
        let listens = [("--listen-client-urls", ANY_PORT), ("--listen-peer-urls", ANY_PORT)];
        let named = [("--name", name), ("--initial-cluster", initial_cluster)];
        Self::new(&program(), &[named, listens, advertised].concat(), arguments)
    }

    /// Starts a new cluster of one member of `program`, and waits until it serves clients. It keeps its ports when it is
    /// restarted, and advertises etcd's default addresses, so that both programs compute the same cluster ID and member ID.
    pub fn start_program(program: &Path, arguments: &[&str]) -> Self {
        let [clients, peers] = [free_url(), free_url()];
        let identity = [
            ("--listen-client-urls", clients.as_str()),
            ("--listen-peer-urls", &peers),
            ("--advertise-client-urls", "http://localhost:2379"),
            ("--initial-advertise-peer-urls", "http://localhost:2380"),
            ("--initial-cluster", "default=http://localhost:2380"),
        ];
        let mut server = Self::new(program, &identity, arguments).at(&clients);
        server.restart();
        server
    }

    /// The members of a new cluster of `program`, not started yet. They keep their ports when they are restarted.
    pub fn cluster_of(program: &Path, size: usize, arguments: &[&str]) -> Vec<Self> {
        let urls: Vec<_> = (0..size).map(|_| [free_url(), free_url()]).collect();
        let all: Vec<_> = urls.iter().enumerate().map(|(nth, [_, peers])| format!("m{nth}={peers}")).collect();
        let member = |(nth, [clients, peers]): (usize, &[String; 2])| {
            let identity = [
                ("--name", format!("m{nth}")),
                ("--listen-client-urls", clients.clone()),
                ("--advertise-client-urls", clients.clone()),
                ("--listen-peer-urls", peers.clone()),
                ("--initial-advertise-peer-urls", peers.clone()),
                ("--initial-cluster", all.join(",")),
            ];
            let identity = identity.each_ref().map(|(flag, value)| (*flag, value.as_str()));
            Self::new(program, &identity, arguments).at(clients)
        };
        urls.iter().enumerate().map(member).collect()
    }

    /// A server of `program` with these flags for its identity, not started yet.
    pub fn new(program: &Path, identity: &[(&str, &str)], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            process: None,
            data_dir: directory.path().join("data"),
            directory,
            program: program.to_owned(),
            identity: identity.iter().map(|(flag, value)| format!("{flag}={value}")).collect(),
            arguments: owned(arguments),
            environment: Vec::new(),
            address: String::new(),
            logs_address: true,
        }
    }

    /// Serves clients at this URL, whatever it logs.
    fn at(mut self, url: &str) -> Self {
        url.trim_start_matches("http://").clone_into(&mut self.address);
        self.logs_address = false;
        self
    }

    /// Moves a member that has not been started yet to another file system.
    pub fn move_to(&mut self, directory: &Path) {
        assert!(self.process.is_none() && !self.data_dir.exists(), "the member was started already");
        self.directory = tempfile::tempdir_in(directory).unwrap();
        self.data_dir = self.directory.path().join("data");
    }

    /// Uses a data directory that is not removed on drop.
    pub fn set_data_dir(&mut self, data_dir: &Path) {
        assert!(self.process.is_none(), "the process uses another one");
        data_dir.clone_into(&mut self.data_dir);
    }

    /// Starts the process on the existing data and waits until it serves clients. It must not be running.
    pub fn restart(&mut self) {
        self.launch();
        self.await_serving();
    }

    /// Waits until a launched process serves clients.
    pub fn await_serving(&mut self) {
        if self.logs_address {
            let line: serde_json::Value = serde_json::from_str(&self.wait_for_log(SERVING)).unwrap();
            line["address"].as_str().unwrap().clone_into(&mut self.address);
        } else {
            self.wait_for_log(READY);
        }
    }

    /// Starts the process without waiting for it to serve.
    pub fn launch(&mut self) {
        assert!(self.process.is_none(), "the previous process still runs");
        let mut command = Command::new(&self.program);
        command.args(&self.identity).arg("--data-dir").arg(&self.data_dir).args(&self.arguments);
        command.env_clear().envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::start(&mut command));
    }

    /// Starts the process and waits until it ends by itself; returns its log.
    pub fn run_to_end(&mut self) -> (ExitStatus, String) {
        self.launch();
        let mut process = self.process.take().expect("it was launched");
        (process.wait_for_end(), process.log())
    }

    /// Restarts with other arguments.
    pub fn restart_with(&mut self, arguments: &[&str]) {
        self.set_arguments(arguments);
        self.restart();
    }

    /// SIGKILL, and a restart.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("the process runs")
    }

    /// Whether the process was started and not yet stopped by the test.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Whether the process has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.process.as_mut().expect("the process was started").has_ended()
    }

    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Waits until the process listens for other members; returns that address.
    pub fn peer_address(&self) -> String {
        let line: serde_json::Value =
            serde_json::from_str(&self.wait_for_log("\"msg\":\"serving peer traffic\"")).unwrap();
        line["address"].as_str().unwrap().to_owned()
    }

    /// Waits until the process ends by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        self.process.take().expect("the process runs").wait_for_end()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.take().expect("the process runs").kill();
    }

    /// SIGTERM; returns when the process has ended because of it.
    pub fn stop(&mut self) {
        assert_eq!(self.end_with(Signal::TERM).signal(), Some(Signal::TERM.as_raw()));
    }

    pub fn signal(&self, signal: Signal) {
        self.process().signal(signal);
    }

    /// Sends a signal and waits for the end of the process.
    pub fn end_with(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait_for_end()
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.process().log()
    }

    /// Waits for a log line that contains `text`; returns the first one.
    pub fn wait_for_log(&self, text: &str) -> String {
        self.process().wait_for_log(text)
    }

    /// Waits until the process logs `text` and then exits with an error.
    pub fn wait_for_refusal(&mut self, text: &str) {
        self.wait_for_log(text);
        let status = self.wait_for_end();
        assert_eq!(status.code(), Some(1), "a failed start has exit code 1");
    }

    /// Sets the arguments of later starts.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = owned(arguments);
    }

    /// Removes the data directory.
    pub fn wipe(&mut self) {
        assert!(!self.is_running(), "the process still writes");
        fs::remove_dir_all(&self.data_dir).unwrap();
    }

    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone()
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
        let options = etcd_client::ConnectOptions::new().with_timeout(time_limit());
        etcd_client::Client::connect([self.url()], Some(options)).await.unwrap()
    }

    /// For services that have no client method here.
    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.url()).unwrap().timeout(time_limit()).connect().await.unwrap()
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

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(ToString::to_string).collect()
}

/// A URL on this machine whose port is free and stays so when a server is restarted.
#[must_use]
pub fn free_url() -> String {
    format!("http://127.0.0.1:{}", free_port())
}
