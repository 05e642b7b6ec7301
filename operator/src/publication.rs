//! What resolvers shall know: the current state of every ElastiService, and a feed of it for each stream.
//!
//! A feed is a place in one common log in which every ElastiService has a single entry, moved to the end when it
//! changes. So a slow stream costs no memory, skips states that are outdated before they are sent, and each state is
//! encoded once, however many resolvers there are. Written by the controller, read by [`crate::elastiserver`]. No I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use elasti_api::message::{Asked, OperatorMessage, ServiceState, encode};
use elasti_api::summary::{PARTS, Summary, fingerprint, part};
use tokio::sync::watch;

use crate::pods::PODS;

/// Removals that are kept for streams that have not sent them yet. A stream that is further behind than this is ended;
/// its successor starts with a snapshot.
const REMOVALS: usize = 4096;

/// The most backends that are told of one port. A resolver forwards what one node's clients have waited for; it does
/// not need more to spread that.
const BACKENDS_PER_PORT: usize = 1000;

/// The most backends that are told of one ElastiService: at up to 52 bytes each, half of the longest line that a
/// reader accepts ([`elasti_api::message::MAX_LINE`]).
const BACKENDS: usize = 40_000;

/// For every so many backends that there is room for, one draining address and its pod are told: pods of one Service rarely
/// end in hundreds, and those that are left out are only not redirected.
const BACKENDS_PER_DRAINING: usize = 10;

/// The state of all ElastiServices and of this replica.
#[derive(Debug)]
pub struct Publication {
    replica: String,
    log: Mutex<Log>,
    status: watch::Sender<Status>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Status {
    latest: u64,
    synced: bool,
    speaker: Speaker,
}

/// Whether this replica leads, as every heartbeat says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Speaker {
    leader: bool,
    epoch: u64,
}

#[derive(Debug)]
struct Log {
    latest: u64,
    entries: BTreeMap<u64, Entry>,
    /// Where the entry of each ElastiService is, by UID; removed ones are not here.
    positions: HashMap<String, u64>,
    /// What the entries are that are not removed.
    summary: Summary,
    /// And which they are, by part.
    parts: Vec<BTreeSet<String>>,
    /// What they ask, by part, once somebody has wanted to know: after a restart every resolver does.
    asked: HashMap<u16, Arc<[(String, Asked)]>>,
    /// The end of a whole snapshot, and up to where it is one.
    end: Option<(u64, Bytes)>,
    removals: VecDeque<u64>,
    /// Position of the newest removal that has been dropped.
    dropped: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            latest: 0,
            entries: BTreeMap::new(),
            positions: HashMap::new(),
            summary: Summary::default(),
            parts: vec![BTreeSet::new(); PARTS],
            asked: HashMap::new(),
            end: None,
            removals: VecDeque::new(),
            dropped: 0,
        }
    }
}

#[derive(Debug)]
struct Entry {
    uid: String,
    part: u16,
    /// Of the line.
    fingerprint: u64,
    /// `None` once removed.
    state: Option<ServiceState>,
    line: Bytes,
}

/// A line for a resolver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The message, newline included.
    pub bytes: Bytes,
    /// UID of the ElastiService that it says is gone.
    pub removed: Option<String>,
}

/// Why a feed has ended.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The stream is too slow.
    #[error("the resolver is more than {REMOVALS} removals behind")]
    Behind,
    /// A message cannot be written as JSON.
    #[error("a message cannot be encoded: {0}")]
    Encode(#[from] serde_json::Error),
    /// The operator is ending.
    #[error("the operator is ending")]
    Ended,
}

impl Publication {
    /// Nothing is published yet; `replica` is the name of this pod.
    pub fn new(replica: String) -> Self {
        Self { replica, log: Mutex::default(), status: watch::Sender::default() }
    }

    /// Tells resolvers a state, unless it is the one that they have been told.
    pub fn publish(&self, state: ServiceState) {
        let state = trimmed(state);
        let mut log = self.log();
        let position = log.positions.get(&state.uid).copied();
        let told = position.and_then(|position| log.entries.get(&position)).and_then(|entry| entry.state.as_ref());
        if told == Some(&state) {
            return;
        }
        let line: Bytes = match encode(&OperatorMessage::Service(Box::new(state.clone()))) {
            Ok(line) => line.into(),
            Err(error) => {
                tracing::error!(uid = state.uid, %error, "a state cannot be encoded and is not told to resolvers");
                return;
            }
        };
        let (uid, part, fingerprint) = (state.uid.clone(), part(&state.uid), fingerprint(&line));
        let at = log.append(Entry { uid: uid.clone(), part, fingerprint, state: Some(state), line });
        log.summary.add(part, fingerprint);
        if let Some(uids) = log.parts.get_mut(usize::from(part)) {
            uids.insert(uid.clone());
        }
        log.positions.insert(uid, at);
        drop(log);
        self.status.send_modify(|status| status.latest = at);
    }

