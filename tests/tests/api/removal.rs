//! What is no longer wanted goes, and everything is left as it was found.

use elasti_api::names::{FINALIZER, private_service};
use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{Cluster, Operator, Resolver, Sandbox, deployment, elasti_service, service, until};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

/// A sandbox in which the Service `web` is intercepted.
async fn intercepted(cluster: &Cluster) -> (Sandbox, Operator, Resolver) {
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(elasti_service("web", json!({"minTargetReplicas": 2}))).await;
    sandbox.until_published("web").await;
    (sandbox, operator, resolver)
}

#[tokio::test]
async fn a_deleted_elasti_service_leaves_its_target_up_and_nothing_of_ours() {
    let cluster = Cluster::new().await;
    let (sandbox, _operator, _resolver) = intercepted(&cluster).await;
    let elasti = sandbox.get::<ElastiService>("web").await.unwrap();
    assert_eq!(elasti["metadata"]["finalizers"], json!([FINALIZER]));

    sandbox.delete::<ElastiService>("web").await;
    until("the target is up", async || (sandbox.replicas("web").await == 2).then_some(())).await;
    assert!(sandbox.slice("web").await.is_some(), "connections are held until a pod is ready");
    sandbox.create(elasti_tests::api::ready_endpoint("web", "10.1.2.3:80".parse().unwrap())).await;
    until("the ElastiService goes", async || sandbox.get::<ElastiService>("web").await.is_none().then_some(())).await;
    assert_eq!(sandbox.slice("web").await, None);
    assert_eq!(sandbox.private("web").await, None);
}

#[tokio::test]
async fn an_elasti_service_whose_target_is_gone_can_be_deleted() {
    let cluster = Cluster::new().await;
    let (sandbox, _operator, _resolver) = intercepted(&cluster).await;
    sandbox.delete::<k8s_openapi::api::apps::v1::Deployment>("web").await;
    sandbox.until_reason("web", "Ready", "TargetNotFound").await;
    sandbox.delete::<ElastiService>("web").await;
    until("the ElastiService goes", async || sandbox.get::<ElastiService>("web").await.is_none().then_some(())).await;
    assert_eq!((sandbox.slice("web").await, sandbox.private("web").await), (None, None));
}

/// Keeps out B25: a changed `spec.service` leaves the former's objects.
#[tokio::test]
async fn another_service_in_the_spec_leaves_nothing_of_the_former() {
    let cluster = Cluster::new().await;
    let (sandbox, _operator, _resolver) = intercepted(&cluster).await;
    sandbox.create(service("next", json!({}))).await;
    sandbox.patch::<ElastiService>("web", &json!({"spec": {"service": "next"}})).await;
    let names = |objects: Vec<Value>| -> Vec<String> {
        objects.iter().map(|object| object["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    };
    let expected = ["next".to_owned(), "web".to_owned(), private_service("next")];
    until("the former private Service goes", async || {
        let mut found = names(sandbox.list::<Service>().await);
        let mut expected = expected.clone();
        found.sort();
        expected.sort();
        (found == expected).then_some(())
    })
    .await;
    until("the next slice is the only one", async || {
        let found = names(sandbox.list::<EndpointSlice>().await);
        (found == [elasti_api::names::resolver_slice("next", false)]).then_some(())
    })
    .await;
}
