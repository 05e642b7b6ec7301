//! What flows back to the operators: for each ElastiService what is in effect, and its traffic. States, not events: a
//! stream compares them with what it has sent, so that none is lost and a new stream tells all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::message::{ACTIVITY_INTERVAL, ResolverMessage};
use elasti_api::summary::{Summary, part};
use tokio::sync::watch;

use crate::standby::Standby;

/// What is in effect of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The state's revision.
    pub revision: u64,
    /// Every interception port has an open listener.
    pub listening: bool,
    /// Connections on the node are redirected.
    pub redirecting: bool,
    /// Every connection is held although pods are ready.
    pub holding: bool,
    /// Why it is not as the state says.
    pub error: Option<String>,
}

/// How much traffic there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections that wait now.
    pub held: u32,
    /// Connections that are forwarded now.
    pub forwarding: u32,
    /// Connections accepted so far.
    pub accepted: u64,
}

/// What the connections to the pods on this node do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// The digest of the pods' addresses.
    pub endpoints: u64,
    /// Connections that are open; `None` when there may be others.
    pub open: Option<u32>,
    /// Connections opened.
    pub opened: u64,
    /// When one was opened or carried data last.
    pub last: Instant,
    /// How often that is told while there is activity.
    pub interval: Duration,
    /// Why this cannot be relied on.
    pub unknown: Option<String>,
}

impl Activity {
    /// Whether this answers a question otherwise than `before`.
    fn is_news(&self, before: &Self) -> bool {
        let answers = |it: &Self| (it.endpoints, it.open.map(|open| open > 0), it.unknown.clone());
        answers(self) != answers(before)
    }
}

/// What one Service tells streams by: that its traffic is another, and whether that can wait. The value that streams follow says
/// whether the resolver is leaving.
#[derive(Debug)]
pub struct News {
    /// Stands for the Service on the board; no other ever has it.
    number: u64,
    /// It is among the stirred ones already. Set after a count has changed, cleared before the counts are read.
    marked: AtomicBool,
    bell: Bell,
}

/// What streams wait for; clones are the same.
#[derive(Clone, Debug)]
pub struct Bell(Arc<Ringing>);

#[derive(Debug)]
struct Ringing {
    /// Services whose traffic is another than when a stream last looked, each once.
    stirred: Mutex<Vec<u64>>,
    /// Whether the resolver is leaving.
    streams: watch::Sender<bool>,
}

impl Bell {
    /// Streams have a look.
    fn ring(&self) {
        self.0.streams.send_modify(|_| {});
    }

    fn stirred(&self) -> MutexGuard<'_, Vec<u64>> {
        self.0.stirred.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl News {
    /// Of the Service for which this number stands on the board.
    pub fn new(number: u64, bell: Bell) -> Self {
        Self { number, marked: AtomicBool::new(false), bell }
    }

    /// The traffic is another than before; streams tell of it at the next heartbeat.
    pub fn changed(&self) {
        if !self.marked.swap(true, Ordering::AcqRel) {
            self.bell.stirred().push(self.number);
        }
    }

    /// As [`News::changed`], and it cannot wait for the next heartbeat.
    pub fn tell(&self) {
        self.changed();
        self.bell.ring();
    }
}

#[derive(Debug)]
struct Entry {
    uid: Arc<str>,
    standby: Arc<Standby>,
    /// Where it is in [`Entries::order`].
    position: u64,
    ack: Option<Arc<Ack>>,
    /// The fingerprint of the state that is in effect, if it is so as the state asks.
    as_asked: Option<u64>,
    /// Boxed: few Services have pods on this node.
    activity: Option<Box<Activity>>,
}

/// All Services, in the order in which they have last changed: a stream looks at those that are behind its place, so that what it
/// costs to tell of a change does not grow with the number of Services.
#[derive(Debug, Default)]
struct Entries {
    latest: u64,
    order: BTreeMap<u64, u64>,
    /// By the number of the Service.
    services: BTreeMap<u64, Entry>,
    numbers: HashMap<Arc<str>, u64>,
    /// Those with [`Entry::activity`].
    active: BTreeSet<u64>,
    /// Of all states that have been taken in, in effect or not.
    known: Summary,
    /// A whole snapshot has been in effect.
    settled: bool,
}

impl Entries {
    /// Has every stream look at this one again.
    fn touch(&mut self, number: u64) {
        if let Some(entry) = self.services.get_mut(&number) {
            self.order.remove(&entry.position);
            self.latest += 1;
            entry.position = self.latest;
            self.order.insert(self.latest, number);
        }
    }
}

/// The present state of every ElastiService; clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    entries: Arc<Mutex<Entries>>,
    numbers: Arc<AtomicU64>,
    bell: Bell,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            entries: Arc::default(),
            numbers: Arc::default(),
            bell: Bell(Arc::new(Ringing { stirred: Mutex::default(), streams: watch::Sender::new(false) })),
        }
    }
}

