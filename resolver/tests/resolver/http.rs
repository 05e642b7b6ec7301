//! HTTP/1: what a client and a target see of each other, byte for byte where it matters.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use elasti_api::message::{HoldPolicy, Mode, OperatorMessage, ServiceState};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};

use crate::backend::backend;
use crate::world::{World, dial, free_port, is_reset, soon, state};

mod places;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Reads one head, empty line included; nothing when the peer has closed.
pub(crate) async fn head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match stream.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return None,
        }
    }
    Some(String::from_utf8(head).unwrap())
}

/// Reads a response with a `content-length`: its head and body.
pub(crate) async fn response(stream: &mut TcpStream) -> (String, String) {
    let head = soon(head(stream)).await.expect("a response");
    let length = field(&head, "content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    soon(stream.read_exact(&mut body)).await.unwrap();
    (head, String::from_utf8(body).unwrap())
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().filter_map(|line| line.split_once(": ")).find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|it| it.1)
}

/// A target that answers every head with `answer`, and what it was asked.
async fn target(answer: &'static [u8]) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let (asked, questions) = mpsc::unbounded_channel();
    let address = backend(move |mut stream| {
        let asked = asked.clone();
        async move {
            while let Some(head) = head(&mut stream).await {
                asked.send(head).unwrap();
                stream.write_all(answer).await.unwrap();
            }
        }
    })
    .await;
    (address, questions)
}

struct Zero {
    world: World,
    port: u16,
    hold: HoldPolicy,
}

impl Zero {
    async fn new(hold: HoldPolicy) -> Self {
        let port = free_port();
        let world = World::new(vec![ServiceState { hold, ..state("a", 1, port, &[]) }]).await;
        world.operator.hears_listening("a", 1).await;
        Self { world, port, hold }
    }

    /// The target is up, or gone again, and still intercepted.
    fn set(&self, backends: &[SocketAddr]) {
        self.world.operator.set(&ServiceState { hold: self.hold, ..state("a", 1, self.port, backends) });
    }

    /// The target is up, and clients can reach it directly.
    async fn serve(&self, backends: &[SocketAddr]) {
        let hold = self.hold;
        self.world.operator.set(&ServiceState { mode: Mode::Serve, hold, ..state("a", 2, self.port, backends) });
        self.world.operator.hears_listening("a", 2).await;
    }
}

async fn ask(client: &mut TcpStream, request: &str) -> (String, String) {
    client.write_all(request.as_bytes()).await.unwrap();
    response(client).await
}

const GET: &str = "GET / HTTP/1.1\r\nHost: web.shop\r\n\r\n";
pub(crate) const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n";
pub(crate) const UPGRADED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n";

#[tokio::test]
async fn a_held_request_reaches_the_target_as_it_was_sent() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let mut client = dial(zero.port).await;
    let request = "BREW //a/../%2F?x=%zz&y=[1] HTTP/1.1\r\nHost: web.shop\r\nX-OdD-Case: Kept\r\nAccept: */*\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    zero.world.operator.hears_held("a", 1).await;
    let (address, mut asked) = target(OK).await;
    zero.set(&[address]);
    let (head, body) = response(&mut client).await;
    assert_eq!((head.as_str(), body.as_str()), ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", "ok"));
    let seen = asked.recv().await.unwrap();
    assert!(seen.starts_with("BREW //a/../%2F?x=%zz&y=[1] HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains("\r\nX-OdD-Case: Kept\r\n"), "{seen}");
    assert_eq!(field(&seen, "x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(field(&seen, "x-forwarded-host"), Some("web.shop"));
    assert_eq!(field(&seen, "forwarded"), Some("for=127.0.0.1;host=web.shop;proto=http"));
    zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn a_later_request_of_a_kept_connection_is_held_and_wakes() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (first, _asked) = target(OK).await;
    zero.set(&[first]);
    let mut client = dial(zero.port).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
    zero.set(&[]);
    // The view is in force once a new connection is held.
    let silent = dial(zero.port).await;
    zero.world.operator.hears_held("a", 1).await;
    client.write_all(GET.as_bytes()).await.unwrap();
    zero.world.operator.hears_held("a", 2).await;
    let (second, _asked) = target(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nnew").await;
    zero.set(&[second]);
    assert_eq!(response(&mut client).await.1, "new");
    drop(silent);
}

#[tokio::test]
async fn an_http_client_that_leaves_frees_its_place_and_is_never_forwarded() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let mut client = dial(zero.port).await;
    client.write_all(GET.as_bytes()).await.unwrap();
    zero.world.operator.hears_held("a", 1).await;
    drop(client);
    zero.world.operator.hears_held("a", 0).await;
    zero.world.metric_is("elasti_resolver_closed_connections_total", "client_left", 1.0).await;
    let (address, mut asked) = target(OK).await;
    zero.set(&[address]);
    assert_eq!(ask(&mut dial(zero.port).await, "GET /second HTTP/1.1\r\nhost: a\r\n\r\n").await.1, "ok");
    assert!(soon(asked.recv()).await.unwrap().starts_with("GET /second"), "the first was forwarded");
}

#[tokio::test]
async fn a_request_that_came_in_parts_while_held_is_whole() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let mut client = dial(zero.port).await;
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    zero.world.operator.hears_held("a", 1).await;
    client.write_all(b"Host: a\r\n").await.unwrap();
    let (address, _asked) = target(OK).await;
    zero.set(&[address]);
    zero.world.operator.hears_held("a", 0).await;
    assert_eq!(ask(&mut client, "\r\n").await.1, "ok");
}

#[tokio::test]
async fn a_silent_client_may_speak_http_when_it_likes() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let mut client = dial(zero.port).await;
    zero.world.operator.hears_held("a", 1).await;
    let (address, mut asked) = target(OK).await;
    zero.set(&[address]);
    zero.world.operator.hears_held("a", 0).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
    assert!(field(&asked.recv().await.unwrap(), "x-forwarded-for").is_some(), "taken for HTTP");
}

#[tokio::test]
async fn a_kept_connection_is_handed_over_with_its_next_response() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, _asked) = target(OK).await;
    zero.set(&[address]);
    let mut client = dial(zero.port).await;
    assert_eq!(field(&ask(&mut client, GET).await.0, "connection"), None);
    zero.serve(&[address]).await;
    let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(field(&ask(&mut client, post).await.0, "connection"), Some("close"));
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0, "closed in good order");
}

