//! Which HTTP requests are let in, by the host that they are addressed to, and which web pages may read the responses.
//!
//! A web page that a browser has loaded from elsewhere can make it send requests to this member, in two ways. Directly: then the
//! request names the page's origin, and the browser lets the page read the response only if the response's CORS headers say so
//! (`--cors`). Or by DNS rebinding: the page's own host name is made to resolve to this member's address, so for the browser both
//! are of one origin. Then the request is addressed to the page's host name, which `--host-whitelist` does not contain. (With TLS
//! that cannot work, because this member has no certificate for that name; so only plain requests are checked.)
//!
//! As in etcd this concerns HTTP alone: no browser can make a gRPC call.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};

use crate::config::access::AccessConfig;
use http2::limits;

const ALLOWED_METHODS: &str = "POST, GET, OPTIONS, PUT, DELETE";
const ALLOWED_HEADERS: &str = "accept, content-type, authorization";
const ANY_ORIGIN: HeaderValue = HeaderValue::from_static("*");

/// Lets in the requests of one kind of connection.
#[derive(Debug)]
pub struct AccessControl {
    config: AccessConfig,
    is_secure: bool,
}

impl AccessControl {
    /// `is_secure`: the requests come over TLS.
    #[must_use]
    pub fn new(config: AccessConfig, is_secure: bool) -> Self {
        Self { config, is_secure }
    }

    /// A router that serves only what is let in, and adds the headers of CORS.
    pub fn protect(self, router: Router) -> Router {
        let control = Arc::new(self);
        router.layer(middleware::from_fn(move |request: Request, next: Next| {
            let control = control.clone();
            async move { control.respond(request, next).await }
        }))
    }

    async fn respond(&self, request: Request, next: Next) -> Response {
        let host = host_name(request.uri(), request.headers());
        if !self.allows_host(host) {
            limits::count_refusal("host_whitelist");
            tracing::warn!(host, "rejecting HTTP request to prevent DNS rebinding attacks");
            return misdirected(host);
        }
        let origin = self.allowed_origin(request.headers());
        let mut response =
            if request.method() == Method::OPTIONS { Response::new(Body::empty()) } else { next.run(request).await };
        if let Some(origin) = origin {
            add_cors(response.headers_mut(), origin);
        }
        response
    }

    fn allows_host(&self, host: &str) -> bool {
        self.is_secure || is_listed(self.config.hosts.as_ref(), host)
    }

    /// The origin that the response names as allowed to read it.
    fn allowed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        if self.config.origins.is_none() {
            return Some(ANY_ORIGIN);
        }
        let origin = headers.get(header::ORIGIN)?;
        is_listed(self.config.origins.as_ref(), origin.to_str().ok()?).then(|| origin.clone())
    }
}

fn is_listed(list: Option<&BTreeSet<String>>, name: &str) -> bool {
    list.is_none_or(|list| list.contains(name))
}

fn add_cors(headers: &mut HeaderMap, origin: HeaderValue) {
    let fields: [(HeaderName, HeaderValue); 3] = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(ALLOWED_METHODS)),
        (header::ACCESS_CONTROL_ALLOW_ORIGIN, origin),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(ALLOWED_HEADERS)),
    ];
    headers.extend(fields);
}

/// The host that a request is addressed to, without the port. If that is no host and port, all of it, as in etcd.
fn host_name<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> &'a str {
    let in_header = || headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = uri.authority().map(Authority::as_str).or_else(in_header).unwrap_or_default();
    without_port(host).unwrap_or(host)
}

fn without_port(address: &str) -> Option<&str> {
    let (host, _) = address.rsplit_once(':')?;
    match host.strip_prefix('[') {
        Some(host) => host.strip_suffix(']').filter(|host| !host.contains(['[', ']'])),
        None => Some(host).filter(|_| !host.contains(':') && !address.contains(['[', ']'])),
    }
}

fn misdirected(host: &str) -> Response {
    let text = format!(
        "\nThis request is addressed to a host that this member is not known by: {host:?}.\n\n\
         Either use TLS (https), with which every host name is accepted, or have this member accept the name:\n  \
         --host-whitelist {host:?}\n\n\
         Other names are refused as a protection against DNS rebinding (CVE-2018-5702).\n\n"
    );
    (StatusCode::MISDIRECTED_REQUEST, [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_a_request_has_no_port() {
        let host = |uri: &'static str, header: Option<&'static str>| {
            let headers = header.map(|host| (header::HOST, HeaderValue::from_static(host))).into_iter().collect();
            host_name(&Uri::from_static(uri), &headers).to_owned()
        };
        for (header, expected) in [
            ("a.example:2379", "a.example"),
            ("a.example", "a.example"),
            ("[::1]:2379", "::1"),
            ("[::1]", "[::1]"),
            ("::1", "::1"),
            ("a:1:2", "a:1:2"),
            ("a]:1", "a]:1"),
            ("[a[b]:1", "[a[b]:1"),
            (":2379", ""),
            ("", ""),
        ] {
            assert_eq!(host("/health", Some(header)), expected, "{header}");
        }
        assert_eq!(host("/health", None), "");
        assert_eq!(host("http://b.example:1/health", Some("a.example")), "b.example", "the URI comes first");
    }

    #[test]
    fn hosts_are_checked_without_tls_only() {
        let hosts = Some(BTreeSet::from(["a".to_owned()]));
        let config = AccessConfig { hosts, ..AccessConfig::default() };
        let plain = AccessControl::new(config.clone(), false);
        assert!(plain.allows_host("a") && !plain.allows_host("b") && !plain.allows_host(""));
        assert!(AccessControl::new(config, true).allows_host("b"));
        assert!(AccessControl::new(AccessConfig::default(), false).allows_host("b"));
    }

    #[test]
    fn an_origin_is_named_if_it_is_listed() {
        let origins = Some(BTreeSet::from(["http://a:80".to_owned()]));
        let listed = AccessControl::new(AccessConfig { origins, ..AccessConfig::default() }, false);
        let all = AccessControl::new(AccessConfig::default(), false);
        let from = |origin| HeaderMap::from_iter([(header::ORIGIN, HeaderValue::from_static(origin))]);
        assert_eq!(listed.allowed_origin(&from("http://a:80")).unwrap(), "http://a:80");
        assert_eq!(listed.allowed_origin(&from("http://a")), None, "origins are compared as texts, as in etcd");
        assert_eq!(listed.allowed_origin(&HeaderMap::new()), None);
        assert_eq!(all.allowed_origin(&HeaderMap::new()).unwrap(), "*");
    }
}
