//! What `config/monitoring` says, read for tests: which metrics its expressions name, and which metrics the programs have.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use elasti_runtime::admin::{Readiness, Routes};
use elasti_runtime::telemetry::{Format, Level, subscriber};
use prometheus::{IntGauge, Registry};
use serde_json::Value;

/// A file of the repository.
pub fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// The alert rules, as Prometheus reads them: the `spec` of the object.
pub fn rules() -> Result<Value> {
    let object: Value = serde_yaml_ng::from_str(&fs::read_to_string(file("config/monitoring/rules.yaml"))?)?;
    object.get("spec").cloned().context("a PrometheusRule has a spec")
}

/// The dashboard's expressions, with Grafana's variables filled in.
pub fn dashboard_expressions() -> Result<Vec<String>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(file("config/monitoring/dashboard.json"))?)?;
    let panels = dashboard["panels"].as_array().context("a dashboard has panels")?;
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let expressions: Option<Vec<String>> = targets.map(|target| target["expr"].as_str().map(filled)).collect();
    expressions.filter(|all| !all.is_empty()).context("each target of a panel has an expression")
}

fn filled(expression: &str) -> String {
    let filled = expression.replace("$__rate_interval", "5m").replace("$__range", "6h");
    filled.replace("$namespace", ".*")
}

/// The names in a text that begin like those of our metrics.
pub fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = |word: &&str| ["elasti_operator_", "elasti_resolver_"].iter().any(|prefix| word.starts_with(prefix));
    words.filter(ours).map(str::to_owned).collect()
}

/// The metrics of both programs.
pub struct Known(Vec<Registry>);

impl Known {
    /// Registers all metrics as the programs do.
    pub fn new() -> Result<Self> {
        let (operator, resolver) = (Registry::new(), Registry::new());
        elasti_operator::metrics::Metrics::new(&operator)?;
        elasti_resolver::metrics::Metrics::new(&resolver)?;
        let (_subscriber, levels) = subscriber(Format::Text, &Level::default());
        Routes::new("test", "0", operator.clone(), Readiness::default(), levels)?;
        Ok(Self(vec![operator, resolver]))
    }

    /// Whether a program has a metric of this name, or a histogram that a part of this name belongs to.
    pub fn has(&self, name: &str) -> bool {
        let parts = ["_bucket", "_sum", "_count"].iter().filter_map(|part| name.strip_suffix(part));
        std::iter::once(name).chain(parts).any(|name| self.registered(name))
    }

    /// A name can be registered once. What is registered here meanwhile is taken back.
    fn registered(&self, name: &str) -> bool {
        let Ok(gauge) = IntGauge::new(name, "is it there?") else { return false };
        self.0.iter().any(|registry| {
            let taken = registry.register(Box::new(gauge.clone())).is_err();
            if !taken {
                drop(registry.unregister(Box::new(gauge.clone())));
            }
            taken
        })
    }
}