#[tokio::test]
async fn an_idle_connection_is_closed_once_its_port_is_intercepted_no_more() {
    for renumbered in [false, true] {
        let zero = Zero::new(HoldPolicy::default()).await;
        let (address, _asked) = target(OK).await;
        zero.set(&[address]);
        let mut client = dial(zero.port).await;
        assert_eq!(ask(&mut client, GET).await.1, "ok");
        if renumbered {
            zero.world.operator.set(&state("a", 2, free_port(), &[address]));
        } else {
            zero.world.operator.send(&OperatorMessage::Remove { uid: "a".into() });
        }
        assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0, "renumbered: {renumbered}");
    }
}

#[tokio::test]
async fn a_held_request_whose_service_is_removed_is_the_last_of_its_connection() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, _asked) = target(OK).await;
    zero.set(&[address]);
    let mut client = dial(zero.port).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
    zero.set(&[]);
    // The view is in force once a new connection is held.
    let _silent = dial(zero.port).await;
    zero.world.operator.hears_held("a", 1).await;
    client.write_all(GET.as_bytes()).await.unwrap();
    zero.world.operator.hears_held("a", 2).await;
    zero.world.operator.send(&OperatorMessage::Remove { uid: "a".into() });
    let (head, _) = response(&mut client).await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    assert_eq!(field(&head, "connection"), Some("close"));
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
}

#[tokio::test]
async fn nothing_that_was_pipelined_is_lost_by_the_hand_over() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, mut asked) = target(OK).await;
    zero.serve(&[address]).await;
    let mut client = dial(zero.port).await;
    client.write_all(GET.repeat(3).as_bytes()).await.unwrap();
    for _ in 0..3 {
        let (head, body) = response(&mut client).await;
        assert_eq!((field(&head, "connection"), body.as_str()), (None, "ok"));
    }
    assert_eq!(field(&ask(&mut client, GET).await.0, "connection"), Some("close"));
    for _ in 0..4 {
        asked.recv().await.unwrap();
    }
    assert!(asked.try_recv().is_err());
}

#[tokio::test]
async fn refusals_are_told_in_http() {
    let hold = HoldPolicy { timeout: Duration::from_millis(300), max_connections: 1, ..HoldPolicy::default() };
    let zero = Zero::new(hold).await;
    let mut first = dial(zero.port).await;
    first.write_all(GET.as_bytes()).await.unwrap();
    zero.world.operator.hears_held("a", 1).await;
    let (head, body) = ask(&mut dial(zero.port).await, GET).await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    assert!(field(&head, "retry-after").is_some() && body.contains("shop/a"), "{head}{body}");
    let (head, _) = response(&mut first).await;
    assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
    assert_eq!(soon(first.read(&mut [0])).await.unwrap(), 0);
    zero.world.metric_is("elasti_resolver_closed_connections_total", "limit", 1.0).await;
    zero.world.metric_is("elasti_resolver_closed_connections_total", "timeout", 1.0).await;
}

