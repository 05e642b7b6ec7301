//! Targets that do not simply start and stop: they end slowly, crash, flap, or are scaled by somebody else at the wrong moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::net::{SocketAddr, TcpStream};

use elasti_tests::cluster::{Sandbox, Target, from_pod, get, metric, until};
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
        sandbox.kubectl(&["scale", "deployment", &target.name, "--replicas=0"]);
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
    sandbox.kubectl(&["scale", "deployment", &target.name, "--replicas=0"]);
    sandbox.asleep(&target);
    assert!(accepted(&sandbox) < 0.5, "nothing was redirected");
    let deployment = get(&sandbox.namespace, "deployment", &target.name).unwrap();
    assert_eq!(deployment["spec"]["replicas"], 0);
}

fn replicas(sandbox: &Sandbox, target: &Target) -> i64 {
    let deployment = get(&sandbox.namespace, "deployment", &target.name).unwrap();
    deployment["spec"]["replicas"].as_i64().unwrap()
}

#[test]
fn a_client_is_held_through_the_crashes_of_its_target() {
    let (sandbox, mut target) = (Sandbox::new("crashing"), Target::nginx("web"));
    // Ends in failure at its first start in each pod; the volume outlives the container.
    let script = "[ -e /state/tried ] || { touch /state/tried; exit 1; }; exec nginx -g 'daemon off;'";
    target.command = ["sh", "-c", script].map(str::to_owned).to_vec();
    target.container = json!({"volumeMounts": [{"name": "state", "mountPath": "/state"}]});
    target.pod = json!({"volumes": [{"name": "state", "emptyDir": {}}]});
    sandbox.target(&target);
    sandbox.sleep(&target);
    assert!(sandbox.call(&target, 2).starts_with("nginx on web-"));
    // Its client is answered sooner than kubelet tells of the restart.
    until("it is seen to have crashed once", || {
        let restarts = sandbox.pods(&target).remove(0)["status"]["containerStatuses"][0]["restartCount"].as_i64();
        (restarts == Some(1)).then_some(())
    });
}

/// Keeps out B24: `status.replicas` is compared.
#[test]
fn a_target_that_is_scaled_to_zero_in_the_middle_of_a_wake_is_woken_again() {
    let (sandbox, mut target) = (Sandbox::new("undone"), Target::nginx("web"));
    let script = "sleep 4; exec nginx -g 'daemon off;'";
    target.command = ["sh", "-c", script].map(str::to_owned).to_vec();
    sandbox.target(&target);
    sandbox.sleep(&target);
    let answer = std::thread::scope(|scope| {
        let call = scope.spawn(|| sandbox.call(&target, 2));
        until("the target is woken", || (replicas(&sandbox, &target) == 1).then_some(()));
        sandbox.kubectl(&["scale", "deployment", &target.name, "--replicas=0"]);
        until("the target is woken again", || (replicas(&sandbox, &target) == 1).then_some(()));
        call.join().unwrap()
    });
    assert!(answer.starts_with("nginx on web-"), "{answer}");
    sandbox.awake(&target);
}

#[test]
fn a_target_that_flaps_is_intercepted_while_it_is_not_ready_and_served_while_it_is() {
    let (sandbox, mut target) = (Sandbox::new("flapping"), Target::nginx("web"));
    let probe =
        json!({"exec": {"command": ["test", "!", "-e", "/tmp/unready"]}, "periodSeconds": 1, "failureThreshold": 1});
    target.container = json!({"readinessProbe": probe});
    sandbox.target(&target);
    let pod = sandbox.pods(&target).remove(0)["metadata"]["name"].as_str().unwrap().to_owned();
    for _ in 0..3 {
        sandbox.kubectl(&["exec", &pod, "--", "touch", "/tmp/unready"]);
        let resolvers = elasti_tests::cluster::resolvers().len();
        until("it is intercepted", || {
            let slice = sandbox.slice(&target)?;
            (slice["endpoints"].as_array()?.len() == resolvers).then_some(())
        });
        let before = accepted(&sandbox);
        let answer = std::thread::scope(|scope| {
            let call = scope.spawn(|| sandbox.call(&target, 2));
            until("a resolver holds it", || (accepted(&sandbox) > before + 0.5).then_some(()));
            assert!(!call.is_finished(), "nobody is ready");
            sandbox.kubectl(&["exec", &pod, "--", "rm", "/tmp/unready"]);
            call.join().unwrap()
        });
        assert_eq!(answer.trim(), format!("nginx on {pod}"));
        sandbox.awake(&target);
    }
    assert_eq!(replicas(&sandbox, &target), 1);
}

