//! What flows back to the operators: for each ElastiService what is in effect, and its traffic. States, not events: a
//! stream compares them with what it has sent, so that none is lost and a new stream tells all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::message::{ACTIVITY_INTERVAL, ResolverMessage};
use elasti_api::summary::{Summary, part};
use tokio::sync::watch;

use crate::service::Service;

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
    stirred: Stirred,
    streams: watch::Sender<bool>,
}

/// Services whose traffic is another than when a stream last looked, each once.
type Stirred = Arc<Mutex<Vec<u64>>>;

impl News {
    /// The traffic is another than before; streams tell of it at the next heartbeat.
    pub fn changed(&self) {
        if !self.marked.swap(true, Ordering::AcqRel) {
            self.stirred.lock().unwrap_or_else(PoisonError::into_inner).push(self.number);
        }
    }

    /// As [`News::changed`], and it cannot wait for the next heartbeat.
    pub fn tell(&self) {
        self.changed();
        self.streams.send_modify(|_| {});
    }
}

#[derive(Debug)]
struct Entry {
    uid: String,
    service: Arc<Service>,
    /// Where it is in [`Entries::order`].
    position: u64,
    part: u16,
    ack: Option<Ack>,
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
    numbers: HashMap<String, u64>,
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
    stirred: Stirred,
    numbers: Arc<AtomicU64>,
    streams: watch::Sender<bool>,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            entries: Arc::default(),
            stirred: Arc::default(),
            numbers: Arc::default(),
            streams: watch::Sender::new(false),
        }
    }
}

impl Board {
    /// For one Service that has news.
    pub fn news(&self) -> News {
        News {
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            marked: AtomicBool::new(false),
            stirred: Arc::clone(&self.stirred),
            streams: self.streams.clone(),
        }
    }

    /// Follows the news; the value says whether the resolver is leaving.
    pub fn follow(&self) -> watch::Receiver<bool> {
        self.streams.subscribe()
    }

    /// The resolver is about to stop.
    pub fn leave(&self) {
        self.streams.send_replace(true);
    }

    /// Whether the resolver is about to stop.
    pub fn leaving(&self) -> bool {
        *self.streams.borrow()
    }

    /// Adds a Service that nothing is in effect of yet.
    pub fn add(&self, uid: &str, service: Arc<Service>) {
        let number = service.news().number;
        let mut entries = self.entries();
        entries.numbers.insert(uid.to_owned(), number);
        let part = part(uid);
        let entry =
            Entry { uid: uid.to_owned(), service, position: 0, part, ack: None, as_asked: None, activity: None };
        entries.services.insert(number, entry);
        entries.touch(number);
    }

