//! Addresses of pods that are about to end, and which of them are redirected too.
//!
//! Part of the decision: pure. Invariants: none while a pod of the target is ready or before the Service is intercepted, none
//! that an endpoint has which is not about to end, none of a node, and none for longer than [`DRAINING_LIFETIME`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use elasti_api::message::{DRAINING_LIFETIME, Mode};

use super::Planner;
use crate::observed::DrainingEndpoint;

/// How soon an address is looked at again that is redirected as soon as no other endpoint has it: the slices of the Services
/// of one pod follow each other within milliseconds, and not all of them concern the ElastiService.
pub(super) const ELSEWHERE_INTERVAL: Duration = Duration::from_millis(100);

/// When each pod, by UID, was first seen about to end at each of its addresses.
pub(super) type Since = BTreeMap<(String, IpAddr), Instant>;

impl<'a> Planner<'a> {
    /// Notes which pods are about to end; one whose containers have ended is forgotten.
    pub(super) fn remember_draining(&mut self) {
        let before = std::mem::take(&mut self.memory.draining);
        let draining = self.observed.draining.iter().map(|endpoint| {
            let key = (endpoint.pod.clone(), endpoint.address.ip());
            let since = before.get(&key).copied().unwrap_or(self.now.instant);
            (key, since)
        });
        self.memory.draining = draining.collect();
    }

    /// The addresses that are redirected.
    pub(super) fn draining(&mut self) -> Vec<&'a DrainingEndpoint> {
        let observed = self.observed;
        let pod_network = observed.target.found().is_some_and(|target| target.pod_network);
        if self.status().mode != Some(Mode::Proxy) || observed.target_ready() || !pod_network {
            return Vec::new();
        }
        let mut redirected = Vec::new();
        for endpoint in &observed.draining {
            let ip = endpoint.address.ip();
            let age = self.age(self.memory.draining.get(&(endpoint.pod.clone(), ip)).copied()).unwrap_or_default();
            if age >= DRAINING_LIFETIME {
                continue;
            }
            self.check_after(DRAINING_LIFETIME.saturating_sub(age));
            if endpoint.elsewhere || observed.resolvers.iter().any(|resolver| resolver.identity.addresses.contains(&ip))
            {
                self.check_after(ELSEWHERE_INTERVAL);
            } else {
                redirected.push(endpoint);
            }
        }
        redirected
    }
}

/// Those of one Service port.
pub(super) fn of_port(draining: &[&DrainingEndpoint], port: u16) -> Vec<SocketAddr> {
    draining.iter().filter(|endpoint| endpoint.port == port).map(|endpoint| endpoint.address).collect()
}

/// UIDs of their pods.
pub(super) fn pods(draining: &[&DrainingEndpoint]) -> Vec<String> {
    let pods: BTreeSet<&str> = draining.iter().map(|endpoint| endpoint.pod.as_str()).collect();
    pods.into_iter().map(str::to_owned).collect()
}
