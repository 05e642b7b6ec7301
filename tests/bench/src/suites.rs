//! The suites, and what they all have.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::report::Outcome;

pub(crate) mod burst;
pub(crate) mod hold;
pub(crate) mod proxy;

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Suite {
    /// Throughput, latency and CPU time while the resolver is in the path, beside `HAProxy` and nobody
    Proxy,
    /// Memory of held connections and of idle interception ports
    Hold,
    /// Many held connections that are released at once
    Burst,
}

impl Suite {
    /// In the order in which they run.
    pub(crate) fn all() -> Vec<Self> {
        vec![Self::Proxy, Self::Hold, Self::Burst]
    }

    /// In reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Hold => "hold",
            Self::Burst => "burst",
        }
    }

    /// Measures.
    pub(crate) fn run(self, bench: &Bench) -> Result<Outcome> {
        match self {
            Self::Proxy => proxy::run(bench),
            Self::Hold => hold::run(bench),
            Self::Burst => burst::run(bench),
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
    /// Less than a minute; decides nothing.
    pub(crate) short: bool,
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
    fn growth_is_the_slope_on_logarithmic_axes() {
        assert!((growth((10.0, 5.0), (1000.0, 500.0)) - 1.0).abs() < 1e-9);
        assert!((growth((10.0, 1.0), (100.0, 100.0)) - 2.0).abs() < 1e-9);
    }
}
