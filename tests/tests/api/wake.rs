//! `POST /informer/incoming-request`: who may wake what.

use elasti_api::names::{NOTIFY_PATH, RESOLVER, TOKEN_AUDIENCE};
use elasti_tests::api::{Cluster, Sandbox, deployment, elasti_service, interception_port, service, until};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::events::v1::Event;
use serde_json::json;
use tokio::net::TcpStream;

/// A target at zero that the operator knows.
async fn sleeping(sandbox: &Sandbox) {
    sandbox.create(deployment("web", 0)).await;
    sandbox.create(service("web", json!({}))).await;
    sandbox.create(elasti_service("web", json!({"minTargetReplicas": 2}))).await;
    sandbox.until("web", "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
}

/// Keeps out B46: events of an invalid type, on objects that do not exist.
#[tokio::test]
async fn a_notification_of_a_resolver_wakes_the_target() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    sleeping(&sandbox).await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!((status, answer.trim_end()), (200, r#"{"message":"Request received successfully!"}"#));
    assert_eq!(sandbox.replicas("web").await, 2);
    sandbox.until("web", "the time of the wake", |elasti| elasti["status"]["lastScaledUpTime"].is_string()).await;
    let event = until("an event of the wake", async || {
        sandbox.list::<Event>().await.into_iter().find(|event| event["reason"] == "ScaledUp")
    })
    .await;
    assert_eq!((&event["type"], &event["regarding"]["kind"]), (&json!("Normal"), &json!("ElastiService")));
    assert_eq!(event["regarding"]["name"], "web");
}

/// Regression: each change was told twice when its first write was refused, as the one beside the allocation of ports always was.
#[tokio::test]
async fn an_event_tells_of_what_was_written() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    sleeping(&sandbox).await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    assert_eq!(operator.notify(&token, &sandbox.namespace, "web").await.0, 200);
    let events = until("a later event", async || {
        let events = sandbox.list::<Event>().await;
        events.iter().any(|event| event["reason"] == "ScaledUp").then_some(events)
    })
    .await;
    let intercepting: Vec<_> = events.iter().filter(|event| event["reason"] == "Intercepting").collect();
    assert_eq!(intercepting.len(), 1, "{events:?}");
    assert_eq!(intercepting[0]["series"], json!(null), "once");
}

#[tokio::test]
async fn a_stateful_set_is_woken_as_a_deployment_is() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let mut target = deployment("web", 0);
    target["kind"] = json!("StatefulSet");
    target["spec"]["serviceName"] = json!("web");
    sandbox.create(target).await;
    sandbox.create(service("web", json!({}))).await;
    let target = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web"});
    sandbox.create(elasti_service("web", json!({"scaleTargetRef": target}))).await;
    sandbox.until("web", "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(sandbox.get::<StatefulSet>("web").await.unwrap()["spec"]["replicas"], 1);
}

#[tokio::test]
async fn refused_notifications_say_why_and_change_nothing() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    sleeping(&sandbox).await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let stranger = sandbox.token("default", Some(TOKEN_AUDIENCE), None).await;
    let elsewhere = cluster.own().token(RESOLVER, Some("elsewhere"), None).await;
    let good = json!({"count": 1, "svc": "web", "namespace": sandbox.namespace}).to_string();
    let large = json!({"svc": "web", "namespace": sandbox.namespace, "padding": "x".repeat(9000)}).to_string();
    let unknown = json!({"svc": "other", "namespace": sandbox.namespace}).to_string();
    let post = format!("POST {NOTIFY_PATH}");
    let refused = [
        (&*post, None, &*good, 401, "Authorization: Bearer"),
        (&post, Some("nonsense"), &good, 401, "not genuine"),
        (&post, Some(&elsewhere), &good, 401, TOKEN_AUDIENCE),
        (&post, Some(&stranger), &good, 403, "--allowed-service-accounts"),
        (&post, Some(&token), "{", 400, "Invalid request body"),
        (&post, Some(&token), r#"{"svc": "web"}"#, 400, "Invalid request body"),
        (&post, Some(&token), &large, 413, ""),
        (&post, Some(&token), &unknown, 404, "no ElastiService names the Service"),
        (&format!("GET {NOTIFY_PATH}"), Some(&token), "", 405, "Invalid request method"),
    ];
    for (request, token, body, expected, words) in refused {
        let headers: Vec<String> = token.map(|token| format!("authorization: Bearer {token}")).into_iter().collect();
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let (status, answer) = operator.send(request, &headers, body.as_bytes()).await;
        assert_eq!(status, expected, "{request} {body:.80}: {answer}");
        assert!(answer.contains(words), "{request} {body:.80}: {answer}");
    }
    assert_eq!(sandbox.replicas("web").await, 0);
}

#[tokio::test]
async fn a_flag_waives_the_token_as_kubeelasti_does() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &["--notify-without-token"]).await;
    sleeping(&sandbox).await;
    let body = json!({"count": 1, "svc": "web", "namespace": sandbox.namespace}).to_string();
    let (status, answer) = operator.send(&format!("POST {NOTIFY_PATH}"), &[], body.as_bytes()).await;
    assert_eq!(status, 200, "{answer}");
    until("the target is woken", async || (sandbox.replicas("web").await == 2).then_some(())).await;
}

/// A target at zero with this `spec.wakeWith`.
async fn sleeping_with(sandbox: &Sandbox, name: &str, partners: &[&str]) {
    let partners: Vec<_> = partners.iter().map(|partner| json!({"name": partner})).collect();
    let partners = if partners.is_empty() { json!(null) } else { json!(partners) };
    sandbox.create(deployment(name, 0)).await;
    sandbox.create(service(name, json!({}))).await;
    sandbox.create(elasti_service(name, json!({"wakeWith": partners}))).await;
    sandbox.until(name, "mode proxy", |elasti| elasti["status"]["mode"] == "proxy").await;
}

#[tokio::test]
async fn partners_wake_together_and_their_partners_and_nobody_else() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    let resolver = cluster.resolver(&[&operator]).await;
    for (name, partners) in [("db", &["web"][..]), ("api", &["db"]), ("web", &["api"]), ("other", &["web"])] {
        sleeping_with(&sandbox, name, partners).await;
    }
    for name in ["db", "api", "web"] {
        sandbox.until_reason(name, "WakeWith", "Cycle").await;
    }
    sandbox.until_reason("other", "WakeWith", "Resolved").await;
    let elasti = sandbox.until_published("web").await;
    let _client = TcpStream::connect((resolver.address, interception_port(&elasti, 80))).await.unwrap();
    for name in ["db", "api", "web"] {
        until("all in the circle are woken", async || (sandbox.replicas(name).await == 1).then_some(())).await;
    }
    assert_eq!(sandbox.replicas("other").await, 0, "it wakes the others and is woken by none");
}

#[tokio::test]
async fn a_notification_wakes_partners_too_and_one_that_is_missing_is_told() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let operator = cluster.operator("a", &[]).await;
    sleeping_with(&sandbox, "web", &["db"]).await;
    let message = sandbox.until_reason("web", "WakeWith", "PartnerNotFound").await;
    assert!(message.contains(&format!("{}/db", sandbox.namespace)), "{message}");
    sleeping_with(&sandbox, "db", &[]).await;
    sandbox.until_reason("web", "WakeWith", "Resolved").await;
    let token = cluster.own().token(RESOLVER, Some(TOKEN_AUDIENCE), None).await;
    let (status, answer) = operator.notify(&token, &sandbox.namespace, "web").await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!((sandbox.replicas("web").await, sandbox.replicas("db").await), (1, 1));
}
