//! Scripted targets.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::world::soon;

/// Runs `script` for each connection, until the test ends.
pub(crate) async fn backend<F>(script: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(script(stream));
        }
    });
    address
}

/// Answers each byte with itself.
pub(crate) async fn echo() -> SocketAddr {
    backend(|mut stream| async move {
        let (mut from, mut to) = stream.split();
        drop(tokio::io::copy(&mut from, &mut to).await);
        drop(to.shutdown().await);
    })
    .await
}

/// Sends and expects to get the same back.
pub(crate) async fn ping(client: &mut TcpStream, text: &[u8]) {
    client.write_all(text).await.unwrap();
    let mut answer = vec![0; text.len()];
    soon(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, text);
}

/// An address that refuses connections.
pub(crate) async fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}
