//! The wiring: from a configuration to a running operator, for the program and for tests alike.
//!
//! Order at the start: ports are bound; watches, Lease and certificate begin; once every cache has its first list,
//! ElastiServices are looked at and streams begin. Order at the end: nothing new is begun, what is in progress ends, the
//! Lease is given back, then the servers end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use elasti_runtime::admin::{Readiness, Routes};
use elasti_runtime::http::Server;
use elasti_runtime::shutdown;
use elasti_runtime::telemetry::Levels;
use prometheus::Registry;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::caches::Caches;
use crate::caches::watch::Watches;
use crate::certificates::{self, Keeper};
use crate::clients::Clients;
use crate::config::Config;
use crate::controller::{Controller, Parts};
use crate::elastiserver::auth::{ApiServer, Authenticator};
use crate::elastiserver::notify::Notify;
use crate::elastiserver::stream::{StreamServer, Streams};
use crate::idleness::{Defaults, Triggers};
use crate::leader::Election;
use crate::metrics::Metrics;
use crate::plan::Settings;
use crate::publication::Publication;
use crate::resolvers::pace::Pace;
use crate::resolvers::{Change, Resolvers};
use crate::scope::Scope;
use crate::work::Work;

mod start;

/// What must be done before the operator is ready.
const CACHES: &str = "caches";
const CERTIFICATE: &str = "certificate of the resolver stream";

/// Rounds in progress at the end get as long as one request may take, and a little.
const WORK_TIMEOUT: Duration = Duration::from_secs(6);

/// Then the Lease is given back and the servers end: one request, and what is in flight.
const END_TIMEOUT: Duration = Duration::from_secs(6);

/// An operator that is wired up and not running yet.
pub struct Bound {
    /// Where notifications and metrics are.
    pub notify: SocketAddr,
    /// Where probes are.
    pub health: SocketAddr,
    /// Where resolvers connect.
    pub stream: SocketAddr,
    servers: Servers,
    clients: Clients,
    scope: Scope,
    controller: Arc<Controller>,
    caches: Arc<Caches>,
    resolvers: Resolvers,
    publication: Arc<Publication>,
    election: Election,
    keeper: Keeper,
    readiness: Readiness,
    metrics: Metrics,
    work: TaskTracker,
}

struct Servers {
    notify: Server,
    notifications: Notify,
    health: Server,
    routes: Routes,
    stream: StreamServer,
    streams: Streams,
}

/// Wires an operator up. Fails when a port is taken.
pub async fn build(config: Config, clients: Clients, levels: Levels) -> anyhow::Result<Bound> {
    let client = clients.requests.clone();
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    let readiness = Readiness::default();
    readiness.block(CACHES);
    readiness.block(CERTIFICATE);
    let (caches, resolvers, work) = (Arc::<Caches>::default(), Resolvers::new(), TaskTracker::new());
    let publication = Arc::new(Publication::new(config.pod_name.clone()));
    let election = Election::new(client.clone(), &config.namespace, &config.lease_name, &config.pod_name);
    let names = certificates::names(&config.stream_service_name, &config.namespace, &config.cluster_domain);
    let keeper = Keeper::new(client.clone(), &config.namespace, names);
    let scope = Scope::new(config.watch_namespaces);
    let controller = Controller::new(Parts {
        replica: config.pod_name,
        clients: clients.clone(),
        scope: scope.clone(),
        caches: caches.clone(),
        resolvers: resolvers.clone(),
        publication: publication.clone(),
        leadership: election.state(),
        triggers: Triggers::new(
            Defaults {
                server_address: config.prometheus_server_address,
                authorization: Some(config.prometheus_authorization.0).filter(|header| !header.is_empty()),
            },
            client.clone(),
        ),
        settings: Settings {
            kube_proxy_sync: config.kube_proxy_sync,
            polling_interval: config.polling_interval,
            max_slice_endpoints: config.max_slice_endpoints,
            hold: config.hold,
        },
        metrics: Arc::new(metrics.clone()),
        tasks: work.clone(),
    });

    let reviewer = Arc::new(ApiServer::new(client.clone()));
    let authenticator = Authenticator::new(reviewer, &config.allowed_service_accounts, metrics.clone());
    let routes = Routes::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"), registry, readiness.clone(), levels)?;
    let notify_authenticator = (!config.notify_without_token).then(|| authenticator.clone());
    let servers = Servers {
        notify: Server::bind_any(config.port).await.context("notify server")?,
        notifications: Notify::new(Arc::new(controller.clone()), notify_authenticator, routes.clone(), metrics.clone()),
        health: Server::bind_any(config.health_port).await.context("health server")?,
        routes,
        stream: StreamServer::bind(config.stream_port, Arc::new(keeper.certificate())).await?,
        streams: Streams {
            authenticator,
            resolvers: resolvers.clone(),
            publication: publication.clone(),
            metrics: metrics.clone(),
            tasks: TaskTracker::new(),
            shutdown: CancellationToken::new(),
        },
    };
    Ok(Bound {
        notify: servers.notify.address(),
        health: servers.health.address(),
        stream: servers.stream.address(),
        servers,
        clients,
        scope,
        controller,
        caches,
        resolvers,
        publication,
        election,
        keeper,
        readiness,
        metrics,
        work,
    })
}

