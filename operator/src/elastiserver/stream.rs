//! The TLS port: accepts connections of resolvers and lets their streams begin.
//!
//! A connection is one HTTP/2 POST. Who does not get to an authenticated stream within a few seconds is disconnected,
//! and there is a limit to connections, so that strangers cost little. What is said on a stream: [`exchange`].

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use elasti_api::names::STREAM_PATH;
use elasti_runtime::http::text;
use http::{Method, Request, Response, StatusCode};
use http_body_util::channel::Channel;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::auth::Authenticator;
use crate::metrics::Metrics;
use crate::publication::Publication;
use crate::resolvers::Resolvers;

mod exchange;

/// Connections at once: two for each node of the largest cluster that Kubernetes supports (5,000), since during a
/// rollout two resolvers share a node.
const CONNECTIONS: usize = 10_000;

/// How long TLS may take, and then how long until a stream is let in: as long as the resolver waits for all of it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a stream waits for the caches to be filled, before the resolver is told to come again: within the time
/// that it waits itself, so that it learns the cause.
const SYNC_TIMEOUT: Duration = Duration::from_secs(4);

/// Pause after a failed accept: the cause, mostly too many open files, does not go away within microseconds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What TLS and HTTP/2 each buffer for a resolver, in bytes: a thousand that are told everything at once shall not fill the memory.
const SENT: usize = 16 << 10;

/// What resolvers may have said on one connection that is not read yet, in bytes: HTTP/2 begins with as much.
const WINDOW: u32 = 64 << 10;

/// What a resolver may have said that is not read yet, in bytes. The reader of HTTP/2 (tokio-util's `FramedRead`) begins with 8 KiB, grows as
/// frames ask for it, and gives nothing back as long as the stream lasts: with frames of 16 KiB it came to 64 KiB for each resolver.
const RECEIVED: u32 = 4 << 10;

/// Room for a token in the request's header, in bytes.
const HEADER_MAX: u32 = 32 << 10;

/// A peer that answers no ping is gone; streams have heartbeats of their own, this ends what is left behind.
const PING_INTERVAL: Duration = Duration::from_secs(20);

type Answer = Response<Either<Full<Bytes>, Channel<Bytes>>>;

/// What streams are made of.
#[derive(Clone)]
pub struct Streams {
    /// Checks who opens one.
    pub authenticator: Authenticator,
    /// Where what resolvers say goes.
    pub resolvers: Resolvers,
    /// What resolvers are told.
    pub publication: Arc<Publication>,
    /// Counts them.
    pub metrics: Metrics,
    /// Their tasks.
    pub tasks: TaskTracker,
    /// Ends them.
    pub shutdown: CancellationToken,
}

/// A bound port.
pub struct StreamServer {
    listener: TcpListener,
    address: SocketAddr,
    tls: TlsAcceptor,
}

