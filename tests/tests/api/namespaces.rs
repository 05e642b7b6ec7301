//! An operator that looks after some namespaces, with no permission in others.

use elasti_api::names::{RESOLVER, TOKEN_AUDIENCE};
use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{Cluster, Sandbox, deployment, elasti_service, service, until};
use serde_json::json;

async fn at_zero(sandbox: &Sandbox) {
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(elasti_service("web", json!({}))).await;
}

#[tokio::test]
async fn an_operator_of_two_namespaces_serves_both_and_leaves_others_alone() {
    let cluster = Cluster::new().await;
    let (first, second, other) = (cluster.sandbox().await, cluster.sandbox().await, cluster.sandbox().await);
    for sandbox in [&other, &first, &second] {
        at_zero(sandbox).await;
    }
    cluster.permit_only(&[&first, &second]).await;
    let namespaces = format!("--watch-namespaces={},{}", first.namespace, second.namespace);
    // Ready means that every watch has its first list: none was refused.
    let operator = cluster.operator("a", &[&namespaces]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    for sandbox in [&first, &second] {
        sandbox.until_published("web").await;
    }
    let left_alone = other.get::<ElastiService>("web").await.unwrap();
    assert_eq!((&left_alone["status"], &left_alone["metadata"]["finalizers"]), (&json!(null), &json!(null)));
}

#[tokio::test]
async fn a_namespace_that_may_not_be_read_keeps_no_other_from_being_served_and_is_served_once_it_may() {
    let cluster = Cluster::new().await;
    let (first, second) = (cluster.sandbox().await, cluster.sandbox().await);
    for sandbox in [&first, &second] {
        at_zero(sandbox).await;
    }
    cluster.permit_only(&[&first]).await;
    let alone = cluster.operator("a", &[&format!("--watch-namespaces={}", first.namespace)]).await;
    let _resolver = cluster.resolver(&[&alone]).await;
    first.until_published("web").await;
    alone.stop().await;

    let namespaces = format!("--watch-namespaces={},{}", first.namespace, second.namespace);
    let operator = cluster.operator("b", &[&namespaces]).await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &first.namespace, "web").await;
    assert_eq!(status, 200, "{answer}");
    until("the target is woken", async || (first.replicas("web").await == 1).then_some(())).await;

    cluster.permit_only(&[&first, &second]).await;
    second.until("web", "interception ports", |elasti| elasti["status"]["ports"].is_array()).await;
}
