//! What the operators have said: the newest state of every ElastiService. Pure: messages in, names of what changed out.
//!
//! Invariants: a state never gives way to one of a lower revision; a removed UID does not come back; what one replica
//! does not know is removed only on the word of the leader; nothing is removed because a stream broke.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use elasti_api::message::{OperatorMessage, ServiceState};
use elasti_api::summary::{Summary, part};

/// How many removed UIDs are remembered. A replica whose watch lags may repeat a removed ElastiService; within its lag,
/// seconds as a rule, far fewer are removed.
const REMEMBERED: usize = 4096;

/// Who sends, as its latest Hello or Heartbeat said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speaker {
    /// Whether it holds the Lease.
    pub leader: bool,
    /// The Lease's epoch as it knows it.
    pub epoch: u64,
}

#[derive(Debug)]
struct Known {
    state: Arc<ServiceState>,
    /// Of the line by which it came.
    fingerprint: u64,
}

/// The newest state of every ElastiService, by UID.
#[derive(Debug, Default)]
pub struct Directory {
    services: BTreeMap<Arc<str>, Known>,
    summary: Summary,
    /// In the order of their removal.
    removed: VecDeque<String>,
    is_removed: HashSet<String>,
    epoch: u64,
    synced: bool,
}

impl Directory {
    /// The state of this ElastiService.
    pub fn get(&self, uid: &str) -> Option<&Arc<ServiceState>> {
        self.services.get(uid).map(|known| &known.state)
    }

    /// The fingerprint of the line by which this state came.
    pub fn fingerprint(&self, uid: &str) -> Option<u64> {
        self.services.get(uid).map(|known| known.fingerprint)
    }

    /// Of all states.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Whether any replica has completed a snapshot.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Takes a message in, and the fingerprint of its line. Returns the UIDs whose state is another one now, or gone.
    pub fn apply(&mut self, from: Speaker, message: OperatorMessage, fingerprint: u64) -> BTreeSet<Arc<str>> {
        match message {
            OperatorMessage::Hello { epoch, .. } | OperatorMessage::Heartbeat { epoch, .. } => {
                self.epoch = self.epoch.max(epoch);
                BTreeSet::new()
            }
            // For streams.
            OperatorMessage::Unclear { .. } => BTreeSet::new(),
            OperatorMessage::Service(state) => self.set(*state, fingerprint),
            OperatorMessage::Remove { uid } => self.remove(&uid),
            OperatorMessage::SnapshotEnd { uids, unchanged } => {
                self.synced = true;
                if from.leader && from.epoch >= self.epoch {
                    self.keep(&uids.into_iter().collect(), &unchanged.into_iter().collect())
                } else {
                    BTreeSet::new()
                }
            }
        }
    }

    fn set(&mut self, state: ServiceState, fingerprint: u64) -> BTreeSet<Arc<str>> {
        let state = compact(state);
        let old = self.get(&state.uid);
        let no_news = old.is_some_and(|old| old.revision > state.revision || **old == state);
        if no_news || self.is_removed.contains(&state.uid) {
            return BTreeSet::new();
        }
        let known = self.services.get_key_value(&*state.uid);
        let uid = known.map_or_else(|| Arc::from(&*state.uid), |(uid, _)| Arc::clone(uid));
        let known = Known { state: Arc::new(state), fingerprint };
        let before = self.services.insert(Arc::clone(&uid), known);
        self.sum(&uid, before.map(|before| before.fingerprint), Some(fingerprint));
        BTreeSet::from([uid])
    }

    fn remove(&mut self, uid: &str) -> BTreeSet<Arc<str>> {
        let known = self.services.remove_entry(uid);
        if let Some((uid, known)) = &known {
            self.sum(uid, Some(known.fingerprint), None);
        }
        if self.is_removed.insert(uid.to_owned()) {
            self.removed.push_back(uid.to_owned());
            let excess = self.removed.len().saturating_sub(REMEMBERED);
            for forgotten in self.removed.drain(..excess) {
                self.is_removed.remove(&forgotten);
            }
        }
        known.into_iter().map(|(uid, _)| uid).collect()
    }

