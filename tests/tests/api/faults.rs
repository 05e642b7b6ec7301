//! What cannot work is shown as a condition with cause and cure, and disturbs no other ElastiService.

use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{Cluster, Sandbox, condition, deployment, elasti_service, ready_endpoint, service, until};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

/// A target at zero, asleep and wakeable.
async fn healthy(sandbox: &Sandbox) {
    sandbox.create(deployment("healthy", 0)).await;
    sandbox.create(service("healthy", json!({}))).await;
    sandbox.create(elasti_service("healthy", json!({}))).await;
    let elasti = sandbox.until_published("healthy").await;
    assert_eq!(condition(&elasti, "Ready")["status"], "True");
}

fn target(deployment: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment})
}

/// Waits until whatever is made is younger: Kubernetes counts the age of objects in whole seconds.
async fn next_second(sandbox: &Sandbox, name: &str) {
    let older = sandbox.get::<ElastiService>(name).await.unwrap();
    let created: Timestamp = older["metadata"]["creationTimestamp"].as_str().unwrap().parse().unwrap();
    until("the next second", async || (Timestamp::now().as_second() > created.as_second()).then_some(())).await;
}

/// An ElastiService `web`, with its target at zero and `public` as its Service, is told `wanted` with these words, and
/// one that comes later works.
async fn told(public: Option<Value>, spec: Value, wanted: &str, words: [&str; 2]) {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 0)).await;
    if let Some(public) = public {
        sandbox.create(public).await;
    }
    sandbox.create(elasti_service("web", spec)).await;
    let message = sandbox.until_reason("web", "Ready", wanted).await;
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
    healthy(&sandbox).await;
    let elasti = sandbox.get::<ElastiService>("web").await.unwrap();
    assert_eq!(condition(&elasti, "Ready")["status"], "False");
}

#[tokio::test]
async fn a_missing_service_is_named() {
    told(None, json!({}), "ServiceNotFound", ["Service web", "create it"]).await;
}

/// Keeps out B32: headless Services are broken without a word.
#[tokio::test]
async fn a_headless_service_is_named() {
    let public = service("web", json!({"clusterIP": "None"}));
    told(Some(public), json!({}), "HeadlessService", ["Service web", "give it a cluster IP"]).await;
}

#[tokio::test]
async fn an_external_name_is_named() {
    let public = service("web", json!({"type": "ExternalName", "externalName": "example.org", "selector": null}));
    told(Some(public), json!({}), "ExternalNameService", ["Service web", "name a Service with a selector"]).await;
}

#[tokio::test]
async fn a_service_without_a_selector_is_named() {
    let public = service("web", json!({"selector": null}));
    told(Some(public), json!({}), "ServiceWithoutSelector", ["Service web", "give it one"]).await;
}

#[tokio::test]
async fn a_service_without_a_tcp_port_is_named() {
    let public = service("web", json!({"ports": [{"port": 53, "protocol": "UDP"}]}));
    told(Some(public), json!({}), "NoTcpPort", ["Service web", "only TCP"]).await;
}

