//! What connections need to know of the interception ports of one ElastiService. Written by [`crate::supervisor`], read by everything
//! that handles a connection.

use std::net::SocketAddr;
use std::sync::Arc;

use elasti_api::message::{Protocol, Wakes};

/// An interception port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortView {
    /// The number of the port in the Service.
    pub number: u16,
    /// Where connections go; nowhere yet if empty.
    pub targets: Arc<[SocketAddr]>,
    /// What is spoken on it, as far as anybody has said.
    pub protocol: Protocol,
    /// Connections to the target begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// What a client must have done before its connection is held, or forwarded while the target is intercepted.
    pub wakes: Wakes,
    /// What clients have dialled: the Service's cluster IPs with the port of the Service.
    pub destinations: Arc<[SocketAddr]>,
}

/// The interception ports, each once, by their numbers. Clones are the same ports.
///
/// A list, since there are few in each of very many: a tree has room for eleven.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports(Arc<[(u16, PortView)]>);

impl Ports {
    /// What is known of `port`.
    pub fn get(&self, port: u16) -> Option<&PortView> {
        self.iter().find_map(|(known, view)| (known == port).then_some(view))
    }

    /// Whether there is such a port.
    pub fn contains(&self, port: u16) -> bool {
        self.get(port).is_some()
    }

    /// All, in the order in which the operators name them.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &PortView)> {
        self.0.iter().map(|(port, view)| (*port, view))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether these are the ports of `other`, with the same targets.
    pub fn lead_where(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || self
                .iter()
                .map(|(port, view)| (port, &view.targets))
                .eq(other.iter().map(|(port, view)| (port, &view.targets)))
    }
}

impl FromIterator<(u16, PortView)> for Ports {
    fn from_iter<T: IntoIterator<Item = (u16, PortView)>>(ports: T) -> Self {
        Self(ports.into_iter().collect())
    }
}

impl<const N: usize> From<[(u16, PortView); N]> for Ports {
    fn from(ports: [(u16, PortView); N]) -> Self {
        Self(ports.into())
    }
}
