//! The nodes' network namespaces: one wire between them, no way out.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::layout::Node;
use crate::process;

/// Makes both namespaces with their addresses and the routes to each other's pods.
pub(super) fn create(nodes: &[Node; 2]) -> Result<()> {
    let [first, second] = nodes.each_ref().map(Node::namespace);
    for namespace in [&first, &second] {
        ip(&["netns", "add", namespace])?;
        // IPv6 addresses must work at once: duplicate address detection takes a second, and here every address is ours.
        inside(
            namespace,
            "sysctl",
            &[
                "-qw",
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
                "net.ipv6.conf.all.accept_dad=0",
                "net.ipv6.conf.default.accept_dad=0",
            ],
        )?;
        ip(&["-n", namespace, "link", "set", "lo", "up"])?;
    }
    ip(&["link", "add", "eth0", "netns", &first, "type", "veth", "peer", "name", "eth0", "netns", &second])?;
    for (node, other) in [(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])] {
        let namespace = node.namespace();
        let [ipv4, ipv6] = node.addresses();
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        ip(&["-n", &namespace, "address", "add", &format!("{ipv4}/24"), "dev", "eth0"])?;
        ip(&["-n", &namespace, "address", "add", &format!("{ipv6}/64"), "dev", "eth0", "nodad"])?;
        for (range, via) in other.pod_ranges().iter().zip(other.addresses()) {
            ip(&["-n", &namespace, "route", "add", range, "via", &via])?;
        }
        // Service addresses need some route before kube-proxy's rules rewrite them.
        ip(&["-n", &namespace, "-4", "route", "add", "default", "dev", "eth0"])?;
        ip(&["-n", &namespace, "-6", "route", "add", "default", "dev", "eth0"])?;
    }
    Ok(())
}

/// Keeps outgoing connections clear of interception ports, as in a resolver's pod: where there are no pods, resolvers listen in the
/// node's own namespace. Before anything connects, since a closed connection keeps its port for a minute.
pub(super) fn leave_interception_ports(node: &Node) -> Result<()> {
    inside(&node.namespace(), "sysctl", &["-qw", "net.ipv4.ip_local_port_range=1024 19999"])
}

/// Removes a node's namespace with all links in it.
pub(super) fn destroy(node: &Node) -> Result<()> {
    let namespace = node.namespace();
    if Path::new("/run/netns").join(&namespace).exists() {
        ip(&["netns", "delete", &namespace])?;
    }
    Ok(())
}

fn ip(args: &[&str]) -> Result<()> {
    process::output(Command::new("ip").args(args)).map(drop)
}

fn inside(namespace: &str, program: &str, args: &[&str]) -> Result<()> {
    process::output(Command::new("ip").args(["netns", "exec", namespace, program]).args(args)).map(drop)
}