#[tokio::test]
async fn a_rollout_where_argo_rollouts_is_not_installed_is_named() {
    let target = json!({"apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "name": "web"});
    let words = ["argoproj.io", "install Argo Rollouts"];
    told(Some(service("web", json!({}))), json!({"scaleTargetRef": target}), "UnknownTargetKind", words).await;
}

#[tokio::test]
async fn a_bad_schedule_is_named() {
    let spec = json!({"enabledPeriod": {"schedule": "whenever"}});
    told(Some(service("web", json!({}))), spec, "InvalidSchedule", ["whenever", "never put to sleep"]).await;
}

#[tokio::test]
async fn a_bad_trigger_is_named() {
    let spec = json!({"triggers": [{"type": "prometheus", "metadata": {"query": "q", "treshold": "1"}}]});
    told(Some(service("web", json!({}))), spec, "InvalidTrigger", ["treshold", "never put to sleep"]).await;
}

/// Keeps out B19: an ElastiService made before its target is never acted upon.
#[tokio::test]
async fn an_elasti_service_may_come_before_its_service_and_its_target() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(elasti_service("web", json!({}))).await;
    sandbox.until_reason("web", "Ready", "ServiceNotFound").await;
    sandbox.create(service("web", json!({}))).await;
    let message = sandbox.until_reason("web", "Ready", "TargetNotFound").await;
    assert!(message.contains("Deployment web") && message.contains("create it"), "{message}");
    sandbox.create(deployment("web", 0)).await;
    sandbox.until_published("web").await;
    sandbox.until_reason("web", "Ready", "Reconciled").await;
}

#[tokio::test]
async fn a_service_that_comes_again_is_intercepted_again() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    healthy(&sandbox).await;
    sandbox.delete::<Service>("healthy").await;
    sandbox.until_reason("healthy", "Ready", "ServiceNotFound").await;
    until("the slice goes", async || sandbox.slice("healthy").await.is_none().then_some(())).await;
    sandbox.create(service("healthy", json!({}))).await;
    sandbox.until_published("healthy").await;
}

#[tokio::test]
async fn of_two_elasti_services_for_one_service_the_older_has_it_until_it_goes() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    healthy(&sandbox).await;
    next_second(&sandbox, "healthy").await;
    sandbox.create(elasti_service("a-younger", json!({"service": "healthy"}))).await;
    let message = sandbox.until_reason("a-younger", "Ready", "ServiceTaken").await;
    assert!(message.contains("older ElastiService healthy") && message.contains("delete one"), "{message}");
    let owner = |slice: Value| slice["metadata"]["ownerReferences"][0]["name"].as_str().unwrap().to_owned();
    assert_eq!(owner(sandbox.slice("healthy").await.unwrap()), "healthy");

    sandbox.create(deployment("a-younger", 0)).await;
    // The older one scales its target up and waits for it before it goes.
    sandbox.create(ready_endpoint("healthy", "10.1.2.3:80".parse().unwrap())).await;
    sandbox.delete::<ElastiService>("healthy").await;
    until("the younger has the Service", async || {
        sandbox.slice("healthy").await.filter(|slice| owner(slice.clone()) == "a-younger")
    })
    .await;
    sandbox.until_published("a-younger").await;
}

#[tokio::test]
async fn an_elasti_service_that_never_had_its_service_takes_nothing_with_it() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    healthy(&sandbox).await;
    next_second(&sandbox, "healthy").await;
    sandbox.create(elasti_service("younger", json!({"service": "healthy", "scaleTargetRef": target("healthy")}))).await;
    sandbox.until_reason("younger", "Ready", "ServiceTaken").await;
    sandbox.delete::<ElastiService>("younger").await;
    until("the younger goes", async || sandbox.get::<ElastiService>("younger").await.is_none().then_some(())).await;
    assert_eq!(sandbox.replicas("healthy").await, 0);
    assert!(sandbox.slice("healthy").await.is_some() && sandbox.private("healthy").await.is_some());
}

#[tokio::test]
async fn an_elasti_service_that_an_older_schema_let_in_disturbs_nobody() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    cluster.relax_schema().await;
    sandbox.create(elasti_service("no-service", json!({"service": null}))).await;
    sandbox.create(elasti_service("no-target", json!({"scaleTargetRef": "web", "service": "no-target"}))).await;
    let kind = json!({"apiVersion": "batch/v1", "kind": "CronJob", "name": "web"});
    sandbox.create(service("odd-kind", json!({}))).await;
    sandbox.create(elasti_service("odd-kind", json!({"scaleTargetRef": kind}))).await;
    cluster.enforce_schema().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    healthy(&sandbox).await;
    let message = sandbox.until_reason("odd-kind", "Ready", "UnknownTargetKind").await;
    assert!(message.contains("CronJob") && message.contains("no /scale subresource"), "{message}");
    assert_eq!(sandbox.list::<ElastiService>().await.len(), 4, "all are still stored");
}
