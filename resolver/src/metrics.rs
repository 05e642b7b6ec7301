//! Every metric of the resolver. The registry is passed in; label values go away with their Service.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::capacity::Refusal;
use crate::hold::Closed;
use crate::wake::Timeline;

/// Labels of what is counted per Service.
const SERVICE: [&str; 2] = ["namespace", "service"];

/// Seconds: our own share of a wake is a millisecond, a pod's start seconds, a cold image pull minutes.
const WAKE_BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// Seconds that a connection waits: what a wake takes, and at the end the hold time (10 minutes by default).
const QUEUE_BUCKETS: [f64; 9] = [0.05, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 600.0];

/// KubeElasti's buckets, in seconds.
const REQUEST_BUCKETS: [f64; 6] = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Classes of HTTP's status codes.
const STATUSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Spellings of [`ServiceMetrics::switched`].
const SWITCHES: [&str; 2] = ["enabled", "disabled"];

/// What was found changed by somebody else, and made right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The map of redirected addresses.
    Map,
    /// The attachment of the programs.
    Programs,
}

/// All metrics; clones are the same metrics.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Series>);

impl Deref for Metrics {
    type Target = Series;

    fn deref(&self) -> &Series {
        &self.0
    }
}

/// What [`Metrics`] consists of.
#[derive(Debug)]
pub struct Series {
    held: IntGaugeVec,
    forwarding: IntGaugeVec,
    accepted: IntCounterVec,
    requests: IntCounterVec,
    probes: IntCounterVec,
    closed: IntCounterVec,
    bytes: IntCounterVec,
    wake: HistogramVec,
    queued: IntGaugeVec,
    breaker: IntGaugeVec,
    queue_wait: HistogramVec,
    answered: HistogramVec,
    switched: IntCounterVec,
    hosts: IntCounterVec,
    news: IntCounterVec,
    node: IntGaugeVec,
    repairs: IntCounterVec,
    refused: IntCounterVec,
    questions: IntCounterVec,
    /// 1 while connections are redirected by eBPF on this node.
    pub redirect_enabled: IntGauge,
    /// Entries in the redirect map.
    pub redirect_entries: IntGauge,
    /// Connections that were not redirected because the resolver was stuck.
    pub redirect_passed: IntCounter,
    /// Streams to operator replicas that are up.
    pub streams: IntGauge,
    /// Messages of a protocol version that this build does not know.
    pub newer_messages: IntCounter,
}

