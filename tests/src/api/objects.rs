//! Objects as their users write them, and as Kubernetes' own controllers would.

use std::net::SocketAddr;

use elasti_api::names::SERVICE_NAME_LABEL;
use serde_json::{Value, json};

/// A Deployment.
pub fn deployment(name: &str, replicas: u32) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "target", "image": "target"}]},
            },
        },
    })
}

/// A Service with the port 80 for the pods of the Deployment of its name; `spec` is laid over it.
pub fn service(name: &str, spec: Value) -> Value {
    let usual = json!({"selector": {"app": name}, "ports": [{"name": "http", "port": 80}]});
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": laid_over(usual, spec),
    })
}

/// An ElastiService for the Service and the Deployment of its name; `spec` is laid over it.
pub fn elasti_service(name: &str, spec: Value) -> Value {
    let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": name});
    json!({
        "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService", "metadata": {"name": name},
        "spec": laid_over(json!({"service": name, "scaleTargetRef": target}), spec),
    })
}

/// KEDA's autoscaler of the Deployment of its name, with these annotations.
pub fn scaled_object(name: &str, annotations: &Value) -> Value {
    json!({
        "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": name, "annotations": annotations},
        "spec": {"scaleTargetRef": {"name": name}, "minReplicaCount": 1},
    })
}

/// An object of a kind that [`super::Cluster::serve`] has the API server serve.
pub fn custom(group: &str, kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": format!("{group}/v1alpha1"), "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// The slice that Kubernetes makes for a Service with one ready pod, which serves the port `http`.
pub fn ready_endpoint(service: &str, pod: SocketAddr) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": service, "labels": {
            SERVICE_NAME_LABEL: service, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        }},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [pod.ip()], "conditions": {"ready": true}}],
        "ports": [{"name": "http", "port": pod.port(), "protocol": "TCP"}],
    })
}

/// Lays fields over an object; null takes one away.
fn laid_over(mut object: Value, fields: Value) -> Value {
    if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) {
        object.extend(fields);
        object.retain(|_, value| !value.is_null());
    }
    object
}
