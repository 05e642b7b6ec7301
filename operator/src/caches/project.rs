//! From Kubernetes objects to what is kept of them.

use std::net::{IpAddr, SocketAddr};

use elasti_api::names;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::observed::{Addressing, ObjectKey, PodEndpoint, ResolverSlice, ServiceObserved, ServicePort};
use crate::slices::{self, OWNER_LABEL};

/// The key of a namespaced object.
pub(super) fn key(metadata: &ObjectMeta) -> Option<ObjectKey> {
    Some(ObjectKey::new(metadata.namespace.as_ref()?, metadata.name.as_ref()?))
}

/// What is kept of a Service.
pub(super) fn service(service: &Service) -> ServiceObserved {
    let spec = service.spec.clone().unwrap_or_default();
    let local = |policy: &Option<String>| policy.as_deref() == Some("Local");
    let spec_ports = spec.ports.unwrap_or_default();
    let cluster_ips = spec.cluster_ips.unwrap_or_default();
    ServiceObserved {
        addressing: match spec.type_.as_deref() {
            Some("ExternalName") => Addressing::ExternalName,
            _ if cluster_ips.first().is_some_and(|ip| ip == "None") => Addressing::Headless,
            _ => Addressing::ClusterIp,
        },
        cluster_ips: cluster_ips.iter().filter_map(|ip| ip.parse().ok()).collect(),
        ports: spec_ports
            .iter()
            .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
            .filter_map(|port| {
                Some(ServicePort {
                    name: port.name.clone().unwrap_or_default(),
                    port: u16::try_from(port.port).ok()?,
                    app_protocol: port.app_protocol.clone(),
                })
            })
            .collect(),
        spec_ports,
        selector: spec.selector.unwrap_or_default(),
        local_traffic_policy: local(&spec.internal_traffic_policy) || local(&spec.external_traffic_policy),
        ip_families: spec.ip_families.unwrap_or_default(),
        ip_family_policy: spec.ip_family_policy,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or_default(),
        owner_uid: service.metadata.labels.as_ref().and_then(|labels| labels.get(OWNER_LABEL)).cloned(),
    }
}

/// A slice of ours and the UID of the ElastiService that it belongs to.
pub(super) fn own_slice(slice: &EndpointSlice) -> Option<(String, ResolverSlice)> {
    let own = slices::observed(slice)?;
    let uid = slice.metadata.labels.as_ref()?.get(OWNER_LABEL)?.clone();
    Some((uid, own))
}

/// Endpoints of one slice.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Backends {
    endpoints: Vec<(IpAddr, State)>,
    /// Those that are not about to end; the port of their addresses is zero.
    pods: Vec<PodEndpoint>,
    ports: Vec<(String, u16)>,
}

/// What an endpoint is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Ready,
    NotReady,
    /// It is about to end; UID of its pod.
    Draining(String),
}

impl Backends {
    /// The ready endpoints for the Service port of this name.
    pub(super) fn of_port(&self, name: &str) -> Vec<SocketAddr> {
        self.on_port(name, |state| (*state == State::Ready).then_some(())).map(|(address, ())| address).collect()
    }

    /// The endpoints for the Service port of this name that are about to end, with the UIDs of their pods.
    pub(super) fn draining<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (SocketAddr, &'a str)> {
        self.on_port(name, |state| match state {
            State::Draining(pod) => Some(pod.as_str()),
            State::Ready | State::NotReady => None,
        })
    }

    /// The endpoints for the Service port of this name that are not about to end.
    pub(super) fn pods<'a>(&'a self, name: &'a str) -> impl Iterator<Item = PodEndpoint> + 'a {
        self.ports.iter().filter(move |(port_name, _)| port_name == name).flat_map(|(_, port)| {
            let at = |address: SocketAddr| SocketAddr::new(address.ip(), *port);
            self.pods.iter().map(move |pod| PodEndpoint { address: at(pod.address), ..pod.clone() })
        })
    }

    /// Addresses of the endpoints that are not about to end.
    pub(super) fn staying(&self) -> impl Iterator<Item = IpAddr> {
        self.endpoints.iter().filter(|(_, state)| !matches!(state, State::Draining(_))).map(|(address, _)| *address)
    }

    fn on_port<'a, T: Clone + 'a>(
        &'a self,
        name: &'a str,
        wanted: impl Fn(&'a State) -> Option<T> + 'a,
    ) -> impl Iterator<Item = (SocketAddr, T)> {
        let chosen: Vec<_> =
            self.endpoints.iter().filter_map(|(address, state)| Some((*address, wanted(state)?))).collect();
        self.ports.iter().filter(move |(port_name, _)| port_name == name).flat_map(move |(_, port)| {
            let port = *port;
            chosen.clone().into_iter().map(move |(address, it)| (SocketAddr::new(address, port), it))
        })
    }
}

/// The Service that a slice belongs to, and its endpoints. An absent condition means ready, as the API says. One that is
/// about to end is not ready, even where its Service publishes it as if it were (`publishNotReadyAddresses`).
pub(super) fn backends(slice: &EndpointSlice) -> Option<(String, Backends)> {
    let service = slice.metadata.labels.as_ref()?.get(names::SERVICE_NAME_LABEL)?.clone();
    let endpoints = slice
        .endpoints
        .iter()
        .flat_map(|endpoint| {
            let state = state(endpoint);
            endpoint.addresses.iter().filter_map(move |address| Some((address.parse().ok()?, state.clone())))
        })
        .collect();
    let pods = slice.endpoints.iter().filter(|endpoint| !terminating(endpoint)).flat_map(|endpoint| {
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        let it = |address| PodEndpoint {
            address: SocketAddr::new(address, 0),
            node: endpoint.node_name.clone().unwrap_or_default(),
            pod: pod.and_then(|pod| pod.uid.clone()).unwrap_or_default(),
            ready: state(endpoint) == State::Ready,
        };
        endpoint.addresses.iter().filter_map(|address| address.parse().ok()).map(it).collect::<Vec<_>>()
    });
    let pods = pods.collect();
    let ports = slice
        .ports
        .iter()
        .flatten()
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .filter_map(|port| Some((port.name.clone().unwrap_or_default(), u16::try_from(port.port?).ok()?)))
        .collect();
    Some((service, Backends { endpoints, pods, ports }))
}

fn terminating(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.terminating) == Some(true)
}

fn state(endpoint: &Endpoint) -> State {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    if conditions.terminating == Some(true) {
        // Only of a pod is it known when its containers have ended: its endpoint goes then.
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        return pod.and_then(|pod| pod.uid.clone()).map_or(State::NotReady, State::Draining);
    }
    if conditions.ready.unwrap_or(true) { State::Ready } else { State::NotReady }
}
