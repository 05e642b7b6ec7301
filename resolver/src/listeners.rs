//! The listening sockets of all interception ports, and the one task that accepts from them.
//!
//! A port is there as long as its ElastiService has it, in both modes: a connection that comes late over a stale rule of kube-proxy
//! still gets through. There are tens of thousands of them, most of which never accept anything, so what is kept of one is its
//! socket and a place in a table. The sockets are in an epoll instance of their own, of which the runtime knows one descriptor.
//!
//! Invariants: a port is open for one ElastiService at a time; a closed one accepts nothing more; no port keeps others waiting
//! for longer than [`TURN`] connections. [`crate::supervisor`] opens and closes.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use crate::capacity::{self, Capacity, Share};
use crate::connection::{self, Context};
use crate::forward;
use crate::standby::Standby;

/// Connections that the kernel accepts before we do; it takes no more than `net.core.somaxconn`, 4096 by default.
const BACKLOG: i32 = 4096;

/// Pause after an accept that failed for want of something: the want does not go away within microseconds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections that one port may accept before it is the next one's turn.
const TURN: usize = 16;

/// Ports that have a turn before other tasks have theirs: with [`TURN`] a millisecond or two.
const PORTS: usize = 16;

/// Does not wait.
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// All open interception ports; they are closed when this is dropped. Connections that they accepted live on.
#[derive(Debug)]
pub struct Listeners {
    inner: Arc<Inner>,
    _accepting: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Inner {
    /// Level-triggered; each event says by its data which port it is about.
    ready: AsyncFd<OwnedFd>,
    open: Mutex<HashMap<u16, Open>>,
    context: Arc<Context>,
    capacity: Capacity,
}

#[derive(Debug)]
struct Open {
    socket: TcpListener,
    standby: Arc<Standby>,
    share: Share,
}

impl Listeners {
    /// None is open yet. Connections beyond what `capacity` lets a port have are refused. Fails when there can be no epoll
    /// instance, for want of files or memory; needs a runtime.
    pub fn new(context: Arc<Context>, capacity: Capacity) -> io::Result<Self> {
        let ready = register(epoll::create(epoll::CreateFlags::CLOEXEC)?)?;
        let inner = Arc::new(Inner { ready, open: Mutex::default(), context, capacity });
        let accepting = tokio::spawn(accept(Arc::clone(&inner)));
        Ok(Self { inner, _accepting: AbortOnDropHandle::new(accepting) })
    }

    /// Listens on `port` for connections to this ElastiService, if it does not yet. Fails when somebody else has the port.
    pub fn open(&self, port: u16, standby: &Arc<Standby>) -> io::Result<()> {
        let mut open = self.inner.open();
        if let Some(known) = open.get(&port) {
            let same = Arc::ptr_eq(&known.standby, standby);
            return if same { Ok(()) } else { Err(Errno::ADDRINUSE.into()) };
        }
        let socket = bind(port)?;
        let data = epoll::EventData::new_u64(port.into());
        epoll::add(&self.inner.ready, &socket, data, epoll::EventFlags::IN)?;
        let share = self.inner.capacity.share();
        open.insert(port, Open { socket, standby: Arc::clone(standby), share });
        Ok(())
    }

    /// Listens on `port` no more, unless it is open for somebody else.
    pub fn close(&self, port: u16, standby: &Arc<Standby>) {
        let mut open = self.inner.open();
        if open.get(&port).is_some_and(|known| Arc::ptr_eq(&known.standby, standby)) {
            open.remove(&port);
        }
    }
}

#[expect(unsafe_code, reason = "AsRawFd alone promises nothing of the descriptor")]
fn register(epoll: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open until it is dropped, and always the same descriptor.
    Ok(unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) }?)
}

/// On all addresses of both families, or of IPv4 alone where the kernel has no IPv6. The socket does not block.
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
    Ok(socket.into())
}

/// Accepts until it is dropped.
async fn accept(inner: Arc<Inner>) {
    let mut failing = false;
    // Fails when the runtime ends.
    while let Ok(mut ready) = inner.ready.readable().await {
        loop {
            let ports = inner.waiting();
            if ports.is_empty() {
                ready.clear_ready();
                break;
            }
            let failures: Vec<_> =
                ports.into_iter().filter_map(|port| inner.take(port).err().map(|error| (port, error))).collect();
            if let Some((port, error)) = failures.first()
                && !failing
            {
                tracing::warn!(port, %error, "cannot accept connections");
            }
            failing = !failures.is_empty();
            let wants = |(port, error): &(u16, io::Error)| capacity::exhausted(error) && !inner.refuse(*port);
            if failures.iter().any(wants) {
                tokio::time::sleep(ACCEPT_PAUSE).await;
            } else {
                tokio::task::yield_now().await;
            }
        }
    }
}

impl Inner {
    /// No code panics while it holds the lock.
    fn open(&self) -> MutexGuard<'_, HashMap<u16, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ports on which connections wait, [`PORTS`] at most; the kernel goes round among them.
    fn waiting(&self) -> Vec<u16> {
        let mut events = [const { MaybeUninit::uninit() }; PORTS];
        // Fails for no instance that is open.
        let waiting = epoll::wait(&self.ready, &mut events, Some(&AT_ONCE));
        let waiting = waiting.map(|(waiting, _)| &*waiting).unwrap_or_default();
        waiting.iter().filter_map(|event| u16::try_from(event.data.u64()).ok()).collect()
    }

    /// Accepts what waits on `port`, [`TURN`] at most.
    fn take(&self, port: u16) -> io::Result<()> {
        let open = self.open();
        // It may have been closed meanwhile.
        let Some(Open { socket, standby, share }) = open.get(&port) else { return Ok(()) };
        for _ in 0..TURN {
            let client = match rustix::net::accept_with(socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(client) => TcpStream::from_std(client.into())?,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            let (service, context) = (Arc::clone(standby.service()), Arc::clone(&self.context));
            let connections = &self.context.connections;
            match share.admit() {
                Ok(permit) => connections.spawn(connection::serve(service, port, client, context, permit)),
                Err(_) => connections.spawn(connection::turn_away(service, port, client, context)),
            };
        }
        Ok(())
    }

    /// Resets one connection that waits on `port` although no file can be opened for it; see [`Capacity::refuse`].
    fn refuse(&self, port: u16) -> bool {
        self.open().get(&port).is_none_or(|open| self.capacity.refuse(&open.socket))
    }
}

#[cfg(test)]
mod tests;
