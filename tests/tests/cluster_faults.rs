//! Faults that lose nothing: each with 50 connections held and 50 in flight on a real cluster.
//!
//! One at a time: what is killed here serves the other tests too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::names::NAMESPACE;
use elasti_tests::bpf::detach_programs;
use elasti_tests::cluster::{HTTP, NODES, Sandbox, Target, get, kubectl, metric, resolvers, until};
use elasti_tests::faults::{
    Process, Stopped, Vanished, absence, cgroup_of_node, installation_is_ready, lead_from, leader, resolver_on,
    resolvers_are_ready,
};
use elasti_tests::load::{CONNECTIONS, InFlight, Load, Requests};
use serde_json::json;

const NGINX: &str = "nginx on";

/// Address of node 2 in its cluster's network.
const NODE2: &str = "172.31.255.2";

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    installation_is_ready();
    alone
}

/// The fast path of node 1, and the slices' by kube-proxy of node 2.
fn both_paths(sandbox: &Sandbox, target: &Target) -> [SocketAddr; 2] {
    let node_port = SocketAddr::new(NODE2.parse().unwrap(), sandbox.node_port(target, 80));
    [sandbox.cluster_address(target, 80), node_port]
}

/// Requests that a target at zero holds.
fn held(sandbox: &Sandbox, target: &Target) -> Requests {
    let requests = Requests::begin(CONNECTIONS, sandbox.cluster_address(target, 80), HTTP);
    until("all are held", || (sandbox.held() >= CONNECTIONS).then_some(()));
    requests
}

/// How often each resolver was started again, and what ended it last.
fn restarts() -> Vec<String> {
    let restarts = |pod: &serde_json::Value| {
        let status = &pod["status"]["containerStatuses"][0];
        format!("{}: {} {}", pod["metadata"]["name"], status["restartCount"], status["lastState"]["terminated"])
    };
    resolvers().iter().map(restarts).collect()
}

/// No resolver has come near its limit of memory.
fn memory_is_bounded() {
    for node in [1, 2] {
        let (peak, limit) = Process::of_pod(&resolver_on(node), "elasti-resolver").memory();
        eprintln!("resolver of node {node}: at most {} MB of {} MB", peak >> 20, limit >> 20);
        assert!(peak < limit / 10 * 9, "{peak} of {limit} bytes");
    }
}

#[test]
fn fault_1_a_rollout_of_the_resolvers_loses_no_request() {
    let _alone = alone();
    let (sandbox, target) = (Sandbox::new("rollout"), Target::nginx("web"));
    sandbox.broken(&target);
    let in_flight = InFlight::start(&sandbox);
    let held = held(&sandbox, &target);
    let load = Load::start(&both_paths(&sandbox, &target), 20);
    let before: Vec<_> = resolvers().iter().map(|pod| pod["metadata"]["uid"].clone()).collect();
    kubectl(&["-n", NAMESPACE, "rollout", "restart", "daemonset/elasti-resolver"]);
    resolvers_are_ready(|pod| !before.contains(&pod["metadata"]["uid"]));
    // Longer than the grace in which old ones still accept: from now on only the new ones do.
    std::thread::sleep(Duration::from_secs(6));
    let load = load.stop();
    in_flight.answer().all_answered("in flight through old resolvers", "answered");
    sandbox.mend(&target);
    held.all_answered("held by old resolvers", NGINX);
    load.all_answered("begun during the rollout", NGINX);
    sandbox.awake(&target);
    until("the old ones end when nothing is left to do", || {
        let pods = elasti_tests::cluster::list(NAMESPACE, "pods", "app=elasti-resolver");
        (pods.len() == before.len()).then_some(())
    });
}

