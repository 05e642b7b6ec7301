//! The trigger `traffic` on a real cluster: who keeps a target awake, and who does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use elasti_tests::cluster::{CALLERS, HTTP, NODES, Sandbox, Target, from_host, from_pod, kubectl, metric, until};
use serde_json::{Value, json};

/// Address of node 2 in its cluster's network.
const NODE2: &str = "172.31.255.2";

/// In seconds. Callers call every second.
const COOLDOWN: u64 = 6;

/// How long callers keep their targets awake: more than a cooldown and the seconds in which a target that is idle for so long is
/// intercepted.
const AWAKE: Duration = Duration::from_secs(COOLDOWN + 6);

const PAUSE: Duration = Duration::from_secs(1);

/// Between two bytes over an old connection: one in a cooldown.
const BYTE_PAUSE: Duration = Duration::from_secs(COOLDOWN - 1);

fn target(name: &str, metadata: &Value) -> Target {
    let mut target = Target::nginx(name);
    target.spec = json!({"cooldownPeriod": COOLDOWN, "triggers": [{"type": "traffic", "metadata": metadata}]});
    target
}

fn pod_address(sandbox: &Sandbox, target: &Target) -> IpAddr {
    let pod = until("the pod's address", || sandbox.pods(target).into_iter().next());
    pod["status"]["podIP"].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_target_sleeps_when_only_kubelet_and_an_ignored_scraper_talk_to_it() {
    let sandbox = Sandbox::new("scraped");
    let scraper = json!({"namespace": CALLERS, "podSelector": {"matchLabels": {"caller": NODES[1]}}});
    let target = target("web", &json!({"ignoreSources": [scraper]}));
    sandbox.target(&target);
    let url = format!("http://{}/", pod_address(&sandbox, &target));
    let mut count = 0;
    until("the target is intercepted", || {
        if sandbox.mode(&target).as_deref() == Some("proxy") {
            return Some(());
        }
        assert!(from_pod(2, &["curl", "-sS", "--max-time", "5", &url]).starts_with("nginx on"));
        count += 1;
        None
    });
    assert!(count > 1, "it was scraped all the time");
    sandbox.asleep(&target);
    let url = format!("http://{}/", sandbox.cluster_address(&target, 80));
    assert!(from_pod(1, &["curl", "-sS", "--max-time", "60", &url]).starts_with("nginx on"), "and wakes");
}

#[test]
fn a_load_balancers_bare_connections_wake_nothing_and_data_or_silence_does() {
    let sandbox = Sandbox::new("bare");
    let target = |mut target: Target| {
        target.spec = json!({"wake": {"on": "auto"}});
        sandbox.sleeping_target(&target);
        target
    };
    let (web, greeter) = (target(Target::nginx("web")), target(Target::greeter("greeter")));
    let left = || metric("elasti_resolver_closed_connections_total", "namespace=\"test-bare\",reason=\"client_left\"");
    let before = left();
    let node_port = SocketAddr::new(NODE2.parse().unwrap(), sandbox.node_port(&web, 80));
    for address in [sandbox.cluster_address(&web, 80), node_port] {
        drop(TcpStream::connect(address).unwrap());
    }
    until("both were seen to leave", || (left() >= before + 2.0).then_some(()));
    let woken = sandbox.elasti_service(&web).unwrap()["status"]["lastScaledUpTime"].clone();
    assert_eq!((sandbox.pods(&web).len(), woken), (0, Value::Null));
    assert!(from_host(node_port, HTTP, 4096).contains("nginx on"));
    // It waits for the server to speak first.
    assert_eq!(from_host(sandbox.cluster_address(&greeter, 2525), b"", 9), "220 ready");
}

/// Has the target's pods run on different nodes.
fn on_both_nodes(target: &mut Target) {
    target.pod = json!({"nodeName": null, "affinity": {"podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [{
            "topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": target.name}},
        }],
    }}});
}

/// The address of the target's ready pod on this node.
fn ready_on(sandbox: &Sandbox, target: &Target, node: &str) -> Option<IpAddr> {
    let pod = sandbox.pods(target).into_iter().find(|pod| pod["spec"]["nodeName"] == node)?;
    let conditions = pod["status"]["conditions"].as_array()?.clone();
    let ready = conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    ready.then(|| pod["status"]["podIP"].as_str()?.parse().ok()).flatten()
}

/// Ends all calls when it goes.
struct Enough<'a>(&'a AtomicBool);

impl Drop for Enough<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
        for node in [1, 2] {
            from_pod(node, &["touch", "/tmp/enough"]);
        }
    }
}

