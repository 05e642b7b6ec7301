//! What flows back to the operators: for each ElastiService what is in effect, and its traffic. States, not events: a
//! stream compares them with what it has sent, so that none is lost and a new stream tells all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::message::{ACTIVITY_INTERVAL, ResolverMessage};
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

/// Tells every stream to look at once. The value says whether the resolver is leaving.
#[derive(Clone, Debug)]
pub struct News(watch::Sender<bool>);

impl News {
    /// Something has happened that cannot wait for the next heartbeat.
    pub fn tell(&self) {
        self.0.send_modify(|_| {});
    }
}

#[derive(Debug)]
struct Entry {
    service: Arc<Service>,
    ack: Option<Ack>,
    activity: Option<Activity>,
}

/// The present state of every ElastiService; clones share it.
#[derive(Clone, Debug)]
pub struct Board {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    news: News,
}

impl Default for Board {
    fn default() -> Self {
        Self { entries: Arc::default(), news: News(watch::Sender::new(false)) }
    }
}

impl Board {
    /// For those who have news.
    pub fn news(&self) -> News {
        self.news.clone()
    }

    /// Follows the news; the value says whether the resolver is leaving.
    pub fn follow(&self) -> watch::Receiver<bool> {
        self.news.0.subscribe()
    }

    /// The resolver is about to stop.
    pub fn leave(&self) {
        self.news.0.send_replace(true);
    }

    /// Whether the resolver is about to stop.
    pub fn leaving(&self) -> bool {
        *self.news.0.borrow()
    }

    /// Adds a Service that nothing is in effect of yet.
    pub fn add(&self, uid: &str, service: Arc<Service>) {
        self.entries().insert(uid.to_owned(), Entry { service, ack: None, activity: None });
    }

    /// All Services.
    pub fn services(&self) -> Vec<Arc<Service>> {
        self.entries().values().map(|entry| Arc::clone(&entry.service)).collect()
    }

    /// Takes a Service out.
    pub fn remove(&self, uid: &str) {
        self.entries().remove(uid);
    }

    /// Says what is in effect; streams learn at once of what is new.
    pub fn acknowledge(&self, acks: impl IntoIterator<Item = (String, Ack)>) {
        let mut changed = false;
        {
            let mut entries = self.entries();
            for (uid, ack) in acks {
                if let Some(entry) = entries.get_mut(&uid)
                    && entry.ack.as_ref() != Some(&ack)
                {
                    entry.ack = Some(ack);
                    changed = true;
                }
            }
        }
        if changed {
            self.news.tell();
        }
    }

    /// Says what the connections to pods do; nothing of those ElastiServices that `activity` lacks.
    pub fn observe(&self, mut activity: BTreeMap<String, Activity>) {
        for (uid, entry) in self.entries().iter_mut() {
            entry.activity = activity.remove(uid);
        }
    }

    /// The operators have been sent the news that connections of `uid` are held.
    pub fn notified(&self, uid: &str) {
        if let Some(entry) = self.entries().get(uid) {
            entry.service.notified();
        }
    }

    /// What `sent` lacks: everything at a heartbeat (`regular`), else what cannot wait.
    pub fn due(&self, sent: &mut Sent, regular: bool) -> Vec<ResolverMessage> {
        let entries = self.entries();
        if regular {
            sent.0.retain(|uid, _| entries.contains_key(uid));
        }
        let now = Instant::now();
        let mut due = Vec::new();
        for (uid, entry) in entries.iter() {
            due.extend(sent.due(uid, entry.ack.as_ref(), entry.service.traffic(), regular));
            due.extend(entry.activity.as_ref().filter(|_| regular).and_then(|it| sent.activity_due(uid, it, now)));
        }
        due
    }

