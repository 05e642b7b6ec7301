//! A client's connection as hyper reads and writes it: counted, watched by its [`Inbox`], and given up when a client takes
//! too long for one head.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use prometheus::IntCounter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::goaway::GoAway;
use super::inbox::Inbox;
use super::reservation::Reservation;
use crate::protocol;

/// A client that has begun a head and not ended it after this long is given up: the default of nginx
/// (`client_header_timeout`). A client between two requests, or in a tunnel, may be silent for as long as it likes.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// How long a client may take to close its side after we have closed ours.
const LINGER: Duration = Duration::from_secs(1);

/// hyper reads at most this much at once.
const CHUNK: usize = 16 * 1024;

/// What is copied to be written at once: a head and a short body.
const SMALL: usize = 4 * 1024;

/// A client's connection.
#[derive(Debug)]
pub struct ClientIo {
    /// Present until it is given back.
    stream: Option<TcpStream>,
    bytes: IntCounter,
    /// Absent for HTTP/2, which needs none.
    inbox: Option<Arc<Inbox>>,
    late: Option<Pin<Box<Sleep>>>,
    /// Our sending side is closed; until then, whoever drops this breaks the connection off.
    closing: Option<Pin<Box<Sleep>>>,
    /// A request that hyper would refuse or change: the client's connection is given back with it.
    unfit: Option<Vec<u8>>,
    /// Absent for HTTP/1, and where nobody is handed over.
    goaway: Option<GoAway>,
    /// Absent where there is none, or once the client has been waited for.
    reservation: Option<Arc<Reservation>>,
}

impl ClientIo {
    /// Counts what passes in `bytes`.
    pub fn new(stream: TcpStream, bytes: IntCounter, inbox: Option<Arc<Inbox>>) -> Self {
        let stream = Some(stream);
        Self { stream, bytes, inbox, late: None, closing: None, unfit: None, goaway: None, reservation: None }
    }

    /// Gives this back when the client has to be waited for.
    #[must_use]
    pub fn with_reservation(mut self, reservation: Arc<Reservation>) -> Self {
        self.reservation = Some(reservation);
        self
    }

    /// Puts a GOAWAY between the frames when it is asked for.
    #[must_use]
    pub fn with_goaway(mut self, goaway: GoAway) -> Self {
        self.goaway = Some(goaway);
        self
    }

    /// Writes the GOAWAY if it is due.
    fn poll_goaway(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(due) = self.goaway.as_ref().map(GoAway::due).filter(|due| !due.is_empty()) {
            let count = ready!(self.stream()?.poll_write(cx, due))?;
            if let Some(goaway) = &mut self.goaway {
                goaway.sent(count);
            }
        }
        Poll::Ready(Ok(()))
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Whether the client has said that it sends nothing any more, and keeps to it.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        let mut more = [const { MaybeUninit::uninit() }; 1];
        self.inbox.as_ref().is_some_and(|inbox| inbox.is_over())
            && self.stream().is_ok_and(|stream| stream.poll_read(cx, &mut ReadBuf::uninit(&mut more)).is_pending())
    }

    /// Whether the client has begun a head too long ago; if not, sees to it that the task is woken when it has.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(since) = self.inbox.as_ref().and_then(|inbox| inbox.partial_since()) else {
            self.late = None;
            return false;
        };
        let deadline = since + HEAD_TIMEOUT;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        late.as_mut().poll(cx).is_ready() && Instant::now() >= deadline
    }
}

impl Drop for ClientIo {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        if let (Some(unread), Some(inbox)) = (self.unfit.take(), &self.inbox) {
            inbox.give_back(stream, unread);
        } else if self.closing.is_none() {
            // An answer that was broken off must not look like a whole one.
            crate::forward::reset(&stream);
        }
    }
}

impl Read for ClientIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        if self.unfit.is_some() {
            return Poll::Ready(Ok(()));
        }
        let mut chunk = [const { MaybeUninit::uninit() }; CHUNK];
        let room = buf.remaining().min(CHUNK);
        let mut read = ReadBuf::uninit(&mut chunk[..room]);
        if self.stream()?.poll_read(cx, &mut read)?.is_pending() {
            drop(self.reservation.take().and_then(|reservation| reservation.take()));
            if self.is_late(cx) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            return Poll::Pending;
        }
        let filled = read.filled();
        if let Some(inbox) = &self.inbox {
            if inbox.between_requests() && protocol::is_unfit(filled) {
                // To hyper the client has closed.
                self.unfit = Some(filled.to_vec());
                return Poll::Ready(Ok(()));
            }
            inbox.received(filled, Instant::now());
        }
        self.bytes.inc_by(filled.len() as u64);
        buf.put_slice(filled);
        Poll::Ready(Ok(()))
    }
}

