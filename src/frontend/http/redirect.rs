//! Redirections to the path that was meant, as Go's HTTP server makes them: `//health` and `/./health` mean `/health`.

use axum::{
    body::Body,
    http::{HeaderValue, Method, Response, StatusCode, Uri, header},
};

/// The redirection for a path with empty parts, dots, or without the slash at its end that one of `directories` has.
#[must_use]
pub fn redirect(method: &Method, uri: &Uri, directories: &[&str]) -> Option<Response<Body>> {
    let path = uri.path();
    if method == Method::CONNECT || !path.starts_with('/') {
        return None;
    }
    let mut meant = clean(path);
    if directories.iter().any(|directory| directory.strip_suffix('/') == Some(&meant)) {
        meant.push('/');
    }
    if meant == path {
        return None;
    }
    if let Some(query) = uri.query() {
        meant.push('?');
        meant.push_str(query);
    }
    let location = HeaderValue::from_str(&meant).ok()?;
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    if method == Method::GET || method == Method::HEAD {
        let link = meant.replace('&', "&amp;").replace('"', "&#34;").replace('\'', "&#39;");
        *response.body_mut() = Body::from(format!("<a href=\"{link}\">Temporary Redirect</a>.\n\n"));
        let html = HeaderValue::from_static("text/html; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, html);
    }
    response.headers_mut().insert(header::LOCATION, location);
    Some(response)
}

/// A path without empty parts and dots. A slash at its end remains.
fn clean(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => (),
            ".." => _ = parts.pop(),
            _ => parts.push(part),
        }
    }
    let mut cleaned: String = parts.iter().flat_map(|part| ["/", part]).collect();
    if cleaned.is_empty() || path.ends_with('/') {
        cleaned.push('/');
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_redirected_to_what_they_mean() {
        let location = |path: &str| {
            let response = redirect(&Method::POST, &path.parse().unwrap(), &["/v3/"])?;
            Some(response.headers()[header::LOCATION].to_str().unwrap().to_owned())
        };
        for (path, meant) in [
            ("//v3/kv/range", "/v3/kv/range"),
            ("/v3/./kv/range", "/v3/kv/range"),
            ("/v3/kv/../kv/range?x=1", "/v3/kv/range?x=1"),
            ("/v3//", "/v3/"),
            ("/v3?a=b", "/v3/?a=b"),
            ("/../..", "/"),
            ("//", "/"),
        ] {
            assert_eq!(location(path).as_deref(), Some(meant), "{path}");
        }
        for path in ["/", "/v3/", "/v3/kv/range", "/health/", "/v4", "/v3x"] {
            assert_eq!(location(path), None, "{path}");
        }
    }
}