#[test]
fn a_target_stays_awake_while_anybody_talks_to_it_and_sleeps_when_nobody_does() {
    let sandbox = Sandbox::new("busy");
    let ignore = json!({});
    let mut targets =
        ["pod", "other-node", "host", "node-port", "pod-address"].map(|name| target(name, &ignore)).to_vec();
    targets.push(target("silent-connection", &json!({"idleConnections": "hold"})));
    on_both_nodes(&mut targets[4]);
    let mut old = target("old-connection", &ignore);
    // On a busy machine it takes longer than a cooldown to set all up.
    for target in targets.iter_mut().chain([&mut old]) {
        target.spec["cooldownPeriod"] = json!(900);
        sandbox.install(target);
    }
    kubectl(&["-n", &sandbox.namespace, "scale", "deployment", "pod-address", "--replicas=2"]);
    for target in targets.iter().chain([&old]) {
        sandbox.awake(target);
    }
    let [pod, other_node, host, node_port, spread, held] = &targets[..] else { panic!("six targets") };
    let url = |target: &Target| format!("http://{}/", sandbox.cluster_address(target, 80));
    // One command for all calls: `kubectl exec` takes a second or two on a busy machine.
    let curl_until_told = |node: usize, url: &str| {
        let script = format!(
            "for i in $(seq 90); do curl -sSf --max-time 5 {url} || exit; [ -e /tmp/enough ] && exit; sleep 1; done"
        );
        assert!(from_pod(node, &["sh", "-c", &script]).starts_with("nginx on"));
    };
    let from_node = |address: SocketAddr| assert!(from_host(address, HTTP, 4096).contains("nginx on"));
    let (pod_url, other_url) = (url(pod), url(other_node));
    let spread_url = format!("http://{}/", until("a ready pod on node 2", || ready_on(&sandbox, spread, NODES[1])));
    let host_address = sandbox.cluster_address(host, 80);
    let node_port_address = SocketAddr::new(NODE2.parse().unwrap(), sandbox.node_port(node_port, 80));
    let mut connection = TcpStream::connect(SocketAddr::new(pod_address(&sandbox, &old), 80)).unwrap();
    let silent = TcpStream::connect(SocketAddr::new(pod_address(&sandbox, held), 443)).unwrap();
    let revision = |target: &Target| sandbox.elasti_service(target).unwrap()["status"]["revision"].clone();
    let revisions = || targets.iter().map(revision).collect::<Vec<Value>>();

    for node in [1, 2] {
        from_pod(node, &["rm", "-f", "/tmp/enough"]);
    }
    let calling = AtomicBool::new(true);
    let (before, after) = std::thread::scope(|scope| {
        let calling = &calling;
        let caller = move |call: &dyn Fn()| {
            while calling.load(Ordering::Relaxed) {
                call();
                std::thread::sleep(PAUSE);
            }
        };
        let curl_until_told = &curl_until_told;
        scope.spawn(move || curl_until_told(1, &pod_url));
        scope.spawn(move || curl_until_told(2, &other_url));
        scope.spawn(move || curl_until_told(1, &spread_url));
        scope.spawn(move || caller(&|| from_node(host_address)));
        scope.spawn(move || caller(&|| from_node(node_port_address)));
        // nginx closes an idle connection after 75 s; a request over it that is never complete is all data of the client.
        let connection = &mut connection;
        scope.spawn(move || {
            connection.write_all(b"GET / HTTP/1.1\r\nHost: ").unwrap();
            while calling.load(Ordering::Relaxed) {
                std::thread::sleep(BYTE_PAUSE);
                connection.write_all(b"x").unwrap();
            }
        });
        let enough = Enough(calling);
        for target in targets.iter().chain([&old]) {
            sandbox.patch(&["elastiservice", &target.name], &json!({"spec": {"cooldownPeriod": COOLDOWN}}));
        }
        // Some may have been on their way to sleep before anybody called.
        for target in &targets {
            sandbox.awake(target);
        }
        let before = revisions();
        std::thread::sleep(AWAKE);
        let after = revisions();
        drop(enough);
        (before, after)
    });
    assert_eq!(before, after, "one was intercepted: pod, other node, host, node port, pod address, silent connection");
    // Its pod has lived on: what is heard of a byte a moment after the cooldown still ends the way down.
    connection.write_all(b"\r\n\r\n").unwrap();
    let mut answer = [0; 15];
    connection.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    drop(silent);
    for target in targets.iter().chain([&old]) {
        sandbox.asleep(target);
    }
}
