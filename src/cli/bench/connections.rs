//! Connections to the server.
//!
//! Streams use tonic's channels. Unary calls have a channel of their own, because tonic's client sends each call in three
//! writes (the headers, the message, the end), while most clients in use send it in one: what is measured is the server.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{RecvStream, client, client::SendRequest};
use http::{HeaderName, HeaderValue, Request, Response, Uri, uri};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;
use tonic::{
    Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::Service;

use crate::{
    net::{
        stream::{Socket, Stream},
        tls::ClientTls,
    },
    proto::etcdserverpb::{AuthenticateRequest, auth_client::AuthClient},
};

/// The header field of a token.
const TOKEN: HeaderName = HeaderName::from_static("token");
/// Large, so that long lists do not wait for window updates.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// A new connection to the server at `url`, on the current runtime, for up to `callers` concurrent calls.
pub(super) async fn connect(url: &str, callers: u32, tls: &Arc<ClientTls>) -> Result<Channel, String> {
    let explain = |error: &dyn std::error::Error| format!("{url}: {}", chain(error));
    // The scheme would have tonic look for TLS of its own.
    let endpoint = Endpoint::from_shared(url.replacen("https://", "http://", 1)).map_err(|error| explain(&error))?;
    let (target, tls) = (url.parse::<Uri>().map_err(|error| explain(&error))?, tls.clone());
    let connector = tower::service_fn(move |_: Uri| {
        let (target, tls) = (target.clone(), tls.clone());
        async move { open(&target, &tls).await.map(TokioIo::new) }
    });
    endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .buffer_size(callers.max(16) as usize)
        .connect_with_connector(connector)
        .await
        .map_err(|error| explain(&error))
}

/// A connection to the server of a URL, with TLS if the URL asks for it.
async fn open(url: &Uri, tls: &Arc<ClientTls>) -> io::Result<Stream> {
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']); // As an IPv6 address is written.
    let socket = Socket::connect(host, url.port_u16().unwrap_or(2379)).await?;
    if url.scheme() == Some(&uri::Scheme::HTTPS) { tls.connect(socket, host).await } else { Ok(Stream::Plain(socket)) }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A connection for unary calls. When it is lost, the next call establishes a new one.
#[derive(Clone)]
pub(super) struct UnaryChannel(Rc<UnaryConnection>);

struct UnaryConnection {
    url: Uri,
    tls: Arc<ClientTls>,
    /// The number of the current connection and its request sender; None while there is no connection.
    sender: RefCell<Option<(u64, SendRequest<Bytes>)>>,
    connections: Cell<u64>,
    /// Held by the call that establishes a connection.
    connecting: Mutex<()>,
    /// What calls show, if they are made on behalf of a user.
    token: RefCell<Option<HeaderValue>>,
}

impl UnaryChannel {
    /// A connection to the server at `address`, on the current runtime, for this user with its password.
    pub(super) async fn connect(
        address: &str,
        user: Option<&(String, String)>,
        tls: &Arc<ClientTls>,
    ) -> Result<Self, String> {
        let explain = |error: &dyn std::error::Error| format!("{address}: {}", chain(error));
        let (url, tls) = (address.parse::<Uri>().map_err(|error| explain(&error))?, tls.clone());
        let (sender, connections, connecting, token) = Default::default();
        let connection_state = UnaryConnection { url, tls, sender, connections, connecting, token };
        connection_state.sender().await.map_err(|error| explain(error.as_ref()))?;
        let channel = Self(Rc::new(connection_state));
        if let Some((name, password)) = user {
            let request = AuthenticateRequest { name: name.clone(), password: password.clone() };
            let answer = AuthClient::new(channel.clone()).authenticate(request).await;
            let token = answer.map_err(|status| format!("{address}: {}", status.message()))?.into_inner().token;
            let token = token.parse().map_err(|_| format!("{address}: the token is no header value"))?;
            channel.0.token.replace(Some(token));
        }
        Ok(channel)
    }
}

impl UnaryConnection {
    /// The sender for the next request, on a new connection if there is none.
    async fn sender(&self) -> Result<(u64, SendRequest<Bytes>), BoxError> {
        let present = || self.sender.borrow().clone();
        if let Some(sender) = present() {
            return Ok(sender);
        }
        let _connecting = self.connecting.lock().await;
        if let Some(sender) = present() {
            return Ok(sender); // Another call has connected in the meantime.
        }
        let stream = open(&self.url, &self.tls).await?;
        let mut builder = client::Builder::new();
        builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        let (sender, connection) = builder.handshake(stream).await?;
        tokio::spawn(async {
            let _ = connection.await; // An error is reported to the calls on the connection.
        });
        self.connections.update(|connections| connections + 1);
        let present = (self.connections.get(), sender);
        self.sender.replace(Some(present.clone()));
        Ok(present)
    }

    async fn call(&self, request: Request<Body>) -> Result<Response<ResponseBody>, BoxError> {
        let (mut head, body) = request.into_parts();
        let message = body.collect().await?.to_bytes();
        let mut uri = head.uri.into_parts();
        (uri.scheme, uri.authority) = (self.url.scheme().cloned(), self.url.authority().cloned());
        head.uri = Uri::from_parts(uri)?;
        if let Some(token) = &*self.token.borrow() {
            head.headers.insert(TOKEN, token.clone());
        }
        let (connection, sender) = self.sender().await?;
        let answer = send(sender, Request::from_parts(head, ()), message).await;
        if answer.as_ref().is_err_and(|error| !error.is_reset()) {
            self.sender.borrow_mut().take_if(|present| present.0 == connection);
        }
        Ok(answer?.map(ResponseBody))
    }
}

/// Sends a whole request, so that it leaves in one write, and waits for the response headers.
async fn send(
    sender: SendRequest<Bytes>,
    head: Request<()>,
    message: Bytes,
) -> Result<Response<RecvStream>, h2::Error> {
    let (answer, mut stream) = sender.ready().await?.send_request(head, false)?;
    stream.send_data(message, true)?;
    answer.await
}

impl Service<Request<Body>> for UnaryChannel {
    type Response = Response<ResponseBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, BoxError>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(())) // `send` waits until the connection accepts the request.
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let connection_state = self.0.clone();
        Box::pin(async move {
            connection_state.call(request).await.map_err(|error| match error.downcast_ref::<h2::Error>() {
                Some(reset) if reset.is_reset() => error, // tonic maps resets to status codes.
                _ => Status::unavailable(chain(error.as_ref())).into(),
            })
        })
    }
}

