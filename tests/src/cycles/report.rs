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

/// A cycle of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cycle {
    /// Name of the Service.
    pub service: String,
    /// Unique among its cycles.
    pub number: usize,
}

/// The report of a run.
#[derive(Debug, Default)]
pub struct Report {
    counts: BTreeMap<(String, Kind, Window), Count>,
    cycles: BTreeMap<Cycle, Count>,
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
    cycles: BTreeMap<&'a str, u64>,
    total: Count,
    rows: Vec<Row<'a>>,
    failures: &'a [String],
    apart: &'a [String],
}

impl Report {
    /// Counts a request. `what` describes it in case it has no answer.
    pub fn add(&mut self, cycle: &Cycle, kind: Kind, window: Window, verdict: Verdict, what: impl FnOnce() -> String) {
        let one = |verdict_is| u64::from(verdict == verdict_is);
        let count = Count { requests: 1, failed: one(Verdict::Failed), apart: one(Verdict::Apart) };
        self.counts.entry((cycle.service.clone(), kind, window)).or_default().add(count);
        self.cycles.entry(cycle.clone()).or_default().add(count);
        match verdict {
            Verdict::Answered => {}
            Verdict::Failed => self.failures.push(what()),
            Verdict::Apart => self.apart.push(what()),
        }
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

    /// The counts of each cycle of the Services that `wanted` names.
    pub fn cycles(&self, wanted: impl Fn(&str) -> bool) -> Vec<Count> {
        self.cycles.iter().filter(|(cycle, _)| wanted(&cycle.service)).map(|(_, count)| *count).collect()
    }

    fn services(&self) -> BTreeMap<&str, u64> {
        self.cycles.keys().fold(BTreeMap::new(), |mut services, cycle| {
            *services.entry(&*cycle.service).or_default() += 1;
            services
        })
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
        let _infallible = write!(
            text,
            "\n{} cycles of {} Services: {} requests, {} failed, {} counted apart",
            self.cycles.len(),
            self.services().len(),
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
            cycles: self.services(),
            total: self.total(),
            rows: rows.collect(),
            failures: &self.failures,
            apart: &self.apart,
        }
    }
}

/// Whether the losses of cycles are not more than those of a control's, as far as so few can tell: the means differ by at
/// most three standard errors. What one pod takes along is lost together, so cycles spread more than independent losses
/// would, and never less.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub fn not_more(lost: &[u64], control: &[u64]) -> bool {
    let mean_and_error = |lost: &[u64]| {
        let count = lost.len().max(1) as f64;
        let mean = lost.iter().sum::<u64>() as f64 / count;
        let squares: f64 = lost.iter().map(|lost| (*lost as f64 - mean).powi(2)).sum();
        (mean, mean.max(squares / (count - 1.0).max(1.0)) / count)
    };
    let ((mean, error), (control_mean, control_error)) = (mean_and_error(lost), mean_and_error(control));
    mean - control_mean <= 3.0 * (error + control_error).sqrt()
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
        assert!(not_more(&[0; 10], &[0; 2]) && not_more(&[10; 10], &[10; 2]) && not_more(&[11; 10], &[10; 2]));
        assert!(!not_more(&[20; 10], &[10; 2]));
        assert!(!not_more(&[1; 10], &[0; 2]), "where the control loses nothing, nothing may be lost over and over");
        assert!(not_more(&[0, 0, 0, 20], &[0; 4]), "one pod with all its connections");
        assert!(!not_more(&[20, 0, 20, 20, 20], &[0; 4]), "one after the other");
    }

    #[test]
    fn requests_are_counted_by_what_became_of_them() {
        let mut report = Report::default();
        let cycle = Cycle { service: "web".to_owned(), number: 0 };
        for verdict in [Verdict::Answered, Verdict::Failed, Verdict::Apart] {
            report.add(&cycle, Kind::KeepAlive, Window::Zero, verdict, || "reset".to_owned());
        }
        report.add(&cycle, Kind::Grpc, Window::Draining, Verdict::Answered, String::new);
        assert_eq!(report.total(), Count { requests: 4, failed: 1, apart: 1 });
        assert_eq!(report.cycles(|service| service == "web"), [report.total()]);
        assert_eq!(report.sum(|_, _, window| window == Window::Draining).requests, 1);
        assert_eq!(report.failures(), ["reset"]);
        assert!(report.table().contains("3 (1 FAILED)"), "{}", report.table());
        assert!(report.json("x", &Report::default()).contains("\"window\": \"zero\""));
    }
}
