//! EndpointSlices that send a Service's connections to resolvers: which resolvers, and how the objects look.
//!
//! Pure: [`desired`] says what shall be there, [`object`] how it is written, [`observed`] how it is read back.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use elasti_api::names;
use elasti_api::v1alpha1::{ElastiService, InterceptedPort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;

use crate::observed::{Observed, ResolverEndpoint, ResolverSlice, ServiceObserved, SlicePort};
use crate::resolvers::ResolverObserved;

/// Value of the managed-by label: Kubernetes' own controllers leave such slices alone.
pub const MANAGED_BY: &str = "elasti-operator";

/// Label with the UID of the ElastiService that an object of ours belongs to.
pub const OWNER_LABEL: &str = "elasti.truefoundry.com/elastiservice-uid";

/// The resolvers that may stand in a Service's slices: listening for it and not about to leave.
pub fn eligible(resolvers: &[ResolverObserved], revision: u64) -> impl Iterator<Item = &ResolverObserved> {
    resolvers.iter().filter(move |resolver| {
        !resolver.leaving && resolver.ack.as_ref().is_some_and(|ack| ack.listening && ack.revision >= revision)
    })
}

/// The slices that shall be there: one per address family that has resolvers. At most `limit` resolvers each, chosen by
/// rendezvous hashing so that a resolver that comes or goes moves as few as possible; all of them where a traffic policy
/// is `Local`, since then only the endpoints of a client's own node count.
pub fn desired(observed: &Observed<'_>, service: &ServiceObserved, limit: usize) -> Vec<ResolverSlice> {
    let status = observed.elasti.status.clone().unwrap_or_default();
    let name = &observed.elasti.spec.service;
    let ports = slice_ports(service, &status.ports);
    if ports.is_empty() {
        return Vec::new();
    }
    let mut candidates: Vec<&ResolverObserved> = eligible(&observed.resolvers, status.revision).collect();
    if !service.local_traffic_policy && candidates.len() > limit {
        candidates.sort_by_key(|resolver| std::cmp::Reverse(weight(observed.uid(), &resolver.identity.pod)));
        candidates.truncate(limit);
    }
    [false, true]
        .into_iter()
        .filter_map(|ipv6| {
            let mut endpoints: Vec<ResolverEndpoint> = candidates
                .iter()
                .flat_map(|resolver| {
                    let node = resolver.identity.node.clone();
                    resolver
                        .identity
                        .addresses
                        .iter()
                        .map(move |address| ResolverEndpoint { address: *address, node: node.clone() })
                })
                .filter(|endpoint| endpoint.address.is_ipv6() == ipv6)
                .filter(|_| service.cluster_ips.iter().any(|ip| ip.is_ipv6() == ipv6))
                .collect();
            endpoints.sort();
            (!endpoints.is_empty()).then(|| ResolverSlice {
                name: names::resolver_slice(name, ipv6),
                service: name.clone(),
                ipv6,
                endpoints,
                ports: ports.clone(),
            })
        })
        .collect()
}

/// The slices that change when resolvers which are not connected leave them. The last ones stay, for an empty slice is a
/// refused connection for sure.
pub fn without_silent(slices: &[&ResolverSlice], resolvers: &[ResolverObserved]) -> Vec<ResolverSlice> {
    let connected = |endpoint: &ResolverEndpoint| {
        resolvers.iter().any(|resolver| resolver.identity.addresses.contains(&endpoint.address))
    };
    let thinned = |slice: &ResolverSlice| {
        let endpoints: Vec<_> = slice.endpoints.iter().filter(|endpoint| connected(endpoint)).cloned().collect();
        let changes = !endpoints.is_empty() && endpoints != slice.endpoints;
        changes.then(|| ResolverSlice { endpoints, ..slice.clone() })
    };
    slices.iter().filter_map(|slice| thinned(slice)).collect()
}

fn slice_ports(service: &ServiceObserved, intercepted: &[InterceptedPort]) -> Vec<SlicePort> {
    service
        .ports
        .iter()
        .filter_map(|port| {
            let own = intercepted.iter().find(|own| own.port == port.port)?;
            Some(SlicePort {
                name: port.name.clone(),
                port: own.interception_port,
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

fn weight(uid: &str, pod: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (uid, pod).hash(&mut hasher);
    hasher.finish()
}

/// The slice as it is applied. It belongs to the ElastiService and goes with it.
pub fn object(slice: &ResolverSlice, elasti: &ElastiService) -> EndpointSlice {
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(slice.name.clone()),
            namespace: elasti.metadata.namespace.clone(),
            labels: Some(
                [
                    (names::SERVICE_NAME_LABEL, slice.service.as_str()),
                    (names::MANAGED_BY_LABEL, MANAGED_BY),
                    (OWNER_LABEL, elasti.metadata.uid.as_deref().unwrap_or_default()),
                ]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ),
            owner_references: elasti.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        address_type: if slice.ipv6 { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: slice
            .endpoints
            .iter()
            .map(|endpoint| Endpoint {
                addresses: vec![endpoint.address.to_string()],
                // Said in full: some ingress controllers take an absent condition for "not ready".
                conditions: Some(EndpointConditions {
                    ready: Some(true),
                    serving: Some(true),
                    terminating: Some(false),
                }),
                node_name: Some(endpoint.node.clone()),
                ..Endpoint::default()
            })
            .collect(),
        ports: Some(
            slice
                .ports
                .iter()
                .map(|port| EndpointPort {
                    name: Some(port.name.clone()),
                    port: Some(port.port.into()),
                    protocol: Some("TCP".to_owned()),
                    app_protocol: port.app_protocol.clone(),
                })
                .collect(),
        ),
    }
}

/// Reads back a slice of ours; `None` for a slice of another controller.
pub fn observed(slice: &EndpointSlice) -> Option<ResolverSlice> {
    let labels = slice.metadata.labels.as_ref()?;
    if labels.get(names::MANAGED_BY_LABEL).map(String::as_str) != Some(MANAGED_BY) {
        return None;
    }
    let mut endpoints: Vec<ResolverEndpoint> = slice
        .endpoints
        .iter()
        .flat_map(|endpoint| {
            let node = endpoint.node_name.clone().unwrap_or_default();
            endpoint.addresses.iter().filter_map(move |address| {
                Some(ResolverEndpoint { address: address.parse::<IpAddr>().ok()?, node: node.clone() })
            })
        })
        .collect();
    endpoints.sort();
    Some(ResolverSlice {
        name: slice.metadata.name.clone()?,
        service: labels.get(names::SERVICE_NAME_LABEL)?.clone(),
        ipv6: slice.address_type == "IPv6",
        endpoints,
        ports: slice
            .ports
            .iter()
            .flatten()
            .filter_map(|port| {
                Some(SlicePort {
                    name: port.name.clone().unwrap_or_default(),
                    port: u16::try_from(port.port?).ok()?,
                    app_protocol: port.app_protocol.clone(),
                })
            })
            .collect(),
    })
}