pub(super) struct ResponseBody(RecvStream);

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let stream = &mut self.0;
        match ready!(stream.poll_data(context)) {
            Some(Ok(data)) => {
                let taken = stream.flow_control().release_capacity(data.len());
                Poll::Ready(Some(taken.map(|()| Frame::data(data))))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error))),
            None => Poll::Ready(ready!(stream.poll_trailers(context)).transpose().map(|end| end.map(Frame::trailers))),
        }
    }
}

/// An error with all of its causes: tonic's own text is only "transport error".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_unreachable_server_is_named_with_the_reason() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let tls = ClientTls::without_certificates();
        for refusal in [connect(&address, 1, &tls).await.err(), UnaryChannel::connect(&address, None, &tls).await.err()]
        {
            let refusal = refusal.unwrap();
            assert!(refusal.contains(&address) && refusal.contains("refused"), "{refusal}");
        }
    }

    /// Answers `calls` calls on one connection, each with its own request body, and then closes the connection.
    async fn echo(listener: &TcpListener, calls: usize) {
        let mut connection = h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap();
        for _ in 0..calls {
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!((request.uri().path(), request.uri().scheme_str()), ("/a.B/C", Some("http")));
            let mut request_body = ResponseBody(request.into_body());
            let collecting = BodyExt::collect(&mut request_body);
            // The connection makes progress only while the next call is being accepted.
            let body = tokio::select! {
                body = collecting => body.unwrap().to_bytes(),
                _ = connection.accept() => panic!("one call at a time"),
            };
            respond.send_response(Response::new(()), false).unwrap().send_data(body, true).unwrap();
        }
        connection.graceful_shutdown();
        assert!(connection.accept().await.is_none());
    }

    #[tokio::test]
    async fn a_lost_connection_is_established_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let client = async {
            let mut channel = UnaryChannel::connect(&address, None, &ClientTls::without_certificates()).await.unwrap();
            let mut received = Vec::new();
            while received.len() < 4 {
                let body = Body::new(http_body_util::Full::from("ping"));
                match channel.call(Request::post("/a.B/C").body(body).unwrap()).await {
                    Ok(answer) => received.push(answer.into_body().collect().await.unwrap().to_bytes()),
                    // A call that was made while the server was closing the connection.
                    Err(error) => assert_eq!(Status::from_error(error).code(), tonic::Code::Unavailable),
                }
            }
            received
        };
        let server = async {
            echo(&listener, 2).await;
            echo(&listener, 2).await;
        };
        let both = async { tokio::join!(client, server).0 };
        let received = tokio::time::timeout(std::time::Duration::from_mins(1), both).await.unwrap();
        assert_eq!(received, ["ping"; 4]);
    }
}
