//! Every kind of Service wakes its target, whatever its policies, and follows what is changed while the target sleeps.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};

use elasti_tests::cluster::{HTTP, Sandbox, Target, from_host, from_pod, get, until};
use serde_json::json;

/// Address of node 2 in its cluster's network. The targets' pods are on node 1.
const NODE2: &str = "172.31.255.2";

/// Calls from the host of node 1 by way of this address.
fn host(ip: &str, port: u16) -> String {
    from_host(SocketAddr::new(ip.parse().unwrap(), port), HTTP, 4096)
}

/// The name of the pod that answered.
fn answering_pod(answer: &str) -> String {
    let name = answer.split("nginx on ").nth(1).unwrap_or_else(|| panic!("{answer}"));
    name.trim().to_owned()
}

/// The Service's own slices that name resolvers, of each family.
fn families(sandbox: &Sandbox, service: &str) -> [bool; 2] {
    let is_there = |ipv6| {
        let name = elasti_api::names::resolver_slice(service, ipv6);
        get(&sandbox.namespace, "endpointslice", &name).is_some_and(|slice| slice["endpoints"][0].is_object())
    };
    [false, true].map(is_there)
}

#[test]
fn services_with_local_traffic_policies_and_load_balancers_wake_on_every_node() {
    const BALANCER: &str = "172.31.254.1";
    let (sandbox, target) = (Sandbox::new("policies"), Target::nginx("web"));
    sandbox.target(&target);
    let node_port = sandbox.node_port(&target, 80);

    // Only endpoints of the node that is dialled count, and no pod of the target is ever there.
    let local = json!({"spec": {"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"}});
    sandbox.patch(&["service", "web"], &local);
    sandbox.sleep(&target);
    assert_eq!(answering_pod(&host(NODE2, node_port)).split('-').next(), Some("web"), "a node port of node 2");
    sandbox.awake(&target);

    let balanced = json!({"spec": {
        "type": "LoadBalancer", "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster",
    }});
    sandbox.patch(&["service", "web"], &balanced);
    let ingress = json!({"status": {"loadBalancer": {"ingress": [{"ip": BALANCER}]}}});
    sandbox.patch(&["service", "web", "--subresource=status"], &ingress);
    sandbox.sleep(&target);
    assert!(host(BALANCER, 80).contains("nginx on web-"), "the load balancer's address");
    sandbox.awake(&target);
    assert!(host(BALANCER, 80).contains("nginx on web-"), "it stays reachable");
}

#[test]
fn a_dual_stack_service_wakes_by_either_address_family() {
    let (sandbox, target) = (Sandbox::new("families"), Target::nginx("web"));
    sandbox.target(&target);
    sandbox.patch(&["service", "web"], &json!({"spec": {"ipFamilyPolicy": "RequireDualStack"}}));
    let service = get(&sandbox.namespace, "service", "web").unwrap();
    let addresses: Vec<IpAddr> = service["spec"]["clusterIPs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|ip| ip.as_str().unwrap().parse().unwrap())
        .collect();
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    for address in addresses {
        sandbox.sleep(&target);
        until("a slice of each family", || (families(&sandbox, "web") == [true, true]).then_some(()));
        let url = format!("http://{}/", SocketAddr::new(address, 80));
        let answer = from_pod(2, &["curl", "-sS", "--max-time", "60", &url]);
        assert!(answer.starts_with("nginx on web-"), "{address}: {answer}");
        sandbox.awake(&target);
        assert_eq!(families(&sandbox, "web"), [false, false]);
    }
}

#[test]
fn clients_with_session_affinity_stay_with_one_pod_after_the_wake() {
    let (sandbox, mut target) = (Sandbox::new("affinity"), Target::nginx("web"));
    target.spec = json!({"minTargetReplicas": 2});
    sandbox.target(&target);
    sandbox.patch(&["service", "web"], &json!({"spec": {"sessionAffinity": "ClientIP"}}));
    sandbox.sleep(&target);
    let node_port = sandbox.node_port(&target, 80);
    // kube-proxy remembers a resolver for this client.
    assert!(host(NODE2, node_port).contains("nginx on web-"));
    sandbox.awake(&target);
    let ready =
        || sandbox.pods(&target).iter().filter(|pod| pod["status"]["containerStatuses"][0]["ready"] == true).count();
    until("both pods are ready", || (ready() == 2).then_some(()));
    let pod = answering_pod(&host(NODE2, node_port));
    for _ in 0..10 {
        assert_eq!(answering_pod(&host(NODE2, node_port)), pod);
    }
}

#[test]
fn what_is_changed_in_a_service_while_its_target_sleeps_is_followed() {
    let (sandbox, target) = (Sandbox::new("changes"), Target::nginx("web"));
    sandbox.target(&target);
    let call = |service: &str, port: u16| {
        let spec = get(&sandbox.namespace, "service", service).unwrap()["spec"].take();
        let url = format!("http://{}:{port}/", spec["clusterIP"].as_str().unwrap());
        let answer = from_pod(2, &["curl", "-sS", "--max-time", "60", &url]);
        assert!(answer.starts_with("nginx on web-"), "{service} {port}: {answer}");
        sandbox.awake(&target);
    };

    sandbox.sleep(&target);
    let ports = json!({"spec": {"ports": [{"name": "other", "port": 8080, "targetPort": 80}]}});
    sandbox.patch(&["service", "web"], &ports);
    until("the new port is intercepted", || {
        let status = sandbox.elasti_service(&target)?["status"].take();
        let slice = sandbox.slice(&target)?;
        let port = status["ports"].as_array()?.iter().find(|port| port["port"] == 8080)?["interceptionPort"].clone();
        (slice["ports"].as_array()?.len() == 1 && slice["ports"][0]["port"] == port).then_some(())
    });
    call("web", 8080);

    sandbox.sleep(&target);
    sandbox.kubectl(&["delete", "service", "web"]);
    sandbox.apply(target.service());
    sandbox.asleep(&target);
    call("web", 80);

    sandbox.sleep(&target);
    let mut second = target.service();
    second["metadata"]["name"] = json!("second");
    sandbox.apply(second);
    sandbox.patch(&["elastiservice", "web"], &json!({"spec": {"service": "second"}}));
    until("the second Service is intercepted, and the first no more", || {
        (families(&sandbox, "second")[0] && sandbox.slice(&target).is_none()).then_some(())
    });
    call("second", 80);
}
