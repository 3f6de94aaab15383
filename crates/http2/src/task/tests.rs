//! The client of the `h2` crate over a pipe: each side reads what the other writes, whatever the fields are.

use std::{future, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response as HttpResponse};
use http_body_util::BodyExt;
use proptest::prelude::*;
use tokio::io::DuplexStream;

use super::*;
use crate::{
    call::CallError,
    ledger::Ledger,
    limits::Limits,
    registry::ConnectionRegistry,
    request_body::RequestBody,
    service::{Method, Response, ResponseBody},
};

/// Answers every request with what the function makes of it.
struct TestService<F>(F);

impl<F: Fn(Request<RequestBody>) -> HttpResponse<ResponseBody> + Send + Sync> Service for TestService<F> {
    fn find(&self, _: &str) -> Option<Arc<dyn Method>> {
        None
    }

    fn refuse(&self, _: &str) -> Option<CallError> {
        None
    }

    fn run_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        job();
    }

    fn handle_http(&self, request: Request<RequestBody>) -> Response {
        Box::pin(future::ready((self.0)(request)))
    }
}

/// Responds with the fields, the body and the trailers of the request.
fn mirror(request: Request<RequestBody>) -> HttpResponse<ResponseBody> {
    let (parts, body) = request.into_parts();
    let body: ResponseBody = Box::pin(body);
    let mut response = HttpResponse::new(body);
    *response.headers_mut() = parts.headers;
    response
}

fn serve(pipe_bytes: usize) -> (DuplexStream, Arc<ConnectionRegistry>) {
    let registry = ConnectionRegistry::new(Limits::default(), Ledger::new(usize::MAX));
    let (client, server) = tokio::io::duplex(pipe_bytes);
    let guard = registry.register().unwrap();
    tokio::spawn(Task::new(
        BufferingSocket { pipe: server, kept: Vec::new() },
        Bytes::new(),
        Arc::new(TestService(mirror)),
        guard,
    ));
    (client, registry)
}

/// A socket that accepts everything at once and passes it on only when it is flushed, as TLS does.
struct BufferingSocket {
    pipe: DuplexStream,
    kept: Vec<u8>,
}

impl AsyncRead for BufferingSocket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().pipe).poll_read(context, buffer)
    }
}

impl AsyncWrite for BufferingSocket {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().kept.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while !this.kept.is_empty() {
            let written = ready!(Pin::new(&mut this.pipe).poll_write(context, &this.kept))?;
            this.kept.drain(..written);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.as_mut().poll_flush(context))?;
        Pin::new(&mut self.get_mut().pipe).poll_shutdown(context)
    }
}

async fn echo(
    client: &mut h2::client::SendRequest<Bytes>,
    fields: &HeaderMap,
    body: Vec<u8>,
) -> (HeaderMap, Vec<u8>, HeaderMap) {
    let mut request = Request::post("http://a.b/mirror").body(()).unwrap();
    *request.headers_mut() = fields.clone();
    *client = client.clone().ready().await.unwrap();
    let (response, mut sender) = client.send_request(request, false).unwrap();
    sender.send_data(body.into(), false).unwrap();
    sender.send_trailers(fields.clone()).unwrap();
    let (head, mut body) = response.await.unwrap().into_parts();
    let mut data = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece.unwrap();
        body.flow_control().release_capacity(piece.len()).unwrap();
        data.extend_from_slice(&piece);
    }
    (head.headers, data, body.trailers().await.unwrap().unwrap())
}

