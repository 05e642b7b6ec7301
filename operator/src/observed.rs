//! What is observed of one ElastiService: everything that [`crate::plan`] decides on, and nothing else.
//!
//! The types here are the trimmed form in which the caches keep Kubernetes objects; they hold no client and do no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use elasti_api::v1alpha1::ElastiService;
use k8s_openapi::api::core::v1::Pod;

use crate::autoscaler::{AutoscalerObserved, AutoscalerState};
use crate::resolvers::ResolverObserved;
use crate::resolvers::arrivals::Arrivals;

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectKey {
    /// The key of `name` in `namespace`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A scale target: what `KubeElasti` calls `updateObjInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TargetObserved {
    /// Namespace of the target.
    pub namespace: String,
    /// Name of the target.
    pub name: String,
    /// The replicas that it shall have. Absent in the object means 1, as the API says of every kind that is known beforehand; of others
    /// it is what `/scale` says.
    pub spec_replicas: i32,
    /// Its pods have addresses of their own: its template says so, and is there to say so.
    pub pod_network: bool,
    /// Labels of its pods, in the form of a label selector; empty when the target does not tell them.
    pub selector: String,
    /// Its resourceVersion: a patch that carries it changes nothing that somebody else has changed since.
    pub resource_version: String,
}

/// Why a target is not observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetState {
    /// It is there.
    Found(TargetObserved),
    /// The API server knows no such object.
    Missing,
    /// It is about to be read.
    Unread,
    /// The cluster does not serve the target's kind, or not with a `/scale` that may be read; why, and what helps.
    UnknownKind(String),
}

impl TargetState {
    /// The target, if it is there.
    pub fn found(&self) -> Option<&TargetObserved> {
        match self {
            Self::Found(target) => Some(target),
            Self::Missing | Self::Unread | Self::UnknownKind(_) => None,
        }
    }
}

/// One TCP port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty when the Service has one port only.
    pub name: String,
    /// Its number.
    pub port: u16,
    /// Its `appProtocol`, copied into the slices that we publish.
    pub app_protocol: Option<String>,
}

/// What clients get for a Service's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Addressing {
    /// Its cluster IPs.
    #[default]
    ClusterIp,
    /// Its pods' addresses: `clusterIP: None`.
    Headless,
    /// Another name: `type: ExternalName`.
    ExternalName,
}

/// A Service, public or private.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceObserved {
    /// Its cluster IPs, one per family; none for a headless Service.
    pub cluster_ips: Vec<IpAddr>,
    /// Its TCP ports. Ports of other protocols are not intercepted.
    pub ports: Vec<ServicePort>,
    /// The whole list of ports as Kubernetes has it, for the private Service to follow.
    pub spec_ports: Vec<k8s_openapi::api::core::v1::ServicePort>,
    /// The labels that its pods bear; empty when its endpoints are made by somebody else.
    pub selector: BTreeMap<String, String>,
    /// What clients get for its name.
    pub addressing: Addressing,
    /// Either traffic policy is `Local`: every node needs an endpoint of its own.
    pub local_traffic_policy: bool,
    /// The address families, `IPv4` and `IPv6`.
    pub ip_families: Vec<String>,
    /// `SingleStack`, `PreferDualStack` or `RequireDualStack`.
    pub ip_family_policy: Option<String>,
    /// Not-ready pods are published too.
    pub publish_not_ready: bool,
    /// UID of the ElastiService that made it, for a private Service.
    pub owner_uid: Option<String>,
}

/// One endpoint of a slice that we publish.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ResolverEndpoint {
    /// Address of a resolver's pod.
    pub address: IpAddr,
    /// Name of its node.
    pub node: String,
}

/// One port of a slice that we publish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the Service's port.
    pub name: String,
    /// Interception port.
    pub port: u16,
    /// The Service port's `appProtocol`.
    pub app_protocol: Option<String>,
}

/// A slice that sends a Service's connections to resolvers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolverSlice {
    /// Name of the slice.
    pub name: String,
    /// Name of the Service whose connections it carries.
    pub service: String,
    /// Whether it holds IPv6 addresses.
    pub ipv6: bool,
    /// The resolvers, sorted.
    pub endpoints: Vec<ResolverEndpoint>,
    /// The ports.
    pub ports: Vec<SlicePort>,
}

/// One address at which a pod of the target can be dialled that is about to end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DrainingEndpoint {
    /// The number of the Service port.
    pub port: u16,
    /// Pod address and target port.
    pub address: SocketAddr,
    /// UID of the pod.
    pub pod: String,
    /// Some endpoint that is not about to end, of whatever Service, has the pod address too.
    pub elsewhere: bool,
}

/// One address of a pod of the target that is not about to end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodEndpoint {
    /// Pod address and target port.
    pub address: SocketAddr,
    /// Name of its node; empty when nobody says.
    pub node: String,
    /// UID of the pod; empty when it is none.
    pub pod: String,
    /// Clients may be sent there.
    pub ready: bool,
}

