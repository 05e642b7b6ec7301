//! HTTP on a real cluster: what a held client is told, and how it leaves the resolver once the target is warm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use elasti_tests::cluster::{HTTP, PATIENCE, Sandbox, Target, from_host, metric, until};
use elasti_tests::load::Requests;
use serde_json::json;

/// A kept connection, opened again whenever the server ends it.
struct Client {
    address: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
    closed: u32,
}

impl Client {
    fn new(address: SocketAddr) -> Self {
        Self { address, stream: None, closed: 0 }
    }

    /// Asks for `/` and returns the body.
    fn get(&mut self) -> String {
        let stream = self.stream.get_or_insert_with(|| {
            let stream = TcpStream::connect_timeout(&self.address, PATIENCE).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            BufReader::new(stream)
        });
        stream.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").unwrap();
        let (mut length, mut closes) = (0, false);
        let mut status = String::new();
        stream.read_line(&mut status).unwrap();
        assert!(status.starts_with("HTTP/1.1 200 "), "{status:?}");
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            closes |= line == "connection: close";
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        if closes {
            self.stream = None;
            self.closed += 1;
        }
        String::from_utf8(body).unwrap()
    }
}

/// Keeps out B2: 403 or 408 for seconds after the first response.
#[test]
fn a_busy_kept_connection_leaves_the_resolver_within_five_seconds_and_loses_nothing() {
    let (sandbox, target) = (Sandbox::new("handover"), Target::nginx("web"));
    sandbox.target(&target);
    sandbox.sleep(&target);
    let mut client = Client::new(sandbox.cluster_address(&target, 80));
    assert!(client.get().starts_with("nginx on web-"));
    let woken = Instant::now();
    while woken.elapsed() < Duration::from_secs(5) {
        assert!(client.get().starts_with("nginx on web-"));
    }
    assert!(client.closed > 0, "it was asked to connect anew");
    let labels = format!("namespace=\"{}\"", sandbox.namespace);
    let passed = || metric("elasti_resolver_forwarded_bytes_total", &labels);
    let before = passed();
    assert!(before > 0.0);
    for _ in 0..1000 {
        client.get();
    }
    assert!((passed() - before).abs() < f64::EPSILON, "bytes still pass a resolver");
}

/// A regression: all were let go at once, at the instant the target began to listen; nginx, with 768 connections for each
/// process, hung up on some.
#[test]
fn more_requests_than_the_target_takes_at_once_are_all_answered() {
    const BURST: usize = 2000;
    let (sandbox, target) = (Sandbox::new("burst"), Target::nginx("web"));
    sandbox.broken(&target);
    let requests = Requests::begin(BURST, sandbox.cluster_address(&target, 80), HTTP);
    until("all are held", || (sandbox.held() >= BURST).then_some(()));
    sandbox.mend(&target);
    requests.all_answered("held", "nginx on web-");
}

#[test]
fn held_clients_are_refused_in_http() {
    let (sandbox, mut target) = (Sandbox::new("refusals"), Target::nginx("web"));
    target.spec = json!({"hold": {"timeout": "5s", "maxConnections": 1}});
    // It never becomes ready.
    sandbox.target(&target);
    sandbox.sleep(&target);
    let broken =
        json!({"spec": {"template": {"spec": {"containers": [{"name": "target", "image": "absent.invalid/no:1"}]}}}});
    elasti_tests::cluster::kubectl(&[
        "-n",
        &sandbox.namespace,
        "patch",
        "deployment",
        &target.name,
        "-p",
        &broken.to_string(),
    ]);
    let address = sandbox.cluster_address(&target, 80);
    let first = std::thread::spawn(move || from_host(address, HTTP, 4096));
    let labels = format!("namespace=\"{}\"", sandbox.namespace);
    until("it is held", || (metric("elasti_resolver_held_connections", &labels) > 0.5).then_some(()));
    let refused = from_host(address, HTTP, 4096);
    assert!(
        refused.starts_with("HTTP/1.1 503 ") && refused.to_ascii_lowercase().contains("\r\nretry-after: "),
        "{refused}"
    );
    let late = first.join().unwrap();
    assert!(late.starts_with("HTTP/1.1 504 ") && late.contains(&sandbox.namespace), "{late}");
}
