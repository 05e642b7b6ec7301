//! Which addresses are redirected to this resolver, and whether they are. What redirects is behind [`Redirect`], so
//! that the resolver works without it too: EndpointSlices then bring all connections.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use elasti_api::message::{Mode, ServiceState};

use crate::draining::Draining;
use crate::metrics::Metrics;

/// From what clients dial to where they are sent.
pub type Entries = HashMap<SocketAddr, SocketAddr>;

/// Redirects connections on this node until it is dropped.
pub trait Redirect: Send {
    /// Redirects these and no others, whatever was redirected before. Returns whether anything had to be changed for
    /// that; the error says what failed.
    fn sync(&mut self, entries: &Entries) -> Result<bool, String>;

    /// Attaches anew what somebody else has detached; cheap when nothing was. Returns whether anything was; the error
    /// says why nothing is redirected now.
    fn reattach(&mut self) -> Result<bool, String>;

    /// The same for addresses of pods that are about to end. These are redirected for callers in pods only, so that kubelet's
    /// probes are left alone, and not for the pods that are about to end.
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
    applied: Entries,
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
            applied: Entries::new(),
            error: None,
            detached: None,
            draining: Draining::default(),
            draining_failed: false,
            metrics,
        }
    }

    /// Redirects these and no others. With `repair` the map is written even if it should hold them already.
    pub fn set(&mut self, entries: Entries, repair: bool) {
        let Some(redirect) = &mut self.redirect else { return };
        if !repair && self.error.is_none() && entries == self.applied {
            return;
        }
        match redirect.sync(&entries) {
            Ok(changed) => {
                if changed && self.error.is_none() && entries == self.applied {
                    tracing::warn!("the map of redirected addresses was changed by somebody else, and is repaired");
                    self.metrics.repairs("map").inc();
                }
                self.applied = entries;
                self.error = None;
            }
            Err(error) => {
                if self.error.as_ref() != Some(&error) {
                    tracing::error!(error, "cannot redirect connections; EndpointSlices still bring them");
                }
                self.applied.clear();
                self.error = Some(error);
            }
        }
        self.metrics.redirect_entries.set(i64::try_from(self.applied.len()).unwrap_or(i64::MAX));
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

    /// Sees to it that the programs are still attached. Returns whether anything is another way than before.
    pub fn check(&mut self) -> bool {
        let Some(redirect) = &mut self.redirect else { return false };
        let was = self.detached.take();
        match redirect.reattach() {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!("the eBPF programs were detached by somebody else, and are attached again");
                self.metrics.repairs("programs").inc();
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
            && self.detached.is_none()
            && wanted.iter().all(|(from, to)| self.applied.get(from) == Some(to))
    }

    /// Why connections are not redirected, if they should be.
    pub fn error(&self) -> Option<&str> {
        self.detached.as_deref().or(self.error.as_deref())
    }

    /// Redirects nothing from now on, for good.
    pub fn stop(&mut self) {
        self.set(Entries::new(), true);
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
    struct Fake(Arc<Mutex<(u32, bool)>>);

    impl Redirect for Fake {
        fn sync(&mut self, _entries: &Entries) -> Result<bool, String> {
            let mut fake = self.0.lock().unwrap();
            fake.0 += 1;
            if fake.1 { Err("full".into()) } else { Ok(true) }
        }

        fn reattach(&mut self) -> Result<bool, String> {
            if self.0.lock().unwrap().1 { Err("no such cgroup".into()) } else { Ok(false) }
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
        interception.set(entries(), false);
        interception.set(entries(), false);
        assert_eq!(fake.0.lock().unwrap().0, 1);
        interception.set(entries(), true);
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
        interception.set(entries(), false);
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
    fn a_failed_write_is_told_and_tried_again() {
        let fake = Fake::default();
        fake.0.lock().unwrap().1 = true;
        let mut interception = Interception::new(Some(Box::new(fake.clone())), Metrics::new(&Registry::new()).unwrap());
        interception.set(entries(), false);
        assert_eq!(interception.error(), Some("full"));
        assert!(!interception.covers(&entries()));
        fake.0.lock().unwrap().1 = false;
        interception.set(entries(), false);
        assert_eq!((interception.error(), interception.covers(&entries())), (None, true));
    }
}