    /// All Services.
    pub fn services(&self) -> Vec<Arc<Service>> {
        self.entries().services.values().map(|entry| Arc::clone(&entry.service)).collect()
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
            self.streams.send_modify(|_| {});
        }
    }

    /// Says what is in effect, and by the fingerprint of the state whether it is so as the state asks; streams learn at once of
    /// what is new.
    pub fn acknowledge(&self, acks: impl IntoIterator<Item = (String, Ack, Option<u64>)>) {
        let mut changed = false;
        {
            let mut entries = self.entries();
            for (uid, ack, as_asked) in acks {
                let Some(number) = entries.numbers.get(&uid).copied() else { continue };
                let Some(entry) = entries.services.get_mut(&number) else { continue };
                entry.as_asked = as_asked;
                if entry.ack.as_ref() != Some(&ack) {
                    entry.ack = Some(ack);
                    entries.touch(number);
                    changed = true;
                }
            }
        }
        if changed {
            self.streams.send_modify(|_| {});
        }
    }

    /// Says what the connections to pods do; nothing of those ElastiServices that `activity` lacks.
    pub fn observe(&self, activity: BTreeMap<String, Activity>) {
        let mut entries = self.entries();
        let before = std::mem::take(&mut entries.active);
        for (uid, activity) in activity {
            let Some(number) = entries.numbers.get(&uid).copied() else { continue };
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
        if let Some(entry) = entries.numbers.get(uid).and_then(|number| entries.services.get(number)) {
            entry.service.notified();
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
                Some(entry) if sent.opening != Opening::Done && entry.service.traffic().held == 0 => {
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
        let stirred = std::mem::take(&mut *self.stirred.lock().unwrap_or_else(PoisonError::into_inner));
        for number in stirred {
            if let Some(entry) = entries.services.get(&number) {
                entry.service.news().marked.swap(false, Ordering::AcqRel);
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
        let concerned = entries.services.iter().filter(|(_, entry)| parts.contains(&entry.part));
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
        let sum = parts.entry(entry.part).or_insert(Some(0));
        *sum = sum.zip(entry.as_asked).map(|(sum, fingerprint)| sum.wrapping_add(fingerprint));
    }
    let mut due = Vec::new();
    for (number, entry) in &entries.services {
        let sent = sent.of.entry(*number).or_default();
        // What was told already was of a connection that is held.
        if parts.get(&entry.part).copied().flatten().is_none() || sent.ack.is_some() {
            continue;
        }
        let traffic = entry.service.traffic();
        if traffic != Traffic::default() {
            let Traffic { held, forwarding, accepted } = traffic;
            due.push(ResolverMessage::Traffic { uid: entry.uid.clone(), held, forwarding, accepted });
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
    ack: Option<Ack>,
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
        let traffic = entry.service.traffic();
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

    fn due(&mut self, uid: &str, ack: &Ack, traffic: Traffic, regular: bool) -> Vec<ResolverMessage> {
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
            self.ack = Some(ack.clone());
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
mod tests {
    use elasti_api::message::{HEARTBEAT_INTERVAL, encode, report_interval};

    use super::*;
    use crate::metrics::Metrics;

    const ACK: Ack = Ack { revision: 1, listening: true, redirecting: false, holding: false, error: None };

    fn traffic(held: u32, accepted: u64) -> Traffic {
        Traffic { held, forwarding: 0, accepted }
    }

    fn kinds(due: &[ResolverMessage]) -> Vec<&'static str> {
        let kind = |message: &ResolverMessage| match message {
            ResolverMessage::Ack { .. } => "ack",
            ResolverMessage::Traffic { .. } => "traffic",
            ResolverMessage::InEffect { .. } => "summary",
            _ => "other",
        };
        due.iter().map(kind).collect()
    }

    fn add(board: &Board, uid: &str) -> Arc<Service> {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let service = Arc::new(Service::new("n", uid, metrics, board.news()));
        board.add(uid, Arc::clone(&service));
        service
    }

    fn acknowledge(board: &Board, uid: &str, ack: Ack) {
        board.acknowledge([(uid.to_owned(), ack, None)]);
    }

    /// As the state with this fingerprint asks.
    fn as_asked(board: &Board, uid: &str, fingerprint: u64) {
        board.acknowledge([(uid.to_owned(), ACK, Some(fingerprint))]);
    }

    fn accept(service: &Service) {
        service.accept(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn a_new_stream_tells_all_once() {
        let mut sent = SentOfOne::default();
        assert_eq!(kinds(&sent.due("a", &ACK, traffic(0, 0), false)), ["traffic", "ack"]);
        assert!(sent.due("a", &ACK, traffic(0, 0), true).is_empty());
    }

    #[test]
    fn each_stream_is_told_of_each_change_and_what_could_wait_at_the_next_heartbeat() {
        let board = Board::default();
        let (a, b) = (add(&board, "a"), add(&board, "b"));
        let mut streams = [Sent::default(), Sent::default()];
        for uid in ["a", "b"] {
            acknowledge(&board, uid, ACK);
        }
        for sent in &mut streams {
            assert_eq!(kinds(&board.due(sent, false)), ["traffic", "ack", "traffic", "ack"]);
        }
        accept(&a);
        let held = b.hold(Instant::now(), 9).unwrap();
        for sent in &mut streams {
            let told = board.due(sent, false);
            assert!(matches!(&told[..], [ResolverMessage::Traffic { uid, held: 1, .. }] if uid == "b"), "{told:?}");
        }
        drop(held);
        for sent in &mut streams {
            let told = board.due(sent, true);
            assert!(
                matches!(
                    &told[..],
                    [ResolverMessage::Traffic { accepted: 1, .. }, ResolverMessage::Traffic { held: 0, .. }]
                ),
                "{told:?}"
            );
            assert!(board.due(sent, true).is_empty());
        }
    }

    /// One Service after the other has news, as ever more of them are there: what streams look at does not grow with them.
    #[test]
    fn what_is_looked_at_for_news_does_not_grow_with_the_number_of_services() {
        for services in [10, 1000] {
            let board = Board::default();
            let all: Vec<_> = (0..services).map(|number| add(&board, &number.to_string())).collect();
            board.acknowledge((0..services).map(|number| (number.to_string(), ACK, None)));
            let mut streams = [Sent::default(), Sent::default()];
            for sent in &mut streams {
                assert_eq!(board.due(sent, false).len(), 2 * services);
            }
            for service in &all[..10] {
                accept(service);
                let revision = board.entries().latest;
                acknowledge(&board, "0", Ack { revision, ..ACK });
                for sent in &mut streams {
                    let looked_at = board.concerned(&mut board.entries(), sent, true);
                    assert!(looked_at.len() <= 2, "{looked_at:?}");
                }
            }
        }
    }

    #[test]
    fn a_service_that_comes_again_is_a_new_one_and_nothing_is_kept_of_those_that_are_gone() {
        let (board, mut sent) = (Board::default(), Sent::default());
        for round in 0..3 {
            let service = add(&board, "a");
            acknowledge(&board, "a", ACK);
            assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic", "ack"], "round {round}");
            accept(&service);
            assert!(board.due(&mut sent, false).is_empty(), "it can wait");
            board.remove("a");
        }
        assert!(board.due(&mut sent, true).is_empty());
        assert!(sent.of.is_empty() && sent.later.is_empty());
        let entries = board.entries();
        assert!(entries.order.is_empty() && entries.services.is_empty() && entries.numbers.is_empty());
    }

    #[test]
    fn a_stream_that_begins_tells_what_is_as_asked_in_one_message_and_the_rest_one_by_one() {
        let board = Board::default();
        let services: Vec<_> = (0..3000).map(|number| add(&board, &number.to_string())).collect();
        for number in 0..3000 {
            as_asked(&board, &number.to_string(), number);
        }
        acknowledge(&board, "7", Ack { listening: false, ..ACK });
        accept(&services[8]);
        let mut sent = Sent::opening();
        assert!(board.due(&mut sent, true).is_empty(), "the operator has not spoken");
        sent.greeted(true);
        assert!(board.due(&mut sent, true).is_empty(), "no snapshot is in effect");
        board.settled();
        let told = board.due(&mut sent, false);
        let [ResolverMessage::Traffic { accepted: 1, .. }, ResolverMessage::InEffect { parts }, ..] = &told[..] else {
            panic!("{told:?}");
        };
        let with_7: Vec<u64> = (0..3000).filter(|number| part(&number.to_string()) == part("7")).collect();
        let mut expected = BTreeMap::<u16, u64>::new();
        for number in (0..3000).filter(|number| !with_7.contains(number)) {
            *expected.entry(part(&number.to_string())).or_default() += number;
        }
        assert_eq!(parts, &expected.into_iter().collect::<Vec<_>>());
        let acknowledged: BTreeSet<u64> = told
            .iter()
            .filter_map(|message| match message {
                ResolverMessage::Ack { uid, .. } => uid.parse().ok(),
                _ => None,
            })
            .collect();
        assert_eq!(acknowledged, with_7.iter().copied().collect());
        assert_eq!(told.len(), 2 + 2 * with_7.len());
        assert!(board.due(&mut sent, true).is_empty());

        board.unclear(&mut sent, &[part("9")]);
        let with_9 = (0..3000).filter(|number| part(&number.to_string()) == part("9")).count();
        assert_eq!(board.due(&mut sent, false).len(), 2 * with_9);
        assert!(board.due(&mut sent, true).is_empty());
    }

    #[test]
    fn an_operator_that_understands_no_summaries_is_told_each_and_a_held_connection_waits_for_neither() {
        let board = Board::default();
        let (_a, b) = (add(&board, "a"), add(&board, "b"));
        as_asked(&board, "a", 1);
        as_asked(&board, "b", 2);
        board.settled();
        for summaries in [false, true] {
            let mut sent = Sent::opening();
            let held = b.hold(Instant::now(), 9).unwrap();
            assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic", "ack"]);
            sent.greeted(summaries);
            let told = kinds(&board.due(&mut sent, false));
            assert_eq!(told, if summaries { vec!["summary"] } else { vec!["traffic", "ack"] });
            drop(held);
            assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic"]);
            assert!(board.due(&mut sent, true).is_empty());
        }
    }

    #[test]
    fn activity_is_told_at_heartbeats_as_long_as_there_are_pods() {
        let (board, mut sent) = (Board::default(), Sent::default());
        add(&board, "a");
        let of = |endpoints| {
            let (last, interval) = (Instant::now(), Duration::ZERO);
            let activity = Activity { endpoints, open: Some(0), opened: 0, last, interval, unknown: None };
            BTreeMap::from([("a".to_owned(), activity)])
        };
        board.observe(of(1));
        assert!(board.due(&mut sent, true).is_empty(), "not in effect");
        acknowledge(&board, "a", ACK);
        assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic", "ack"]);
        assert_eq!(kinds(&board.due(&mut sent, true)), ["other"]);
        board.observe(BTreeMap::new());
        assert!(board.due(&mut sent, true).is_empty());
        board.observe(of(2));
        assert_eq!(kinds(&board.due(&mut sent, true)), ["other"]);
    }

    /// Keeps out B4: up to 3 s until readiness is noticed.
    #[test]
    fn the_first_and_the_last_held_connection_cannot_wait_other_traffic_can() {
        let mut sent = SentOfOne::default();
        sent.due("a", &ACK, traffic(0, 0), true);
        assert!(sent.due("a", &ACK, traffic(0, 1), false).is_empty());
        assert_eq!(kinds(&sent.due("a", &ACK, traffic(1, 2), false)), ["traffic"]);
        assert!(sent.due("a", &ACK, traffic(2, 3), false).is_empty());
        assert_eq!(kinds(&sent.due("a", &ACK, traffic(0, 3), false)), ["traffic"]);
    }

    #[test]
    fn what_is_in_effect_is_told_at_once_and_nothing_before() {
        let (board, mut nothing) = (Board::default(), Sent::default());
        accept(&add(&board, "a"));
        assert!(board.due(&mut nothing, true).is_empty());
        let mut sent = SentOfOne::default();
        sent.due("a", &ACK, traffic(0, 0), false);
        let redirecting = Ack { redirecting: true, ..ACK };
        assert_eq!(kinds(&sent.due("a", &redirecting, traffic(0, 0), false)), ["ack"]);
        let holding = Ack { holding: true, ..redirecting };
        assert_eq!(kinds(&sent.due("a", &holding, traffic(0, 1), false)), ["traffic", "ack"]);
    }

    #[test]
    fn activity_is_told_when_it_is_news_and_else_every_two_seconds_while_there_is_any() {
        let (start, mut sent) = (Instant::now(), SentOfOne::default());
        let interval = Duration::ZERO;
        let activity = Activity { endpoints: 1, open: Some(0), opened: 0, last: start, interval, unknown: None };
        let told = sent.activity_due("a", &activity, start + ACTIVITY_INTERVAL);
        assert!(matches!(told, Some(ResolverMessage::Activity { idle_ms: 2000, .. })), "{told:?}");
        let later = start + ACTIVITY_INTERVAL * 100;
        assert_eq!(sent.activity_due("a", &activity, later), None, "nothing has happened");
        let used = Activity { opened: 1, last: later, ..activity.clone() };
        assert!(sent.activity_due("a", &used, later).is_some());
        let again = Activity { opened: 2, ..used.clone() };
        assert_eq!(sent.activity_due("a", &again, later + ACTIVITY_INTERVAL / 2), None);
        assert!(sent.activity_due("a", &again, later + ACTIVITY_INTERVAL).is_some());
        let rarely = Activity { opened: 3, interval: ACTIVITY_INTERVAL * 2, ..again.clone() };
        let again_at = later + ACTIVITY_INTERVAL;
        assert_eq!(sent.activity_due("a", &rarely, again_at + ACTIVITY_INTERVAL), None);
        assert!(sent.activity_due("a", &rarely, again_at + ACTIVITY_INTERVAL * 2).is_some());
        let unknown = Some("x".to_owned());
        for news in [
            Activity { unknown, ..again.clone() },
            Activity { endpoints: 2, ..again.clone() },
            Activity { open: None, ..again },
        ] {
            assert!(sent.activity_due("a", &news, later + ACTIVITY_INTERVAL).is_some(), "{news:?}");
        }
    }

    /// A thousand nodes, ten thousand ElastiServices with three pods each, all of them busy at any moment, and two operators.
    #[test]
    fn reports_of_a_large_cluster_are_below_a_megabyte_a_second() {
        const NODES: usize = 1000;
        const OPERATORS: usize = 2;
        const FOLLOWED: u32 = 30;
        const SECONDS: u32 = 300;
        /// The default.
        const COOLDOWN: Duration = Duration::from_mins(15);
        // A frame of HTTP/2 has 9 bytes, a record of TLS 1.3 has 22 besides what is in it.
        const FRAMING: usize = 9 + 22;
        let length = |message: &ResolverMessage| encode(message).unwrap().len() + FRAMING;
        let start = Instant::now();
        let interval = report_interval(COOLDOWN);
        let mut sent: Vec<SentOfOne> = (0..FOLLOWED).map(|_| SentOfOne::default()).collect();
        let uid = |number: usize| format!("01234567-89ab-cdef-0123-{number:012}");
        let mut bytes = 0;
        for beat in 1..=SECONDS * 2 {
            let now = start + HEARTBEAT_INTERVAL * beat;
            bytes += length(&ResolverMessage::Heartbeat);
            for (number, sent) in sent.iter_mut().enumerate() {
                let opened = 1_000_000_000 + u64::from(beat);
                let activity =
                    Activity { endpoints: u64::MAX, open: Some(99_999), opened, last: now, interval, unknown: None };
                bytes += sent.activity_due(&uid(number), &activity, now).iter().map(length).sum::<usize>();
            }
        }
        let all = bytes * NODES * OPERATORS / SECONDS as usize;
        assert!(all < 1_000_000, "{all} bytes a second");
        assert!(all > 300_000, "{all} bytes a second: something was left out");
    }

    #[test]
    fn streams_learn_at_once_of_what_is_newly_in_effect() {
        let board = Board::default();
        let mut news = board.follow();
        add(&board, "a");
        acknowledge(&board, "a", ACK);
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        acknowledge(&board, "a", ACK);
        assert!(!news.has_changed().unwrap());
        assert_eq!(kinds(&board.due(&mut Sent::default(), false)), ["traffic", "ack"]);
    }
}