#[test]
fn fault_1_a_resolver_that_is_deleted_loses_no_request() {
    let _alone = alone();
    let (sandbox, target) = (Sandbox::new("deleted-resolver"), Target::nginx("web"));
    sandbox.broken(&target);
    let in_flight = InFlight::start(&sandbox);
    let held = held(&sandbox, &target);
    let load = Load::start(&both_paths(&sandbox, &target), 20);
    let pod = resolver_on(1)["metadata"]["name"].as_str().unwrap().to_owned();
    kubectl(&["-n", NAMESPACE, "delete", "pod", &pod, "--wait=false"]);
    std::thread::sleep(Duration::from_secs(10));
    let load = load.stop();
    in_flight.answer().all_answered("in flight through the old resolver", "answered");
    sandbox.mend(&target);
    held.all_answered("held by the old resolver", NGINX);
    load.all_answered("begun since", NGINX);
    until("the old one has ended", || get(NAMESPACE, "pod", &pod).is_none().then_some(()));
}

#[test]
fn fault_2_a_killed_resolver_is_replaced_by_another_within_a_second() {
    const RATE: u32 = 50;
    let _alone = alone();
    let (sandbox, target) = (Sandbox::new("killed-resolver"), Target::nginx("web"));
    sandbox.broken(&target);
    let in_flight = InFlight::start(&sandbox);
    let held = held(&sandbox, &target);
    let load = Load::start(&[sandbox.cluster_address(&target, 80)], RATE);
    std::thread::sleep(Duration::from_secs(1));
    let resolver = Process::of_pod(&resolver_on(1), "elasti-resolver");
    resolver.signal("KILL");
    let killed = Instant::now();
    std::thread::sleep(Duration::from_secs(10));
    let load = load.stop();
    sandbox.mend(&target);
    let fates: Vec<_> = load.fates().into_iter().filter(|fate| fate.begun >= killed).collect();
    let failed: Vec<_> = fates.iter().filter(|fate| !fate.is(NGINX)).collect();
    let last = failed.iter().map(|fate| fate.begun - killed).max().unwrap_or_default();
    eprintln!("{} of {} failed, the last one begun {last:?} after the kill", failed.len(), fates.len());
    assert!(failed.len() * 100 <= fates.len(), "{failed:?}");
    assert!(last < Duration::from_secs(1), "{failed:?}");
    // These were lost with the process; whoever was with the other one is answered.
    drop((held.fates(), in_flight.answer().fates()));
    sandbox.awake(&target);
}

#[test]
fn fault_3_a_killed_leader_delays_no_wake_and_puts_nothing_to_sleep() {
    let _alone = alone();
    let (sandbox, target, other) = (Sandbox::new("killed-leader"), Target::nginx("web"), Target::nginx("other"));
    sandbox.target(&other);
    sandbox.sleep(&other);
    sandbox.broken(&target);
    // But for the connections in flight its target would go to sleep.
    let idle = json!({"cooldownPeriod": 5, "triggers": [sandbox.idle_trigger()]});
    let in_flight = InFlight::of(&sandbox, idle);
    let held = held(&sandbox, &target);
    let replicas = |target: &Target| {
        get(&sandbox.namespace, "deployment", &target.name).unwrap()["spec"]["replicas"].as_u64().unwrap()
    };
    let old = leader();
    let process = Process::of_pod(&old, "elasti-operator");
    process.signal("KILL");
    let called = Instant::now();
    let wake = Requests::begin(1, sandbox.cluster_address(&other, 80), HTTP);
    until("the target is started", || (replicas(&other) == 1).then_some(()));
    let took = called.elapsed();
    eprintln!("the target was started {took:?} after the call");
    // What kubectl takes to look is part of it.
    assert!(took < Duration::from_secs(2), "{took:?}");
    wake.all_answered("a wake without a leader", NGINX);
    let container = || get(NAMESPACE, "pod", old["metadata"]["name"].as_str().unwrap()).unwrap();
    until("the killed one is back", || {
        let status = &container()["status"]["containerStatuses"][0];
        (status["restartCount"] != old["status"]["containerStatuses"][0]["restartCount"] && status["ready"] == true)
            .then_some(())
    });
    drop(leader());
    // Twice its cooldown.
    std::thread::sleep(Duration::from_secs(10));
    let slow = in_flight.target().clone();
    assert_eq!(replicas(&slow), 1, "nothing was put to sleep");
    in_flight.all_answered();
    sandbox.asleep(&slow);
    sandbox.mend(&target);
    held.all_answered("held", NGINX);
}