#[tokio::test]
async fn a_held_request_of_a_kept_connection_gets_its_504_and_may_be_followed() {
    let hold = HoldPolicy { timeout: Duration::from_millis(300), ..HoldPolicy::default() };
    let zero = Zero::new(hold).await;
    let (address, _asked) = target(OK).await;
    zero.set(&[address]);
    let mut client = dial(zero.port).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
    zero.set(&[]);
    let silent = dial(zero.port).await;
    zero.world.operator.hears_held("a", 1).await;
    assert!(ask(&mut client, GET).await.0.starts_with("HTTP/1.1 504 "));
    zero.set(&[address]);
    drop(silent);
    zero.world.metric_is("elasti_resolver_held_connections", "service=\"a\"", 0.0).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
}

#[tokio::test]
async fn a_request_is_never_sent_twice_and_its_break_is_the_clients_too() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let times = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&times);
    let breaking = backend(move |mut stream| {
        let times = Arc::clone(&counted);
        async move {
            head(&mut stream).await.unwrap();
            times.fetch_add(1, Ordering::Relaxed);
        }
    })
    .await;
    zero.set(&[breaking]);
    let mut client = dial(zero.port).await;
    client.write_all(GET.as_bytes()).await.unwrap();
    is_reset(&mut client).await;
    assert_eq!(times.load(Ordering::Relaxed), 1);
}

/// Keeps out B9: an answer that breaks off looks complete.
#[tokio::test]
async fn half_an_answer_ends_with_a_reset() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let breaking = backend(|mut stream| async move {
        head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
    })
    .await;
    zero.set(&[breaking]);
    let mut client = dial(zero.port).await;
    client.write_all(GET.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let end = soon(client.read_to_end(&mut answer)).await;
    assert_eq!(end.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_target_that_closes_between_requests_loses_none() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let closing = backend(|mut stream| async move {
        head(&mut stream).await.unwrap();
        stream.write_all(OK).await.unwrap();
    })
    .await;
    zero.set(&[closing]);
    let mut client = dial(zero.port).await;
    for _ in 0..5 {
        assert_eq!(ask(&mut client, GET).await.1, "ok");
        // The target's close has arrived when its connection is gone from the count.
        zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 0.0).await;
    }
}

/// Keeps out B17: WebSocket 502, streams buffered, calls in both directions deadlock, 301 for `//`.
#[tokio::test]
async fn an_upgrade_becomes_a_tunnel() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let upgrading = backend(|mut stream| async move {
        let head = head(&mut stream).await.unwrap();
        assert_eq!(field(&head, "upgrade"), Some("websocket"));
        assert_eq!(field(&head, "sec-websocket-key"), Some("x3JJHMbDL1EzLkh9GBhXDw=="));
        let answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        drop(tokio::io::copy(&mut from, &mut to).await);
    })
    .await;
    let mut client = dial(zero.port).await;
    let request = "GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    zero.world.operator.hears_held("a", 1).await;
    zero.set(&[upgrading]);
    let answer = soon(head(&mut client)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert_eq!((field(&answer, "upgrade"), field(&answer, "connection")), (Some("websocket"), Some("upgrade")));
    let mut greeting = [0; 5];
    soon(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"hello");
    crate::backend::ping(&mut client, b"a frame").await;
    zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 1.0).await;
    client.shutdown().await.unwrap();
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
    zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn a_tunnel_that_the_target_has_half_closed_still_carries_what_the_client_says() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (heard, mut words) = mpsc::unbounded_channel();
    let listening = backend(move |mut stream| {
        let heard = heard.clone();
        async move {
            head(&mut stream).await.unwrap();
            stream.write_all(UPGRADED).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            heard.send(text).unwrap();
        }
    })
    .await;
    zero.set(&[listening]);
    let mut client = dial(zero.port).await;
    client.write_all(UPGRADE.as_bytes()).await.unwrap();
    assert!(soon(head(&mut client)).await.unwrap().starts_with("HTTP/1.1 101 "));
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
    client.write_all(b"last words").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(soon(words.recv()).await.unwrap(), "last words");
    zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn bodies_and_trailers_stream_both_ways() {
    let zero = Zero::new(HoldPolicy::default()).await;
    // Echoes each chunk as it comes: nothing may wait for the whole.
    let echo = backend(|mut stream| async move {
        let head = head(&mut stream).await.unwrap();
        assert_eq!((field(&head, "te"), field(&head, "trailer")), (Some("trailers"), Some("x-sum")));
        let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        drop(tokio::io::copy(&mut from, &mut to).await);
    })
    .await;
    zero.set(&[echo]);
    let mut client = dial(zero.port).await;
    let request = "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    assert!(soon(head(&mut client)).await.unwrap().contains("trailer: x-sum"));
    for chunk in ["5\r\nfirst\r\n", "6\r\nsecond\r\n", "0\r\nx-sum: 7\r\n\r\n"] {
        client.write_all(chunk.as_bytes()).await.unwrap();
        let mut back = vec![0; chunk.len()];
        soon(client.read_exact(&mut back)).await.unwrap();
        assert_eq!(String::from_utf8(back).unwrap(), chunk);
    }
}

