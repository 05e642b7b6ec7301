//! EndpointSlices that send a Service's connections to resolvers: which resolvers, and how the objects look.
//!
//! Pure: [`desired`] says what shall be there, [`object`] how it is written, [`observed`] how it is read back.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
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

/// The most endpoints that the API server lets into one slice (`maxEndpoints` in the validation of Kubernetes 1.34).
pub const ENDPOINTS_MAX: usize = 1000;

/// The resolvers that may stand in a Service's slices: listening for it and not about to leave.
pub fn eligible(resolvers: &[ResolverObserved], revision: u64) -> impl Iterator<Item = &ResolverObserved> {
    resolvers.iter().filter(move |resolver| {
        !resolver.leaving && resolver.ack.as_ref().is_some_and(|ack| ack.listening && ack.revision >= revision)
    })
}

/// The slices that shall be there: one per address family that has resolvers, more where one cannot hold them all. At most `limit`
/// resolvers, chosen by rendezvous hashing so that a resolver that comes or goes moves as few as possible; all of them where a traffic
/// policy is `Local`, since then only the endpoints of a client's own node count.
pub fn desired(observed: &Observed<'_>, service: &ServiceObserved, limit: usize) -> Vec<ResolverSlice> {
    let status = observed.elasti.status.clone().unwrap_or_default();
    let name = &observed.elasti.spec.service;
    let ports = slice_ports(service, &status.ports);
    if ports.is_empty() {
        return Vec::new();
    }
    let mut candidates: Vec<&ResolverObserved> = eligible(&observed.resolvers, status.revision).collect();
    if !service.local_traffic_policy && candidates.len() > limit {
        candidates = heaviest(candidates, observed.uid(), limit);
    }
    [false, true]
        .into_iter()
        .flat_map(|ipv6| {
            let endpoints: BTreeSet<ResolverEndpoint> = candidates
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
            let present = observed.slices.iter().filter(|slice| slice.service == *name && slice.ipv6 == ipv6);
            let slice = |(called, endpoints)| ResolverSlice {
                name: called,
                service: name.clone(),
                ipv6,
                endpoints,
                ports: ports.clone(),
            };
            spread(&names::resolver_slice(name, ipv6), endpoints, present).into_iter().map(slice).collect::<Vec<_>>()
        })
        .collect()
}

/// The names of slices with their endpoints, sorted. Who stands in a slice stays there: whoever comes or goes changes one slice, and
/// nobody is missing while two are written. Room is what is left beside all that are there, since those who go may be kept for a while.
fn spread<'a>(
    first: &str,
    mut endpoints: BTreeSet<ResolverEndpoint>,
    present: impl Iterator<Item = &'a ResolverSlice>,
) -> Vec<(String, Vec<ResolverEndpoint>)> {
    let mut slices: BTreeMap<String, (usize, Vec<ResolverEndpoint>)> = BTreeMap::new();
    for slice in present {
        let staying = slice.endpoints.iter().filter_map(|endpoint| endpoints.take(endpoint)).collect();
        slices.insert(slice.name.clone(), (ENDPOINTS_MAX.saturating_sub(slice.endpoints.len()), staying));
    }
    let mut coming = endpoints.into_iter();
    for (room, staying) in slices.values_mut() {
        staying.extend(coming.by_ref().take(*room));
        staying.sort();
    }
    let mut names = (1..).map(|number| if number == 1 { first.to_owned() } else { format!("{first}-{number}") });
    while coming.len() > 0 {
        let Some(name) = names.find(|name| !slices.contains_key(name)) else { break };
        slices.insert(name, (0, coming.by_ref().take(ENDPOINTS_MAX).collect()));
    }
    slices.retain(|_, (_, endpoints)| !endpoints.is_empty());
    slices.into_iter().map(|(name, (_, endpoints))| (name, endpoints)).collect()
}

/// Whether nobody of a slice of ours is left, while others of its family have somebody: those that have nobody at all stay, for an
/// empty slice is a refused connection for sure.
pub fn emptied(slice: &ResolverSlice, wanted: &[ResolverSlice]) -> bool {
    let mut of_family = wanted.iter().filter(|wanted| wanted.ipv6 == slice.ipv6).peekable();
    of_family.peek().is_some() && of_family.all(|wanted| wanted.name != slice.name)
}

/// A slice while resolvers are still coming: nobody leaves it but those who have `gone`, or are about to. One that is `full` names some of
/// many, and some of those are enough until the others are back too; with `first` they may all still be to come. It is not written for each that
/// takes their place meanwhile.
pub fn meanwhile(
    present: &ResolverSlice,
    wanted: ResolverSlice,
    full: bool,
    first: bool,
    gone: impl Fn(IpAddr) -> bool,
) -> ResolverSlice {
    let staying: Vec<_> = present.endpoints.iter().filter(|endpoint| !gone(endpoint.address)).cloned().collect();
    let some = || wanted.endpoints.iter().any(|endpoint| staying.binary_search(endpoint).is_ok());
    if full && present.ports == wanted.ports && (first && !staying.is_empty() || some()) {
        return ResolverSlice { endpoints: staying, ..wanted };
    }
    let mut slice = wanted;
    slice.endpoints.extend(staying);
    slice.endpoints.sort();
    slice.endpoints.dedup();
    slice
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

/// The `limit` of them that weigh most for this ElastiService. A weight is asked for once each: there may be a thousand of them, and ten
/// thousand ElastiServices.
fn heaviest<'a>(candidates: Vec<&'a ResolverObserved>, uid: &str, limit: usize) -> Vec<&'a ResolverObserved> {
    let mut of_service = DefaultHasher::new();
    uid.hash(&mut of_service);
    let weight = |resolver: &ResolverObserved| {
        let mut hasher = of_service.clone();
        resolver.identity.pod.hash(&mut hasher);
        hasher.finish()
    };
    let mut weighed: Vec<_> = candidates.into_iter().map(|resolver| (Reverse(weight(resolver)), resolver)).collect();
    weighed.select_nth_unstable_by(limit, |(one, a), (other, b)| (one, &a.identity.pod).cmp(&(other, &b.identity.pod)));
    weighed.truncate(limit);
    weighed.into_iter().map(|(_, resolver)| resolver).collect()
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
