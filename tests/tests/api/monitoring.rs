//! Prometheus's own checker reads the alert rules and the dashboard's expressions, and fires an alert.

use std::fs;
use std::path::Path;
use std::process::Command;

use elasti_tests::monitoring::{dashboard_expressions, rules};
use serde_json::{Value, json};

/// Runs `promtool`, whose path the level is given.
fn promtool(arguments: &[&str], file: &Path) -> String {
    let program = std::env::var_os("PROMTOOL").expect("cargo xtask test --only api names promtool");
    let output = Command::new(program).args(arguments).arg(file).output().unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}");
    told
}

/// YAML is a superset of JSON.
fn write(directory: &Path, name: &str, content: &Value) -> std::path::PathBuf {
    let path = directory.join(name);
    fs::write(&path, content.to_string()).unwrap();
    path
}

#[test]
fn prometheus_takes_the_alert_rules_and_the_expressions_of_the_dashboard() {
    let directory = tempfile::tempdir().unwrap();
    let told = promtool(&["check", "rules"], &write(directory.path(), "rules.json", &rules().unwrap()));
    assert!(told.contains("SUCCESS"), "{told}");
    let record = |(number, expression): (usize, String)| json!({"record": format!("r{number}"), "expr": expression});
    let records: Vec<Value> = dashboard_expressions().unwrap().into_iter().enumerate().map(record).collect();
    let dashboard = json!({"groups": [{"name": "dashboard", "rules": records}]});
    promtool(&["check", "rules"], &write(directory.path(), "dashboard.json", &dashboard));
}

#[test]
fn alerts_fire_when_clients_wait_or_are_refused_and_not_before() {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path(), "rules.json", &rules().unwrap());
    let held = r#"elasti_resolver_held_connections{namespace="n",service="s",pod="p"}"#;
    let closed = r#"elasti_resolver_closed_connections_total{namespace="n",service="s",reason="timeout",pod="p"}"#;
    let alert = |at: &str, name: &str, fires: bool, labels: Value| {
        let expected = if fires { json!([{"exp_labels": labels}]) } else { json!([]) };
        json!({"eval_time": at, "alertname": name, "exp_alerts": expected})
    };
    let mut waits =
        alert("7m", "ElastiClientsWait", true, json!({"namespace": "n", "service": "s", "severity": "warning"}));
    waits["exp_alerts"][0]["exp_annotations"] =
        annotations("ElastiClientsWait", &[("namespace", "n"), ("service", "s")]);
    let labels = json!({"namespace": "n", "service": "s", "reason": "timeout", "severity": "critical"});
    let mut refused = alert("9m", "ElastiClientsRefused", true, labels);
    let values = [("namespace", "n"), ("service", "s"), ("reason", "timeout")];
    refused["exp_alerts"][0]["exp_annotations"] = annotations("ElastiClientsRefused", &values);
    let tests = json!({"rule_files": ["rules.json"], "evaluation_interval": "1m", "tests": [{
        "interval": "1m",
        "input_series": [
            {"series": held, "values": "0 1+0x8 0"},
            {"series": closed, "values": "0x7 1x3"},
        ],
        "alert_rule_test": [
            alert("4m", "ElastiClientsWait", false, Value::Null), waits,
            alert("4m", "ElastiClientsRefused", false, Value::Null), refused,
        ],
    }]});
    promtool(&["test", "rules"], &write(directory.path(), "tests.json", &tests));
}

/// A rule's annotations with its labels filled in.
fn annotations(alert: &str, labels: &[(&str, &str)]) -> Value {
    let rules = rules().unwrap();
    let all = rules["groups"][0]["rules"].as_array().unwrap();
    let rule = all.iter().find(|rule| rule["alert"] == alert).unwrap_or_else(|| panic!("no alert {alert}"));
    let fill = |text: String, (label, value): &(&str, &str)| text.replace(&format!("{{{{ $labels.{label} }}}}"), value);
    serde_json::from_str(&labels.iter().fold(rule["annotations"].to_string(), fill)).unwrap()
}
