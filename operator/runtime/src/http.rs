//! A small HTTP/1 server: no framework, one closure from request to response.
//!
//! A client can neither stall a connection for ever (header and body have deadlines) nor fill the memory (bodies are
//! read through [`read_body`] with a limit), and no request can end the server.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// What handlers answer with.
pub type Answer = Response<Full<Bytes>>;

/// Probes and scrapers send their header in one packet; five seconds forgive two lost ones.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bodies are small, see above.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long requests in flight may take once the server is asked to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Who asks: an extension of each request.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

impl Peer {
    /// Whether it is in this pod, or was let in by `kubectl port-forward`.
    pub fn is_local(self) -> bool {
        self.0.ip().to_canonical().is_loopback()
    }
}

/// Pause after a failed accept: the cause, mostly too many open files, does not go away within microseconds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A bound server that does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Listens on `address`; port 0 takes any. The error names the address.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let bind = async {
            let listener = TcpListener::bind(address).await?;
            Ok(Self { address: listener.local_addr()?, listener })
        };
        bind.await
            .map_err(|error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
    }

    /// Listens on `port` of all addresses of both families, or of IPv4 alone where the kernel has no IPv6.
    pub async fn bind_any(port: u16) -> io::Result<Self> {
        match Self::bind((Ipv6Addr::UNSPECIFIED, port).into()).await {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                Self::bind((Ipv4Addr::UNSPECIFIED, port).into()).await
            }
            bound => bound,
        }
    }

    /// The address in use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests with `handler` until `shutdown`, then lets those in flight end, for a few seconds at most.
    pub async fn serve<H, F>(self, handler: H, shutdown: CancellationToken)
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let graceful = GracefulShutdown::new();
        while let Some(accepted) = shutdown.run_until_cancelled(self.listener.accept()).await {
            match accepted {
                Ok((stream, peer)) => spawn_connection(stream, Peer(peer), handler.clone(), &graceful),
                Err(error) => {
                    tracing::warn!(address = %self.address, %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        if tokio::time::timeout(DRAIN_TIMEOUT, graceful.shutdown()).await.is_err() {
            tracing::warn!(address = %self.address, "requests were still in flight");
        }
    }
}

fn spawn_connection<H, F>(stream: TcpStream, peer: Peer, handler: H, graceful: &GracefulShutdown)
where
    H: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        let answer = handler(request);
        async move { Ok::<_, std::convert::Infallible>(answer.await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection ended early");
        }
    });
}

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The body is longer than the limit.
    #[error("the body is longer than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The client did not send the body in time.
    #[error("the body did not arrive within {} s", BODY_TIMEOUT.as_secs())]
    Timeout,
    /// The connection broke, or the body is not framed as its header says.
    #[error("the body could not be read: {0}")]
    Broken(Box<dyn std::error::Error + Send + Sync>),
}

impl BodyError {
    /// What to tell the client.
    pub fn answer(&self) -> Answer {
        let status = match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::Broken(_) => StatusCode::BAD_REQUEST,
        };
        text(status, self.to_string())
    }
}

/// Reads a whole body of `limit` bytes at most.
pub async fn read_body<B>(body: B, limit: usize) -> Result<Bytes, BodyError>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
{
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLarge { limit }),
        Ok(Err(error)) => Err(BodyError::Broken(error)),
        Err(_) => Err(BodyError::Timeout),
    }
}

/// A plain-text answer; a newline is added, for people with curl.
pub fn text(status: StatusCode, body: impl Into<String>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.into() + "\n")));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_bodies_are_refused_with_413() {
        let short = read_body(Full::new(Bytes::from_static(b"1234")), 4).await;
        assert_eq!(short.unwrap(), "1234");
        let long = read_body(Full::new(Bytes::from_static(b"12345")), 4).await;
        assert_eq!(long.unwrap_err().answer().status(), StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_bodies_are_refused_with_408() {
        let (_sender, stalled) = http_body_util::channel::Channel::<Bytes>::new(1);
        let read = read_body(stalled, 4).await;
        assert_eq!(read.unwrap_err().answer().status(), StatusCode::REQUEST_TIMEOUT);
    }

    #[tokio::test]
    async fn a_taken_address_is_named_in_the_error() {
        let first = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = Server::bind(first.address()).await.unwrap_err();
        assert!(error.to_string().contains(&first.address().to_string()), "{error}");
    }
}