#[tokio::test]
async fn a_large_body_passes_whole() {
    const SIZE: usize = 8 << 20;
    let zero = Zero::new(HoldPolicy::default()).await;
    let storing = backend(|mut stream| async move {
        head(&mut stream).await.unwrap();
        let mut body = vec![0; SIZE];
        stream.read_exact(&mut body).await.unwrap();
        stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
        stream.write_all(&body).await.unwrap();
    })
    .await;
    zero.set(&[storing]);
    let client = dial(zero.port).await;
    let sent: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at * at % 251).unwrap()).collect();
    let (mut from, mut to) = client.into_split();
    let upload = sent.clone();
    let uploading = tokio::spawn(async move {
        to.write_all(format!("PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
        to.write_all(&upload).await.unwrap();
        to
    });
    let mut answer = vec![0; format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n").len() + SIZE];
    soon(from.read_exact(&mut answer)).await.unwrap();
    assert!(answer.ends_with(&sent));
    uploading.await.unwrap();
}

#[tokio::test]
async fn a_client_that_asks_once_gets_the_whole_answer_and_is_not_waited_for() {
    const SIZE: usize = 4 << 20;
    let zero = Zero::new(HoldPolicy::default()).await;
    let generous = backend(|mut stream| async move {
        while head(&mut stream).await.is_some() {
            stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n").as_bytes()).await.unwrap();
            stream.write_all(&vec![b'x'; SIZE]).await.unwrap();
        }
    })
    .await;
    zero.set(&[generous]);
    for request in ["GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "GET / HTTP/1.0\r\nhost: a\r\n\r\n"] {
        let mut client = dial(zero.port).await;
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        soon(client.read_to_end(&mut answer)).await.unwrap();
        assert!(answer.ends_with(&vec![b'x'; SIZE]), "{} bytes", answer.len());
        // Against its word: nobody is there any more.
        client.write_all(b"x").await.unwrap();
        soon(client.ready(Interest::ERROR)).await.unwrap();
    }
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let reading = backend(|mut stream| async move {
        let head = head(&mut stream).await.unwrap();
        assert_eq!(field(&head, "expect"), Some("100-continue"));
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        stream.write_all(OK).await.unwrap();
    })
    .await;
    zero.set(&[reading]);
    let mut client = dial(zero.port).await;
    let request = "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(soon(head(&mut client)).await.unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(ask(&mut client, "body").await.1, "ok");
}

#[tokio::test]
async fn no_target_sees_a_request_that_a_client_smuggled() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, mut asked) = target(OK).await;
    zero.set(&[address]);
    let smuggled = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    for framing in [
        "content-length: 4\r\ncontent-length: 0",
        "content-length: 4, 0",
        "content-length: +0",
        "content-length: 0x0",
        "transfer-encoding: xchunked",
        "transfer-encoding: chunked, identity",
        "transfer-encoding : chunked",
        "x: y\rcontent-length: 0",
    ] {
        let mut client = dial(zero.port).await;
        let attempt = format!("POST /{} HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n{smuggled}", framing.len());
        client.write_all(attempt.as_bytes()).await.unwrap();
        let answer = soon(head(&mut client)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{framing}: {answer}");
        assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0, "{framing}");
    }
    zero.world.metric_is("elasti_resolver_closed_connections_total", "reason=\"malformed\"", 8.0).await;
    // Two lengths that are allowed together (RFC 9112, section 6.3): the chunks count, and the target is told so alone.
    let mut client = dial(zero.port).await;
    let both = "POST /both HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n";
    client.write_all(both.as_bytes()).await.unwrap();
    let seen = soon(asked.recv()).await.unwrap();
    assert!(seen.starts_with("POST /both"), "an attempt before it was forwarded: {seen}");
    assert_eq!((field(&seen, "content-length"), field(&seen, "transfer-encoding")), (None, Some("chunked")));
}