fn fields() -> impl Strategy<Value = HeaderMap> {
    let name = prop_oneof![
        "[a-z][a-z0-9-]{0,20}",
        prop::sample::select(vec!["accept", "cookie", "user-agent", "grpc-status", "content-type", "x"])
            .prop_map(str::to_owned),
    ];
    let value =
        prop_oneof!["[!-~]{0,60}", Just("application/grpc".to_owned()), Just("0".to_owned()), Just("y".repeat(3000)),];
    prop::collection::vec((name, value), 0..12).prop_map(|pairs| {
        let forbidden = ["te", "connection", "upgrade", "keep-alive", "transfer-encoding", "content-length", "host"];
        let mut map = HeaderMap::new();
        for (name, value) in pairs.iter().filter(|(name, _)| !forbidden.contains(&name.as_str())) {
            map.append(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
        }
        map
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn fields_and_bodies_are_echoed_unchanged(
        lists in prop::collection::vec((fields(), 0_usize..200_000), 1..8),
        pipe_bytes in 1_usize..10_000,
        table_size in prop::sample::select(vec![0_u32, 50, 200, 4096, 65_536]),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let (pipe, _lobby) = serve(pipe_bytes);
            let mut builder = h2::client::Builder::new();
            builder.header_table_size(table_size);
            let (mut client, connection) = builder.handshake::<_, Bytes>(pipe).await.unwrap();
            tokio::spawn(connection);
            for (fields, length) in lists {
                let body = vec![b'.'; if length % 3 == 0 { length } else { length % 100 }];
                let (head, data, trailers) = echo(&mut client, &fields, body.clone()).await;
                assert_eq!((&head, &trailers), (&fields, &fields));
                assert_eq!(data, body);
            }
        });
    }
}

#[tokio::test]
async fn output_continues_when_the_socket_has_room() {
    let (pipe, _lobby) = serve(10_000);
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 26).initial_connection_window_size(1 << 26); // The windows never have to grow.
    let (client, connection) = builder.handshake::<_, Bytes>(pipe).await.unwrap();
    tokio::spawn(connection);
    let mut waiting = tokio::task::JoinSet::new();
    for nth in 0..3 {
        let mut client = client.clone();
        waiting.spawn(async move {
            echo(&mut client, &HeaderMap::new(), vec![nth; 3_000_000]).await.1 == vec![nth; 3_000_000]
        });
    }
    assert_eq!(waiting.join_all().await, [true; 3]);
}

#[tokio::test]
async fn a_client_that_does_not_read_the_last_bytes_is_not_waited_for() {
    let registry = ConnectionRegistry::new(Limits::default(), Ledger::new(usize::MAX));
    let (_client, server) = tokio::io::duplex(30);
    let socket = BufferingSocket { pipe: server, kept: Vec::new() };
    let first = Bytes::from_static(b"whatever this is, it is no preface");
    let task = Task::new(socket, first, Arc::new(TestService(mirror)), registry.register().unwrap());
    tokio::time::timeout(Duration::from_secs(5), task).await.expect("the task ends by itself").unwrap();
}

#[tokio::test]
async fn a_shutdown_in_the_middle_of_a_turn_is_noticed() {
    let registry = ConnectionRegistry::new(Limits::default(), Ledger::new(usize::MAX));
    let (client, server) = tokio::io::duplex(10_000);
    let guard = registry.register().unwrap();
    let service = {
        let registry = registry.clone();
        // The notification is taken in the turn in which it is put.
        TestService(move |_| {
            registry.shut_down();
            let body: ResponseBody = Box::pin(http_body_util::Empty::new().map_err(|never| match never {}));
            HttpResponse::new(body)
        })
    };
    tokio::spawn(Task::new(server, Bytes::new(), Arc::new(service), guard));
    let (mut client, connection) = h2::client::handshake(client).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://a.b/").body(()).unwrap();
    client.send_request(request, true).unwrap().0.await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), registry.wait_until_empty()).await.expect("the connection ends");
}

#[tokio::test]
async fn after_a_shutdown_a_connection_ends_with_its_last_call() {
    let (pipe, registry) = serve(10_000);
    let (mut client, connection) = h2::client::handshake(pipe).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::post("http://a.b/mirror").body(()).unwrap();
    let (response, mut sender) = client.send_request(request, false).unwrap();
    response.await.unwrap();
    registry.shut_down();
    for _ in 0..100 {
        tokio::task::yield_now().await; // It must not end yet, however often its task runs.
    }
    assert!(!connection.is_finished());
    sender.send_data(Bytes::from_static(b"last"), true).unwrap();
    tokio::time::timeout(Duration::from_secs(5), registry.wait_until_empty()).await.unwrap();
    connection.await.unwrap().unwrap();
}

/// The client sends everything at once and closes its side: the response still arrives, and then the connection ends.
#[tokio::test]
async fn a_client_that_closes_its_side_is_still_answered() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (mut client, registry) = serve(10_000);
    let block = [&[0x83, 0x86, 0x04, 2][..], b"/x", b"\x0f\x10\x0atext/plain"].concat();
    let mut request_bytes = crate::frame::PREFACE.to_vec();
    request_bytes.extend(crate::frame::head(0, 4, 0, 0));
    request_bytes.extend(crate::frame::head(block.len(), 1, 4, 1));
    request_bytes.extend(&block);
    request_bytes.extend(crate::frame::head(5, 0, 1, 1));
    request_bytes.extend(b"hello");
    client.write_all(&request_bytes).await.unwrap();
    client.shutdown().await.unwrap();
    let mut response_bytes = Vec::new();
    client.read_to_end(&mut response_bytes).await.unwrap();
    assert!(response_bytes.windows(5).any(|window| window == b"hello"), "{response_bytes:?}");
    tokio::time::timeout(Duration::from_secs(5), registry.wait_until_empty()).await.expect("the connection ends");
}
