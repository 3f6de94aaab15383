//! Clients of hyper's that read or send too slowly. Hyper itself waits for them as long as it takes.
//!
//! Whatever moves has to move at the rate of [`LEAST_RATE_BYTES`] in the time that `--client-read-timeout` gives. (Our own
//! HTTP/2 has the same rule, `http2/connection/alarms.rs`.)

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

use super::front::too_late;
use crate::{
    http2::limits::{self, LEAST_RATE_BYTES},
    ledger::Charge,
};

/// A body is passed on in pieces of so much: hyper keeps no more than one or two.
const PIECE_BYTES: usize = 32 << 10;

/// Measures how fast something moves while it has to be waited for.
struct Pace {
    limit: Duration,
    /// When it is too late. None while nothing is waited for.
    late: Option<Pin<Box<Sleep>>>,
    moved: usize,
}

impl Pace {
    fn new(limit: Duration) -> Self {
        Self { limit, late: None, moved: 0 }
    }

    /// So many bytes have moved.
    fn add(&mut self, bytes: usize) {
        self.moved += bytes;
        if self.moved >= LEAST_RATE_BYTES {
            self.reset();
        }
    }

    /// Nothing is to be moved any more.
    fn reset(&mut self) {
        (self.late, self.moved) = (None, 0);
    }

    /// Nothing moves at the moment; ready if that is so for too long.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        self.late.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit))).as_mut().poll(context)
    }
}

/// A stream whose other side has to read what is written to it.
pub struct Paced<S> {
    stream: S,
    pace: Pace,
}

impl<S> Paced<S> {
    /// The other side may take `limit` for a little.
    pub fn new(stream: S, limit: Duration) -> Self {
        Self { stream, pace: Pace::new(limit) }
    }

    fn check<T>(&mut self, written: Poll<T>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(written) => Poll::Ready(Ok(written)),
            Poll::Pending => {
                ready!(self.pace.poll_late(context));
                limits::note("slow_reader");
                Poll::Ready(Err(too_late()))
            }
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, data);
        let written = ready!(self.check(written, context))??;
        self.pace.add(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        let written = ready!(self.check(written, context))??;
        self.pace.add(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        let flushed = ready!(self.check(flushed, context))?;
        self.pace.reset();
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        Poll::Ready(ready!(self.check(shut, context))?)
    }
}

/// The body of a request whose client has to send it.
pub struct Arriving<B> {
    body: B,
    pace: Pace,
}

impl<B> Arriving<B> {
    /// The client may take `limit` for a little.
    pub fn new(body: B, limit: Duration) -> Self {
        Self { body, pace: Pace::new(limit) }
    }
}

impl<B> Body for Arriving<B>
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
            ready!(self.pace.poll_late(context));
            limits::note("slow_sender");
            return Poll::Ready(Some(Err(too_late().into())));
        };
        if let Some(Ok(frame)) = &frame {
            self.pace.add(frame.data_ref().map_or(0, Bytes::len));
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

/// The body of an ordinary answer, counted until it is sent, and passed on in small pieces.
pub struct Counted {
    body: axum::body::Body,
    /// The rest of what was taken out of it last.
    rest: Bytes,
    _charge: Charge,
}

impl Counted {
    /// A body with what it is counted for.
    pub fn new(body: axum::body::Body, charge: Charge) -> Self {
        Self { body, rest: Bytes::new(), _charge: charge }
    }
}

impl Body for Counted {
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

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::ledger::Ledger;

    const LIMIT: Duration = Duration::from_millis(300);
    const DRIP: Duration = Duration::from_millis(30);
    /// Far less than it would take at that rate.
    const ENOUGH: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_reader_that_takes_a_byte_now_and_then_is_given_up() {
        let (mut client, server) = tokio::io::duplex(10);
        let mut server = Paced::new(server, LIMIT);
        let reading = tokio::spawn(async move {
            while client.read_u8().await.is_ok() {
                tokio::time::sleep(DRIP).await;
            }
        });
        let written = tokio::time::timeout(ENOUGH, server.write_all(&[b'x'; 10_000])).await.expect("it is given up");
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(server);
        reading.await.unwrap();
    }

    #[tokio::test]
    async fn a_body_that_drips_is_given_up() {
        let (mut client, server) = tokio::io::duplex(10);
        let sending = tokio::spawn(async move {
            while client.write_u8(b'x').await.is_ok() {
                tokio::time::sleep(DRIP).await;
            }
        });
        let pieces = tokio_stream::StreamExt::map(ReaderStream(server), |byte| byte.map(Frame::data));
        let body = Arriving::new(http_body_util::StreamBody::new(pieces), LIMIT);
        let gathered = tokio::time::timeout(ENOUGH, body.collect()).await.expect("it is given up");
        let error = gathered.map(|_| ()).expect_err("it never ends");
        assert_eq!(error.downcast_ref::<io::Error>().map(io::Error::kind), Some(io::ErrorKind::TimedOut));
        sending.await.unwrap();
    }

    /// What is read, as a stream.
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
    async fn a_body_is_counted_until_it_has_gone() {
        let ledger = Ledger::new(1 << 20);
        let text = Bytes::from(vec![b'x'; 3 * PIECE_BYTES + 1]);
        let mut body = Counted::new(text.clone().into(), ledger.charge(text.len()));
        let mut gathered = Vec::new();
        while let Some(frame) = body.frame().await {
            let data = frame.unwrap().into_data().unwrap();
            assert!(data.len() <= PIECE_BYTES);
            assert_eq!(ledger.held(), text.len());
            gathered.extend_from_slice(&data);
        }
        drop(body);
        assert_eq!((Bytes::from(gathered), ledger.held()), (text, 0));
    }
}
