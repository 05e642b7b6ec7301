//! Bytes between two sockets: what one side sends arrives at the other, whole or broken off, whichever way it is moved.

use std::time::Duration;

use elasti_resolver::forward::{self, Pipes};
use prometheus::IntCounter;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::world::{DEADLINE, is_reset, soon};

/// Kernel buffers, by hand: otherwise they grow to what the machine allows.
const BUFFER: usize = 512 << 10;

/// Far more than the buffers of two connections take (the kernel doubles what it is told) and a pipe, so that a reader
/// that does not read stops a writer in its midst.
const MUCH: usize = 16 << 20;

/// A client and a target with the resolver's forwarding between them.
struct Forwarded {
    client: TcpStream,
    target: TcpStream,
    bytes: IntCounter,
    ended: CancellationToken,
    forwarding: JoinHandle<()>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let far = listener.accept().await.unwrap().0;
    for stream in [&near, &far] {
        let socket = SockRef::from(stream);
        socket.set_recv_buffer_size(BUFFER).unwrap();
        socket.set_send_buffer_size(BUFFER).unwrap();
    }
    (near, far)
}

impl Forwarded {
    async fn new(pipes: &Pipes) -> Self {
        let ((client, from), (to, target)) = (pair().await, pair().await);
        let (bytes, ended) = (IntCounter::new("bytes", "bytes").unwrap(), CancellationToken::new());
        let forwarding = {
            let (pipes, bytes, ended) = (pipes.clone(), bytes.clone(), ended.clone());
            tokio::spawn(async move { forward::copy(from, to, &pipes, &bytes, &ended).await })
        };
        Self { client, target, bytes, ended, forwarding }
    }

