//! Which addresses are redirected to this resolver, and whether they are. What redirects is behind [`Redirect`], so
//! that the resolver works without it too: EndpointSlices then bring all connections.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use elasti_api::message::{Mode, ServiceState};

use crate::draining::Draining;
use crate::metrics::{Metrics, Repair};

/// From what clients dial to where they are sent.
pub type Entries = HashMap<SocketAddr, SocketAddr>;

/// What is another than before: where connections to an address are sent from now on, `None` if they are left alone.
pub type Changes = BTreeMap<SocketAddr, Option<SocketAddr>>;

/// Redirects connections on this node until it is dropped.
pub trait Redirect: Send {
    /// Makes these changes of what was redirected before, at a cost that does not depend on how much that was. After an error
    /// some may have been made.
    fn change(&mut self, changes: &Changes) -> Result<(), String>;

    /// Redirects these and no others, whatever was redirected before. Returns whether anything had to be changed for
    /// that; the error says what failed.
    fn sync(&mut self, entries: &Entries) -> Result<bool, String>;

    /// Attaches anew what somebody else has detached; cheap when nothing was. Returns whether anything was; the error
    /// says why nothing is redirected now.
    fn reattach(&mut self) -> Result<bool, String>;

    /// Connections that would have been redirected so far, but were left alone because this process was stuck. Never falls.
    fn passed(&self) -> u64;

    /// The same as [`Redirect::sync`] for addresses of pods that are about to end. These are redirected for callers in pods only, so
    /// that kubelet's probes are left alone, and not for the pods that are about to end.
    fn sync_draining(&mut self, draining: &Draining) -> Result<(), String>;
}

/// What one ElastiService wants redirected: its cluster IPs, each to this pod's address of the same family. Empty unless
/// it is intercepted and the operator says that it is time.
pub fn wanted(state: &ServiceState, pod: &[IpAddr]) -> Entries {
    if state.mode != Mode::Proxy || !state.redirect {
        return Entries::new();
    }
    let pairs = state.cluster_ips.iter().filter_map(|cluster_ip| {
        let own = pod.iter().find(|own| own.is_ipv4() == cluster_ip.is_ipv4())?;
        Some((*cluster_ip, *own))
    });
    pairs
        .flat_map(|(cluster_ip, own)| {
            state
                .ports
                .iter()
                .map(move |port| (SocketAddr::new(cluster_ip, port.port), SocketAddr::new(own, port.interception_port)))
        })
        .collect()
}

/// What is redirected now.
pub struct Interception {
    redirect: Option<Box<dyn Redirect>>,
    /// What shall be redirected, and is unless there is an error.
    entries: Entries,
    error: Option<String>,
    draining: Draining,
    draining_failed: bool,
    detached: Option<String>,
    metrics: Metrics,
}

impl Interception {
    /// Nothing is redirected yet; `None` when nothing ever can be.
    pub fn new(redirect: Option<Box<dyn Redirect>>, metrics: Metrics) -> Self {
        metrics.redirect_enabled.set(redirect.is_some().into());
        Self {
            redirect,
            entries: Entries::new(),
            error: None,
            detached: None,
            draining: Draining::default(),
            draining_failed: false,
            metrics,
        }
    }

    /// Whether anything can be redirected.
    pub fn redirects(&self) -> bool {
        self.redirect.is_some()
    }

    /// Redirects otherwise than before, as `changes` say. With `repair`, and after an error, the whole map is compared, even if it
    /// should be right already. Returns whether it failed and did not before, or the other way round: what else is redirected
    /// is another then, too.
    pub fn update(&mut self, changes: &Changes, repair: bool) -> bool {
        let Some(redirect) = &mut self.redirect else { return false };
        if changes.is_empty() && !repair && self.error.is_none() {
            return false;
        }
        for (from, to) in changes {
            match to {
                Some(to) => self.entries.insert(*from, *to),
                None => self.entries.remove(from),
            };
        }
        let whole = repair || self.error.is_some();
        let result = if whole { redirect.sync(&self.entries) } else { redirect.change(changes).map(|()| false) };
        let was = self.error.take();
        match result {
            Ok(true) if was.is_none() && changes.is_empty() => {
                tracing::warn!("the map of redirected addresses was changed by somebody else, and is repaired");
                self.metrics.repairs(Repair::Map).inc();
            }
            Ok(_) => {}
            Err(error) => {
                if was.as_ref() != Some(&error) {
                    tracing::error!(error, "cannot redirect connections; EndpointSlices still bring them");
                }
                self.error = Some(error);
            }
        }
        let redirected = if self.error.is_some() { 0 } else { self.entries.len() };
        self.metrics.redirect_entries.set(i64::try_from(redirected).unwrap_or(i64::MAX));
        self.error != was
    }