/// Calls again and again from a pod until told to end; returns how many calls there were, and what failed.
/// Calls are few where most of them are held.
fn calls_while(sandbox: &Sandbox, target: &Target, something: impl FnOnce()) -> (usize, Vec<String>) {
    let url = format!("http://{}/", sandbox.cluster_address(target, 80));
    let (end, begun) = (format!("/tmp/end-{}", sandbox.namespace), format!("/tmp/begun-{}", sandbox.namespace));
    let script = format!(
        "rm -f {end}; while [ ! -e {end} ]; do
            curl -sS --max-time 60 {url} 2>&1 || echo failed; touch {begun}; sleep 0.02
        done"
    );
    let output = std::thread::scope(|scope| {
        let calls = scope.spawn(|| from_pod(2, &["sh", "-c", &script]));
        until("calls", || from_pod(2, &["sh", "-c", &format!("ls {begun} || true")]).contains(&begun).then_some(()));
        something();
        from_pod(2, &["touch", &end]);
        calls.join().unwrap()
    });
    let failed = output.lines().filter(|line| !line.starts_with("nginx on web-")).map(str::to_owned).collect();
    (output.lines().count(), failed)
}

/// A target at one replica whose pods serve on for some seconds when they are to end, as Kubernetes asks of any.
fn drains(strategy: &str) -> Target {
    let mut target = Target::nginx("web");
    target.container = json!({"lifecycle": {"preStop": {"exec": {"command": ["sleep", "3"]}}}});
    target.pod = json!({"terminationGracePeriodSeconds": 10});
    target.strategy = json!({"type": strategy});
    target
}

fn rolls_without_a_failed_request(test: &str, strategy: &str) {
    let (sandbox, target) = (Sandbox::new(test), drains(strategy));
    sandbox.target(&target);
    let (calls, failed) = calls_while(&sandbox, &target, || {
        sandbox.kubectl(&["rollout", "restart", "deployment", &target.name]);
        sandbox.kubectl(&["rollout", "status", "deployment", &target.name, "--timeout=60s"]);
        sandbox.awake(&target);
    });
    eprintln!("{test}: {calls} calls during the rollout, {} failed", failed.len());
    assert!(calls > 2 && failed.is_empty(), "{calls} calls, failed: {failed:?}");
}

#[test]
fn a_rolling_update_at_one_replica_fails_no_request() {
    rolls_without_a_failed_request("rolling", "RollingUpdate");
}

#[test]
fn an_update_that_recreates_the_only_pod_fails_no_request() {
    rolls_without_a_failed_request("recreate", "Recreate");
}

#[test]
fn scaling_by_hand_to_zero_fails_no_request_of_a_target_that_drains() {
    let (sandbox, target) = (Sandbox::new("by-hand"), drains("RollingUpdate"));
    sandbox.target(&target);
    let (calls, failed) = calls_while(&sandbox, &target, || {
        for _ in 0..3 {
            sandbox.kubectl(&["scale", "deployment", &target.name, "--replicas=0"]);
            until("the target is woken", || (replicas(&sandbox, &target) == 1).then_some(()));
            sandbox.awake(&target);
        }
    });
    eprintln!("by-hand: {calls} calls while the target was scaled to zero three times, {} failed", failed.len());
    assert!(calls > 2 && failed.is_empty(), "{calls} calls, failed: {failed:?}");
}
