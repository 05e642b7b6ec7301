//! Dashboard, alert rules and documents name metrics that the programs have.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;

use elasti_tests::monitoring::{Known, dashboard_expressions, file, named, rules};

#[test]
fn every_metric_that_is_named_exists() {
    let known = Known::new().unwrap();
    assert!(!known.has("elasti_operator_moon") && known.has("elasti_operator_reconcile_bucket"));
    let mut texts = vec![
        ("the alert rules", rules().unwrap().to_string()),
        ("the dashboard", dashboard_expressions().unwrap().join("\n")),
    ];
    for document in ["README.md", "docs/metrics.md", "docs/waking.md", "docs/architecture.md", "docs/connections.md"] {
        texts.push((document, fs::read_to_string(file(document)).unwrap()));
    }
    for (of, text) in texts {
        let unknown: Vec<String> = named(&text).into_iter().filter(|name| !known.has(name)).collect();
        assert!(unknown.is_empty(), "{of} names {unknown:?}, which no program has");
    }
}
