//! The short form of a start command, for a cluster on a desk:
//!
//! ```sh
//! metastore --id=1 --cluster=http://127.0.0.1:9021,http://127.0.0.1:9022,http://127.0.0.1:9023 --grpc-addr=:2379
//! ```
//!
//! It says nothing that the long form could not say: each of its flags stands for some of the long ones, which are set
//! here as if they had been typed. A long flag beside it must say the same.

use super::{
    flags,
    parse::Typed,
    urls::{Place, Url},
};

/// Sets the long flags that the short form stands for.
///
/// # Errors
/// If it is incomplete, wrong, or contradicts a long flag.
pub fn expand(typed: &mut Typed) -> Result<(), String> {
    let Some(used) = flags::SHORT_FORM.iter().map(|flag| flag.name).find(|name| *name != "port" && typed.is_set(name))
    else {
        return Ok(());
    };
    for needed in ["id", "cluster"] {
        if !typed.is_set(needed) {
            return Err(format!(
                "--{used} is part of the short form, which needs --id and --cluster: --{needed} is missing"
            ));
        }
    }
    let cluster = members(typed.text("cluster"))?;
    let id: u64 = typed.get("id");
    let own = usize::try_from(id).ok().and_then(|id| cluster.get(id.checked_sub(1)?));
    let own = own.ok_or_else(|| {
        format!("--id={id} is none of the members that --cluster lists: 1 to {} are allowed", cluster.len())
    })?;
    let named = |nth: usize, url: &Url| format!("{}={url}", name(nth as u64 + 1));
    let initial: Vec<_> = cluster.iter().enumerate().map(|(nth, url)| named(nth, url)).collect();
    imply(typed, "id", "name", name(id))?;
    imply(typed, "cluster", "initial-cluster", initial.join(","))?;
    imply(typed, "cluster", "initial-advertise-peer-urls", own.to_string())?;
    imply(typed, "cluster", "listen-peer-urls", listener(own))?;
    if typed.get("join") {
        imply(typed, "join", "initial-cluster-state", "existing".to_owned())?;
    }
    if typed.is_set("grpc-addr") {
        let (listen, advertise) = client_urls(typed.text("grpc-addr"), own)?;
        imply(typed, "grpc-addr", "listen-client-urls", listen)?;
        imply(typed, "grpc-addr", "advertise-client-urls", advertise)?;
    }
    Ok(())
}

fn name(id: u64) -> String {
    format!("node{id}")
}

/// The members' URLs, in the order of their IDs.
fn members(text: &str) -> Result<Vec<Url>, String> {
    text.split(',').map(|url| Url::parse(url).map_err(|why| format!("--cluster: {why}"))).collect()
}

/// Where to listen for what is reached under this URL: behind a name that could mean many hosts, everywhere.
fn listener(url: &Url) -> String {
    match url.place() {
        Place::Tcp { port, .. } if !url.can_be_bound() => format!("http://0.0.0.0:{port}"),
        Place::Tcp { .. } | Place::Unix(_) => url.to_string(),
    }
}

/// Where to listen for clients, and what to tell them: without a host everywhere, and the host that members use.
fn client_urls(address: &str, own: &Url) -> Result<(String, String), String> {
    let wrong = |why: &str| format!("--grpc-addr={address}: {why}; it is `host:port` or `:port`");
    let (host, port) = address.rsplit_once(':').ok_or_else(|| wrong("there is no port"))?;
    if !host.is_empty() {
        let url = Url::parse(&format!("http://{address}")).map_err(|why| wrong(&why))?;
        return Ok((listener(&url), url.to_string()));
    }
    port.parse::<u16>().map_err(|_| wrong("that is no port"))?;
    let reached = match own.place() {
        Place::Tcp { host, .. } if host.contains(':') => format!("[{host}]"),
        Place::Tcp { host, .. } => host.clone(),
        Place::Unix(_) => "localhost".to_owned(),
    };
    Ok((format!("http://0.0.0.0:{port}"), format!("http://{reached}:{port}")))
}

fn imply(typed: &mut Typed, short: &str, long: &str, value: String) -> Result<(), String> {
    let flag = flags::find(long).expect("it is in the table");
    if typed.is_set(long) && !flag.same(typed.text(long), &value) {
        let (said, meant) = (typed.text(long), typed.text(short));
        return Err(format!("--{long}={said} contradicts --{short}={meant}, which means --{long}={value}"));
    }
    typed.imply(flag, value)
}