impl Metrics {
    /// Registers all metrics; fails when the registry has one of them already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let name = |name: &str| format!("elasti_resolver_{name}");
        let by_service = |suffix: &str, help: &str| IntGaugeVec::new(Opts::new(name(suffix), help), &SERVICE);
        let counted = |suffix: &str, help: &str| IntCounterVec::new(Opts::new(name(suffix), help), &SERVICE);
        let metrics = Self(Arc::new(Series {
            held: by_service("held_connections", "Connections that wait for the target.")?,
            forwarding: by_service("forwarded_connections", "Connections that are forwarded now.")?,
            accepted: counted("accepted_connections_total", "Connections accepted.")?,
            requests: counted("requests_total", "HTTP requests forwarded, or answered in place of the target.")?,
            probes: counted("probe_responses_total", "HTTP requests answered as spec.probeResponse says.")?,
            closed: IntCounterVec::new(
                Opts::new(name("closed_connections_total"), "Held connections that never reached the target."),
                &["namespace", "service", "reason"],
            )?,
            bytes: counted("forwarded_bytes_total", "Bytes forwarded, both directions.")?,
            wake: HistogramVec::new(
                HistogramOpts::new(name("wake_seconds"), "Duration of a wake, by phase.")
                    .buckets(WAKE_BUCKETS.to_vec()),
                &["phase"],
            )?,
            queued: IntGaugeVec::new(
                Opts::new(name("queued_count"), "Connections that wait for the target, under KubeElasti's name."),
                &["source", "namespace"],
            )?,
            breaker: by_service("breaker_open", "1 while new clients are refused, since the target keeps failing.")?,
            queue_wait: HistogramVec::new(
                HistogramOpts::new(
                    name("queue_seconds"),
                    "Seconds that a connection or request waited for the target.",
                )
                .buckets(QUEUE_BUCKETS.to_vec()),
                &SERVICE,
            )?,
            answered: HistogramVec::new(
                HistogramOpts::new(name("incoming_requests"), "Seconds until the head of an HTTP request's answer.")
                    .buckets(REQUEST_BUCKETS.to_vec()),
                &["namespace", "source", "status"],
            )?,
            switched: IntCounterVec::new(
                Opts::new(
                    name("traffic_switch_count"),
                    "Times that connections were intercepted (enabled), or no more.",
                ),
                &["namespace", "source", "enabled"],
            )?,
            hosts: IntCounterVec::new(
                Opts::new(name("host_extraction_count"), "Requests to the proxy port, by whether they name a Service."),
                &["error"],
            )?,
            news: IntCounterVec::new(
                Opts::new(
                    name("operator_rpc_count"),
                    "Operators told that connections are held; error: why one was not.",
                ),
                &["error"],
            )?,
            node: IntGaugeVec::new(Opts::new(name("node_info"), "Always 1; the node of this resolver."), &["node"])?,
            repairs: IntCounterVec::new(
                Opts::new(
                    name("redirect_repairs_total"),
                    "Times that what redirects was found changed and made right.",
                ),
                &["what"],
            )?,
            refused: IntCounterVec::new(
                Opts::new(name("refused_connections_total"), "Connections reset because the resolver is at a limit."),
                &["reason"],
            )?,
            questions: IntCounterVec::new(
                Opts::new(name("readiness_probes_total"), "Questions to starting pods whether they are ready."),
                &["result"],
            )?,
            redirect_enabled: IntGauge::new(name("redirect_enabled"), "1 while eBPF redirects connections here.")?,
            redirect_entries: IntGauge::new(name("redirect_entries"), "Addresses that are redirected.")?,
            redirect_passed: IntCounter::new(
                name("redirect_passed_total"),
                "Connections that were not redirected because the resolver was stuck.",
            )?,
            streams: IntGauge::new(name("operator_streams"), "Streams to operator replicas that are up.")?,
            newer_messages: IntCounter::new(
                name("newer_version_messages_total"),
                "Messages ignored because a newer operator sent them.",
            )?,
        }));
        metrics.collectors().into_iter().try_for_each(|collector| registry.register(collector))?;
        metrics.begin_at_zero();
        Ok(metrics)
    }

    fn collectors(&self) -> [Box<dyn Collector>; 24] {
        [
            Box::new(self.held.clone()),
            Box::new(self.forwarding.clone()),
            Box::new(self.accepted.clone()),
            Box::new(self.requests.clone()),
            Box::new(self.probes.clone()),
            Box::new(self.closed.clone()),
            Box::new(self.bytes.clone()),
            Box::new(self.wake.clone()),
            Box::new(self.queued.clone()),
            Box::new(self.breaker.clone()),
            Box::new(self.queue_wait.clone()),
            Box::new(self.answered.clone()),
            Box::new(self.switched.clone()),
            Box::new(self.hosts.clone()),
            Box::new(self.news.clone()),
            Box::new(self.node.clone()),
            Box::new(self.repairs.clone()),
            Box::new(self.refused.clone()),
            Box::new(self.questions.clone()),
            Box::new(self.redirect_enabled.clone()),
            Box::new(self.redirect_entries.clone()),
            Box::new(self.redirect_passed.clone()),
            Box::new(self.streams.clone()),
            Box::new(self.newer_messages.clone()),
        ]
    }

    /// Series that alerts watch are there from the beginning: an increase is seen only between two samples.
    fn begin_at_zero(&self) {
        for what in [Repair::Map, Repair::Programs] {
            self.repairs(what);
        }
        for reason in Refusal::ALL {
            self.refused(reason);
        }
    }

    /// Repairs of what redirects.
    pub fn repairs(&self, what: Repair) -> IntCounter {
        let what = match what {
            Repair::Map => "map",
            Repair::Programs => "programs",
        };
        self.repairs.with_label_values(&[what])
    }

    /// Connections refused for this reason.
    pub fn refused(&self, reason: Refusal) -> IntCounter {
        self.refused.with_label_values(&[reason.as_str()])
    }

    /// Names the node that this resolver is on.
    pub fn on_node(&self, node: &str) {
        self.node.with_label_values(&[node]).set(1);
    }

    /// A request to the proxy port named a Service of ours, or did not.
    pub fn host(&self, found: bool) {
        self.hosts.with_label_values(&[if found { "" } else { "unknown" }]).inc();
    }

    /// An operator was told that connections are held for a Service, or could not be.
    pub fn told(&self, done: bool) {
        self.news.with_label_values(&[if done { "" } else { "stream" }]).inc();
    }

    /// Counts a question to a starting pod.
    pub fn probed(&self, good: bool) {
        self.questions.with_label_values(&[if good { "success" } else { "failure" }]).inc();
    }

    /// Connections to a Service are intercepted from now on, or no more.
    pub fn switched(&self, namespace: &str, service: &str, intercepted: bool) {
        let [enabled, disabled] = SWITCHES;
        let switch = if intercepted { enabled } else { disabled };
        self.switched.with_label_values(&[namespace, service, switch]).inc();
    }

    /// The metrics of one Service.
    pub fn service(&self, namespace: &str, service: &str) -> ServiceMetrics {
        let labels = [namespace, service];
        ServiceMetrics {
            held: self.held.with_label_values(&labels),
            queued: self.queued.with_label_values(&[service, namespace]),
            breaker_open: self.breaker.with_label_values(&labels),
            all: self.clone(),
            labels: labels.map(str::to_owned),
            queue_wait: OnceLock::new(),
            answered: Default::default(),
            forwarding: self.forwarding.with_label_values(&labels),
            accepted: self.accepted.with_label_values(&labels),
            requests: self.requests.with_label_values(&labels),
            probes: self.probes.with_label_values(&labels),
            bytes: self.bytes.with_label_values(&labels),
            closed: Closed::ALL.map(|reason| self.closed.with_label_values(&[namespace, service, reason.as_str()])),
        }
    }

    fn forget(&self, namespace: &str, service: &str) {
        let labels = [namespace, service];
        // Absent labels are what is wanted.
        drop(self.held.remove_label_values(&labels));
        drop(self.forwarding.remove_label_values(&labels));
        drop(self.accepted.remove_label_values(&labels));
        drop(self.requests.remove_label_values(&labels));
        drop(self.probes.remove_label_values(&labels));
        drop(self.bytes.remove_label_values(&labels));
        drop(self.queued.remove_label_values(&[service, namespace]));
        drop(self.breaker.remove_label_values(&labels));
        drop(self.queue_wait.remove_label_values(&labels));
        for status in STATUSES {
            drop(self.answered.remove_label_values(&[namespace, service, status]));
        }
        for switch in SWITCHES {
            drop(self.switched.remove_label_values(&[namespace, service, switch]));
        }
        for reason in Closed::ALL {
            drop(self.closed.remove_label_values(&[namespace, service, reason.as_str()]));
        }
    }

    /// Counts a wake.
    pub fn woken(&self, timeline: &Timeline) {
        let phases = [
            ("notified", timeline.notified),
            ("addressed", timeline.addressed),
            ("ready", timeline.ready),
            ("forwarded", timeline.forwarded),
            ("total", Some(timeline.total)),
        ];
        for (phase, duration) in phases {
            if let Some(duration) = duration {
                let histogram: Histogram = self.wake.with_label_values(&[phase]);
                histogram.observe(duration.as_secs_f64());
            }
        }
    }
}

