//! Pods that start: which of them resolvers are told of, and what they are to be asked.

use std::sync::Arc;

use elasti_api::readiness::{ProbeAction, StartingPod, TargetPort};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::*;
use crate::plan::ending::DISBELIEF;

/// A pod as kubelet reports it while its container runs and is not ready: `spec` and `status` are laid over.
fn pod(spec: &Value, status: &Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "web-1", "namespace": "shop", "uid": "p"},
        "spec": {"containers": [{"name": "web", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {
            "phase": "Running", "podIP": "10.244.1.9", "podIPs": [{"ip": "10.244.1.9"}, {"ip": "fd00::9"}],
            "startTime": "2026-01-02T03:04:05Z",
            "conditions": [
                {"type": "Initialized", "status": "True"},
                {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-02T03:04:05Z"},
            ],
            "containerStatuses": [{
                "name": "web", "image": "i", "imageID": "", "restartCount": 0, "ready": false, "started": true,
                "state": {"running": {"startedAt": "2026-01-02T03:04:06Z"}},
            }],
        },
    });
    for (part, fields) in [("spec", spec), ("status", status)] {
        for (field, value) in fields.as_object().into_iter().flatten() {
            pod[part][field] = value.clone();
        }
    }
    serde_json::from_value(pod).unwrap()
}

/// One container with this readiness probe.
fn probed(readiness: &Value) -> Pod {
    let ports = json!([{"name": "http", "containerPort": 8080}]);
    pod(&json!({"containers": [{"name": "web", "ports": ports, "readinessProbe": readiness}]}), &json!({}))
}

/// Connections are held for a target that was woken from a long sleep.
fn waking() -> World {
    let mut world = World::asleep();
    world.service.as_mut().unwrap().spec_ports =
        serde_json::from_value(json!([{"name": "http", "port": 80, "targetPort": "http"}])).unwrap();
    world.pass(Duration::from_mins(1));
    world.acknowledge();
    world.settle();
    world.resolvers[0].traffic.held = 1;
    let plan = world.plan();
    assert!(scales_up(&plan.actions) && plan.follow_pods, "looked at from the moment of the wake");
    world.scale(1);
    world
}

fn told(world: &mut World) -> Vec<StartingPod> {
    let Publish::State(state) = world.plan().publish else { panic!("a state is published") };
    state.starting
}

/// What is told of a pod that is seen at first.
fn told_of(pod: Pod) -> Vec<StartingPod> {
    let mut world = waking();
    world.pods = vec![Arc::new(pod)];
    told(&mut world)
}

fn asked(pod: Pod) -> Vec<Vec<ProbeAction>> {
    let [pod] = &told_of(pod)[..] else { panic!("one pod is told") };
    pod.containers.iter().map(|probes| probes.iter().map(|probe| probe.action.clone()).collect()).collect()
}

fn http(path: &str) -> Value {
    json!({"httpGet": {"path": path, "port": "http"}})
}

fn http_action(path: &str) -> ProbeAction {
    ProbeAction::Http { tls: false, port: 8080, path: path.into(), headers: vec![] }
}

#[test]
fn a_pod_that_starts_is_told_with_its_addresses_ports_and_probes() {
    let probe = json!({
        "httpGet": {"path": "/ready?x", "port": "http", "scheme": "HTTPS", "httpHeaders": [{"name": "A", "value": "b"}]},
        "periodSeconds": 10, "timeoutSeconds": 3, "successThreshold": 2, "initialDelaySeconds": 7,
    });
    let [starting] = &told_of(probed(&probe))[..] else { panic!("one pod is told") };
    assert_eq!(starting.addresses, ["10.244.1.9".parse::<std::net::IpAddr>().unwrap()], "in the Service's families");
    assert_eq!(starting.ports, [TargetPort { port: 80, target: 8080 }]);
    let probe = &starting.containers[0][0];
    let headers = vec![("A".to_owned(), "b".to_owned())];
    assert_eq!(probe.action, ProbeAction::Http { tls: true, port: 8080, path: "/ready?x".into(), headers });
    assert_eq!((probe.successes, probe.period, probe.timeout), (2, Duration::from_secs(10), Duration::from_secs(3)));
    assert_eq!(starting.confirmation, Duration::from_secs(7 + 2 * 10 + 5), "as long as kubelet may need");
}

#[test]
fn every_kind_of_probe_that_goes_over_the_network_is_asked_and_no_other() {
    assert_eq!(asked(probed(&json!({"tcpSocket": {"port": 81}}))), [[ProbeAction::Tcp { port: 81 }]]);
    let grpc = ProbeAction::Grpc { port: 82, service: "shop".into() };
    assert_eq!(asked(probed(&json!({"grpc": {"port": 82, "service": "shop"}}))), [[grpc]]);
    for doubtful in [
        json!({"exec": {"command": ["true"]}}),
        json!({"httpGet": {"port": 80, "host": "elsewhere.example"}}),
        json!({"tcpSocket": {"port": 80, "host": "10.0.0.1"}}),
        json!({"httpGet": {"port": "unnamed"}}),
        json!({"httpGet": {"port": 80, "path": "x".repeat(20_000)}}),
    ] {
        assert_eq!(told_of(probed(&doubtful)), [], "{doubtful}");
    }
}

#[test]
fn a_startup_probe_is_asked_before_the_readiness_probe_until_kubelet_calls_the_container_started() {
    let containers = json!([{
        "name": "web", "ports": [{"name": "http", "containerPort": 8080}],
        "startupProbe": http("/started"), "readinessProbe": http("/ready"),
    }]);
    let status = |started: bool| {
        json!({"containerStatuses": [{
            "name": "web", "image": "", "imageID": "", "restartCount": 0, "ready": false, "started": started,
        }]})
    };
    let spec = json!({"containers": containers});
    assert_eq!(asked(pod(&spec, &status(false))), [[http_action("/started"), http_action("/ready")]]);
    assert_eq!(asked(pod(&spec, &status(true))), [[http_action("/ready")]]);
    assert_eq!(asked(pod(&spec, &json!({"containerStatuses": null}))).len(), 1, "before kubelet knows the container");
}

#[test]
fn a_container_without_a_probe_is_ready_when_it_runs_or_when_its_ports_are_open() {
    let none: [Vec<ProbeAction>; 0] = [];
    assert_eq!(asked(pod(&json!({}), &json!({}))), none);
    let unknown = json!({"containerStatuses": null});
    assert_eq!(asked(pod(&json!({}), &unknown)), [[ProbeAction::Tcp { port: 8080 }]]);
    let two = json!({"containers": [
        {"name": "web", "ports": [{"name": "http", "containerPort": 8080}], "readinessProbe": http("/")},
        {"name": "logger"},
    ]});
    assert_eq!(told_of(pod(&two, &unknown)), [], "nobody can say whether the logger runs");
    let running = |name: &str, ready: bool| {
        let state = json!({"running": {}});
        json!({"name": name, "image": "", "imageID": "", "restartCount": 0, "ready": ready, "state": state})
    };
    let status = json!({"containerStatuses": [running("web", false), running("logger", true)]});
    assert_eq!(asked(pod(&two, &status)), [[http_action("/")]]);
    let status = json!({"containerStatuses": [running("web", true), running("logger", false)]});
    assert_eq!(asked(pod(&two, &status)), none, "kubelet has said the rest");
}

#[test]
fn every_container_is_asked_sidecars_too_and_one_that_cannot_be_leaves_the_pod_to_the_slices() {
    let containers = |second: &Value| {
        json!({
            "containers": [{"name": "web", "ports": [{"name": "http", "containerPort": 8080}], "readinessProbe": http("/")}],
            "initContainers": [{"name": "mesh", "restartPolicy": "Always", "readinessProbe": second}],
        })
    };
    let mesh = json!({"httpGet": {"path": "/mesh", "port": 15021}});
    let mesh_action = ProbeAction::Http { tls: false, port: 15021, path: "/mesh".into(), headers: vec![] };
    assert_eq!(asked(pod(&containers(&mesh), &json!({}))), [[mesh_action], [http_action("/")]]);
    assert_eq!(told_of(pod(&containers(&json!({"exec": {"command": ["true"]}})), &json!({}))), []);
}

#[test]
fn whatever_else_kubernetes_asks_of_a_ready_pod_must_be_so() {
    let gate = json!({"readinessGates": [{"conditionType": "lb/registered"}]});
    let ready = http("/");
    let spec = |mut more: Value| {
        more["containers"] =
            json!([{"name": "web", "ports": [{"name": "http", "containerPort": 8080}], "readinessProbe": ready}]);
        more
    };
    assert_eq!(told_of(pod(&spec(gate.clone()), &json!({}))), []);
    let open = json!({"conditions": [{"type": "lb/registered", "status": "True"}]});
    assert_eq!(told_of(pod(&spec(gate), &open)).len(), 1);
    let init = json!({"initContainers": [{"name": "migrate"}]});
    assert_eq!(told_of(pod(&spec(init.clone()), &json!({}))).len(), 1);
    let not_initialized = json!({"conditions": [{"type": "Initialized", "status": "False"}]});
    assert_eq!(told_of(pod(&spec(init), &not_initialized)), []);
    assert_eq!(told_of(pod(&spec(json!({"hostNetwork": true})), &json!({}))), [], "anybody may answer there");
    assert_eq!(told_of(pod(&spec(json!({})), &json!({"phase": "Failed"}))), []);
    assert_eq!(told_of(pod(&spec(json!({})), &json!({"podIP": null, "podIPs": null}))), []);
    let mut ending = pod(&spec(json!({})), &json!({}));
    ending.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-02T03:05:00Z")).unwrap());
    assert_eq!(told_of(ending), []);
}

#[test]
fn a_ready_that_was_withdrawn_waits_for_the_slices() {
    let conditions = json!({"conditions": [
        {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-02T03:05:00Z"},
    ]});
    let mut withdrawn = probed(&http("/"));
    withdrawn.status.as_mut().unwrap().conditions = serde_json::from_value(conditions["conditions"].clone()).unwrap();
    assert_eq!(told_of(withdrawn), [], "kubelet says that it was ready in between");

    let mut world = waking();
    world.pods = vec![Arc::new(probed(&http("/")))];
    assert_eq!(told(&mut world).len(), 1);
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    let mut now_ready = probed(&http("/"));
    now_ready.status.as_mut().unwrap().conditions = serde_json::from_value(ready["conditions"].clone()).unwrap();
    world.pods = vec![Arc::new(now_ready)];
    let [pod] = &told(&mut world)[..] else { panic!("one pod is told") };
    assert!(pod.containers.is_empty(), "kubelet has said it, the slices follow");
    world.pods = vec![Arc::new(probed(&http("/")))];
    assert_eq!(told(&mut world), [], "seen here");
}

#[test]
fn a_pod_that_was_ready_when_it_was_first_seen_is_left_to_the_slices() {
    let ready = pod(&json!({}), &json!({"conditions": [{"type": "Ready", "status": "True"}]}));
    assert_eq!(told_of(ready), [], "it may be one that has just been told to end");
}

#[test]
fn the_delay_of_a_probe_that_only_connects_is_waited_for() {
    let mut world = waking();
    let delayed = probed(&json!({"tcpSocket": {"port": 8080}, "initialDelaySeconds": 5}));
    world.pods = vec![Arc::new(delayed)];
    assert_eq!(told(&mut world), []);
    assert!(world.plan().again.is_some_and(|again| again <= Duration::from_secs(5)));
    world.pass(Duration::from_secs(5));
    assert_eq!(told(&mut world).len(), 1);
    assert_eq!(asked(probed(&json!({"httpGet": {"port": 1}, "initialDelaySeconds": 5}))).len(), 1);
}

#[test]
fn a_pod_of_a_target_at_zero_is_not_believed() {
    let mut world = waking();
    world.pods = vec![Arc::new(probed(&http("/")))];
    assert_eq!(told(&mut world).len(), 1);
    world.scale(0);
    assert_eq!(told(&mut world), []);
    world.scale(1);
    assert_eq!(told(&mut world), [], "the pod is about to end");
    world.pass(DISBELIEF);
    assert_eq!(told(&mut world).len(), 1, "it stays: the Deployment has kept it");
}

#[test]
fn nobody_is_told_of_while_a_pod_is_ready_or_the_service_is_direct() {
    let mut world = waking();
    world.pods = vec![Arc::new(probed(&http("/")))];
    world.ready = true;
    let plan = world.plan();
    assert!(!plan.follow_pods);
    assert_eq!(told(&mut world), []);
    world.ready = false;
    world.elasti.status.as_mut().unwrap().mode = Some(Mode::Serve);
    assert_eq!(told(&mut world), []);
}

#[test]
fn pods_are_looked_at_only_while_somebody_waits_or_has_lately() {
    let mut world = waking();
    assert!(world.plan().follow_pods);
    world.resolvers[0].traffic.held = 0;
    assert!(world.plan().follow_pods, "who was refused comes again");
    world.pass(Duration::from_mins(1));
    assert!(!world.plan().follow_pods);
    world.resolvers[0].traffic.held = 1;
    assert!(world.plan().follow_pods);
}

#[test]
fn how_many_ask_is_told_in_steps() {
    let mut world = waking();
    world.pods = vec![Arc::new(probed(&http("/")))];
    for number in 3..=5 {
        world.connect(number);
    }
    for resolver in &mut world.resolvers {
        resolver.traffic.held = 1;
    }
    let Publish::State(state) = world.plan().publish else { panic!("a state is published") };
    assert_eq!(state.asking, 8, "five do");
}