/// Holds connections while something is away; all are answered when it is back.
fn absent<Absence>(test: &str, begin: impl FnOnce() -> Absence, end: impl FnOnce(Absence)) {
    let _alone = alone();
    let (sandbox, target, running) = (Sandbox::new(test), Target::nginx("web"), Target::nginx("running"));
    sandbox.target(&running);
    sandbox.target(&target);
    sandbox.sleep(&target);
    let in_flight = InFlight::start(&sandbox);
    let (asleep, awake) = (sandbox.cluster_address(&target, 80), sandbox.cluster_address(&running, 80));
    let before = restarts();
    let since = begin();
    let held = Requests::begin(CONNECTIONS, asleep, HTTP);
    let (load, undisturbed) = (Load::start(&[asleep], 50), Load::start(&[awake], 10));
    std::thread::sleep(absence());
    undisturbed.stop().all_answered("of a running Service", NGINX);
    end(since);
    let load = load.stop();
    held.all_answered("held from the beginning", NGINX);
    load.all_answered("begun meanwhile", NGINX);
    installation_is_ready();
    sandbox.awake(&target);
    in_flight.all_answered();
    assert_eq!(restarts(), before, "no resolver was ended");
    memory_is_bounded();
}

#[test]
fn fault_4_without_operators_connections_are_held_and_answered_when_they_are_back() {
    let scale = |replicas: &str| {
        kubectl(&["-n", NAMESPACE, "scale", "deployment/elasti-operator", &format!("--replicas={replicas}")]);
    };
    let gone = || {
        scale("0");
        until("no operator is left", || {
            let pods = elasti_tests::cluster::list(NAMESPACE, "pods", "app.kubernetes.io/name=elasti-operator");
            pods.is_empty().then_some(())
        });
    };
    absent("no-operators", gone, |()| scale("2"));
}

#[test]
fn fault_4_without_the_api_server_connections_are_held_and_answered_when_it_is_back() {
    absent("no-api-server", || Stopped::new(Process::of_node(1, "kube-apiserver")), drop);
}

#[test]
fn fault_5_programs_that_are_detached_are_attached_again_and_nothing_is_lost() {
    let _alone = alone();
    let (sandbox, target) = (Sandbox::new("detached"), Target::nginx("web"));
    sandbox.broken(&target);
    let in_flight = InFlight::start(&sandbox);
    let held = held(&sandbox, &target);
    let load = Load::start(&both_paths(&sandbox, &target), 20);
    let repairs = || metric("elasti_resolver_redirect_repairs_total", "what=\"programs\"");
    let before = repairs();
    for node in [1, 2] {
        assert_eq!(detach_programs(&cgroup_of_node(node)), 5);
    }
    until("both resolvers have repaired it", || (repairs() > before + 1.5).then_some(()));
    assert!(metric("elasti_resolver_redirect_enabled", "") > 1.5);
    let load = load.stop();
    in_flight.all_answered();
    sandbox.mend(&target);
    held.all_answered("held", NGINX);
    load.all_answered("begun meanwhile", NGINX);
}

#[test]
fn fault_6_the_resolver_of_a_node_that_vanishes_leaves_the_slices_and_the_other_node_wakes() {
    // Two seconds without a heartbeat, and what the operator and kubectl take.
    vanishes("vanished", 1, Duration::from_secs(4));
}

#[test]
fn fault_6_the_resolver_of_a_node_that_vanishes_with_the_leader_leaves_the_slices_too() {
    // Three seconds and a half without a renewal of the Lease.
    vanishes("vanished-leader", 2, Duration::from_secs(6));
}

