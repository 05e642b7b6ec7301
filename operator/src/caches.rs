//! What the cluster looks like, kept by watches and trimmed to what decisions need.
//!
//! One shared watch per kind for the whole cluster, never one per ElastiService; objects are reduced to the types of
//! [`crate::observed`] as they arrive. Every change names the ElastiServices that it concerns. Reads never block on I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use elasti_api::message::Mode;
use elasti_api::names;
use elasti_api::v1alpha1::ElastiService;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::core::ApiResource;
use tokio::sync::watch as channel;

use crate::autoscaler::{self, AutoscalerObserved, AutoscalerState, Pause};
use crate::observed::{
    DrainingEndpoint, ObjectKey, PartnersObserved, PodEndpoint, ResolverSlice, ServiceObserved, TargetObserved,
    TargetState,
};
use crate::partners;
use crate::target::{Kind, OtherKind};

mod autoscalers;
mod namespaces;
mod others;
mod project;
mod retries;
pub mod watch;

/// Targets of kinds that are not known beforehand, as ElastiServices name them.
pub type OtherTargets = BTreeMap<Arc<OtherKind>, BTreeSet<ObjectKey>>;

/// The cluster as it was last seen.
#[derive(Default)]
pub struct Caches {
    tables: RwLock<Tables>,
    others: channel::Sender<OtherTargets>,
}

#[derive(Default)]
struct Tables {
    elastis: HashMap<ObjectKey, Arc<ElastiService>>,
    /// ElastiServices by the Service that they name.
    by_service: HashMap<ObjectKey, BTreeSet<ObjectKey>>,
    /// ElastiServices by the target that they name.
    by_target: HashMap<(Kind, ObjectKey), BTreeSet<ObjectKey>>,
    /// ElastiServices by those that they are to be woken with.
    by_partner: HashMap<ObjectKey, BTreeSet<ObjectKey>>,
    /// ElastiServices by UID.
    by_uid: HashMap<String, ObjectKey>,
    services: HashMap<ObjectKey, ServiceObserved>,
    /// Private Services by the UID of the ElastiService that they belong to.
    private_by_uid: HashMap<String, BTreeSet<ObjectKey>>,
    targets: HashMap<(Kind, ObjectKey), TargetObserved>,
    /// Kinds whose watch has not come to its first list, and why.
    unread_kinds: HashMap<Kind, String>,
    /// Targets whose `/scale` has not been read, and why it cannot be if that was tried.
    unread_targets: HashMap<(Kind, ObjectKey), Option<String>>,
    /// Resources of the kinds that were discovered.
    resources: HashMap<Kind, ApiResource>,
    /// Endpoints of slices that are not ours, by Service and slice.
    backends: HashMap<ObjectKey, BTreeMap<String, project::Backends>>,
    /// How many endpoints of all these slices, not about to end, have an address.
    staying: HashMap<IpAddr, u32>,
    /// Slices of ours and the UID of the ElastiService that they belong to, by slice.
    own_slices: HashMap<ObjectKey, (String, ResolverSlice)>,
    own_slices_by_uid: HashMap<String, BTreeSet<ObjectKey>>,
    /// Slices named like ours that bear none of our labels: KubeElasti left them behind, and they lead to its resolvers.
    left_behind: HashSet<ObjectKey>,
    autoscalers: autoscalers::Autoscalers,
}

/// Everything that the caches know about one ElastiService.
pub struct Snapshot {
    /// The resource.
    pub elasti: Arc<ElastiService>,
    /// See [`crate::observed::Observed`].
    pub taken_by: Option<String>,
    /// See [`crate::observed::Observed`].
    pub shared_with: Vec<String>,
    /// See [`crate::observed::Observed`].
    pub service: Option<ServiceObserved>,
    /// See [`crate::observed::Observed`].
    pub private: Option<ServiceObserved>,
    /// A Service of the private one's name is there, whoever has made it.
    pub private_found: bool,
    /// See [`crate::observed::Observed`].
    pub target: TargetState,
    /// How the API server calls the target's kind; `None` before it is known.
    pub target_resource: Option<ApiResource>,
    /// See [`crate::observed::Observed`].
    pub autoscaler: AutoscalerState,
    /// See [`crate::observed::Observed`].
    pub stale_pauses: Vec<AutoscalerObserved>,
    /// See [`crate::observed::Observed`].
    pub backends: BTreeMap<u16, Vec<SocketAddr>>,
    /// See [`crate::observed::Observed`].
    pub draining: Vec<DrainingEndpoint>,
    /// See [`crate::observed::Observed`].
    pub endpoints: Vec<PodEndpoint>,
    /// See [`crate::observed::Observed`].
    pub slices: Vec<ResolverSlice>,
    /// See [`crate::observed::Observed`].
    pub stale_private: Vec<String>,
    /// See [`crate::observed::Observed`].
    pub partners: PartnersObserved,
}

