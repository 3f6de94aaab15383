//! Client and peer URLs, parsed and printed as in etcd's flags.
//!
//! A URL is an address to listen on or to connect to, and nothing more: a scheme with `host:port` or a socket file. Two URLs
//! are equal if their texts are; member IDs are derived from the text.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Url {
    /// As etcd prints it. The first field, so that URLs are ordered by their texts.
    text: String,
    place: UrlAddress,
    secure: bool,
}

/// The address that a URL refers to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum UrlAddress {
    Tcp {
        /// A name or an IP address, without brackets; may be empty.
        host: String,
        port: u16,
    },
    /// The path of a unix socket.
    Unix(PathBuf),
}

impl Url {
    /// Parses one URL; surrounding whitespace is ignored.
    ///
    /// # Errors
    /// With etcd's text, or that of Go's `net/url` if the text is not a URL at all.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let unparsable = |why: &str| format!("parse {text:?}: {why}");
        if text.chars().any(char::is_control) {
            return Err(unparsable("net/url: invalid control character in URL"));
        }
        let (scheme, rest) = split_scheme(text).map_err(unparsable)?;
        if scheme.is_empty() && rest.split('/').next().is_some_and(|first| first.contains(':')) {
            return Err(unparsable("first path segment in URL cannot contain colon"));
        }
        let scheme = scheme.to_ascii_lowercase();
        let (authority, path) = split_authority(rest);
        check_host(authority).map_err(|why| unparsable(&why))?;
        let printed = format!("{scheme}:{rest}");
        match scheme.as_str() {
            "http" | "https" => {
                let (host, port) = split_host_port(authority)
                    .ok_or_else(|| format!("URL address does not have the form \"host:port\": {text}"))?;
                let port = port
                    .parse()
                    .map_err(|_| unparsable(&format!("invalid port {:?} after host", format!(":{port}"))))?;
                if !path.is_empty() {
                    return Err(format!("URL must not contain a path: {text}"));
                }
                Ok(Self {
                    text: printed,
                    place: UrlAddress::Tcp { host: host.to_owned(), port },
                    secure: scheme == "https",
                })
            }
            "unix" | "unixs" => {
                let file = PathBuf::from(format!("{authority}{path}"));
                Ok(Self { text: printed, place: UrlAddress::Unix(file), secure: scheme == "unixs" })
            }
            _ => Err(format!("URL scheme must be http, https, unix, or unixs: {text}")),
        }
    }

    /// An `http` URL.
    #[must_use]
    pub fn from_ip(host: IpAddr, port: u16) -> Self {
        let text = format!("http://{}", SocketAddr::new(host, port));
        Self { text, place: UrlAddress::Tcp { host: host.to_string(), port }, secure: false }
    }

    /// As etcd prints it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    #[must_use]
    pub fn address(&self) -> &UrlAddress {
        &self.place
    }

    /// Whether the scheme is `https` or `unixs`.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    /// Whether a listener can bind to it: a socket file, an IP address or `localhost`, but not a name that may resolve to several
    /// hosts.
    #[must_use]
    pub fn can_be_bound(&self) -> bool {
        match &self.place {
            UrlAddress::Unix(_) => true,
            UrlAddress::Tcp { host, .. } => host == "localhost" || host.parse::<IpAddr>().is_ok(),
        }
    }

    /// Whether it is a TCP address without a host.
    #[must_use]
    pub fn has_empty_host(&self) -> bool {
        matches!(&self.place, UrlAddress::Tcp { host, .. } if host.is_empty())
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Parses a comma-separated list: sorted, without duplicates. An empty text is an empty list.
///
/// # Errors
/// As [`Url::parse`], for the first invalid URL.
pub fn parse_list(text: &str) -> Result<Vec<Url>, String> {
    if text.trim().is_empty() { Ok(Vec::new()) } else { parse_each(text) }
}

/// As [`parse_list`], but an empty text is one invalid URL.
///
/// # Errors
/// As [`Url::parse`], for the first invalid URL.
pub fn parse_each(text: &str) -> Result<Vec<Url>, String> {
    let mut urls = text.split(',').map(Url::parse).collect::<Result<Vec<_>, _>>()?;
    urls.sort();
    urls.dedup();
    Ok(urls)
}

/// The URLs, separated by commas, as in messages.
#[must_use]
pub fn joined(urls: &[Url]) -> String {
    urls.iter().map(Url::as_str).collect::<Vec<_>>().join(",")
}

/// Splits off the scheme and its colon; without a scheme, the first part is empty.
fn split_scheme(text: &str) -> Result<(&str, &str), &'static str> {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '+' | '-' | '.')).unwrap_or(text.len());
    match text[end..].starts_with(':') {
        true if end == 0 => Err("missing protocol scheme"),
        true if text.starts_with(|c: char| c.is_ascii_alphabetic()) => Ok((&text[..end], &text[end + 1..])),
        _ => Ok(("", text)),
    }
}

/// The authority, between `//` and the next slash, and the path after it.
fn split_authority(rest: &str) -> (&str, &str) {
    let Some(rest) = rest.strip_prefix("//") else {
        return ("", rest);
    };
    rest.split_at(rest.find('/').unwrap_or(rest.len()))
}

