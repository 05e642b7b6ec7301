use std::ffi::OsString;

use super::*;

fn config(arguments: &[&str]) -> Result<Config, Faults> {
    let arguments = ["elasti-operator"].iter().chain(arguments).map(OsString::from);
    Config::new(&elasti_runtime::config::parse(arguments).unwrap())
}

#[test]
fn the_defaults_are_those_of_the_installation() {
    let config = config(&["--pod-name=p"]).unwrap();
    assert_eq!((config.port, config.health_port, config.stream_port), (8013, 8081, 8014));
    assert_eq!(config.allowed_service_accounts, ["elasti:elasti-resolver"]);
    assert_eq!((config.polling_interval.as_secs(), config.kube_proxy_sync.as_secs()), (30, 2));
    assert_eq!((config.cluster_domain.as_str(), config.notify_without_token), ("cluster.local", false));
}

#[test]
fn resolvers_of_another_namespace_are_allowed_by_its_name() {
    let config = config(&["--pod-name=p", "--operator-namespace=a", "--resolver-namespace=b"]).unwrap();
    assert_eq!(config.allowed_service_accounts, ["b:elasti-resolver"]);
}

#[test]
fn b43_little_is_logged_unless_more_is_wanted() {
    assert_eq!(config(&["--pod-name=p"]).unwrap().log_level, "info".parse().unwrap());
    assert_eq!(config(&["--pod-name=p", "--log-level=debug"]).unwrap().log_level, "debug".parse().unwrap());
}

#[test]
fn namespaces_are_all_unless_they_are_named() {
    assert!(config(&["--pod-name=p"]).unwrap().watch_namespaces.is_empty());
    assert_eq!(config(&["--pod-name=p", "--watch-namespaces=shop, a,shop,"]).unwrap().watch_namespaces, ["a", "shop"]);
}

#[test]
fn what_an_elasti_service_does_not_say_of_holding_can_be_set_for_all() {
    assert_eq!(config(&["--pod-name=p"]).unwrap().hold, HoldPolicy::DEFAULT);
    let of_kubeelasti = ["--pod-name=p", "--req-timeout=30", "--queue-size=500", "--max-queue-concurrency=20"];
    let hold = config(&of_kubeelasti).unwrap().hold;
    assert_eq!((hold.timeout.as_secs(), hold.max_connections, hold.concurrency), (30, 500, Some(20)));
    assert_eq!(config(&["--pod-name=p", "--req-timeout=1m30s"]).unwrap().hold.timeout.as_secs(), 90);
}

#[test]
fn every_fault_is_told_at_once() {
    let told = config(&[
        "--operator-port=70000",
        "--health-port=8014",
        "--polling-interval=30",
        "--kube-proxy-sync=-1s",
        "--max-slice-endpoints=0",
        "--allowed-service-accounts=resolver",
        "--prometheus-trigger-server-address=prometheus:9090",
        "--log-format=xml",
        "--watch-namespaces=shop,Web",
        "--req-timeout=25h",
        "--queue-size=0",
        "--max-queue-concurrency=x",
        "--sentry-dsn=here",
    ])
    .unwrap_err()
    .to_string();
    for flag in [
        "--pod-name",
        "--operator-port:",
        "must differ",
        "--polling-interval",
        "--kube-proxy-sync",
        "--max-slice-endpoints",
        "--allowed-service-accounts",
        "--prometheus-trigger-server-address",
        "--log-format",
        "--watch-namespaces: 'Web'",
        "--req-timeout",
        "--queue-size",
        "--max-queue-concurrency",
        "--sentry-dsn",
    ] {
        assert!(told.contains(flag), "{flag} in {told}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let dsn = "--sentry-dsn=https://k3y@sentry.invalid/1";
    let config = config(&["--pod-name=p", "--prometheus-trigger-authorization-header=Bearer x7z", dsn]).unwrap();
    assert_eq!(config.prometheus_authorization.0, "Bearer x7z");
    let shown = format!("{config:?}");
    assert!(!shown.contains("k3y") && shown.contains("sentry.invalid"), "{shown}");
    assert!(!shown.contains("x7z") && shown.contains("(hidden)"), "{shown}");
}
