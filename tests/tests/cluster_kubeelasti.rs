//! KubeElasti's fourteen end-to-end cases with the same steps, and at least its assertions; those that change the installation are in
//! `cluster_installation.rs`. Where its tests repeat a request or bear a failed one, none is borne here.
//! docs/migrating-from-kubeelasti.md lists them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::net::SocketAddr;

use elasti_api::names::{RESOLVER_PROXY_PORT, private_service};
use elasti_tests::cluster::{Sandbox, from_host, from_pod, get, list, metric, resolvers, until};
use elasti_tests::cycles::clients::Clients;
use elasti_tests::cycles::run::TRAFFIC_IMAGE;
use elasti_tests::kubeelasti::{
    NAME, begin, httpbin, is_well, prometheus, push, scaled_object, send_traffic, set_up, trigger,
};
use elasti_traffic::record::{Kind, Load};
use serde_json::{Value, json};

fn scale(sandbox: &Sandbox, workload: &str, replicas: u32) {
    sandbox.kubectl(&["scale", workload, &format!("--replicas={replicas}")]);
}

fn rolled_out(sandbox: &Sandbox) {
    sandbox.kubectl(&["rollout", "status", &format!("deployment/{NAME}"), "--timeout=60s"]);
}

fn replicas(sandbox: &Sandbox, kind: &str, name: &str) -> i64 {
    get(&sandbox.namespace, kind, name).unwrap()["spec"]["replicas"].as_i64().unwrap()
}

#[test]
fn e2e_01_proxy_by_hand() {
    let (sandbox, target) = begin("e2e-01");
    sandbox.sleep(&target);
    assert_eq!(sandbox.mode(&target).as_deref(), Some("proxy"));
}

#[test]
fn e2e_02_serve_by_traffic_with_answers_of_each_kind() {
    let (sandbox, target) = begin("e2e-02");
    for path in ["/bytes", "/drip", "/stream", "/ip"] {
        sandbox.sleep(&target);
        let sizes = send_traffic(&sandbox, NAME, path);
        let is_whole = |size: &usize| match path {
            "/bytes" | "/stream" => *size == 1 << 20,
            "/drip" => *size == 40,
            _ => *size > 6,
        };
        assert!(sizes.iter().all(is_whole), "{path}: {sizes:?} bytes");
        rolled_out(&sandbox);
        sandbox.awake(&target);
    }
}

#[test]
fn e2e_03_serve_by_hand() {
    let (sandbox, target) = begin("e2e-03");
    sandbox.sleep(&target);
    scale(&sandbox, &format!("deployment/{NAME}"), 1);
    rolled_out(&sandbox);
    sandbox.awake(&target);
}

#[test]
fn e2e_04_the_private_service_follows_the_public_one_at_zero() {
    let (sandbox, target) = begin("e2e-04");
    sandbox.sleep(&target);
    sandbox.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME},
        "spec": {
            "type": "NodePort", "selector": {"app": NAME, "test-label": "test-label"},
            "ports": [{"name": "p80", "port": 85, "targetPort": 1111, "protocol": "TCP"}],
        },
    }));
    let private = private_service(NAME);
    assert_eq!(private, "elasti-target-deployment-pvt-9696239e87");
    until("the private Service follows", || {
        let spec = get(&sandbox.namespace, "service", &private)?["spec"].take();
        let ports = spec["ports"].as_array()?.clone();
        let [port] = &ports[..] else { return None };
        let follows = spec["selector"] == json!({"app": NAME, "test-label": "test-label"})
            && (&port["port"], &port["targetPort"], &port["protocol"]) == (&json!(85), &json!(1111), &json!("TCP"));
        follows.then_some(())
    });
}

