//! What endpoints of slices are good for, over all slices.

use serde_json::{Value, json};

use super::*;
use crate::slices::OWNER_LABEL;

/// An endpoint of a pod whose UID is its name.
fn endpoint(address: &str, pod: &str, conditions: &Value) -> Value {
    json!({"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "name": pod, "uid": pod}})
}

fn ready(address: &str, pod: &str) -> Value {
    endpoint(address, pod, &json!({"ready": true, "serving": true, "terminating": false}))
}

fn ending(address: &str, pod: &str) -> Value {
    endpoint(address, pod, &json!({"ready": false, "serving": true, "terminating": true}))
}

fn slice(name: &str, service: &str, endpoints: &[Value]) -> EndpointSlice {
    serde_json::from_value(json!({
        "metadata": {"namespace": "n", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080}],
    }))
    .unwrap()
}

fn caches() -> Caches {
    let caches = Caches::new();
    let service = |name: &str, labels: &Value| {
        serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": name, "uid": name, "labels": labels},
            "spec": {"clusterIPs": ["10.96.0.1"], "ports": [{"name": "http", "port": 80}]},
        }))
        .unwrap()
    };
    let elasti = json!({
        "metadata": {"namespace": "n", "name": "web", "uid": "e"},
        "spec": {"service": "web", "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}},
    });
    caches.apply_elasti(serde_json::from_value(elasti).unwrap());
    caches.apply_service(&service("web", &json!({})));
    caches.apply_service(&service("private", &json!({OWNER_LABEL: "e"})));
    caches
}

/// Addresses of the pods that are about to end, and whether somebody else has them.
fn draining(caches: &Caches) -> Vec<(String, bool)> {
    let snapshot = caches.snapshot(&ObjectKey::new("n", "web")).unwrap();
    snapshot.draining.into_iter().map(|endpoint| (endpoint.address.to_string(), endpoint.elsewhere)).collect()
}

#[test]
fn an_ending_pod_is_draining_until_its_endpoint_goes_and_is_no_backend() {
    let caches = caches();
    let concerned = caches.apply_slice(&slice("a", "web", &[ending("10.1.0.1", "p"), ready("10.1.0.2", "q")]));
    assert_eq!(concerned.len(), 1);
    let snapshot = caches.snapshot(&ObjectKey::new("n", "web")).unwrap();
    assert_eq!(snapshot.backends[&80], ["10.1.0.2:8080".parse().unwrap()]);
    let expected =
        DrainingEndpoint { port: 80, address: "10.1.0.1:8080".parse().unwrap(), pod: "p".to_owned(), elsewhere: false };
    assert_eq!(snapshot.draining, [expected]);
    caches.apply_slice(&slice("a", "web", &[]));
    assert_eq!(draining(&caches), []);
}

#[test]
fn an_ending_pod_that_is_published_as_if_it_were_ready_is_none_the_less_no_backend() {
    let caches = caches();
    let published = endpoint("10.1.0.1", "p", &json!({"ready": true, "terminating": true}));
    caches.apply_slice(&slice("a", "web", &[published]));
    let snapshot = caches.snapshot(&ObjectKey::new("n", "web")).unwrap();
    assert_eq!((snapshot.backends[&80].len(), snapshot.draining.len()), (0, 1));
}

#[test]
fn what_is_no_pod_never_drains() {
    let caches = caches();
    let mut other = ending("10.1.0.1", "p");
    other["targetRef"]["kind"] = json!("VirtualMachine");
    caches.apply_slice(&slice("a", "web", &[other]));
    assert_eq!(draining(&caches), []);
}

#[test]
fn an_address_that_any_other_service_still_has_is_told() {
    let caches = caches();
    caches.apply_slice(&slice("a", "web", &[ending("10.1.0.1", "p")]));
    let drains = |elsewhere: bool| [("10.1.0.1:8080".to_owned(), elsewhere)];
    assert_eq!(draining(&caches), drains(false));
    let other = slice("b", "other", &[ready("10.1.0.1", "new")]);
    caches.apply_slice(&other);
    caches.apply_slice(&other);
    assert_eq!(draining(&caches), drains(true));
    caches.apply_slice(&slice("b", "other", &[ending("10.1.0.1", "new")]));
    assert_eq!(draining(&caches), drains(false), "the other is about to end too");
    let starting = endpoint("10.1.0.1", "new", &json!({"ready": false}));
    caches.apply_slice(&slice("b", "other", &[starting]));
    assert_eq!(draining(&caches), drains(true), "an address is taken before its pod is ready");
    caches.remove_slice(&ObjectKey::new("n", "b"));
    assert_eq!(draining(&caches), drains(false));
}

