//! The suites, and what they all have.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::report::Outcome;

pub(crate) mod burst;
pub(crate) mod connect;
pub(crate) mod failover;
pub(crate) mod flip;
pub(crate) mod hold;
pub(crate) mod proxy;
pub(crate) mod scale;
pub(crate) mod wake;
pub(crate) mod warm;

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// Throughput, latency and CPU time while the resolver is in the path, beside `HAProxy` and nobody
    Proxy,
    /// Memory of held connections and of idle interception ports
    Hold,
    /// Many held connections that are released at once
    Burst,
    /// What the eBPF programs cost a connection
    Connect,
    /// What the operator takes for many `ElastiServices` and many resolvers, before a real API server
    Scale,
    /// What is missed when a process of Elasti is killed, on a real cluster
    Failover,
    /// How soon every node redirects, and stops to, on a real cluster
    Flip,
    /// What a wake costs beyond what the pod needs, on a real cluster
    Wake,
    /// A Service that is not intercepted, with and without Elasti, on a real cluster
    Warm,
}

impl Suite {
    /// Those that need no cluster, in the order in which they run.
    pub(crate) fn all() -> Vec<Self> {
        vec![Self::Proxy, Self::Hold, Self::Burst, Self::Connect]
    }

    /// In reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Hold => "hold",
            Self::Burst => "burst",
            Self::Connect => "connect",
            Self::Failover => "failover",
            Self::Flip => "flip",
            Self::Scale => "scale",
            Self::Wake => "wake",
            Self::Warm => "warm",
        }
    }

    /// Measures.
    pub(crate) fn run(self, bench: &Bench) -> Result<Outcome> {
        match self {
            Self::Proxy => proxy::run(bench),
            Self::Hold => hold::run(bench),
            Self::Burst => burst::run(bench),
            Self::Connect => connect::run(bench),
            Self::Failover => failover::run(bench),
            Self::Flip => flip::run(bench),
            Self::Scale => scale::run(bench),
            Self::Wake => wake::run(bench),
            Self::Warm => warm::run(bench),
        }
    }
}

/// What suites have in common.
#[derive(Debug)]
pub(crate) struct Bench {
    /// Where operators live, and clients.
    pub(crate) runtime: tokio::runtime::Runtime,
    /// The resolver's program.
    pub(crate) resolver: PathBuf,
    /// The operator's program, where a suite runs it itself.
    pub(crate) operator: Option<PathBuf>,
    /// Where tables go, and what is worth a look.
    pub(crate) out: PathBuf,
    /// Less than a minute; decides nothing.
    pub(crate) short: bool,
    /// How many wakes or flips of each kind, if that is said.
    pub(crate) wakes: Option<usize>,
}

impl Bench {
    /// How often everything is repeated.
    pub(crate) fn rounds(&self) -> usize {
        if self.short { 1 } else { 5 }
    }

    /// How long one run of load takes.
    pub(crate) fn load(&self) -> Duration {
        Duration::from_secs(if self.short { 1 } else { 2 })
    }
}

/// The value below which this part of them lies, by nearest rank: of few values a high one is the largest. `None` of nothing.
pub(crate) fn percentile(values: &[f64], part: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "few values"
    )]
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// How a cost grows between two sizes: the exponent of the power that leads from one to the other. 1 is linear.
pub(crate) fn growth(small: (f64, f64), large: (f64, f64)) -> f64 {
    (large.1 / small.1).ln() / (large.0 / small.0).ln()
}

/// Growth that is worse than linear, with room for noise.
pub(crate) const LINEAR: f64 = 1.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.99)), (Some(100.0), Some(198.0)));
        assert_eq!((percentile(&[3.0, 7.0], 0.99), percentile(&[], 0.5)), (Some(7.0), None));
    }

    #[test]
    fn growth_is_the_slope_on_logarithmic_axes() {
        assert!((growth((10.0, 5.0), (1000.0, 500.0)) - 1.0).abs() < 1e-9);
        assert!((growth((10.0, 1.0), (100.0, 100.0)) - 2.0).abs() < 1e-9);
    }
}
