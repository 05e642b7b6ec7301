//! A wake on the whole cluster takes as long as the pod, and not as long as kubelet's probes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::{Duration, Instant, SystemTime};

use elasti_tests::cluster::{Sandbox, Target, from_pod, kubectl, metric, until};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// How much sooner than kubelet says so, at the least: with a period of 10 s it is some 8 s on a machine with nothing else to do.
const SOONER: Duration = Duration::from_secs(3);

/// nginx that listens so many seconds after its container has started, which it logs, with this readiness probe.
fn nginx(up_after: &str, probe: &Value) -> Target {
    let mut target = Target::nginx("web");
    let script = format!("echo started $(date +%s%N); sleep {up_after}; exec nginx -g 'daemon off;'");
    target.command = ["sh", "-c", &script].map(str::to_owned).to_vec();
    target.container = json!({"readinessProbe": probe});
    target
}

/// When kubelet called the target's only pod ready; nothing before it has.
fn called_ready(sandbox: &Sandbox, target: &Target) -> Option<SystemTime> {
    let pod: Pod = serde_json::from_value(sandbox.pods(target).pop()?).unwrap();
    let conditions = pod.status?.conditions?;
    let ready = conditions.into_iter().find(|condition| condition.type_ == "Ready" && condition.status == "True")?;
    Some(ready.last_transition_time?.0.into())
}

/// When the container of the target's only pod started, as it has logged.
fn container_started(sandbox: &Sandbox, target: &Target) -> SystemTime {
    let pod = sandbox.pods(target).pop().unwrap();
    let log = kubectl(&["-n", &sandbox.namespace, "logs", pod["metadata"]["name"].as_str().unwrap()]);
    let nanoseconds = log.lines().find_map(|line| line.strip_prefix("started ")?.trim().parse().ok());
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds.expect("the container logs when it starts"))
}

/// Calls a target at zero; says how long that took and when it was over.
fn woken(sandbox: &Sandbox, target: &Target) -> (Duration, SystemTime) {
    sandbox.sleeping_target(target);
    let url = format!("http://{}/", sandbox.cluster_address(target, 80));
    let started = Instant::now();
    let answer = from_pod(2, &["curl", "-sS", "--max-time", "60", &url]);
    let (took, answered) = (started.elapsed(), SystemTime::now());
    assert!(answer.starts_with("nginx on web-"), "{answer}");
    (took, answered)
}

/// Kubelet of Kubernetes 1.34 asks out of turn whenever a pod's state changes, mostly within a second after its container has
/// started; who is not up by then is asked again only after the period.
#[test]
fn a_target_that_is_up_between_two_probes_of_kubelet_answers_long_before_kubelet_calls_it_ready() {
    let sandbox = Sandbox::new("waking");
    let target = nginx("2.3", &json!({"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 10}));
    let target = Target { container: with_port(target.container, "http"), ..target };
    let (took, answered) = woken(&sandbox, &target);
    assert_eq!(called_ready(&sandbox, &target), None, "kubelet has not asked again");
    assert_eq!(sandbox.mode(&target).as_deref(), Some("proxy"), "clients reach it directly when its slice says so");
    let ready = until("kubelet calls it ready", || called_ready(&sandbox, &target));
    let sooner = ready.duration_since(answered).unwrap_or_default();
    eprintln!("answered after {} ms, {} ms before kubelet called it ready", took.as_millis(), sooner.as_millis());
    assert!(sooner >= SOONER, "answered {sooner:?} before kubelet called it ready");
    assert!(metric("elasti_resolver_readiness_probes_total", "success") > 0.5);
    sandbox.awake(&target);
}

/// Kubelet's turns are at 10 s, 20 s and so on after the container's start: the delay keeps it from asking out of turn before.
#[test]
fn a_target_that_is_up_after_300_ms_answers_then_and_not_at_kubelets_first_turn_after_10_s() {
    let sandbox = Sandbox::new("at-once");
    let probe = json!({"httpGet": {"path": "/", "port": 80}, "periodSeconds": 10, "initialDelaySeconds": 10});
    let target = nginx("0.3", &probe);
    let (_, answered) = woken(&sandbox, &target);
    assert_eq!(called_ready(&sandbox, &target), None, "kubelet has not asked yet");
    let after = answered.duration_since(container_started(&sandbox, &target)).unwrap();
    eprintln!("answered {} ms after the container's start", after.as_millis());
    assert!((Duration::from_millis(300)..SOONER).contains(&after), "answered {after:?} after the container's start");
    let ready = until("kubelet calls it ready", || called_ready(&sandbox, &target));
    assert!(ready.duration_since(answered).unwrap_or_default() >= SOONER, "kubelet would have kept the client waiting");
    sandbox.awake(&target);
}

/// The container with a name for nginx's port.
fn with_port(mut container: Value, name: &str) -> Value {
    container["ports"] = json!([{"name": name, "containerPort": 80}]);
    container
}

#[test]
fn a_target_whose_probe_runs_in_the_container_is_waited_for_until_kubelet_calls_it_ready() {
    let sandbox = Sandbox::new("exec-probe");
    let target = nginx("0.3", &json!({"exec": {"command": ["true"]}, "periodSeconds": 5}));
    woken(&sandbox, &target);
    assert!(called_ready(&sandbox, &target).is_some(), "kubelet has called it ready");
    sandbox.awake(&target);
}

#[test]
fn a_frontend_wakes_with_its_database() {
    let (sandbox, mut web, cache) = (Sandbox::new("together"), Target::nginx("web"), Target::redis("cache"));
    web.spec = json!({"wakeWith": [{"name": "cache"}]});
    sandbox.sleeping_target(&cache);
    woken(&sandbox, &web);
    sandbox.awake(&cache);
}
