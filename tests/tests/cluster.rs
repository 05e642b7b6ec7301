//! A Service sleeps and wakes on a real cluster: kubelet, kube-proxy, container runtime, nginx and Redis.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use elasti_tests::cluster::{
    HTTP, PATIENCE, Sandbox, Target, apply, from_host, from_pod, get, kubectl, list, metric, resolver_interface_bytes,
    try_kubectl, until,
};
use serde_json::json;

/// Address of node 2 in its cluster's network.
const NODE2: &str = "172.31.255.2";

/// Puts the target to sleep, makes sure that there is no pod, calls, and waits until it is served directly again.
fn wake(sandbox: &Sandbox, target: &Target, call: impl FnOnce() -> String) -> String {
    sandbox.sleep(target);
    assert!(sandbox.pods(target).is_empty(), "no pod existed at the start");
    let answer = call();
    sandbox.awake(target);
    answer
}

#[test]
fn test_1_http_wakes_from_pods_hosts_and_node_ports() {
    let (sandbox, target) = (Sandbox::new("http"), Target::nginx("web"));
    sandbox.target(&target);
    let address = sandbox.cluster_address(&target, 80);
    let url = format!("http://{address}/");
    let node_port = SocketAddr::new(NODE2.parse().unwrap(), sandbox.node_port(&target, 80));
    let curl = ["curl", "-sS", "--max-time", "60"];
    let pod = |node: usize, url: &str| from_pod(node, &[&curl[..], &[url]].concat());

    assert!(wake(&sandbox, &target, || pod(1, &url)).starts_with("nginx on web-"), "a pod on the target's node");
    assert!(wake(&sandbox, &target, || pod(2, &url)).starts_with("nginx on web-"), "a pod on the other node");
    assert!(wake(&sandbox, &target, || from_host(address, HTTP, 4096)).contains("nginx on web-"), "the host");
    assert!(wake(&sandbox, &target, || from_host(node_port, HTTP, 4096)).contains("nginx on web-"), "a node port");
}

