//! Targets of other kinds than Deployment and StatefulSet: found by discovery, scaled by `/scale`.

use elasti_api::names::{RESOLVER, TOKEN_AUDIENCE};
use elasti_tests::api::{Cluster, Prometheus, Sandbox, Says, custom, elasti_service, ready_endpoint, service, until};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

/// A group of nobody.
const GROUP: &str = "example.com";

/// The group of Argo Rollouts, and of all that Argo makes.
const ARGO: &str = "argoproj.io";

fn reference(target: &Value) -> Value {
    json!({"apiVersion": target["apiVersion"], "kind": target["kind"], "name": target["metadata"]["name"]})
}

/// A target that is idle, with all that it needs to sleep.
async fn idle(sandbox: &Sandbox, target: &Value, prometheus: &Prometheus) {
    sandbox.create(target.clone()).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
    let spec = json!({
        "minTargetReplicas": 2, "cooldownPeriod": 1, "triggers": [prometheus.trigger()], "scaleTargetRef": reference(target),
    });
    sandbox.create(elasti_service("web", spec)).await;
}

async fn until_replicas(sandbox: &Sandbox, target: &Value, field: &str, replicas: i64) {
    until("the replicas", async || (sandbox.current(target).await["spec"][field] == replicas).then_some(())).await;
}

#[tokio::test]
async fn any_kind_with_a_scale_sleeps_and_wakes_once_the_operator_may_scale_it() {
    let cluster = Cluster::new().await;
    let scale = json!({"specReplicasPath": ".spec.size", "statusReplicasPath": ".status.size", "labelSelectorPath": ".status.selector"});
    cluster.serve(GROUP, "Shop", &scale).await;
    let (sandbox, prometheus) = (cluster.sandbox().await, Prometheus::new(Says::Idle).await);
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    let shop = custom(GROUP, "Shop", "shop", &json!({"size": 3}));
    idle(&sandbox, &shop, &prometheus).await;
    let why =
        sandbox.until("web", "the missing permission", |elasti| elasti.to_string().contains("docs/targets.md")).await;
    assert!(why.to_string().contains("forbidden"), "{why}");
    assert_eq!(sandbox.current(&shop).await["spec"]["size"], 3);

    cluster.permit_targets(GROUP, "Shop").await;
    until_replicas(&sandbox, &shop, "size", 0).await;
    sandbox.delete::<EndpointSlice>("web").await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!(status, 200, "{answer}");
    until_replicas(&sandbox, &shop, "size", 2).await;
}

/// Keeps out B23 too: such Rollouts stay intercepted for ever. Argo's controller does not run.
#[tokio::test]
async fn a_rollout_with_a_workload_of_its_own_and_no_replicas_sleeps_and_wakes() {
    let cluster = Cluster::new().await;
    let scale = json!({"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.HPAReplicas", "labelSelectorPath": ".status.selector"});
    cluster.serve(ARGO, "Rollout", &scale).await;
    let (sandbox, prometheus) = (cluster.sandbox().await, Prometheus::new(Says::Idle).await);
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    let workload = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"});
    let rollout = custom(ARGO, "Rollout", "web", &json!({"workloadRef": workload}));
    idle(&sandbox, &rollout, &prometheus).await;
    until_replicas(&sandbox, &rollout, "replicas", 0).await;
    sandbox.delete::<EndpointSlice>("web").await;
    sandbox.until("web", "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!(status, 200, "{answer}");
    until_replicas(&sandbox, &rollout, "replicas", 2).await;
    cluster.serve_no_more(ARGO, "Rollout").await;
}

#[tokio::test]
async fn an_operator_starts_where_argo_cd_is_without_argo_rollouts() {
    let cluster = Cluster::new().await;
    cluster.serve(ARGO, "Application", &Value::Null).await;
    // It waits until the operator is ready.
    let _operator = cluster.operator("a", &[]).await;
    cluster.serve_no_more(ARGO, "Application").await;
}

#[tokio::test]
async fn what_cannot_be_scaled_is_said_with_its_cure_until_it_can_be() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let _operator = cluster.operator("a", &[]).await;
    sandbox.create(service("web", json!({}))).await;
    for (api_version, kind, words) in [
        (
            "example.com/v1alpha1",
            "Nothing",
            "the cluster serves no Nothing of example.com/v1alpha1; install what provides it",
        ),
        ("v1", "ConfigMap", "ConfigMap of v1 has no /scale subresource"),
        ("scheduling.k8s.io/v1", "PriorityClass", "belongs to no namespace"),
    ] {
        let target = json!({"apiVersion": api_version, "kind": kind, "name": "web"});
        let name = kind.to_lowercase();
        sandbox.create(elasti_service(&name, json!({"service": name, "scaleTargetRef": target}))).await;
        sandbox.create(service(&name, json!({}))).await;
        sandbox.until(&name, words, |elasti| elasti.to_string().contains(words)).await;
        sandbox.until_reason(&name, "Ready", "UnknownTargetKind").await;
    }
}
