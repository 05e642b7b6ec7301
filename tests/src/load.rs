//! Clients of the whole-cluster tests of faults: many connections at once, each with its fate.
//!
//! A request is one connection: what it was answered, or what went wrong, and when it began.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{HTTP, PATIENCE, Sandbox, Target, from_host, kubectl, metric, until};

/// How many connections are held, and how many are in flight, while a fault happens.
pub const CONNECTIONS: usize = 50;

/// What one request came to.
#[derive(Debug)]
pub struct Fate {
    /// When its connection was asked for.
    pub begun: Instant,
    /// The answer up to the end of the connection, or what went wrong.
    pub answer: Result<String, String>,
}

/// Requests on their way.
#[derive(Debug, Default)]
pub struct Requests(Vec<JoinHandle<Fate>>);

impl Requests {
    /// Begins as many requests at once.
    pub fn begin(count: usize, address: SocketAddr, request: &'static [u8]) -> Self {
        Self((0..count).map(|_| spawn(address, request)).collect())
    }

    /// Waits for all of them.
    pub fn fates(self) -> Vec<Fate> {
        self.0.into_iter().map(|request| request.join().expect("a client does not panic")).collect()
    }

    /// Waits for all of them, whose answers must contain `expected`.
    pub fn all_answered(self, what: &str, expected: &str) {
        let fates = self.fates();
        let failed: Vec<&Fate> = fates.iter().filter(|fate| !fate.is(expected)).collect();
        assert!(failed.is_empty(), "{what}: {} of {} failed, such as {:?}", failed.len(), fates.len(), failed[0]);
        eprintln!("{what}: {} answered", fates.len());
    }
}

impl Fate {
    /// Whether the answer contains this.
    pub fn is(&self, expected: &str) -> bool {
        self.answer.as_ref().is_ok_and(|answer| answer.contains(expected))
    }
}

fn spawn(address: SocketAddr, request: &'static [u8]) -> JoinHandle<Fate> {
    // Hundreds of them at once need no more.
    const STACK: usize = 128 << 10;
    let call = move || {
        let begun = Instant::now();
        Fate { begun, answer: call(address, request).map_err(|error| format!("{address}: {error}")) }
    };
    std::thread::Builder::new().stack_size(STACK).spawn(call).expect("a thread")
}

fn call(address: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, 2 * PATIENCE)?;
    stream.set_read_timeout(Some(4 * PATIENCE))?;
    stream.write_all(request)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// New requests at a steady rate, to each address in turn.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    pacing: JoinHandle<Requests>,
}

impl Load {
    /// Begins HTTP requests, so many a second.
    pub fn start(addresses: &[SocketAddr], a_second: u32) -> Self {
        let (stop, addresses) = (Arc::new(AtomicBool::new(false)), addresses.to_vec());
        let stopped = Arc::clone(&stop);
        let pacing = std::thread::spawn(move || {
            let (begun, mut requests) = (Instant::now(), Requests::default());
            for (number, address) in (0..).zip(addresses.iter().cycle()) {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                requests.0.push(spawn(*address, HTTP));
                let next = begun + Duration::from_secs(1) * number / a_second;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            requests
        });
        Self { stop, pacing }
    }

    /// Begins no more; those that have begun go on.
    pub fn stop(self) -> Requests {
        self.stop.store(true, Ordering::Relaxed);
        self.pacing.join().expect("the pace does not panic")
    }
}

/// [`CONNECTIONS`] that a resolver forwards to a target which does not answer before it is told to.
pub struct InFlight<'a> {
    sandbox: &'a Sandbox,
    target: Target,
    requests: Requests,
}

impl<'a> InFlight<'a> {
    /// Wakes a slow target by as many connections as there shall be.
    pub fn start(sandbox: &'a Sandbox) -> Self {
        Self::of(sandbox, Value::Null)
    }

    /// The same of a target whose ElastiService says this too.
    pub fn of(sandbox: &'a Sandbox, spec: Value) -> Self {
        let mut target = Target::greeter("slow");
        target.spec = spec;
        let script = "SYSTEM:read line; until [ -e /tmp/go ]; do sleep 1; done; echo answered";
        target.command = ["socat", "TCP6-LISTEN:2525,ipv6only=0,fork,reuseaddr", script].map(str::to_owned).to_vec();
        sandbox.target(&target);
        sandbox.sleep(&target);
        let requests = Requests::begin(CONNECTIONS, sandbox.cluster_address(&target, 2525), b"a question\n");
        sandbox.awake(&target);
        until("all are in flight", || (sandbox.forwarded() >= CONNECTIONS).then_some(()));
        Self { sandbox, target, requests }
    }

    /// The target.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The target answers now, and all must have been waiting for it.
    pub fn all_answered(self) {
        assert!(self.sandbox.forwarded() >= CONNECTIONS, "all are in flight still");
        self.answer().all_answered("in flight", "answered");
    }

    /// The target answers now whoever is left.
    pub fn answer(self) -> Requests {
        let pod = self.sandbox.pods(&self.target).remove(0);
        let name = pod["metadata"]["name"].as_str().expect("a name").to_owned();
        kubectl(&["-n", &self.sandbox.namespace, "exec", &name, "--", "touch", "/tmp/go"]);
        self.requests
    }
}

impl Sandbox {
    /// How many connections resolvers hold for the Services of this namespace; those that are about to end are not asked.
    pub fn held(&self) -> usize {
        self.count("elasti_resolver_held_connections")
    }

    /// How many connections resolvers forward.
    pub fn forwarded(&self) -> usize {
        self.count("elasti_resolver_forwarded_connections")
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a gauge of connections")]
    fn count(&self, gauge: &str) -> usize {
        metric(gauge, &format!("namespace=\"{}\"", self.namespace)) as usize
    }

    /// A target that is at zero and cannot start until [`Sandbox::mend`].
    pub fn broken(&self, target: &Target) {
        self.target(target);
        self.sleep(target);
        self.image(target, "nowhere/nothing:1");
    }

    /// Lets a broken target start.
    pub fn mend(&self, target: &Target) {
        self.image(target, crate::cluster::IMAGE);
    }

    fn image(&self, target: &Target, image: &str) {
        let container = format!("target={image}");
        kubectl(&["-n", &self.namespace, "set", "image", &format!("deployment/{}", target.name), &container]);
    }

    /// Calls a target directly, which must answer.
    pub fn answers(&self, target: &Target) {
        let answer = from_host(self.cluster_address(target, 80), HTTP, 4096);
        assert!(answer.contains("nginx on"), "{answer}");
    }
}
