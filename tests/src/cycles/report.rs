//! The count: requests by Service, kind and window, those that failed, and those that are counted apart.

use std::collections::BTreeMap;
use std::fmt::Write;

use elasti_traffic::record::Kind;
use serde::Serialize;

use super::timeline::{Verdict, Window};

/// A number of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// All of them.
    pub requests: u64,
    /// Without their right answer, and nothing excuses it.
    pub failed: u64,
    /// Ended with the pod that they were opened to directly.
    pub apart: u64,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.apart += other.apart;
    }
}

/// The report of a run.
#[derive(Debug, Default)]
pub struct Report {
    counts: BTreeMap<(String, Kind, Window), Count>,
    cycles: BTreeMap<String, u64>,
    failures: Vec<String>,
    apart: Vec<String>,
}

#[derive(Serialize)]
struct Row<'a> {
    service: &'a str,
    kind: Kind,
    window: Window,
    #[serde(flatten)]
    count: Count,
}

#[derive(Serialize)]
struct Json<'a> {
    run: &'a str,
    /// Services without ElastiService, scaled down and up by hand under the same load.
    control: Option<Box<Json<'a>>>,
    cycles: &'a BTreeMap<String, u64>,
    total: Count,
    rows: Vec<Row<'a>>,
    failures: &'a [String],
    apart: &'a [String],
}

impl Report {
    /// Counts a request. `what` describes it in case it has no answer.
    pub fn add(&mut self, service: &str, kind: Kind, window: Window, verdict: Verdict, what: impl FnOnce() -> String) {
        let count = self.counts.entry((service.to_owned(), kind, window)).or_default();
        count.requests += 1;
        match verdict {
            Verdict::Answered => {}
            Verdict::Failed => {
                count.failed += 1;
                self.failures.push(what());
            }
            Verdict::Apart => {
                count.apart += 1;
                self.apart.push(what());
            }
        }
    }

    /// Counts cycles of a Service.
    pub fn add_cycles(&mut self, service: &str, cycles: u64) {
        *self.cycles.entry(service.to_owned()).or_default() += cycles;
    }

    /// Requests that count, of those that `wanted` names.
    pub fn sum(&self, wanted: impl Fn(&str, Kind, Window) -> bool) -> Count {
        let mut sum = Count::default();
        for ((service, kind, window), count) in &self.counts {
            if wanted(service, *kind, *window) {
                sum.add(*count);
            }
        }
        sum
    }

    /// All requests.
    pub fn total(&self) -> Count {
        self.sum(|_, _, _| true)
    }

    /// Cycles of the Services that `wanted` names.
    pub fn cycles(&self, wanted: impl Fn(&str) -> bool) -> u64 {
        self.cycles.iter().filter(|(service, _)| wanted(service)).map(|(_, cycles)| cycles).sum()
    }

    /// What is known of each failed request.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// For people: one line a kind, one column a window; `failed` and `apart` stand behind the number where there are any.
    pub fn table(&self) -> String {
        let mut text = format!("{:16}", "");
        for window in Window::ALL {
            let _infallible = write!(text, "{:>21}", window.name());
        }
        for kind in Kind::ALL {
            if self.sum(|_, found, _| found == kind).requests == 0 {
                continue;
            }
            let _infallible = write!(text, "\n{:16}", kind.name());
            for window in Window::ALL {
                let _infallible = write!(text, "{:>21}", cell(self.sum(|_, k, w| (k, w) == (kind, window))));
            }
        }
        let total = self.total();
        let cycles: u64 = self.cycles.values().sum();
        let _infallible = write!(
            text,
            "\n{cycles} cycles of {} Services: {} requests, {} failed, {} counted apart",
            self.cycles.len(),
            total.requests,
            total.failed,
            total.apart
        );
        text
    }

    /// For programs; with the report of the control in the same run.
    pub fn json(&self, run: &str, control: &Self) -> String {
        let json = self.to_json(run, Some(control));
        serde_json::to_string_pretty(&json).expect("numbers and texts are JSON")
    }

    fn to_json<'a>(&'a self, run: &'a str, control: Option<&'a Self>) -> Json<'a> {
        let rows = self.counts.iter().map(|((service, kind, window), count)| Row {
            service,
            kind: *kind,
            window: *window,
            count: *count,
        });
        Json {
            run,
            control: control.map(|control| Box::new(control.to_json("control", None))),
            cycles: &self.cycles,
            total: self.total(),
            rows: rows.collect(),
            failures: &self.failures,
            apart: &self.apart,
        }
    }
}

/// Whether `lost` requests in `cycles` are not more than those of a control, as far as so few cycles can tell: the
/// difference of the means is within three standard deviations of what counts of independent losses spread.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub fn not_more(lost: u64, cycles: u64, control_lost: u64, control_cycles: u64) -> bool {
    let mean = |lost: u64, cycles: u64| lost as f64 / cycles.max(1) as f64;
    let variance = |lost: u64, cycles: u64| mean(lost, cycles) / cycles.max(1) as f64;
    let spread = (variance(lost, cycles) + variance(control_lost, control_cycles)).sqrt();
    mean(lost, cycles) - mean(control_lost, control_cycles) <= 3.0 * spread
}

fn cell(count: Count) -> String {
    match (count.failed, count.apart) {
        (0, 0) => count.requests.to_string(),
        (0, apart) => format!("{} ({apart} apart)", count.requests),
        (failed, _) => format!("{} ({failed} FAILED)", count.requests),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_compared_by_cycle() {
        assert!(not_more(0, 10, 0, 2));
        assert!(not_more(100, 10, 20, 2) && not_more(105, 10, 20, 2));
        assert!(!not_more(200, 10, 20, 2));
        assert!(!not_more(10, 10, 0, 2), "where the control loses nothing, nothing may be lost over and over");
    }

    #[test]
    fn requests_are_counted_by_what_became_of_them() {
        let mut report = Report::default();
        for verdict in [Verdict::Answered, Verdict::Failed, Verdict::Apart] {
            report.add("web", Kind::KeepAlive, Window::Zero, verdict, || "reset".to_owned());
        }
        report.add("web", Kind::Grpc, Window::Draining, Verdict::Answered, String::new);
        report.add_cycles("web", 1);
        assert_eq!(report.total(), Count { requests: 4, failed: 1, apart: 1 });
        assert_eq!(report.sum(|_, _, window| window == Window::Draining).requests, 1);
        assert_eq!(report.failures(), ["reset"]);
        assert!(report.table().contains("3 (1 FAILED)"), "{}", report.table());
        assert!(report.json("x", &Report::default()).contains("\"window\": \"zero\""));
    }
}
