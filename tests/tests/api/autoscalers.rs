//! KEDA's pause around sleep, with the operator's real permissions. KEDA itself does not run.

use elasti_api::names::{RESOLVER, TOKEN_AUDIENCE};
use elasti_api::v1alpha1::ElastiService;
use elasti_operator::autoscaler::{PAUSED, PAUSED_BY, PAUSED_REPLICAS};
use elasti_tests::api::{
    Cluster, Operator, Prometheus, Resolver, Sandbox, Says, deployment, elasti_service, ready_endpoint, scaled_object,
    service, until,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

/// An idle target under a `ScaledObject` with these annotations, and who puts it to sleep.
async fn sleeping(cluster: &Cluster, annotations: Value) -> (Sandbox, Operator, Resolver) {
    cluster.serve_scaled_objects().await;
    let prometheus = Prometheus::new(Says::Idle).await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 1)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(scaled_object("web", &annotations)).await;
    sandbox.create(ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
    let autoscaler = json!({"type": "keda", "name": "web"});
    let spec = json!({"cooldownPeriod": 1, "triggers": [prometheus.trigger()], "autoscaler": autoscaler});
    sandbox.create(elasti_service("web", spec)).await;
    until("the target sleeps", async || (sandbox.replicas("web").await == 0).then_some(())).await;
    // The pods are gone.
    sandbox.delete::<EndpointSlice>("web").await;
    (sandbox, operator, resolver)
}

async fn wake(cluster: &Cluster, sandbox: &Sandbox, operator: &Operator) {
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(sandbox.replicas("web").await, 1);
}

async fn until_annotated(sandbox: &Sandbox, paused: &str, replicas: Value) {
    until("the annotations of KubeElasti", async || {
        let annotations = sandbox.scaled_object("web").await["metadata"]["annotations"].take();
        (annotations[PAUSED] == paused && annotations[PAUSED_REPLICAS] == replicas).then_some(())
    })
    .await;
}

#[tokio::test]
async fn keda_is_paused_while_its_target_sleeps_and_scales_again_after_a_wake_and_a_deletion() {
    let cluster = Cluster::new().await;
    let (sandbox, operator, _resolver) = sleeping(&cluster, json!({})).await;
    until_annotated(&sandbox, "true", json!("0")).await;
    wake(&cluster, &sandbox, &operator).await;
    until_annotated(&sandbox, "false", Value::Null).await;
    assert_eq!(sandbox.scaled_object("web").await["metadata"]["annotations"][PAUSED_BY], Value::Null);

    sandbox.create(ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
    until("the target sleeps again", async || (sandbox.replicas("web").await == 0).then_some(())).await;
    sandbox.delete::<EndpointSlice>("web").await;
    until_annotated(&sandbox, "true", json!("0")).await;
    sandbox.delete::<ElastiService>("web").await;
    until_annotated(&sandbox, "false", Value::Null).await;
    until("the target is woken", async || (sandbox.replicas("web").await == 1).then_some(())).await;
}

#[tokio::test]
async fn b29_a_pause_of_the_user_outlives_sleep_and_wake() {
    let cluster = Cluster::new().await;
    let (sandbox, operator, _resolver) = sleeping(&cluster, json!({PAUSED: "true"})).await;
    wake(&cluster, &sandbox, &operator).await;
    sandbox.create(ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
    sandbox.until_served("web").await;
    let annotations = sandbox.scaled_object("web").await["metadata"]["annotations"].take();
    assert_eq!(annotations, json!({PAUSED: "true"}));
}
