//! What changes the installation, one test at a time: KubeElasti's cases 06 and 14, and its replacement under load by the steps of
//! docs/migrating-from-kubeelasti.md.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elasti_api::names::{FINALIZER, NAMESPACE, NOTIFY_PATH, OPERATOR_SERVICE, private_service, resolver_slice};
use elasti_tests::cluster::{
    HTTP, Sandbox, Target, apply, from_host, get, kubectl, list, resolvers, try_kubectl, until,
};
use elasti_tests::faults::installation_is_ready;
use elasti_tests::kubeelasti::{NAME, begin, httpbin, send_traffic};
use elasti_tests::load::Load;
use elasti_tests::monitoring::file;
use serde_json::{Value, json};

/// Address of node 1 in its cluster's network: this process is there.
const NODE1: &str = "172.31.255.1";

/// Between two attempts of KubeElasti's resolver, which waits longer.
const RETRY: Duration = Duration::from_millis(200);

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    installation_is_ready();
    alone
}

/// KubeElasti's resolver is a Deployment, which it scales; of ours each node has one, so one is taken away and comes again.
#[test]
fn e2e_06_the_slice_names_exactly_the_resolvers_that_there_are() {
    let _alone = alone();
    let (sandbox, target) = begin("e2e-06");
    sandbox.sleep(&target);
    assert!(get(&sandbox.namespace, "endpoints", &private_service(NAME)).is_some());
    let addresses = |objects: Vec<Value>, pointer: &str| -> BTreeSet<String> {
        objects.iter().filter_map(|object| Some(object.pointer(pointer)?.as_str()?.to_owned())).collect()
    };
    let published = || {
        let endpoints = sandbox.slice(&target).unwrap()["endpoints"].as_array().unwrap().clone();
        addresses(endpoints, "/addresses/0")
    };
    let running = || addresses(resolvers(), "/status/podIP");
    let before = running();
    assert_eq!((published(), before.len()), (before.clone(), 2));
    let gone = resolvers().remove(0);
    kubectl(&["-n", NAMESPACE, "delete", "pod", gone["metadata"]["name"].as_str().unwrap(), "--wait=false"]);
    let gone = gone["status"]["podIP"].as_str().unwrap();
    let left: BTreeSet<String> = before.iter().filter(|ip| *ip != gone).cloned().collect();
    // A leader that is new waits for some seconds, in which the next pod may have come.
    let follows = |named: BTreeSet<String>| named.is_superset(&left) && !named.contains(gone);
    until("the slice names the other one, and that which is gone no more", || follows(published()).then_some(()));
    installation_is_ready();
    until("the slice names both", || (published() == running() && running().len() == 2).then_some(()));
    assert_ne!(published(), before, "another pod has come");
}

/// Gives the operator back what it may do everywhere.
struct ClusterWide;

impl ClusterWide {
    const ROLES: [&str; 4] = [
        "clusterrolebinding/elasti-operator",
        "clusterrole/elasti-operator",
        "clusterrolebinding/elasti-operator-other-targets",
        "clusterrole/elasti-operator-other-targets",
    ];
}

impl Drop for ClusterWide {
    fn drop(&mut self) {
        let role = file("config/cluster-wide/operator-role.yaml");
        let roles = try_kubectl(&["apply", "-f", role.to_str().unwrap()], None);
        let namespaces = ["-n", NAMESPACE, "set", "env", "deployment/elasti-operator", "WATCH_NAMESPACES-"];
        // A test that fails says why; what comes after it says so too if this has not come about.
        if let Err(error) = roles.and(try_kubectl(&namespaces, None)) {
            eprintln!("the operator does not look after all namespaces again: {error}");
        }
    }
}

#[test]
fn e2e_14_an_operator_of_one_namespace_leaves_others_alone() {
    let _alone = alone();
    let (sandbox, target) = begin("e2e-14");
    let (outside, ignored) = (Sandbox::new("e2e-14-oos"), httpbin(NAME));
    {
        let _cluster_wide = ClusterWide;
        kubectl(&["-n", &sandbox.namespace, "apply", "-k", file("config/watched").to_str().unwrap()]);
        kubectl(&[&["delete"], &ClusterWide::ROLES[..]].concat());
        let namespaces = format!("WATCH_NAMESPACES={}", sandbox.namespace);
        kubectl(&["-n", NAMESPACE, "set", "env", "deployment/elasti-operator", &namespaces]);
        installation_is_ready();
        outside.apply(ignored.elasti_service());
        sandbox.sleep(&target);
        send_traffic(&sandbox, NAME, "/ip");
        sandbox.awake(&target);
        sandbox.sleep(&target);
        let elasti = outside.elasti_service(&ignored).unwrap();
        assert_eq!((&elasti["status"], &elasti["metadata"]["finalizers"]), (&Value::Null, &Value::Null));
        for role in ClusterWide::ROLES {
            assert!(try_kubectl(&["get", role], None).is_err(), "{role} is not there, and not missed");
        }
    }
    installation_is_ready();
    until("it is looked after now", || {
        let elasti = outside.elasti_service(&ignored)?;
        elasti["status"]["conditions"].is_array().then_some(())
    });
}

