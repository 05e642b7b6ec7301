//! A whole resolver in a process that may not open any more files. A test program of its own: the limit is the process's.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a failed step fails the test")]
#![allow(dead_code, reason = "helpers of the other tests")]

#[path = "../resolver/backend.rs"]
mod backend;
#[path = "../resolver/operator.rs"]
mod operator;
#[path = "../resolver/world.rs"]
mod world;

use std::net::SocketAddr;

use elasti_resolver::capacity::Limits;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpSocket;

use crate::backend::{echo, ping};
use crate::world::{World, dial, free_port, is_reset, soon, state};

/// Descriptors that are left when connections begin to come.
const LEFT: u64 = 8;

#[tokio::test]
async fn connections_are_reset_when_no_file_can_be_opened_and_served_when_one_can() {
    let port = free_port();
    // More is believed to be possible than is: this is about what the kernel refuses.
    let world =
        World::limited(vec![state("a", 1, port, &[])], Limits { descriptors: 1 << 20, memory: None, conntrack: None })
            .await;
    world.operator.hears_listening("a", 1).await;
    // Connecting them needs no further file of this process; accepting them does.
    let sockets: Vec<TcpSocket> = (0..3 * LEFT).map(|_| TcpSocket::new_v4().unwrap()).collect();
    let before = getrlimit(Resource::Nofile);
    let next = std::fs::File::open("/dev/null").map(|file| std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
    let few = u64::try_from(next).unwrap() + LEFT;
    setrlimit(Resource::Nofile, Rlimit { current: Some(few), ..before }).unwrap();
    let mut clients = Vec::new();
    for socket in sockets {
        // One that is refused may be so before it knows that it is connected.
        clients.extend(socket.connect(SocketAddr::from(([127, 0, 0, 1], port))).await.ok());
    }
    for client in clients.iter_mut().skip(usize::try_from(LEFT).unwrap()) {
        is_reset(client).await;
    }
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(world.metric("elasti_resolver_refused_connections_total", "reason=\"descriptors\"").await > 0.0);
    world.operator.set(&state("a", 1, port, &[echo().await]));
    ping(&mut clients[0], b"held meanwhile").await;
    soon(async { ping(&mut dial(port).await, b"new").await }).await;
}
