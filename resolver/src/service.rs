//! What the connections of one ElastiService share: where to forward to, and the counts.
//!
//! The supervisor writes the [`View`]; connections read it and count themselves through guards, so that no way out of a
//! connection leaves a count wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::cidr::Cidr;
use elasti_api::message::HoldPolicy;
use elasti_api::probe::ProbeRules;
use elasti_api::readiness::StartingPod;
use tokio::sync::watch;

use crate::balance::Load;
use crate::breaker::Breaker;
use crate::hold::Closed;
use crate::metrics::{Metrics, ServiceMetrics};
use crate::ports::{PortView, Ports};
use crate::report::{News, Traffic};
use crate::sync::{AtomicU32, AtomicU64, Mutex, MutexGuard};
use crate::wake::{Episode, Timeline};

/// What connections need to know of their ElastiService.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// How connections are held.
    pub hold: HoldPolicy,
    /// The interception ports. One that is absent is no more.
    pub ports: Ports,
    /// Clients can reach the target directly: those that can be sent there shall be.
    pub direct: bool,
    /// Requests that are answered in place of the target; absent if there are none.
    pub probes: Option<Arc<ProbeRules>>,
    /// Pods that may be ready before the operators know it.
    pub starting: Arc<[Starting]>,
    /// How many resolvers ask these pods.
    pub asking: u32,
    /// Clients that are no traffic: they wake the target as all do, but keep none awake.
    pub ignored: Arc<[Cidr]>,
}

/// A pod that may be ready before the operators know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Starting {
    /// How it is asked.
    pub pod: Arc<StartingPod>,
    /// Where connections go once it is ready, by interception port.
    pub targets: BTreeMap<u16, Vec<SocketAddr>>,
}

impl View {
    /// Whether clients of `port` shall connect anew: they can reach the target directly, or the port is no more.
    pub fn shall_reconnect(&self, port: u16) -> bool {
        self.direct || !self.ports.contains(port)
    }

    /// Whether a connection to `port` has somewhere to go.
    pub fn reachable(&self, port: u16) -> bool {
        self.ports.get(port).is_some_and(|port| !port.targets.is_empty())
    }
}

/// What the supervisor has said, and what the pods have said since.
#[derive(Debug, Default)]
struct Said {
    view: View,
    /// UIDs of starting pods that are ready.
    ready: BTreeSet<String>,
}

impl Said {
    /// What is in force: starting pods that are ready stand in where the operators know of no ready one.
    fn view(&self) -> View {
        let mut view = self.view.clone();
        if self.ready.is_empty() {
            return view;
        }
        let stand_in = |(number, port): (u16, &PortView)| {
            let mut port = port.clone();
            if port.targets.is_empty() {
                let ready = self.view.starting.iter().filter(|starting| self.ready.contains(&starting.pod.uid));
                let targets = ready.filter_map(|starting| starting.targets.get(&number)).flatten();
                port.targets = targets.copied().collect();
            }
            (number, port)
        };
        view.ports = self.view.ports.iter().map(stand_in).collect();
        view
    }
}

#[derive(Debug, Default)]
struct Waiting {
    held: u32,
    /// Present while `held` is not zero.
    episode: Option<Episode>,
    breaker: Breaker,
    /// Whose targets the breaker was last told of.
    ports: Ports,
}

/// One ElastiService.
#[derive(Debug)]
pub struct Service {
    namespace: String,
    name: String,
    said: Mutex<Said>,
    view: watch::Sender<View>,
    waiting: Mutex<Waiting>,
    load: Arc<Load>,
    forwarding: AtomicU32,
    accepted: AtomicU64,
    all_metrics: Metrics,
    metrics: OnceLock<Box<ServiceMetrics>>,
    news: News,
}