impl Board {
    /// For one Service that has news.
    pub fn news(&self) -> News {
        News::new(self.number(), self.bell())
    }

    /// A number that stands for one Service, and never for another.
    pub fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Rung when a Service has news.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Follows the news; the value says whether the resolver is leaving.
    pub fn follow(&self) -> watch::Receiver<bool> {
        self.bell.0.streams.subscribe()
    }

    /// The resolver is about to stop.
    pub fn leave(&self) {
        self.bell.0.streams.send_replace(true);
    }

    /// Whether the resolver is about to stop.
    pub fn leaving(&self) -> bool {
        *self.bell.0.streams.borrow()
    }

    /// Adds a Service that nothing is in effect of yet.
    pub fn add(&self, uid: &Arc<str>, standby: Arc<Standby>) {
        let number = standby.number();
        let mut entries = self.entries();
        entries.numbers.insert(Arc::clone(uid), number);
        let entry = Entry { uid: Arc::clone(uid), standby, position: 0, ack: None, as_asked: None, activity: None };
        entries.services.insert(number, entry);
        entries.touch(number);
    }

    /// All Services.
    pub fn services(&self) -> Vec<Arc<Standby>> {
        self.entries().services.values().map(|entry| Arc::clone(&entry.standby)).collect()
    }

    /// Takes a Service out.
    pub fn remove(&self, uid: &str) {
        let mut entries = self.entries();
        if let Some(number) = entries.numbers.remove(uid)
            && let Some(entry) = entries.services.remove(&number)
        {
            entries.order.remove(&entry.position);
            entries.active.remove(&number);
        }
    }

    /// The states that have been taken in, for streams that begin.
    pub fn know(&self, states: &Summary) {
        self.entries().known.clone_from(states);
    }

    /// The states that have been taken in.
    pub fn known(&self) -> Summary {
        self.entries().known.clone()
    }

    /// A whole snapshot is in effect: streams may say so.
    pub fn settled(&self) {
        if !std::mem::replace(&mut self.entries().settled, true) {
            self.bell.ring();
        }
    }

    /// Says what is in effect, and by the fingerprint of the state whether it is so as the state asks; streams learn at once of
    /// what is new.
    pub fn acknowledge<S: AsRef<str>>(&self, acks: impl IntoIterator<Item = (S, Ack, Option<u64>)>) {
        let mut changed = false;
        {
            let mut entries = self.entries();
            for (uid, ack, as_asked) in acks {
                let Some(number) = entries.numbers.get(uid.as_ref()).copied() else { continue };
                let Some(entry) = entries.services.get_mut(&number) else { continue };
                entry.as_asked = as_asked;
                if entry.ack.as_deref() != Some(&ack) {
                    entry.ack = Some(Arc::new(ack));
                    entries.touch(number);
                    changed = true;
                }
            }
        }
        if changed {
            self.bell.ring();
        }
    }

    /// Says what the connections to pods do; nothing of those ElastiServices that `activity` lacks.
    pub fn observe(&self, activity: BTreeMap<String, Activity>) {
        let mut entries = self.entries();
        let before = std::mem::take(&mut entries.active);
        for (uid, activity) in activity {
            let Some(number) = entries.numbers.get(&*uid).copied() else { continue };
            let Some(entry) = entries.services.get_mut(&number) else { continue };
            let changed = entry.activity.as_deref() != Some(&activity);
            entry.activity = Some(Box::new(activity));
            entries.active.insert(number);
            if changed {
                entries.touch(number);
            }
        }
        for number in before {
            if !entries.active.contains(&number)
                && let Some(entry) = entries.services.get_mut(&number)
            {
                entry.activity = None;
            }
        }
    }

