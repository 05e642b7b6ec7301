//! How long targets have been at zero, and what that has saved. Counted by the Lease holder alone, so that the sum over all
//! replicas is right; as of the moment at which the metrics are read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, Opts, Result};

use crate::observed::ObjectKey;

/// A target at zero, since when it has not been counted.
#[derive(Clone, Copy, Debug)]
struct AtZero {
    since: Instant,
    replicas: u32,
}

impl AtZero {
    /// The time that is counted up to `now`; it is counted no second time.
    fn take(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.since);
        self.since = now;
        passed
    }
}

#[derive(Debug, Default)]
struct Table {
    leading: bool,
    at_zero: HashMap<ObjectKey, AtZero>,
}

/// The counters; clones are the same.
#[derive(Clone, Debug)]
pub(super) struct ZeroTime {
    table: Arc<Mutex<Table>>,
    seconds: CounterVec,
    saved: CounterVec,
}

impl ZeroTime {
    /// Nothing is at zero yet, and this replica does not lead.
    pub(super) fn new() -> Result<Self> {
        let counter = |name: &str, help: &str| CounterVec::new(Opts::new(name, help), &["namespace", "crd_name"]);
        Ok(Self {
            table: Arc::default(),
            seconds: counter("elasti_operator_zero_seconds_total", "Seconds that a target has been at zero.")?,
            saved: counter(
                "elasti_operator_saved_replica_seconds_total",
                "Replicas that a wake starts, times the seconds that they have not run.",
            )?,
        })
    }

    /// This replica leads from `now` on, or no longer.
    pub(super) fn lead(&self, leading: bool, now: Instant) {
        let mut table = self.table();
        if table.leading {
            self.count(&mut table, now);
        }
        if leading && !table.leading {
            table.at_zero.values_mut().for_each(|at_zero| at_zero.since = now);
        }
        table.leading = leading;
    }

    /// What is known of a target `now`: `replicas` that a wake starts if it is at zero.
    pub(super) fn observe(&self, elasti: &ObjectKey, replicas: Option<u32>, now: Instant) {
        let mut table = self.table();
        let leading = table.leading;
        match (table.at_zero.get_mut(elasti), replicas) {
            (None, None) => {}
            (None, Some(replicas)) => drop(table.at_zero.insert(elasti.clone(), AtZero { since: now, replicas })),
            (Some(known), wanted) => {
                if leading {
                    self.add(elasti, known, now);
                }
                match wanted {
                    Some(replicas) => known.replicas = replicas,
                    None => drop(table.at_zero.remove(elasti)),
                }
            }
        }
    }

    /// The ElastiService is gone.
    pub(super) fn forget(&self, elasti: &ObjectKey) {
        self.table().at_zero.remove(elasti);
        let labels = [elasti.namespace.as_str(), &elasti.to_string()];
        // Fails only when there was nothing to remove.
        drop(self.seconds.remove_label_values(&labels));
        drop(self.saved.remove_label_values(&labels));
    }

    fn count(&self, table: &mut Table, now: Instant) {
        for (elasti, at_zero) in &mut table.at_zero {
            self.add(elasti, at_zero, now);
        }
    }

    fn add(&self, elasti: &ObjectKey, at_zero: &mut AtZero, now: Instant) {
        let passed = at_zero.take(now).as_secs_f64();
        let labels = [elasti.namespace.as_str(), &elasti.to_string()];
        self.seconds.with_label_values(&labels).inc_by(passed);
        self.saved.with_label_values(&labels).inc_by(passed * f64::from(at_zero.replicas));
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is one insertion, removal or assignment, so a poisoned lock still guards a sound table.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for ZeroTime {
    fn desc(&self) -> Vec<&Desc> {
        self.seconds.desc().into_iter().chain(self.saved.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut table = self.table();
        if table.leading {
            self.count(&mut table, Instant::now());
        }
        drop(table);
        self.seconds.collect().into_iter().chain(self.saved.collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(zero: &ZeroTime) -> (f64, f64) {
        let labels = ["n", "n/e"];
        (zero.seconds.with_label_values(&labels).get(), zero.saved.with_label_values(&labels).get())
    }

    #[test]
    fn the_leader_counts_the_time_at_zero_and_the_replicas_that_did_not_run() {
        let (zero, key) = (ZeroTime::new().unwrap(), ObjectKey::new("n", "e"));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        zero.observe(&key, Some(3), at(0));
        zero.lead(true, at(10));
        zero.observe(&key, Some(3), at(15));
        zero.observe(&key, None, at(20));
        zero.observe(&key, None, at(30));
        assert_eq!(counted(&zero), (10.0, 30.0), "not before it leads, and not when it is awake");
        zero.observe(&key, Some(1), at(40));
        zero.lead(false, at(45));
        zero.observe(&key, None, at(60));
        assert_eq!(counted(&zero), (15.0, 35.0), "not when another replica leads");
        zero.forget(&key);
        assert!(zero.collect().iter().all(|family| family.get_metric().is_empty()));
    }
}