impl Bound {
    /// Runs until `shutdown`, and then as long as it takes to end in order: some seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let (lease_end, server_end, lease, servers) =
            (CancellationToken::new(), self.servers.streams.shutdown.clone(), TaskTracker::new(), TaskTracker::new());
        let leadership = self.election.state();
        let ready = self.keeper.ready();
        lease.spawn(self.election.run(lease_end.clone()));
        servers.spawn(self.keeper.run(leadership.clone(), server_end.clone()));
        let stream_tasks = self.servers.streams.tasks.clone();
        self.servers.spawn(&servers, &server_end);

        self.controller.attach(Work::new(self.controller.clone(), self.work.clone(), shutdown.clone()));
        let watches =
            Watches::new(self.clients.watches.clone(), self.scope, self.caches.clone(), self.controller.clone());
        let background = async {
            tokio::join!(
                start::watch(watches, self.clients.requests, &self.caches, || {
                    self.controller.start();
                    self.readiness.done(CACHES);
                }),
                start::certificate(ready, || self.readiness.done(CERTIFICATE)),
                follow_leadership(leadership, &self.publication, &self.metrics, &self.controller),
                follow_resolvers(&self.resolvers, &self.controller),
            )
        };
        shutdown.run_until_cancelled(Box::pin(background)).await;

        self.readiness.block("nothing: the operator is shutting down");
        let left = shutdown::drain(&self.work, WORK_TIMEOUT).await;
        if left > 0 {
            tracing::warn!(left, "rounds are still in progress");
        }
        lease_end.cancel();
        shutdown::drain(&lease, END_TIMEOUT).await;
        server_end.cancel();
        shutdown::drain(&servers, END_TIMEOUT).await;
        shutdown::drain(&stream_tasks, END_TIMEOUT).await;
    }
}

impl Servers {
    fn spawn(self, tasks: &TaskTracker, end: &CancellationToken) {
        let (notifications, routes) = (self.notifications, self.routes);
        let notified = move |request| {
            let notifications = notifications.clone();
            async move { notifications.answer(request).await }
        };
        tasks.spawn(self.notify.serve(notified, end.clone()));
        tasks.spawn(self.health.serve(move |request| std::future::ready(routes.answer(&request)), end.clone()));
        tasks.spawn(self.stream.serve(self.streams));
    }
}

/// Tells resolvers and metrics who leads, and has everything looked at when that changes.
async fn follow_leadership(
    mut leadership: tokio::sync::watch::Receiver<crate::leader::LeaderState>,
    publication: &Publication,
    metrics: &Metrics,
    controller: &Controller,
) {
    let mut told = None;
    loop {
        let state = *leadership.borrow_and_update();
        // Renewals are no news.
        let news = (state.leader, state.epoch, state.holder_silent);
        if told.replace(news) != Some(news) {
            publication.set_leader(state.leader, state.epoch);
            metrics.lead(state.leader);
            controller.look_at_all();
        }
        if leadership.changed().await.is_err() {
            return;
        }
    }
}

/// Has looked at what resolvers speak of.
async fn follow_resolvers(resolvers: &Resolvers, controller: &Controller) {
    let mut changes = resolvers.changes();
    let mut pace = Pace::default();
    loop {
        let due = pace.due();
        let change = match due {
            // Not left to the timeout, which others' changes would keep putting off.
            Some(due) if due <= Instant::now() => None,
            Some(due) => timeout_at(due.into(), changes.next()).await.ok(),
            None => Some(changes.next().await),
        };
        let Some(change) = change else {
            let looked_at = controller.look_at_all();
            pace.looked(looked_at, resolvers.len(), Instant::now());
            continue;
        };
        match change {
            Change::Members => pace.gone(Instant::now()),
            Change::Many => pace.wanted(Instant::now()),
            Change::Service(uid) => controller.look_at_all_woken_with(&uid),
        }
    }
}

#[cfg(test)]
mod tests;
