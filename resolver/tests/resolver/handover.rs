//! How a client of HTTP/2 is handed over, frame by frame: what it has opened before it hears of that is answered.

use elasti_api::message::{Mode, OperatorMessage, ServiceState};
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::backend::backend;
use crate::world::{World, dial, free_port, soon, state};

/// Types of frames, RFC 9113, section 6.
const HEADERS: u8 = 1;
pub(crate) const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const END: u8 = 5;

/// `:method GET`, `:scheme http`, `:path /`, `:authority a`, in HPACK.
const REQUEST: [u8; 6] = [0x82, 0x86, 0x84, 0x41, 1, b'a'];
/// `:status 200` in HPACK.
const OK: u8 = 0x88;

pub(crate) struct Frame {
    pub(crate) kind: u8,
    flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// A client, or a target, that does nothing by itself.
pub(crate) struct Raw(pub(crate) TcpStream);

impl Raw {
    pub(crate) async fn connect(port: u16) -> Self {
        let mut raw = Self(dial(port).await);
        raw.0.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        raw.write(SETTINGS, 0, 0, &[]).await;
        raw
    }

    pub(crate) async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat();
        self.0.write_all(&frame).await.unwrap();
    }

    pub(crate) async fn read(&mut self) -> Frame {
        let mut header = [0; 9];
        soon(self.0.read_exact(&mut header)).await.unwrap();
        let [high, middle, low, kind, flags, stream @ ..] = header;
        let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]).try_into().unwrap()];
        soon(self.0.read_exact(&mut payload)).await.unwrap();
        Frame { kind, flags, stream: u32::from_be_bytes(stream), payload }
    }

    /// The next frame of a kind. PINGs of the other side are answered at once.
    pub(crate) async fn next(&mut self, kind: u8) -> Frame {
        loop {
            let frame = self.read().await;
            if frame.kind == kind {
                return frame;
            }
            if frame.kind == PING && frame.flags & ACK == 0 {
                self.write(PING, ACK, 0, &frame.payload).await;
            }
        }
    }

    async fn is_answered(&mut self, stream: u32) {
        let headers = self.next(HEADERS).await;
        assert_eq!((headers.stream, headers.payload[0]), (stream, OK));
    }
}

async fn target() -> SocketAddr {
    backend(|stream| async move {
        let service =
            service_fn(|_: Request<Incoming>| async { Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())) });
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        drop(server.serve_connection(TokioIo::new(stream), service).await);
    })
    .await
}

#[tokio::test]
async fn a_stream_that_crosses_the_goaway_is_answered() {
    let (port, target) = (free_port(), target().await);
    let world = World::new(vec![state("a", 1, port, &[target])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = Raw::connect(port).await;
    client.write(HEADERS, END, 1, &REQUEST).await;
    client.is_answered(1).await;
    world.operator.set(&ServiceState { mode: Mode::Serve, ..state("a", 2, port, &[target]) });
    let goaway = client.next(GOAWAY).await;
    assert_eq!(goaway.payload, [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0], "whatever is open is answered");
    // As a client does that has opened a stream and not sent it yet: PINGs are answered first.
    client.write(PING, 0, 0, b"in order").await;
    assert_eq!(client.next(PING).await.payload, b"in order", "no PING came before, so nothing was ended by its answer");
    client.write(HEADERS, END, 3, &REQUEST).await;
    client.is_answered(3).await;
}

#[tokio::test]
async fn a_client_whose_service_is_intercepted_no_more_is_asked_to_connect_anew() {
    let (port, target) = (free_port(), target().await);
    let world = World::new(vec![state("a", 1, port, &[target])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = Raw::connect(port).await;
    client.write(HEADERS, END, 1, &REQUEST).await;
    client.is_answered(1).await;
    world.operator.send(&OperatorMessage::Remove { uid: "a".into() });
    assert_eq!(client.next(GOAWAY).await.payload[4..8], [0; 4], "no error");
}

#[tokio::test]
async fn what_is_no_frame_ends_the_connection_and_is_counted() {
    let (port, target) = (free_port(), target().await);
    let world = World::new(vec![state("a", 1, port, &[target])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = Raw::connect(port).await;
    // A stream that the client may not open, RFC 9113, section 5.1.1.
    client.write(HEADERS, END, 2, &REQUEST).await;
    let goaway = client.next(GOAWAY).await;
    assert_ne!(goaway.payload[4..8], [0; 4], "an error");
    world.metric_is("elasti_resolver_closed_connections_total", "reason=\"malformed\"", 1.0).await;
}

#[tokio::test]
async fn a_new_connection_is_not_handed_over_before_its_first_request() {
    let (port, target) = (free_port(), target().await);
    let world = World::new(vec![ServiceState { mode: Mode::Serve, ..state("a", 1, port, &[target]) }]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = Raw::connect(port).await;
    client.write(PING, 0, 0, b"in order").await;
    loop {
        let frame = client.read().await;
        assert_ne!(frame.kind, GOAWAY);
        if frame.kind == PING && frame.flags & ACK != 0 {
            break;
        }
    }
    client.write(HEADERS, END, 1, &REQUEST).await;
    let (mut answered, mut asked) = (false, false);
    while !(answered && asked) {
        let frame = client.read().await;
        answered |= frame.kind == HEADERS && frame.payload[0] == OK;
        asked |= frame.kind == GOAWAY;
    }
}