    /// Keeps those that are named, and the parts that the snapshot was not about.
    ///
    /// Not remembered as removed: another replica may have told of a new ElastiService that the leader's own cache
    /// does not have yet, and it must be able to come back.
    fn keep(&mut self, named: &BTreeSet<String>, unchanged: &BTreeSet<u16>) -> BTreeSet<Arc<str>> {
        let kept = |uid: &str| named.contains(uid) || (!unchanged.is_empty() && unchanged.contains(&part(uid)));
        let gone: Vec<(Arc<str>, Known)> = self.services.extract_if(.., |uid, _| !kept(uid)).collect();
        for (uid, known) in &gone {
            self.sum(uid, Some(known.fingerprint), None);
        }
        gone.into_iter().map(|(uid, _)| uid).collect()
    }

    fn sum(&mut self, uid: &str, before: Option<u64>, fingerprint: Option<u64>) {
        let part = part(uid);
        if let Some(before) = before {
            self.summary.remove(part, before);
        }
        if let Some(fingerprint) = fingerprint {
            self.summary.add(part, fingerprint);
        }
    }
}

/// Lists that were read grow by doubling, from four on; most have one element, and there are tens of thousands of them. The name of
/// the ElastiService is of no use here: its UID and its Service are.
fn compact(mut state: ServiceState) -> ServiceState {
    state.name = String::new();
    state.ports.shrink_to_fit();
    state.cluster_ips.shrink_to_fit();
    state.fallback.shrink_to_fit();
    for port in &mut state.ports {
        port.backends.shrink_to_fit();
        port.draining.shrink_to_fit();
    }
    state
}

#[cfg(test)]
mod tests {
    use elasti_api::message::encode;
    use elasti_api::summary::fingerprint;

    use super::*;
    use crate::testing::service_state;

    const LEADER: Speaker = Speaker { leader: true, epoch: 2 };
    const FOLLOWER: Speaker = Speaker { leader: false, epoch: 2 };

    fn service(uid: &str, revision: u64, interception_port: u16) -> OperatorMessage {
        OperatorMessage::Service(Box::new(service_state(uid, revision, interception_port)))
    }

    fn snapshot_end(uids: &[&str]) -> OperatorMessage {
        OperatorMessage::SnapshotEnd { uids: uids.iter().map(ToString::to_string).collect(), unchanged: vec![] }
    }

    fn remove(uid: &str) -> OperatorMessage {
        OperatorMessage::Remove { uid: uid.into() }
    }

    fn apply(directory: &mut Directory, from: Speaker, message: OperatorMessage) -> BTreeSet<Arc<str>> {
        let of_line = fingerprint(&encode(&message).unwrap());
        let changed = directory.apply(from, message, of_line);
        let mut summary = Summary::default();
        for Known { state, .. } in directory.services.values() {
            let state = ServiceState { name: state.uid.clone(), ..(**state).clone() };
            let line = encode(&OperatorMessage::Service(Box::new(state.clone()))).unwrap();
            summary.add(part(&state.uid), fingerprint(&line));
        }
        assert_eq!(directory.summary(), &summary);
        changed
    }

    fn uids(changes: &BTreeSet<Arc<str>>) -> Vec<&str> {
        changes.iter().map(|uid| &**uid).collect()
    }

    fn known(directory: &Directory) -> Vec<(&str, u64)> {
        directory.services.iter().map(|(uid, known)| (&**uid, known.state.revision)).collect()
    }

    #[test]
    fn the_higher_revision_wins_whoever_says_it() {
        let mut directory = Directory::default();
        assert_eq!(uids(&apply(&mut directory, LEADER, service("a", 2, 20_000))), ["a"]);
        assert!(apply(&mut directory, FOLLOWER, service("a", 1, 20_001)).is_empty());
        assert_eq!(uids(&apply(&mut directory, FOLLOWER, service("a", 3, 20_000))), ["a"]);
        assert_eq!(known(&directory), [("a", 3)]);
    }

