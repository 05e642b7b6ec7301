//! What the API server takes, fills in and refuses.

use elasti_api::v1alpha1::ElastiService;
use elasti_tests::api::{Cluster, elasti_service};
use serde_json::{Value, json};

/// A trigger as KubeElasti's manual has it.
fn trigger() -> Value {
    json!({"type": "prometheus", "metadata": {
        "serverAddress": "http://kube-prometheus-stack-prometheus.monitoring.svc.cluster.local:9090",
        "query": r#"sum(rate(nginx_ingress_controller_requests{service="web"}[1m])) or vector(0)"#,
        "threshold": "0.5", "uptimeFilter": r#"container="foo""#, "headers": {"X-Scope-OrgID": "a"},
    }})
}

#[tokio::test]
async fn manifests_of_kubeelasti_apply_and_keep_their_values() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let full = json!({
        "minTargetReplicas": 2, "cooldownPeriod": 5, "service": "web", "triggers": [trigger()],
        "autoscaler": {"type": "keda", "name": "web-scaler"},
        "enabledPeriod": {"schedule": "0 9 * * 1-5", "duration": "8h"},
        "probeResponse": [{
            "path": {"type": "Exact", "value": "/healthz"}, "method": "GET",
            "headers": [{"name": "X-Probe", "type": "RegularExpression", "value": ".+"}],
            "queryParams": [{"name": "q", "value": "1"}],
            "response": {"status": 200, "body": r#"{"ok":true}"#},
        }],
    });
    let targets = [
        json!({"apiVersion": "apps/v1", "kind": "deployments", "name": "web"}),
        json!({"apiVersion": "argoproj.io/v1alpha1", "kind": "rollouts", "name": "web"}),
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}),
        json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web"}),
        json!({"apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "name": "web"}),
    ];
    for (number, target) in targets.into_iter().enumerate() {
        let mut object = elasti_service(&format!("web-{number}"), full.clone());
        object["spec"]["scaleTargetRef"] = target;
        let stored = sandbox.create(object.clone()).await;
        assert_eq!(stored["spec"], object["spec"]);
    }
}

#[tokio::test]
async fn absent_fields_get_the_documented_defaults() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let stored = sandbox.create(elasti_service("web", json!({"enabledPeriod": {}}))).await;
    let expected = elasti_service(
        "web",
        json!({
            "minTargetReplicas": 1, "cooldownPeriod": 900,
            "enabledPeriod": {"schedule": "0 0 * * *", "duration": "24h"},
        }),
    );
    assert_eq!(stored["spec"], expected["spec"]);
}

#[tokio::test]
async fn what_cannot_work_is_refused_with_its_cure() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    let target = |api_version: &str, kind: &str, name: &str| json!({"scaleTargetRef": {"apiVersion": api_version, "kind": kind, "name": name}});
    let refused = [
        (target("apps/v1", "Rollout", "web"), "a Rollout has apiVersion argoproj.io/v1alpha1"),
        (target("argoproj.io/v1alpha1", "Deployment", "web"), "a Deployment or StatefulSet has apiVersion apps/v1"),
        (target("apps/v1", "DaemonSet", "web"), "of apps/v1 a Deployment or a StatefulSet can be scaled"),
        (target("apps/1", "Deployment", "web"), "apiVersion is a group and a version, such as apps/v1"),
        (target("apps/v1beta1", "deployments.apps", "web"), "kind is the name of a kind, such as Deployment"),
        (target("apps/v1", "Deployment", ""), "name what to scale, such as a Deployment"),
        (json!({"service": ""}), "spec.service"),
        (json!({"service": null}), "spec.service: Required value"),
        (json!({"scaleTargetRef": null}), "spec.scaleTargetRef: Required value"),
        (json!({"minTargetReplicas": 0}), "greater than or equal to 1"),
        (json!({"cooldownPeriod": 604_801}), "less than or equal to 604800"),
        (json!({"cooldownPeriod": -1}), "greater than or equal to 0"),
        (json!({"minUptime": -1}), "greater than or equal to 0"),
        (json!({"wake": {"on": "sight"}}), r#"supported values: "connection", "data", "auto""#),
        (json!({"hold": {"timeout": "soon"}}), "spec.hold.timeout"),
        (json!({"hold": {"timeout": "25h"}}), "at most 24h"),
        (json!({"enabledPeriod": {"duration": "0s"}}), "a duration above zero"),
        (json!({"wakeWith": [{"name": "db"}, {"name": "db"}]}), "name each ElastiService once"),
        (json!({"wakeWith": [{"name": ""}]}), "spec.wakeWith[0].name"),
        (json!({"triggers": []}), "spec.triggers"),
        (json!({"triggers": [{"type": "traffic"}, {"type": "traffic"}]}), "one trigger of type traffic at most"),
        (json!({"triggers": [{"type": "moon"}]}), r#"supported values: "prometheus""#),
        (json!({"autoscaler": {"type": "vpa", "name": "web"}}), r#"supported values: "hpa", "keda""#),
    ];
    for (spec, words) in refused {
        let error = sandbox.dry_run(&elasti_service("web", spec.clone())).await.expect_err(&spec.to_string());
        assert!(error.contains(words), "{spec}: {error}");
    }
    assert_eq!(sandbox.list::<ElastiService>().await, [] as [Value; 0]);
}

#[tokio::test]
async fn kubectl_get_elasti_shows_what_matters() {
    let cluster = Cluster::new().await;
    let sandbox = cluster.sandbox().await;
    sandbox.create(elasti_service("web", json!({}))).await;
    let path = format!("/apis/elasti.truefoundry.com/v1alpha1/namespaces/{}/elastiservices", sandbox.namespace);
    let table = cluster.get(&path, "application/json;as=Table;v=v1;g=meta.k8s.io").await;
    let columns: Vec<&str> =
        table["columnDefinitions"].as_array().unwrap().iter().map(|column| column["name"].as_str().unwrap()).collect();
    assert_eq!(columns, ["Name", "Service", "Target", "Mode", "Ready", "Reason", "Age"]);
    assert_eq!(table["rows"][0]["cells"].as_array().unwrap()[..3], ["web", "web", "web"]);
    let resources = cluster.get("/apis/elasti.truefoundry.com/v1alpha1", "application/json").await;
    assert_eq!(resources["resources"][0]["shortNames"], json!(["elasti"]));
}
