//! Whether a target has been idle for its cooldown, as all triggers say.
//!
//! Part of the decision: pure. Invariants: what cannot be known never counts as idle, nor does a target that several Services share,
//! and the last word on a scale-down is about the time after all connections had begun to pass through resolvers.

use std::time::{Duration, Instant};

use elasti_api::message::{ACTIVITY_INTERVAL, ACTIVITY_LAG, Mode, Tracking, report_interval};

use super::{Planner, Sent};
use crate::idleness;
use crate::idleness::traffic::{self, Connections};
use crate::observed::Verdict;
use crate::schedule;

impl Planner<'_> {
    /// Notes since when connections to the target's pods are not known.
    pub(super) fn remember_connections(&mut self) {
        self.memory.unknown_since = match (self.connections(), self.memory.unknown_since) {
            (Some(Connections::Unknown(_)), since) => since.or(Some(self.now.instant)),
            _ => None,
        };
    }

    /// What is known of connections to the target's pods, if a trigger asks for it.
    pub(super) fn connections(&self) -> Option<Connections> {
        let trigger = traffic::trigger(&self.observed.elasti.spec)?;
        Some(traffic::connections(self.observed, &trigger))
    }

    /// What resolvers have to follow.
    pub(super) fn tracking(&self) -> Option<Tracking> {
        let trigger = traffic::trigger(&self.observed.elasti.spec)?;
        let interval = match self.status().mode {
            Some(Mode::Serve) => report_interval(self.observed.elasti.spec.cooldown()),
            // What is told now may end the way down.
            Some(Mode::Proxy) | None => ACTIVITY_INTERVAL,
        };
        Some(traffic::tracking(&trigger, &self.observed.endpoints, &self.observed.ignored_pods, interval))
    }

    /// Whether some trigger has to be asked again, since the last answer is older than the interval.
    pub(super) fn asks_now(&self) -> bool {
        let asked = self.observed.triggers.as_ref().map(|triggers| triggers.asked);
        idleness::asks(&self.observed.elasti.spec)
            && self.age(asked).is_none_or(|age| age >= self.settings.polling_interval)
    }

    /// Whether all triggers call the target idle, and have for the cooldown.
    pub(super) fn idle_for_cooldown(&mut self) -> bool {
        let spec = &self.observed.elasti.spec;
        // Nobody here knows who uses the other Services, or whether what comes to them would be held.
        if !self.observed.shared_with.is_empty() {
            return false;
        }
        if idleness::fault(spec).is_some() || schedule::closed(spec, self.now.timestamp) {
            return false;
        }
        // A resolver that has just connected may not have said yet what it holds.
        let (Some(leading), Some(awake)) = (self.observed.leading_since, self.memory.awake_since) else { return false };
        let mut quiet_since = leading.max(awake);
        if idleness::asks(spec) {
            match self.observed.triggers.as_ref().map(|triggers| (&triggers.verdict, triggers.idle_since)) {
                Some((Verdict::Idle, Some(since))) => quiet_since = quiet_since.max(since),
                _ => return false,
            }
        }
        match self.connections() {
            None => {}
            Some(Connections::Idle(since)) => quiet_since = quiet_since.max(since.unwrap_or(quiet_since)),
            Some(Connections::Open | Connections::Unknown(_)) => return false,
        }
        quiet_since = quiet_since.max(self.memory.last_traffic.unwrap_or(quiet_since));
        let min_uptime = Duration::from_secs(spec.min_uptime.unwrap_or_default().into());
        self.passed(Some(quiet_since), spec.cooldown()) && self.passed(Some(awake), min_uptime)
    }

    /// Whether all triggers have spoken after everything had `settled`, and after a scale-down that may have failed.
    pub(super) fn spoken_since(&mut self, settled: Instant) -> bool {
        let sent = self.memory.sent.as_ref().map(|Sent { at, .. }| *at);
        if self.connections().is_some()
            && !self.passed(Some(sent.map_or(settled, |sent| sent.max(settled))), ACTIVITY_LAG)
        {
            return false;
        }
        if !idleness::asks(&self.observed.elasti.spec) {
            return true;
        }
        let asked_since = self.observed.triggers.as_ref().is_some_and(|triggers| {
            triggers.asked >= settled + self.settings.kube_proxy_sync && sent.is_none_or(|sent| triggers.asked > sent)
        });
        if !asked_since && !self.actions.contains(&super::Action::AskTriggers) {
            self.actions.push(super::Action::AskTriggers);
        }
        asked_since
    }
}
