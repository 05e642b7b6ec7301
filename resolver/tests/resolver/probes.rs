//! Requests that are answered in place of the target, and what they must not do: wake it, or count as traffic.

use std::net::SocketAddr;
use std::time::Duration;

use elasti_api::message::{Protocol, ResolverMessage, ServiceState};
use elasti_api::probe::{Look, ProbeRule};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::backend::backend;
use crate::http::{head, response};
use crate::world::{World, dial, free_port, soon, state};

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nHost: web.shop\r\n\r\n";

/// `/healthz` is answered.
fn probed(port: u16, backends: &[SocketAddr], protocol: Protocol) -> ServiceState {
    let health = ProbeRule {
        method: Some("GET".into()),
        path: Some(Look::PathPrefix("/healthz".into())),
        headers: vec![],
        query: vec![],
        status: 200,
        body: r#"{"ok":true}"#.into(),
    };
    let mut state = ServiceState { probes: vec![health], ..state("a", 1, port, backends) };
    state.ports[0].protocol = protocol;
    state
}

async fn at_zero(protocol: Protocol) -> (World, u16) {
    let port = free_port();
    let world = World::new(vec![probed(port, &[], protocol)]).await;
    world.operator.hears_listening("a", 1).await;
    (world, port)
}

async fn ask(client: &mut TcpStream, request: &str) -> (String, String) {
    client.write_all(request.as_bytes()).await.unwrap();
    response(client).await
}

/// What the operator has been told of connections.
async fn told(world: &World) -> Vec<(u32, u64)> {
    let mut told = vec![];
    world
        .operator
        .hears("all so far", |messages| {
            told = messages
                .iter()
                .filter_map(|message| match message {
                    ResolverMessage::Traffic { held, accepted, .. } => Some((*held, *accepted)),
                    _ => None,
                })
                .collect();
            true
        })
        .await;
    told
}

#[tokio::test]
async fn a_health_check_is_answered_at_zero_and_counts_as_nothing_and_the_next_request_wakes() {
    let (world, port) = at_zero(Protocol::Auto).await;
    let mut client = dial(port).await;
    for _ in 0..2 {
        let (head, body) = ask(&mut client, HEALTH).await;
        assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains("content-type: application/json"), "{head}");
        assert_eq!(body, r#"{"ok":true}"#);
    }
    world.metric_is("elasti_resolver_probe_responses_total", "service=\"a\"", 2.0).await;
    world.metric_is("elasti_resolver_held_connections", "service=\"a\"", 0.0).await;
    assert!(told(&world).await.iter().all(|told| *told == (0, 0)), "{:?}", told(&world).await);

    client.write_all(b"POST /healthz HTTP/1.1\r\nHost: web.shop\r\ncontent-length: 2\r\n\r\nhi").await.unwrap();
    world.operator.hears_held("a", 1).await;
    let target = backend(|mut stream| async move {
        while head(&mut stream).await.is_some() {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\ntarget").await.unwrap();
        }
    })
    .await;
    world.operator.set(&probed(port, &[target], Protocol::Auto));
    assert_eq!(response(&mut client).await.1, "target");
    assert_eq!(ask(&mut client, HEALTH).await.1, r#"{"ok":true}"#, "as KubeElasti: whenever it reaches the resolver");
}

#[tokio::test]
async fn a_check_that_connects_and_closes_wakes_nothing_and_whoever_is_silent_or_speaks_otherwise_does() {
    let (world, port) = at_zero(Protocol::Auto).await;
    drop(dial(port).await);
    world.metric_is("elasti_resolver_closed_connections_total", "reason=\"client_left\"", 1.0).await;
    assert!(told(&world).await.iter().all(|(held, _)| *held == 0));
    let _silent = dial(port).await;
    world.operator.hears_held("a", 1).await;
    let mut redis = dial(port).await;
    redis.write_all(b"*1\r\n$4\r\nPING\r\n").await.unwrap();
    world.operator.hears_held("a", 2).await;
}

#[tokio::test]
async fn where_http_is_known_to_be_spoken_a_silent_client_wakes_nothing() {
    let (world, port) = at_zero(Protocol::Http).await;
    let mut client = dial(port).await;
    // Longer than a client that may speak something else is waited for: this can only fail by holding it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(told(&world).await.iter().all(|(held, _)| *held == 0));
    assert_eq!(soon(ask(&mut client, HEALTH)).await.1, r#"{"ok":true}"#);
}

#[tokio::test]
async fn ports_that_speak_no_http_are_as_ever() {
    let (world, port) = at_zero(Protocol::Tcp).await;
    let mut client = dial(port).await;
    client.write_all(HEALTH.as_bytes()).await.unwrap();
    world.operator.hears_held("a", 1).await;
}