    #[test]
    fn of_equal_revisions_the_later_message_holds_and_a_repetition_changes_nothing() {
        let mut directory = Directory::default();
        apply(&mut directory, LEADER, service("a", 1, 20_000));
        assert!(apply(&mut directory, LEADER, service("a", 1, 20_000)).is_empty());
        assert_eq!(uids(&apply(&mut directory, FOLLOWER, service("a", 1, 20_001))), ["a"]);
    }

    #[test]
    fn a_removed_uid_stays_removed() {
        let mut directory = Directory::default();
        apply(&mut directory, LEADER, service("a", 1, 20_000));
        assert_eq!(uids(&apply(&mut directory, FOLLOWER, remove("a"))), ["a"]);
        assert!(apply(&mut directory, LEADER, remove("a")).is_empty());
        assert!(apply(&mut directory, LEADER, service("a", 9, 20_000)).is_empty());
        assert!(known(&directory).is_empty());
    }

    #[test]
    fn removed_uids_are_remembered_within_bounds() {
        let mut directory = Directory::default();
        for number in 0..REMEMBERED + 10 {
            apply(&mut directory, LEADER, remove(&number.to_string()));
        }
        assert_eq!(directory.removed.len(), REMEMBERED);
        assert!(apply(&mut directory, LEADER, service(&(REMEMBERED + 9).to_string(), 1, 20_000)).is_empty());
    }

    #[test]
    fn only_the_newest_leader_removes_what_its_snapshot_does_not_name() {
        let mut directory = Directory::default();
        apply(
            &mut directory,
            LEADER,
            OperatorMessage::Hello { replica: "x".into(), leader: true, epoch: 2, summaries: true },
        );
        apply(&mut directory, LEADER, service("a", 1, 20_000));
        apply(&mut directory, LEADER, service("b", 1, 20_001));
        assert!(apply(&mut directory, FOLLOWER, snapshot_end(&[])).is_empty());
        assert!(apply(&mut directory, Speaker { leader: true, epoch: 1 }, snapshot_end(&[])).is_empty());
        assert_eq!(uids(&apply(&mut directory, LEADER, snapshot_end(&["b"]))), ["a"]);
        assert_eq!(uids(&apply(&mut directory, FOLLOWER, service("a", 1, 20_000))), ["a"], "may come back");
    }

    #[test]
    fn a_snapshot_removes_nothing_of_the_parts_that_it_is_not_about() {
        let mut directory = Directory::default();
        for (port, uid) in (20_000..).zip(["a", "b", "c"]) {
            apply(&mut directory, LEADER, service(uid, 1, port));
        }
        let unchanged = vec![part("a")];
        assert!(["b", "c"].iter().all(|uid| part(uid) != part("a")));
        let end = OperatorMessage::SnapshotEnd { uids: vec!["b".into()], unchanged };
        assert_eq!(uids(&apply(&mut directory, LEADER, end)), ["c"]);
    }

    #[test]
    fn a_state_keeps_no_more_room_than_it_needs() {
        let mut state = service_state("a", 1, 20_000);
        state.ports.reserve_exact(3);
        state.cluster_ips.reserve_exact(3);
        let mut directory = Directory::default();
        apply(&mut directory, LEADER, OperatorMessage::Service(Box::new(state)));
        let kept = directory.get("a").unwrap();
        assert_eq!((kept.ports.capacity(), kept.cluster_ips.capacity()), (1, 1));
    }

    #[test]
    fn the_first_snapshot_makes_it_synced() {
        let mut directory = Directory::default();
        apply(&mut directory, FOLLOWER, service("a", 1, 20_000));
        assert!(!directory.synced());
        apply(&mut directory, FOLLOWER, snapshot_end(&["a"]));
        assert!(directory.synced());
    }
}