    /// Tells resolvers that an ElastiService is gone, if they have been told of it.
    pub fn remove(&self, uid: &str) {
        let Ok(line) = encode(&OperatorMessage::Remove { uid: uid.to_owned() }) else { return };
        let mut log = self.log();
        if !log.positions.contains_key(uid) {
            return;
        }
        let part = part(uid);
        let at = log.append(Entry { uid: uid.to_owned(), part, fingerprint: 0, state: None, line: line.into() });
        if let Some(uids) = log.parts.get_mut(usize::from(part)) {
            uids.remove(uid);
        }
        log.positions.remove(uid);
        log.removals.push_back(at);
        if log.removals.len() > REMOVALS
            && let Some(oldest) = log.removals.pop_front()
        {
            log.entries.remove(&oldest);
            log.dropped = oldest;
        }
        drop(log);
        self.status.send_modify(|status| status.latest = at);
    }

    /// The caches are filled and everything in them has been published. Streams wait for it: a snapshot of half-filled
    /// caches would make resolvers forget.
    pub fn set_synced(&self) {
        self.status.send_modify(|status| status.synced = true);
    }

    /// Whether this replica holds the Lease, and the Lease's epoch.
    pub fn set_leader(&self, leader: bool, epoch: u64) {
        self.status.send_modify(|status| status.speaker = Speaker { leader, epoch });
    }

    /// A feed that starts with a snapshot; waits until there can be one. Cancel safe.
    pub async fn follow(self: Arc<Self>) -> Result<Feed, FeedError> {
        let mut status = self.status.subscribe();
        let speaker = status.wait_for(|status| status.synced).await.map_err(|_| FeedError::Ended)?.speaker;
        let start = self.log().dropped;
        let known = Known::default();
        Ok(Feed { publication: self, status, place: 0, start, known, speaker, greeted: false, snapshot_due: true })
    }

    /// What the states of a part ask, by UID, if `summary` is theirs; `None` if other ones hold.
    pub fn asked(&self, part: u16, summary: u64) -> Option<Arc<[(String, Asked)]>> {
        let log = &mut *self.log();
        if log.summary.of(part) != summary {
            return None;
        }
        let uids = log.parts.get(usize::from(part))?;
        let asked = log.asked.entry(part).or_insert_with(|| {
            let state = |uid: &String| log.entries.get(log.positions.get(uid)?)?.state.as_ref();
            uids.iter().filter_map(|uid| Some((uid.clone(), state(uid)?.asks()))).collect()
        });
        Some(Arc::clone(asked))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // A panic between two steps of a change could only leave an entry too many, which a snapshot corrects.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log {
    /// Adds the newest entry of an ElastiService and drops its old one.
    fn append(&mut self, entry: Entry) -> u64 {
        if let Some(old) = self.positions.get(&entry.uid).and_then(|old| self.entries.remove(old)) {
            self.summary.remove(old.part, old.fingerprint);
        }
        self.asked.remove(&entry.part);
        self.latest += 1;
        self.entries.insert(self.latest, entry);
        self.latest
    }

    /// The line that ends a snapshot of all, made once for all streams.
    fn end(&mut self) -> Result<Bytes, FeedError> {
        if let Some((latest, line)) = &self.end
            && *latest == self.latest
        {
            return Ok(line.clone());
        }
        let uids = self.parts.iter().flatten().cloned().collect();
        let line: Bytes = encode(&OperatorMessage::SnapshotEnd { uids, unchanged: vec![] })?.into();
        self.end = Some((self.latest, line.clone()));
        Ok(line)
    }
}

/// A state with no more backends than a line holds.
fn trimmed(mut state: ServiceState) -> ServiceState {
    let room = BACKENDS_PER_PORT.min(BACKENDS / state.ports.len().max(1));
    for port in &mut state.ports {
        port.backends.truncate(room);
        port.draining.truncate(room / BACKENDS_PER_DRAINING);
    }
    state.starting.truncate(PODS);
    state.draining_pods.truncate(BACKENDS / BACKENDS_PER_DRAINING);
    state
}

/// What one stream has to send, in order: Hello, all states, the end of the snapshot, then what changes.
#[derive(Debug)]
pub struct Feed {
    publication: Arc<Publication>,
    status: watch::Receiver<Status>,
    /// Position of the last entry sent.
    place: u64,
    /// Removals up to here were dropped before the feed began; its snapshot does without them.
    start: u64,
    /// What its snapshot does without.
    known: Known,
    /// What the resolver has been told of this replica.
    speaker: Speaker,
    greeted: bool,
    snapshot_due: bool,
}

/// What a resolver knew already when it connected.
#[derive(Debug, Default)]
struct Known {
    /// Up to this position.
    place: u64,
    /// In these parts; none of an empty set.
    parts: BTreeSet<u16>,
}

impl Known {
    fn has(&self, place: u64, entry: &Entry) -> bool {
        place <= self.place && self.parts.contains(&entry.part)
    }
}

impl Feed {
    /// The resolver has said that it knows these states: where they are what holds, the snapshot does without. To be called before
    /// the first line is taken.
    pub fn resume(&mut self, known: &Summary) {
        let log = self.publication.log();
        self.known = Known { place: log.latest, parts: log.summary.same(known).collect() };
        if self.known.parts.len() == PARTS {
            self.place = log.latest;
        }
    }