/// Refuses characters that a host cannot contain, and thereby also a user, a query and a fragment.
fn check_host(authority: &str) -> Result<(), String> {
    if let Some(at) = authority.find('%') {
        let end = authority.len().min(at + 3);
        return Err(format!("invalid URL escape {:?}", authority.get(at..end).unwrap_or("%")));
    }
    let bad = |c: &char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '-' | '_' | '~' | ':' | '[' | ']' | '*');
    if let Some(c) = authority.chars().find(bad) {
        return Err(format!("invalid character {:?} in host name", c.to_string()));
    }
    let port = match authority.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']').ok_or("missing ']' in host")?.1,
        None => authority.find(':').map_or("", |colon| &authority[colon..]),
    };
    let digits = port.strip_prefix(':').unwrap_or(port);
    if digits.bytes().all(|byte| byte.is_ascii_digit()) && (port.is_empty() || port.starts_with(':')) {
        return Ok(());
    }
    Err(format!("invalid port {port:?} after host"))
}

/// Host and port. An IPv6 address must be in brackets; None without a port.
fn split_host_port(authority: &str) -> Option<(&str, &str)> {
    let (host, port) = authority.rsplit_once(':').filter(|(_, port)| !port.is_empty())?;
    match host.strip_prefix('[') {
        Some(inner) => {
            let address = inner.strip_suffix(']')?;
            address.parse::<Ipv6Addr>().is_ok().then_some((address, port))
        }
        None => Some((host, port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> UrlAddress {
        UrlAddress::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn valid_urls_are_parsed_and_printed_as_in_etcd() {
        for (text, printed, place) in [
            ("http://localhost:2379", "http://localhost:2379", tcp("localhost", 2379)),
            ("  HTTP://LocalHost:1 ", "http://LocalHost:1", tcp("LocalHost", 1)),
            ("https://[::1]:80", "https://[::1]:80", tcp("::1", 80)),
            ("http://:2379", "http://:2379", tcp("", 2379)),
            ("unix://localhost:2379", "unix://localhost:2379", UrlAddress::Unix("localhost:2379".into())),
            ("unix:///tmp/x", "unix:///tmp/x", UrlAddress::Unix("/tmp/x".into())),
            ("unixs://a/b", "unixs://a/b", UrlAddress::Unix("a/b".into())),
            ("unix:foo", "unix:foo", UrlAddress::Unix("foo".into())),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!((url.as_str(), url.address()), (printed, &place));
            assert_eq!(url.is_secure(), printed.starts_with("https") || printed.starts_with("unixs"));
        }
    }

    #[test]
    fn invalid_urls_have_etcds_error_texts() {
        for (text, error) in [
            ("", "URL scheme must be http, https, unix, or unixs: "),
            ("foo", "URL scheme must be http, https, unix, or unixs: foo"),
            ("localhost:2379", "URL scheme must be http, https, unix, or unixs: localhost:2379"),
            ("ftp://x:1", "URL scheme must be http, https, unix, or unixs: ftp://x:1"),
            ("http://localhost", "URL address does not have the form \"host:port\": http://localhost"),
            ("http://localhost:", "URL address does not have the form \"host:port\": http://localhost:"),
            ("http://", "URL address does not have the form \"host:port\": http://"),
            ("http:///x", "URL address does not have the form \"host:port\": http:///x"),
            ("http://h:1/", "URL must not contain a path: http://h:1/"),
            ("127.0.0.1:2379", "parse \"127.0.0.1:2379\": first path segment in URL cannot contain colon"),
            (
                "b=http://localhost:2380",
                "parse \"b=http://localhost:2380\": first path segment in URL cannot contain colon",
            ),
            ("://", "parse \"://\": missing protocol scheme"),
            ("http://localhost:x", "parse \"http://localhost:x\": invalid port \":x\" after host"),
            ("http://::1:80", "parse \"http://::1:80\": invalid port \"::1:80\" after host"),
            ("http://h:99999", "parse \"http://h:99999\": invalid port \":99999\" after host"),
            ("http://a b:1", "parse \"http://a b:1\": invalid character \" \" in host name"),
            ("http://[::1:80", "parse \"http://[::1:80\": missing ']' in host"),
            ("http://%zz:1", "parse \"http://%zz:1\": invalid URL escape \"%zz\""),
            ("http://u@h:1", "parse \"http://u@h:1\": invalid character \"@\" in host name"),
        ] {
            assert_eq!(Url::parse(text).unwrap_err(), error);
        }
    }

    #[test]
    fn a_list_is_sorted_and_deduplicated() {
        let urls = parse_list("http://b:1, http://a:2,http://b:1").unwrap();
        assert_eq!(joined(&urls), "http://a:2,http://b:1");
        assert_eq!(parse_list(" "), Ok(vec![]));
        assert!(parse_list("http://a:1,").is_err());
        assert!(parse_each("").is_err());
    }

    #[test]
    fn only_an_ip_localhost_or_a_socket_file_can_be_bound() {
        for text in ["http://127.0.0.1:1", "http://[::]:1", "http://localhost:1", "unix://anything:1"] {
            assert!(Url::parse(text).unwrap().can_be_bound(), "{text}");
        }
        for text in ["http://etcd-0:1", "http://:1"] {
            assert!(!Url::parse(text).unwrap().can_be_bound(), "{text}");
        }
    }
}