#[test]
fn test_1_tls_wakes_from_pods_hosts_and_node_ports() {
    let (sandbox, target) = (Sandbox::new("tls"), Target::nginx("web"));
    sandbox.target(&target);
    let url = format!("https://{}/", sandbox.cluster_address(&target, 443));
    let node_port = format!("https://{NODE2}:{}/", sandbox.node_port(&target, 443));
    let curl = ["-sSk", "--max-time", "60"];
    let pod = |node: usize| from_pod(node, &[&["curl"], &curl[..], &[&url]].concat());
    let host = |url: &str| {
        let output = std::process::Command::new("curl").args(curl).arg(url).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(wake(&sandbox, &target, || pod(1)).starts_with("nginx on web-"), "a pod on the target's node");
    assert!(wake(&sandbox, &target, || pod(2)).starts_with("nginx on web-"), "a pod on the other node");
    assert!(wake(&sandbox, &target, || host(&url)).starts_with("nginx on web-"), "the host");
    assert!(wake(&sandbox, &target, || host(&node_port)).starts_with("nginx on web-"), "a node port");
}

/// Keeps out B48: only HTTP wakes.
#[test]
fn test_1_redis_wakes_from_pods_hosts_and_node_ports() {
    let (sandbox, target) = (Sandbox::new("redis"), Target::redis("cache"));
    sandbox.target(&target);
    let address = sandbox.cluster_address(&target, 6379);
    let ip = address.ip().to_string();
    let node_port = SocketAddr::new(NODE2.parse().unwrap(), sandbox.node_port(&target, 6379));
    let pod = |node: usize| from_pod(node, &["redis-cli", "-h", &ip, "PING"]);

    assert_eq!(wake(&sandbox, &target, || pod(1)).trim(), "PONG", "a pod on the target's node");
    assert_eq!(wake(&sandbox, &target, || pod(2)).trim(), "PONG", "a pod on the other node");
    assert_eq!(wake(&sandbox, &target, || from_host(address, b"PING\r\n", 7)), "+PONG\r\n", "the host");
    assert_eq!(wake(&sandbox, &target, || from_host(node_port, b"PING\r\n", 7)), "+PONG\r\n", "a node port");
}

#[test]
fn test_1_a_server_that_speaks_first_wakes() {
    let (sandbox, target) = (Sandbox::new("greeter"), Target::greeter("mail"));
    sandbox.target(&target);
    let address = sandbox.cluster_address(&target, 2525);
    assert_eq!(wake(&sandbox, &target, || from_host(address, b"", 10)), "220 ready\n");
}

/// Keeps out B30: only the first port is served; no port crashes the operator.
#[test]
fn test_2_both_ports_of_a_service_wake_it() {
    let (sandbox, target) = (Sandbox::new("ports"), Target::nginx("web"));
    sandbox.target(&target);
    for url in [
        format!("http://{}/", sandbox.cluster_address(&target, 80)),
        format!("https://{}/", sandbox.cluster_address(&target, 443)),
    ] {
        let answer = wake(&sandbox, &target, || from_pod(1, &["curl", "-sSk", "--max-time", "60", &url]));
        assert!(answer.starts_with("nginx on web-"), "{url}: {answer}");
    }
}

#[test]
fn test_3_ebpf_alone_wakes_and_the_client_sees_the_address_it_dialled() {
    let (sandbox, target) = (Sandbox::new("ebpf"), Target::nginx("web"));
    sandbox.target(&target);
    sandbox.sleep(&target);
    // Removed by hand, a slice comes back; with this it stays away.
    apply(&json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "no-resolver-slices"},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": sandbox.namespace}},
                "resourceRules": [{
                    "apiGroups": ["discovery.k8s.io"], "apiVersions": ["v1"], "operations": ["CREATE"],
                    "resources": ["endpointslices"],
                }],
            },
            "validations": [{"expression": "!object.metadata.name.startsWith('elasti-')"}],
        },
    }));
    apply(&json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "no-resolver-slices"},
        "spec": {"policyName": "no-resolver-slices", "validationActions": ["Deny"]},
    }));
    // The policy is in force once it refuses what it shall refuse.
    until("the policy is in force", || {
        let probe = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": [],
            "metadata": {"name": "elasti-probe", "namespace": sandbox.namespace},
        });
        try_kubectl(&["create", "--dry-run=server", "-f", "-"], Some(&probe.to_string())).is_err().then_some(())
    });
    let slice = elasti_api::names::resolver_slice(&target.name, false);
    kubectl(&["-n", &sandbox.namespace, "delete", "endpointslice", &slice]);
    let address = sandbox.cluster_address(&target, 80);
    let node_port = SocketAddr::new(NODE2.parse().unwrap(), sandbox.node_port(&target, 80));
    until("kube-proxy has no endpoint", || TcpStream::connect_timeout(&node_port, Duration::from_millis(200)).err());
    assert!(sandbox.pods(&target).is_empty(), "no pod existed at the start");

    let format = "%{remote_ip}:%{remote_port}";
    let answer = from_pod(2, &["curl", "-sS", "--max-time", "60", "-w", format, &format!("http://{address}/")]);
    assert!(sandbox.slice(&target).is_none(), "no slice came back");
    kubectl(&["delete", "validatingadmissionpolicybindings,validatingadmissionpolicies", "no-resolver-slices"]);
    assert!(answer.starts_with("nginx on web-"), "{answer}");
    assert!(answer.ends_with(&address.to_string()), "the client's peer is {address}: {answer}");
}

#[test]
fn test_4_namesakes_in_two_namespaces_wake_at_the_same_instant() {
    let sandboxes = [Sandbox::new("namesake-a"), Sandbox::new("namesake-b")];
    let target = Target::nginx("web");
    for sandbox in &sandboxes {
        sandbox.target(&target);
        sandbox.sleep(&target);
        assert!(sandbox.pods(&target).is_empty(), "no pod existed at the start");
    }
    let addresses = sandboxes.each_ref().map(|sandbox| sandbox.cluster_address(&target, 80));
    let start = Barrier::new(addresses.len());
    std::thread::scope(|scope| {
        let calls = addresses.map(|address| {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                from_host(address, HTTP, 4096)
            })
        });
        for call in calls {
            assert!(call.join().unwrap().contains("nginx on web-"));
        }
    });
    for sandbox in &sandboxes {
        sandbox.awake(&target);
    }
}

