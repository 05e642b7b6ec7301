//! Addresses of pods that are about to end: which of them this resolver redirects, and until when.
//!
//! Pure: states and the time in, entries out. The operators say which addresses; the clock here is the resolver's own, so
//! that an operator that falls silent leaves no entry behind. Used by [`crate::supervisor`].

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
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
pub struct Named {
    since: HashMap<(String, SocketAddr), Instant>,
    /// The states that name any, by UID: they are few, however many ElastiServices there are.
    naming: BTreeMap<String, Arc<ServiceState>>,
    /// How many backends, of whatever ElastiService, have an address.
    ready: HashMap<IpAddr, usize>,
}

impl Named {
    /// The state of an ElastiService is another: what it was, if it counted, and what it is, if it counts from `now` on.
    pub fn replace(&mut self, was: Option<&ServiceState>, is: Option<&Arc<ServiceState>>, now: Instant) {
        for ip in was.into_iter().flat_map(backends) {
            if let Entry::Occupied(mut count) = self.ready.entry(ip) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        for ip in is.into_iter().flat_map(|state| backends(state)) {
            *self.ready.entry(ip).or_default() += 1;
        }
        let mut before = HashMap::new();
        if let Some(state) = was {
            self.naming.remove(&state.uid);
            let keys = draining(state).map(|address| (state.uid.clone(), address));
            before.extend(keys.filter_map(|key| self.since.remove_entry(&key)));
        }
        if let Some(state) = is.filter(|state| draining(state).next().is_some()) {
            for key in draining(state).map(|address| (state.uid.clone(), address)) {
                let since = before.get(&key).copied().unwrap_or(now);
                self.since.insert(key, since);
            }
            self.naming.insert(state.uid.clone(), Arc::clone(state));
        }
    }

    /// What is redirected now, to the addresses of this `pod`: what states name, for as long as they do and no longer than
    /// [`DRAINING_LIFETIME`], unless one of them has it as the address of a ready pod.
    pub fn current(&self, pod: &[IpAddr], now: Instant) -> Draining {
        let mut redirected = Draining::default();
        for state in self.naming.values().filter(|state| state.mode == Mode::Proxy && state.redirect) {
            for port in &state.ports {
                for address in &port.draining {
                    let since = self.since.get(&(state.uid.clone(), *address)).copied().unwrap_or(now);
                    let own = pod.iter().find(|own| own.is_ipv4() == address.is_ipv4());
                    if let Some(own) = own
                        && now.saturating_duration_since(since) < DRAINING_LIFETIME
                        && !self.ready.contains_key(&address.ip())
                    {
                        redirected.entries.insert(*address, SocketAddr::new(*own, port.interception_port));
                        redirected.pods.extend(state.draining_pods.iter().cloned());
                    }
                }
            }
        }
        redirected
    }

    /// When the next address has been redirected for long enough; `None` when none is.
    pub fn next_end(&self, now: Instant) -> Option<Instant> {
        self.since.values().map(|since| *since + DRAINING_LIFETIME).filter(|end| *end > now).min()
    }
}

fn backends(state: &ServiceState) -> impl Iterator<Item = IpAddr> {
    state.ports.iter().flat_map(|port| &port.backends).map(SocketAddr::ip)
}

fn draining(state: &ServiceState) -> impl Iterator<Item = SocketAddr> {
    state.ports.iter().flat_map(|port| &port.draining).copied()
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

    /// Whoever names addresses, and what they say at the moment.
    #[derive(Default)]
    struct World(Named, Vec<Arc<ServiceState>>);

    impl World {
        fn current(&mut self, states: &[&ServiceState], now: Instant) -> Draining {
            let mut before = std::mem::take(&mut self.1);
            self.1 = states.iter().map(|state| Arc::new((*state).clone())).collect();
            for state in &self.1 {
                let was = before.iter().position(|was| was.uid == state.uid).map(|at| before.swap_remove(at));
                self.0.replace(was.as_deref(), Some(state), now);
            }
            for gone in before {
                self.0.replace(Some(&gone), None, now);
            }
            self.0.current(&pod(), now)
        }
    }

    fn pod() -> Vec<IpAddr> {
        vec!["10.244.0.3".parse().unwrap()]
    }

    #[test]
    fn an_address_leads_here_for_three_seconds_however_long_it_is_named() {
        let (state, now) = (state("a", "10.244.1.9:8080"), Instant::now());
        let mut named = World::default();
        let draining = named.current(&[&state], now);
        assert_eq!(
            draining.entries,
            [("10.244.1.9:8080", "10.244.0.3:20000")]
                .map(|(from, to)| { (from.parse().unwrap(), to.parse().unwrap()) })
                .into()
        );
        assert_eq!(draining.pods, ["pod-of-a".to_owned()].into());
        assert_eq!(named.0.next_end(now), Some(now + DRAINING_LIFETIME));
        assert_eq!(named.current(&[&state], now + Duration::from_millis(2999)), draining);
        for later in [DRAINING_LIFETIME, Duration::from_mins(1)] {
            assert_eq!(named.current(&[&state], now + later), Draining::default());
            assert_eq!(named.0.next_end(now + later), None);
        }
    }

    #[test]
    fn an_address_that_is_named_no_more_goes_and_begins_anew_when_it_is_named_again() {
        let (with, now) = (state("a", "10.244.1.9:8080"), Instant::now());
        let without = service_state("a", 1, 20_000);
        let mut named = World::default();
        named.current(&[&with], now);
        assert!(named.current(&[&without], now).entries.is_empty());
        assert_eq!(named.current(&[&with], now + Duration::from_mins(1)).entries.len(), 1);
    }

    #[test]
    fn an_address_of_a_ready_pod_or_of_a_service_that_is_not_intercepted_is_left_alone() {
        let draining = state("a", "10.244.1.9:8080");
        let mut other = service_state("b", 1, 20_001);
        other.ports[0].backends = vec!["10.244.1.9:9090".parse().unwrap()];
        let mut named = World::default();
        assert!(named.current(&[&draining, &other], Instant::now()).entries.is_empty());
        let serving = ServiceState { mode: Mode::Serve, ..draining.clone() };
        assert!(named.current(&[&serving], Instant::now()).entries.is_empty());
        let six = state("a", "[fd00::9]:8080");
        assert!(named.current(&[&six], Instant::now()).entries.is_empty(), "no address of the family");
    }

    #[test]
    fn nothing_is_kept_of_those_that_are_gone() {
        let mut with = state("a", "10.244.1.9:8080");
        with.ports[0].backends = vec!["10.244.1.10:8080".parse().unwrap(); 2];
        let mut named = World::default();
        named.current(&[&with, &state("b", "10.244.1.9:8080")], Instant::now());
        named.current(&[], Instant::now());
        let Named { since, naming, ready } = named.0;
        assert!(since.is_empty() && naming.is_empty() && ready.is_empty());
    }
}
