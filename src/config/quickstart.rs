//! The quickstart flags, a short form of the start command for local clusters:
//!
//! ```sh
//! metastore --id=1 --cluster=http://127.0.0.1:9021,http://127.0.0.1:9022,http://127.0.0.1:9023 --grpc-addr=:2379
//! ```
//!
//! Each of them stands for one or more of etcd's flags, which are set here as if they had been given. An etcd flag that is
//! given as well must have the same value.

use super::{flags, parse::FlagValues, quick_api};
use crate::net::url::{Url, UrlAddress};

/// Sets the flags that the short form stands for.
///
/// # Errors
/// If the short form is incomplete or invalid, or contradicts another flag.
pub fn expand(values: &mut FlagValues) -> Result<(), String> {
    let names = flags::QUICKSTART.iter().map(|flag| flag.name).filter(|name| !quick_api::FLAGS.contains(name));
    let Some(used) = names.into_iter().find(|name| values.is_set(name)) else {
        return Ok(());
    };
    for needed in ["id", "cluster"] {
        if !values.is_set(needed) {
            return Err(format!(
                "--{used} is part of the short form, which needs --id and --cluster: --{needed} is missing"
            ));
        }
    }
    let cluster = members(values.text("cluster"))?;
    let id: u64 = values.get("id");
    let own = usize::try_from(id).ok().and_then(|id| cluster.get(id.checked_sub(1)?));
    let own =
        own.ok_or_else(|| format!("--id={id} is not a member of --cluster: 1 to {} are allowed", cluster.len()))?;
    let named = |nth: usize, url: &Url| format!("{}={url}", name(nth as u64 + 1));
    let initial: Vec<_> = cluster.iter().enumerate().map(|(nth, url)| named(nth, url)).collect();
    imply(values, "id", "name", name(id))?;
    imply(values, "cluster", "initial-cluster", initial.join(","))?;
    imply(values, "cluster", "initial-advertise-peer-urls", own.to_string())?;
    imply(values, "cluster", "listen-peer-urls", listen_url(own))?;
    if values.get("join") {
        imply(values, "join", "initial-cluster-state", "existing".to_owned())?;
    }
    if values.is_set("grpc-addr") {
        let (listen, advertise) = client_urls(values.text("grpc-addr"), own)?;
        imply(values, "grpc-addr", "listen-client-urls", listen)?;
        imply(values, "grpc-addr", "advertise-client-urls", advertise)?;
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

/// The listen URL for an advertised one: all interfaces if its host is a name.
fn listen_url(url: &Url) -> String {
    match url.address() {
        UrlAddress::Tcp { port, .. } if !url.can_be_bound() => {
            format!("{}://0.0.0.0:{port}", if url.is_secure() { "https" } else { "http" })
        }
        UrlAddress::Tcp { .. } | UrlAddress::Unix(_) => url.to_string(),
    }
}

/// The listen URL and the advertised URL for clients. Without a host: all interfaces, and the host of the peer URL.
fn client_urls(address: &str, own: &Url) -> Result<(String, String), String> {
    let invalid = |why: &str| format!("--grpc-addr={address}: {why}; expected `host:port` or `:port`");
    let (host, port) = address.rsplit_once(':').ok_or_else(|| invalid("missing port"))?;
    if !host.is_empty() {
        let url = Url::parse(&format!("http://{address}")).map_err(|why| invalid(&why))?;
        return Ok((listen_url(&url), url.to_string()));
    }
    port.parse::<u16>().map_err(|_| invalid("invalid port"))?;
    let advertised_host = match own.address() {
        UrlAddress::Tcp { host, .. } if host.contains(':') => format!("[{host}]"),
        UrlAddress::Tcp { host, .. } => host.clone(),
        UrlAddress::Unix(_) => "localhost".to_owned(),
    };
    Ok((format!("http://0.0.0.0:{port}"), format!("http://{advertised_host}:{port}")))
}

fn imply(values: &mut FlagValues, short: &str, long: &str, value: String) -> Result<(), String> {
    let flag = flags::find(long).expect("the flag is in the table");
    if values.is_set(long) && !flag.same_value(values.text(long), &value) {
        let (long_value, short_value) = (values.text(long), values.text(short));
        return Err(format!("--{long}={long_value} contradicts --{short}={short_value}, which means --{long}={value}"));
    }
    values.imply(flag, value)
}
