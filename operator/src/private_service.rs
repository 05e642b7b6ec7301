//! The private Service: a plain ClusterIP twin of the public one, whose endpoints are the target's pods alone.
//!
//! Resolvers forward to its address when they have heard from no operator for long. It follows the public Service's
//! selector and ports; nothing else is copied, so that no load balancer, scraper or deployment tool takes it for the
//! public one.

use elasti_api::names;
use elasti_api::v1alpha1::ElastiService;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;

use crate::observed::ServiceObserved;
use crate::slices::{MANAGED_BY, OWNER_LABEL};

/// Whether a private Service is as it shall be for a public one.
pub fn follows(private: &ServiceObserved, public: &ServiceObserved) -> bool {
    private.selector == public.selector && private.spec_ports == ports(public)
}

fn ports(public: &ServiceObserved) -> Vec<ServicePort> {
    public.spec_ports.iter().map(|port| ServicePort { node_port: None, ..port.clone() }).collect()
}

/// What is merged into a private Service that is there, before it is applied: that alone would leave ports that another manager has
/// written, such as KubeElasti, or this very patch.
pub fn ports_alone(public: &ServiceObserved) -> serde_json::Value {
    serde_json::json!({"spec": {"ports": ports(public)}})
}

/// The private Service as it is applied. It belongs to the ElastiService and goes with it.
pub fn object(public: &ServiceObserved, elasti: &ElastiService) -> Service {
    Service {
        metadata: ObjectMeta {
            name: Some(names::private_service(&elasti.spec.service)),
            namespace: elasti.metadata.namespace.clone(),
            labels: Some(
                [
                    ("app.kubernetes.io/managed-by", MANAGED_BY),
                    (OWNER_LABEL, elasti.metadata.uid.as_deref().unwrap_or_default()),
                ]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ),
            owner_references: elasti.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            selector: Some(public.selector.clone()),
            ports: Some(ports(public)),
            ip_families: Some(public.ip_families.clone()).filter(|families| !families.is_empty()),
            ip_family_policy: public.ip_family_policy.clone(),
            publish_not_ready_addresses: Some(public.publish_not_ready),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps out KubeElasti's defects B31 and B34.
    #[test]
    fn the_twin_follows_ports_and_selector_but_takes_no_node_port() {
        let port = ServicePort { port: 80, node_port: Some(30080), ..ServicePort::default() };
        let public = ServiceObserved {
            selector: [("app".to_owned(), "web".to_owned())].into(),
            spec_ports: vec![port.clone()],
            ..ServiceObserved::default()
        };
        let mut elasti = ElastiService::default();
        elasti.spec.service = "web".into();
        let spec = object(&public, &elasti).spec.unwrap();
        assert_eq!(spec.type_.as_deref(), Some("ClusterIP"));
        assert_eq!(spec.ports.as_ref().unwrap()[0].node_port, None);
        let private = ServiceObserved { spec_ports: spec.ports.unwrap(), ..public.clone() };
        assert!(follows(&private, &public));
        let moved = ServiceObserved { spec_ports: vec![ServicePort { port: 85, ..port }], ..public };
        assert!(!follows(&private, &moved));
    }
}