    /// The operators have been sent the news that connections of `uid` are held.
    pub fn notified(&self, uid: &str) {
        let entries = self.entries();
        let entry = entries.numbers.get(uid).and_then(|number| entries.services.get(number));
        if let Some(service) = entry.and_then(|entry| entry.standby.made()) {
            service.notified();
        }
    }

    /// What `sent` lacks: everything at a heartbeat (`regular`), else what cannot wait. Looks only at what has changed since the
    /// last call, and at a heartbeat at what could wait then.
    pub fn due(&self, sent: &mut Sent, regular: bool) -> Vec<ResolverMessage> {
        let entries = &mut *self.entries();
        let now = Instant::now();
        let mut due = Vec::new();
        if sent.opening == Opening::Summary && entries.settled {
            sent.opening = Opening::Done;
            due.extend(summary(entries, sent));
        }
        for number in self.concerned(entries, sent, regular) {
            match entries.services.get(&number) {
                // Connections that are held wait for no summary.
                Some(entry) if sent.opening != Opening::Done && entry.standby.traffic().held == 0 => {
                    sent.first.insert(number);
                }
                Some(entry) => sent.look(number, entry, regular, now, &mut due),
                None => sent.forget(number),
            }
        }
        if sent.of.len() > entries.services.len() {
            sent.of.retain(|number, _| entries.services.contains_key(number));
        }
        due
    }

    /// The Services that the next call of [`Board::due`] looks at.
    fn concerned(&self, entries: &mut Entries, sent: &mut Sent, regular: bool) -> BTreeSet<u64> {
        let stirred = std::mem::take(&mut *self.bell.stirred());
        for number in stirred {
            if let Some(entry) = entries.services.get(&number) {
                if let Some(service) = entry.standby.made() {
                    service.news().marked.swap(false, Ordering::AcqRel);
                }
                entries.touch(number);
            }
        }
        let behind = entries.order.range(sent.place + 1..).map(|(_, number)| *number);
        let mut concerned: BTreeSet<u64> = behind.collect();
        sent.place = entries.latest;
        if sent.opening == Opening::Done {
            concerned.append(&mut sent.first);
        }
        if regular {
            concerned.append(&mut sent.later);
        }
        concerned
    }

    /// The operator has not understood the summaries of these parts: each of their ElastiServices is to be acknowledged.
    pub fn unclear(&self, sent: &mut Sent, parts: &[u16]) {
        let entries = self.entries();
        let concerned = entries.services.iter().filter(|(_, entry)| parts.contains(&part(&entry.uid)));
        for (number, _) in concerned {
            sent.of.remove(number);
            sent.first.insert(*number);
        }
    }

    /// No code panics while it holds the lock.
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says of the parts in which all is as asked that it is so, and notes it as sent. What traffic there is comes first, as before
/// each acknowledgement.
fn summary(entries: &Entries, sent: &mut Sent) -> Vec<ResolverMessage> {
    let mut parts = BTreeMap::<u16, Option<u64>>::new();
    for entry in entries.services.values() {
        let sum = parts.entry(part(&entry.uid)).or_insert(Some(0));
        *sum = sum.zip(entry.as_asked).map(|(sum, fingerprint)| sum.wrapping_add(fingerprint));
    }
    let mut due = Vec::new();
    for (number, entry) in &entries.services {
        let sent = sent.of.entry(*number).or_default();
        // What was told already was of a connection that is held.
        if parts.get(&part(&entry.uid)).copied().flatten().is_none() || sent.ack.is_some() {
            continue;
        }
        let traffic = entry.standby.traffic();
        if traffic != Traffic::default() {
            let Traffic { held, forwarding, accepted } = traffic;
            due.push(ResolverMessage::Traffic { uid: entry.uid.to_string(), held, forwarding, accepted });
        }
        (sent.ack, sent.traffic) = (entry.ack.clone(), Some(traffic));
    }
    let parts: Vec<(u16, u64)> = parts.into_iter().filter_map(|(part, sum)| Some((part, sum?))).collect();
    if !parts.is_empty() {
        due.push(ResolverMessage::InEffect { parts });
    }
    due
}

/// How far a stream has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Opening {
    /// The operator has not introduced itself: it may understand summaries or not.
    Hello,
    /// It does, and one is sent once a snapshot is in effect.
    Summary,
    /// What is new is told.
    #[default]
    Done,
}

