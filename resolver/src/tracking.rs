//! Which connections to pods are followed, and what is known of them: for the operators' trigger `traffic`.
//!
//! [`Tracker`] is pure: states, what was seen, and the time in; what to follow and answers out. What follows is behind
//! [`Track`]. Invariants: what cannot be known is said to be unknown, never idle; an ElastiService is active at the moment from
//! which its pods are followed. Used by [`crate::supervisor`].
//!
//! Connections may be older than what follows them. A pod whose address is first heard of while the operators tell of every
//! change is new: its connections are followed from the first. Of any other pod, a connection is followed from its next
//! packet on ([`Wanted::adopt`]), and nobody knows how many silent ones there are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elasti_api::cidr::Cidr;
use elasti_api::message::{ServiceState, digest};

use crate::report::Activity;

/// For how long after the operators were not heard, or the resolver has begun, pods may be older than their first mention.
const SETTLING: Duration = Duration::from_secs(5);

/// For how long connections of a pod are adopted that was ready when it was first heard of: a client may have been faster than
/// the operator's word, by the time that one needs.
const OVERTAKING: Duration = Duration::from_secs(10);

/// A ready pod in which no connection was ever seen is dialled this often: where even that is not seen, nothing is.
const DIAL_INTERVAL: Duration = Duration::from_secs(2);

/// For how long nothing is made of it that no connection of a ready pod was seen.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);

/// Follows connections until it is dropped.
pub trait Track: Send {
    /// Follows connections to these addresses and no others. What fails for one of them is in its [`Seen::fault`].
    fn sync(&mut self, wanted: &BTreeMap<SocketAddr, Wanted>);

    /// What was seen so far, of all addresses; the error says why nothing is known.
    fn look(&mut self) -> Result<BTreeMap<SocketAddr, Seen>, String>;

    /// Attaches anew what somebody else has detached. Returns whether anything was.
    fn reattach(&mut self) -> Result<bool, String>;
}

/// How an address is followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Clients whose connections do not count.
    pub ignored: Arc<BTreeSet<Cidr>>,
    /// UID of the pod, if it may have connections that nobody has followed: they are from their next packet on.
    pub adopt: Option<String>,
}

/// What was seen of the connections to an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections opened.
    pub opened: u64,
    /// Connections that are open.
    pub open: u32,
    /// For how long, as looks have seen it, none was opened or carried data.
    pub idle: Duration,
    /// Any connection was seen at all, whether it counts or not.
    pub visible: bool,
    /// Why this cannot be relied on.
    pub fault: Option<String>,
}

/// What was decided at a look.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What to tell, by the UID of the ElastiService.
    pub answers: BTreeMap<String, Activity>,
    /// Addresses to dial, to see whether that is seen.
    pub dials: Vec<SocketAddr>,
}

/// What is followed, and since when.
#[derive(Debug)]
pub struct Tracker {
    node: String,
    /// Before this, changes may have been missed.
    settled: Instant,
    services: BTreeMap<String, Service>,
    endpoints: BTreeMap<SocketAddr, Endpoint>,
    /// What ElastiServices say of each address, by UID.
    told: BTreeMap<SocketAddr, BTreeMap<String, Told>>,
}

#[derive(Debug)]
struct Told {
    pod: String,
    ready: bool,
    ignored: Arc<BTreeSet<Cidr>>,
}

#[derive(Clone, Debug, PartialEq)]
struct Service {
    /// When it was last active.
    last: Instant,
    /// How often that is told.
    interval: Duration,
    endpoints: BTreeSet<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq)]
struct Endpoint {
    since: Instant,
    /// It may have connections that nobody has followed.
    old: bool,
    /// It was ready when it was first heard of.
    first_ready: bool,
    ready: bool,
    pod: String,
    ignored: Arc<BTreeSet<Cidr>>,
    dialled: Option<Instant>,
}

