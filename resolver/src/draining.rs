//! Addresses of pods that are about to end: which of them this resolver redirects, and until when.
//!
//! Pure: states and the time in, entries out. The operators say which addresses; the clock here is the resolver's own, so
//! that an operator that falls silent leaves no entry behind. Used by [`crate::supervisor`].

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use elasti_api::message::{DRAINING_LIFETIME, Mode, ServiceState};

use crate::interception::Entries;

/// What is redirected of pods that are about to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draining {
    /// From their addresses to this resolver.
    pub entries: Entries,
    /// UIDs of the pods, whose own connections are not redirected to these.
    pub pods: BTreeSet<String>,
}

/// Since when each address has been named, by the UID of the ElastiService. One that is named no more is forgotten.
#[derive(Debug, Default)]
pub struct Named(HashMap<(String, SocketAddr), Instant>);

impl Named {
    /// What is redirected now, to the addresses of this `pod`: what `states` name, for as long as they do and no longer than
    /// [`DRAINING_LIFETIME`], unless one of them has it as the address of a ready pod.
    pub fn current(&mut self, states: &[&ServiceState], pod: &[IpAddr], now: Instant) -> Draining {
        let named: HashMap<(String, SocketAddr), Instant> = states
            .iter()
            .flat_map(|state| state.ports.iter().flat_map(|port| &port.draining).map(|at| (state.uid.clone(), *at)))
            .map(|key| {
                let since = self.0.get(&key).copied().unwrap_or(now);
                (key, since)
            })
            .collect();
        self.0 = named;
        let mut draining = Draining::default();
        if self.0.is_empty() {
            return draining;
        }
        let ready: HashSet<IpAddr> = states
            .iter()
            .flat_map(|state| state.ports.iter().flat_map(|port| &port.backends).map(SocketAddr::ip))
            .collect();
        for state in states.iter().filter(|state| state.mode == Mode::Proxy && state.redirect) {
            for port in &state.ports {
                for address in &port.draining {
                    let since = self.0.get(&(state.uid.clone(), *address)).copied().unwrap_or(now);
                    let own = pod.iter().find(|own| own.is_ipv4() == address.is_ipv4());
                    if let Some(own) = own
                        && now.saturating_duration_since(since) < DRAINING_LIFETIME
                        && !ready.contains(&address.ip())
                    {
                        draining.entries.insert(*address, SocketAddr::new(*own, port.interception_port));
                        draining.pods.extend(state.draining_pods.iter().cloned());
                    }
                }
            }
        }
        draining
    }

    /// When the next address has been redirected for long enough; `None` when none is.
    pub fn next_end(&self, now: Instant) -> Option<Instant> {
        self.0.values().map(|since| *since + DRAINING_LIFETIME).filter(|end| *end > now).min()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::service_state;

    fn state(uid: &str, draining: &str) -> ServiceState {
        let mut state = service_state(uid, 1, 20_000);
        state.ports[0].draining = vec![draining.parse().unwrap()];
        state.draining_pods = vec![format!("pod-of-{uid}")];
        state
    }

    fn pod() -> Vec<IpAddr> {
        vec!["10.244.0.3".parse().unwrap()]
    }

    #[test]
    fn an_address_leads_here_for_three_seconds_however_long_it_is_named() {
        let (state, now) = (state("a", "10.244.1.9:8080"), Instant::now());
        let mut named = Named::default();
        let draining = named.current(&[&state], &pod(), now);
        assert_eq!(
            draining.entries,
            [("10.244.1.9:8080", "10.244.0.3:20000")]
                .map(|(from, to)| { (from.parse().unwrap(), to.parse().unwrap()) })
                .into()
        );
        assert_eq!(draining.pods, ["pod-of-a".to_owned()].into());
        assert_eq!(named.next_end(now), Some(now + DRAINING_LIFETIME));
        assert_eq!(named.current(&[&state], &pod(), now + Duration::from_millis(2999)), draining);
        for later in [DRAINING_LIFETIME, Duration::from_mins(1)] {
            assert_eq!(named.current(&[&state], &pod(), now + later), Draining::default());
            assert_eq!(named.next_end(now + later), None);
        }
    }

    #[test]
    fn an_address_that_is_named_no_more_goes_and_begins_anew_when_it_is_named_again() {
        let (with, now) = (state("a", "10.244.1.9:8080"), Instant::now());
        let without = service_state("a", 1, 20_000);
        let mut named = Named::default();
        named.current(&[&with], &pod(), now);
        assert!(named.current(&[&without], &pod(), now).entries.is_empty());
        assert_eq!(named.current(&[&with], &pod(), now + Duration::from_mins(1)).entries.len(), 1);
    }

    #[test]
    fn an_address_of_a_ready_pod_or_of_a_service_that_is_not_intercepted_is_left_alone() {
        let draining = state("a", "10.244.1.9:8080");
        let mut other = service_state("b", 1, 20_001);
        other.ports[0].backends = vec!["10.244.1.9:9090".parse().unwrap()];
        let mut named = Named::default();
        assert!(named.current(&[&draining, &other], &pod(), Instant::now()).entries.is_empty());
        let serving = ServiceState { mode: Mode::Serve, ..draining.clone() };
        assert!(named.current(&[&serving], &pod(), Instant::now()).entries.is_empty());
        let six = state("a", "[fd00::9]:8080");
        assert!(named.current(&[&six], &pod(), Instant::now()).entries.is_empty(), "no address of the family");
    }
}
