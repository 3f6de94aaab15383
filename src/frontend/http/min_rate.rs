//! Minimum transfer rates for connections that hyper serves: hyper itself has no limits for clients that read or send too slowly.
//!
//! What is written to a client, and the body of a request, must move by [`MIN_READ_BYTES`] per `--client-read-timeout`. (The
//! HTTP/2 server of this crate has the same rule, in the timers of its connections.)

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use http2::{
    ledger::Charge,
    limits::{self, MIN_READ_BYTES},
};

/// The size of the pieces in which a body is passed on. hyper buffers no more than one or two of them.
const PIECE_BYTES: usize = 32 << 10;

/// Measures a transfer while it is blocked by the client.
struct MinRate {
    limit: Duration,
    /// Expires when the transfer is too slow. None while it is not blocked.
    timer: Option<Pin<Box<Sleep>>>,
    moved: usize,
}

impl MinRate {
    fn new(limit: Duration) -> Self {
        Self { limit, timer: None, moved: 0 }
    }

    /// Records that bytes have moved.
    fn add(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= MIN_READ_BYTES {
            self.reset();
        }
    }

    /// The transfer is complete.
    fn reset(&mut self) {
        (self.timer, self.moved) = (None, 0);
    }

    /// Called while the transfer is blocked; ready if it is too slow.
    fn poll_too_slow(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit))).as_mut().poll(context)
    }
}

/// A stream whose other side has to read what is written to it, at the minimum rate.
pub struct MinRateWriter<S> {
    stream: S,
    rate: MinRate,
}

impl<S> MinRateWriter<S> {
    /// The client may take `limit` to read [`MIN_READ_BYTES`].
    pub fn new(stream: S, limit: Duration) -> Self {
        Self { stream, rate: MinRate::new(limit) }
    }

    fn check<T>(&mut self, written: Poll<T>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(written) => Poll::Ready(Ok(written)),
            Poll::Pending => {
                ready!(self.rate.poll_too_slow(context));
                limits::count_refusal("slow_reader");
                Poll::Ready(Err(timed_out()))
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MinRateWriter<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MinRateWriter<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, data);
        let written = ready!(self.check(written, context))??;
        self.rate.add(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        let written = ready!(self.check(written, context))??;
        self.rate.add(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        let flushed = ready!(self.check(flushed, context))?;
        self.rate.reset();
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        Poll::Ready(ready!(self.check(shut, context))?)
    }
}

/// The body of a request that the client has to send at the minimum rate.
pub struct MinRateBody<B> {
    body: B,
    rate: MinRate,
}

impl<B> MinRateBody<B> {
    /// The client may take `limit` to send [`MIN_READ_BYTES`].
    pub fn new(body: B, limit: Duration) -> Self {
        Self { body, rate: MinRate::new(limit) }
    }
}

impl<B> Body for MinRateBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<axum::BoxError>,
{
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) else {
            ready!(self.rate.poll_too_slow(context));
            limits::count_refusal("slow_sender");
            return Poll::Ready(Some(Err(timed_out().into())));
        };
        if let Some(Ok(frame)) = &frame {
            self.rate.add(frame.data_ref().map_or(0, Bytes::len));
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Marks a response whose body is charged to the ledger already.
#[derive(Debug, Clone, Copy)]
pub struct IsCharged;

/// The body of a response from the router: charged to the ledger until it is sent, and passed on in small pieces.
pub struct ChargedBody {
    body: axum::body::Body,
    /// The rest of the last frame that was taken from the body.
    rest: Bytes,
    _charge: Charge,
}

impl ChargedBody {
    pub fn new(body: axum::body::Body, charge: Charge) -> Self {
        Self { body, rest: Bytes::new(), _charge: charge }
    }
}

impl Body for ChargedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(context)).map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(frame))) => return Poll::Ready(Some(Ok(frame))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        let length = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, hint) = (self.rest.len() as u64, self.body.size_hint());
        let mut all = SizeHint::new();
        all.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            all.set_upper(upper + rest);
        }
        all
    }
}

/// Counts a client that did not send its first bytes in time, and returns the error that closes its connection.
pub fn begin_timed_out() -> io::Error {
    limits::count_refusal("slow_beginning");
    timed_out()
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "timed out waiting for the client")
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use http2::ledger::Ledger;

    const LIMIT: Duration = Duration::from_millis(300);
    const BYTE_INTERVAL: Duration = Duration::from_millis(30);
    /// Far less than the transfer would take at that rate.
    const TEST_TIMEOUT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_connection_is_closed_if_the_client_reads_too_slowly() {
        let (mut client, server) = tokio::io::duplex(10);
        let mut server = MinRateWriter::new(server, LIMIT);
        let reading = tokio::spawn(async move {
            while client.read_u8().await.is_ok() {
                tokio::time::sleep(BYTE_INTERVAL).await;
            }
        });
        let written =
            tokio::time::timeout(TEST_TIMEOUT, server.write_all(&[b'x'; 10_000])).await.expect("the write fails");
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(server);
        reading.await.unwrap();
    }

    #[tokio::test]
    async fn a_request_fails_if_its_body_arrives_too_slowly() {
        let (mut client, server) = tokio::io::duplex(10);
        let sending = tokio::spawn(async move {
            while client.write_u8(b'x').await.is_ok() {
                tokio::time::sleep(BYTE_INTERVAL).await;
            }
        });
        let pieces = tokio_stream::StreamExt::map(ReaderStream(server), |byte| byte.map(Frame::data));
        let body = MinRateBody::new(http_body_util::StreamBody::new(pieces), LIMIT);
        let collected = tokio::time::timeout(TEST_TIMEOUT, body.collect()).await.expect("the body fails");
        let error = collected.map(|_| ()).expect_err("the body never ends");
        assert_eq!(error.downcast_ref::<io::Error>().map(io::Error::kind), Some(io::ErrorKind::TimedOut));
        sending.await.unwrap();
    }

    struct ReaderStream(tokio::io::DuplexStream);

    impl tokio_stream::Stream for ReaderStream {
        type Item = io::Result<Bytes>;

        fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            let mut bytes = [0; 10];
            let mut buffer = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut self.0).poll_read(context, &mut buffer))?;
            let read = buffer.filled();
            Poll::Ready((!read.is_empty()).then(|| Ok(Bytes::copy_from_slice(read))))
        }
    }

    #[tokio::test]
    async fn a_response_body_is_charged_until_it_is_sent() {
        let ledger = Ledger::new(1 << 20);
        let text = Bytes::from(vec![b'x'; 3 * PIECE_BYTES + 1]);
        let mut body = ChargedBody::new(text.clone().into(), ledger.charge(text.len()));
        let mut sent = Vec::new();
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.len() <= PIECE_BYTES);
            assert_eq!(ledger.held(), text.len());
            sent.extend_from_slice(&data);
        }
        drop(body);
        assert_eq!((Bytes::from(sent), ledger.held()), (text, 0));
    }
}
