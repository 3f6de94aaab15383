//! What the method table does not hold: gRPC's own services, and plain HTTP.

use std::sync::Arc;

use tower::ServiceExt;

use crate::{
    api::{self, Api, grpc},
    error::Error,
};

/// Everything on the client port that the method table does not hold.
pub fn routes(api: &Arc<Api>) -> axum::Router {
    let (health, health_service) = tonic_health::server::health_reporter();
    tokio::spawn(async move { health.set_service_status("", tonic_health::ServingStatus::Serving).await });
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::proto::DESCRIPTORS)
        .build_v1()
        .expect("the descriptors were made by the build");
    let gzip = tonic::codec::CompressionEncoding::Gzip;
    let health_service = health_service.accept_compressed(gzip).send_compressed(gzip);
    let grpc = tonic::service::Routes::new(health_service).add_service(reflection).into_axum_router();
    let grpc = grpc.fallback(|| async { grpc::unknown_method() });
    let plain = api::http::router(api.clone());
    let node_status = api.node.status().clone();
    axum::Router::new().fallback(move |request: axum::extract::Request| {
        let content = request.headers().get(http::header::CONTENT_TYPE);
        let is_grpc = content.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        let router = if is_grpc { grpc.clone() } else { plain.clone() };
        // Health checks are among the calls that a learner refuses.
        let refused = is_grpc && node_status.is_learner();
        async move {
            if refused {
                return Ok(grpc::refused(&Error::NotSupportedForLearner.into()).map(axum::body::Body::new));
            }
            router.oneshot(request).await
        }
    })
}