#[tokio::test]
async fn tls_is_bytes_to_us_whatever_the_port_is_called() {
    let port = free_port();
    let mut intercepted = state("a", 1, port, &[crate::backend::echo().await]);
    intercepted.ports[0].protocol = elasti_api::message::Protocol::Http;
    let world = World::new(vec![intercepted]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    crate::backend::ping(&mut client, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await;
}

#[tokio::test]
async fn a_resolver_that_leaves_hands_its_clients_over() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, _asked) = target(OK).await;
    zero.set(&[address]);
    let mut client = dial(zero.port).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
    zero.world.shutdown.cancel();
    zero.world
        .operator
        .hears("that the resolver leaves", |all| {
            all.iter().any(|message| matches!(message, elasti_api::message::ResolverMessage::Leaving))
        })
        .await;
    assert_eq!(field(&ask(&mut client, GET).await.0, "connection"), Some("close"));
}

#[tokio::test]
async fn a_target_that_should_have_been_encoded_is_passed_on_as_it_is() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (asked, mut questions) = mpsc::unbounded_channel();
    // Reads bytes: they are not UTF-8.
    let raw = backend(move |mut stream| {
        let asked = asked.clone();
        async move {
            let mut seen = Vec::new();
            while stream.read_buf(&mut seen).await.unwrap_or(0) > 0 {
                if seen.ends_with(b"\r\n\r\n") {
                    asked.send(std::mem::take(&mut seen)).unwrap();
                    stream.write_all(OK).await.unwrap();
                }
            }
        }
    })
    .await;
    zero.set(&[raw]);
    let mut client = dial(zero.port).await;
    assert_eq!(ask(&mut client, GET).await.1, "ok");
    assert!(soon(questions.recv()).await.unwrap().starts_with(b"GET / HTTP/1.1\r\n"));
    let odd: &[u8] = b"GET /<caf\xe9>?a=\"b\"#c HTTP/1.1\r\nhost: a\r\n\r\n";
    for mut client in [client, dial(zero.port).await] {
        for _ in 0..2 {
            client.write_all(odd).await.unwrap();
            assert_eq!(response(&mut client).await.1, "ok");
            assert_eq!(soon(questions.recv()).await.unwrap(), odd);
        }
    }
}

/// As servers do that refuse a large request before they have read it.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_before_the_request_is_whole_reaches_the_client() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let refusing = backend(|mut stream| async move {
        head(&mut stream).await.unwrap();
        let answer = "HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\n413";
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    zero.set(&[refusing]);
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let mut client = dial(zero.port).await;
        clients.spawn(async move {
            client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000\r\n\r\n").await.unwrap();
            let (mut answer, mut upload) = client.into_split();
            let uploading = tokio::spawn(async move { while upload.write_all(&[7; 4096]).await.is_ok() {} });
            let mut text = Vec::new();
            drop(soon(answer.read_to_end(&mut text)).await);
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(text.starts_with("HTTP/1.1 413 "), "{text:?}");
            soon(uploading).await.unwrap();
        });
    }
    clients.join_all().await;
}

/// A target that never answers; it says when it has been asked, and when the connection has ended.
async fn pondering() -> (SocketAddr, mpsc::UnboundedReceiver<&'static str>) {
    let (tell, told) = mpsc::unbounded_channel();
    let address = backend(move |mut stream| {
        let tell = tell.clone();
        async move {
            head(&mut stream).await.unwrap();
            tell.send("asked").unwrap();
            while stream.read(&mut [0; 64]).await.is_ok_and(|count| count > 0) {}
            tell.send("ended").unwrap();
        }
    })
    .await;
    (address, told)
}

#[tokio::test]
async fn a_request_is_traffic_from_when_it_is_forwarded_until_its_client_has_left() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, mut told) = pondering().await;
    zero.set(&[address]);
    let mut client = dial(zero.port).await;
    client.write_all(b"PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nslowly").await.unwrap();
    assert_eq!(soon(told.recv()).await, Some("asked"));
    zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 1.0).await;
    drop(client);
    assert_eq!(soon(told.recv()).await, Some("ended"));
    zero.world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn a_client_that_closes_its_sending_side_before_the_answer_has_left() {
    let zero = Zero::new(HoldPolicy::default()).await;
    let (address, mut told) = pondering().await;
    zero.set(&[address]);
    let mut client = dial(zero.port).await;
    client.write_all(GET.as_bytes()).await.unwrap();
    assert_eq!(soon(told.recv()).await, Some("asked"));
    client.shutdown().await.unwrap();
    assert_eq!(soon(told.recv()).await, Some("ended"));
    is_reset(&mut client).await;
}
