//! Connections to the target: dialling and copying. Bytes that were read from a client are never sent twice: dials are
//! retried, copies are not.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use prometheus::IntCounter;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Silence after which a peer is asked whether it still lives.
const KEEPALIVE_TIME: Duration = Duration::from_secs(30);

/// Pause between two such questions; the kernel gives up after nine (`tcp_keepalive_probes`).
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Per direction of a forwarded connection. Wakes are short-lived and many; bulk transfers are for the direct path.
const BUFFER: usize = 16 * 1024;

/// Opens the resolver's own connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dialer {
    /// Keeps a socket from being redirected to the resolver itself; absent when nothing is redirected.
    pub mark: Option<fn(&TcpSocket) -> io::Result<()>>,
}

impl Dialer {
    /// Connects to `address` and sends `header`, a PROXY protocol header or nothing.
    pub async fn connect(&self, address: SocketAddr, header: &[u8], within: Duration) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_nodelay(true)?;
        SockRef::from(&socket).set_tcp_keepalive(&keepalive())?;
        // Without the mark it still works: what is dialled here is never redirected, only clients' addresses are.
        if let Some(Err(error)) = self.mark.map(|mark| mark(&socket)) {
            tracing::debug!(%error, "cannot mark a socket");
        }
        timeout(within, async {
            let mut stream = socket.connect(address).await?;
            if !header.is_empty() {
                stream.write_all(header).await?;
            }
            Ok(stream)
        })
        .await?
    }
}

/// Copies both ways until both sides have closed; each side's half-close is passed on. When a side breaks, or at
/// `ended`, the other is reset, so that nobody takes what it got for the whole.
pub async fn copy(client: TcpStream, mut target: TcpStream, bytes: &IntCounter, ended: &CancellationToken) {
    let mut client = Counted { stream: client, bytes };
    let copying = copy_bidirectional_with_sizes(&mut client, &mut target, BUFFER, BUFFER);
    if !matches!(ended.run_until_cancelled(copying).await, Some(Ok(_))) {
        reset(&client.stream);
        reset(&target);
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

/// Counts what is read from and written to a stream.
struct Counted<'a> {
    stream: TcpStream,
    bytes: &'a IntCounter,
}

impl AsyncRead for Counted<'_> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.bytes.inc_by((buf.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted<'_> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.bytes.inc_by(written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