/// What one stream has sent.
#[derive(Debug, Default)]
pub struct Sent {
    opening: Opening,
    /// Services that are told of as soon as the stream is open.
    first: BTreeSet<u64>,
    /// Up to where it has looked at what changes.
    place: u64,
    /// Services of which something is left that can wait.
    later: BTreeSet<u64>,
    of: BTreeMap<u64, SentOfOne>,
}

#[derive(Debug, Default)]
struct SentOfOne {
    ack: Option<Arc<Ack>>,
    traffic: Option<Traffic>,
    /// And when.
    activity: Option<Box<(Activity, Instant)>>,
}

impl Sent {
    /// Of a stream on which the operator has not spoken yet.
    pub fn opening() -> Self {
        Self { opening: Opening::Hello, ..Self::default() }
    }

    /// The operator has introduced itself: whether it understands summaries.
    pub fn greeted(&mut self, summaries: bool) {
        if self.opening == Opening::Hello {
            self.opening = if summaries { Opening::Summary } else { Opening::Done };
        }
    }

    /// Adds what of this Service is due, and notes whether something is left.
    fn look(&mut self, number: u64, entry: &Entry, regular: bool, now: Instant, due: &mut Vec<ResolverMessage>) {
        // Nothing is said of an ElastiService before it is in effect; then it is looked at again.
        let Some(ack) = &entry.ack else { return };
        let traffic = entry.standby.traffic();
        let sent = self.of.entry(number).or_default();
        due.extend(sent.due(&entry.uid, ack, traffic, regular));
        if regular && let Some(activity) = &entry.activity {
            due.extend(sent.activity_due(&entry.uid, activity, now));
        }
        if sent.lacks(traffic, entry.activity.as_deref()) {
            self.later.insert(number);
        } else {
            self.later.remove(&number);
        }
    }

    fn forget(&mut self, number: u64) {
        self.of.remove(&number);
        self.later.remove(&number);
        self.first.remove(&number);
    }
}

impl SentOfOne {
    /// Whether there is anything that could wait and has not been told.
    fn lacks(&self, traffic: Traffic, activity: Option<&Activity>) -> bool {
        let told = self.activity.as_deref().map(|(told, _)| told);
        self.traffic != Some(traffic) || activity.is_some_and(|activity| told != Some(activity))
    }

    fn due(&mut self, uid: &str, ack: &Arc<Ack>, traffic: Traffic, regular: bool) -> Vec<ResolverMessage> {
        let mut due = Vec::new();
        let acknowledges = self.ack.as_ref() != Some(ack);
        let edge = self.traffic.is_none_or(|sent| (sent.held == 0) != (traffic.held == 0));
        // An acknowledgement may mean that nothing has come: what has is said first.
        if edge || (regular || acknowledges) && self.traffic != Some(traffic) {
            self.traffic = Some(traffic);
            let Traffic { held, forwarding, accepted } = traffic;
            due.push(ResolverMessage::Traffic { uid: uid.to_owned(), held, forwarding, accepted });
        }
        if acknowledges {
            self.ack = Some(Arc::clone(ack));
            due.push(ResolverMessage::Ack {
                uid: uid.to_owned(),
                revision: ack.revision,
                listening: ack.listening,
                redirecting: ack.redirecting,
                holding: ack.holding,
                error: ack.error.clone(),
            });
        }
        due
    }

    fn activity_due(&mut self, uid: &str, activity: &Activity, now: Instant) -> Option<ResolverMessage> {
        let interval = activity.interval.max(ACTIVITY_INTERVAL);
        let due = self.activity.as_deref().is_none_or(|(before, at)| {
            activity.is_news(before) || (activity != before && now.saturating_duration_since(*at) >= interval)
        });
        if !due {
            return None;
        }
        self.activity = Some(Box::new((activity.clone(), now)));
        let Activity { endpoints, open, opened, last, interval: _, unknown } = activity.clone();
        let idle = now.saturating_duration_since(last);
        let idle_ms = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        Some(ResolverMessage::Activity { uid: uid.to_owned(), endpoints, open, opened, idle_ms, unknown })
    }
}

#[cfg(test)]
mod tests;
