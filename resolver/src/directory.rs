//! What the operators have said: the newest state of every ElastiService. Pure: messages in, names of what changed out.
//!
//! Invariants: a state never gives way to one of a lower revision; a removed UID does not come back; what one replica
//! does not know is removed only on the word of the leader; nothing is removed because a stream broke.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use elasti_api::message::{OperatorMessage, ServiceState};

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

/// The newest state of every ElastiService, by UID.
#[derive(Debug, Default)]
pub struct Directory {
    services: BTreeMap<String, Arc<ServiceState>>,
    removed: VecDeque<String>,
    epoch: u64,
    synced: bool,
}

impl Directory {
    /// All ElastiServices, by UID.
    pub fn services(&self) -> &BTreeMap<String, Arc<ServiceState>> {
        &self.services
    }

    /// Whether any replica has completed a snapshot.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Takes a message in. Returns the UIDs whose state is another one now, or gone.
    pub fn apply(&mut self, from: Speaker, message: OperatorMessage) -> BTreeSet<String> {
        match message {
            OperatorMessage::Hello { epoch, .. } | OperatorMessage::Heartbeat { epoch, .. } => {
                self.epoch = self.epoch.max(epoch);
                BTreeSet::new()
            }
            OperatorMessage::Service(state) => self.set(*state),
            OperatorMessage::Remove { uid } => self.remove(uid),
            OperatorMessage::SnapshotEnd { uids } => {
                self.synced = true;
                if from.leader && from.epoch >= self.epoch {
                    self.keep(&uids.into_iter().collect())
                } else {
                    BTreeSet::new()
                }
            }
        }
    }

    fn set(&mut self, state: ServiceState) -> BTreeSet<String> {
        let old = self.services.get(&state.uid);
        let no_news = old.is_some_and(|old| old.revision > state.revision || **old == state);
        if no_news || self.removed.contains(&state.uid) {
            return BTreeSet::new();
        }
        let uid = state.uid.clone();
        self.services.insert(uid.clone(), Arc::new(state));
        BTreeSet::from([uid])
    }

    fn remove(&mut self, uid: String) -> BTreeSet<String> {
        let known = self.services.remove(&uid).is_some();
        if !self.removed.contains(&uid) {
            self.removed.push_back(uid.clone());
            let excess = self.removed.len().saturating_sub(REMEMBERED);
            self.removed.drain(..excess);
        }
        if known { BTreeSet::from([uid]) } else { BTreeSet::new() }
    }

    /// Not remembered as removed: another replica may have told of a new ElastiService that the leader's own cache
    /// does not have yet, and it must be able to come back.
    fn keep(&mut self, named: &BTreeSet<String>) -> BTreeSet<String> {
        let gone: BTreeSet<String> = self.services.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
        self.services.retain(|uid, _| !gone.contains(uid));
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::service_state;

    const LEADER: Speaker = Speaker { leader: true, epoch: 2 };
    const FOLLOWER: Speaker = Speaker { leader: false, epoch: 2 };

    fn service(uid: &str, revision: u64, interception_port: u16) -> OperatorMessage {
        OperatorMessage::Service(Box::new(service_state(uid, revision, interception_port)))
    }

    fn snapshot_end(uids: &[&str]) -> OperatorMessage {
        OperatorMessage::SnapshotEnd { uids: uids.iter().map(ToString::to_string).collect() }
    }

    fn remove(uid: &str) -> OperatorMessage {
        OperatorMessage::Remove { uid: uid.into() }
    }

    fn uids(changes: &BTreeSet<String>) -> Vec<&str> {
        changes.iter().map(String::as_str).collect()
    }

    fn known(directory: &Directory) -> Vec<(&str, u64)> {
        directory.services().iter().map(|(uid, state)| (uid.as_str(), state.revision)).collect()
    }

    #[test]
    fn the_higher_revision_wins_whoever_says_it() {
        let mut directory = Directory::default();
        assert_eq!(uids(&directory.apply(LEADER, service("a", 2, 20_000))), ["a"]);
        assert!(directory.apply(FOLLOWER, service("a", 1, 20_001)).is_empty());
        assert_eq!(uids(&directory.apply(FOLLOWER, service("a", 3, 20_000))), ["a"]);
        assert_eq!(known(&directory), [("a", 3)]);
    }

    #[test]
    fn of_equal_revisions_the_later_message_holds_and_a_repetition_changes_nothing() {
        let mut directory = Directory::default();
        directory.apply(LEADER, service("a", 1, 20_000));
        assert!(directory.apply(LEADER, service("a", 1, 20_000)).is_empty());
        assert_eq!(uids(&directory.apply(FOLLOWER, service("a", 1, 20_001))), ["a"]);
    }

    #[test]
    fn a_removed_uid_stays_removed() {
        let mut directory = Directory::default();
        directory.apply(LEADER, service("a", 1, 20_000));
        assert_eq!(uids(&directory.apply(FOLLOWER, remove("a"))), ["a"]);
        assert!(directory.apply(LEADER, remove("a")).is_empty());
        assert!(directory.apply(LEADER, service("a", 9, 20_000)).is_empty());
        assert!(known(&directory).is_empty());
    }

    #[test]
    fn removed_uids_are_remembered_within_bounds() {
        let mut directory = Directory::default();
        for number in 0..REMEMBERED + 10 {
            directory.apply(LEADER, remove(&number.to_string()));
        }
        assert_eq!(directory.removed.len(), REMEMBERED);
        assert!(directory.apply(LEADER, service(&(REMEMBERED + 9).to_string(), 1, 20_000)).is_empty());
    }

    #[test]
    fn only_the_newest_leader_removes_what_its_snapshot_does_not_name() {
        let mut directory = Directory::default();
        directory.apply(LEADER, OperatorMessage::Hello { replica: "x".into(), leader: true, epoch: 2 });
        directory.apply(LEADER, service("a", 1, 20_000));
        directory.apply(LEADER, service("b", 1, 20_001));
        assert!(directory.apply(FOLLOWER, snapshot_end(&[])).is_empty());
        assert!(directory.apply(Speaker { leader: true, epoch: 1 }, snapshot_end(&[])).is_empty());
        assert_eq!(uids(&directory.apply(LEADER, snapshot_end(&["b"]))), ["a"]);
        assert_eq!(uids(&directory.apply(FOLLOWER, service("a", 1, 20_000))), ["a"], "may come back");
    }

    #[test]
    fn the_first_snapshot_makes_it_synced() {
        let mut directory = Directory::default();
        directory.apply(FOLLOWER, service("a", 1, 20_000));
        assert!(!directory.synced());
        directory.apply(FOLLOWER, snapshot_end(&["a"]));
        assert!(directory.synced());
    }
}