/// Installs as users do.
fn install() -> Result<String, String> {
    let config = file("config/default");
    try_kubectl(&["apply", "--server-side", "--force-conflicts", "-k", config.to_str().unwrap()], None)
}

/// Whether the operator answers KubeElasti's resolvers.
fn answer_without_token(variable: &str) -> Result<String, String> {
    try_kubectl(&["-n", NAMESPACE, "set", "env", "deployment/elasti-operator", variable], None)
}

/// Sees to it that the tests after this one find what they need, whatever becomes of it.
struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        if let Err(error) = install().and_then(|_| answer_without_token("ELASTI_NOTIFY_WITHOUT_TOKEN-")) {
            eprintln!("it is not installed again: {error}");
        }
    }
}

/// KubeElasti's CRD, as far as its ElastiServices here need it: no short names, no columns, no conditions.
fn crd() -> Value {
    let text = json!({"type": "string"});
    let number = json!({"type": "integer", "format": "int32"});
    let names = json!({"apiVersion": text, "kind": text, "name": text});
    let spec = json!({"type": "object", "properties": {
        "scaleTargetRef": {"type": "object", "properties": names}, "service": text, "minTargetReplicas": number,
        "cooldownPeriod": number,
    }});
    let time = json!({"type": "string", "format": "date-time"});
    let status = json!({"type": "object", "properties": {
        "mode": text, "lastReconciledTime": time, "lastScaledUpTime": time,
    }});
    let schema = json!({"type": "object", "properties": {
        "apiVersion": text, "kind": text, "metadata": {"type": "object"}, "spec": spec, "status": status,
    }});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "elastiservices.elasti.truefoundry.com"},
        "spec": {
            "group": "elasti.truefoundry.com", "scope": "Namespaced",
            "names": {
                "kind": "ElastiService", "listKind": "ElastiServiceList", "plural": "elastiservices", "singular": "elastiservice",
            },
            "versions": [{
                "name": "v1alpha1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": schema},
            }],
        },
    })
}

/// The Service by which KubeElasti's resolver finds its operator, which is stopped.
fn operator_service() -> SocketAddr {
    apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}));
    apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": OPERATOR_SERVICE, "namespace": NAMESPACE},
        "spec": {
            "selector": {
                "control-plane": "controller-manager", "app.kubernetes.io/name": "elasti", "app.kubernetes.io/instance": "elasti",
            },
            "ports": [{"name": "custom-port", "port": 8013, "targetPort": 8013}],
        },
    }));
    SocketAddr::new(cluster_ip(NAMESPACE, OPERATOR_SERVICE), 8013)
}

fn cluster_ip(namespace: &str, service: &str) -> IpAddr {
    get(namespace, "service", service).unwrap()["spec"]["clusterIP"].as_str().unwrap().parse().unwrap()
}

/// A Service with all that KubeElasti makes for it, in this mode. `resolver` is where its slice leads at zero.
fn left_by_kubeelasti(sandbox: &Sandbox, target: &Target, mode: &str, resolver: SocketAddr) {
    let mut deployment = target.deployment();
    deployment["spec"]["replicas"] = json!(i32::from(mode == "serve"));
    sandbox.apply(deployment);
    sandbox.apply(target.service());
    let mut elasti = target.elasti_service();
    elasti["metadata"]["finalizers"] = json!([FINALIZER]);
    sandbox.apply(elasti);
    let status = json!({"status": {"mode": mode, "lastReconciledTime": "2026-01-01T00:00:00Z"}}).to_string();
    let name = target.name.as_str();
    let patch = ["patch", "elastiservice", name, "--subresource=status", "--type=merge", "-p", &status];
    kubectl(&[&["-n", &sandbox.namespace], &patch[..]].concat());
    let owner = json!({
        "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService", "name": name, "controller": true,
        "blockOwnerDeletion": true, "uid": sandbox.elasti_service(target).unwrap()["metadata"]["uid"],
    });
    sandbox.apply(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": private_service(name), "ownerReferences": [owner]},
        "spec": target.service()["spec"],
    }));
    if mode == "proxy" {
        sandbox.apply(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": resolver_slice(name, false), "labels": {"kubernetes.io/service-name": name}},
            "endpoints": [{"addresses": [resolver.ip()]}],
            "ports": [{"name": "p80", "port": resolver.port(), "protocol": "TCP"}],
        }));
    }
}

