//! What every connected resolver says of itself and of the ElastiServices.
//!
//! Fed by the streams of [`crate::elastiserver`], read by the controller. Invariants: a pod is known by its newest
//! stream only, and the end of an older one takes nothing away; what is known of a resolver goes with its stream; no
//! resolver can make the table grow without bound. No I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use elasti_api::names::{INTERCEPTION_PORT_MAX, INTERCEPTION_PORT_MIN};
use tokio::sync::broadcast;

use arrivals::Arrivals;
use statements::Statements;

pub mod arrivals;
pub mod pace;
mod statements;

/// Changes that a receiver may lag behind before it is told to look at everything instead.
const BACKLOG: usize = 1024;

/// Changes of so many ElastiServices at once are told as one: they fill a good part of [`BACKLOG`].
const MANY: usize = BACKLOG / 16;

/// ElastiServices that one resolver may speak of: each has an interception port, so there cannot be more.
const SERVICES_MAX: usize = (INTERCEPTION_PORT_MAX - INTERCEPTION_PORT_MIN) as usize + 1;

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A resolver has gone or is leaving, or more has changed than was remembered: look at everything.
    Members,
    /// A resolver has come, or has said something of many ElastiServices that no connection waits for: look at everything, when
    /// there is time.
    Many,
    /// What resolvers say of the ElastiService with this UID.
    Service(String),
}

/// All connected resolvers. Clones share the table.
#[derive(Clone, Debug)]
pub struct Resolvers {
    table: Arc<Mutex<Table>>,
    changes: broadcast::Sender<Change>,
}

#[derive(Debug, Default)]
struct Table {
    streams: u64,
    by_pod: BTreeMap<String, Resolver>,
    said: Statements<Said>,
    arrivals: Arrivals,
}

#[derive(Debug)]
struct Resolver {
    /// Which stream speaks for the pod.
    stream: u64,
    /// Stands for it in [`Table::said`]; of those that are connected no other has it.
    number: usize,
    identity: Arc<Identity>,
    leaving: bool,
}

/// What a resolver says of itself when it connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name of its pod.
    pub pod: String,
    /// Name of its node.
    pub node: String,
    /// Addresses of its pod.
    pub addresses: Vec<IpAddr>,
    /// Why it does not redirect connections on its node, if it does not.
    pub redirect_disabled: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    ack: Option<Ack>,
    traffic: Traffic,
    activity: Option<Activity>,
    /// When it said that connections are held.
    held_since: Option<Instant>,
}

/// The resolver speaks of more ElastiServices than there can be.
#[derive(Debug, thiserror::Error)]
#[error("the resolver speaks of more than {SERVICES_MAX} ElastiServices; no more can exist")]
pub struct TooManyServices;

impl Default for Resolvers {
    fn default() -> Self {
        Self::new()
    }
}

impl Resolvers {
    /// No resolver is connected yet.
    pub fn new() -> Self {
        Self { table: Arc::default(), changes: broadcast::Sender::new(BACKLOG) }
    }

    /// Every connected resolver, with what it says about one ElastiService; sorted by the names of their pods.
    pub fn observed(&self, uid: &str) -> Vec<ResolverObserved> {
        let table = self.table();
        let most = table.by_pod.values().map(|resolver| resolver.number + 1).max().unwrap_or_default();
        let mut said = vec![None; most];
        for (number, of_number) in table.said.of(uid) {
            said[number] = Some(of_number);
        }
        let observed = |resolver: &Resolver| {
            let said = said[resolver.number].cloned().unwrap_or_default();
            let (identity, leaving) = (Arc::clone(&resolver.identity), resolver.leaving);
            let Said { ack, traffic, activity, held_since: _ } = said;
            ResolverObserved { identity, leaving, ack, traffic, activity }
        };
        table.by_pod.values().map(observed).collect()
    }

    /// When the first resolver said that connections are held; `None` while none are.
    pub fn held_since(&self, uid: &str) -> Option<Instant> {
        self.table().said.distinct(uid).filter_map(|said| said.held_since).min()
    }

    /// Streams are let in from now on.
    pub fn open(&self) {
        self.table().arrivals.open_since.get_or_insert_with(Instant::now);
    }

