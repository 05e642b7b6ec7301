//! An operator that looks after some namespaces, with no permission in others.

use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{Cluster, Sandbox, deployment, elasti_service, service};
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
