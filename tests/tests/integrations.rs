//! Beside a real KEDA and a real Argo Rollouts: they and we leave each other's targets as they should be.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use elasti_tests::cluster::{IMAGE, NODES, Sandbox, Target, get, until};
use elasti_tests::kubeelasti::wants_one;
use serde_json::{Value, json};

const PAUSED: &str = "autoscaling.keda.sh/paused";

fn object(sandbox: &Sandbox, kind: &str, name: &str) -> Value {
    get(&sandbox.namespace, kind, name).unwrap_or_else(|| panic!("{kind} {name} is not there"))
}

fn replicas(sandbox: &Sandbox, kind: &str) -> i64 {
    object(sandbox, kind, "web")["spec"]["replicas"].as_i64().unwrap_or(1)
}

fn call(sandbox: &Sandbox, target: &Target) {
    let answer = sandbox.call(target, 2);
    assert!(answer.starts_with("nginx on web-"), "{answer}");
}

fn scaled_object_is(sandbox: &Sandbox, type_: &str, status: &str) {
    until(&format!("KEDA says {type_}={status}"), || {
        let conditions = object(sandbox, "scaledobject", "web")["status"]["conditions"].take();
        conditions.as_array()?.iter().find(|one| one["type"] == type_ && one["status"] == status).map(drop)
    });
}

#[test]
fn keda_leaves_a_sleeping_target_at_zero_and_scales_it_once_it_is_awake() {
    let (sandbox, mut target) = (Sandbox::new("keda"), Target::nginx("web"));
    target.spec = json!({"autoscaler": {"type": "keda", "name": "web"}});
    sandbox.target(&target);
    sandbox.apply(wants_one("web", "Deployment", "web", 1));
    scaled_object_is(&sandbox, "Ready", "True");

    let idle = json!({"spec": {"cooldownPeriod": 1, "triggers": [sandbox.idle_trigger()]}});
    sandbox.patch(&["elastiservice", "web"], &idle);
    sandbox.asleep(&target);
    scaled_object_is(&sandbox, "Paused", "True");
    assert!(object(&sandbox, "scaledobject", "web")["metadata"]["annotations"][PAUSED].is_string());
    // What it does when it is told of a change: nothing, for as long as it is paused.
    sandbox.patch(&["scaledobject", "web"], &json!({"spec": {"maxReplicaCount": 4}}));
    until("KEDA's autoscaler is gone, or knows of the change", || {
        let autoscaler = get(&sandbox.namespace, "horizontalpodautoscaler", "keda-hpa-web");
        autoscaler.is_none_or(|it| it["spec"]["maxReplicas"] == 4).then_some(())
    });
    assert_eq!((replicas(&sandbox, "deployment"), sandbox.pods(&target).len()), (0, 0));

    sandbox.patch(&["elastiservice", "web"], &json!({"spec": {"triggers": null, "cooldownPeriod": 900}}));
    call(&sandbox, &target);
    sandbox.awake(&target);
    scaled_object_is(&sandbox, "Paused", "False");
    sandbox.patch(&["scaledobject", "web"], &json!({"spec": {"minReplicaCount": 2}}));
    until("KEDA scales again", || (replicas(&sandbox, "deployment") == 2).then_some(()));
}

#[test]
fn a_users_own_pause_of_keda_outlives_sleep_and_wake() {
    let (sandbox, mut target) = (Sandbox::new("keda-user"), Target::nginx("web"));
    target.spec = json!({"autoscaler": {"type": "keda", "name": "web"}});
    sandbox.target(&target);
    let mut scaled = wants_one("web", "Deployment", "web", 1);
    scaled["metadata"]["annotations"] = json!({PAUSED: "true"});
    sandbox.apply(scaled);
    scaled_object_is(&sandbox, "Paused", "True");
    sandbox.sleep(&target);
    call(&sandbox, &target);
    sandbox.awake(&target);
    let annotations = object(&sandbox, "scaledobject", "web")["metadata"]["annotations"].take();
    assert_eq!(annotations[PAUSED], "true", "{annotations}");
    scaled_object_is(&sandbox, "Paused", "True");
}

fn rollout(pods: &Value) -> Value {
    let mut rollout = json!({
        "apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "metadata": {"name": "web"},
        "spec": {"strategy": {"canary": {}}, "selector": {"matchLabels": {"app": "web"}}},
    });
    for (field, value) in pods.as_object().unwrap() {
        rollout["spec"][field] = value.clone();
    }
    rollout
}

/// Puts the Rollout `web` to sleep by its trigger, wakes it by a call, and does the same once more by hand.
fn sleeps_and_wakes(sandbox: &Sandbox, rollout: Value) {
    let mut target = Target::nginx("web");
    target.spec = json!({"scaleTargetRef": {"apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "name": "web"}});
    sandbox.apply(rollout);
    sandbox.apply(target.service());
    sandbox.apply(target.elasti_service());
    until("its pod is there", || (sandbox.pods(&target).len() == 1).then_some(()));
    sandbox.awake(&target);

    let idle = json!({"spec": {"cooldownPeriod": 1, "triggers": [sandbox.idle_trigger()]}});
    sandbox.patch(&["elastiservice", "web"], &idle);
    sandbox.asleep(&target);
    assert_eq!(replicas(sandbox, "rollout"), 0);
    sandbox.patch(&["elastiservice", "web"], &json!({"spec": {"triggers": null, "cooldownPeriod": 900}}));
    call(sandbox, &target);
    sandbox.awake(&target);
    assert_eq!(replicas(sandbox, "rollout"), 1);

    sandbox.patch(&["rollout", "web"], &json!({"spec": {"replicas": 0}}));
    sandbox.asleep(&target);
    call(sandbox, &target);
    sandbox.awake(&target);
}

fn template() -> Value {
    json!({
        "metadata": {"labels": {"app": "web"}},
        "spec": {
            "nodeName": NODES[0], "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "target", "image": IMAGE, "imagePullPolicy": "Never", "command": ["nginx", "-g", "daemon off;"],
                "readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1},
            }],
        },
    })
}

#[test]
fn a_rollout_without_replicas_sleeps_and_wakes() {
    let sandbox = Sandbox::new("rollout");
    sleeps_and_wakes(&sandbox, rollout(&json!({"template": template()})));
}

#[test]
fn a_rollout_that_takes_its_pods_from_a_deployment_sleeps_and_wakes() {
    let sandbox = Sandbox::new("workload-ref");
    sandbox.apply(json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "template"},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "web"}}, "template": template()},
    }));
    let reference = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "template"});
    sleeps_and_wakes(&sandbox, rollout(&json!({"workloadRef": reference})));
}
