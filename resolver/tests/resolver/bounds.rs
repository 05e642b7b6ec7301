//! How much of what one side has not taken yet the resolver lets the other side send.

use elasti_api::message::ServiceState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::backend::backend;
use crate::handover::{Raw, SETTINGS};
use crate::http::head;
use crate::world::{World, dial, free_port, soon, state};

/// RFC 9113, sections 6.5.2, 6.9 and 6.9.2.
const INITIAL_WINDOW_SIZE: u16 = 4;
const WINDOW_UPDATE: u8 = 8;
const FIRST_WINDOW: u32 = 65_535;

/// The windows of a stream and of the connection that the other side opens.
async fn windows(raw: &mut Raw) -> (u32, u32) {
    let settings = raw.next(SETTINGS).await;
    let window = settings.payload.chunks(6).find(|setting| setting[..2] == INITIAL_WINDOW_SIZE.to_be_bytes());
    let stream = window.map_or(FIRST_WINDOW, |setting| u32::from_be_bytes(setting[2..].try_into().unwrap()));
    let update = raw.next(WINDOW_UPDATE).await;
    assert_eq!(update.stream, 0, "of the connection");
    (stream, FIRST_WINDOW + u32::from_be_bytes(update.payload.try_into().unwrap()))
}

fn one_service(port: u16, target: std::net::SocketAddr) -> Vec<ServiceState> {
    vec![state("a", 1, port, &[target])]
}

/// Hundreds of connections whose streams nobody reads were enough to have the resolver killed.
#[tokio::test]
async fn neither_side_of_http2_may_send_more_than_a_little_ahead() {
    let port = free_port();
    let (said, mut heard) = mpsc::unbounded_channel();
    let target = backend(move |mut stream| {
        let said = said.clone();
        async move {
            stream.read_exact(&mut [0; 24]).await.unwrap();
            let mut raw = Raw(stream);
            raw.write(SETTINGS, 0, 0, &[]).await;
            said.send(windows(&mut raw).await).unwrap();
            std::future::pending::<()>().await;
        }
    })
    .await;
    let world = World::new(one_service(port, target)).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = Raw::connect(port).await;
    for (stream, connection) in [windows(&mut client).await, soon(heard.recv()).await.unwrap()] {
        assert!(stream <= 64 << 10, "{stream} bytes of a stream");
        assert!(connection <= 256 << 10, "{connection} bytes of a connection");
    }
}

#[tokio::test]
async fn heads_of_sixty_kilobytes_pass_both_ways_and_endless_ones_do_not() {
    let port = free_port();
    let field = "x".repeat(60_000);
    let large = format!("HTTP/1.1 204 No Content\r\nx: {field}\r\n\r\n");
    let target = backend(move |mut stream| {
        let large = large.clone();
        async move {
            while head(&mut stream).await.is_some() {
                stream.write_all(large.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    let world = World::new(one_service(port, target)).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    client.write_all(format!("GET / HTTP/1.1\r\nhost: a\r\nx: {field}\r\n\r\n").as_bytes()).await.unwrap();
    let answer = soon(head(&mut client)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 204 ") && answer.contains(&field));

    let mut client = dial(port).await;
    client.write_all(format!("GET / HTTP/1.1\r\nhost: a\r\nx: {field}").as_bytes()).await.unwrap();
    client.write_all(field.as_bytes()).await.unwrap();
    let answer = soon(head(&mut client)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}