    async fn passed_on(&self, bytes: usize) {
        soon(async {
            while self.bytes.get() < bytes as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        assert_eq!(self.bytes.get(), bytes as u64);
    }

    /// Waits until nothing moves any more; too early a return makes a test weaker, not wrong.
    async fn stalled(&self) {
        let mut last = 0;
        while last == 0 || self.bytes.get() != last {
            last = self.bytes.get();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Pipes in plenty, too few, none.
fn all_ways() -> [Pipes; 3] {
    [Pipes::default(), Pipes::at_most(1), Pipes::at_most(0)]
}

/// Bytes whose place shows in their value.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at.wrapping_mul(31) ^ (at >> 8) ^ seed) & 0xff).unwrap()).collect()
}

async fn send_all(mut stream: tokio::net::tcp::OwnedWriteHalf, bytes: Vec<u8>) {
    stream.write_all(&bytes).await.unwrap();
    stream.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_passes_both_ways_at_once_and_is_counted() {
    const LENGTH: usize = 8 << 20;
    for pipes in all_ways() {
        let Forwarded { client, target, bytes, forwarding, .. } = Forwarded::new(&pipes).await;
        let mut sides = JoinSet::new();
        for (stream, sent, expected) in [(client, 1, 2), (target, 2, 1)] {
            let (mut from, to) = stream.into_split();
            sides.spawn(send_all(to, pattern(LENGTH, sent)));
            sides.spawn(async move {
                let mut all = Vec::new();
                from.read_to_end(&mut all).await.unwrap();
                assert!(all == pattern(LENGTH, expected), "{} bytes", all.len());
            });
        }
        tokio::time::timeout(3 * DEADLINE, sides.join_all()).await.unwrap();
        soon(forwarding).await.unwrap();
        assert_eq!(bytes.get(), 2 * LENGTH as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bulk_is_spliced_and_its_pipe_serves_the_next() {
    let pipes = Pipes::default();
    for _ in 0..10 {
        let mut forwarded = Forwarded::new(&pipes).await;
        let sent = pattern(4 << 20, 0);
        let (mut received, text) = (vec![0; sent.len()], sent.clone());
        let (_, mut to) = forwarded.client.split();
        tokio::join!(async { to.write_all(&text).await.unwrap() }, async {
            soon(forwarded.target.read_exact(&mut received)).await.unwrap();
        });
        assert!(received == sent);
        // Counted while the connection is open, as fast as it moves.
        forwarded.passed_on(sent.len()).await;
    }
    assert_eq!(pipes.open(), 1);
}

#[tokio::test]
async fn messages_of_all_sizes_are_answered() {
    for pipes in all_ways() {
        let mut forwarded = Forwarded::new(&pipes).await;
        let chunk = 16 << 10;
        for length in [1, 1024, chunk - 1, chunk, chunk + 1, 1, 2 * chunk, 2 * chunk + 1, 3 * chunk, 1024, 1] {
            let (sent, mut received) = (pattern(length, length), vec![0; length]);
            forwarded.client.write_all(&sent).await.unwrap();
            soon(forwarded.target.read_exact(&mut received)).await.unwrap();
            assert!(sent == received, "{length}");
            forwarded.target.write_all(&sent).await.unwrap();
            soon(forwarded.client.read_exact(&mut received)).await.unwrap();
            assert!(sent == received, "{length}");
        }
    }
}

#[tokio::test]
async fn each_half_close_is_passed_on_and_the_other_way_stays_open() {
    for client_is_first in [true, false] {
        let forwarded = Forwarded::new(&Pipes::default()).await;
        let (mut first, mut second) = (forwarded.client, forwarded.target);
        if !client_is_first {
            std::mem::swap(&mut first, &mut second);
        }
        first.shutdown().await.unwrap();
        assert_eq!(soon(second.read(&mut [0])).await.unwrap(), 0);
        let sent = pattern(1 << 20, 0);
        let mut received = Vec::new();
        tokio::join!(
            async {
                second.write_all(&sent).await.unwrap();
                second.shutdown().await.unwrap();
            },
            async {
                soon(first.read_to_end(&mut received)).await.unwrap();
            }
        );
        assert!(received == sent);
        soon(forwarded.forwarding).await.unwrap();
    }
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    for client_resets in [true, false] {
        let forwarded = Forwarded::new(&Pipes::default()).await;
        let (mut first, mut second) = (forwarded.client, forwarded.target);
        if !client_resets {
            std::mem::swap(&mut first, &mut second);
        }
        // What was sent before arrives.
        first.write_all(b"half").await.unwrap();
        soon(second.read_exact(&mut [0; 4])).await.unwrap();
        first.set_zero_linger().unwrap();
        drop(first);
        is_reset(&mut second).await;
        soon(forwarded.forwarding).await.unwrap();
    }
}

/// Nothing is read from a client that has closed its sending side, and a target that has nothing to say would wait for
/// ever.
#[tokio::test]
async fn a_client_that_goes_after_its_half_close_resets_the_target() {
    let Forwarded { mut client, mut target, forwarding, .. } = Forwarded::new(&Pipes::default()).await;
    client.shutdown().await.unwrap();
    assert_eq!(soon(target.read(&mut [0])).await.unwrap(), 0);
    client.set_zero_linger().unwrap();
    drop(client);
    soon(forwarding).await.unwrap();
    let broken = soon(async {
        loop {
            if let Err(error) = target.write_all(b"x").await {
                return error.kind();
            }
        }
    })
    .await;
    assert!(matches!(broken, std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe), "{broken}");
}

/// Keeps out B10: whole responses are kept in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_slows_its_writer_down_and_gets_all() {
    for pipes in all_ways() {
        let mut forwarded = Forwarded::new(&pipes).await;
        let sent = pattern(MUCH, 0);
        let (mut from, to) = std::mem::replace(&mut forwarded.client, pair().await.0).into_split();
        let writer = tokio::spawn(send_all(to, sent.clone()));
        forwarded.stalled().await;
        assert!(!writer.is_finished(), "{MUCH} bytes were buffered");
        // The other way is not concerned.
        forwarded.target.write_all(b"still here").await.unwrap();
        soon(from.read_exact(&mut [0; 10])).await.unwrap();
        let mut received = Vec::with_capacity(MUCH);
        tokio::time::timeout(3 * DEADLINE, forwarded.target.read_to_end(&mut received)).await.unwrap().unwrap();
        assert!(received == sent, "{} bytes", received.len());
        soon(writer).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_resets_both_sides_in_the_midst_of_a_transfer_and_closes_its_pipe() {
    for pipes in all_ways() {
        let mut forwarded = Forwarded::new(&pipes).await;
        let (_, mut to) = std::mem::replace(&mut forwarded.client, pair().await.0).into_split();
        let writer = tokio::spawn(async move { to.write_all(&pattern(MUCH, 0)).await.map_err(|error| error.kind()) });
        forwarded.stalled().await;
        forwarded.ended.cancel();
        soon(forwarded.forwarding).await.unwrap();
        let refused = soon(writer).await.unwrap().unwrap_err();
        assert!(matches!(refused, std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe), "{refused}");
        let end = soon(forwarded.target.read_to_end(&mut Vec::new())).await.map_err(|error| error.kind());
        assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
        assert_eq!(pipes.open(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_stalled_connections_than_pipes_all_get_through() {
    let pipes = Pipes::at_most(2);
    let sent = pattern(16 << 20, 0);
    let mut stalled = Vec::new();
    for _ in 0..5 {
        let mut forwarded = Forwarded::new(&pipes).await;
        let (_, to) = std::mem::replace(&mut forwarded.client, pair().await.0).into_split();
        tokio::spawn(send_all(to, sent.clone()));
        forwarded.stalled().await;
        stalled.push(forwarded);
    }
    assert_eq!(pipes.open(), 2);
    for mut forwarded in stalled {
        let mut received = Vec::new();
        soon(forwarded.target.read_to_end(&mut received)).await.unwrap();
        assert!(received == sent, "{} bytes", received.len());
    }
}

/// As servers do that refuse a large request before they have read it.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_before_the_target_breaks_off_reaches_the_client() {
    for _ in 0..200 {
        let Forwarded { client, mut target, forwarding, .. } = Forwarded::new(&Pipes::default()).await;
        let (mut answer, upload) = client.into_split();
        let uploading = tokio::spawn(async move {
            let mut upload = upload;
            while upload.write_all(&[7; 4096]).await.is_ok() {}
        });
        target.read_exact(&mut [0; 1]).await.unwrap();
        target.write_all(b"too large").await.unwrap();
        // With unread bytes left, the close is a reset.
        drop(target);
        let mut text = Vec::new();
        drop(soon(answer.read_to_end(&mut text)).await);
        assert_eq!(String::from_utf8_lossy(&text), "too large");
        soon(uploading).await.unwrap();
        soon(forwarding).await.unwrap();
    }
}
