//! A wake on the whole cluster takes as long as the pod, and not as long as kubelet's probes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::time::{Duration, Instant, SystemTime};

use elasti_tests::cluster::{Sandbox, Target, from_pod, metric, until};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

/// How much sooner than kubelet says so, at the least: with a period of 10 s it is some 8 s on a machine with nothing else to do.
const SOONER: Duration = Duration::from_secs(3);

/// nginx that is up after 300 ms.
fn quick() -> Target {
    let mut target = Target::nginx("web");
    target.command = ["sh", "-c", "sleep 0.3; exec nginx -g 'daemon off;'"].map(str::to_owned).to_vec();
    target
}

/// When kubelet called the target's only pod ready; nothing before it has.
fn called_ready(sandbox: &Sandbox, target: &Target) -> Option<SystemTime> {
    let pod: Pod = serde_json::from_value(sandbox.pods(target).pop()?).unwrap();
    let conditions = pod.status?.conditions?;
    let ready = conditions.into_iter().find(|condition| condition.type_ == "Ready" && condition.status == "True")?;
    Some(ready.last_transition_time?.0.into())
}

/// Puts the target to sleep and calls it; says how long that took and what kubelet said at that moment.
fn woken(sandbox: &Sandbox, target: &Target) -> (Duration, SystemTime) {
    sandbox.target(target);
    sandbox.sleep(target);
    let url = format!("http://{}/", sandbox.cluster_address(target, 80));
    let started = Instant::now();
    let answer = from_pod(2, &["curl", "-sS", "--max-time", "60", &url]);
    let (took, answered) = (started.elapsed(), SystemTime::now());
    assert!(answer.starts_with("nginx on web-"), "{answer}");
    (took, answered)
}

#[test]
fn a_target_that_is_up_after_300_ms_answers_long_before_kubelet_calls_it_ready() {
    let (sandbox, mut target) = (Sandbox::new("waking"), quick());
    let probe = json!({"httpGet": {"path": "/", "port": 80}, "periodSeconds": 10});
    target.container = json!({"readinessProbe": probe});
    let (took, answered) = woken(&sandbox, &target);
    assert_eq!(called_ready(&sandbox, &target), None, "kubelet has not even asked");
    assert_eq!(sandbox.mode(&target).as_deref(), Some("proxy"), "clients reach it directly when its slice says so");
    let ready = until("kubelet calls it ready", || called_ready(&sandbox, &target));
    let sooner = ready.duration_since(answered).unwrap_or_default();
    eprintln!("answered after {} ms, {} ms before kubelet called it ready", took.as_millis(), sooner.as_millis());
    assert!(sooner >= SOONER, "answered {sooner:?} before kubelet called it ready");
    assert!(metric("elasti_resolver_readiness_probes_total", "success") > 0.5);
    sandbox.awake(&target);
}

#[test]
fn a_target_whose_probe_runs_in_the_container_is_waited_for_until_kubelet_calls_it_ready() {
    let (sandbox, mut target) = (Sandbox::new("exec-probe"), quick());
    let probe = json!({"exec": {"command": ["true"]}, "periodSeconds": 5});
    target.container = json!({"readinessProbe": probe});
    woken(&sandbox, &target);
    assert!(called_ready(&sandbox, &target).is_some(), "kubelet has called it ready");
    sandbox.awake(&target);
}
