//! Which watches are up to date, as of the moment at which the metrics are read.
//!
//! A watch that has failed goes on where it ended and says so by nothing until an object changes; while it cannot, it fails again and
//! again. So one that has not failed for a while is taken to see again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntGaugeVec, Opts, Result};

/// Longer than a watch that cannot see takes to fail again: connecting takes 30 s at most (kube's default), an answer 20 s, and the wait
/// in between 2 s.
const RECOVERED: Duration = Duration::from_mins(1);

/// What is known of the watches of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    complete: bool,
    failed: Option<Instant>,
}

impl Seen {
    fn up_to_date(self, now: Instant) -> bool {
        let recovered = self.failed.is_none_or(|failed| now.saturating_duration_since(failed) >= RECOVERED);
        self.complete && recovered
    }
}

/// The gauge; clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Watches {
    kinds: Arc<Mutex<HashMap<String, Seen>>>,
    gauge: IntGaugeVec,
}

impl Watches {
    /// Of no kind yet.
    pub(super) fn new() -> Result<Self> {
        let options =
            Opts::new("elasti_operator_informer_count", "Watches that have read all objects and see their changes.");
        Ok(Self { kinds: Arc::default(), gauge: IntGaugeVec::new(options, &["informer_name"])? })
    }

    /// All objects of a kind have been read.
    pub(super) fn complete(&self, kind: &str) {
        self.kinds().entry(kind.to_owned()).or_default().complete = true;
    }

    /// A watch of a kind has failed.
    pub(super) fn failed(&self, kind: &str, now: Instant) {
        self.kinds().entry(kind.to_owned()).or_default().failed = Some(now);
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<String, Seen>> {
        // Every change is one insertion or assignment, so a poisoned lock still guards a sound table.
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, now: Instant) {
        for (kind, seen) in self.kinds().iter() {
            self.gauge.with_label_values(&[kind]).set(seen.up_to_date(now).into());
        }
    }
}

impl Collector for Watches {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.set(Instant::now());
        self.gauge.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps out an alert that stayed after a watch was cut once.
    #[test]
    fn a_watch_that_failed_once_is_up_to_date_again_and_one_that_keeps_failing_is_not() {
        let (watches, start) = (Watches::new().unwrap(), Instant::now());
        let shown = |seconds: u64| {
            watches.set(start + Duration::from_secs(seconds));
            watches.gauge.with_label_values(&["Service"]).get()
        };
        watches.failed("Service", start);
        assert_eq!(shown(120), 0, "nothing has been read");
        watches.complete("Service");
        assert_eq!((shown(30), shown(60)), (0, 1));
        for seconds in [100, 150, 200] {
            watches.failed("Service", start + Duration::from_secs(seconds));
            assert_eq!(shown(seconds + 50), 0);
        }
        assert_eq!(shown(260), 1);
    }
}
