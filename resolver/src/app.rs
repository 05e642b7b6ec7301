//! The wiring: from a configuration to a running resolver, for the program and for tests alike.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use elasti_runtime::admin::{Readiness, Routes};
use elasti_runtime::http::Server;
use elasti_runtime::shutdown;
use elasti_runtime::telemetry::Levels;
use hyper::body::Incoming;
use prometheus::Registry;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::capacity::{Capacity, Limits, Memory};
use crate::config::Config;
use crate::connection::Context;
use crate::forward::Dialer;
use crate::interception::{Interception, Redirect};
use crate::listeners::{self, Listeners};
use crate::metrics::Metrics;
use crate::proxy::Proxy;
use crate::readiness::Asker;
use crate::report::Board;
use crate::status;
use crate::stream;
use crate::stream::connection::{Connector, Identity};
use crate::supervisor::{Heard, Parts, SNAPSHOT, Said, Supervisor};
use crate::tracking::Track;

/// Messages of all streams on their way to the supervisor; when it falls behind, the streams wait.
const SAID_BUFFER: usize = 256;

/// How long connections are accepted after the resolver has left the slices, whether any come or not: kube-proxy
/// follows within a second or two, and not every kube-proxy is quick.
const LEAVE_GRACE: Duration = Duration::from_secs(5);

/// Resets of the last connections take microseconds.
const RESET_TIMEOUT: Duration = Duration::from_secs(1);

/// Where a container finds the files of its cgroup.
const CGROUP: &str = "/sys/fs/cgroup";

/// What redirects connections on the node.
pub enum Redirection {
    /// This does.
    On {
        /// Writes the map.
        redirect: Box<dyn Redirect>,
        /// Keeps the resolver's own sockets from being redirected.
        mark: fn(&TcpSocket) -> io::Result<()>,
        /// Follows connections to pods, or why nothing does.
        track: Result<Box<dyn Track>, String>,
    },
    /// Nothing does, and why.
    Off(String),
}

/// A resolver that is wired up and not running yet.
pub struct Bound {
    /// Where probes and metrics are.
    pub admin: SocketAddr,
    /// Where HTTP requests are taken that name a Service.
    pub proxied: SocketAddr,
    server: Server,
    routes: Routes,
    board: Board,
    proxy: Proxy,
    proxy_listener: TcpListener,
    readiness: Readiness,
    supervisor: Supervisor,
    said: mpsc::Receiver<Said>,
    connector: Connector,
    context: Context,
    capacity: Capacity,
    memory: Memory,
    drain_timeout: Duration,
}

/// Wires a resolver up. Fails when the admin port or the proxy port is taken.
pub async fn build(config: Config, redirection: Redirection, levels: Levels) -> anyhow::Result<Bound> {
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    metrics.on_node(&config.node);
    let readiness = Readiness::default();
    readiness.block(SNAPSHOT);
    let (board, heard) = (Board::default(), Heard::default());
    let shown = board.clone();
    let (redirect, mark, track, redirect_disabled) = match redirection {
        Redirection::On { redirect, mark, track } => (Some(redirect), Some(mark), track, None),
        Redirection::Off(reason) => (None, None, Err(reason.clone()), Some(reason)),
    };
    let dialer = Dialer { mark };
    let context = Context::new(dialer);
    let memory = Memory::of(Path::new(CGROUP));
    let limits = config.limits.unwrap_or_else(|| Limits::of_process(&memory));
    tracing::info!(?limits, "limits of connections");
    let capacity = Capacity::new(limits, metrics.clone());
    let shared = Arc::new(context.clone());
    let listeners =
        Listeners::new(Arc::clone(&shared), capacity.clone()).context("cannot listen for connections to Services")?;
    let supervisor = Supervisor::new(Parts {
        pod: config.pod_ips.clone(),
        patience: config.patience,
        interception: Interception::new(redirect, metrics.clone()),
        track,
        node: config.node.clone(),
        context: context.clone(),
        asker: Asker::new(dialer, config.probe_interval, metrics.clone()),
        listeners,
        board: board.clone(),
        heard: heard.clone(),
        readiness: readiness.clone(),
        metrics: metrics.clone(),
    });
    let identity = Identity {
        host: config.operator_host,
        port: config.operator_port,
        ca: config.ca_file,
        token: config.token_file,
        pod: config.pod,
        node: config.node,
        addresses: config.pod_ips,
        redirect_disabled,
    };
    let (sender, said) = mpsc::channel(SAID_BUFFER);
    let connector = Connector::new(identity, dialer, board, heard, metrics.clone(), sender);
    let proxy = Proxy {
        board: shown.clone(),
        context: shared,
        share: capacity.share(),
        header: config.header_for_host,
        domain: config.cluster_domain,
        metrics,
    };
    let proxy_listener = listeners::bind(config.proxy_port)
        .and_then(TcpListener::from_std)
        .with_context(|| format!("cannot listen on the proxy port {}", config.proxy_port))?;
    let server = Server::bind_any(config.resolver_port).await.context("admin server")?;
    let routes = Routes::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"), registry, readiness.clone(), levels)?;
    Ok(Bound {
        admin: server.address(),
        proxied: proxy_listener.local_addr()?,
        board: shown,
        proxy,
        proxy_listener,
        server,
        routes,
        readiness,
        supervisor,
        said,
        connector,
        context,
        capacity,
        memory,
        drain_timeout: config.drain_timeout,
    })
}

impl Bound {
    /// Runs until `shutdown`; then leaves the slices, goes on serving until connections have ended or the drain time
    /// has, and resets what is left.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { routes, context, drain_timeout, board, .. } = self;
        let Context { connections, leaving, ended, .. } = context;
        let tasks = TaskTracker::new();
        let answer = move |request: http::Request<Incoming>| {
            std::future::ready(status::answer(&board, &request).unwrap_or_else(|| routes.answer(&request)))
        };
        tasks.spawn(self.server.serve(answer, ended.clone()));
        tasks.spawn(self.proxy.run(self.proxy_listener));
        tasks.spawn(self.supervisor.run(self.said, shutdown.clone()));
        tasks.spawn(stream::run(self.connector, ended.clone()));
        let following = ended.clone();
        tasks.spawn(async move {
            following.run_until_cancelled(self.capacity.follow(self.memory)).await;
        });

        shutdown.cancelled().await;
        leaving.cancel();
        self.readiness.block("nothing: the resolver is shutting down");
        let drained = tokio::time::timeout(drain_timeout, async {
            tokio::time::sleep(LEAVE_GRACE).await;
            connections.close();
            connections.wait().await;
        });
        if drained.await.is_err() && !connections.is_empty() {
            tracing::warn!(connections = connections.len(), "resetting the connections that are left");
        }
        ended.cancel();
        shutdown::drain(&connections, RESET_TIMEOUT).await;
        shutdown::drain(&tasks, RESET_TIMEOUT).await;
    }
}