    /// When resolvers came, and who has gone.
    pub fn arrivals(&self) -> Arrivals {
        self.table().arrivals.clone()
    }

    /// What changes from now on.
    pub fn changes(&self) -> Changes {
        Changes { receiver: self.changes.subscribe(), _alive: self.clone() }
    }

    /// A resolver has connected; it is gone when the result is dropped. Takes the place of an older stream of the pod.
    pub fn connect(&self, identity: Identity) -> Connection {
        let pod = identity.pod.clone();
        let stream = {
            let mut table = self.table();
            let new = !table.remove(&pod);
            table.arrivals.came(&identity.addresses, new, Instant::now());
            table.streams += 1;
            let (stream, number) = (table.streams, table.number());
            let identity = Arc::new(identity);
            table.by_pod.insert(pod.clone(), Resolver { stream, number, identity, leaving: false });
            stream
        };
        self.tell(Change::Many);
        Connection { resolvers: self.clone(), pod, stream }
    }

    /// How many are connected.
    pub fn len(&self) -> usize {
        self.table().by_pod.len()
    }

    /// Whether none is connected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn tell(&self, change: Change) {
        // Fails only when nobody listens.
        drop(self.changes.send(change));
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is one insertion or removal, so a poisoned lock still guards a sound table.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The lowest number that no resolver has.
    fn number(&self) -> usize {
        let mut taken: Vec<usize> = self.by_pod.values().map(|resolver| resolver.number).collect();
        taken.sort_unstable();
        taken.iter().enumerate().find(|(index, number)| index != *number).map_or(taken.len(), |(index, _)| index)
    }

    /// Removes a resolver and all that it has said; whether it was there.
    fn remove(&mut self, pod: &str) -> bool {
        let removed = self.by_pod.remove(pod);
        if let Some(resolver) = &removed {
            self.said.forget_all(resolver.number);
            self.arrivals.went(&resolver.identity.addresses);
        }
        removed.is_some()
    }
}

/// What changes; see [`Resolvers::changes`].
#[derive(Debug)]
pub struct Changes {
    receiver: broadcast::Receiver<Change>,
    /// Keeps the sender, so that the feed never closes.
    _alive: Resolvers,
}

impl Changes {
    /// The next change. Who lags too far behind is told [`Change::Members`] in place of what was missed. Cancel safe.
    pub async fn next(&mut self) -> Change {
        self.receiver.recv().await.unwrap_or(Change::Members)
    }
}

/// One stream's share of the table.
#[derive(Debug)]
pub struct Connection {
    resolvers: Resolvers,
    pod: String,
    stream: u64,
}

impl Connection {
    /// Name of the resolver's pod.
    pub fn pod(&self) -> &str {
        &self.pod
    }

    /// The resolver has said what it has made of a state.
    pub fn acknowledged(&self, uid: &str, ack: Ack) -> Result<(), TooManyServices> {
        self.said(uid, |said| {
            let changed = said.ack.as_ref() != Some(&ack);
            said.ack = Some(ack);
            changed
        })
    }

