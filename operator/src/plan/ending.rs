//! Ready endpoints that are not believed: those of pods that have been told to end, which the EndpointSlices do not say yet.
//!
//! Part of the decision: pure. A target with `spec.replicas` 0 shall have no pod, so an endpoint that is ready then belongs to
//! one that ends within milliseconds, and a connection that was forwarded to it would end with it. It stays disbelieved
//! when the target is woken meanwhile. An endpoint that is there for longer is not the target's: the Service has other pods.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::observed::Observed;

/// How long a ready endpoint of a target at zero is not believed: pods are deleted and slices follow within a second, also on
/// a busy control plane.
pub(super) const DISBELIEF: Duration = Duration::from_secs(3);

/// When each disbelieved endpoint was first seen at zero.
pub(super) type Since = BTreeMap<SocketAddr, Instant>;

/// Notes which endpoints are there while there should be none, and forgets those that have gone.
pub(super) fn note(since: &mut Since, observed: &Observed<'_>, now: Instant) {
    let mut ready = observed.backends.values().flatten();
    if observed.target.found().is_some_and(|target| target.spec_replicas == 0) {
        for address in ready.by_ref() {
            since.entry(*address).or_insert(now);
        }
    }
    since.retain(|address, _| observed.backends.values().flatten().any(|ready| ready == address));
}

/// What is observed without the endpoints that are not believed, and for how long at the least; `None` if all are.
pub(super) fn disbelieve<'a>(since: &Since, observed: &Observed<'a>, now: Instant) -> Option<(Observed<'a>, Duration)> {
    let age = |address: &SocketAddr| since.get(address).map(|since| now.saturating_duration_since(*since));
    let disbelieved = |address: &SocketAddr| age(address).filter(|age| *age < DISBELIEF);
    let oldest = observed.backends.values().flatten().filter_map(disbelieved).max()?;
    let mut observed = observed.clone();
    for backends in observed.backends.values_mut() {
        backends.retain(|address| disbelieved(address).is_none());
    }
    Some((observed, DISBELIEF.saturating_sub(oldest)))
}