    /// The next line; waits for one. Cancel safe: a line is either returned or still to come.
    pub async fn next(&mut self) -> Result<Line, FeedError> {
        loop {
            let status = *self.status.borrow_and_update();
            let next = self.due(status.speaker)?;
            match next {
                Some(line) => return Ok(line),
                None => self.status.changed().await.map_err(|_| FeedError::Ended)?,
            }
        }
    }

    /// The next line if there is one at this moment.
    pub fn ready(&mut self) -> Result<Option<Line>, FeedError> {
        let speaker = self.status.borrow_and_update().speaker;
        self.due(speaker)
    }

    /// A heartbeat with what is so now.
    pub fn heartbeat(&mut self) -> Result<Bytes, FeedError> {
        let speaker = self.status.borrow().speaker;
        self.introduce(speaker);
        let Speaker { leader, epoch } = speaker;
        Ok(encode(&OperatorMessage::Heartbeat { leader, epoch })?.into())
    }

    fn due(&mut self, speaker: Speaker) -> Result<Option<Line>, FeedError> {
        if !self.greeted {
            self.greeted = true;
            let Speaker { leader, epoch } = self.speaker;
            let replica = self.publication.replica.clone();
            return line(&OperatorMessage::Hello { replica, leader, epoch, summaries: true }).map(Some);
        }
        if speaker != self.speaker {
            return Ok(Some(Line { bytes: self.heartbeat()?, removed: None }));
        }
        let mut log = self.publication.log();
        if log.dropped > self.place.max(self.start) {
            return Err(FeedError::Behind);
        }
        let mut behind = log.entries.range(self.place + 1..);
        if let Some((place, entry)) = behind.find(|(place, entry)| !self.known.has(**place, entry)) {
            self.place = *place;
            let removed = entry.state.is_none().then(|| entry.uid.clone());
            return Ok(Some(Line { bytes: entry.line.clone(), removed }));
        }
        self.place = log.latest;
        if self.snapshot_due {
            self.snapshot_due = false;
            let unchanged: Vec<u16> = std::mem::take(&mut self.known.parts).into_iter().collect();
            if unchanged.is_empty() {
                return Ok(Some(Line { bytes: log.end()?, removed: None }));
            }
            let parts = (0..).zip(&log.parts).filter(|(part, _)| unchanged.binary_search(part).is_err());
            let uids = parts.flat_map(|(_, uids)| uids).cloned().collect();
            return line(&OperatorMessage::SnapshotEnd { uids, unchanged }).map(Some);
        }
        Ok(None)
    }

    /// A replica that has become the leader says again what there is: only a leader's word removes the rest.
    fn introduce(&mut self, speaker: Speaker) {
        self.snapshot_due |= speaker.leader && speaker != self.speaker;
        self.speaker = speaker;
    }
}

fn line(message: &OperatorMessage) -> Result<Line, FeedError> {
    Ok(Line { bytes: encode(message)?.into(), removed: None })
}

#[cfg(test)]
mod tests;
