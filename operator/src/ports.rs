//! Interception ports: which port of the resolvers stands for which port of which Service.
//!
//! A port belongs to one ElastiService in the whole cluster and rests before another gets it, so that a connection
//! that comes late, over a kube-proxy rule of the former owner, is never taken for the new owner's. Only the Lease
//! holder allocates, after it has read all statuses uncached.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use elasti_api::names::{INTERCEPTION_PORT_MAX, INTERCEPTION_PORT_MIN};

/// How long a port rests after its owner is gone: far longer than any kube-proxy lags behind.
const REST: Duration = Duration::from_mins(10);

/// The ports in use and at rest.
#[derive(Debug, Default)]
pub struct Ports {
    owners: HashMap<u16, Owner>,
}

#[derive(Debug)]
struct Owner {
    uid: String,
    /// The port of the Service that it stands for.
    service_port: u16,
    released: Option<Instant>,
}

/// Every port of the range is in use or at rest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "all {} interception ports are in use or at rest; delete ElastiServices that are not needed",
    INTERCEPTION_PORT_MAX - INTERCEPTION_PORT_MIN + 1
)]
pub struct Exhausted;

impl Ports {
    /// Notes that `uid` has `port` for its `service_port`, as its status says.
    pub fn claim(&mut self, port: u16, uid: &str, service_port: u16) {
        self.owners.insert(port, Owner { uid: uid.to_owned(), service_port, released: None });
    }

    /// Lets the ports of all rest that are none of `uids`.
    pub fn release_others(&mut self, uids: &HashSet<String>, now: Instant) {
        for owner in self.owners.values_mut().filter(|owner| !uids.contains(&owner.uid)) {
            owner.released.get_or_insert(now);
        }
    }

    /// Lets all ports of `uid` rest, except `kept`.
    pub fn release(&mut self, uid: &str, kept: &[u16], now: Instant) {
        for (port, owner) in &mut self.owners {
            if owner.uid == uid && !kept.contains(port) && owner.released.is_none() {
                owner.released = Some(now);
            }
        }
    }

    /// A port for `service_port` of `uid`: the one that it was given before, in use or at rest, so that a status that was not written, or
    /// was lost, is as it should have been; else a new one.
    pub fn allocate(&mut self, uid: &str, service_port: u16, now: Instant) -> Result<u16, Exhausted> {
        self.owners.retain(|_, owner| owner.released.is_none_or(|at| now.saturating_duration_since(at) < REST));
        let own = |owner: &Owner| owner.uid == uid && owner.service_port == service_port;
        if let Some((port, owner)) = self.owners.iter_mut().find(|(_, owner)| own(owner)) {
            owner.released = None;
            return Ok(*port);
        }
        let mut hasher = DefaultHasher::new();
        (uid, service_port).hash(&mut hasher);
        let range = u64::from(INTERCEPTION_PORT_MAX - INTERCEPTION_PORT_MIN) + 1;
        // The remainder is below the range's length, which fits a port number.
        let start = u16::try_from(hasher.finish() % range).unwrap_or_default();
        let candidates = (INTERCEPTION_PORT_MIN + start..=INTERCEPTION_PORT_MAX)
            .chain(INTERCEPTION_PORT_MIN..INTERCEPTION_PORT_MIN + start);
        for port in candidates {
            if !self.owners.contains_key(&port) {
                self.claim(port, uid, service_port);
                return Ok(port);
            }
        }
        Err(Exhausted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_services_never_share_a_port() {
        let (mut ports, now) = (Ports::default(), Instant::now());
        let mut seen = std::collections::HashSet::new();
        for number in 0..1000 {
            let port = ports.allocate(&format!("uid-{number}"), 80, now).unwrap();
            assert!((INTERCEPTION_PORT_MIN..=INTERCEPTION_PORT_MAX).contains(&port));
            assert!(seen.insert(port), "port {port} was given twice");
        }
    }

    #[test]
    fn a_released_port_rests() {
        let (mut ports, now) = (Ports::default(), Instant::now());
        let port = ports.allocate("a", 80, now).unwrap();
        for taken in (INTERCEPTION_PORT_MIN..=INTERCEPTION_PORT_MAX).filter(|other| *other != port) {
            ports.claim(taken, "other", 80);
        }
        ports.release("a", &[], now);
        assert_eq!(ports.allocate("b", 80, now + REST / 2), Err(Exhausted));
        assert_eq!(ports.allocate("b", 80, now + REST), Ok(port), "and is free again afterwards");
    }

    /// A bug once: while statuses could not be written, every attempt took one more port.
    #[test]
    fn whoever_asks_again_gets_the_port_that_he_was_given() {
        let (mut ports, now) = (Ports::default(), Instant::now());
        let port = ports.allocate("a", 80, now);
        assert_eq!(ports.allocate("a", 80, now), port);
        ports.release("a", &[], now);
        assert_eq!(ports.allocate("a", 80, now + REST / 2), port, "his own rest hinders him not");
        assert_ne!(ports.allocate("a", 81, now), port);
    }

    #[test]
    fn ports_of_those_who_are_gone_rest_and_others_stay() {
        let (mut ports, now) = (Ports::default(), Instant::now());
        let (gone, stays) = (ports.allocate("gone", 80, now).unwrap(), ports.allocate("stays", 80, now).unwrap());
        ports.release_others(&["stays".to_owned()].into(), now);
        // This is when ports that have rested for long enough are given away.
        ports.allocate("new", 80, now + REST).unwrap();
        assert!(!ports.owners.contains_key(&gone) || ports.owners[&gone].uid == "new");
        assert_eq!(ports.owners[&stays].released, None);
    }

    #[test]
    fn claimed_ports_are_not_given_away_and_exhaustion_is_an_error() {
        let (mut ports, now) = (Ports::default(), Instant::now());
        for port in INTERCEPTION_PORT_MIN..=INTERCEPTION_PORT_MAX {
            ports.claim(port, "other", 80);
        }
        assert_eq!(ports.allocate("a", 80, now), Err(Exhausted));
    }
}
