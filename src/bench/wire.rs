//! Connections.
//!
//! Streams go over tonic's. Single calls have a line of their own, because tonic's client says each in three writes (the
//! headers, the message, the end) and most clients that people use say it in one: what is measured is the server.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{RecvStream, client, client::SendRequest};
use http::{Request, Response, Uri, uri};
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::{net::TcpStream, sync::Mutex};
use tonic::{
    Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::Service;

/// Long lists must not wait for window updates.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// One new connection to the server at `address`, on the runtime of the caller, for up to `callers` calls at once.
pub(super) async fn connect(address: &str, callers: u32) -> Result<Channel, String> {
    let endpoint =
        Endpoint::from_shared(address.to_owned()).map_err(|error| format!("{address}: {}", chain(&error)))?;
    endpoint
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .buffer_size(callers.max(16) as usize)
        .connect()
        .await
        .map_err(|error| format!("{address}: {}", chain(&error)))
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A connection for calls that ask one thing each. When it breaks, the next call makes another.
#[derive(Clone)]
pub(super) struct Line(Rc<Exchange>);

struct Exchange {
    authority: uri::Authority,
    /// Which connection it is, and who takes requests on it; None while there is none.
    sender: RefCell<Option<(u64, SendRequest<Bytes>)>>,
    connections: Cell<u64>,
    /// Whoever is making one.
    dialling: Mutex<()>,
}

impl Line {
    /// A line to the server at `address`, on the runtime of the caller.
    pub(super) async fn connect(address: &str) -> Result<Self, String> {
        let explain = |error: &dyn std::error::Error| format!("{address}: {}", chain(error));
        let authority = address.trim_start_matches("http://");
        let authority = authority.parse::<uri::Authority>().map_err(|error| explain(&error))?;
        let (sender, connections, dialling) = Default::default();
        let exchange = Exchange { authority, sender, connections, dialling };
        exchange.sender().await.map_err(|error| explain(error.as_ref()))?;
        Ok(Self(Rc::new(exchange)))
    }
}

impl Exchange {
    /// Who takes the next request, on a new connection if there is none.
    async fn sender(&self) -> Result<(u64, SendRequest<Bytes>), BoxError> {
        let present = || self.sender.borrow().clone();
        if let Some(sender) = present() {
            return Ok(sender);
        }
        let _dialling = self.dialling.lock().await;
        if let Some(sender) = present() {
            return Ok(sender); // Somebody else was quicker.
        }
        let port = self.authority.port_u16().unwrap_or(80);
        let socket = TcpStream::connect((self.authority.host().trim_matches(['[', ']']), port)).await?;
        socket.set_nodelay(true)?;
        let mut builder = client::Builder::new();
        builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        let (sender, connection) = builder.handshake(socket).await?;
        tokio::spawn(async {
            let _ = connection.await; // Its calls are told why it ended.
        });
        self.connections.update(|connections| connections + 1);
        let present = (self.connections.get(), sender);
        self.sender.replace(Some(present.clone()));
        Ok(present)
    }

    async fn call(&self, request: Request<Body>) -> Result<Response<Incoming>, BoxError> {
        let (mut head, body) = request.into_parts();
        let message = body.collect().await?.to_bytes();
        let mut uri = head.uri.into_parts();
        (uri.scheme, uri.authority) = (Some(uri::Scheme::HTTP), Some(self.authority.clone()));
        head.uri = Uri::from_parts(uri)?;
        let (connection, sender) = self.sender().await?;
        let answer = send(sender, Request::from_parts(head, ()), message).await;
        if answer.as_ref().is_err_and(|error| !error.is_reset()) {
            self.sender.borrow_mut().take_if(|present| present.0 == connection);
        }
        Ok(answer?.map(Incoming))
    }
}

/// Says a whole request, so that it leaves in one write, and waits for the beginning of the answer.
async fn send(
    sender: SendRequest<Bytes>,
    head: Request<()>,
    message: Bytes,
) -> Result<Response<RecvStream>, h2::Error> {
    let (answer, mut stream) = sender.ready().await?.send_request(head, false)?;
    stream.send_data(message, true)?;
    answer.await
}

impl Service<Request<Body>> for Line {
    type Response = Response<Incoming>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, BoxError>>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(())) // A call waits for its own turn.
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let exchange = self.0.clone();
        Box::pin(async move {
            exchange.call(request).await.map_err(|error| match error.downcast_ref::<h2::Error>() {
                Some(reset) if reset.is_reset() => error, // tonic knows what it means.
                _ => Status::unavailable(chain(error.as_ref())).into(),
            })
        })
    }
}

/// The body of an answer.
pub(super) struct Incoming(RecvStream);

impl http_body::Body for Incoming {
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

/// An error with all of its causes: tonic's own words are just "transport error".
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !words.contains(&more) {
            words.push_str(": ");
            words.push_str(&more);
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_is_not_there_is_named_with_the_reason() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        for refusal in [connect(&address, 1).await.err(), Line::connect(&address).await.err()] {
            let refusal = refusal.unwrap();
            assert!(refusal.contains(&address) && refusal.contains("refused"), "{refusal}");
        }
    }

    /// Answers so many calls on one connection, each with what it was asked, and then closes it.
    async fn echo(listener: &TcpListener, calls: usize) {
        let mut connection = h2::server::handshake(listener.accept().await.unwrap().0).await.unwrap();
        for _ in 0..calls {
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!((request.uri().path(), request.uri().scheme_str()), ("/a.B/C", Some("http")));
            let mut body = Incoming(request.into_body());
            let collecting = BodyExt::collect(&mut body);
            // The connection moves only while it is asked for the next call.
            let asked = tokio::select! {
                asked = collecting => asked.unwrap().to_bytes(),
                _ = connection.accept() => panic!("one call at a time"),
            };
            respond.send_response(Response::new(()), false).unwrap().send_data(asked, true).unwrap();
        }
        connection.graceful_shutdown();
        assert!(connection.accept().await.is_none());
    }

    #[tokio::test]
    async fn a_line_that_broke_is_made_anew() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let talking = async {
            let mut line = Line::connect(&address).await.unwrap();
            let mut heard = Vec::new();
            while heard.len() < 4 {
                let body = Body::new(http_body_util::Full::from("ping"));
                match line.call(Request::post("/a.B/C").body(body).unwrap()).await {
                    Ok(answer) => heard.push(answer.into_body().collect().await.unwrap().to_bytes()),
                    // Whoever is in the middle of the farewell.
                    Err(error) => assert_eq!(Status::from_error(error).code(), tonic::Code::Unavailable),
                }
            }
            heard
        };
        let serving = async {
            echo(&listener, 2).await;
            echo(&listener, 2).await;
        };
        let both = async { tokio::join!(talking, serving).0 };
        let heard = tokio::time::timeout(std::time::Duration::from_mins(1), both).await.unwrap();
        assert_eq!(heard, ["ping"; 4]);
    }
}
