//! wrk: asks as fast as it is answered, and says how that went.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tempfile::NamedTempFile;

use crate::process::Cores;

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wrk {
    /// At once.
    pub(crate) connections: usize,
    /// Connections last for many requests, or for one.
    pub(crate) kept: bool,
    /// For how long, in whole seconds.
    pub(crate) length: Duration,
}

/// What it says.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Told {
    /// That were answered.
    pub(crate) requests: u32,
    microseconds: u32,
    /// Latency in microseconds.
    pub(crate) p50: f64,
    /// As above.
    pub(crate) p99: f64,
    errors: u32,
}

impl Told {
    /// Requests a second.
    pub(crate) fn rate(&self) -> f64 {
        f64::from(self.requests) * 1e6 / f64::from(self.microseconds)
    }
}

impl Wrk {
    /// Asks for this; a request that is not answered is an error.
    pub(crate) fn run(self, cores: Cores, url: &str) -> Result<Told> {
        let script = NamedTempFile::new()?;
        std::fs::write(script.path(), include_str!("../config/report.lua"))?;
        let threads = cores.count().min(self.connections);
        let mut wrk: Command = cores.command("wrk");
        wrk.args([format!("-t{threads}"), format!("-c{}", self.connections), format!("-d{}s", self.length.as_secs())]);
        wrk.arg("-s").arg(script.path());
        if !self.kept {
            wrk.args(["-H", "Connection: close"]);
        }
        let output = wrk.arg(url).output().with_context(|| format!("cannot start {wrk:?}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().rev().find(|line| line.starts_with('{'));
        let line = line.with_context(|| format!("{wrk:?}: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
        let told: Told = serde_json::from_str(line)?;
        if told.errors > 0 || told.requests == 0 {
            bail!("{wrk:?}: {} requests, {} errors", told.requests, told.errors);
        }
        Ok(told)
    }
}
