//! A client's own connection to the target, kept from request to request as the client keeps its own: what a target
//! remembers by connection stays true, and no client waits for another's.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::bounds;
use super::io::poll_send;
use super::link::{Link, told};
use crate::forward::{Connect, Dialer};
use crate::protocol::Spoken;

/// A connection that was idle for longer is not used again: a target may be closing it at this moment, and a request that
/// crosses with that is lost. Servers that close early do after two seconds (gunicorn) and more.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(1);

/// A connection to the target.
#[derive(Debug)]
pub struct Upstream {
    backend: SocketAddr,
    used: Instant,
    sender: Sender,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Incoming>),
    Http2(http2::SendRequest<Incoming>),
}

impl Upstream {
    /// Speaks what the client speaks. The connection lives until this is dropped and its responses have ended; one of HTTP/1 for which
    /// there is a `link` is moved on there, any other by a task of its own.
    pub async fn new(
        spoken: Spoken,
        stream: TcpStream,
        backend: SocketAddr,
        link: Option<&Link>,
    ) -> hyper::Result<Self> {
        let io = TargetIo { stream: TokioIo::new(stream), refuses: false };
        let sender = if spoken == Spoken::Http2 {
            let (sender, connection) = bounds::http2_client().handshake(io).await?;
            tokio::spawn(async move { told(connection.await) });
            Sender::Http2(sender)
        } else {
            // A target is believed: what its clients would take from it directly, they get.
            let (sender, connection) = bounds::http1_client()
                .preserve_header_case(true)
                .allow_spaces_after_header_name_in_responses(true)
                .allow_obsolete_multiline_headers_in_responses(true)
                .ignore_invalid_headers_in_responses(true)
                .handshake(io)
                .await?;
            let connection = connection.with_upgrades();
            match link {
                Some(link) => link.put(Box::pin(connection)),
                None => drop(tokio::spawn(async move { told(connection.await) })),
            }
            Sender::Http1(sender)
        };
        Ok(Self { backend, used: Instant::now(), sender })
    }

    /// Where it leads.
    pub fn backend(&self) -> SocketAddr {
        self.backend
    }

    /// Whether a request may be sent on it.
    pub async fn usable(&mut self) -> bool {
        let fresh = !self.usable_for().is_zero();
        match &mut self.sender {
            Sender::Http1(sender) => fresh && sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// For how long one of HTTP/1 may still be used again.
    pub fn usable_for(&self) -> Duration {
        IDLE_MAX.saturating_sub(self.used.elapsed())
    }

    /// Another handle of the same connection, for the next request meanwhile; HTTP/1 has none.
    pub fn share(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        Some(Self { backend: self.backend, used: self.used, sender: Sender::Http2(sender.clone()) })
    }

    /// Sends a request. The error has the request if no byte of it can have been read.
    pub async fn send(
        &mut self,
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Incoming>>> {
        let response = match &mut self.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        };
        self.used = Instant::now();
        response
    }
}

/// Opens connections to the target that speak what the client speaks, or brings the client's own back to its backend.
#[derive(Debug)]
pub struct Reuse<'a> {
    own: Mutex<Option<Upstream>>,
    dialer: Dialer,
    spoken: Spoken,
    link: Option<&'a Link>,
}

impl<'a> Reuse<'a> {
    /// With the client's own connection, if it has one; others are moved on by `link`, if there is one.
    pub fn new(own: Option<Upstream>, dialer: Dialer, spoken: Spoken, link: Option<&'a Link>) -> Self {
        Self { own: Mutex::new(own), dialer, spoken, link }
    }

    fn own(&self, backend: SocketAddr) -> Option<Upstream> {
        // Taking leaves nothing half done, so a poisoned lock still guards a sound value.
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        own.take_if(|own| own.backend() == backend)
    }
}

impl Connect for Reuse<'_> {
    type Connection = Upstream;

    async fn connect(&self, address: SocketAddr, header: &[u8], within: Duration) -> io::Result<Upstream> {
        if let Some(mut own) = self.own(address)
            && own.usable().await
        {
            return Ok(own);
        }
        let stream = self.dialer.connect(address, header, within).await?;
        Upstream::new(self.spoken, stream, address, self.link).await.map_err(io::Error::other)
    }
}

/// A connection to a target. Once the target takes nothing more, whatever is written counts as written: hyper would give the
/// connection up otherwise, and with it the response of a target that refused a large request before it had read it.
#[derive(Debug)]
struct TargetIo {
    stream: TokioIo<TcpStream>,
    refuses: bool,
}

impl TargetIo {
    fn lenient(&mut self, written: Poll<io::Result<usize>>, whole: usize) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Err(error))
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                self.refuses = true;
                Poll::Ready(Ok(whole))
            }
            other => other,
        }
    }
}

impl Read for TargetIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl Write for TargetIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.refuses {
            return Poll::Ready(Ok(buf.len()));
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.lenient(written, buf.len())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let whole = bufs.iter().map(|buf| buf.len()).sum();
        if self.refuses {
            return Poll::Ready(Ok(whole));
        }
        let written = poll_send(Pin::new(self.stream.inner_mut()), cx, bufs);
        self.lenient(written, whole)
    }
}
