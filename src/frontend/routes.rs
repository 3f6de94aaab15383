//! What is no call of gRPC to a method of the table: gRPC reflection, the JSON API, and plain HTTP.

use std::sync::Arc;

use ::http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use axum::response::IntoResponse;
use tower::ServiceExt;

use super::{
    gateway::{Gateway, routes::is_json_path},
    grpc::{
        Grpc,
        methods::{self, MethodTable, REFLECTION},
        tonic::error_response,
    },
    http::{self, access::AccessControl, quick_api::QuickApi, redirect::redirect},
};
use crate::service::{Caller, Operation};
use http2::{
    call::{CallError, Code},
    request,
};

/// What a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    GrpcAndHttp,
    Grpc,
    /// For clients, with the JSON API.
    Http,
    /// Metrics and health, over HTTP.
    Metrics,
    /// The quick HTTP API, and whether it has the paths of `--port-admin`.
    Quick {
        numbers_are_members: bool,
    },
}

impl Traffic {
    #[must_use]
    pub fn has_grpc(self) -> bool {
        matches!(self, Self::GrpcAndHttp | Self::Grpc)
    }

    /// As in log lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GrpcAndHttp => "grpc+http",
            Self::Grpc => "grpc",
            Self::Http => "http",
            Self::Metrics => "metrics",
            Self::Quick { .. } => "quick http",
        }
    }
}

/// Serves everything that the method table does not contain.
pub fn routes(
    traffic: Traffic,
    grpc: &Arc<Grpc>,
    methods: &Arc<MethodTable>,
    gateway: Option<Arc<Gateway>>,
    access: AccessControl,
) -> axum::Router {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
        .build_v1()
        .expect("the build script has generated the descriptors");
    let reflection = tonic::service::Routes::new(reflection).into_axum_router();
    let service = grpc.service.clone();
    let pages = match traffic {
        Traffic::GrpcAndHttp | Traffic::Http => access.protect(pages(http::client_routes(service.clone()), gateway)),
        Traffic::Metrics => pages(http::metrics_routes(service.clone()), None),
        Traffic::Grpc => axum::Router::new().fallback(refuse_http),
        Traffic::Quick { numbers_are_members } => {
            let api = Arc::new(QuickApi::new(grpc, methods.clone(), numbers_are_members));
            access.protect(axum::Router::new().fallback(async move |request| api.respond(request).await))
        }
    };
    axum::Router::new().fallback(move |request: axum::extract::Request| {
        // As in etcd, gRPC requires HTTP/2.
        let may_be_grpc = traffic.has_grpc() && request.version() == ::http::Version::HTTP_2;
        let content_type = request.headers().get(CONTENT_TYPE).filter(|_| may_be_grpc).cloned();
        let codec = content_type.as_ref().and_then(|value| request::codec(value.as_bytes())).map(<[u8]>::to_vec);
        let refusal = match request.uri().path() {
            _ if codec.is_none() => None,
            REFLECTION => service.admit(&Caller::default(), &Operation::Health).err().map(CallError::from),
            unknown => Some(methods::refuse_unknown(unknown)),
        };
        let router = if codec.is_some() { reflection.clone() } else { pages.clone() };
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

/// Plain HTTP: these routes, the JSON API, and redirections to both.
fn pages(plain: axum::Router, gateway: Option<Arc<Gateway>>) -> axum::Router {
    let directories: &[&str] = if gateway.is_some() { &["/v3/"] } else { &[] };
    axum::Router::new().fallback(move |request: axum::extract::Request| {
        let redirect = redirect(request.method(), request.uri(), directories);
        let gateway = gateway.clone().filter(|_| is_json_path(request.uri().path()));
        let plain = plain.clone();
        async move {
            match (redirect, gateway) {
                (Some(redirect), _) => Ok(redirect),
                (None, Some(gateway)) => Ok(gateway.respond(request).await),
                (None, None) => plain.oneshot(request).await,
            }
        }
    })
}

/// As the server of gRPC in etcd answers what is no call.
async fn refuse_http(headers: HeaderMap) -> impl IntoResponse {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let message = format!("invalid gRPC request content-type {content_type:?}");
    let code = (Code::InvalidArgument as i32).to_string();
    let headers = [(CONTENT_TYPE.as_str(), "application/grpc"), ("grpc-status", &code), ("grpc-message", &message)];
    (StatusCode::UNSUPPORTED_MEDIA_TYPE, headers.map(|(name, value)| (name.to_owned(), value.to_owned())))
        .into_response()
}
