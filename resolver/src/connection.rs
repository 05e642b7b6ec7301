//! The life of one accepted connection: it reaches the target, its protocol is recognised, it is forwarded; or it is
//! refused in the words of its protocol. Nothing is read from it before it has reached the target: what it has sent
//! waits in the kernel.
//!
//! A silent client of a target that stands by is never judged by a clock: whoever speaks first, client or target, shows what is
//! spoken. Only where a bare connection shall not wake a target is it waited for what the client does ([`Wakes`]).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elasti_api::message::{Protocol, SILENCE, Wakes};
use rustix::net::RecvFlags;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::capacity::Permit;
use crate::forward::{self, Dialer, Pipes};
use crate::hold::{self, Closed, Concurrency, Seeker};
use crate::http::{self, Session};
use crate::protocol::{self, FIRST_BYTES, Spoken};
use crate::proxy_protocol;
use crate::service::Service;

/// A client that is refused has this long to show what it speaks: its first packet is on its way, or there is none.
const REFUSAL_PATIENCE: Duration = Duration::from_millis(100);

/// How long clients that have not said anything are kept when the resolver is leaving: connected anew, they lose nothing.
pub(crate) const LEAVE_SILENT: Duration = Duration::from_secs(5);

/// Clients that are refused in the words of their protocol at once, over all Services; others are reset. Fewer than
/// [`crate::capacity`] leaves open files for, since it refuses when these run out.
const REFUSALS: usize = 64;

/// What a forwarded connection may buffer if it was bounded while it was held: the kernel's own default for a socket
/// whose buffer is set by hand (`net.core.rmem_max`).
const FORWARDED_BUFFER: usize = 212_992;

/// What all connections need.
#[derive(Clone, Debug)]
pub struct Context {
    /// Opens connections to targets.
    pub dialer: Dialer,
    /// Carry what is forwarded as bytes.
    pub pipes: Pipes,
    /// Every connection is a task here.
    pub connections: TaskTracker,
    /// The resolver is about to stop: clients that can go elsewhere shall.
    pub leaving: CancellationToken,
    /// Ends every connection.
    pub ended: CancellationToken,
    refusals: Arc<Semaphore>,
}

impl Context {
    /// Nobody leaves or ends yet.
    pub fn new(dialer: Dialer) -> Self {
        Self {
            dialer,
            pipes: Pipes::default(),
            connections: TaskTracker::new(),
            leaving: CancellationToken::new(),
            ended: CancellationToken::new(),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
        }
    }
}

/// The two ends of a client's connection, as the client sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// The client.
    pub address: SocketAddr,
    /// What it has dialled: the Service's cluster IP.
    pub destination: SocketAddr,
}

impl Client {
    fn of(stream: &TcpStream, service: &Service, port: u16) -> io::Result<Self> {
        let address = canonical(stream.peer_addr()?);
        let view = service.view();
        let destinations = view.ports.get(port).map(|port| Arc::clone(&port.destinations)).unwrap_or_default();
        let destination = destinations.iter().find(|destination| destination.is_ipv4() == address.is_ipv4());
        let destination = destination.copied().map_or_else(|| stream.local_addr().map(canonical), Ok)?;
        Ok(Self { address, destination })
    }

    /// What names this client to a target that wants to know.
    pub fn proxy_header(&self) -> Vec<u8> {
        proxy_protocol::header(self.address, self.destination)
    }
}

