//! Connections to targets that nobody uses: an open one may keep its target awake, and nobody counts its socket.

use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::backend::backend;
use crate::http::{head, response};
use crate::world::{World, dial, free_port, soon, state};

/// A target that answers every request, and whose connections have ended.
async fn target() -> (SocketAddr, mpsc::UnboundedReceiver<()>) {
    let (ended, ends) = mpsc::unbounded_channel();
    let address = backend(move |mut stream| {
        let ended = ended.clone();
        async move {
            while head(&mut stream).await.is_some() {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
            let _over = ended.send(());
        }
    })
    .await;
    (address, ends)
}

async fn ask(client: &mut TcpStream, host: &str) {
    client.write_all(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes()).await.unwrap();
    assert_eq!(response(client).await.1, "ok");
}

#[tokio::test]
async fn between_two_requests_the_targets_connection_ends_and_the_clients_does_not() {
    let port = free_port();
    let (target, mut ends) = target().await;
    let world = World::new(vec![state("a", 1, port, &[target])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    for _ in 0..2 {
        ask(&mut client, "a").await;
        soon(ends.recv()).await.unwrap();
    }
}

#[tokio::test]
async fn a_client_of_the_proxy_port_leaves_no_connection_behind_at_each_service_that_it_names() {
    let ports = [free_port(), free_port()];
    let ((a, mut ends), (b, _ends)) = (target().await, target().await);
    let world = World::new(vec![state("a", 1, ports[0], &[a]), state("b", 1, ports[1], &[b])]).await;
    world.operator.hears_listening("b", 1).await;
    let mut client = TcpStream::connect(world.proxied).await.unwrap();
    ask(&mut client, "a.shop").await;
    ask(&mut client, "b.shop").await;
    soon(ends.recv()).await.unwrap();
    ask(&mut client, "a.shop").await;
}