/// What KubeElasti's resolver does with each connection, until the test's process ends. How many it has forwarded.
fn stand_in(
    listener: TcpListener,
    operator: SocketAddr,
    namespace: String,
    service: String,
    private: SocketAddr,
) -> Arc<AtomicUsize> {
    let forwarded = Arc::<AtomicUsize>::default();
    let count = forwarded.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let body = json!({"count": 1, "svc": service, "namespace": namespace}).to_string();
            let notification = format!(
                "POST {NOTIFY_PATH} HTTP/1.1\r\nHost: operator\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let count = count.clone();
            std::thread::spawn(move || {
                let client = client?;
                loop {
                    // Nobody is there to be told, at first.
                    let _not_yet = notify(operator, &notification);
                    if let Ok(target) = TcpStream::connect_timeout(&private, RETRY) {
                        count.fetch_add(1, Ordering::Relaxed);
                        return forward(client, target);
                    }
                    std::thread::sleep(RETRY);
                }
            });
        }
    });
    forwarded
}

fn notify(operator: SocketAddr, notification: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&operator, RETRY)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(notification.as_bytes())?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

fn forward(mut client: TcpStream, mut target: TcpStream) -> io::Result<()> {
    let (mut from_client, mut to_target) = (client.try_clone()?, target.try_clone()?);
    std::thread::spawn(move || io::copy(&mut from_client, &mut to_target));
    io::copy(&mut target, &mut client)?;
    client.shutdown(std::net::Shutdown::Both)
}

/// KubeElasti's objects are there as 0.1.30 leaves them; its operator is stopped, and in place of its resolver stands what does the
/// same: it holds a request, tells the operator's Service without a token, and forwards to the private Service when that answers.
#[test]
fn kubeelasti_is_replaced_under_load_and_no_request_fails() {
    let _alone = alone();
    let config = file("config/default");
    // Whatever other tests have left.
    kubectl(&["delete", "elastiservices", "-A", "--all", "--timeout=60s"]);
    let installed = Installed;
    kubectl(&["delete", "-k", config.to_str().unwrap(), "--ignore-not-found", "--timeout=120s"]);

    apply(&crd());
    kubectl(&["wait", "--for=condition=Established", "crd/elastiservices.elasti.truefoundry.com", "--timeout=60s"]);
    let sandbox = Sandbox::new("migration");
    let [awake, called, asleep] = ["awake", "called", "asleep"].map(Target::nginx);
    let listener = TcpListener::bind((NODE1.parse::<IpAddr>().unwrap(), 0)).unwrap();
    let resolver = listener.local_addr().unwrap();
    let operator = operator_service();
    for (target, mode) in [(&awake, "serve"), (&called, "proxy"), (&asleep, "proxy")] {
        left_by_kubeelasti(&sandbox, target, mode, resolver);
    }
    let private = SocketAddr::new(cluster_ip(&sandbox.namespace, &private_service("called")), 80);
    let forwarded = stand_in(listener, operator, sandbox.namespace.clone(), "called".to_owned(), private);
    kubectl(&["-n", &sandbox.namespace, "rollout", "status", "deployment/awake", "--timeout=60s"]);
    let addresses = [&awake, &called].map(|target| sandbox.cluster_address(target, 80));
    until("kube-proxy knows both", || {
        addresses.iter().all(|address| TcpStream::connect_timeout(address, RETRY).is_ok()).then_some(())
    });

    let load = Load::start(&addresses, 20);
    install().unwrap();
    answer_without_token("ELASTI_NOTIFY_WITHOUT_TOKEN=true").unwrap();
    installation_is_ready();
    sandbox.awake(&awake);
    sandbox.awake(&called);
    sandbox.asleep(&asleep);
    load.stop().all_answered("while KubeElasti was replaced", "nginx on ");
    let forwarded = forwarded.load(Ordering::Relaxed);
    eprintln!("{forwarded} of them by the stand-in for KubeElasti's resolver");
    assert!(forwarded > 1, "some were held by it until our operator woke their target");

    let slice = sandbox.slice(&asleep).unwrap();
    let published: Vec<&str> = slice["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|endpoint| endpoint["addresses"][0].as_str())
        .collect();
    assert!(resolvers().iter().all(|pod| published.contains(&pod["status"]["podIP"].as_str().unwrap())), "{slice}");
    assert!(!published.contains(&NODE1), "KubeElasti's resolver is in it no more: {slice}");
    let answer = from_host(sandbox.cluster_address(&asleep, 80), HTTP, 4096);
    assert!(answer.contains("nginx on asleep-"), "{answer}");
    sandbox.awake(&asleep);
    sandbox.sleep(&called);
    let privates = list(&sandbox.namespace, "services", "");
    assert_eq!(privates.len(), 6, "the private Services were taken over: {privates:?}");
    drop(installed);
    installation_is_ready();
}
