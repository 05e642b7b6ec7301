//! Operators and resolvers, each with a runtime of its own: dropping one ends it as a crash does.

use std::ffi::OsString;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use elasti_api::names;
use elasti_operator::clients::Clients;
use elasti_operator::{app, config};
use elasti_resolver::capacity::{Capacity, Limits};
use elasti_resolver::connection::Context;
use elasti_resolver::forward::Dialer;
use elasti_resolver::interception::Interception;
use elasti_resolver::listeners::Listeners;
use elasti_resolver::metrics::Metrics;
use elasti_resolver::readiness::Asker;
use elasti_resolver::report::Board;
use elasti_resolver::stream::connection::{Connector, Identity};
use elasti_resolver::supervisor::{Heard, Parts, Supervisor};
use elasti_runtime::telemetry::{Format, Levels, init};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{FaultyWay, until};

struct Process(Option<Runtime>);

impl Process {
    fn new() -> Self {
        Self(Some(Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()))
    }

    /// What it makes belongs to this process.
    fn within<T>(&self, make: impl FnOnce() -> T) -> T {
        let _entered = self.0.as_ref().unwrap().enter();
        make()
    }

    fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> tokio::task::JoinHandle<T> {
        self.0.as_ref().unwrap().spawn(work)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Logs of the programs under test: none unless `ELASTI_LOG_LEVEL` asks for them.
fn levels() -> Levels {
    static LEVELS: OnceLock<Levels> = OnceLock::new();
    let level = || std::env::var("ELASTI_LOG_LEVEL").unwrap_or_else(|_| "off".to_owned());
    LEVELS.get_or_init(|| init(Format::Text, &level().parse().unwrap()).unwrap()).clone()
}

/// An operator, with the permissions of its ServiceAccount and no more.
pub struct Operator {
    /// Name of its pod.
    pub pod: String,
    notify: u16,
    stream: u16,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<()>,
    _process: Process,
}

impl Operator {
    pub(super) async fn start(pod: &str, flags: &[&str], token: String, way: Option<&FaultyWay>) -> Self {
        let pod_flag = format!("--pod-name={pod}");
        let usual = ["operator", &pod_flag, "--operator-port=0", "--health-port=0", "--stream-port=0"];
        let quick = ["--polling-interval=100ms", "--kube-proxy-sync=10ms"];
        let flags = usual.iter().chain(&quick).chain(flags).map(OsString::from);
        let config = config::Config::new(&elasti_runtime::config::parse(flags).unwrap()).unwrap();
        let (process, shutdown) = (Process::new(), CancellationToken::new());
        let way = way.map(|way| way.address);
        let bound = process.spawn(async move {
            let mut access = kube::Config::infer().await.unwrap();
            access.auth_info = serde_json::from_value(json!({"token": token})).unwrap();
            if let Some(way) = way {
                access.cluster_url = format!("http://{way}").parse().unwrap();
            }
            app::build(config, Clients::new(access).unwrap(), levels()).await.unwrap()
        });
        let bound = bound.await.unwrap();
        let (notify, health, stream) = (bound.notify.port(), bound.health.port(), bound.stream.port());
        let running = process.spawn(bound.run(shutdown.clone()));
        let operator = Self { pod: pod.to_owned(), notify, stream, shutdown, running, _process: process };
        until("the operator is ready", async || {
            (exchange(health, "GET /readyz", &[], b"").await.0 == 200).then_some(())
        })
        .await;
        operator
    }

    /// Whether it says that it holds the Lease.
    pub async fn leads(&self) -> bool {
        let (_, metrics) = self.send("GET /metrics", &[], b"").await;
        metrics.lines().any(|line| line == "elasti_operator_leader 1")
    }

    /// Sends a request to the plain HTTP port; `request` is method and path. Returns status and body.
    pub async fn send(&self, request: &str, headers: &[&str], body: &[u8]) -> (u16, String) {
        exchange(self.notify, request, headers, body).await
    }

    /// Notifies it of a connection that waits for a Service.
    pub async fn notify(&self, token: &str, namespace: &str, service: &str) -> (u16, String) {
        let authorization = format!("authorization: Bearer {token}");
        let body = json!({"count": 1, "svc": service, "namespace": namespace}).to_string();
        self.send(&format!("POST {}", names::NOTIFY_PATH), &[&authorization], body.as_bytes()).await
    }

    /// Ends it in order, as a rollout does.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap();
    }
}

async fn exchange(port: u16, request: &str, headers: &[&str], body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let length = format!("content-length: {}", body.len());
    let lines = [format!("{request} HTTP/1.1"), "host: operator".to_owned(), "connection: close".to_owned(), length];
    let head: Vec<String> = lines.into_iter().chain(headers.iter().map(|header| (*header).to_owned())).collect();
    // A server that has seen enough answers before it has read everything.
    let _sent = stream.write_all(&[(head.join("\r\n") + "\r\n\r\n").as_bytes(), body].concat()).await;
    let mut answer = Vec::new();
    let _ended = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

/// A resolver without eBPF. It is the real one but for the look-up of the operators' name, which needs a cluster's DNS.
pub struct Resolver {
    /// Name of its node.
    pub node: String,
    /// The address of its pod: the host's, since there is no pod.
    pub address: IpAddr,
    _files: TempDir,
    _process: Process,
}

impl Resolver {
    pub(super) async fn start(pod: &str, ca: &str, token: &str, operators: &[&Operator]) -> Self {
        let (process, files, address) = (Process::new(), tempfile::tempdir().unwrap(), host_address().await);
        let (ca_file, token_file) = (files.path().join("ca.crt"), files.path().join("token"));
        std::fs::write(&ca_file, ca).unwrap();
        std::fs::write(&token_file, token).unwrap();
        let node = format!("node-of-{pod}");
        let (metrics, board) = (Metrics::new(&prometheus::Registry::new()).unwrap(), Board::default());
        let (heard, dialer) = (Heard::default(), Dialer::default());
        let context = Context::new(dialer);
        let capacity = Capacity::new(Limits { descriptors: u64::MAX, memory: None, conntrack: None }, metrics.clone());
        let listeners = process.within(|| Listeners::new(Arc::new(context.clone()), capacity)).unwrap();
        let supervisor = Supervisor::new(Parts {
            pod: vec![address],
            patience: elasti_resolver::fallback::Patience::default(),
            interception: Interception::new(None, metrics.clone()),
            track: Err("there is no eBPF here".to_owned()),
            node: "node".to_owned(),
            context,
            // Pods at this level have no container to ask.
            asker: Asker::new(dialer, std::time::Duration::ZERO, metrics.clone()),
            listeners,
            board: board.clone(),
            heard: heard.clone(),
            readiness: elasti_runtime::admin::Readiness::default(),
            metrics: metrics.clone(),
        });
        let identity = Identity {
            host: format!("{}.{}.svc", names::OPERATOR_STREAM_SERVICE, names::NAMESPACE),
            port: names::OPERATOR_STREAM_PORT,
            ca: ca_file,
            token: token_file,
            pod: pod.to_owned(),
            node: node.clone(),
            addresses: vec![address],
            redirect_disabled: Some("there is no node".to_owned()),
        };
        let (sender, said) = mpsc::channel(16);
        let connector = Connector::new(identity, dialer, board, heard, metrics, sender);
        process.spawn(supervisor.run(said, CancellationToken::new()));
        for operator in operators {
            let (connector, stream) = (connector.clone(), SocketAddr::from((Ipv4Addr::LOCALHOST, operator.stream)));
            process.spawn(async move {
                loop {
                    connector.connect(stream).await;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
        }
        Self { node, address, _files: files, _process: process }
    }

    /// Connects as a client whom the slice has led here.
    pub async fn dial(&self, interception_port: u16) -> TcpStream {
        TcpStream::connect((self.address, interception_port)).await.unwrap()
    }
}

/// An address of this host that an EndpointSlice may hold, which a loopback one is not: the API server's.
pub async fn host_address() -> IpAddr {
    let access = kube::Config::infer().await.unwrap();
    access.cluster_url.host().unwrap().parse().unwrap()
}