#[test]
fn test_5_two_hundred_connections_at_once_are_answered_by_the_first_ready_pod() {
    const CONNECTIONS: usize = 200;
    let (sandbox, target) = (Sandbox::new("burst"), Target::nginx("web"));
    sandbox.target(&target);
    sandbox.sleep(&target);
    assert!(sandbox.pods(&target).is_empty(), "no pod existed at the start");
    let address = sandbox.cluster_address(&target, 80);
    let start = Barrier::new(CONNECTIONS);
    let mut answered: Vec<Instant> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    let answer = from_host(address, HTTP, 4096);
                    let at = Instant::now();
                    assert!(answer.contains("nginx on web-"), "{answer}");
                    at
                })
            })
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    answered.sort();
    let spread = answered[CONNECTIONS - 1] - answered[0];
    assert!(spread < Duration::from_secs(1), "the last answer came {spread:?} after the first");
}

/// Calls a target that cannot wake, and waits for the end of the connection and for a condition and an event.
fn held_until_the_hold_time_ends(
    test: &str,
    mut target: Target,
    reason: &str,
    break_it: impl FnOnce(&Sandbox, &Target),
) {
    const HOLD: Duration = Duration::from_secs(12);
    target.spec = json!({"hold": {"timeout": format!("{}s", HOLD.as_secs())}});
    let sandbox = Sandbox::new(test);
    sandbox.target(&target);
    sandbox.sleep(&target);
    break_it(&sandbox, &target);
    let address = sandbox.cluster_address(&target, 80);
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(HTTP).unwrap();
    let named = std::thread::scope(|scope| {
        let named = scope.spawn(|| {
            until("a condition names the cause", || {
                let conditions = ["TargetReady", "Ready"].map(|type_| sandbox.condition(&target, type_));
                conditions.into_iter().flatten().find(|(status, found, _)| status == "False" && found == reason)
            })
        });
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let held = begun.elapsed();
        assert!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
        assert!(held >= HOLD, "closed after {held:?} already");
        named.join().unwrap()
    });
    assert!(named.2.contains("web"), "the message names the object: {}", named.2);
    until("an event names the cause", || {
        let events = list(&sandbox.namespace, "events", "");
        let on_it = |event: &serde_json::Value| {
            event["involvedObject"]["kind"] == "ElastiService"
                && event["reason"] == reason
                && event["type"] == "Warning"
        };
        events.iter().any(on_it).then_some(())
    });
}

#[test]
fn test_6_a_target_that_is_deleted_holds_its_clients_until_the_hold_time_ends() {
    held_until_the_hold_time_ends("deleted", Target::nginx("web"), "TargetNotFound", |sandbox, target| {
        kubectl(&["-n", &sandbox.namespace, "delete", "deployment", &target.name]);
    });
}

#[test]
fn test_6_a_target_that_never_becomes_ready_holds_its_clients_until_the_hold_time_ends() {
    held_until_the_hold_time_ends("unready", Target::nginx("web"), "NotReady", |sandbox, target| {
        let patch = json!([{"op": "replace", "path": "/spec/template/spec/containers/0/readinessProbe/tcpSocket/port", "value": 9}]);
        kubectl(&[
            "-n",
            &sandbox.namespace,
            "patch",
            "deployment",
            &target.name,
            "--type=json",
            "-p",
            &patch.to_string(),
        ]);
    });
}

#[test]
fn test_6_a_target_whose_image_cannot_be_pulled_holds_its_clients_until_the_hold_time_ends() {
    held_until_the_hold_time_ends("unpullable", Target::nginx("web"), "ErrImageNeverPull", |sandbox, target| {
        let patch =
            json!([{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "nowhere/nothing:1"}]);
        kubectl(&[
            "-n",
            &sandbox.namespace,
            "patch",
            "deployment",
            &target.name,
            "--type=json",
            "-p",
            &patch.to_string(),
        ]);
    });
}

