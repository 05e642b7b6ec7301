//! One listening socket per interception port. It is there as long as the ElastiService has the port, in both modes:
//! a connection that comes late over a stale rule of kube-proxy still gets through.

use std::future::poll_fn;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::capacity::{self, Share};
use crate::connection::{self, Context};
use crate::forward;
use crate::service::Service;

/// Connections that the kernel accepts before we do; it takes no more than `net.core.somaxconn`, 4096 by default.
const BACKLOG: i32 = 4096;

/// Pause after an accept that failed for want of something: the want does not go away within microseconds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An open listener; closed when dropped. Connections that it accepted live on.
#[derive(Debug)]
pub struct Listener(#[expect(dead_code, reason = "closes the listener when dropped")] AbortOnDropHandle<()>);

impl Listener {
    /// Listens on `port` for connections to `service`; those beyond its share are reset.
    pub fn open(port: u16, service: Arc<Service>, context: Arc<Context>, share: Share) -> io::Result<Self> {
        let listener = bind(port)?;
        Ok(Self(AbortOnDropHandle::new(tokio::spawn(accept(listener, port, service, context, share)))))
    }
}

/// On all addresses of both families, or of IPv4 alone where the kernel has no IPv6.
pub(crate) fn bind(port: u16) -> io::Result<TcpListener> {
    let dual = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    bind_to(dual).or_else(|error| if error.kind() == io::ErrorKind::AddrInUse { Err(error) } else { bind_to(ipv4) })
}

fn bind_to(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    // Linux hands these two on to accepted sockets.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&forward::keepalive())?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts until it is dropped.
///
/// There are tens of thousands of these, most of which never accept anything: `TcpListener::accept` would keep room for several who
/// wait, and a pause is rare.
#[expect(clippy::manual_async_fn, reason = "an async function holds what it is given twice")]
fn accept(
    listener: TcpListener,
    port: u16,
    service: Arc<Service>,
    context: Arc<Context>,
    share: Share,
) -> impl Future<Output = ()> + Send {
    async move {
        let mut failing = false;
        loop {
            match poll_fn(|cx| listener.poll_accept(cx)).await {
                Ok((client, _)) => {
                    failing = false;
                    let (service, context) = (Arc::clone(&service), Arc::clone(&context));
                    let connections = context.connections.clone();
                    match share.admit() {
                        Ok(permit) => connections.spawn(connection::serve(service, port, client, context, permit)),
                        Err(_) => connections.spawn(connection::turn_away(service, port, client, context)),
                    };
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(port, %error, "cannot accept connections");
                    }
                    if capacity::exhausted(&error) && !share.refuse(&listener) {
                        Box::pin(tokio::time::sleep(ACCEPT_PAUSE)).await;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capacity::{Capacity, Limits};
    use crate::metrics::Metrics;
    use crate::report::Board;

    /// There are as many of these as ports of ElastiServices in the cluster. With what the runtime adds it takes 256 bytes.
    #[tokio::test]
    async fn an_idle_port_costs_little() {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let limits = Limits { descriptors: 1000, memory: None, conntrack: None };
        let share = Capacity::new(limits, metrics.clone()).share();
        let service = Arc::new(Service::new("n", "s", metrics, Board::default().news()));
        let context = Arc::new(Context::new(forward::Dialer::default()));
        let accepting = accept(bind(0).unwrap(), 1, service, context, share);
        assert!(size_of_val(&accepting) <= 176, "{} bytes", size_of_val(&accepting));
    }
}