/// Why the port cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StreamServerError {
    /// The port is taken or not allowed.
    #[error("cannot listen on port {port}: {source}")]
    Bind {
        /// The port.
        port: u16,
        /// Why.
        source: io::Error,
    },
    /// The TLS set-up is impossible.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl StreamServer {
    /// Listens on `port` of all addresses; 0 takes any. Each handshake asks `certificates` for what to show.
    pub async fn bind(port: u16, certificates: Arc<dyn ResolvesServerCert>) -> Result<Self, StreamServerError> {
        let failed = |source| StreamServerError::Bind { port, source };
        let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            // Kernels without IPv6.
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
            }
            bound => bound,
        };
        let listener = listener.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(certificates);
        tls.alpn_protocols = vec![b"h2".to_vec()];
        // Resolvers read the CA's certificates anew for each connection, and resume none.
        tls.send_tls13_tickets = 0;
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { listener, address, tls: TlsAcceptor::from(Arc::new(tls)) })
    }

    /// The address in use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until the streams' shutdown.
    pub async fn serve(self, streams: Streams) {
        let limit = Arc::new(Semaphore::new(CONNECTIONS));
        let accept = async {
            loop {
                let Ok(permit) = limit.clone().acquire_owned().await else { return };
                match self.listener.accept().await {
                    Ok((socket, peer)) => {
                        let connection = Connection { streams: streams.clone(), admitted: Arc::default() };
                        streams.tasks.spawn(connection.run(socket, peer, self.tls.clone(), permit));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a resolver's connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        streams.shutdown.run_until_cancelled(accept).await;
    }
}

/// One connection.
#[derive(Clone)]
struct Connection {
    streams: Streams,
    /// A stream has begun on it.
    admitted: Arc<AtomicBool>,
}

impl Connection {
    async fn run(self, socket: TcpStream, peer: SocketAddr, tls: TlsAcceptor, permit: OwnedSemaphorePermit) {
        let shutdown = self.streams.shutdown.clone();
        if let Some(Err(error)) = shutdown.run_until_cancelled(Box::pin(self.serve(socket, peer, tls))).await {
            tracing::debug!(%peer, error, "a connection ended early");
        }
        drop(permit);
    }

    async fn serve(self, socket: TcpStream, peer: SocketAddr, tls: TlsAcceptor) -> Result<(), String> {
        // A wake is one small message; it must not wait for the acknowledgement of another.
        socket.set_nodelay(true).map_err(|error| error.to_string())?;
        let handshake = tls.accept_with(socket, |tls| tls.set_buffer_limit(Some(SENT)));
        let socket = timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| "no TLS handshake".to_owned())?;
        let socket = socket.map_err(|error| error.to_string())?;
        let admitted = self.admitted.clone();
        let service = service_fn(move |request| {
            let this = self.clone();
            async move { Ok::<_, Infallible>(this.answer(request, peer).await) }
        });
        let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .initial_stream_window_size(RECEIVED)
            .initial_connection_window_size(WINDOW)
            .max_send_buf_size(SENT)
            .max_header_list_size(HEADER_MAX)
            .max_concurrent_streams(1)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(HANDSHAKE_TIMEOUT);
        let serving = http.serve_connection(TokioIo::new(socket), service);
        tokio::pin!(serving);
        match timeout(HANDSHAKE_TIMEOUT, &mut serving).await {
            Ok(ended) => ended,
            Err(_) if admitted.load(Ordering::Relaxed) => serving.await,
            Err(_) => return Err("no stream was let in".to_owned()),
        }
        .map_err(|error| error.to_string())
    }

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Answer {
        match (request.uri().path(), request.method()) {
            (STREAM_PATH, &Method::POST) => {}
            (STREAM_PATH, _) => return refusal(StatusCode::METHOD_NOT_ALLOWED, "the method must be POST"),
            _ => return refusal(StatusCode::NOT_FOUND, "there is nothing but the resolver stream"),
        }
        let caller = match self.streams.authenticator.caller(request.headers()).await {
            Ok(caller) => caller,
            Err(error) => {
                tracing::warn!(%peer, %error, "a resolver was turned away");
                return refusal(error.status(), error.to_string());
            }
        };
        let Some(pod) = caller.pod else {
            return refusal(StatusCode::UNAUTHORIZED, "the token is bound to no pod; use a projected one");
        };
        let Ok(Ok(feed)) = timeout(SYNC_TIMEOUT, self.streams.publication.clone().follow()).await else {
            return refusal(StatusCode::SERVICE_UNAVAILABLE, "this replica has not read the cluster's state yet");
        };
        self.admitted.store(true, Ordering::Relaxed);
        let (sender, body) = Channel::new(1);
        let (streams, shutdown) = (self.streams.clone(), self.streams.shutdown.clone());
        self.streams.tasks.spawn(async move {
            let exchange = exchange::run(&streams, &pod, request.into_body(), sender, feed);
            match shutdown.run_until_cancelled(Box::pin(exchange)).await {
                None => {}
                Some(Err(exchange::Ended::Closed)) => tracing::info!(pod, %peer, "a resolver has disconnected"),
                Some(Err(error)) => tracing::warn!(pod, %peer, %error, "a resolver's stream was ended"),
            }
        });
        Response::new(Either::Right(body))
    }
}

fn refusal(status: StatusCode, cause: impl Into<String>) -> Answer {
    text(status, cause).map(Either::Left)
}

#[cfg(test)]
mod tests;