#[test]
fn test_7_a_warm_service_passes_no_resolver() {
    const REQUESTS: usize = 2000;
    let (sandbox, target) = (Sandbox::new("warm"), Target::nginx("web"));
    sandbox.target(&target);
    let address = sandbox.cluster_address(&target, 80);
    assert!(wake(&sandbox, &target, || from_host(address, HTTP, 4096)).contains("nginx on web-"));
    let labels = format!("namespace=\"{}\"", sandbox.namespace);
    let seen = || {
        ["accepted_connections_total", "forwarded_bytes_total"]
            .map(|name| metric(&format!("elasti_resolver_{name}"), &labels))
    };
    let before = (seen(), resolver_interface_bytes());
    assert!(before.0[0] > 0.0, "the wake passed a resolver: {before:?}");
    let mut carried = 0;
    for _ in 0..REQUESTS {
        carried += from_host(address, HTTP, 4096).len() + HTTP.len();
    }
    let after = (seen(), resolver_interface_bytes());
    assert!(after.0.iter().zip(before.0).all(|(after, before)| (after - before).abs() < 0.5), "{before:?} {after:?}");
    let passed = after.1 - before.1;
    assert!(
        passed < u64::try_from(carried / 4).unwrap(),
        "{carried} bytes of answers and requests, {passed} bytes on the resolvers' interfaces"
    );
}

/// Keeps out B27: objects are made again while the finalizer runs.
#[test]
fn a_deleted_elasti_service_leaves_everything_as_it_was() {
    let (sandbox, target) = (Sandbox::new("deleted-es"), Target::nginx("web"));
    sandbox.target(&target);
    sandbox.sleep(&target);
    let address = sandbox.cluster_address(&target, 80);
    kubectl(&["-n", &sandbox.namespace, "delete", "elastiservice", &target.name, "--wait=false"]);
    // Whoever comes meanwhile is held, forwarded, and left to the pods, in this order.
    until("the ElastiService is gone", || {
        assert!(from_host(address, HTTP, 4096).contains("nginx on web-"));
        sandbox.elasti_service(&target).is_none().then_some(())
    });
    let deployment = get(&sandbox.namespace, "deployment", &target.name).unwrap();
    assert_eq!(deployment["spec"]["replicas"], 1, "scaled back up");
    assert!(sandbox.slice(&target).is_none());
    let private = elasti_api::names::private_service(&target.name);
    assert!(get(&sandbox.namespace, "service", &private).is_none());
    assert!(from_host(address, HTTP, 4096).contains("nginx on web-"));
}

/// Keeps out B20: a target at zero beforehand is not intercepted for up to 5 minutes.
#[test]
fn a_target_that_was_at_zero_before_its_elasti_service_is_intercepted() {
    let (sandbox, target) = (Sandbox::new("zero-first"), Target::nginx("web"));
    sandbox.target(&target);
    kubectl(&["-n", &sandbox.namespace, "delete", "elastiservice", &target.name, "--timeout=60s"]);
    kubectl(&["-n", &sandbox.namespace, "scale", "deployment", &target.name, "--replicas=0"]);
    until("no pod is left", || sandbox.pods(&target).is_empty().then_some(()));
    sandbox.apply(target.elasti_service());
    sandbox.asleep(&target);
    let address = sandbox.cluster_address(&target, 80);
    assert!(from_host(address, HTTP, 4096).contains("nginx on web-"));
}

#[test]
fn an_idle_target_is_put_to_sleep_by_its_prometheus_trigger() {
    let (sandbox, mut target) = (Sandbox::new("idle"), Target::nginx("web"));
    target.spec = json!({"cooldownPeriod": 5, "triggers": [sandbox.idle_trigger()]});
    sandbox.target(&target);
    sandbox.asleep(&target);
    let address = sandbox.cluster_address(&target, 80);
    assert!(from_host(address, HTTP, 4096).contains("nginx on web-"), "and wakes again");
}