/// The metrics of one Service.
#[derive(Clone, Debug)]
pub struct ServiceMetrics {
    /// Connections that wait for the target.
    pub held: IntGauge,
    /// Connections that are forwarded now.
    pub forwarding: IntGauge,
    /// Connections accepted.
    pub accepted: IntCounter,
    /// HTTP requests.
    pub requests: IntCounter,
    /// 1 while new clients are refused, since the target keeps failing.
    pub breaker_open: IntGauge,
    /// HTTP requests answered as `spec.probeResponse` says.
    pub probes: IntCounter,
    /// Bytes forwarded, both directions.
    pub bytes: IntCounter,
    closed: [IntCounter; Closed::ALL.len()],
    queued: IntGauge,
    /// What comes into being only when it is counted: most Services wait for nothing most of the time.
    queue_wait: OnceLock<Histogram>,
    /// By [`STATUSES`].
    answered: [OnceLock<Histogram>; STATUSES.len()],
    all: Metrics,
    /// Namespace and name.
    labels: [String; 2],
}

impl ServiceMetrics {
    /// A connection or request begins to wait.
    pub fn waits(&self) {
        self.held.inc();
        self.queued.inc();
    }

    /// It has waited for so long.
    pub fn waited(&self, seconds: f64) {
        self.held.dec();
        self.queued.dec();
        self.queue_wait().observe(seconds);
    }

    fn queue_wait(&self) -> &Histogram {
        self.queue_wait.get_or_init(|| self.all.queue_wait.with_label_values(&self.labels))
    }

    /// The head of an answer with this status is there, so many seconds after the request.
    pub fn answered(&self, status: http::StatusCode, seconds: f64) {
        let class = usize::from(status.as_u16() / 100).clamp(1, STATUSES.len());
        self.of_status(class - 1).observe(seconds);
    }

    fn of_status(&self, class: usize) -> &Histogram {
        let [namespace, service] = &self.labels;
        let labels = [namespace.as_str(), service, STATUSES[class]];
        self.answered[class].get_or_init(|| self.all.answered.with_label_values(&labels))
    }

    /// Forgets a Service that is gone. Connections that still end count for nothing: every series is made before it is
    /// removed, so none is made after.
    pub fn forget(&self) {
        let _made = self.queue_wait();
        for class in 0..STATUSES.len() {
            let _made = self.of_status(class);
        }
        let [namespace, service] = &self.labels;
        self.all.forget(namespace, service);
    }

    /// Counts a connection that never reached the target.
    pub fn closed(&self, reason: Closed) {
        if let Some(at) = Closed::ALL.iter().position(|known| *known == reason) {
            self.closed[at].inc();
        }
    }
}
