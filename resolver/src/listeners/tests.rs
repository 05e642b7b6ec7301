use std::net::TcpStream as Client;

use tokio::io::AsyncReadExt;

use super::*;
use crate::capacity::Limits;
use crate::testing::{self, service_state};

fn standby() -> Arc<Standby> {
    testing::standby(service_state("a", 1, 20_000), Duration::ZERO)
}

fn listeners() -> Listeners {
    let metrics = crate::metrics::Metrics::new(&prometheus::Registry::new()).unwrap();
    let capacity = Capacity::new(Limits { descriptors: 10_000, memory: None, conntrack: None }, metrics);
    Listeners::new(Arc::new(Context::new(forward::Dialer::default())), capacity).unwrap()
}

/// A port that nobody has.
fn free_port() -> u16 {
    bind(0).unwrap().local_addr().unwrap().port()
}

fn connect(port: u16) -> Client {
    Client::connect(("127.0.0.1", port)).unwrap()
}

#[test]
fn an_idle_port_costs_little() {
    assert!(size_of::<(u16, Open)>() <= 48, "{} bytes", size_of::<(u16, Open)>());
}

/// The task that accepts does not run meanwhile: nothing here waits.
#[tokio::test]
async fn a_port_with_many_clients_has_a_turn_and_then_another() {
    let listeners = listeners();
    let (busy, quiet) = (free_port(), free_port());
    for port in [busy, quiet] {
        listeners.open(port, &standby()).unwrap();
    }
    let clients: Vec<Client> = (0..TURN + 3).map(|_| connect(busy)).chain([connect(quiet)]).collect();
    let Listeners { inner, .. } = &listeners;
    let mut accepted = Vec::new();
    loop {
        let waiting = inner.waiting();
        if waiting.is_empty() {
            break;
        }
        for port in waiting {
            inner.take(port).unwrap();
        }
        accepted.push(inner.context.connections.len());
    }
    assert_eq!(accepted, [TURN + 1, clients.len()]);
}

#[tokio::test]
async fn whoever_connects_is_answered_however_long_the_port_was_idle() {
    let (listeners, standby, port) = (listeners(), standby(), free_port());
    listeners.open(port, &standby).unwrap();
    for _ in 0..3 {
        // Closed, for the state has no such port.
        let mut client = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(20), client.read_u8()).await;
        assert!(closed.expect("nobody has accepted").is_err());
    }
}

#[tokio::test]
async fn a_port_is_open_for_one_until_it_closes_it() {
    let (listeners, first, second, port) = (listeners(), standby(), standby(), free_port());
    listeners.open(port, &first).unwrap();
    listeners.open(port, &first).unwrap();
    let taken = listeners.open(port, &second).unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    listeners.close(port, &second);
    drop(connect(port));
    listeners.close(port, &first);
    assert!(Client::connect(("127.0.0.1", port)).is_err());
    listeners.open(port, &second).unwrap();
    drop(connect(port));
    drop(listeners);
    // The task that accepts goes at its next turn, and the sockets with it.
    while Client::connect(("127.0.0.1", port)).is_ok() {
        tokio::task::yield_now().await;
    }
}