/// IPv4 as IPv4: listeners take both families.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Serves one accepted connection to its end; `permit` is given back then, or at the end of the tunnel that it has become. The
/// context's end ends it with a reset.
///
/// Tasks run this future itself: one that awaited it would hold it twice, before the first poll and after.
pub async fn serve(service: Arc<Service>, port: u16, stream: TcpStream, context: Arc<Context>, permit: Permit) {
    let mut since = Instant::now();
    let Ok(client) = Client::of(&stream, &service, port) else {
        service.close(Closed::ClientLeft);
        return;
    };
    let (protocol, wakes, policy, probed) = {
        let view = service.view();
        let (protocol, wakes) = view.ports.get(port).map(|port| (port.protocol, port.wakes)).unwrap_or_default();
        (protocol, wakes, view.hold, view.probes.is_some())
    };
    if wakes != Wakes::Connection {
        // Boxed: a connection that is held has no use for the room.
        let done = Box::pin(first_deed(&stream, &service, port, wakes, policy.timeout, &context.leaving));
        let done = tokio::select! {
            biased;
            () = context.ended.cancelled() => Err(Closed::Shutdown),
            done = done => done,
        };
        match done {
            Ok(Some(spoken @ (Spoken::Http1 | Spoken::Http2))) if probed => {
                // Whether it is traffic is known request by request.
                service.metrics().accepted.inc();
                let session = Session { service, port, client, context, permit: Arc::new(permit) };
                return Box::pin(http::serve(spoken, stream, None, session)).await;
            }
            Ok(_) => {}
            Err(reason) => return service.close(reason),
        }
        since = Instant::now();
    }
    service.accept(client.address.ip());
    if let Some(most) = policy.max_buffered_bytes {
        buffer(&stream, most as usize);
    }
    let concurrency = Concurrency::of_connections(policy.concurrency);
    let seeker = Seeker { service: &service, port, dialer: context.dialer, client, concurrency: &concurrency, since };
    let mut held = HeldStream { stream, disturbed: false };
    // Not `run_until_cancelled`, here and below: it holds its future twice, and a held connection with it.
    let reached = tokio::select! {
        biased;
        () = context.ended.cancelled() => Err(Closed::Shutdown),
        reached = hold::reach(&seeker, held.left(protocol, &concurrency)) => reached,
    };
    let Ok(stream) = held.take() else { return };
    let reached = match reached {
        Ok(reached) => reached,
        Err(reason) => {
            service.close(reason);
            return Box::pin(refuse(&service, stream, protocol, reason, &context)).await;
        }
    };
    if policy.max_buffered_bytes.is_some() {
        buffer(&stream, FORWARDED_BUFFER);
    }
    let forwarding = service.forward(client.address.ip());
    let spoken = tokio::select! {
        biased;
        () = context.ended.cancelled() => Spoken::Bytes,
        spoken = first_speaker(&stream, &reached.target, protocol) => spoken,
    };
    match spoken {
        Spoken::Bytes => {
            forward::copy(stream, reached.target, &context.pipes, &service.metrics().bytes, &context.ended).await;
            drop((forwarding, reached.place, permit));
        }
        spoken => {
            drop(forwarding);
            let session = Session { service, port, client, context, permit: Arc::new(permit) };
            Box::pin(http::serve(spoken, stream, Some(reached), session)).await;
        }
    }
}

/// Refuses a connection that the resolver has no room for.
pub async fn turn_away(service: Arc<Service>, port: u16, stream: TcpStream, context: Arc<Context>) {
    refuse(&service, stream, said(&service, port), Closed::Limit, &context).await;
}

/// What is spoken on `port`, as far as anybody has said.
fn said(service: &Service, port: u16) -> Protocol {
    service.view().ports.get(port).map(|port| port.protocol).unwrap_or_default()
}

/// Bounds what the kernel takes of what the peer sends. It fails for no socket that is open.
fn buffer(stream: &TcpStream, bytes: usize) {
    drop(SockRef::from(stream).set_recv_buffer_size(bytes));
}

/// A client's connection while nothing is read from it.
struct HeldStream {
    stream: TcpStream,
    /// Tokio was told that there is nothing to read although there is.
    disturbed: bool,
}

impl HeldStream {
    /// Waits until the client has left: its connection broke, or it closed it without having sent anything. A client
    /// that has sent something and then closed its sending side may be waiting for the answer, unless it speaks HTTP,
    /// whose clients close to give up, or TLS, whose handshake needs both sides.
    async fn left(&mut self, said: Protocol, concurrency: &Concurrency) {
        match shown(&self.stream, said).await {
            Ok(Some(Spoken::Bytes)) => {
                self.closed().await;
                if begins_handshake(&self.stream) {
                    return;
                }
                concurrency.mark_brief();
                // The kernel reports a broken connection (EPOLLERR) whatever is unread; what else fails counts as broken too.
                drop(self.stream.ready(Interest::ERROR).await);
            }
            Ok(Some(Spoken::Http1 | Spoken::Http2)) => {
                concurrency.mark_brief();
                self.closed().await;
            }
            Ok(None) | Err(_) => {}
        }
    }

    /// Waits until the client has closed its sending side, or its connection broke. Only edges wake here: what is unread is declared not to be
    /// there, and comes back into sight in [`HeldStream::take`].
    async fn closed(&mut self) {
        loop {
            match self.stream.ready(Interest::READABLE).await {
                Ok(ready) if !ready.is_read_closed() && !ready.is_error() => {}
                Ok(_) | Err(_) => return,
            }
            self.disturbed = true;
            drop(self.stream.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into())));
        }
    }

    /// The stream, as it was.
    fn take(self) -> io::Result<TcpStream> {
        if !self.disturbed {
            return Ok(self.stream);
        }
        // Registered anew, the kernel tells all that there is to tell.
        TcpStream::from_std(self.stream.into_std()?)
    }
}