#[test]
fn e2e_05_the_private_service_goes_with_the_elasti_service() {
    let (sandbox, target) = begin("e2e-05");
    let private = private_service(NAME);
    sandbox.sleep(&target);
    assert!(get(&sandbox.namespace, "service", &private).is_some());
    scale(&sandbox, &format!("deployment/{NAME}"), 1);
    rolled_out(&sandbox);
    sandbox.kubectl(&["delete", "elastiservice", NAME, "--timeout=60s"]);
    until("the private Service is gone", || get(&sandbox.namespace, "service", &private).is_none().then_some(()));
}

/// Debian's Prometheus says so, from what is pushed to it.
#[test]
fn e2e_07_scaled_down_by_prometheus_with_a_filter() {
    // Seconds; KubeElasti's test has 30. So long must Prometheus have been up, and then have called the target idle.
    const COOLDOWN: u32 = 10;
    let (sandbox, target) = begin("e2e-07");
    let mut busy = httpbin("busy");
    busy.spec["autoscaler"] = Value::Null;
    sandbox.target(&busy);
    let cooldown = |name: &str, query: &str| {
        let spec = json!({"cooldownPeriod": COOLDOWN, "triggers": [trigger(query, r#"container="foo""#)]});
        sandbox.patch(&["elastiservice", name], &json!({"spec": spec}));
    };
    cooldown(NAME, "round(sum(rate(some_metric[20s])),0.001) or vector(0)");
    cooldown("busy", "some_load");
    push("some_metric 0\nsome_load 5\nup{container=\"foo\"} 1\n");
    sandbox.kubectl(&["wait", "--for=delete", "pod", "-l", &format!("app={NAME}"), "--timeout=150s"]);
    sandbox.asleep(&target);
    let scaled = get(&sandbox.namespace, "scaledobject", "target-scaled-object").unwrap();
    assert_eq!(scaled["metadata"]["annotations"]["autoscaling.keda.sh/paused"], "true", "KEDA is paused");
    assert_eq!(replicas(&sandbox, "deployment", "busy"), 1, "what Prometheus calls busy stays up");
}

#[test]
fn e2e_08_proxy_until_a_pod_is_ready() {
    let (sandbox, target) = begin("e2e-08");
    sandbox.sleep(&target);
    let startup = json!({"tcpSocket": {"port": 80}, "initialDelaySeconds": 20});
    let operations = json!([
        {"op": "add", "path": "/spec/template/spec/containers/0/startupProbe", "value": startup},
        {"op": "add", "path": "/spec/template/metadata/annotations", "value": {"sidecar.istio.io/inject": "false"}},
    ]);
    sandbox.kubectl(&["patch", "deployment", NAME, "--type=json", "-p", &operations.to_string()]);
    sandbox.kubectl(&["annotate", "scaledobject", "target-scaled-object", "autoscaling.keda.sh/paused=true"]);
    let busy = trigger("vector(1)", r#"container="prometheus""#);
    sandbox.patch(&["elastiservice", NAME], &json!({"spec": {"triggers": [busy]}}));
    scale(&sandbox, &format!("deployment/{NAME}"), 1);
    until("the pod runs", || {
        let pods = sandbox.pods(&target);
        let status = &pods.first()?["status"]["containerStatuses"][0];
        (status["state"]["running"].is_object() && status["ready"] == false).then_some(())
    });
    let not_ready = get(&sandbox.namespace, "deployment", NAME).unwrap()["status"]["readyReplicas"].take();
    assert_eq!((sandbox.mode(&target).as_deref(), not_ready), (Some("proxy"), Value::Null));
    assert!(sandbox.slice(&target).is_some(), "resolvers are there for whoever comes");
    scale(&sandbox, &format!("deployment/{NAME}"), 2);
    rolled_out(&sandbox);
    sandbox.awake(&target);
}

#[test]
fn e2e_09_a_stateful_set_serves_by_traffic() {
    const NAME: &str = "target-statefulset";
    let (sandbox, mut target) = (Sandbox::new("e2e-09"), httpbin(NAME));
    prometheus();
    scaled_object(&sandbox, "StatefulSet", NAME);
    target.spec["scaleTargetRef"] = json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "name": NAME});
    let mut workload = target.deployment();
    workload["kind"] = json!("StatefulSet");
    workload["spec"]["serviceName"] = json!(NAME);
    workload["spec"].as_object_mut().unwrap().remove("strategy");
    sandbox.apply(workload);
    sandbox.apply(target.service());
    sandbox.apply(target.elasti_service());
    sandbox.awake(&target);
    is_well(&sandbox, &target);
    scale(&sandbox, &format!("statefulset/{NAME}"), 0);
    sandbox.asleep(&target);
    send_traffic(&sandbox, NAME, "/ip");
    sandbox.kubectl(&["wait", "--for=condition=Ready", "pod", "-l", &format!("app={NAME}"), "--timeout=60s"]);
    sandbox.awake(&target);
}

#[test]
fn e2e_10_headers_reach_the_target_that_they_wake() {
    let (sandbox, target) = begin("e2e-10");
    sandbox.sleep(&target);
    let url = format!("http://{NAME}.{}.svc.cluster.local/headers", sandbox.namespace);
    let header = "X-Elasti-Test: elasti-custom-header-check";
    let answer = from_pod(2, &["curl", "-sS", "--max-time", "60", "-H", header, &url]);
    assert_eq!(answer, "elasti-custom-header-check");
}

#[test]
fn e2e_11_probes_are_answered_at_zero_and_wake_nothing() {
    let (sandbox, mut target) = (Sandbox::new("e2e-11"), httpbin(NAME));
    let rule = |method: &str, path: &str, body: &str| {
        json!({
            "path": {"type": "Exact", "value": path}, "method": method, "response": {"status": 200, "body": body},
        })
    };
    target.spec["probeResponse"] =
        json!([rule("GET", "/healthz", r#"{"ok":true}"#), rule("POST", "/hook", r#"{"ready":true}"#)]);
    set_up(&sandbox, &target);
    let pause = ["autoscaling.keda.sh/paused=true", "autoscaling.keda.sh/paused-replicas=0"];
    sandbox.kubectl(&[&["annotate", "scaledobject", "target-scaled-object"], &pause[..]].concat());
    sandbox.sleep(&target);
    let url = format!("http://{NAME}.{}.svc.cluster.local", sandbox.namespace);
    for _ in 0..10 {
        let healthy = from_pod(1, &["curl", "-sSf", "--max-time", "10", &format!("{url}/healthz")]);
        let hooked = from_pod(2, &["curl", "-sSf", "--max-time", "10", "-X", "POST", &format!("{url}/hook")]);
        assert_eq!((healthy.as_str(), hooked.as_str()), (r#"{"ok":true}"#, r#"{"ready":true}"#));
    }
    let labels = format!("namespace=\"{}\"", sandbox.namespace);
    assert!(metric("elasti_resolver_probe_responses_total", &labels) > 19.5);
    assert_eq!(replicas(&sandbox, "deployment", NAME), 0, "nothing was woken");
    assert_eq!(sandbox.mode(&target).as_deref(), Some("proxy"));
}

#[test]
fn e2e_12_a_second_request_of_the_same_connection_is_answered() {
    let (sandbox, target) = begin("e2e-12");
    sandbox.sleep(&target);
    let url = format!("http://{NAME}.{}.svc.cluster.local/uuid", sandbox.namespace);
    let call = format!("curl -sS --max-time 160 -w ' %{{http_code}}\\n' {url} {url}");
    let told = from_pod(1, &["sh", "-ec", &format!("for call in 1 2 3 4 5; do {call}; done")]);
    let answers: BTreeSet<&str> = told.lines().collect();
    assert_eq!(answers.len(), 10, "each request has its own answer: {told}");
    assert!(answers.iter().all(|answer| answer.ends_with(" 200")), "{told}");
}

/// What is h2c is recognised; KubeElasti is told so by an option.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2e_13_grpc_calls_and_streams_wake_beside_http() {
    let (sandbox, mut target) = (Sandbox::new("e2e-13"), httpbin("target-grpc"));
    target.spec["autoscaler"] = Value::Null;
    target.command = ["/elasti-traffic", "serve"].map(str::to_owned).to_vec();
    target.container = json!({
        "image": TRAFFIC_IMAGE,
        "readinessProbe": {"httpGet": {"path": "/echo/ready", "port": 80}, "periodSeconds": 1},
    });
    sandbox.target(&target);
    let clients = Clients::start(&sandbox.namespace, &[]);
    let address = sandbox.cluster_address(&target, 80);
    let load = |kind: Kind, messages: u32, interval: u64| Load {
        load: 0,
        address,
        kind,
        most: 5,
        interval,
        phase: 0,
        messages,
        pause: 10_000,
    };
    let answered = async |loads: &[(usize, Load)]| {
        let running: Vec<_> = loads.iter().map(|(place, load)| clients.begin(*place, load)).collect();
        for load in running {
            let records = clients.records(load).await;
            let failed: Vec<_> = records.iter().filter_map(|record| record.error.as_ref()).collect();
            assert!(records.len() == 5 && failed.is_empty(), "{} calls, failed: {failed:?}", records.len());
        }
    };
    let (unary, stream) = (load(Kind::Grpc, 1, 20_000), load(Kind::Grpc, 5, 20_000));
    sandbox.sleep(&target);
    answered(&[(0, unary.clone())]).await;
    sandbox.awake(&target);
    answered(&[(0, stream.clone()), (1, unary.clone())]).await;
    sandbox.sleep(&target);
    answered(&[(1, stream.clone())]).await;
    sandbox.awake(&target);
    sandbox.sleep(&target);
    answered(&[(0, unary), (1, stream), (0, load(Kind::NewConnection, 1, 20_000))]).await;
    sandbox.awake(&target);
}

/// Istio, ingress-nginx, Traefik and Envoy Gateway dial what EndpointSlices call ready, under host names of their own; a gateway of
/// Istio that dials resolvers names the Service in a header.
#[test]
fn clients_that_dial_endpoints_or_the_proxy_port_wake() {
    let (sandbox, mut target) = (Sandbox::new("endpoints"), httpbin(NAME));
    target.spec["autoscaler"] = Value::Null;
    sandbox.target(&target);
    let ask = |address: SocketAddr, header: &str| {
        let request = format!(
            "GET /headers HTTP/1.1\r\nHost: shop.example.com\r\nX-Elasti-Test: came\r\nConnection: close\r\n{header}\r\n"
        );
        let answer = from_host(address, request.as_bytes(), 4096);
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("came"), "{answer}");
    };
    sandbox.sleep(&target);
    let slices = list(&sandbox.namespace, "endpointslices", &format!("kubernetes.io/service-name={NAME}"));
    let ready: Vec<SocketAddr> = slices
        .iter()
        .flat_map(|slice| {
            let port = slice["ports"][0]["port"].as_u64().unwrap_or_default();
            let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
            endpoints.into_iter().filter(|endpoint| endpoint["conditions"]["ready"] == true).map(move |endpoint| {
                let address = endpoint["addresses"][0].as_str().unwrap().parse().unwrap();
                SocketAddr::new(address, u16::try_from(port).unwrap())
            })
        })
        .collect();
    assert_eq!(ready.len(), resolvers().len(), "{slices:?}");
    for address in ready {
        ask(address, "");
    }
    sandbox.awake(&target);
    sandbox.sleep(&target);
    let resolver = resolvers()[0]["status"]["podIP"].as_str().unwrap().parse().unwrap();
    let operation = format!("X-Envoy-Decorator-Operation: {NAME}.{}.svc.cluster.local:80/*\r\n", sandbox.namespace);
    ask(SocketAddr::new(resolver, RESOLVER_PROXY_PORT), &operation);
    sandbox.awake(&target);
}