#[test]
fn the_private_services_slices_concern_its_elasti_service() {
    let caches = caches();
    assert_eq!(caches.apply_slice(&slice("b", "private", &[ready("10.1.0.1", "p")])).len(), 1);
    assert_eq!(caches.apply_slice(&slice("c", "stranger", &[ready("10.1.0.1", "p")])).len(), 0);
    assert_eq!(caches.remove_slice(&ObjectKey::new("n", "b")).len(), 1);
}

/// A bug once: where the target was woken before ours took its place, the slice stayed, and led to resolvers that go.
#[test]
fn a_slice_that_kubeelasti_left_behind_is_no_backend_and_is_to_go_once_nothing_is_intercepted() {
    let caches = caches();
    let name = names::resolver_slice("web", false);
    let left_behind = slice(&name, "web", &[json!({"addresses": ["10.1.0.9"]})]);
    assert_eq!(caches.apply_slice(&left_behind).len(), 1);
    let stale = |mode: &str| {
        let elasti = json!({
            "metadata": {"namespace": "n", "name": "web", "uid": "e"}, "status": {"mode": mode},
            "spec": {"service": "web", "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}},
        });
        caches.apply_elasti(serde_json::from_value(elasti).unwrap());
        let snapshot = caches.snapshot(&ObjectKey::new("n", "web")).unwrap();
        assert!(snapshot.backends.values().all(Vec::is_empty), "{:?}", snapshot.backends);
        snapshot.slices.into_iter().map(|slice| slice.name).collect::<Vec<_>>()
    };
    assert!(stale("proxy").is_empty(), "its resolvers still hold connections");
    assert_eq!(stale("serve"), std::slice::from_ref(&name));
    caches.remove_slice(&ObjectKey::new("n", &name));
    assert!(stale("serve").is_empty());
}

#[test]
fn every_pod_that_is_not_about_to_end_is_known_with_its_node_whether_it_is_ready_or_not() {
    let caches = caches();
    let mut starting = endpoint("10.1.0.1", "p", &json!({"ready": false}));
    starting["nodeName"] = "n1".into();
    let two = slice("b", "web", &[ready("10.1.0.2", "q")]);
    caches.apply_slice(&slice("a", "web", &[starting, ready("10.1.0.2", "q"), ending("10.1.0.3", "r")]));
    caches.apply_slice(&two);
    let pods = caches.snapshot(&ObjectKey::new("n", "web")).unwrap().endpoints;
    let seen: Vec<_> =
        pods.iter().map(|pod| (pod.address.to_string(), pod.node.as_str(), pod.pod.as_str(), pod.ready)).collect();
    assert_eq!(seen, [("10.1.0.1:8080".to_owned(), "n1", "p", false), ("10.1.0.2:8080".to_owned(), "", "q", true)]);
}

#[test]
fn targets_of_other_kinds_are_wanted_while_an_elasti_service_names_them_and_nothing_is_kept_after() {
    let caches = Caches::new();
    let wanted = caches.other_targets();
    let elasti = |kind: &str| {
        serde_json::from_value::<ElastiService>(json!({
            "metadata": {"namespace": "n", "name": "web", "uid": "e"},
            "spec": {"service": "web", "scaleTargetRef": {"apiVersion": "example.com/v1", "kind": kind, "name": "shop"}},
        }))
        .unwrap()
    };
    let state = || caches.snapshot(&ObjectKey::new("n", "web")).unwrap().target;
    let kind = Kind::of(&elasti("Shop").spec.scale_target_ref);
    let target = TargetObserved { namespace: "n".into(), name: "shop".into(), ..TargetObserved::default() };

    caches.apply_elasti(elasti("Shop"));
    assert_eq!(wanted.borrow().len(), 1);
    assert_eq!(state(), TargetState::Unread, "that is no fault");
    let concerned = caches.set_target_unread(&kind, &ObjectKey::new("n", "shop"), "forbidden".into());
    assert_eq!((concerned.len(), state()), (1, TargetState::UnknownKind("forbidden".into())));
    caches.apply_target(&kind, target.clone());
    assert_eq!(state(), TargetState::Found(target));
    assert_eq!(caches.set_target_unread(&kind, &ObjectKey::new("n", "shop"), "late".into()).len(), 0);
    caches.remove_target(&kind, &ObjectKey::new("n", "shop"));
    assert_eq!(state(), TargetState::Missing);

    caches.apply_elasti(elasti("Stall"));
    let names: Vec<String> = wanted.borrow().keys().map(|kind| kind.kind.clone()).collect();
    assert_eq!(names, ["Stall"]);
    caches.remove_elasti(&ObjectKey::new("n", "web"));
    assert!(wanted.borrow().is_empty());
    let tables = caches.read();
    assert!(tables.targets.is_empty() && tables.unread_targets.is_empty() && tables.by_target.is_empty());
}

#[test]
fn of_an_elasti_service_nothing_is_kept_that_says_only_who_wrote_what() {
    let caches = Caches::new();
    let elasti = json!({
        "metadata": {"namespace": "n", "name": "web", "uid": "e", "managedFields": [{
            "manager": "kubectl", "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:service": {}}},
        }]},
        "spec": {"service": "web", "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}},
    });
    caches.apply_elasti(serde_json::from_value(elasti).unwrap());
    let kept = caches.snapshot(&ObjectKey::new("n", "web")).unwrap().elasti;
    assert_eq!((kept.spec.service.as_str(), &kept.metadata.managed_fields), ("web", &None));
}