impl Service {
    /// A Service that is not reachable yet. `news` is told of all traffic, and when the first connection is held at once.
    pub fn new(namespace: &str, name: &str, all_metrics: Metrics, news: News) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            said: Mutex::default(),
            view: watch::Sender::new(View::default()),
            waiting: Mutex::default(),
            load: Arc::default(),
            forwarding: AtomicU32::new(0),
            accepted: AtomicU64::new(0),
            metrics: OnceLock::new(),
            all_metrics,
            news,
        }
    }

    /// The metrics of this Service. Their series are made with the first connection: on most nodes most Services never see one,
    /// and series are most of what a Service costs.
    pub fn metrics(&self) -> &ServiceMetrics {
        self.metrics.get_or_init(|| Box::new(self.all_metrics.service(&self.namespace, &self.name)))
    }

    /// What is in force now. Not to be kept: who would change it waits.
    pub fn view(&self) -> watch::Ref<'_, View> {
        self.view.borrow()
    }

    /// Follows the view.
    pub fn views(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Puts a new view in force.
    pub fn set(&self, view: View) {
        let mut said = self.said();
        said.ready.retain(|uid| view.starting.iter().any(|starting| starting.pod.uid == *uid));
        said.view = view;
        self.show(said.view());
    }

    /// A starting pod has said that it is ready, or what it said counts no more. Says whether that is news.
    pub fn set_ready(&self, uid: &str, ready: bool) -> bool {
        let mut said = self.said();
        let known = said.view.starting.iter().any(|starting| starting.pod.uid == uid);
        let news = if ready { known && said.ready.insert(uid.to_owned()) } else { said.ready.remove(uid) };
        if news {
            self.show(said.view());
        }
        news
    }

    fn show(&self, view: View) {
        {
            let mut waiting = self.waiting();
            if let Some(episode) = &mut waiting.episode {
                let now = Instant::now();
                if !view.starting.is_empty() {
                    episode.addressed(now);
                }
                if view.ports.iter().any(|(_, port)| !port.targets.is_empty()) {
                    episode.ready(now);
                }
            }
            if !waiting.ports.lead_where(&view.ports) {
                self.close_breaker(&mut waiting);
            }
            waiting.ports = view.ports.clone();
        }
        self.view.send_if_modified(|old| {
            let changed = *old != view;
            *old = view;
            changed
        });
    }

    /// The ElastiService is gone: held connections are closed, forwarded ones end by themselves.
    pub fn remove(&self) {
        self.set(View::default());
        self.metrics().forget();
    }

    /// The traffic at this moment.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            held: self.waiting().held,
            forwarding: self.forwarding.load(Ordering::Relaxed),
            accepted: self.accepted.load(Ordering::Relaxed),
        }
    }

    /// An operator replica has been sent the news that connections are held.
    pub fn notified(&self) {
        if let Some(episode) = &mut self.waiting().episode {
            episode.notified(Instant::now());
        }
    }

    /// Whether what this client does is traffic.
    fn counts(&self, client: IpAddr) -> bool {
        !self.view.borrow().ignored.iter().any(|ignored| ignored.contains(client))
    }

    /// Counts an accepted connection of this client.
    pub fn accept(&self, client: IpAddr) {
        self.accepted.fetch_add(self.counts(client).into(), Ordering::Relaxed);
        self.news.changed();
        self.metrics().accepted.inc();
    }

    /// Counts a request of HTTP. It is traffic as a new connection is.
    pub fn request(&self, client: IpAddr) {
        self.accepted.fetch_add(self.counts(client).into(), Ordering::Relaxed);
        self.news.changed();
        self.metrics().requests.inc();
    }

    /// What is open to each backend.
    pub fn load(&self) -> &Arc<Load> {
        &self.load
    }

    /// Counts a connection as held until the guard goes; the error says why it cannot be. The operators learn at once of
    /// the first one.
    pub fn hold(self: &Arc<Self>, accepted: Instant, max: u32) -> Result<Held, Closed> {
        let first = {
            let mut waiting = self.waiting();
            if waiting.held >= max {
                return Err(Closed::Limit);
            }
            if !waiting.breaker.admits(waiting.held) {
                return Err(Closed::Unavailable);
            }
            waiting.held += 1;
            let first = waiting.held == 1;
            if first {
                waiting.episode = Some(Episode::new(accepted));
            }
            first
        };
        self.metrics().waits();
        if first {
            self.news.tell();
        } else {
            self.news.changed();
        }
        Ok(Held(Arc::clone(self), accepted))
    }

    /// Counts a connection of this client as forwarded until the guard goes.
    pub fn forward(self: &Arc<Self>, client: IpAddr) -> Forwarding {
        let counted = self.counts(client).into();
        self.forwarding.fetch_add(counted, Ordering::Relaxed);
        self.news.changed();
        self.metrics().forwarding.inc();
        Forwarding { service: Arc::clone(self), counted }
    }

    /// By what streams are told.
    pub fn news(&self) -> &News {
        &self.news
    }

    /// Counts a connection that never reached the target.
    pub fn close(&self, reason: Closed) {
        self.metrics().closed(reason);
        tracing::debug!(namespace = self.namespace, service = self.name, reason = reason.as_str(), "closed");
    }

    /// No code panics while it holds the lock.
    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No code panics while it holds the lock; if one did, counts would still be whole.
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether new clients get their error at once, since the target keeps failing.
    pub fn breaker_open(&self) -> bool {
        self.waiting().breaker.is_open()
    }

    fn close_breaker(&self, waiting: &mut Waiting) {
        if waiting.breaker.is_open() {
            self.metrics().breaker_open.set(0);
            tracing::info!(namespace = self.namespace, service = self.name, "clients are held again");
        }
        waiting.breaker.reset();
    }

    fn log_wake(&self, timeline: &Timeline, held: u32) {
        // To the microsecond.
        let millis = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        tracing::info!(
            namespace = self.namespace,
            service = self.name,
            notified_ms = timeline.notified.map(millis),
            addressed_ms = timeline.addressed.map(millis),
            ready_ms = timeline.ready.map(millis),
            forwarded_ms = timeline.forwarded.map(millis),
            total_ms = millis(timeline.total),
            held,
            "wake"
        );
    }
}

