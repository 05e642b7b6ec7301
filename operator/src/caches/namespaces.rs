//! Watches of one kind in several namespaces told as one, and the namespaces that are left alone.
//!
//! A namespace whose ElastiServices may not be read, as after its deletion with its `RoleBinding`, keeps the others waiting for
//! [`PATIENCE`] and no longer: then the watches of all kinds take it as empty, until its ElastiServices can be read. Invariant: none is left
//! alone unless another can be read, for who may read nothing knows nothing. Used by [`super::watch`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long ElastiServices of a namespace are refused before it is left alone: an API server that starts refuses what it permits for
/// seconds, until it has read the `RoleBindings`.
const PATIENCE: Duration = Duration::from_secs(10);

/// The namespaces that are left alone; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct LeftAlone(Arc<Mutex<BTreeSet<String>>>);

impl LeftAlone {
    /// Whether a namespace is left alone.
    pub(super) fn contains(&self, namespace: &str) -> bool {
        self.names().contains(namespace)
    }

    /// A namespace is looked after again; whether it was left alone.
    pub(super) fn end(&self, namespace: &str) -> bool {
        self.names().remove(namespace)
    }

    fn names(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // Every change is one insertion or removal, so a poisoned lock still guards a sound set.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which of the watches of one kind have told everything that is there.
pub(super) struct Completeness {
    /// By the number of the watch; `None`: all namespaces.
    namespaces: Vec<Option<String>>,
    listed: BTreeSet<usize>,
    /// Watches that were refused before their first list, and when first.
    refused: BTreeMap<usize, Instant>,
    alone: LeftAlone,
    /// Whether these are the watches that say which namespaces are left alone: those of ElastiServices.
    decides: bool,
    complete: bool,
}

impl Completeness {
    /// Nothing has been told yet.
    pub(super) fn new(namespaces: Vec<Option<String>>, alone: LeftAlone, decides: bool) -> Self {
        let (listed, refused) = (BTreeSet::new(), BTreeMap::new());
        Self { namespaces, listed, refused, alone, decides, complete: false }
    }

    /// A watch has told everything; whether all have.
    pub(super) fn listed(&mut self, number: usize) -> bool {
        self.refused.remove(&number);
        self.listed.insert(number);
        self.complete = self.all();
        self.complete
    }

    /// A watch may not read its namespace; whether all others have told everything and this one is now taken as empty.
    pub(super) fn refused(&mut self, number: usize, now: Instant) -> bool {
        if self.complete || self.listed.contains(&number) {
            return false;
        }
        self.refused.entry(number).or_insert(now);
        if self.decides {
            self.leave_alone(now);
        }
        self.complete = self.all();
        self.complete
    }

    fn leave_alone(&self, now: Instant) {
        if self.listed.is_empty() {
            return;
        }
        for (number, since) in &self.refused {
            let Some(namespace) = self.namespaces.get(*number).and_then(Option::as_deref) else { continue };
            if now.saturating_duration_since(*since) >= PATIENCE && self.alone.names().insert(namespace.to_owned()) {
                tracing::error!(
                    namespace,
                    "ElastiServices of this namespace may not be read, so it is left alone; make it again, let the operator read it \
                     (config/watched), or take it out of --watch-namespaces: until then no new interception ports are given out"
                );
            }
        }
    }

    fn all(&self) -> bool {
        let empty = |number: &usize| {
            let namespace = self.namespaces.get(*number).and_then(Option::as_deref);
            self.refused.contains_key(number) && namespace.is_some_and(|namespace| self.alone.contains(namespace))
        };
        !self.listed.is_empty()
            && (0..self.namespaces.len()).all(|number| self.listed.contains(&number) || empty(&number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(alone: &LeftAlone, decides: bool) -> Completeness {
        Completeness::new(["a", "b"].map(|name| Some(name.to_owned())).into(), alone.clone(), decides)
    }

    #[test]
    fn a_namespace_that_may_not_be_read_keeps_the_others_waiting_for_a_while_only() {
        let (alone, start) = (LeftAlone::default(), Instant::now());
        let (mut elastis, mut services) = (of(&alone, true), of(&alone, false));
        assert!(!services.listed(0));
        assert!(!elastis.refused(1, start));
        assert!(!elastis.refused(1, start + PATIENCE), "who may read nothing knows nothing");
        assert!(!elastis.listed(0));
        assert!(!services.refused(1, start + PATIENCE), "the ElastiServices decide");
        assert!(elastis.refused(1, start + PATIENCE));
        assert!(services.refused(1, start + PATIENCE));
        assert!(!services.refused(1, start + PATIENCE), "told once");
        assert!(alone.end("b") && !alone.contains("b"));
        assert!(elastis.listed(1));
        assert!(!elastis.refused(1, start + PATIENCE * 2) && !alone.contains("b"), "what was read stays");
    }

    #[test]
    fn an_api_server_that_refuses_for_a_moment_leaves_no_namespace_alone() {
        let (alone, start) = (LeftAlone::default(), Instant::now());
        let mut elastis = of(&alone, true);
        assert!(!elastis.listed(0));
        assert!(!elastis.refused(1, start) && !elastis.refused(1, start + PATIENCE / 2));
        assert!(elastis.listed(1) && !alone.contains("b"));
    }
}
