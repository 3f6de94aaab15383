//! The page of metrics: made by one thread at a time, for all requests that wait for it.
//!
//! A page reads files, and asks threads that may be busy, so it is not made where connections are served. What a client asks for
//! must then not cost more the more often it asks: requests that come while a page is made all get the next one. A page is
//! shared, not copied, by those that have not been read yet.

use std::{
    cell::RefCell,
    fmt::Write,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::TextEncoder;
use tokio::sync::watch;

use crate::{
    metrics::{REGISTRY, process::Process},
    service::Service,
    version::ETCD_VERSION,
};

/// A page, or why it could not be made.
type Page = Result<Bytes, String>;

/// There is one process, and all its listeners show the same metrics.
static PAGES: LazyLock<Pages> = LazyLock::new(Pages::new);

struct Pages {
    state: Mutex<State>,
    /// The last page, and its number.
    made: watch::Sender<(u64, Page)>,
}

#[derive(Default)]
struct State {
    /// The number of the last page that was begun.
    begun: u64,
    /// The highest number that a request waits for.
    wanted: u64,
    is_making: bool,
}

/// If making a page panics, later requests begin anew.
struct Making;

impl Drop for Making {
    fn drop(&mut self) {
        if std::thread::panicking() {
            PAGES.state.lock().is_making = false;
        }
    }
}

impl Pages {
    fn new() -> Self {
        Self { state: Mutex::default(), made: watch::Sender::new((0, Ok(Bytes::new()))) }
    }
}

/// A page that was begun after this request had come.
pub async fn get(service: &Arc<Service>) -> Page {
    let mut made = PAGES.made.subscribe();
    let needed = want(service);
    let page = made.wait_for(|(number, _)| *number >= needed).await;
    page.map_or_else(|error| Err(error.to_string()), |page| page.1.clone())
}

/// Sees to it that another page is begun, and returns its number.
fn want(service: &Arc<Service>) -> u64 {
    let mut state = PAGES.state.lock();
    state.wanted = state.begun + 1;
    if !state.is_making {
        state.is_making = true;
        let service = service.clone();
        tokio::task::spawn_blocking(move || make(&service));
    }
    state.wanted
}

/// Makes pages until no request waits for another one.
fn make(service: &Service) {
    let _making = Making;
    loop {
        let number = {
            let mut state = PAGES.state.lock();
            if state.begun == state.wanted {
                // In this lock: a request that comes now begins anew.
                state.is_making = false;
                return;
            }
            state.begun += 1;
            state.begun
        };
        drop(PAGES.made.send_replace((number, page(service))));
    }
}

fn page(service: &Service) -> Page {
    service.refresh_metrics();
    let page = TextEncoder::new().encode_to_string(&REGISTRY.gather()).map_err(|error| error.to_string())?;
    Ok((page + &constants(service) + &process_metrics(&Process::read())).into())
}

/// Appends a metric that has one value.
fn write_metric(out: &mut String, kind: &str, [name, help, labels]: [&str; 3], value: f64) {
    _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{labels} ");
    _ = if value.is_infinite() { writeln!(out, "+Inf") } else { writeln!(out, "{value}") };
}

/// Metrics of this process, as the system sees it.
#[allow(clippy::cast_precision_loss, reason = "metrics are floats")]
fn process_metrics(process: &Process) -> String {
    let out = RefCell::new(String::new());
    let gauge = |name, help, value| write_metric(&mut out.borrow_mut(), "gauge", [name, help, ""], value);
    let counter = |name, help, value| write_metric(&mut out.borrow_mut(), "counter", [name, help, ""], value);
    counter("process_cpu_seconds_total", "Processor time that the process has used.", process.cpu_seconds);
    gauge(
        "process_start_time_seconds",
        "When the process was started, in seconds of unix time.",
        process.start_time_seconds,
    );
    gauge("process_resident_memory_bytes", "Memory that the process holds.", process.resident_bytes as f64);
    gauge("process_virtual_memory_bytes", "Address space that the process uses.", process.virtual_bytes as f64);
    gauge("process_virtual_memory_max_bytes", "The limit for its address space.", process.virtual_limit_bytes as f64);
    gauge("process_open_fds", "Open file descriptors.", process.open_files as f64);
    gauge("process_max_fds", "The limit for open file descriptors.", process.open_files_limit as f64);
    gauge("os_fd_used", "Open file descriptors.", process.open_files as f64);
    gauge("os_fd_limit", "The limit for open file descriptors.", process.open_files_limit as f64);
    counter(
        "process_network_receive_bytes_total",
        "Bytes received by all network devices that the process sees.",
        process.received_bytes as f64,
    );
    counter(
        "process_network_transmit_bytes_total",
        "Bytes sent by all network devices that the process sees.",
        process.transmitted_bytes as f64,
    );
    out.into_inner()
}

/// Metrics that do not change while the process runs, and one that may be infinite.
fn constants(service: &Service) -> String {
    let mut out = String::new();
    let mut gauge = |name: &str, help: &str, labels: &str, value: f64| {
        write_metric(&mut out, "gauge", [name, help, labels], value);
    };
    let id = format!("{{server_id=\"{:x}\"}}", service.cluster.member_id);
    gauge("etcd_server_id", "The ID of this member.", &id, 1.0);
    let version = format!("{{server_version=\"{ETCD_VERSION}\"}}");
    gauge("etcd_server_version", "The etcd version that this server implements.", &version, 1.0);
    let cluster = service.cluster.versions().cluster;
    if let Some((minor, _)) = cluster.rsplit_once('.') {
        let labels = format!("{{cluster_version=\"{minor}\"}}");
        gauge("etcd_cluster_version", "The cluster version: the lowest of all members.", &labels, 1.0);
    }
    let seconds = service.node().status().quota_full_seconds();
    gauge(
        "metastore_quota_full_seconds",
        "In how many seconds the quota will be used up, if the database grows as in the last ten minutes; +Inf if it does not grow.",
        "",
        seconds,
    );
    out
}