    /// No code panics while it holds the lock.
    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one stream has sent.
#[derive(Debug, Default)]
pub struct Sent(BTreeMap<String, SentOfOne>);

#[derive(Debug, Default)]
struct SentOfOne {
    ack: Option<Ack>,
    traffic: Option<Traffic>,
    /// And when.
    activity: Option<(Activity, Instant)>,
}

impl Sent {
    fn due(&mut self, uid: &str, ack: Option<&Ack>, traffic: Traffic, regular: bool) -> Vec<ResolverMessage> {
        // Nothing is said of an ElastiService before it is in effect.
        let Some(ack) = ack else { return Vec::new() };
        let SentOfOne { ack: sent_ack, traffic: sent_traffic, .. } = self.0.entry(uid.to_owned()).or_default();
        let mut due = Vec::new();
        let acknowledges = sent_ack.as_ref() != Some(ack);
        let edge = sent_traffic.is_none_or(|sent| (sent.held == 0) != (traffic.held == 0));
        // An acknowledgement may mean that nothing has come: what has is said first.
        if edge || (regular || acknowledges) && *sent_traffic != Some(traffic) {
            *sent_traffic = Some(traffic);
            let Traffic { held, forwarding, accepted } = traffic;
            due.push(ResolverMessage::Traffic { uid: uid.to_owned(), held, forwarding, accepted });
        }
        if acknowledges {
            *sent_ack = Some(ack.clone());
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
        let sent = self.0.get_mut(uid)?;
        // Nothing is said of an ElastiService before it is in effect.
        sent.ack.as_ref()?;
        let interval = activity.interval.max(ACTIVITY_INTERVAL);
        let due = sent.activity.as_ref().is_none_or(|(before, at)| {
            activity.is_news(before) || (activity != before && now.saturating_duration_since(*at) >= interval)
        });
        if !due {
            return None;
        }
        sent.activity = Some((activity.clone(), now));
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
            _ => "other",
        };
        due.iter().map(kind).collect()
    }

    #[test]
    fn a_new_stream_tells_all_once() {
        let mut sent = Sent::default();
        assert_eq!(kinds(&sent.due("a", Some(&ACK), traffic(0, 0), false)), ["traffic", "ack"]);
        assert!(sent.due("a", Some(&ACK), traffic(0, 0), true).is_empty());
    }

    /// Keeps out B4: up to 3 s until readiness is noticed.
    #[test]
    fn the_first_and_the_last_held_connection_cannot_wait_other_traffic_can() {
        let mut sent = Sent::default();
        sent.due("a", Some(&ACK), traffic(0, 0), true);
        assert!(sent.due("a", Some(&ACK), traffic(0, 1), false).is_empty());
        assert_eq!(kinds(&sent.due("a", Some(&ACK), traffic(1, 2), false)), ["traffic"]);
        assert!(sent.due("a", Some(&ACK), traffic(2, 3), false).is_empty());
        assert_eq!(kinds(&sent.due("a", Some(&ACK), traffic(0, 3), false)), ["traffic"]);
    }

    #[test]
    fn what_is_in_effect_is_told_at_once_and_nothing_before() {
        let mut sent = Sent::default();
        assert!(sent.due("a", None, traffic(1, 1), true).is_empty());
        sent.due("a", Some(&ACK), traffic(0, 0), false);
        let redirecting = Ack { redirecting: true, ..ACK };
        assert_eq!(kinds(&sent.due("a", Some(&redirecting), traffic(0, 0), false)), ["ack"]);
        let holding = Ack { holding: true, ..redirecting };
        assert_eq!(kinds(&sent.due("a", Some(&holding), traffic(0, 1), false)), ["traffic", "ack"]);
    }

    #[test]
    fn activity_is_told_when_it_is_news_and_else_every_two_seconds_while_there_is_any() {
        let (start, mut sent) = (Instant::now(), Sent::default());
        let interval = Duration::ZERO;
        let activity = Activity { endpoints: 1, open: Some(0), opened: 0, last: start, interval, unknown: None };
        assert_eq!(sent.activity_due("a", &activity, start), None, "not in effect");
        sent.due("a", Some(&ACK), traffic(0, 0), true);
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
        let mut sent = Sent::default();
        let uid = |number: u32| format!("01234567-89ab-cdef-0123-{number:012}");
        for number in 0..FOLLOWED {
            sent.due(&uid(number), Some(&ACK), traffic(0, 0), true);
        }
        let mut bytes = 0;
        for beat in 1..=SECONDS * 2 {
            let now = start + HEARTBEAT_INTERVAL * beat;
            bytes += length(&ResolverMessage::Heartbeat);
            for number in 0..FOLLOWED {
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
        let (board, metrics) = (Board::default(), Metrics::new(&prometheus::Registry::new()).unwrap());
        let mut news = board.follow();
        board.add("a", Arc::new(Service::new("n", "s", metrics, board.news())));
        board.acknowledge([("a".to_owned(), ACK)]);
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        board.acknowledge([("a".to_owned(), ACK)]);
        assert!(!news.has_changed().unwrap());
        assert_eq!(kinds(&board.due(&mut Sent::default(), false)), ["traffic", "ack"]);
    }
}