/// Why a selector of pods whose connections the trigger `traffic` ignores has no effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFault {
    /// Since when.
    pub since: Instant,
    /// Cause and cure.
    pub why: String,
}

/// Whether the triggers call a target idle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every trigger calls it idle.
    Idle,
    /// A trigger sees traffic.
    Busy,
    /// A trigger cannot tell, and why: that is never taken for idle.
    Unknown(String),
}

/// The last answer of the triggers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TriggersObserved {
    /// What they said.
    pub verdict: Verdict,
    /// When they were asked last: an answer describes the time before this.
    pub asked: Instant,
    /// Since when every answer has been [`Verdict::Idle`].
    pub idle_since: Option<Instant>,
}

/// Why a wake does not come to its end, as the target's pods tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// A word for conditions and events, such as `ErrImagePull`.
    pub reason: String,
    /// A sentence that names the pod and the cause.
    pub message: String,
}

/// What is known of the ElastiServices that one is to be woken with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartnersObserved {
    /// Those that `spec.wakeWith` names and that are not there.
    pub missing: Vec<ObjectKey>,
    /// How `spec.wakeWith` leads from the ElastiService back to itself, if it does; both ends included.
    pub cycle: Option<Vec<ObjectKey>>,
}

/// Everything that is known of one ElastiService at one moment.
#[derive(Clone, Debug)]
pub struct Observed<'a> {
    /// The resource itself.
    pub elasti: &'a ElastiService,
    /// An older ElastiService has the same Service: its name.
    pub taken_by: Option<String>,
    /// Names of other ElastiServices that have the same target and another Service.
    pub shared_with: Vec<String>,
    /// The public Service.
    pub service: Option<ServiceObserved>,
    /// The private Service.
    pub private: Option<ServiceObserved>,
    /// The target.
    pub target: TargetState,
    /// The autoscaler that the ElastiService names.
    pub autoscaler: AutoscalerState,
    /// Autoscalers that the ElastiService has paused and names no more.
    pub stale_pauses: Vec<AutoscalerObserved>,
    /// The target's ready endpoints, by the number of the Service port.
    pub backends: BTreeMap<u16, Vec<SocketAddr>>,
    /// The Service's endpoints that are about to end. One goes from here when its containers have ended, as from slices.
    pub draining: Vec<DrainingEndpoint>,
    /// The Service's pods, as far as they are looked at: while one is waited for.
    pub pods: Vec<Arc<Pod>>,
    /// The addresses of the target's pods that are not about to end, ready or not, each once.
    pub endpoints: Vec<PodEndpoint>,
    /// Addresses of the pods whose connections the trigger `traffic` ignores.
    pub ignored_pods: BTreeSet<IpAddr>,
    /// Which selectors of such pods have no effect.
    pub source_faults: Vec<SourceFault>,
    /// Our slices, of this and of former Services of the ElastiService.
    pub slices: Vec<ResolverSlice>,
    /// Former private Services of the ElastiService, by name.
    pub stale_private: Vec<String>,
    /// Every resolver that is connected to this replica.
    pub resolvers: Vec<ResolverObserved>,
    /// When they came, and who has gone.
    pub arrivals: Arrivals,
    /// What the triggers said last; `None` before the first answer.
    pub triggers: Option<TriggersObserved>,
    /// What a look at the pods said about a wake that takes long.
    pub diagnosis: Option<Diagnosis>,
    /// What is known of the ElastiServices in `spec.wakeWith`.
    pub partners: PartnersObserved,
    /// Connections are held for an ElastiService that this one is to be woken with.
    pub partner_waits: bool,
    /// Since when this replica holds the Lease; `None` when another one does.
    pub leading_since: Option<Instant>,
    /// Another replica holds the Lease and has not renewed it for some seconds.
    pub holder_silent: bool,
}

impl Observed<'_> {
    /// UID of the ElastiService.
    pub fn uid(&self) -> &str {
        self.elasti.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Whether a pod of the target can serve.
    pub fn target_ready(&self) -> bool {
        self.backends.values().any(|backends| !backends.is_empty())
    }

    /// Connections that wait for the target, over all resolvers.
    pub fn held(&self) -> u32 {
        self.resolvers.iter().map(|resolver| resolver.traffic.held).sum()
    }

    /// Whether somebody waits for the target: connections are held for it, or for one that it is to be woken with.
    pub fn waited_for(&self) -> bool {
        self.held() > 0 || self.partner_waits
    }

    /// Connections that resolvers have ever accepted for it: growth is traffic.
    pub fn accepted(&self) -> u64 {
        self.resolvers.iter().map(|resolver| resolver.traffic.accepted).sum()
    }

    /// Connections that resolvers forward now.
    pub fn forwarding(&self) -> u32 {
        self.resolvers.iter().map(|resolver| resolver.traffic.forwarding).sum()
    }
}
