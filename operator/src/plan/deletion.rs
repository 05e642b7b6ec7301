//! The way out: what is done for a deleted ElastiService until nothing of ours is left.
//!
//! Part of the decision: pure. Invariants: clients are held and forwarded as ever until they reach the target directly; only the
//! Lease holder takes steps, each after the one before has been seen to be done; the finalizer goes last.

use std::time::Duration;

use elasti_api::message::Mode;

use super::{Action, Planner, Publish, has_finalizer};
use crate::conditions;
use crate::observed::TargetState;

/// How long a deleted ElastiService goes on intercepting for a target that it has just scaled back up.
pub(super) const FINALIZE_PATIENCE: Duration = Duration::from_secs(30);

impl Planner<'_> {
    /// Leaves everything as it was found: the target up, clients at its pods, nothing of ours behind. Until then clients are
    /// held and forwarded as ever.
    pub(super) fn finalize(&mut self) -> Publish {
        if !has_finalizer(self.observed) {
            return Publish::Keep;
        }
        self.memory.descent = None;
        let service = conditions::interceptable(self.observed);
        if self.leads() && self.leave(service.is_some()) {
            return Publish::Remove;
        }
        service.map_or(Publish::Keep, |service| self.state(&service))
    }

    /// Takes the next step away from a deleted ElastiService; whether nothing of ours is needed any more.
    fn leave(&mut self, interceptable: bool) -> bool {
        let now = self.now.instant;
        let since = *self.memory.deleting_since.get_or_insert(now);
        self.release_autoscaler();
        let ours = self.observed.taken_by.is_none();
        if ours && self.observed.target.found().is_some_and(|target| target.spec_replicas == 0) {
            self.actions.push(Action::ScaleUp { replicas: self.observed.elasti.spec.min_target_replicas.max(1) });
        }
        let known = matches!(self.observed.target, TargetState::Found(_) | TargetState::Unread);
        let starts = ours && known && (!self.observed.target_ready() || self.pending().is_some());
        let intercepted = interceptable && self.status().mode == Some(Mode::Proxy);
        if intercepted || !self.observed.slices.is_empty() {
            self.memory.last_intercepted = Some(now);
        }
        if starts && !self.passed(Some(since), FINALIZE_PATIENCE) {
            return false;
        }
        if intercepted {
            self.write_status(Mode::Serve);
            return false;
        }
        if !self.observed.slices.is_empty() {
            self.withdraw(&[]);
            return false;
        }
        // The listeners stay for as long as a kube-proxy may still send connections to them.
        let last = self.memory.last_intercepted;
        if last.is_some() && !self.passed(last, self.settings.kube_proxy_sync) {
            return false;
        }
        let mut private = self.observed.stale_private.clone();
        if self.observed.private.is_some() {
            private.push(elasti_api::names::private_service(&self.observed.elasti.spec.service));
        }
        if !private.is_empty() {
            self.actions.push(Action::DeletePrivateServices(private));
        }
        self.actions.push(Action::RemoveFinalizer);
        true
    }
}
