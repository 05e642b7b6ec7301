//! Connections to the target: dialling, and forwarding as bytes, moved within the kernel where that costs less. Bytes that
//! were read from a client are never sent twice: dials are retried, copies are not.

mod pipe;
mod ports;
mod pump;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use prometheus::IntCounter;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use self::pipe::Pipes;
use self::pump::Pump;
use crate::capacity::exhausted;

/// Silence after which a peer is asked whether it still lives.
const KEEPALIVE_TIME: Duration = Duration::from_secs(30);

/// Pause between two such questions; the kernel gives up after nine (`tcp_keepalive_probes`).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Opens the resolver's own connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dialer {
    /// Keeps a socket from being redirected to the resolver itself; absent when nothing is redirected.
    pub mark: Option<fn(&TcpSocket) -> io::Result<()>>,
}

/// Opens connections to targets: the [`Dialer`], or what stands in for it in tests of the life of a connection.
pub trait Connect {
    /// An open connection.
    type Connection;

    /// Connects to `address` and sends `header`, a PROXY protocol header or nothing.
    fn connect(
        &self,
        address: SocketAddr,
        header: &[u8],
        within: Duration,
    ) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

impl Connect for Dialer {
    type Connection = TcpStream;

    // Not `async`: a future around the other's would cost every held connection.
    fn connect(
        &self,
        address: SocketAddr,
        header: &[u8],
        within: Duration,
    ) -> impl Future<Output = io::Result<TcpStream>> + Send {
        Self::connect(self, address, header, within)
    }
}

impl Dialer {
    /// Connects to `address` and sends `header`, a PROXY protocol header or nothing.
    pub async fn connect(&self, address: SocketAddr, header: &[u8], within: Duration) -> io::Result<TcpStream> {
        let socket = self.socket(address)?;
        timeout(within, async {
            let mut stream = match socket.connect(address).await {
                // Boxed: what is held has no use for the room.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                    Box::pin(ports::connect(|| self.socket(address), address, error)).await?
                }
                connected => connected?,
            };
            if !header.is_empty() {
                stream.write_all(header).await?;
            }
            Ok(stream)
        })
        .await?
    }

    fn socket(self, address: SocketAddr) -> io::Result<TcpSocket> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_nodelay(true)?;
        // Lets its port serve again once it is closed; see `ports`.
        socket.set_reuseaddr(true)?;
        SockRef::from(&socket).set_tcp_keepalive(&keepalive())?;
        // Without the mark it still works: what is dialled here is never redirected, only clients' addresses are.
        if let Some(Err(error)) = self.mark.map(|mark| mark(&socket)) {
            tracing::debug!(%error, "cannot mark a socket");
        }
        Ok(socket)
    }
}

/// Whether a dial failed for want of something of our own, which says nothing of the target.
pub fn is_ours(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || exhausted(error)
}

/// Copies both ways until both sides have closed; each side's half-close is passed on. When a side breaks, or at
/// `ended`, the other is reset, so that nobody takes what it got for the whole. `bytes` counts, both ways, what has been
/// passed on so far.
pub async fn copy(
    mut client: TcpStream,
    mut target: TcpStream,
    pipes: &Pipes,
    bytes: &IntCounter,
    ended: &CancellationToken,
) {
    let copied = {
        let ((from_client, to_client), (from_target, to_target)) = (client.split(), target.split());
        let up = Pump::new(from_client, to_target, pipes, bytes);
        let down = Pump::new(from_target, to_client, pipes, bytes);
        ended.run_until_cancelled(both_ways(up, down)).await
    };
    if !matches!(copied, Some(Ok(()))) {
        reset(&client);
        reset(&target);
    }
}

async fn both_ways(mut up: Pump<'_>, mut down: Pump<'_>) -> io::Result<()> {
    tokio::select! {
        done = down.run() => {
            if done.is_err() && down.refused() {
                drop(up.run().await);
            }
            done?;
            // A target that breaks only now is noticed by the next write: the client may still be reading what came.
            up.run().await
        }
        done = up.run() => {
            if done.is_err() && up.refused() {
                // A target that answers early and closes has sent its answer before it broke off.
                drop(down.run().await);
            }
            done?;
            tokio::select! {
                biased;
                done = down.run() => done,
                // Nothing is read from the client any more, so that nothing else would tell the target.
                () = up.broken() => Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
    }
}

/// Finds peers that have vanished without a word, and held clients that have closed for good after sending something:
/// until they are asked, they look like ones that wait for the answer with their sending side closed.
pub fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new().with_time(KEEPALIVE_TIME).with_interval(KEEPALIVE_INTERVAL)
}

/// The connection ends with a reset when it is dropped.
pub fn reset(stream: &TcpStream) {
    // Fails only when the peer has reset it already.
    drop(stream.set_zero_linger());
}
