//! What the status says, and the events that tell of its changes.
//!
//! Part of the decision: pure. Invariant: what passes by itself within seconds, such as resolvers that are still connecting, is not told:
//! with thousands of ElastiServices it would be thousands of writes and events about nothing.

use std::time::Duration;

use elasti_api::message::Mode;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Action, Planner};
use crate::conditions::{self, Lasting};
use crate::idleness::traffic::Connections;

/// What is not known of connections for this long is a fault that is told: resolvers need seconds to follow a pod that has just
/// come, or to say so to an operator that has.
pub(super) const UNKNOWN_PATIENCE: Duration = Duration::from_secs(15);

/// Pods that are ignored may all be gone for a moment: a scraper that is restarted.
pub(super) const SOURCES_PATIENCE: Duration = Duration::from_secs(30);

/// Resolvers that have lost their operator, or are themselves replaced, connect again within seconds.
pub(super) const RESOLVER_PATIENCE: Duration = Duration::from_secs(15);

/// For so long the status waits where clients wait too. Most targets are up by then, and it is written once for the whole wake.
pub(super) const STATUS_PATIENCE: Duration = Duration::from_secs(1);

impl Planner<'_> {
    /// Writes the status where it says something else than it should.
    pub(super) fn write_status(&mut self, mode: Mode) {
        let current = self.status();
        let mut wanted = current.clone();
        // That clients are left to the pods is the Lease holder's to say.
        if current.mode != Some(mode) && (self.leads() || mode == Mode::Proxy) {
            wanted.mode = Some(mode);
            wanted.revision += 1;
            wanted.last_reconciled_time = Some(Time(self.now.timestamp));
        }
        if self.leads() {
            if !self.inherits_pause() {
                wanted.observed_generation = self.observed.elasti.metadata.generation;
            }
            let lasting = self.lasting_faults();
            wanted.conditions = conditions::conditions(self.observed, mode, lasting, self.now.timestamp);
        }
        let woken = self
            .memory
            .scaled_up
            .filter(|woken| current.last_scaled_up_time.as_ref().is_none_or(|time| time.0 < *woken));
        if let Some(woken) = woken {
            wanted.last_scaled_up_time = Some(Time(woken));
        }
        if wanted == current {
            return;
        }
        // What people read waits for what clients wait for: the API server has enough to do with a wake.
        let waits = self.observed.waited_for() && !self.passed(self.memory.held_since, STATUS_PATIENCE);
        if waits && current.mode == wanted.mode {
            return;
        }
        self.actions.push(Action::WriteStatus(Box::new(wanted.clone())));
        if current.mode != wanted.mode {
            let (reason, message) = match mode {
                Mode::Proxy => ("Intercepting", "connections are intercepted: the target sleeps or is not ready"),
                Mode::Serve => ("Serving", "clients reach the target directly"),
            };
            self.event(false, reason, message);
        }
        if let Some(fault) = conditions::new_fault(&current.conditions, &wanted.conditions) {
            self.event(true, &fault.reason, &fault.message);
        }
    }

    /// What is wrong and has been for long enough to be told.
    fn lasting_faults(&mut self) -> Lasting {
        let unknown = match self.connections() {
            Some(Connections::Unknown(why)) if self.passed(self.memory.unknown_since, UNKNOWN_PATIENCE) => Some(why),
            _ => None,
        };
        let sources = &self.observed.source_faults;
        let sources = sources.iter().find(|fault| self.passed(Some(fault.since), SOURCES_PATIENCE));
        let sources = sources.map(|fault| fault.why.clone());
        // Only what was said to work is not taken back at once.
        let alone = self.memory.alone_since.is_some()
            && (!conditions::ready(&self.status()) || self.passed(self.memory.alone_since, RESOLVER_PATIENCE));
        Lasting { unknown, sources, alone }
    }
}
