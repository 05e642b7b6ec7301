//! Every metric of the resolver. The registry is passed in; label values go away with their Service.

use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::hold::Closed;
use crate::wake::Timeline;

/// Labels of what is counted per Service.
const SERVICE: [&str; 2] = ["namespace", "service"];

/// Seconds: our own share of a wake is a millisecond, a pod's start seconds, a cold image pull minutes.
const WAKE_BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// All metrics; clones are the same metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    held: IntGaugeVec,
    forwarding: IntGaugeVec,
    accepted: IntCounterVec,
    requests: IntCounterVec,
    probes: IntCounterVec,
    closed: IntCounterVec,
    bytes: IntCounterVec,
    wake: HistogramVec,
    repairs: IntCounterVec,
    refused: IntCounterVec,
    questions: IntCounterVec,
    /// 1 while connections are redirected by eBPF on this node.
    pub redirect_enabled: IntGauge,
    /// Entries in the redirect map.
    pub redirect_entries: IntGauge,
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
        let metrics = Self {
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
            streams: IntGauge::new(name("operator_streams"), "Streams to operator replicas that are up.")?,
            newer_messages: IntCounter::new(
                name("newer_version_messages_total"),
                "Messages ignored because a newer operator sent them.",
            )?,
        };
        let collectors: [Box<dyn Collector>; 15] = [
            Box::new(metrics.held.clone()),
            Box::new(metrics.forwarding.clone()),
            Box::new(metrics.accepted.clone()),
            Box::new(metrics.requests.clone()),
            Box::new(metrics.probes.clone()),
            Box::new(metrics.closed.clone()),
            Box::new(metrics.bytes.clone()),
            Box::new(metrics.wake.clone()),
            Box::new(metrics.repairs.clone()),
            Box::new(metrics.refused.clone()),
            Box::new(metrics.questions.clone()),
            Box::new(metrics.redirect_enabled.clone()),
            Box::new(metrics.redirect_entries.clone()),
            Box::new(metrics.streams.clone()),
            Box::new(metrics.newer_messages.clone()),
        ];
        collectors.into_iter().try_for_each(|collector| registry.register(collector))?;
        Ok(metrics)
    }

    /// Repairs of the `map` of redirected addresses, or of the attachment of `programs`.
    pub fn repairs(&self, what: &str) -> IntCounter {
        self.repairs.with_label_values(&[what])
    }

    /// Connections refused for this reason.
    pub fn refused(&self, reason: &str) -> IntCounter {
        self.refused.with_label_values(&[reason])
    }

    /// Counts a question to a starting pod.
    pub fn probed(&self, good: bool) {
        self.questions.with_label_values(&[if good { "success" } else { "failure" }]).inc();
    }

    /// The metrics of one Service.
    pub fn service(&self, namespace: &str, service: &str) -> ServiceMetrics {
        let labels = [namespace, service];
        ServiceMetrics {
            held: self.held.with_label_values(&labels),
            forwarding: self.forwarding.with_label_values(&labels),
            accepted: self.accepted.with_label_values(&labels),
            requests: self.requests.with_label_values(&labels),
            probes: self.probes.with_label_values(&labels),
            bytes: self.bytes.with_label_values(&labels),
            closed: Closed::ALL.map(|reason| self.closed.with_label_values(&[namespace, service, reason.as_str()])),
        }
    }

    /// Forgets a Service that is gone. Connections that still end count for nothing.
    pub fn forget(&self, namespace: &str, service: &str) {
        let labels = [namespace, service];
        // Absent labels are what is wanted.
        drop(self.held.remove_label_values(&labels));
        drop(self.forwarding.remove_label_values(&labels));
        drop(self.accepted.remove_label_values(&labels));
        drop(self.requests.remove_label_values(&labels));
        drop(self.probes.remove_label_values(&labels));
        drop(self.bytes.remove_label_values(&labels));
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
    /// HTTP requests answered as `spec.probeResponse` says.
    pub probes: IntCounter,
    /// Bytes forwarded, both directions.
    pub bytes: IntCounter,
    closed: [IntCounter; Closed::ALL.len()],
}

impl ServiceMetrics {
    /// Counts a connection that never reached the target.
    pub fn closed(&self, reason: Closed) {
        if let Some(at) = Closed::ALL.iter().position(|known| *known == reason) {
            self.closed[at].inc();
        }
    }
}