/// A bug once: the one that was idle scaled the target to zero under the clients of the other.
#[test]
fn elasti_services_of_one_target_know_of_each_other_unless_they_name_one_service() {
    let caches = Caches::new();
    let elasti = |name: &str, service: &str, target: &str| {
        serde_json::from_value::<ElastiService>(json!({
            "metadata": {"namespace": "n", "name": name, "uid": name},
            "spec": {"service": service, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}},
        }))
        .unwrap()
    };
    let shared = |name: &str| caches.snapshot(&ObjectKey::new("n", name)).unwrap().shared_with;
    caches.apply_elasti(elasti("web", "web", "web"));
    caches.apply_elasti(elasti("younger", "web", "web"));
    assert!(shared("web").is_empty(), "the older has the Service");
    let (concerned, _) = caches.apply_elasti(elasti("grpc", "grpc", "web"));
    assert_eq!(concerned.len(), 3, "all are looked at");
    assert_eq!(
        (shared("web"), shared("grpc")),
        (vec!["grpc".to_owned()], vec!["web".to_owned(), "younger".to_owned()])
    );
    let (concerned, _) = caches.apply_elasti(elasti("grpc", "grpc", "other"));
    assert_eq!((concerned.len(), shared("web"), shared("grpc")), (3, vec![], vec![]));
    caches.apply_elasti(elasti("grpc", "grpc", "web"));
    let (concerned, _) = caches.remove_elasti(&ObjectKey::new("n", "grpc"));
    assert_eq!((concerned.len(), shared("web")), (2, vec![]));
}

#[test]
fn an_elasti_service_that_was_made_anew_unseen_tells_the_uid_that_is_gone() {
    let caches = Caches::new();
    let elasti = |uid: &str| {
        let spec =
            json!({"service": "web", "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}});
        let metadata = json!({"namespace": "n", "name": "web", "uid": uid});
        serde_json::from_value::<ElastiService>(json!({"metadata": metadata, "spec": spec})).unwrap()
    };
    assert_eq!(caches.apply_elasti(elasti("old")).1, None);
    assert_eq!(caches.apply_elasti(elasti("old")).1, None);
    let (concerned, gone) = caches.apply_elasti(elasti("new"));
    assert_eq!((concerned.len(), gone.as_deref()), (1, Some("old")));
    assert_eq!((caches.by_uid("old"), caches.by_uid("new")), (None, Some(ObjectKey::new("n", "web"))));
}