/// The ElastiServices that a change concerns.
pub type Concerned = BTreeSet<ObjectKey>;

impl Caches {
    /// Empty caches.
    pub fn new() -> Self {
        Self::default()
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        // No reader or writer leaves the tables half changed, so a poisoned lock still guards sound ones.
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keys of all ElastiServices.
    pub fn elastis(&self) -> Vec<ObjectKey> {
        self.read().elastis.keys().cloned().collect()
    }

    /// All ElastiServices, for those who count or seed.
    pub fn elasti_services(&self) -> Vec<Arc<ElastiService>> {
        self.read().elastis.values().cloned().collect()
    }

    /// The ElastiService with this UID.
    pub fn by_uid(&self, uid: &str) -> Option<ObjectKey> {
        self.read().by_uid.get(uid).cloned()
    }

    /// The UID of an ElastiService.
    pub fn uid(&self, key: &ObjectKey) -> Option<String> {
        self.read().elastis.get(key)?.metadata.uid.clone()
    }

    /// The ElastiService that a Service belongs to: the oldest of those that name it.
    pub fn owner_of(&self, service: &ObjectKey) -> Option<ObjectKey> {
        let tables = self.read();
        tables.owner(service).map(|(key, _)| key.clone())
    }

    /// Whoever is woken with this ElastiService.
    pub fn woken_with(&self, key: &ObjectKey) -> Concerned {
        let tables = self.read();
        partners::reached(key, |key| tables.named_by(key))
    }

    /// UIDs of those whose wake wakes this ElastiService too.
    pub fn wakers(&self, key: &ObjectKey) -> Vec<String> {
        let tables = self.read();
        let naming = |key: &ObjectKey| tables.by_partner.get(key).into_iter().flatten().cloned().collect();
        let wakers = partners::reached(key, naming);
        wakers.iter().filter_map(|waker| tables.elastis.get(waker)?.metadata.uid.clone()).collect()
    }

    /// Everything that is known about an ElastiService; `None` when there is none of this name.
    pub fn snapshot(&self, key: &ObjectKey) -> Option<Snapshot> {
        let tables = self.read();
        let elasti = tables.elastis.get(key)?.clone();
        let uid = elasti.metadata.uid.as_deref().unwrap_or_default();
        let service_key = ObjectKey::new(&key.namespace, &elasti.spec.service);
        let private_key = ObjectKey::new(&key.namespace, names::private_service(&elasti.spec.service));
        let service = tables.services.get(&service_key).cloned();
        Some(Snapshot {
            taken_by: tables
                .owner(&service_key)
                .map(|(owner, _)| owner)
                .filter(|owner| *owner != key)
                .map(|owner| owner.name.clone()),
            shared_with: tables.shared_with(key, &elasti),
            backends: service.as_ref().map(|service| tables.backends(&service_key, service)).unwrap_or_default(),
            draining: service.as_ref().map(|service| tables.draining(&service_key, service)).unwrap_or_default(),
            endpoints: service.as_ref().map(|service| tables.endpoints(&service_key, service)).unwrap_or_default(),
            service,
            private: tables
                .services
                .get(&private_key)
                .filter(|private| private.owner_uid.as_deref() == Some(uid))
                .cloned(),
            private_found: tables.services.contains_key(&private_key),
            target: tables.target(&elasti),
            target_resource: tables.resource(&Kind::of(&elasti.spec.scale_target_ref)),
            autoscaler: tables.autoscaler(key, &elasti),
            stale_pauses: tables.autoscalers.stale_pauses(uid, autoscalers::reference(key, &elasti).as_ref()),
            slices: tables
                .own_slices_by_uid
                .get(uid)
                .into_iter()
                .flatten()
                .filter_map(|slice| Some(tables.own_slices.get(slice)?.1.clone()))
                .chain(tables.left_behind(key, &elasti))
                .collect(),
            stale_private: tables
                .private_by_uid
                .get(uid)
                .into_iter()
                .flatten()
                .filter(|private| **private != private_key)
                .map(|private| private.name.clone())
                .collect(),
            partners: tables.partners(key, &elasti),
            elasti,
        })
    }

    /// An ElastiService is there or has changed; the UID of one of its name that is gone too, which was deleted and made again unseen.
    pub fn apply_elasti(&self, mut elasti: ElastiService) -> (Concerned, Option<String>) {
        let Some(key) = project::key(&elasti.metadata) else { return (Concerned::new(), None) };
        // As a tree of JSON they are many times the rest.
        elasti.metadata.managed_fields = None;
        let mut tables = self.write();
        let former = tables.other_target(&key);
        let (mut concerned, before) = tables.remove_elasti(&key).unwrap_or_default();
        let gone = before.filter(|uid| elasti.metadata.uid.as_ref() != Some(uid));
        let elasti = Arc::new(elasti);
        let (service, target) = references(&key, &elasti);
        for partner in wake_with(&key, &elasti) {
            tables.by_partner.entry(partner).or_default().insert(key.clone());
        }
        tables.by_service.entry(service.clone()).or_default().insert(key.clone());
        tables.by_target.entry(target.clone()).or_default().insert(key.clone());
        tables.autoscalers.name(key.clone(), autoscalers::reference(&key, &elasti));
        if let Some(uid) = &elasti.metadata.uid {
            tables.by_uid.insert(uid.clone(), key.clone());
        }
        tables.elastis.insert(key.clone(), elasti);
        concerned.extend(tables.wake_together(&key));
        concerned.extend(tables.by_service.get(&service).into_iter().flatten().cloned());
        concerned.extend(tables.by_target.get(&target).into_iter().flatten().cloned());
        let latter = tables.other_target(&key);
        self.note_others(&mut tables, former.into_iter().chain(latter));
        (concerned, gone)
    }

    /// An ElastiService is gone; its UID too, for those who remember things under it.
    pub fn remove_elasti(&self, key: &ObjectKey) -> (Concerned, Option<String>) {
        let mut tables = self.write();
        let former = tables.other_target(key);
        let gone = tables.remove_elasti(key).unwrap_or_default();
        self.note_others(&mut tables, former.into_iter());
        gone
    }

    /// A Service is there or has changed.
    pub fn apply_service(&self, service: &Service) -> Concerned {
        let Some(key) = project::key(&service.metadata) else { return Concerned::new() };
        let observed = project::service(service);
        let mut tables = self.write();
        if tables.services.get(&key) == Some(&observed) {
            return Concerned::new();
        }
        let mut concerned = tables.remove_service(&key);
        if let Some(uid) = &observed.owner_uid {
            tables.private_by_uid.entry(uid.clone()).or_default().insert(key.clone());
        }
        tables.services.insert(key.clone(), observed);
        concerned.extend(tables.concerned_by_service(&key));
        concerned
    }

    /// A Service is gone.
    pub fn remove_service(&self, key: &ObjectKey) -> Concerned {
        self.write().remove_service(key)
    }

    /// A slice is there or has changed.
    pub fn apply_slice(&self, slice: &EndpointSlice) -> Concerned {
        let Some(key) = project::key(&slice.metadata) else { return Concerned::new() };
        let mut tables = self.write();
        if let Some((uid, own)) = project::own_slice(slice) {
            if tables.own_slices.get(&key).is_some_and(|present| present.0 == uid && present.1 == own) {
                return Concerned::new();
            }
            let mut concerned = tables.remove_slice(&key);
            tables.own_slices_by_uid.entry(uid.clone()).or_default().insert(key.clone());
            concerned.extend(tables.by_uid.get(&uid).cloned());
            tables.left_behind.remove(&key);
            tables.own_slices.insert(key, (uid, own));
            return concerned;
        }
        let mut concerned = Concerned::new();
        if tables.own_slices.contains_key(&key) {
            concerned = tables.remove_slice(&key);
        }
        let Some((service, backends)) = project::backends(slice) else { return concerned };
        let service = ObjectKey::new(&key.namespace, service);
        if key.name == names::resolver_slice(&service.name, false) {
            if tables.left_behind.insert(key) {
                concerned.extend(tables.concerned_by_service(&service));
            }
            return concerned;
        }
        if tables.backends.get(&service).and_then(|slices| slices.get(&key.name)) == Some(&backends) {
            return concerned;
        }
        tables.count_staying(&backends, 1);
        let before = tables.backends.entry(service.clone()).or_default().insert(key.name, backends);
        if let Some(before) = before {
            tables.count_staying(&before, -1);
        }
        // A private Service has the endpoints of its public one.
        concerned.extend(tables.concerned_by_service(&service));
        concerned
    }

    /// A slice is gone.
    pub fn remove_slice(&self, key: &ObjectKey) -> Concerned {
        self.write().remove_slice(key)
    }

    /// A target is there or has changed.
    pub fn apply_target(&self, kind: &Kind, target: TargetObserved) -> Concerned {
        let key = (kind.clone(), ObjectKey::new(&target.namespace, &target.name));
        let mut tables = self.write();
        tables.unread_targets.remove(&key);
        tables.targets.insert(key.clone(), target);
        tables.by_target.get(&key).cloned().unwrap_or_default()
    }

    /// A target is gone.
    pub fn remove_target(&self, kind: &Kind, key: &ObjectKey) -> Concerned {
        let key = (kind.clone(), key.clone());
        let mut tables = self.write();
        tables.unread_targets.remove(&key);
        tables.targets.remove(&key);
        tables.by_target.get(&key).cloned().unwrap_or_default()
    }

    /// The `/scale` of a target cannot be read, and why. What was read before stays: requests that rest on it are refused if
    /// the target has changed.
    pub fn set_target_unread(&self, kind: &Kind, key: &ObjectKey, why: String) -> Concerned {
        let key = (kind.clone(), key.clone());
        let mut tables = self.write();
        if tables.targets.contains_key(&key) || tables.unread_targets.get(&key) == Some(&Some(why.clone())) {
            return Concerned::new();
        }
        tables.unread_targets.insert(key.clone(), Some(why));
        tables.by_target.get(&key).cloned().unwrap_or_default()
    }

    /// Targets of kinds that are not known beforehand, now and as this changes.
    pub fn other_targets(&self) -> channel::Receiver<OtherTargets> {
        self.others.subscribe()
    }

    /// How the API server calls a kind that was discovered.
    pub fn set_resource(&self, kind: &Kind, resource: ApiResource) {
        self.write().resources.insert(kind.clone(), resource);
    }

    /// No ElastiService names a target of this kind any more, so nothing is kept of it.
    pub fn forget_kind(&self, kind: &Kind) {
        let mut tables = self.write();
        tables.targets.retain(|(of, _), _| of != kind);
        tables.unread_targets.retain(|(of, _), _| of != kind);
        tables.unread_kinds.remove(kind);
        tables.resources.remove(kind);
    }

    /// Tells of these targets whether an ElastiService names them, and keeps nothing of one that none does.
    fn note_others(&self, tables: &mut Tables, targets: impl Iterator<Item = (Arc<OtherKind>, ObjectKey)>) {
        for (other, key) in targets {
            let target = (Kind::Other(other.clone()), key.clone());
            let named = tables.by_target.contains_key(&target);
            if !named {
                tables.targets.remove(&target);
                tables.unread_targets.remove(&target);
            } else if !tables.targets.contains_key(&target) {
                tables.unread_targets.entry(target).or_default();
            }
            self.others.send_if_modified(|others| {
                if named {
                    return others.entry(other).or_default().insert(key);
                }
                let Some(keys) = others.get_mut(&other) else { return false };
                let gone = keys.remove(&key);
                if keys.is_empty() {
                    others.remove(&other);
                }
                gone
            });
        }
    }

    /// An autoscaler is there or has changed.
    pub fn apply_autoscaler(&self, autoscaler: AutoscalerObserved) -> Concerned {
        let mut tables = self.write();
        let (mut concerned, pausers) = tables.autoscalers.apply(autoscaler);
        concerned.extend(pausers.iter().filter_map(|uid| tables.by_uid.get(uid)).cloned());
        concerned
    }

    /// An autoscaler is gone.
    pub fn remove_autoscaler(&self, kind: autoscaler::Kind, key: &ObjectKey) -> Concerned {
        self.write().autoscalers.remove(kind, key)
    }

    /// Notes that a kind of autoscaler cannot be read, and why, or (`None`) that it can.
    pub fn set_autoscalers_unread(&self, kind: autoscaler::Kind, why: Option<String>) -> Concerned {
        self.write().autoscalers.set_unread(kind, why)
    }

    /// Notes that a kind's objects cannot be read, and why, or (`None`) that they can.
    pub fn set_kind_unread(&self, kind: &Kind, why: Option<String>) -> Concerned {
        let mut tables = self.write();
        let changed = match why {
            Some(why) => tables.unread_kinds.insert(kind.clone(), why.clone()).is_none_or(|before| before != why),
            None => tables.unread_kinds.remove(kind).is_some(),
        };
        if !changed {
            return Concerned::new();
        }
        tables.by_target.iter().filter(|((of, _), _)| of == kind).flat_map(|(_, keys)| keys.iter().cloned()).collect()
    }
}

/// The ElastiServices that one is to be woken with, as it names them.
fn wake_with(key: &ObjectKey, elasti: &ElastiService) -> Vec<ObjectKey> {
    let partners = elasti.spec.wake_with.iter().flatten();
    partners
        .map(|partner| ObjectKey::new(partner.namespace.as_ref().unwrap_or(&key.namespace), &partner.name))
        .collect()
}

/// The Service and the target that an ElastiService names.
fn references(key: &ObjectKey, elasti: &ElastiService) -> (ObjectKey, (Kind, ObjectKey)) {
    let service = ObjectKey::new(&key.namespace, &elasti.spec.service);
    let reference = &elasti.spec.scale_target_ref;
    (service, (Kind::of(reference), ObjectKey::new(&key.namespace, &reference.name)))
}

fn unindex<K: std::hash::Hash + Eq, V: Ord>(index: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

impl Tables {
    fn owner(&self, service: &ObjectKey) -> Option<(&ObjectKey, &Arc<ElastiService>)> {
        self.by_service.get(service)?.iter().filter_map(|key| self.elastis.get_key_value(key)).min_by_key(
            |(_, elasti)| {
                let metadata = &elasti.metadata;
                (metadata.creation_timestamp.as_ref().map(|time| time.0), metadata.uid.clone())
            },
        )
    }

    /// Those that name the target of this ElastiService for another Service.
    fn shared_with(&self, key: &ObjectKey, elasti: &ElastiService) -> Vec<String> {
        let (_, target) = references(key, elasti);
        let elsewhere = |other: &&ObjectKey| {
            self.elastis.get(*other).is_some_and(|other| other.spec.service != elasti.spec.service)
        };
        let naming = self.by_target.get(&target).into_iter().flatten();
        naming.filter(elsewhere).map(|other| other.name.clone()).collect()
    }

    /// Whom an ElastiService names in `spec.wakeWith`.
    fn named_by(&self, key: &ObjectKey) -> Vec<ObjectKey> {
        self.elastis.get(key).map(|elasti| wake_with(key, elasti)).unwrap_or_default()
    }

    /// All whom a change of an ElastiService's `spec.wakeWith` may concern: whoever is woken with it, or it with them.
    fn wake_together(&self, key: &ObjectKey) -> Concerned {
        let mut concerned = partners::reached(key, |key| self.named_by(key));
        concerned
            .extend(partners::reached(key, |key| self.by_partner.get(key).into_iter().flatten().cloned().collect()));
        concerned
    }

    fn partners(&self, key: &ObjectKey, elasti: &ElastiService) -> PartnersObserved {
        let named = wake_with(key, elasti);
        if named.is_empty() {
            return PartnersObserved::default();
        }
        PartnersObserved {
            missing: named.into_iter().filter(|partner| !self.elastis.contains_key(partner)).collect(),
            cycle: partners::cycle(key, |key| self.named_by(key)),
        }
    }

    /// What is to be deleted where nothing is intercepted; until ours takes its place it leads to resolvers that still hold.
    fn left_behind(&self, key: &ObjectKey, elasti: &ElastiService) -> Option<ResolverSlice> {
        let intercepted = elasti.status.as_ref().and_then(|status| status.mode) != Some(Mode::Serve);
        if intercepted && elasti.metadata.deletion_timestamp.is_none() {
            return None;
        }
        let (service, name) = (&elasti.spec.service, names::resolver_slice(&elasti.spec.service, false));
        self.left_behind.contains(&ObjectKey::new(&key.namespace, &name)).then(|| ResolverSlice {
            name,
            service: service.clone(),
            ipv6: false,
            endpoints: Vec::new(),
            ports: Vec::new(),
        })
    }

    fn target(&self, elasti: &ElastiService) -> TargetState {
        let reference = &elasti.spec.scale_target_ref;
        let kind = Kind::of(reference);
        if let Some(why) = self.unread_kinds.get(&kind) {
            return TargetState::UnknownKind(why.clone());
        }
        let namespace = elasti.metadata.namespace.clone().unwrap_or_default();
        let key = (kind, ObjectKey::new(namespace, &reference.name));
        match (self.targets.get(&key), self.unread_targets.get(&key)) {
            (Some(target), _) => TargetState::Found(target.clone()),
            (None, Some(Some(why))) => TargetState::UnknownKind(why.clone()),
            (None, Some(None)) => TargetState::Unread,
            (None, None) => TargetState::Missing,
        }
    }

    /// How the API server calls a kind; `None` before it was discovered.
    fn resource(&self, kind: &Kind) -> Option<ApiResource> {
        kind.resource().or_else(|| self.resources.get(kind).cloned())
    }

    /// The target of an ElastiService, if it is of a kind that is not known beforehand.
    fn other_target(&self, key: &ObjectKey) -> Option<(Arc<OtherKind>, ObjectKey)> {
        match references(key, self.elastis.get(key)?).1 {
            (Kind::Other(kind), target) => Some((kind, target)),
            _ => None,
        }
    }

    fn autoscaler(&self, key: &ObjectKey, elasti: &ElastiService) -> AutoscalerState {
        let mut state = self.autoscalers.state(autoscalers::reference(key, elasti).as_ref());
        // Whoever has paused it is there no more: who names it now looks after it.
        if let AutoscalerState::Found(AutoscalerObserved { pause: Pause::Ours { by, .. }, .. }) = &mut state
            && !self.by_uid.contains_key(by)
        {
            *by = elasti.metadata.uid.clone().unwrap_or_default();
        }
        state
    }

    fn backends(&self, key: &ObjectKey, service: &ServiceObserved) -> BTreeMap<u16, Vec<SocketAddr>> {
        service
            .ports
            .iter()
            .map(|port| {
                let mut addresses: Vec<SocketAddr> =
                    self.foreign(key).flat_map(|backends| backends.of_port(&port.name)).collect();
                addresses.sort_unstable();
                addresses.dedup();
                (port.port, addresses)
            })
            .collect()
    }

    fn endpoints(&self, key: &ObjectKey, service: &ServiceObserved) -> Vec<PodEndpoint> {
        let of_port = |name| self.foreign(key).flat_map(move |backends| backends.pods(name));
        let mut pods: Vec<PodEndpoint> = service.ports.iter().flat_map(|port| of_port(port.name.as_str())).collect();
        // Of two slices that name one address, as during a change of them, the one that calls it ready.
        pods.sort_unstable_by(|one, other| one.address.cmp(&other.address).then(other.ready.cmp(&one.ready)));
        pods.dedup_by_key(|pod| pod.address);
        pods
    }

    fn draining(&self, key: &ObjectKey, service: &ServiceObserved) -> Vec<DrainingEndpoint> {
        let mut draining: Vec<DrainingEndpoint> = service
            .ports
            .iter()
            .flat_map(|port| {
                self.foreign(key).flat_map(|backends| backends.draining(&port.name)).map(|(address, pod)| {
                    let elsewhere = self.staying.contains_key(&address.ip());
                    DrainingEndpoint { port: port.port, address, pod: pod.to_owned(), elsewhere }
                })
            })
            .collect();
        draining.sort_unstable();
        draining.dedup();
        draining
    }

    /// A Service's slices that are not ours. Those under our names are resolvers', even if somebody else has made them.
    fn foreign(&self, key: &ObjectKey) -> impl Iterator<Item = &project::Backends> {
        let own = [false, true].map(|ipv6| names::resolver_slice(&key.name, ipv6));
        self.backends
            .get(key)
            .into_iter()
            .flatten()
            .filter(move |(name, _)| !own.contains(name))
            .map(|(_, backends)| backends)
    }

    fn count_staying(&mut self, backends: &project::Backends, by: i32) {
        for address in backends.staying() {
            let count = self.staying.entry(address).or_default();
            *count = count.saturating_add_signed(by);
            if *count == 0 {
                self.staying.remove(&address);
            }
        }
    }

    fn concerned_by_service(&self, key: &ObjectKey) -> Concerned {
        let mut concerned = self.by_service.get(key).cloned().unwrap_or_default();
        let owner = self.services.get(key).and_then(|service| service.owner_uid.as_ref());
        concerned.extend(owner.and_then(|uid| self.by_uid.get(uid)).cloned());
        concerned
    }

    fn remove_elasti(&mut self, key: &ObjectKey) -> Option<(Concerned, Option<String>)> {
        let together = self.wake_together(key);
        let elasti = self.elastis.remove(key)?;
        for partner in wake_with(key, &elasti) {
            unindex(&mut self.by_partner, &partner, key);
        }
        let (service, target) = references(key, &elasti);
        unindex(&mut self.by_service, &service, key);
        unindex(&mut self.by_target, &target, key);
        self.autoscalers.name(key.clone(), None);
        let uid = elasti.metadata.uid.clone();
        if let Some(uid) = &uid
            && self.by_uid.get(uid) == Some(key)
        {
            self.by_uid.remove(uid);
        }
        let mut concerned = self.by_service.get(&service).cloned().unwrap_or_default();
        concerned.extend(self.by_target.get(&target).into_iter().flatten().cloned());
        concerned.extend(together);
        Some((concerned, uid))
    }

    fn remove_service(&mut self, key: &ObjectKey) -> Concerned {
        let concerned = self.concerned_by_service(key);
        if let Some(uid) = self.services.remove(key).and_then(|service| service.owner_uid) {
            unindex(&mut self.private_by_uid, &uid, key);
        }
        concerned
    }

    fn remove_slice(&mut self, key: &ObjectKey) -> Concerned {
        if let Some((uid, _)) = self.own_slices.remove(key) {
            unindex(&mut self.own_slices_by_uid, &uid, key);
            return self.by_uid.get(&uid).cloned().into_iter().collect();
        }
        self.left_behind.remove(key);
        let mut concerned = Concerned::new();
        // A deletion may come without its labels, so the slice is looked for by name.
        let services: Vec<ObjectKey> = self
            .backends
            .iter()
            .filter(|(service, slices)| service.namespace == key.namespace && slices.contains_key(&key.name))
            .map(|(service, _)| service.clone())
            .collect();
        for service in services {
            let Some(slices) = self.backends.get_mut(&service) else { continue };
            let removed = slices.remove(&key.name);
            if slices.is_empty() {
                self.backends.remove(&service);
            }
            if let Some(removed) = removed {
                self.count_staying(&removed, -1);
            }
            concerned.extend(self.concerned_by_service(&service));
        }
        concerned
    }
}

#[cfg(test)]
mod tests;
