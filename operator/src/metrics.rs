//! What the operator counts. KubeElasti's names where they mean the same; labels are closed sets, names of objects, or
//! nothing: never error texts.

use std::time::{Duration, Instant};

use elasti_api::message::Mode;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, Result,
};

use crate::elastiserver::WakeAnswer;
use crate::observed::ObjectKey;

/// KubeElasti's buckets, in seconds, and finer ones below: a round here takes milliseconds.
const RECONCILE_BUCKETS: [f64; 9] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Seconds from the news of held connections to the answer of the API server: some milliseconds, seconds when it is slow.
const WAKE_BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Everything that is counted; one per process.
#[derive(Clone, Debug)]
pub struct Metrics {
    reconcile: HistogramVec,
    mode: IntGaugeVec,
    scaled: IntCounterVec,
    wakes: IntCounterVec,
    wake_seconds: HistogramVec,
    token_reviews: IntCounterVec,
    newer_messages: IntGauge,
    /// Resolver streams that are up.
    pub streams: IntGauge,
    /// Whether this replica holds the Lease.
    pub leader: IntGauge,
}

impl Metrics {
    /// Registers everything; fails when `registry` has a metric of the same name.
    pub fn new(registry: &Registry) -> Result<Self> {
        Ok(Self {
            reconcile: register(
                registry,
                HistogramVec::new(
                    HistogramOpts::new("elasti_operator_reconcile", "Seconds that a look at an ElastiService took.")
                        .buckets(RECONCILE_BUCKETS.to_vec()),
                    &["result"],
                )?,
            )?,
            mode: register(
                registry,
                gauges("elasti_operator_mode", "Mode of each ElastiService: 1 proxy, 0 serve.", &["crd_name"])?,
            )?,
            scaled: register(
                registry,
                counters(
                    "elasti_operator_scale_counter",
                    "Changes of a target's scale.",
                    &["namespace", "crd_name", "direction", "result"],
                )?,
            )?,
            wakes: register(
                registry,
                counters(
                    "elasti_operator_notifications_total",
                    "Notifications by HTTP, by their outcome.",
                    &["result"],
                )?,
            )?,
            wake_seconds: register(
                registry,
                HistogramVec::new(
                    HistogramOpts::new("elasti_operator_wake_seconds", "Seconds that a part of a wake took.")
                        .buckets(WAKE_BUCKETS.to_vec()),
                    &["phase"],
                )?,
            )?,
            token_reviews: register(
                registry,
                counters(
                    "elasti_operator_token_reviews_total",
                    "Tokens checked by the API server, by its answer; cached answers are not counted.",
                    &["result"],
                )?,
            )?,
            newer_messages: register(
                registry,
                gauge(
                    "elasti_operator_newer_resolvers",
                    "Resolvers connected that have sent messages of a newer version than this operator knows.",
                )?,
            )?,
            streams: register(registry, gauge("elasti_operator_resolver_streams", "Resolver streams that are up.")?)?,
            leader: register(registry, gauge("elasti_operator_leader", "1 on the replica that holds the Lease.")?)?,
        })
    }

    /// Times a look at an ElastiService until it is dropped.
    pub fn reconcile_timer(&self) -> ReconcileTimer {
        let [success, failure] = ["success", "error"].map(|result| self.reconcile.with_label_values(&[result]));
        ReconcileTimer { started: Instant::now(), success, failure, failed: false }
    }

    /// The mode of an ElastiService; `None` when it has none yet.
    pub fn mode(&self, elasti: &ObjectKey, mode: Option<Mode>) {
        let name = elasti.to_string();
        match mode {
            Some(mode) => self.mode.with_label_values(&[&name]).set(i64::from(mode == Mode::Proxy)),
            None => self.forget(elasti),
        }
    }

    /// An ElastiService is gone. Its mode was the only thing told of it that is not a count.
    pub fn forget(&self, elasti: &ObjectKey) {
        // Fails only when there was nothing to remove.
        drop(self.mode.remove_label_values(&[&elasti.to_string()]));
    }

    /// A target was scaled `up` or `down`, or could not be.
    pub fn scaled(&self, elasti: &ObjectKey, direction: &'static str, done: bool) {
        let result = if done { "success" } else { "error" };
        self.scaled.with_label_values(&[elasti.namespace.as_str(), &elasti.to_string(), direction, result]).inc();
    }

    /// A target was woken so long after a resolver's news of held connections had come.
    pub fn woken(&self, after: Duration) {
        self.wake_seconds.with_label_values(&["scaled"]).observe(after.as_secs_f64());
    }

    /// A notification was answered.
    pub fn notified(&self, answer: &WakeAnswer) {
        let result = match answer {
            WakeAnswer::Accepted => "accepted",
            WakeAnswer::Unknown => "unknown",
            WakeAnswer::Failed(_) => "failed",
        };
        self.wakes.with_label_values(&[result]).inc();
    }

    /// The API server was asked about a token.
    pub fn token_reviewed(&self, result: &'static str) {
        self.token_reviews.with_label_values(&[result]).inc();
    }

    /// Counts a resolver as newer than this operator until the result is dropped.
    pub fn newer_resolver(&self) -> GaugeGuard {
        GaugeGuard::new(&self.newer_messages)
    }

    /// Counts a stream as up until the result is dropped.
    pub fn stream(&self) -> GaugeGuard {
        GaugeGuard::new(&self.streams)
    }
}

/// Adds one to a gauge for as long as it lives.
#[derive(Debug)]
pub struct GaugeGuard(IntGauge);

impl GaugeGuard {
    fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// See [`Metrics::reconcile_timer`].
#[derive(Debug)]
pub struct ReconcileTimer {
    started: Instant,
    success: Histogram,
    failure: Histogram,
    failed: bool,
}

impl ReconcileTimer {
    /// What is timed has failed.
    pub fn failed(mut self) {
        self.failed = true;
    }
}

impl Drop for ReconcileTimer {
    fn drop(&mut self) {
        let histogram = if self.failed { &self.failure } else { &self.success };
        histogram.observe(self.started.elapsed().as_secs_f64());
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(name: &str, help: &str) -> Result<IntGauge> {
    IntGauge::new(name, help)
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec> {
    IntGaugeVec::new(Opts::new(name, help), labels)
}

fn counters(name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn a_look_at_an_elastiservice_shows_in_the_metrics_and_goes_with_it() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let key = ObjectKey::new("n", "e");
        let text = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();

        metrics.reconcile_timer().failed();
        drop(metrics.reconcile_timer());
        metrics.mode(&key, Some(Mode::Proxy));
        metrics.scaled(&key, "up", true);
        let shown = text();
        for line in [
            r#"elasti_operator_mode{crd_name="n/e"} 1"#,
            r#"elasti_operator_reconcile_count{result="error"} 1"#,
            r#"elasti_operator_reconcile_count{result="success"} 1"#,
            r#"elasti_operator_scale_counter{crd_name="n/e",direction="up",namespace="n",result="success"} 1"#,
        ] {
            assert!(shown.contains(line), "{line} in {shown}");
        }
        metrics.forget(&key);
        assert!(!text().contains("elasti_operator_mode{"));
    }

    #[test]
    fn streams_are_counted_while_they_last() {
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let stream = metrics.stream();
        assert_eq!(metrics.streams.get(), 1);
        drop(stream);
        assert_eq!(metrics.streams.get(), 0);
    }
}