    /// Redirects the addresses of these ending pods and of no others. Nothing depends on it but clients with an outdated list
    /// of endpoints, so a failure is no state that anybody is told of; it is tried again when something changes.
    pub fn set_draining(&mut self, draining: Draining, repair: bool) {
        let Some(redirect) = &mut self.redirect else { return };
        if !repair && !self.draining_failed && draining == self.draining {
            return;
        }
        let result = redirect.sync_draining(&draining);
        if let Err(error) = &result
            && !self.draining_failed
        {
            tracing::warn!(error, "cannot redirect the addresses of ending pods");
        }
        self.draining_failed = result.is_err();
        self.draining = draining;
    }

    /// Sees to it that the programs are still attached, and counts what passed them. Returns whether anything is another way than
    /// before.
    pub fn check(&mut self) -> bool {
        let Some(redirect) = &mut self.redirect else { return false };
        let counted = &self.metrics.redirect_passed;
        let passed = redirect.passed().saturating_sub(counted.get());
        if passed > 0 {
            tracing::warn!(passed, "connections passed that should have been redirected: the resolver was stuck");
            counted.inc_by(passed);
        }
        let was = self.detached.take();
        match redirect.reattach() {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!("the eBPF programs were detached by somebody else, and are attached again");
                self.metrics.repairs(Repair::Programs).inc();
            }
            Err(error) => {
                if was.as_ref() != Some(&error) {
                    tracing::error!(
                        error,
                        "the eBPF programs were detached; EndpointSlices bring connections meanwhile"
                    );
                }
                self.detached = Some(error);
            }
        }
        self.metrics.redirect_enabled.set(self.detached.is_none().into());
        self.detached != was
    }

    /// Whether all of `wanted` is redirected; not when nothing is wanted.
    pub fn covers(&self, wanted: &Entries) -> bool {
        !wanted.is_empty()
            && self.redirect.is_some()
            && self.detached.is_none()
            && self.error.is_none()
            && wanted.iter().all(|(from, to)| self.entries.get(from) == Some(to))
    }

    /// Why connections are not redirected, if they should be.
    pub fn error(&self) -> Option<&str> {
        self.detached.as_deref().or(self.error.as_deref())
    }

    /// Redirects nothing from now on, for good.
    pub fn stop(&mut self) {
        let nothing = self.entries.keys().map(|from| (*from, None)).collect();
        self.update(&nothing, true);
        self.set_draining(Draining::default(), true);
        self.redirect = None;
        self.metrics.redirect_enabled.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::service_state;
    use prometheus::Registry;
    use std::sync::{Arc, Mutex};

    #[derive(Default, Clone)]
    struct Fake(Arc<Mutex<(u32, bool, u64)>>);

    impl Redirect for Fake {
        fn change(&mut self, _changes: &Changes) -> Result<(), String> {
            self.sync(&Entries::new()).map(drop)
        }

        fn sync(&mut self, _entries: &Entries) -> Result<bool, String> {
            let mut fake = self.0.lock().unwrap();
            fake.0 += 1;
            if fake.1 { Err("full".into()) } else { Ok(true) }
        }

        fn reattach(&mut self) -> Result<bool, String> {
            if self.0.lock().unwrap().1 { Err("no such cgroup".into()) } else { Ok(false) }
        }

        fn passed(&self) -> u64 {
            self.0.lock().unwrap().2
        }

        fn sync_draining(&mut self, _draining: &Draining) -> Result<(), String> {
            self.sync(&Entries::new()).map(drop)
        }
    }

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    fn entries() -> Entries {
        wanted(&service_state("a", 1, 20_000), &addresses(&["10.244.0.3"]))
    }

    fn changes() -> Changes {
        entries().into_iter().map(|(from, to)| (from, Some(to))).collect()
    }

    /// Keeps out B33: IPv4 alone.
    #[test]
    fn cluster_ips_lead_to_the_pod_address_of_their_family() {
        let mut state = service_state("a", 1, 20_000);
        state.cluster_ips = addresses(&["10.96.0.1", "fd00::1"]);
        let dual = wanted(&state, &addresses(&["10.244.0.3", "fd01::3"]));
        assert_eq!(dual.len(), 2);
        assert_eq!(dual[&"[fd00::1]:80".parse().unwrap()], "[fd01::3]:20000".parse().unwrap());
        assert_eq!(wanted(&state, &addresses(&["10.244.0.3"])).len(), 1, "no address of the family: left alone");
    }

    #[test]
    fn only_intercepted_services_are_redirected_and_only_when_it_is_time() {
        let pod = addresses(&["10.244.0.3"]);
        let serving = ServiceState { mode: Mode::Serve, ..service_state("a", 1, 20_000) };
        assert!(wanted(&serving, &pod).is_empty());
        let early = ServiceState { redirect: false, ..service_state("a", 1, 20_000) };
        assert!(wanted(&early, &pod).is_empty());
    }

    #[test]
    fn the_map_is_written_when_it_changes_or_for_repair() {
        let fake = Fake::default();
        let mut interception = Interception::new(Some(Box::new(fake.clone())), Metrics::new(&Registry::new()).unwrap());
        interception.update(&changes(), false);
        interception.update(&Changes::new(), false);
        assert_eq!(fake.0.lock().unwrap().0, 1);
        interception.update(&Changes::new(), true);
        assert_eq!(fake.0.lock().unwrap().0, 2);
        assert!(interception.covers(&entries()));
        interception.stop();
        assert!(!interception.covers(&entries()));
    }

    #[test]
    fn ending_pods_are_written_when_they_change_and_again_after_a_failure() {
        let fake = Fake::default();
        let mut interception = Interception::new(Some(Box::new(fake.clone())), Metrics::new(&Registry::new()).unwrap());
        let draining = Draining { entries: entries(), ..Draining::default() };
        interception.set_draining(Draining::default(), false);
        assert_eq!(fake.0.lock().unwrap().0, 0, "as before");
        fake.0.lock().unwrap().1 = true;
        interception.set_draining(draining.clone(), false);
        fake.0.lock().unwrap().1 = false;
        interception.set_draining(draining.clone(), false);
        interception.set_draining(draining, false);
        assert_eq!(fake.0.lock().unwrap().0, 2);
        assert!(!interception.covers(&entries()), "nobody waits for these");
    }

    #[test]
    fn nothing_is_redirected_while_programs_cannot_be_attached() {
        let fake = Fake::default();
        let mut interception = Interception::new(Some(Box::new(fake.clone())), Metrics::new(&Registry::new()).unwrap());
        interception.update(&changes(), false);
        assert!(!interception.check());
        fake.0.lock().unwrap().1 = true;
        assert!(interception.check(), "news");
        assert!(!interception.check(), "no news");
        assert_eq!((interception.error(), interception.covers(&entries())), (Some("no such cgroup"), false));
        fake.0.lock().unwrap().1 = false;
        assert!(interception.check(), "news again");
        assert_eq!((interception.error(), interception.covers(&entries())), (None, true));
    }

    #[test]
    fn connections_that_passed_a_stuck_resolver_are_counted_once() {
        let (fake, metrics) = (Fake::default(), Metrics::new(&Registry::new()).unwrap());
        let mut interception = Interception::new(Some(Box::new(fake.clone())), metrics.clone());
        for passed in [0, 3, 3, 5] {
            fake.0.lock().unwrap().2 = passed;
            assert!(!interception.check(), "no news for operators");
            assert_eq!(metrics.redirect_passed.get(), passed);
        }
    }

    #[test]
    fn a_failed_write_is_told_and_tried_again() {
        let fake = Fake::default();
        fake.0.lock().unwrap().1 = true;
        let mut interception = Interception::new(Some(Box::new(fake.clone())), Metrics::new(&Registry::new()).unwrap());
        assert!(interception.update(&changes(), false), "all are redirected no more");
        assert!(!interception.update(&Changes::new(), false), "as before");
        assert_eq!(interception.error(), Some("full"));
        assert!(!interception.covers(&entries()));
        fake.0.lock().unwrap().1 = false;
        assert!(interception.update(&Changes::new(), false), "all are redirected again");
        assert_eq!((interception.error(), interception.covers(&entries())), (None, true));
    }
}