impl Write for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_goaway(cx))?;
        self.stream()?.poll_flush(cx)
    }

    /// Closes our sending side and waits a while for the client to close its own: what it still sends would be answered
    /// with a reset, which may overtake the last response (RFC 9112, section 9.6). A client that has said that it sends nothing any
    /// more is not waited for. Of a tunnel only this way is closed.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unfit.is_some() {
            return Poll::Ready(Ok(()));
        }
        if self.closing.is_none() {
            if self.is_over(cx) {
                // Closed, not reset.
                self.stream = None;
                return Poll::Ready(Ok(()));
            }
            ready!(self.stream()?.poll_shutdown(cx))?;
            self.closing = Some(Box::pin(sleep(LINGER)));
        }
        if self.inbox.as_ref().is_some_and(|inbox| inbox.is_tunnel()) {
            return Poll::Ready(Ok(()));
        }
        let mut rest = [const { MaybeUninit::uninit() }; CHUNK];
        loop {
            let mut read = ReadBuf::uninit(&mut rest);
            match self.stream()?.poll_read(cx, &mut read) {
                Poll::Ready(Ok(())) if !read.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        match &mut self.closing {
            Some(closing) => closing.as_mut().poll(cx).map(Ok),
            None => Poll::Ready(Ok(())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_goaway(cx))?;
        let written = ready!(poll_send(self.stream()?, cx, bufs))?;
        self.bytes.inc_by(written as u64);
        if let Some(goaway) = &mut self.goaway {
            let mut left = written;
            for buf in bufs {
                let (wrote, _) = buf.split_at(left.min(buf.len()));
                goaway.wrote(wrote);
                left -= wrote.len();
            }
        }
        Poll::Ready(Ok(written))
    }
}

/// Writes as much of `bufs` as the peer takes at once. Small ones are put together first: for `writev` the kernel takes longer than
/// that.
pub(super) fn poll_send(
    stream: Pin<&mut TcpStream>,
    cx: &mut Context<'_>,
    bufs: &[io::IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    if let [one] = bufs {
        return stream.poll_write(cx, one);
    }
    if bufs.iter().map(|buf| buf.len()).sum::<usize>() > SMALL {
        return stream.poll_write_vectored(cx, bufs);
    }
    let mut whole = [const { MaybeUninit::uninit() }; SMALL];
    let mut whole = ReadBuf::uninit(&mut whole);
    for buf in bufs {
        whole.put_slice(buf);
    }
    stream.poll_write(cx, whole.filled())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::AsyncWriteExt;

    async fn read(io: &mut ClientIo) -> io::Result<usize> {
        let mut bytes = [0; 64];
        let mut read = hyper::rt::ReadBuf::new(&mut bytes);
        poll_fn(|cx| Pin::new(&mut *io).poll_read(cx, read.unfilled())).await?;
        Ok(read.filled().len())
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_between_requests_may_be_silent_but_not_within_a_head() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let bytes = IntCounter::new("bytes", "bytes").unwrap();
        let inbox = Arc::new(Inbox::default());
        let mut io = ClientIo::new(stream, bytes.clone(), Some(Arc::clone(&inbox)));
        let silence = HEAD_TIMEOUT * 100;
        assert!(tokio::time::timeout(silence, read(&mut io)).await.is_err(), "silent, and not given up");

        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        assert_eq!(read(&mut io).await.unwrap(), 16);
        let begun = Instant::now();
        let given_up = tokio::time::timeout(silence, read(&mut io)).await.unwrap();
        assert_eq!(given_up.map_err(|error| error.kind()), Err(io::ErrorKind::TimedOut));
        assert!(begun.elapsed() >= HEAD_TIMEOUT && begun.elapsed() < HEAD_TIMEOUT * 2);
        assert_eq!(bytes.get(), 16);
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_tunnel_nothing_is_taken_for_http() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let inbox = Arc::new(Inbox::default());
        inbox.received(b"GET / HTTP/1.0\r\nupgrade: x\r\n\r\n", Instant::now());
        inbox.answering();
        inbox.set_last(0);
        inbox.tunnel();
        inbox.answered();
        let bytes = IntCounter::new("bytes", "bytes").unwrap();
        let mut io = ClientIo::new(stream, bytes.clone(), Some(Arc::clone(&inbox)));
        // A request that hyper would refuse, if it were one.
        let frame = b"GET /<> HTTP/1.1\r\n\r\n";
        client.write_all(frame).await.unwrap();
        assert_eq!(read(&mut io).await.unwrap(), frame.len());
        assert!(tokio::time::timeout(HEAD_TIMEOUT * 100, read(&mut io)).await.is_err(), "silent, and not given up");
        client.write_all(b"more").await.unwrap();
        io.stream.as_ref().unwrap().readable().await.unwrap();
        let begun = Instant::now();
        poll_fn(|cx| Pin::new(&mut io).poll_shutdown(cx)).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO, "nobody is waited for");
        assert_eq!(read(&mut io).await.unwrap(), 4, "the other way is open");
    }
}
