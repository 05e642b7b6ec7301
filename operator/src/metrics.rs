//! What the operator counts. KubeElasti's names where they mean the same; labels are closed sets, names of objects, or
//! nothing: never error texts.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::message::Mode;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, Result,
};

use crate::elastiserver::WakeAnswer;
use crate::observed::ObjectKey;
use watches::Watches;
use zero::ZeroTime;

mod watches;
mod zero;

/// KubeElasti's buckets, in seconds, and finer ones below: a round here takes milliseconds.
const RECONCILE_BUCKETS: [f64; 9] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0];

/// Seconds from the news of held connections to the answer of the API server: some milliseconds, seconds when it is slow.
const WAKE_BUCKETS: [f64; 13] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// One series of an ElastiService.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Counted {
    Scaled { target: String, service: String, direction: &'static str, error: &'static str },
    Updated { mode: &'static str, error: &'static str },
}

/// What a watch has met with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    /// All objects have been read.
    Complete,
    /// An object is new, has changed or is gone.
    Changed,
    /// An object is not valid.
    Invalid,
    /// The API server could not be asked.
    Failed,
}

/// KubeElasti's label `error`, without its texts, which have no bound.
fn error_label(done: bool) -> &'static str {
    if done { "success" } else { "error" }
}

/// Everything that is counted; one per process.
#[derive(Clone, Debug)]
pub struct Metrics {
    reconcile: HistogramVec,
    mode: IntGaugeVec,
    scaled: IntCounterVec,
    updates: IntCounterVec,
    finalized: IntCounterVec,
    watches: Watches,
    watched: IntCounterVec,
    changes: IntCounterVec,
    zero: ZeroTime,
    /// Label values under which an ElastiService was counted, to be removed with it.
    counted: Arc<Mutex<HashMap<ObjectKey, BTreeSet<Counted>>>>,
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
                    &["error"],
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
                    &["namespace", "service_name", "target", "crd_name", "direction", "error"],
                )?,
            )?,
            updates: register(
                registry,
                counters(
                    "elasti_operator_CRD_update_counter",
                    "Changes of the mode in the status of an ElastiService.",
                    &["crd_name", "mode", "error"],
                )?,
            )?,
            finalized: register(
                registry,
                counters(
                    "elasti_operator_CRD_finalizer_counter",
                    "ElastiServices that were deleted and undone.",
                    &["error"],
                )?,
            )?,
            watches: register(registry, Watches::new()?)?,
            watched: register(
                registry,
                counters(
                    "elasti_operator_informer_counter",
                    "Watches that have read all objects, or could not.",
                    &["informer_name", "action", "error"],
                )?,
            )?,
            changes: register(
                registry,
                counters(
                    "elasti_operator_informer_handler_counter",
                    "Objects that watches have told of; error: not valid.",
                    &["informer_name", "error"],
                )?,
            )?,
            zero: register(registry, ZeroTime::new()?)?,
            counted: Arc::default(),
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
        let [success, failure] = [true, false].map(|done| self.reconcile.with_label_values(&[error_label(done)]));
        ReconcileTimer { started: Instant::now(), success, failure, failed: false }
    }

    /// The mode of an ElastiService; `None` when it has none yet.
    pub fn mode(&self, elasti: &ObjectKey, mode: Option<Mode>) {
        let name = elasti.to_string();
        match mode {
            Some(mode) => self.mode.with_label_values(&[&name]).set(i64::from(mode == Mode::Proxy)),
            // Fails only when there was nothing to remove.
            None => drop(self.mode.remove_label_values(&[&name])),
        }
    }

    /// An ElastiService is gone, and all that was counted under its name.
    pub fn forget(&self, elasti: &ObjectKey) {
        self.mode(elasti, None);
        self.zero.forget(elasti);
        let (namespace, name) = (elasti.namespace.as_str(), elasti.to_string());
        for counted in self.counted(|all| all.remove(elasti)).into_iter().flatten() {
            let removed = match &counted {
                Counted::Scaled { target, service, direction, error } => {
                    self.scaled.remove_label_values(&[namespace, service, target, &name, direction, error])
                }
                Counted::Updated { mode, error } => self.updates.remove_label_values(&[name.as_str(), mode, error]),
            };
            // It is there: it was counted.
            drop(removed);
        }
    }

    /// A target, as kind and name joined by a hyphen, was scaled `up` or `down`, or could not be.
    pub fn scaled(&self, elasti: &ObjectKey, service: &str, target: &str, direction: &'static str, done: bool) {
        let (namespace, name, error) = (elasti.namespace.as_str(), elasti.to_string(), error_label(done));
        let (target, service) = (target.to_owned(), service.to_owned());
        self.scaled.with_label_values(&[namespace, &service, &target, &name, direction, error]).inc();
        self.remember(elasti, Counted::Scaled { target, service, direction, error });
    }

    /// The mode was written to the status, or could not be.
    pub fn updated(&self, elasti: &ObjectKey, mode: Mode, done: bool) {
        let (mode, error) = (mode.as_str(), error_label(done));
        self.updates.with_label_values(&[&elasti.to_string(), mode, error]).inc();
        self.remember(elasti, Counted::Updated { mode, error });
    }

    /// What was made for a deleted ElastiService is removed, or could not be.
    pub fn finalized(&self, done: bool) {
        self.finalized.with_label_values(&[error_label(done)]).inc();
    }

    /// A target was seen: at zero, from where a wake starts so many replicas, or not.
    pub fn at_zero(&self, elasti: &ObjectKey, replicas: Option<u32>) {
        self.zero.observe(elasti, replicas, Instant::now());
    }

    /// This replica leads, or does not.
    pub fn lead(&self, leading: bool) {
        self.leader.set(leading.into());
        self.zero.lead(leading, Instant::now());
    }

    /// The watch of a kind of objects has met with something.
    pub fn watched(&self, kind: &str, what: Watched) {
        match what {
            Watched::Complete => {
                self.watches.complete(kind);
                self.watched.with_label_values(&[kind, "add", error_label(true)]).inc();
            }
            Watched::Failed => {
                self.watches.failed(kind, Instant::now());
                self.watched.with_label_values(&[kind, "add", error_label(false)]).inc();
            }
            Watched::Changed => self.changes.with_label_values(&[kind, error_label(true)]).inc(),
            Watched::Invalid => self.changes.with_label_values(&[kind, error_label(false)]).inc(),
        }
    }

    fn remember(&self, elasti: &ObjectKey, counted: Counted) {
        self.counted(|all| all.entry(elasti.clone()).or_default().insert(counted));
    }

    fn counted<T>(&self, use_it: impl FnOnce(&mut HashMap<ObjectKey, BTreeSet<Counted>>) -> T) -> T {
        // Every change is one insertion or removal, so a poisoned lock still guards a sound map.
        use_it(&mut self.counted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A target was woken: so long after a resolver's news of held connections had come `/scale` was patched, and so long after
    /// it the API server had answered.
    pub fn woken(&self, sent: Duration, scaled: Duration) {
        for (phase, after) in [("sent", sent), ("scaled", scaled)] {
            self.wake_seconds.with_label_values(&[phase]).observe(after.as_secs_f64());
        }
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
    fn b40_a_look_at_an_elastiservice_shows_in_the_metrics_and_goes_with_it() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let key = ObjectKey::new("n", "e");
        let text = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();

        metrics.reconcile_timer().failed();
        drop(metrics.reconcile_timer());
        metrics.mode(&key, Some(Mode::Proxy));
        metrics.scaled(&key, "web", "Deployment-web", "up", true);
        metrics.updated(&key, Mode::Proxy, true);
        let shown = text();
        for line in [
            r#"elasti_operator_mode{crd_name="n/e"} 1"#,
            r#"elasti_operator_reconcile_count{error="error"} 1"#,
            r#"elasti_operator_reconcile_count{error="success"} 1"#,
            r#"elasti_operator_scale_counter{crd_name="n/e",direction="up",error="success",namespace="n",service_name="web",target="Deployment-web"} 1"#,
            r#"elasti_operator_CRD_update_counter{crd_name="n/e",error="success",mode="proxy"} 1"#,
        ] {
            assert!(shown.contains(line), "{line} in {shown}");
        }
        metrics.forget(&key);
        assert!(!text().contains("n/e"), "B40: what is gone leaves no label behind");
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