/// Namespace and name of the Service.
impl std::fmt::Display for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Counts a connection as held, since when it was accepted.
#[derive(Debug)]
#[must_use]
pub struct Held(Arc<Service>, Instant);

impl Held {
    /// The connection has reached the target: ends the hold, and logs the wake if it is the first.
    pub fn reached(self) {
        let (timeline, held) = {
            let mut waiting = self.0.waiting();
            self.0.close_breaker(&mut waiting);
            let held = waiting.held;
            (waiting.episode.as_mut().and_then(|episode| episode.forwarded(Instant::now())), held)
        };
        // What waited for a place, or for a dial, at a target that was up all the time has woken nobody.
        if let Some(timeline) = timeline.filter(|timeline| timeline.ready.is_some()) {
            self.0.all_metrics.woken(&timeline);
            self.0.log_wake(&timeline, held);
        }
    }
}

impl Held {
    /// The hold time has ended in vain.
    pub fn failed(self) {
        let service = &self.0;
        let mut waiting = service.waiting();
        let was_open = waiting.breaker.is_open();
        waiting.breaker.failed(self.1, Instant::now());
        if waiting.breaker.is_open() && !was_open {
            service.metrics().breaker_open.set(1);
            let (namespace, name) = (&service.namespace, &service.name);
            tracing::warn!(
                namespace,
                service = name,
                "the target keeps failing; new clients are refused at once, but one"
            );
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let last = {
            let mut waiting = self.0.waiting();
            waiting.held = waiting.held.saturating_sub(1);
            if waiting.held == 0 {
                waiting.episode = None;
            }
            waiting.held == 0
        };
        self.0.metrics().waited(self.1.elapsed().as_secs_f64());
        if last {
            // A target that is scaled to zero right now must not be woken for connections that are held no more.
            self.0.news.tell();
        } else {
            self.0.news.changed();
        }
    }
}

/// Counts a connection as forwarded.
#[derive(Debug)]
#[must_use]
pub struct Forwarding {
    service: Arc<Service>,
    /// One, or none when it is no traffic.
    counted: u32,
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.service.forwarding.fetch_sub(self.counted, Ordering::Relaxed);
        self.service.news.changed();
        self.service.metrics().forwarding.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Board;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn service() -> (Arc<Service>, watch::Receiver<bool>) {
        let board = Board::default();
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        (Arc::new(Service::new("n", "s", metrics, board.news())), board.follow())
    }

    #[test]
    fn streams_learn_at_once_that_connections_are_held_and_that_none_is_any_more() {
        let (service, mut news) = service();
        let first = service.hold(Instant::now(), 9);
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        let second = service.hold(Instant::now(), 9);
        assert!(!news.has_changed().unwrap());
        drop(first);
        assert!(!news.has_changed().unwrap());
        drop(second);
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        let _third = service.hold(Instant::now(), 9);
        assert!(news.has_changed().unwrap());
    }

