//! The target: echoes over HTTP/1.1, gRPC-like streams and WebSocket, and names its peer in the header [`PEER`].
//!
//! - any path `/echo/TEXT?pause=MICROSECONDS` answers TEXT, after the pause;
//! - a POST to `/stream` gets its body back as it comes, and the trailer `grpc-status: 0`;
//! - `/socket` upgrades to a WebSocket that echoes messages.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_util::task::TaskTracker;

/// The response header that names who has called.
pub const PEER: &str = "x-peer";

/// How long a draining target waits for its last connections.
const DRAIN: Duration = Duration::from_secs(8);

/// What a target does at SIGTERM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnTerm {
    /// Goes on accepting for a while, as Kubernetes asks of it, then ends what it has begun.
    Drain,
    /// Ends, whatever it was doing.
    Exit,
}

type Body = BoxBody<Bytes, std::convert::Infallible>;

/// Serves until SIGTERM.
pub async fn serve(address: SocketAddr, on_term: OnTerm, linger: Duration) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(address).await?;
    let graceful = GracefulShutdown::new();
    // For HTTP a connection has ended when it becomes a WebSocket.
    let sockets = TaskTracker::new();
    let mut lingered = Box::pin(async move {
        term.recv().await;
        if on_term == OnTerm::Drain {
            tokio::time::sleep(linger).await;
        }
    });
    loop {
        tokio::select! {
            () = &mut lingered => break,
            accepted = listener.accept() => {
                if let Ok((stream, peer)) = accepted {
                    accept(stream, peer.ip(), &graceful, &sockets);
                }
            }
        }
    }
    drop(listener);
    if on_term == OnTerm::Drain {
        sockets.close();
        let ended = async {
            graceful.shutdown().await;
            sockets.wait().await;
        };
        let _late = tokio::time::timeout(DRAIN, ended).await;
    }
    Ok(())
}

fn accept(stream: TcpStream, peer: IpAddr, graceful: &GracefulShutdown, sockets: &TaskTracker) {
    let sockets = sockets.clone();
    let service = service_fn(move |request| {
        let sockets = sockets.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(request, peer, &sockets).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    let watched = graceful.watch(connection);
    tokio::spawn(async move {
        let _broken = watched.await;
    });
}

async fn answer(mut request: Request<Incoming>, peer: IpAddr, sockets: &TaskTracker) -> Response<Body> {
    let mut response = match request.uri().path() {
        "/stream" => {
            let (sender, body) = Channel::new(16);
            tokio::spawn(echo_stream(request.into_body(), sender));
            let mut response = Response::new(body.boxed());
            response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            response
        }
        "/socket" => upgrade(&mut request, sockets),
        path => {
            let text = path.strip_prefix("/echo/").unwrap_or_default().to_owned();
            let pause = request.uri().query().and_then(|query| query.strip_prefix("pause=")?.parse().ok());
            tokio::time::sleep(Duration::from_micros(pause.unwrap_or(0))).await;
            Response::new(Full::from(text).boxed())
        }
    };
    if let Ok(peer) = HeaderValue::from_str(&peer.to_canonical().to_string()) {
        response.headers_mut().insert(PEER, peer);
    }
    response
}

async fn echo_stream(mut body: Incoming, mut sender: Sender<Bytes, std::convert::Infallible>) {
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data()
            && sender.send(Frame::data(data)).await.is_err()
        {
            return;
        }
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let _gone = sender.send_trailers(trailers).await;
}

fn upgrade(request: &mut Request<Incoming>, sockets: &TaskTracker) -> Response<Body> {
    let accept = request.headers().get(http::header::SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
    let Some(accept) = accept.and_then(|accept| HeaderValue::from_str(&accept).ok()) else {
        let mut response = Response::new(Full::default().boxed());
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return response;
    };
    let upgraded = hyper::upgrade::on(request);
    sockets.spawn(async move {
        let Ok(upgraded) = upgraded.await else { return };
        let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        while let Some(Ok(message)) = socket.next().await {
            if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(Full::default().boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(http::header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(http::header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(http::header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}
