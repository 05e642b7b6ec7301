//! What happens at the limits of the process: some are refused, and nobody else is affected.

use elasti_api::message::ServiceState;
use elasti_resolver::capacity::Limits;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::backend::{backend, echo, ping};
use crate::http::{UPGRADE, UPGRADED, head};
use crate::world::{World, dial, free_port, is_reset, soon, state};

/// Files that make this many places.
fn places(connections: u64) -> Limits {
    Limits { descriptors: 256 + 2 + 2 * connections, memory: None, conntrack: None }
}

fn two_services(ports: [u16; 2], backend: std::net::SocketAddr) -> Vec<ServiceState> {
    vec![state("a", 1, ports[0], &[]), state("b", 1, ports[1], &[backend])]
}

#[tokio::test]
async fn a_flood_of_garbage_is_refused_beyond_its_share_and_another_service_goes_on() {
    let ports = [free_port(), free_port()];
    let world = World::limited(two_services(ports, echo().await), places(90)).await;
    world.operator.hears_listening("a", 1).await;
    world.operator.hears_listening("b", 1).await;
    let mut flood = Vec::new();
    for _ in 0..200 {
        // Those that are refused may be so before they know that they are connected.
        let Ok(mut client) = TcpStream::connect(("127.0.0.1", ports[0])).await else { continue };
        drop(client.write_all(&[0xff; 1000]).await);
        flood.push(client);
    }
    world.metric_is("elasti_resolver_refused_connections_total", "reason=\"share\"", 140.0).await;
    world.operator.hears_held("a", 60).await;
    for client in flood.iter_mut().skip(60) {
        is_reset(client).await;
    }
    ping(&mut dial(ports[1]).await, b"undisturbed").await;
    for client in flood {
        client.set_zero_linger().unwrap();
    }
    world.operator.hears_held("a", 0).await;
    let _admitted = dial(ports[0]).await;
    world.operator.hears_held("a", 1).await;
}

#[tokio::test]
async fn without_memory_connections_are_reset_and_say_why() {
    let port = free_port();
    let limits = Limits { memory: Some(64 << 20), ..places(100) };
    let world = World::limited(vec![state("a", 1, port, &[])], limits).await;
    world.operator.hears_listening("a", 1).await;
    if let Ok(mut client) = TcpStream::connect(("127.0.0.1", port)).await {
        is_reset(&mut client).await;
    }
    world.metric_is("elasti_resolver_refused_connections_total", "reason=\"memory\"", 1.0).await;
    world.metric_is("elasti_resolver_accepted_connections_total", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn http_clients_beyond_the_limit_are_told_so() {
    let port = free_port();
    let world = World::limited(vec![state("a", 1, port, &[])], places(0)).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let answer = soon(head(&mut client)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    world.metric_is("elasti_resolver_refused_connections_total", "reason=\"descriptors\"", 1.0).await;
}

#[tokio::test]
async fn a_tunnel_keeps_its_place_until_it_ends() {
    let port = free_port();
    let upgrading = backend(|mut stream| async move {
        head(&mut stream).await.unwrap();
        stream.write_all(UPGRADED).await.unwrap();
        let (mut from, mut to) = stream.split();
        drop(tokio::io::copy(&mut from, &mut to).await);
    })
    .await;
    let world = World::limited(vec![state("a", 1, port, &[upgrading])], places(1)).await;
    world.operator.hears_listening("a", 1).await;
    let upgraded = async || {
        let mut client = dial(port).await;
        client.write_all(UPGRADE.as_bytes()).await.unwrap();
        let answer = soon(head(&mut client)).await.unwrap();
        (client, answer)
    };
    let (mut tunnel, answer) = upgraded().await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    for _ in 0..10 {
        ping(&mut tunnel, b"through it").await;
        let (_, answer) = upgraded().await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    }
    drop(tunnel);
    let admitted = async {
        while !upgraded().await.1.starts_with("HTTP/1.1 101 ") {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    soon(admitted).await;
}
