//! The autoscalers of the cluster: by name, by the ElastiServices that name them, and by the one that has paused them.

use std::collections::{BTreeSet, HashMap};

use elasti_api::v1alpha1::ElastiService;

use super::{Concerned, unindex};
use crate::autoscaler::{AutoscalerObserved, AutoscalerState, Kind, Pause};
use crate::observed::ObjectKey;

/// Kind, namespace and name of an autoscaler.
pub(super) type Reference = (Kind, ObjectKey);

/// The autoscaler that an ElastiService names.
pub(super) fn reference(key: &ObjectKey, elasti: &ElastiService) -> Option<Reference> {
    let named = elasti.spec.autoscaler.as_ref()?;
    Some((Kind::of(named)?, ObjectKey::new(&key.namespace, &named.name)))
}

#[derive(Default)]
pub(super) struct Autoscalers {
    known: HashMap<Reference, AutoscalerObserved>,
    named_by: HashMap<Reference, BTreeSet<ObjectKey>>,
    names: HashMap<ObjectKey, Reference>,
    paused_by: HashMap<String, BTreeSet<Reference>>,
    unread: HashMap<Kind, String>,
}

impl Autoscalers {
    /// Notes which autoscaler an ElastiService names.
    pub(super) fn name(&mut self, elasti: ObjectKey, reference: Option<Reference>) {
        if let Some(before) = self.names.remove(&elasti) {
            unindex(&mut self.named_by, &before, &elasti);
        }
        if let Some(reference) = reference {
            self.named_by.entry(reference.clone()).or_default().insert(elasti.clone());
            self.names.insert(elasti, reference);
        }
    }

    /// One is there or has changed; the ElastiServices that name it, and the UIDs of those that have or had paused it.
    pub(super) fn apply(&mut self, autoscaler: AutoscalerObserved) -> (Concerned, Vec<String>) {
        let reference = (autoscaler.kind, ObjectKey::new(&autoscaler.namespace, &autoscaler.name));
        let pausers = self.forget_pause(&reference).into_iter().chain(pauser(&autoscaler)).collect();
        if let Some(by) = pauser(&autoscaler) {
            self.paused_by.entry(by).or_default().insert(reference.clone());
        }
        let concerned = self.named_by.get(&reference).cloned().unwrap_or_default();
        self.known.insert(reference, autoscaler);
        (concerned, pausers)
    }

    /// One is gone.
    pub(super) fn remove(&mut self, kind: Kind, key: &ObjectKey) -> Concerned {
        let reference = (kind, key.clone());
        self.forget_pause(&reference);
        self.known.remove(&reference);
        self.named_by.get(&reference).cloned().unwrap_or_default()
    }

    fn forget_pause(&mut self, reference: &Reference) -> Option<String> {
        let by = self.known.get(reference).and_then(pauser)?;
        unindex(&mut self.paused_by, &by, reference);
        Some(by)
    }

    /// Notes that a kind cannot be read, and why, or (`None`) that it can.
    pub(super) fn set_unread(&mut self, kind: Kind, why: Option<String>) -> Concerned {
        let changed = match why {
            Some(why) => self.unread.insert(kind, why.clone()).is_none_or(|before| before != why),
            None => self.unread.remove(&kind).is_some(),
        };
        let of_kind = self.named_by.iter().filter(|((of, _), _)| changed && *of == kind);
        of_kind.flat_map(|(_, elastis)| elastis.iter().cloned()).collect()
    }

    pub(super) fn state(&self, reference: Option<&Reference>) -> AutoscalerState {
        let Some(reference) = reference else { return AutoscalerState::Unnamed };
        match (self.unread.get(&reference.0), self.known.get(reference)) {
            (Some(why), _) => AutoscalerState::Unread(why.clone()),
            (None, Some(autoscaler)) => AutoscalerState::Found(autoscaler.clone()),
            (None, None) => AutoscalerState::Missing,
        }
    }

    /// Those that the ElastiService with this UID has paused and does not name.
    pub(super) fn stale_pauses(&self, uid: &str, named: Option<&Reference>) -> Vec<AutoscalerObserved> {
        let paused = self.paused_by.get(uid).into_iter().flatten();
        paused
            .filter(|reference| Some(*reference) != named)
            .filter_map(|paused| self.known.get(paused))
            .cloned()
            .collect()
    }
}

fn pauser(autoscaler: &AutoscalerObserved) -> Option<String> {
    match &autoscaler.pause {
        Pause::Ours { by, .. } => Some(by.clone()),
        Pause::None | Pause::KubeElasti | Pause::User { .. } => None,
    }
}