impl Tracker {
    /// Follows nothing yet. `node` is the name of this node.
    pub fn new(node: String, now: Instant) -> Self {
        Self {
            node,
            settled: now + SETTLING,
            services: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    /// Changes may have been missed until now: the operators were silent.
    pub fn missed(&mut self, now: Instant) {
        self.settled = now + SETTLING;
    }

    /// Connections may have been missed until now: nothing followed them.
    pub fn lapsed(&mut self, now: Instant) {
        self.endpoints.values_mut().for_each(|endpoint| endpoint.old = true);
        self.services.values_mut().for_each(|service| service.last = now);
    }

    /// Takes in what the operators say now of these ElastiServices, by UID: nothing of those that are gone. Returns whether that
    /// concerns any address.
    pub fn update<'a>(
        &mut self,
        changed: impl IntoIterator<Item = (&'a str, Option<&'a ServiceState>)>,
        now: Instant,
    ) -> bool {
        let (mut new, mut concerned) = (BTreeSet::new(), BTreeSet::new());
        for (uid, state) in changed {
            let known = self.services.remove(uid);
            for address in known.iter().flat_map(|known| &known.endpoints) {
                concerned.insert(*address);
                if let Some(told) = self.told.get_mut(address) {
                    told.remove(uid);
                }
            }
            let Some(tracking) = state.and_then(|state| state.tracking.as_ref()) else { continue };
            if known.is_none() {
                new.insert(uid);
            }
            let last = known.map_or(now, |known| known.last);
            let mut service = Service { last, interval: tracking.report_interval, endpoints: BTreeSet::new() };
            let ignored: Arc<BTreeSet<Cidr>> = Arc::new(tracking.ignore_sources.iter().copied().collect());
            let here = tracking.nodes.iter().filter(|node| node.node == self.node);
            for endpoint in here.flat_map(|node| &node.endpoints) {
                service.endpoints.insert(endpoint.address);
                concerned.insert(endpoint.address);
                let told = Told { pod: endpoint.pod.clone(), ready: endpoint.ready, ignored: Arc::clone(&ignored) };
                self.told.entry(endpoint.address).or_default().entry(uid.to_owned()).or_insert(told);
            }
            self.services.insert(uid.to_owned(), service);
        }
        for address in &concerned {
            self.review(*address, &new, now);
        }
        !concerned.is_empty()
    }

    /// Follows this address as those say who name it now.
    fn review(&mut self, address: SocketAddr, new: &BTreeSet<&str>, now: Instant) {
        let before = self.endpoints.remove(&address);
        let mut tellers = self.told.get(&address).into_iter().flatten();
        let Some((uid, first)) = tellers.next() else {
            self.told.remove(&address);
            return;
        };
        let before = before.filter(|before| before.pod == first.pod);
        let mut endpoint = Endpoint {
            since: before.as_ref().map_or(now, |before| before.since),
            old: before.as_ref().map_or(new.contains(uid.as_str()) || now < self.settled, |before| before.old),
            first_ready: before.as_ref().map_or(first.ready, |before| before.first_ready),
            ready: first.ready,
            pod: first.pod.clone(),
            ignored: Arc::clone(&first.ignored),
            dialled: before.and_then(|before| before.dialled),
        };
        for (uid, other) in tellers {
            // Of two ElastiServices with the same pods, only what both ignore.
            endpoint.ignored = Arc::new(endpoint.ignored.intersection(&other.ignored).copied().collect());
            endpoint.old |= new.contains(uid.as_str());
        }
        self.endpoints.insert(address, endpoint);
    }

    /// What to follow.
    pub fn wanted(&self, now: Instant) -> BTreeMap<SocketAddr, Wanted> {
        let wanted = |endpoint: &Endpoint| {
            let age = now.saturating_duration_since(endpoint.since);
            let adopts = endpoint.old || (endpoint.first_ready && age < OVERTAKING);
            Wanted { ignored: Arc::clone(&endpoint.ignored), adopt: adopts.then(|| endpoint.pod.clone()) }
        };
        self.endpoints.iter().map(|(address, endpoint)| (*address, wanted(endpoint))).collect()
    }

    /// What is known of each ElastiService that has pods on this node.
    pub fn outcome(&mut self, seen: Result<&BTreeMap<SocketAddr, Seen>, &str>, now: Instant) -> Outcome {
        let mut outcome = Outcome::default();
        for (uid, service) in &mut self.services {
            if service.endpoints.is_empty() {
                continue;
            }
            let mut answer = Activity {
                endpoints: digest(service.endpoints.iter().copied()),
                open: Some(0),
                opened: 0,
                last: service.last,
                interval: service.interval,
                unknown: seen.err().map(str::to_owned),
            };
            for address in &service.endpoints {
                let (Some(endpoint), Ok(all)) = (self.endpoints.get_mut(address), seen) else { continue };
                let nothing =
                    Seen { fault: Some(format!("connections to {address} are not followed")), ..Seen::default() };
                let seen = all.get(address).unwrap_or(&nothing);
                answer.opened += seen.opened;
                answer.open = answer.open.filter(|_| !endpoint.old).map(|open| open.saturating_add(seen.open));
                answer.last = now.checked_sub(seen.idle).map_or(answer.last, |last| last.max(answer.last));
                answer.unknown = answer.unknown.or_else(|| seen.fault.clone());
                if seen.fault.is_none() && endpoint.ready && !seen.visible {
                    let again = |at: Instant| now.saturating_duration_since(at) >= DIAL_INTERVAL;
                    if endpoint.dialled.is_none_or(again) {
                        endpoint.dialled = Some(now);
                        outcome.dials.push(*address);
                    }
                    if now.saturating_duration_since(endpoint.since) >= DIAL_PATIENCE {
                        answer.unknown = answer.unknown.or_else(|| Some(invisible(*address)));
                    } else {
                        answer.last = now;
                    }
                }
            }
            service.last = answer.last;
            outcome.answers.insert(uid.clone(), answer);
        }
        outcome
    }
}

fn invisible(address: SocketAddr) -> String {
    format!(
        "no connection to {address} is seen, not even one from the resolver: the pod's sockets are not those of the node's \
         kernel (gVisor, Kata), something in the pod redirects them, or a NetworkPolicy keeps the resolver away"
    )
}

#[cfg(test)]
mod tests;