    /// The resolver has said at once what it has made of many states.
    pub fn acknowledged_all<'a>(&self, acks: impl Iterator<Item = (&'a str, Ack)>) -> Result<(), TooManyServices> {
        let changed = self.with(|resolver, said| {
            let number = resolver.number;
            let mut changed = Vec::new();
            for (uid, ack) in acks {
                if said.spoken_of(number) >= SERVICES_MAX && !said.contains(uid, number) {
                    return Err(TooManyServices);
                }
                if said.change(uid, number, |said| said.ack.replace(ack.clone()).as_ref() != Some(&ack)) {
                    changed.push(uid);
                }
            }
            Ok(changed)
        });
        let changed = changed.transpose()?.unwrap_or_default();
        if changed.len() > MANY {
            self.resolvers.tell(Change::Many);
        } else {
            for uid in changed {
                self.resolvers.tell(Change::Service(uid.to_owned()));
            }
        }
        Ok(())
    }

    /// Whether the resolver redirects connections on its node.
    pub fn redirects(&self) -> bool {
        self.with(|resolver, _| resolver.identity.redirect_disabled.is_none()).unwrap_or_default()
    }

    /// The resolver has said what traffic there is.
    pub fn traffic(&self, uid: &str, traffic: Traffic) -> Result<(), TooManyServices> {
        self.said(uid, |said| {
            let changed = said.traffic != traffic;
            said.held_since = (traffic.held > 0).then(|| said.held_since.unwrap_or_else(Instant::now));
            said.traffic = traffic;
            changed
        })
    }

    /// The resolver has said what the connections to the pods on its node do. Told on only where that changes an answer: what
    /// merely goes on is there for whoever looks.
    pub fn active(&self, uid: &str, activity: Activity) -> Result<(), TooManyServices> {
        self.said(uid, |said| {
            let changed = said.activity.as_ref().is_none_or(|before| activity.is_news(before));
            said.activity = Some(activity);
            changed
        })
    }

    /// The resolver is about to stop.
    pub fn leaving(&self) {
        if self.with(|resolver, _| !std::mem::replace(&mut resolver.leaving, true)) == Some(true) {
            self.resolvers.tell(Change::Members);
        }
    }

    /// An ElastiService is gone, and with it what was said of it.
    pub fn forget(&self, uid: &str) {
        self.with(|resolver, said| said.forget(uid, resolver.number));
    }

    fn said(&self, uid: &str, change: impl FnOnce(&mut Said) -> bool) -> Result<(), TooManyServices> {
        let changed = self.with(|resolver, said| {
            let number = resolver.number;
            if said.spoken_of(number) >= SERVICES_MAX && !said.contains(uid, number) {
                return Err(TooManyServices);
            }
            Ok(said.change(uid, number, change))
        });
        if changed.transpose()? == Some(true) {
            self.resolvers.tell(Change::Service(uid.to_owned()));
        }
        Ok(())
    }

    /// Nothing once a newer stream speaks for the pod.
    fn with<T>(&self, change: impl FnOnce(&mut Resolver, &mut Statements<Said>) -> T) -> Option<T> {
        let table = &mut *self.resolvers.table();
        let resolver = table.by_pod.get_mut(&self.pod).filter(|resolver| resolver.stream == self.stream)?;
        Some(change(resolver, &mut table.said))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let removed = {
            let mut table = self.resolvers.table();
            let ours = table.by_pod.get(&self.pod).is_some_and(|resolver| resolver.stream == self.stream);
            ours && table.remove(&self.pod)
        };
        if removed {
            self.resolvers.tell(Change::Members);
        }
    }
}

/// A connected resolver, with what it says about one ElastiService.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolverObserved {
    /// What it said of itself.
    pub identity: Arc<Identity>,
    /// It is about to stop.
    pub leaving: bool,
    /// What it has made of the state, once it has said so.
    pub ack: Option<Ack>,
    /// The traffic that it has seen.
    pub traffic: Traffic,
    /// What the connections to the pods on its node do, once it has said so.
    pub activity: Option<Activity>,
}

/// What a resolver has made of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Revision of the state.
    pub revision: u64,
    /// Every interception port is open.
    pub listening: bool,
    /// Connections on its node are redirected.
    pub redirecting: bool,
    /// Every connection is held although pods are ready.
    pub holding: bool,
    /// Why it is not as the state says.
    pub error: Option<String>,
}

/// Traffic of one ElastiService at one resolver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections that wait for the target.
    pub held: u32,
    /// Connections that are forwarded.
    pub forwarding: u32,
    /// Connections accepted since the resolver started.
    pub accepted: u64,
}

/// What the connections to the pods of one ElastiService on one node do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// [`elasti_api::message::digest`] of the addresses that this is about.
    pub endpoints: u64,
    /// Connections that are open; `None` when there may be others.
    pub open: Option<u32>,
    /// When one was opened or carried data last, as of the last word: [`elasti_api::message::ACTIVITY_LAG`] may be missing.
    pub last: Instant,
    /// Why this cannot be relied on.
    pub unknown: Option<String>,
}

