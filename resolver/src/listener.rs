//! One listening socket per interception port. It is there as long as the ElastiService has the port, in both modes:
//! a connection that comes late over a stale rule of kube-proxy still gets through.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

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
pub struct Listener(#[expect(dead_code, reason = "closes the listener when dropped")] DropGuard);

impl Listener {
    /// Listens on `port` for connections to `service`; those beyond its share are reset.
    pub fn open(port: u16, service: Arc<Service>, context: Context, share: Share) -> io::Result<Self> {
        let listener = bind(port)?;
        let closed = CancellationToken::new();
        tokio::spawn(accept(listener, port, service, Arc::new(context), share, closed.clone()));
        Ok(Self(closed.drop_guard()))
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

async fn accept(
    listener: TcpListener,
    port: u16,
    service: Arc<Service>,
    context: Arc<Context>,
    share: Share,
    closed: CancellationToken,
) {
    let mut failing = false;
    while let Some(accepted) = closed.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((client, _)) => {
                failing = false;
                let Ok(permit) = share.admit() else {
                    let refused = connection::turn_away(Arc::clone(&service), port, client, Arc::clone(&context));
                    context.connections.spawn(refused);
                    continue;
                };
                let connection = connection::serve(Arc::clone(&service), port, client, Arc::clone(&context), permit);
                context.connections.spawn(connection);
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(port, %error, "cannot accept connections");
                }
                if capacity::exhausted(&error) && !share.refuse(&listener) {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}
