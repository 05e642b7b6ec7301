//! A target at zero: its connections are brought to resolvers, held, and answered when it is up.

use std::net::SocketAddr;

use elasti_api::names::{INTERCEPTION_PORT_MAX, INTERCEPTION_PORT_MIN, private_service, resolver_slice};
use elasti_tests::api::{
    Cluster, Sandbox, condition, deployment, elasti_service, host_address, interception_port, ready_endpoint, reason,
    service, until,
};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A target at zero with its Service and ElastiService.
async fn sleeping(sandbox: &Sandbox, name: &str) {
    sandbox.create(deployment(name, 0)).await;
    sandbox.create(service(name, json!({}))).await;
    sandbox.create(elasti_service(name, json!({}))).await;
}

/// A pod's server that answers `hello` to the first four bytes of each connection.
async fn pod() -> SocketAddr {
    let listener = TcpListener::bind((host_address().await, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4];
            stream.read_exact(&mut request).await.unwrap();
            stream.write_all(b"hello").await.unwrap();
        }
    });
    address
}

/// Keeps out B21: `status.mode` is set although nothing was done.
#[tokio::test]
async fn a_target_that_was_at_zero_before_is_published_once_a_resolver_listens() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let ports = json!([{"name": "http", "port": 80, "appProtocol": "http"}, {"name": "https", "port": 443}]);
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({"ports": ports}))).await;
    sandbox.create(elasti_service("web", json!({}))).await;
    let operator = cluster.operator("a", &[]).await;

    let prepared = |elasti: &Value| elasti["status"]["mode"] == "proxy" && elasti["status"]["ports"].is_array();
    let elasti = sandbox.until("web", "mode proxy and ports", prepared).await;
    let intercepted = [80, 443].map(|port| interception_port(&elasti, port));
    assert!(intercepted.iter().all(|port| (INTERCEPTION_PORT_MIN..=INTERCEPTION_PORT_MAX).contains(port)));
    assert_ne!(intercepted[0], intercepted[1]);
    sandbox.until("web", "not published", |elasti| reason(elasti, "Intercepting") == "NotPublished").await;
    assert_eq!(sandbox.slice("web").await, None, "nobody listens yet");

    let resolver = cluster.resolver(&[&operator]).await;
    let elasti = sandbox.until_published("web").await;
    assert_eq!(condition(&elasti, "Ready")["status"], "True");
    assert_eq!(reason(&elasti, "TargetReady"), "AtZero");
    let slice = sandbox.slice("web").await.unwrap();
    assert_eq!(slice["metadata"]["labels"]["kubernetes.io/service-name"], "web");
    assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], elasti["metadata"]["uid"]);
    assert_eq!(slice["endpoints"].as_array().unwrap().len(), 1);
    let endpoint = &slice["endpoints"][0];
    assert_eq!(endpoint["addresses"], json!([resolver.address]));
    assert_eq!(endpoint["conditions"]["ready"], true);
    assert_eq!(endpoint["nodeName"], *resolver.node);
    let expected = json!([
        {"name": "http", "port": intercepted[0], "protocol": "TCP", "appProtocol": "http"},
        {"name": "https", "port": intercepted[1], "protocol": "TCP"},
    ]);
    assert_eq!(slice["ports"], expected);
}

/// The private Service of `web`, if it has the ports and the selector of the public one.
async fn private_like_public(sandbox: &Sandbox) -> Option<Value> {
    let (public, private) = (sandbox.get::<Service>("web").await?, sandbox.private("web").await?);
    let same = ["ports", "selector"].iter().all(|field| private["spec"][field] == public["spec"][field]);
    same.then_some(private)
}

#[tokio::test]
async fn the_private_service_follows_ports_and_selector_of_the_public_one() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let _operator = cluster.operator("a", &[]).await;
    sleeping(&sandbox, "web").await;
    let follows = async || private_like_public(&sandbox).await;
    let private = until("a private Service like the public one", follows).await;
    assert_eq!(private["spec"]["type"], "ClusterIP");
    let before = sandbox.until("web", "a port", |elasti| elasti["status"]["ports"].is_array()).await;

    let ports = json!([{"name": "http", "port": 80, "targetPort": "web"}, {"name": "more", "port": 81}]);
    sandbox.patch::<Service>("web", &json!({"spec": {"ports": ports, "selector": {"tier": "front"}}})).await;
    let private = until("the private Service to follow", async || {
        follows().await.filter(|private| private["spec"]["selector"]["tier"] == "front")
    })
    .await;
    assert_eq!(private["spec"]["ports"].as_array().unwrap().len(), 2);
    let two = |elasti: &Value| elasti["status"]["ports"].as_array().is_some_and(|ports| ports.len() == 2);
    let after = sandbox.until("web", "two ports", two).await;
    assert_eq!(interception_port(&after, 80), interception_port(&before, 80), "a port that stays keeps its own");
}