impl Activity {
    fn is_news(&self, before: &Self) -> bool {
        let answers = |it: &Self| (it.endpoints, it.open.map(|open| open > 0), it.unknown.clone());
        answers(self) != answers(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(pod: &str, node: &str) -> Identity {
        let addresses = vec!["10.244.0.3".parse().unwrap()];
        Identity { pod: pod.into(), node: node.into(), addresses, redirect_disabled: None }
    }

    fn ack(revision: u64) -> Ack {
        Ack { revision, listening: true, redirecting: false, holding: false, error: None }
    }

    fn pods(resolvers: &Resolvers) -> Vec<(String, String)> {
        let names = |identity: &Identity| (identity.pod.clone(), identity.node.clone());
        resolvers.observed("u").iter().map(|resolver| names(&resolver.identity)).collect()
    }

    #[test]
    fn the_end_of_an_older_stream_removes_nothing() {
        let resolvers = Resolvers::new();
        let old = resolvers.connect(identity("b", "old"));
        let _other = resolvers.connect(identity("a", "x"));
        let new = resolvers.connect(identity("b", "new"));
        new.acknowledged("u", ack(1)).unwrap();
        old.acknowledged("u", ack(7)).unwrap();
        drop(old);
        assert!(resolvers.arrivals().gone.is_empty());
        assert_eq!(pods(&resolvers), [("a".into(), "x".into()), ("b".into(), "new".into())]);
        assert_eq!(resolvers.observed("u")[1].ack, Some(ack(1)));
        drop(new);
        assert_eq!((resolvers.len(), resolvers.arrivals().gone.len()), (1, 1));
    }

    #[tokio::test]
    async fn only_what_is_new_is_told() {
        let resolvers = Resolvers::new();
        let resolver = resolvers.connect(identity("a", "x"));
        let mut changes = resolvers.changes();
        for held in [0, 1, 1, 2] {
            resolver.traffic("u", Traffic { held, ..Traffic::default() }).unwrap();
        }
        resolver.acknowledged("v", ack(1)).unwrap();
        resolver.leaving();
        let service = |uid: &str| Change::Service(uid.to_owned());
        for expected in [service("u"), service("u"), service("v"), Change::Members] {
            assert_eq!(changes.next().await, expected);
        }
    }

    #[tokio::test]
    async fn who_lags_behind_looks_at_everything() {
        let resolvers = Resolvers::new();
        let resolver = resolvers.connect(identity("a", "x"));
        let mut changes = resolvers.changes();
        for accepted in 1..=BACKLOG as u64 + 1 {
            resolver.traffic("u", Traffic { accepted, ..Traffic::default() }).unwrap();
        }
        assert_eq!(changes.next().await, Change::Members);
        assert_eq!(changes.next().await, Change::Service("u".into()));
    }

    #[tokio::test]
    async fn what_is_said_of_many_at_once_is_told_as_one_change_and_of_few_each() {
        let resolvers = Resolvers::new();
        let resolver = resolvers.connect(identity("a", "x"));
        let mut changes = resolvers.changes();
        let uids: Vec<String> = (0..=MANY).map(|uid| uid.to_string()).collect();
        let acks = |count: usize, revision| uids[..count].iter().map(move |uid| (uid.as_str(), ack(revision)));
        resolver.acknowledged_all(acks(MANY + 1, 1)).unwrap();
        assert_eq!(changes.next().await, Change::Many);
        resolver.acknowledged_all(acks(MANY + 1, 1)).unwrap();
        resolver.acknowledged_all(acks(1, 2)).unwrap();
        assert_eq!(changes.next().await, Change::Service("0".into()), "what is no news is not told");
        assert_eq!(resolvers.observed("7")[0].ack, Some(ack(1)));
    }

    #[test]
    fn a_resolver_cannot_grow_the_table_without_bound() {
        let resolvers = Resolvers::new();
        let resolver = resolvers.connect(identity("a", "x"));
        for uid in 0..SERVICES_MAX {
            resolver.acknowledged(&uid.to_string(), ack(1)).unwrap();
        }
        assert!(resolver.traffic("one more", Traffic::default()).is_err());
        resolver.forget("7");
        assert!(resolver.traffic("one more", Traffic::default()).is_ok());
    }
}