/// What the bytes that have come so far show; nothing when the client has closed without sending any.
fn first_bytes(stream: &TcpStream, said: Protocol) -> io::Result<Option<Spoken>> {
    let mut first = [0; FIRST_BYTES];
    let length = stream.try_io(Interest::READABLE, || {
        let (length, _) = rustix::net::recv(stream, &mut first, RecvFlags::PEEK)?;
        Ok(length)
    })?;
    Ok((length > 0).then(|| protocol::spoken(said, &first[..length])))
}

/// Whether what is unread begins a handshake of TLS.
fn begins_handshake(stream: &TcpStream) -> bool {
    let mut first = [0; 2];
    rustix::net::recv(stream, &mut first, RecvFlags::PEEK | RecvFlags::DONTWAIT)
        .is_ok_and(|(length, _)| protocol::is_handshake(&first[..length]))
}

/// Waits until a client shows what it speaks; nothing when it closes without a word.
pub(crate) async fn shown(stream: &TcpStream, said: Protocol) -> io::Result<Option<Spoken>> {
    loop {
        stream.readable().await?;
        match first_bytes(stream, said) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            spoken => return spoken,
        }
    }
}

/// What is spoken on a connection whose target stands by. A target that speaks first, or closes, speaks no HTTP, unless
/// it is known to.
async fn first_speaker(client: &TcpStream, target: &TcpStream, said: Protocol) -> Spoken {
    if said == Protocol::Tcp {
        return Spoken::Bytes;
    }
    tokio::select! {
        biased;
        spoken = shown(client, said) => spoken.ok().flatten().unwrap_or(Spoken::Bytes),
        _ = target.readable(), if said != Protocol::Http => Spoken::Bytes,
    }
}

/// Waits until a client has done what wakes its target, and says what it speaks if it has shown that; or until clients can reach
/// the target directly, or the port is gone: then it is treated as any other. Until then it has no place and is no traffic.
async fn first_deed(
    stream: &TcpStream,
    service: &Service,
    port: u16,
    wakes: Wakes,
    most: Duration,
    leaving: &CancellationToken,
) -> Result<Option<Spoken>, Closed> {
    let mut views = service.views();
    let silence = async {
        match wakes {
            Wakes::Data => std::future::pending().await,
            Wakes::Connection | Wakes::DataOrSilence => sleep(SILENCE).await,
        }
    };
    let left = async {
        leaving.cancelled().await;
        sleep(LEAVE_SILENT).await;
    };
    tokio::select! {
        biased;
        shown = shown(stream, said(service, port)) => shown.ok().flatten().map(Some).ok_or(Closed::ClientLeft),
        () = silence => Ok(None),
        _ = views.wait_for(|view| view.shall_reconnect(port)) => Ok(None),
        () = left => Err(Closed::Shutdown),
        () = sleep(most) => Err(Closed::Timeout),
    }
}

/// Tells a client why it is not served: an answer if it speaks HTTP, else a reset.
async fn refuse(service: &Service, stream: TcpStream, said: Protocol, reason: Closed, context: &Context) {
    let place = context.refusals.try_acquire();
    let spoken = if place.is_ok() && reason != Closed::ClientLeft {
        timeout(REFUSAL_PATIENCE, shown(&stream, said)).await.ok().and_then(Result::ok).flatten()
    } else {
        None
    };
    match spoken {
        Some(spoken @ (Spoken::Http1 | Spoken::Http2)) => http::refuse(spoken, stream, service, reason).await,
        Some(Spoken::Bytes) | None => forward::reset(&stream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capacity::{Capacity, Limits};
    use crate::metrics::Metrics;
    use crate::report::Board;

    /// Ten thousand held connections, the default limit of a Service, cost 40 MB at most: the allocator, the task's own head and
    /// what the runtime registers for the socket come to this.
    #[tokio::test]
    async fn a_connection_costs_less_than_four_kilobytes() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let limits = Limits { descriptors: 1 << 20, memory: None, conntrack: None };
        let permit = Capacity::new(limits, metrics.clone()).share().admit().unwrap();
        let service = Arc::new(Service::new("n", "s", metrics, Board::default().news()));
        let connection = serve(service, 1, client, Arc::new(Context::new(Dialer::default())), permit);
        assert!(size_of_val(&connection) < 2560, "{} bytes", size_of_val(&connection));
    }
}
