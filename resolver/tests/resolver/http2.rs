//! HTTP/2 without TLS, as gRPC speaks it: streams are held together, forwarded in both directions at once, and handed
//! over with GOAWAY.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use elasti_api::message::{HoldPolicy, Mode, ServiceState};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, Response};
use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinHandle;

use crate::backend::backend;
use crate::world::{World, dial, free_port, soon, state};

type Requests = SendRequest<Channel<Bytes>>;

/// A client's connection, and what became of it.
async fn connect(port: u16) -> (Requests, JoinHandle<hyper::Result<()>>) {
    let io = TokioIo::new(dial(port).await);
    let (requests, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    (requests, tokio::spawn(connection))
}

/// A call whose body is sent by hand.
fn call() -> (Sender<Bytes>, Request<Channel<Bytes>>) {
    let (body, channel) = Channel::new(4);
    let request = Request::post("http://chat.shop/pkg.Chat/Talk")
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .body(channel)
        .unwrap();
    (body, request)
}

/// A target that answers each frame with itself, and ends with trailers.
async fn talking() -> SocketAddr {
    backend(|stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            assert_eq!(request.uri().to_string(), "http://chat.shop/pkg.Chat/Talk");
            assert_eq!(request.headers()["te"], "trailers");
            assert_eq!(request.headers()["x-forwarded-host"], "chat.shop");
            let (mut back, channel) = Channel::<Bytes>::new(4);
            tokio::spawn(async move {
                let mut body = request.into_body();
                while let Some(Ok(frame)) = body.frame().await {
                    if let Ok(data) = frame.into_data() {
                        back.send_data(data).await.unwrap();
                    }
                }
                let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
                back.send_trailers(trailers).await.unwrap();
            });
            Ok::<_, Infallible>(Response::builder().header(CONTENT_TYPE, "application/grpc").body(channel).unwrap())
        });
        drop(
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await,
        );
    })
    .await
}

async fn word(response: &mut Response<Incoming>) -> Bytes {
    soon(response.frame()).await.unwrap().unwrap().into_data().unwrap()
}

#[tokio::test]
async fn a_bidirectional_call_is_held_and_then_streams_both_ways() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    let (mut requests, _connection) = connect(port).await;
    let (mut body, request) = call();
    let answered = tokio::spawn(requests.send_request(request));
    world.operator.hears_held("a", 1).await;
    world.operator.set(&state("a", 1, port, &[talking().await]));
    let mut response = soon(answered).await.unwrap().unwrap();
    for text in ["one", "two"] {
        body.send_data(Bytes::from_static(text.as_bytes())).await.unwrap();
        assert_eq!(word(&mut response).await, text);
    }
    drop(body);
    let trailers = soon(response.frame()).await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn many_streams_wait_for_one_dial_and_are_all_answered() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    let (requests, _connection) = connect(port).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (body, request) = call();
        drop(body);
        let mut requests = requests.clone();
        calls.spawn(async move {
            requests.send_request(request).await.unwrap().collect().await.unwrap().trailers().cloned()
        });
    }
    world.operator.hears_held("a", 1).await;
    world.operator.set(&state("a", 1, port, &[talking().await]));
    for trailers in soon(calls.join_all()).await {
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
    }
}

#[tokio::test]
async fn a_connection_is_handed_over_with_goaway_and_its_streams_end_in_peace() {
    let port = free_port();
    let target = talking().await;
    let world = World::new(vec![state("a", 1, port, &[target])]).await;
    world.operator.hears_listening("a", 1).await;
    let (mut requests, connection) = connect(port).await;
    let (mut body, request) = call();
    let mut response = soon(requests.send_request(request)).await.unwrap();
    world.operator.set(&ServiceState { mode: Mode::Serve, ..state("a", 2, port, &[target]) });
    world.operator.hears_listening("a", 2).await;
    // After the GOAWAY hyper's client opens no stream; the old one goes on.
    soon(async {
        loop {
            let (unsent, request) = call();
            drop(unsent);
            if requests.ready().await.is_err() || requests.send_request(request).await.is_err() {
                return;
            }
        }
    })
    .await;
    body.send_data(Bytes::from_static(b"still here")).await.unwrap();
    assert_eq!(word(&mut response).await, "still here");
    drop(body);
    soon(response.frame()).await.unwrap().unwrap().into_trailers().unwrap();
    drop((response, requests));
    soon(connection).await.unwrap().unwrap();
}

#[tokio::test]
async fn refusals_are_told_in_grpc() {
    let hold = HoldPolicy { timeout: Duration::from_millis(300), max_connections: 1, ..HoldPolicy::default() };
    let port = free_port();
    let world = World::new(vec![ServiceState { hold, ..state("a", 1, port, &[]) }]).await;
    world.operator.hears_listening("a", 1).await;
    let (mut first, _connection) = connect(port).await;
    let (_body, request) = call();
    let waiting = tokio::spawn(first.send_request(request));
    world.operator.hears_held("a", 1).await;
    let (mut second, _connection) = connect(port).await;
    let (_body, request) = call();
    for response in [soon(second.send_request(request)).await.unwrap(), soon(waiting).await.unwrap().unwrap()] {
        assert_eq!(response.headers()["grpc-status"], "14");
        assert!(response.headers()["grpc-message"].to_str().unwrap().contains("shop/a"));
    }
}

#[tokio::test]
async fn plain_requests_of_http2_get_plain_answers() {
    let hold = HoldPolicy { timeout: Duration::from_millis(300), ..HoldPolicy::default() };
    let port = free_port();
    let world = World::new(vec![ServiceState { hold, ..state("a", 1, port, &[]) }]).await;
    world.operator.hears_listening("a", 1).await;
    let io = TokioIo::new(dial(port).await);
    let (mut requests, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get("http://web.shop/").body(Full::<Bytes>::default()).unwrap();
    assert_eq!(soon(requests.send_request(request)).await.unwrap().status(), 504);
}
