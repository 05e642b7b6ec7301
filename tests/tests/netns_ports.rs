//! The resolver's own connections in a network namespace with few ports.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::net::SocketAddr;

use elasti_tests::netns::{Host, RESOLVER};

/// A pod whose clients close first would refuse, for a minute each, as many connections as there are ports.
#[test]
fn a_port_serves_again_while_its_last_connection_waits_to_be_forgotten() {
    let mut host = Host::new("ports");
    let port = host.keep("");
    host.set("net.ipv4.ip_local_port_range", "15000 15009");
    // As between two machines: by default the kernel lets ports be used again within one.
    host.set("net.ipv4.tcp_tw_reuse", "0");
    for address in RESOLVER {
        assert_eq!(host.dial(SocketAddr::new(address.parse().unwrap(), port), 100), "100");
    }
}
