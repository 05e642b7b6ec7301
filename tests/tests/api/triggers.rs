//! Idleness: what puts a target to sleep, and what never does.

use std::time::{Duration, Instant};

use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{
    Cluster, Operator, Prometheus, Resolver, Sandbox, Says, deployment, elasti_service, ready_endpoint, reason,
    service, until,
};
use serde_json::json;

/// Seconds without traffic before the target sleeps.
const COOLDOWN: u32 = 1;

/// A running target whose idleness a Prometheus tells.
async fn running(cluster: &Cluster, prometheus: &Prometheus) -> (Sandbox, Operator, Resolver) {
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 1)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
    let spec = json!({"cooldownPeriod": COOLDOWN, "triggers": [prometheus.trigger()]});
    sandbox.create(elasti_service("web", spec)).await;
    sandbox.until("web", "mode serve", |elasti| elasti["status"]["mode"] == "serve").await;
    (sandbox, operator, resolver)
}

/// The cooldown passes twice over while the trigger is asked on and on, and the target stays up.
async fn stays_up(sandbox: &Sandbox, prometheus: &Prometheus) {
    let (since, asked) = (Instant::now(), prometheus.asked());
    until("time enough to fall asleep", async || {
        assert_eq!(sandbox.replicas("web").await, 1);
        let long = since.elapsed() > 2 * Duration::from_secs(COOLDOWN.into());
        (long && prometheus.asked() > asked + 4).then_some(())
    })
    .await;
}

async fn falls_asleep(sandbox: &Sandbox) {
    let intercepted = sandbox.until("web", "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
    assert_eq!(intercepted["status"]["lastScaledUpTime"], json!(null));
    until("the target sleeps", async || (sandbox.replicas("web").await == 0).then_some(())).await;
    assert!(sandbox.slice("web").await.is_some(), "intercepted before it was scaled down");
}

#[tokio::test]
async fn an_idle_target_is_intercepted_and_then_put_to_sleep() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Idle).await;
    let (sandbox, _operator, _resolver) = running(&cluster, &prometheus).await;
    falls_asleep(&sandbox).await;
}

#[tokio::test]
async fn an_idle_target_is_not_put_to_sleep_while_nobody_could_wake_it() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Idle).await;
    let (sandbox, operator, resolver) = running(&cluster, &prometheus).await;
    drop(resolver);
    stays_up(&sandbox, &prometheus).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    falls_asleep(&sandbox).await;
}

#[tokio::test]
async fn a_busy_target_stays_up() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Busy).await;
    let (sandbox, _operator, _resolver) = running(&cluster, &prometheus).await;
    stays_up(&sandbox, &prometheus).await;
    prometheus.say(Says::Idle);
    falls_asleep(&sandbox).await;
}

/// A bug once: the ElastiService whose Service was idle scaled the target to zero under the clients of the other.
#[tokio::test]
async fn a_target_behind_two_services_sleeps_for_neither_until_one_elasti_service_goes() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Busy).await;
    let (sandbox, _operator, _resolver) = running(&cluster, &prometheus).await;
    let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"});
    sandbox.create(service("grpc", json!({"selector": {"app": "web"}}))).await;
    sandbox.create(ready_endpoint("grpc", "10.1.2.3:80".parse().unwrap())).await;
    let spec = json!({"cooldownPeriod": COOLDOWN, "triggers": [prometheus.trigger()], "scaleTargetRef": target});
    sandbox.create(elasti_service("grpc", spec)).await;
    for (name, other) in [("web", "grpc"), ("grpc", "web")] {
        let message = sandbox.until_reason(name, "Ready", "TargetShared").await;
        assert!(message.contains(&format!("ElastiService {other}")), "{message}");
    }
    prometheus.say(Says::Idle);
    stays_up(&sandbox, &prometheus).await;
    sandbox.delete::<ElastiService>("grpc").await;
    falls_asleep(&sandbox).await;
}

#[tokio::test]
async fn a_target_sleeps_only_when_all_triggers_agree() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Idle).await;
    let (sandbox, _operator, _resolver) = running(&cluster, &prometheus).await;
    // Resolvers have no eBPF here, so that this trigger cannot tell.
    let both = json!({"spec": {"triggers": [prometheus.trigger(), {"type": "traffic"}]}});
    sandbox.patch::<ElastiService>("web", &both).await;
    let message = sandbox.until_reason("web", "Ready", "TriggerFailed").await;
    assert!(message.contains("node"), "{message}");
    assert_eq!(sandbox.replicas("web").await, 1);
    stays_up(&sandbox, &prometheus).await;
    sandbox.patch::<ElastiService>("web", &json!({"spec": {"triggers": [prometheus.trigger()]}})).await;
    falls_asleep(&sandbox).await;
}

#[tokio::test]
async fn unknown_keys_are_refused_of_traffic_and_told_of_prometheus() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Idle).await;
    let (sandbox, _operator, _resolver) = running(&cluster, &prometheus).await;
    let misspelt = json!({"type": "traffic", "metadata": {"idleConnection": "hold"}});
    sandbox.patch::<ElastiService>("web", &json!({"spec": {"triggers": [misspelt]}})).await;
    let message = sandbox.until_reason("web", "Ready", "InvalidTrigger").await;
    let named = ["idleConnection`", "idleConnections", "minConnections", "ignoreSources", "ignoreUserAgents"];
    assert!(named.iter().all(|key| message.contains(key)) && message.contains("never put to sleep"), "{message}");
    assert_eq!(sandbox.replicas("web").await, 1);
    let mut odd = prometheus.trigger();
    odd["metadata"]["uptimeFliter"] = json!("x");
    sandbox.patch::<ElastiService>("web", &json!({"spec": {"triggers": [odd]}})).await;
    let message = sandbox.until_reason("web", "Ready", "UnknownKeysIgnored").await;
    assert!(message.contains("uptimeFliter") && message.contains("uptimeFilter"), "{message}");
    falls_asleep(&sandbox).await;
}

#[tokio::test]
async fn a_target_whose_prometheus_does_not_answer_stays_up_and_says_so() {
    let cluster = Cluster::new().await;
    let prometheus = Prometheus::new(Says::Nothing).await;
    let (sandbox, _operator, _resolver) = running(&cluster, &prometheus).await;
    let message = sandbox.until_reason("web", "Ready", "TriggerFailed").await;
    assert!(message.contains("http://127.0.0.1") && message.contains("not put to sleep"), "{message}");
    stays_up(&sandbox, &prometheus).await;
    prometheus.say(Says::Idle);
    sandbox.until("web", "well again", |elasti| reason(elasti, "Ready") == "Reconciled").await;
    falls_asleep(&sandbox).await;
}