/// A bug once: ports that KubeElasti had written stayed beside ours; where they had no names, ours were refused again and again.
#[tokio::test]
async fn a_private_service_that_somebody_else_has_made_follows_the_public_one_too() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let former = json!({"ports": [{"port": 79}], "selector": {"app": "former", "tier": "front"}});
    sandbox.create(service(&private_service("web"), former)).await;
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({"ports": [{"port": 80}]}))).await;
    sandbox.create(elasti_service("web", json!({}))).await;
    let _operator = cluster.operator("a", &[]).await;
    until("the private Service to be taken over", async || private_like_public(&sandbox).await).await;
    for ports in [json!([{"port": 81}]), json!([{"name": "a", "port": 82}, {"name": "b", "port": 83}])] {
        sandbox.patch::<Service>("web", &json!({"spec": {"ports": ports}})).await;
        until("the private Service to follow", async || private_like_public(&sandbox).await).await;
    }
}

#[tokio::test]
async fn a_held_connection_wakes_the_target_and_is_answered_and_the_path_is_direct_again() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox
        .create(elasti_service("web", json!({"minTargetReplicas": 3, "ports": [{"port": 80, "protocol": "tcp"}]})))
        .await;
    let elasti = sandbox.until_published("web").await;

    let mut client = resolver.dial(interception_port(&elasti, 80)).await;
    client.write_all(b"ping").await.unwrap();
    until("the target is woken", async || (sandbox.replicas("web").await == 3).then_some(())).await;
    sandbox.until("web", "the time of the wake", |elasti| elasti["status"]["lastScaledUpTime"].is_string()).await;
    assert!(sandbox.slice("web").await.is_some(), "as long as no pod is ready");

    sandbox.create(ready_endpoint("web", pod().await)).await;
    let mut answer = [0; 5];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"hello");
    let elasti = sandbox.until_served("web").await;
    assert_eq!(reason(&elasti, "Ready"), "Reconciled");
}

#[tokio::test]
async fn a_ready_target_is_served_directly_until_somebody_scales_it_to_zero() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 1)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(ready_endpoint("web", pod().await)).await;
    sandbox.create(elasti_service("web", json!({}))).await;
    let elasti = sandbox.until("web", "ready", |elasti| reason(elasti, "TargetReady") == "Ready").await;
    assert_eq!(elasti["status"]["mode"], "serve");
    assert_eq!(sandbox.slice("web").await, None);

    sandbox.scale("web", 0).await;
    sandbox.until_published("web").await;
}

#[tokio::test]
async fn a_running_target_without_a_ready_pod_is_intercepted_until_one_is_ready() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    sandbox.create(deployment("web", 1)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(elasti_service("web", json!({}))).await;
    sandbox.until_published("web").await;
    sandbox.until_reason("web", "TargetReady", "NoPod").await;
    sandbox.create(ready_endpoint("web", pod().await)).await;
    sandbox.until_served("web").await;
    sandbox.until_reason("web", "TargetReady", "Ready").await;
}

/// Keeps out B14: namesakes in two namespaces suppress each other's wake.
#[tokio::test]
async fn namesakes_in_two_namespaces_are_independent() {
    let cluster = Cluster::new().await;
    let (one, other) = (cluster.sandbox().await, cluster.sandbox().await);
    let operator = cluster.operator("a", &[]).await;
    let resolver = cluster.resolver(&[&operator]).await;
    sleeping(&one, "web").await;
    sleeping(&other, "web").await;
    let (of_one, of_other) = (one.until_published("web").await, other.until_published("web").await);
    let (port, other_port) = (interception_port(&of_one, 80), interception_port(&of_other, 80));
    assert_ne!(port, other_port);

    let _client = resolver.dial(port).await;
    until("the one is woken", async || (one.replicas("web").await == 1).then_some(())).await;
    assert_eq!(other.replicas("web").await, 0, "the other sleeps on");
    let _client = resolver.dial(other_port).await;
    until("the other is woken", async || (other.replicas("web").await == 1).then_some(())).await;
}

#[tokio::test]
async fn services_with_the_longest_names_are_intercepted_and_told_apart() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let _resolver = cluster.resolver(&[&operator]).await;
    let long = ["a", "b"].map(|end| "n".repeat(62) + end);
    for name in &long {
        sleeping(&sandbox, name).await;
    }
    for name in &long {
        sandbox.until_published(name).await;
        let slice = sandbox.slice(name).await.unwrap();
        assert_eq!(slice["metadata"]["labels"]["kubernetes.io/service-name"], **name);
        let private = sandbox.private(name).await.unwrap();
        assert_eq!(private["spec"]["selector"]["app"], **name);
    }
    assert_ne!(resolver_slice(&long[0], false), resolver_slice(&long[1], false));
}

#[tokio::test]
async fn a_resolver_that_is_gone_leaves_the_slices_when_another_is_there() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let first = cluster.resolver(&[&operator]).await;
    sleeping(&sandbox, "web").await;
    sandbox.until_published("web").await;
    drop(first);
    let second = cluster.resolver(&[&operator]).await;
    until("the slice names the second resolver alone", async || {
        let slice = sandbox.slice("web").await?;
        let nodes: Vec<&Value> = slice["endpoints"].as_array()?.iter().map(|one| &one["nodeName"]).collect();
        (nodes == [&second.node]).then_some(())
    })
    .await;
}
