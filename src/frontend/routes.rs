//! What is no call of gRPC to a method of the table: gRPC reflection, the JSON API, and plain HTTP.

use std::sync::Arc;

use ::http::{HeaderValue, header::CONTENT_TYPE};
use tower::ServiceExt;

use super::{
    gateway::{Gateway, routes::is_json_path},
    grpc::{
        Grpc,
        methods::{self, REFLECTION},
        tonic::error_response,
    },
    http::{self, access::AccessControl, redirect::redirect},
};
use crate::service::{Caller, Operation};
use http2::{call::CallError, request};

/// Serves everything on the client port that the method table does not contain.
pub fn routes(grpc: &Arc<Grpc>, gateway: Option<Arc<Gateway>>, access: AccessControl) -> axum::Router {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
        .build_v1()
        .expect("the build script has generated the descriptors");
    let reflection = tonic::service::Routes::new(reflection).into_axum_router();
    let pages = http::router(grpc.service.clone());
    let web = access.protect(axum::Router::new().fallback(move |request: axum::extract::Request| {
        let directories: &[&str] = if gateway.is_some() { &["/v3/"] } else { &[] };
        let redirect = redirect(request.method(), request.uri(), directories);
        let gateway = gateway.clone().filter(|_| is_json_path(request.uri().path()));
        let pages = pages.clone();
        async move {
            match (redirect, gateway) {
                (Some(redirect), _) => Ok(redirect),
                (None, Some(gateway)) => Ok(gateway.respond(request).await),
                (None, None) => pages.oneshot(request).await,
            }
        }
    }));
    let service = grpc.service.clone();
    axum::Router::new().fallback(move |request: axum::extract::Request| {
        // As in etcd, gRPC requires HTTP/2.
        let is_http2 = request.version() == ::http::Version::HTTP_2;
        let content_type = request.headers().get(CONTENT_TYPE).filter(|_| is_http2).cloned();
        let codec = content_type.as_ref().and_then(|value| request::codec(value.as_bytes())).map(<[u8]>::to_vec);
        let refusal = match request.uri().path() {
            _ if codec.is_none() => None,
            REFLECTION => service.admit(&Caller::default(), &Operation::Health).err().map(CallError::from),
            unknown => Some(methods::refuse_unknown(unknown)),
        };
        let router = if codec.is_some() { reflection.clone() } else { web.clone() };
        async move {
            let mut response = match refusal {
                Some(refusal) => error_response(&refusal).map(axum::body::Body::new),
                None => router.oneshot(request).await?,
            };
            if let Some(codec) = codec.filter(|codec| !codec.is_empty())
                && let Ok(content_type) = HeaderValue::from_bytes(&[request::GRPC, b"+", &codec].concat())
            {
                response.headers_mut().insert(CONTENT_TYPE, content_type);
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    })
}