/// A regression: with a constraint on zones too, which nodes here have not, the scheduler heeded neither and chose the
/// emptier node.
#[test]
fn operators_are_on_different_nodes_even_if_one_has_more_room() {
    let _alone = alone();
    let (sandbox, mut large) = (Sandbox::new("spread"), Target::nginx("large"));
    large.container = json!({"resources": {"requests": {"cpu": "700m", "memory": "2Gi"}}});
    sandbox.target(&large);
    let operators = || elasti_tests::cluster::list(NAMESPACE, "pods", "app.kubernetes.io/name=elasti-operator");
    for pod in operators().iter().filter(|pod| pod["spec"]["nodeName"] == NODES[0]) {
        kubectl(&["-n", NAMESPACE, "delete", "pod", pod["metadata"]["name"].as_str().unwrap()]);
        installation_is_ready();
    }
    let mut nodes: Vec<_> = operators().iter().map(|pod| pod["spec"]["nodeName"].clone()).collect();
    nodes.sort_by_key(ToString::to_string);
    assert_eq!(nodes, NODES);
}

/// Takes node 2 away while the leader is on this node; the slices must follow within this time.
fn vanishes(test: &str, leader: usize, at_most: Duration) {
    let _alone = alone();
    let (sandbox, target, other) = (Sandbox::new(test), Target::nginx("web"), Target::nginx("other"));
    // Some seconds before it happens: whoever has just begun takes no resolver out before they have had the time to
    // connect to it.
    lead_from(leader);
    sandbox.target(&other);
    sandbox.sleep(&other);
    sandbox.broken(&target);
    let in_flight = InFlight::start(&sandbox);
    let held = held(&sandbox, &target);
    installation_is_ready();
    let address = resolver_on(2)["status"]["podIP"].clone();
    let is_in_the_slice = || {
        let slice = sandbox.slice(&target).expect("a slice");
        slice["endpoints"].as_array().unwrap().iter().any(|endpoint| endpoint["addresses"][0] == address)
    };
    until("both resolvers are in the slice", || is_in_the_slice().then_some(()));
    {
        let vanished = Vanished::new();
        let begun = Instant::now();
        until("it is in the slice no more", || (!is_in_the_slice()).then_some(()));
        let took = begun.elapsed();
        eprintln!("the resolver left the slice {took:?} after its node");
        assert!(took < at_most, "{took:?}");
        Requests::begin(1, sandbox.cluster_address(&other, 80), HTTP).all_answered("a wake on the other node", NGINX);
        in_flight.answer().all_answered("in flight", "answered");
        sandbox.mend(&target);
        held.all_answered("held", NGINX);
        drop(vanished);
    }
    sandbox.sleep(&other);
    installation_is_ready();
    sandbox.answers(&other);
}

#[test]
fn fault_7_ten_thousand_connections_of_one_client_disturb_nobody_else() {
    const FLOOD: usize = 10_000;
    let _alone = alone();
    let (sandbox, target, other) = (Sandbox::new("flood"), Target::nginx("web"), Target::nginx("other"));
    sandbox.target(&other);
    sandbox.sleep(&other);
    sandbox.broken(&target);
    let in_flight = InFlight::start(&sandbox);
    let held = held(&sandbox, &target);
    let before = restarts();
    let address = sandbox.cluster_address(&target, 443);
    let garbage = |mut stream: std::net::TcpStream| {
        // Those that are refused may be so already.
        drop(std::io::Write::write_all(&mut stream, &[0xff; 512]));
        stream
    };
    let flood: Vec<_> = (0..FLOOD).filter_map(|_| std::net::TcpStream::connect(address).ok()).map(garbage).collect();
    eprintln!("{} of {FLOOD} connected, {} held", flood.len(), sandbox.held());
    Requests::begin(1, sandbox.cluster_address(&other, 80), HTTP).all_answered("a wake of another Service", NGINX);
    in_flight.all_answered();
    drop(flood);
    sandbox.mend(&target);
    held.all_answered("held before", NGINX);
    assert_eq!(restarts(), before, "no resolver was ended");
    memory_is_bounded();
}
