//! Targets that do not simply start and stop: they end slowly, crash, flap, or are scaled by somebody else at the wrong moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::net::{SocketAddr, TcpStream};

use elasti_tests::cluster::{Sandbox, Target, from_pod, get, kubectl, metric, until};
use serde_json::json;

/// nginx that accepts nothing from SIGTERM on, and whose container ends long after.
fn slow_to_end(seconds: u32) -> Target {
    let mut target = Target::nginx("web");
    let script = format!("nginx -g 'daemon off;' & trap 'nginx -s stop; sleep {seconds}' TERM; wait");
    target.command = ["sh", "-c", &script].map(str::to_owned).to_vec();
    target.pod = json!({"terminationGracePeriodSeconds": seconds + 10});
    target
}

/// Connections of a namespace's Services that resolvers have accepted.
fn accepted(sandbox: &Sandbox) -> f64 {
    metric("elasti_resolver_accepted_connections_total", &format!("namespace=\"{}\"", sandbox.namespace))
}

#[test]
fn a_client_that_dials_the_address_of_an_ending_pod_is_held_and_answered_by_the_next_one() {
    let (sandbox, target) = (Sandbox::new("draining"), slow_to_end(20));
    sandbox.target(&target);
    let pod = sandbox.pods(&target).remove(0);
    let (name, ip) = (pod["metadata"]["name"].as_str().unwrap(), pod["status"]["podIP"].as_str().unwrap());
    // As an ingress controller with an old list of endpoints would: until somebody else answers there.
    let script = format!(
        "for call in $(seq 2000); do
            answer=$(curl -s --max-time 60 http://{ip}/) && case $answer in *{name}*) ;; *) echo $answer; exit;; esac
            touch /tmp/{name}; sleep 0.01
        done"
    );
    let answer = std::thread::scope(|scope| {
        let calls = scope.spawn(|| from_pod(2, &["sh", "-c", &script]));
        until("calls", || from_pod(2, &["sh", "-c", &format!("ls /tmp/{name} || true")]).contains(name).then_some(()));
        kubectl(&["-n", &sandbox.namespace, "scale", "deployment", &target.name, "--replicas=0"]);
        calls.join().unwrap()
    });
    assert!(answer.starts_with("nginx on web-"), "another pod answered: {answer:?}");
    let still = get(&sandbox.namespace, "pod", name).expect("the pod has not ended yet");
    assert!(still["metadata"]["deletionTimestamp"].is_string(), "{still}");
    let address = SocketAddr::new(ip.parse().unwrap(), 80);
    assert!(TcpStream::connect(address).is_err(), "it had stopped accepting");
    assert!(accepted(&sandbox) > 0.5, "a resolver held the connection");
    sandbox.awake(&target);
}

#[test]
fn kubelets_probes_of_an_ending_pod_wake_nothing() {
    let (sandbox, target) = (Sandbox::new("probed"), slow_to_end(8));
    sandbox.target(&target);
    // Both probe the address of the pod, every second and until it has ended.
    kubectl(&["-n", &sandbox.namespace, "scale", "deployment", &target.name, "--replicas=0"]);
    sandbox.asleep(&target);
    assert!(accepted(&sandbox) < 0.5, "nothing was redirected");
    let deployment = get(&sandbox.namespace, "deployment", &target.name).unwrap();
    assert_eq!(deployment["spec"]["replicas"], 0);
}