    /// Keeps out B5: slots leak under contention until everything is refused.
    #[test]
    fn guards_keep_the_counts_and_the_limit() {
        let (service, _news) = service();
        let held = service.hold(Instant::now(), 1).unwrap();
        assert_eq!(service.hold(Instant::now(), 1).err(), Some(Closed::Limit));
        assert_eq!((service.traffic().held, service.metrics().held.get()), (1, 1));
        held.reached();
        let client = "10.0.0.1".parse().unwrap();
        let forwarding = service.forward(client);
        assert_eq!(service.traffic(), Traffic { held: 0, forwarding: 1, accepted: 0 });
        drop(forwarding);
        assert_eq!((service.traffic().forwarding, service.metrics().forwarding.get()), (0, 0));
        assert!(service.hold(Instant::now(), 1).is_ok());
    }

    #[test]
    fn a_target_that_keeps_failing_has_one_client_held_until_it_changes() {
        let (service, _news) = service();
        let Some(long_ago) = Instant::now().checked_sub(Duration::from_mins(6)) else { return };
        for _ in 0..5 {
            service.hold(long_ago, 9).unwrap().failed();
        }
        let probe = service.hold(Instant::now(), 9).unwrap();
        assert_eq!(service.hold(Instant::now(), 9).err(), Some(Closed::Unavailable));
        assert_eq!((service.breaker_open(), service.metrics().breaker_open.get()), (true, 1));
        assert_eq!(service.traffic().held, 1, "the operators are told that somebody waits");
        let port = PortView { targets: ["10.0.0.1:80".parse().unwrap()].into(), ..PortView::default() };
        service.set(View { ports: [(1, port)].into(), ..View::default() });
        let second = service.hold(Instant::now(), 9);
        assert!(second.is_ok() && !service.breaker_open());
        drop((probe, second));
        for _ in 0..5 {
            service.hold(long_ago, 9).unwrap().failed();
        }
        service.hold(Instant::now(), 9).unwrap().reached();
        assert_eq!((service.breaker_open(), service.metrics().breaker_open.get()), (false, 0));
    }

    #[test]
    fn series_are_made_with_the_first_connection_and_never_again_once_the_service_is_gone() {
        let registry = prometheus::Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let told = || registry.gather().iter().filter(|family| !family.get_metric().is_empty()).count();
        let idle = told();
        let service = |name| Arc::new(Service::new("n", name, metrics.clone(), Board::default().news()));
        let (used, unused) = (service("used"), service("unused"));
        assert_eq!(told(), idle);
        used.accept(CLIENT);
        assert!(told() > idle, "zeros too, so that what rises can be seen");
        for service in [used, unused] {
            service.remove();
            service.accept(CLIENT);
            service.metrics().waits();
            service.metrics().waited(0.1);
            service.metrics().answered(http::StatusCode::OK, 0.1);
        }
        assert_eq!(told(), idle);
    }

    #[test]
    fn what_an_ignored_client_does_is_no_traffic() {
        let (service, _news) = service();
        service.set(View { ignored: ["10.0.0.0/8".parse().unwrap()].into(), ..View::default() });
        let [ignored, other] = ["10.1.2.3", "192.168.0.1"].map(|client| client.parse().unwrap());
        service.accept(ignored);
        service.request(ignored);
        let forwarding = service.forward(ignored);
        assert_eq!(service.traffic(), Traffic::default());
        assert_eq!(service.metrics().forwarding.get(), 1);
        // It is counted as it was when it began.
        service.set(View::default());
        service.accept(other);
        let counted = service.forward(other);
        drop(forwarding);
        assert_eq!(service.traffic(), Traffic { held: 0, forwarding: 1, accepted: 1 });
        drop(counted);
        assert_eq!((service.traffic().forwarding, service.metrics().forwarding.get()), (0, 0));
    }

    #[test]
    fn an_episode_knows_when_the_target_became_reachable() {
        let (service, _news) = service();
        let _held = service.hold(Instant::now(), 1);
        let ready = |service: &Service| {
            let mut waiting = service.waiting();
            waiting.episode.as_mut().unwrap().forwarded(Instant::now()).unwrap().ready
        };
        let port = PortView { targets: ["10.0.0.1:80".parse().unwrap()].into(), ..PortView::default() };
        service.set(View { ports: [(1, port)].into(), ..View::default() });
        assert!(ready(&service).is_some());
    }
}
