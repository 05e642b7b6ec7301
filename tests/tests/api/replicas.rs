//! Two replicas: one leads, both serve, and no wake waits for a leader.

use elasti_api::names::{OPERATOR, RESOLVER, TOKEN_AUDIENCE};
use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{Cluster, Sandbox, deployment, elasti_service, interception_port, service, until};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

async fn sleeping(sandbox: &Sandbox, name: &str) -> Value {
    sandbox.create(deployment(name, 0)).await;
    sandbox.create(service(name, json!({}))).await;
    sandbox.create(elasti_service(name, json!({}))).await;
    sandbox.until_published(name).await
}

async fn holder(cluster: &Cluster) -> Option<String> {
    let lease = cluster.own().get::<Lease>(OPERATOR).await?;
    lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
}

/// Keeps out B28: several operator replicas disturb each other.
#[tokio::test]
async fn one_replica_leads_and_the_other_serves_and_takes_over() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let first = cluster.operator("first", &[]).await;
    let second = cluster.operator("second", &[]).await;
    let resolver = cluster.resolver(&[&first, &second]).await;
    assert_eq!(holder(&cluster).await.as_deref(), Some("first"));
    assert_eq!((first.leads().await, second.leads().await), (true, false));

    let before = sleeping(&sandbox, "web").await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = second.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!(status, 200, "the replica that does not lead wakes: {answer}");
    assert_eq!(sandbox.replicas("web").await, 1);
    sandbox.scale("web", 0).await;
    sandbox.until_published("web").await;

    first.stop().await;
    until("the other takes over", async || second.leads().await.then_some(())).await;
    assert_eq!(holder(&cluster).await.as_deref(), Some("second"));
    // The new leader has been through everything once it has taken up something new.
    sleeping(&sandbox, "later").await;
    let after = sandbox.get::<ElastiService>("web").await.unwrap();
    assert_eq!(after["status"]["ports"], before["status"]["ports"]);
    assert_eq!(sandbox.list::<EndpointSlice>().await.len(), 2, "a slice each");
    assert_eq!(sandbox.list::<Service>().await.len(), 4, "a private Service each");

    let _client = resolver.dial(interception_port(&after, 80)).await;
    until("the target is woken", async || (sandbox.replicas("web").await == 1).then_some(())).await;
}

#[tokio::test]
async fn a_held_connection_wakes_its_target_while_nobody_leads() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let leader = cluster.operator("leader", &[]).await;
    let other = cluster.operator("other", &[]).await;
    let resolver = cluster.resolver(&[&leader, &other]).await;
    let elasti = sleeping(&sandbox, "web").await;
    drop(leader);
    let _client = resolver.dial(interception_port(&elasti, 80)).await;
    until("the target is woken", async || (sandbox.replicas("web").await == 1).then_some(())).await;
    assert_eq!(holder(&cluster).await.as_deref(), Some("leader"), "whose Lease has not run out yet");
    assert!(!other.leads().await);
}
