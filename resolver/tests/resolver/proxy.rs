//! The proxy port: requests that name a Service, and the status pages.

use std::net::SocketAddr;

use elasti_api::message::ServiceState;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::backend::backend;
use crate::http::{head, response};
use crate::world::{World, free_port, is_reset, soon, state};

/// A target that answers every request with `body`, of six bytes.
async fn target(body: &'static str) -> SocketAddr {
    backend(move |mut stream| async move {
        while head(&mut stream).await.is_some() {
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n{body}");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    })
    .await
}

async fn send(client: &mut TcpStream, host: &str, header: &str) {
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n{header}\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
}

async fn ask(client: &mut TcpStream, host: &str, header: &str) -> (String, String) {
    send(client, host, header).await;
    response(client).await
}

#[tokio::test]
async fn a_request_that_names_a_service_at_zero_is_held_and_answered_and_the_pages_tell() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    assert!(world.page("/crd-cache-status").await.contains(r#"{"count":1,"services":["shop/a"]}"#));
    assert!(world.page("/queue-status?namespace=shop&service=a").await.contains(r#""queueStatus":0"#));
    assert!(world.page("/queue-status").await.starts_with("HTTP/1.1 400"));

    let mut client = TcpStream::connect(world.proxied).await.unwrap();
    send(&mut client, "a.shop.svc.cluster.local", "").await;
    world.operator.hears_held("a", 1).await;
    assert!(world.page("/queue-status?namespace=shop&service=a").await.contains(r#""queueStatus":1"#));
    world.operator.set(&state("a", 1, port, &[target("awake!").await]));
    assert_eq!(response(&mut client).await.1, "awake!");
}

#[tokio::test]
async fn each_request_of_a_connection_goes_where_it_says_and_to_no_foreign_host() {
    let ports = [free_port(), free_port()];
    let services: Vec<ServiceState> =
        vec![state("a", 1, ports[0], &[target("from a").await]), state("b", 1, ports[1], &[target("from b").await])];
    let world = World::new(services).await;
    world.operator.hears_listening("b", 1).await;
    let mut client = TcpStream::connect(world.proxied).await.unwrap();
    for (host, header, expected) in [
        ("a.shop", "", "from a"),
        ("b.shop.svc:80", "", "from b"),
        ("a.shop", "", "from a"),
        ("gateway.example.com", "X-Envoy-Decorator-Operation: b.shop.svc.cluster.local:80/*\r\n", "from b"),
        ("b.shop", "X-Envoy-Decorator-Operation: ingress-route-7\r\n", "from b"),
    ] {
        let (head, body) = ask(&mut client, host, header).await;
        assert_eq!((head.starts_with("HTTP/1.1 200"), body.as_str()), (true, expected), "{host} {header}");
    }
    for (host, cause) in [
        ("a", "names no Service"),
        ("www.example.com", "names no Service"),
        ("127.0.0.1:80", "names no Service"),
        ("example.com", "no ElastiService names the Service com/example"),
        ("a.elsewhere", "no ElastiService names the Service elsewhere/a"),
        ("a.shop:81", "no TCP port 81"),
    ] {
        let (head, body) = ask(&mut client, host, "").await;
        assert!(head.starts_with("HTTP/1.1 404") && body.contains(cause), "{host}: {head}{body}");
    }
}

#[tokio::test]
async fn a_client_that_says_nothing_keeps_no_resolver_from_leaving() {
    let mut world = World::new(vec![]).await;
    let mut silent = TcpStream::connect(world.proxied).await.unwrap();
    // Accepted in turn.
    let (head, _) = ask(&mut TcpStream::connect(world.proxied).await.unwrap(), "a.shop", "").await;
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    world.shutdown.cancel();
    is_reset(&mut silent).await;
    soon(&mut world.resolver).await.unwrap();
}
