//! The decision: from what is observed of one ElastiService, and the time, to what shall be done about it.
//!
//! Pure and total: no I/O, no clock of its own. [`crate::controller`] calls [`plan`] on every change and applies what it
//! says, in order; what is not yet as wished is observed again and planned again, so any step may fail at any time.
//!
//! Invariants, each with a test below:
//! - a target is scaled to zero only by the Lease holder, while it is intercepted, every live resolver listens, the slices
//!   are published, kube-proxy has had its time, all triggers have been asked again since, and every live resolver holds
//!   what comes and has told what came before;
//! - a wake needs no Lease: whatever is held wakes a target at zero;
//! - only the Lease holder stops intercepting; any replica starts it for a target found at zero;
//! - the status is written first: resolvers are told only what has been read back from it, and that a target is at zero.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use elasti_api::message::{Mode, ServiceState};
use elasti_api::v1alpha1::ElastiServiceStatus;
use jiff::Timestamp;

use crate::autoscaler::{AutoscalerObserved, Wish};
use crate::observed::{Observed, ResolverSlice, ServiceObserved, Verdict};
use crate::slices;
use crate::{conditions, idleness};

use interception::{Interception, UNEXPLAINED_MAX};
pub use settings::Settings;
pub use state::published;
use state::{closed, state};

pub(crate) mod autoscaler;
mod deletion;
mod draining;
mod ending;
mod idle;
mod interception;
mod settings;
mod starting;
mod state;
mod status;

/// How long a replica without the Lease leaves a wake to its holder: a `/scale` patch takes some milliseconds, so this
/// means that the holder is gone or slow.
const FOLLOWER_PATIENCE: Duration = Duration::from_millis(300);

/// For this long a new Lease holder leaves a slice as it is although none of those that it names has come yet, if others serve beside
/// them: of a thousand resolvers the first that come are not those of each slice.
const FIRST_ARRIVALS: Duration = Duration::from_secs(2);

/// How long a scale-down waits for resolvers that redirect late; after that the slices carry their nodes' connections.
const REDIRECT_PATIENCE: Duration = Duration::from_secs(5);

/// For this long a scale-down that was sent may still be carried out: the API server's default `--request-timeout`.
const OUTCOME_PATIENCE: Duration = Duration::from_mins(1);

/// How long after the last a wake waits that somebody has undone twice, twice as long each further time; the first is repeated
/// at once. A pipeline or autoscaler that insists on zero gets no storm of patches.
const UNDONE_WAIT: Duration = Duration::from_millis(200);

/// How long the watch may take to tell of a wake that was carried out, before it is planned again.
const WATCH_PATIENCE: Duration = Duration::from_secs(1);

/// The most times that [`UNDONE_WAIT`] doubles: 6.4 s.
const UNDONE_DOUBLINGS: u32 = 5;

/// A target that shall run and is not ready for this long has its pods looked at, and again after as long while somebody waits for
/// it, else after waits that double.
const DIAGNOSE_AFTER: Duration = Duration::from_secs(3);

/// The longest of these waits: a target that nobody wants may stay broken for days.
const DIAGNOSE_LONGEST: Duration = Duration::from_mins(1);

/// The time, on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For ages.
    pub instant: Instant,
    /// For what is written into objects and compared with schedules.
    pub timestamp: Timestamp,
}

/// What one replica remembers of an ElastiService from plan to plan. Losing it is safe: cooldowns start afresh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Since when the target's `spec.replicas` has been above zero.
    awake_since: Option<Instant>,
    /// The interception that the status tells of.
    interception: Option<Interception>,
    /// When connections through resolvers were last seen to come or to be open.
    last_traffic: Option<Instant>,
    /// The count of accepted connections that `last_traffic` is about.
    accepted: u64,
    /// Since when somebody has waited for the target.
    held_since: Option<Instant>,
    /// The wakes of a target that has not been ready since.
    wakes: Option<Wakes>,
    /// When this replica woke the target last.
    scaled_up: Option<Timestamp>,
    /// The scale-down in progress.
    descent: Option<Descent>,
    /// A scale-down that was sent and may still be carried out.
    sent: Option<Sent>,
    /// Since when the target shall run and is not ready.
    unready_since: Option<Instant>,
    /// When the pods were last looked at.
    diagnosed: Option<Instant>,
    /// How long after that they are again.
    diagnose_again: Duration,
    /// Since when connections to the target's pods are not known.
    unknown_since: Option<Instant>,
    /// Since when no resolver is connected.
    alone_since: Option<Instant>,
    /// Which pods are about to end, and since when.
    draining: draining::Since,
    /// Ready endpoints that are not believed.
    ending: ending::Since,
    /// What was seen of pods that start.
    starting: starting::Memory,
    /// When the deletion was first seen.
    deleting_since: Option<Instant>,
    /// When a deleted ElastiService was last intercepted, or had slices.
    last_intercepted: Option<Instant>,
}

/// A scale-down on its way: intercepting while the pods are still up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descent {
    started: Instant,
    /// Since when all listen, the slices are published and the nodes redirect.
    settled: Option<Instant>,
    /// Since when resolvers are asked to hold every connection, so that none reaches a pod that is about to end.
    holding: Option<Instant>,
}

/// A scale-down that was sent. Its answer says nothing certain where it says no success: it may have been lost on its way
/// back, or the request be carried out when its sender has given it up.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    at: Instant,
    /// Of the target as it was: once it is another one, the request is refused.
    resource_version: String,
    /// It was: it will not be carried out.
    refused: bool,
}

impl Memory {
    /// The scale-down that was sent will not be carried out: the API server has refused it, or it never left.
    pub fn scale_down_refused(&mut self) {
        if let Some(sent) = &mut self.sent {
            sent.refused = true;
        }
    }
}

/// Wakes of a target that has not been ready since.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wakes {
    times: u32,
    last: Instant,
    /// Of the target as it was before the last one: at zero with another, it was woken and somebody has undone it.
    resource_version: String,
    /// When the API server had carried out the last one.
    carried_out: Option<Instant>,
}

impl Memory {
    /// The target was woken. Until the watch tells of it, it only seems to be at zero.
    pub fn woken(&mut self, now: Now) {
        // As precisely as the status tells it.
        self.scaled_up = Timestamp::from_second(now.timestamp.as_second()).ok();
        if let Some(wakes) = &mut self.wakes {
            wakes.carried_out = Some(now.instant);
        }
    }
}

/// One thing to do. Actions are applied in order; one that fails keeps only those from being taken that say so
/// ([`Action::needs_all_before`]).
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Puts our finalizer on the ElastiService.
    AddFinalizer,
    /// Takes our finalizer off; the object goes.
    RemoveFinalizer,
    /// Patches `/scale` to this many replicas, if it is at zero.
    ScaleUp {
        /// `minTargetReplicas`.
        replicas: i32,
    },
    /// Patches `/scale` to zero, if the target is still the one observed.
    ScaleDown,
    /// Allocates interception ports for these Service ports, lets all others rest, and writes the status.
    AllocatePorts(Vec<u16>),
    /// Writes the status, if the ElastiService is still the one observed.
    WriteStatus(Box<ElastiServiceStatus>),
    /// Makes the private Service as it shall be.
    ApplyPrivateService,
    /// Deletes private Services of ours.
    DeletePrivateServices(Vec<String>),
    /// Makes a slice as it shall be.
    ApplySlice(ResolverSlice),
    /// Deletes slices of ours.
    DeleteSlices(Vec<String>),
    /// Pauses an autoscaler or lets it scale again, if it is still the one observed.
    AnnotateAutoscaler {
        /// As it was observed.
        autoscaler: Box<AutoscalerObserved>,
        /// What shall become of it.
        wish: Wish,
    },
    /// Asks the triggers, in the background.
    AskTriggers,
    /// Looks at the target's pods for the reason why they are not ready.
    Diagnose,
    /// Records an event on the ElastiService.
    Event {
        /// Whether it is a warning.
        warning: bool,
        /// A word.
        reason: String,
        /// A sentence.
        message: String,
    },
}

impl Action {
    /// Whether it may be taken only when all before it in the plan have succeeded: it acts away from availability, or ends all
    /// care for the ElastiService.
    pub fn needs_all_before(&self) -> bool {
        matches!(self, Self::ScaleDown | Self::RemoveFinalizer)
    }

    /// Whether it writes the status, or tells people of what was written into it.
    pub fn tells_status(&self) -> bool {
        matches!(self, Self::WriteStatus(_) | Self::Event { .. })
    }
}

/// What resolvers shall know of the ElastiService.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Publish {
    /// This.
    State(Box<ServiceState>),
    /// Nothing any more: listeners close.
    Remove,
    /// What they know already.
    Keep,
}

/// What shall be done.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What resolvers shall know, told before the actions run.
    pub publish: Publish,
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// Whether the pods of the Service shall be looked at, because one of them is waited for.
    pub follow_pods: bool,
    /// What to remember.
    pub memory: Memory,
    /// Plan again after this long, even if nothing is seen to change.
    pub again: Option<Duration>,
}

/// Decides.
pub fn plan(observed: &Observed<'_>, memory: &Memory, settings: &Settings, now: Now) -> Plan {
    let mut memory = memory.clone();
    ending::note(&mut memory.ending, observed, now.instant);
    let believed = ending::disbelieve(&memory.ending, observed, now.instant);
    let (observed, again) = match &believed {
        Some((observed, again)) => (observed, Some(*again)),
        None => (observed, None),
    };
    Planner { observed, settings, now, memory, actions: Vec::new(), again }.run()
}

struct Planner<'a> {
    observed: &'a Observed<'a>,
    settings: &'a Settings,
    now: Now,
    memory: Memory,
    actions: Vec<Action>,
    again: Option<Duration>,
}

impl Planner<'_> {
    fn run(mut self) -> Plan {
        self.remember();
        let publish =
            if self.observed.elasti.metadata.deletion_timestamp.is_some() { self.finalize() } else { self.reconcile() };
        let follow_pods = self.follow_pods();
        Plan { publish, actions: self.actions, follow_pods, memory: self.memory, again: self.again }
    }

    fn leads(&self) -> bool {
        self.observed.leading_since.is_some()
    }

    fn status(&self) -> ElastiServiceStatus {
        self.observed.elasti.status.clone().unwrap_or_default()
    }

    fn age(&self, since: Option<Instant>) -> Option<Duration> {
        since.map(|since| self.now.instant.saturating_duration_since(since))
    }

    /// Whether `since` lies at least `wait` back; if not, sees to it that the plan is made again then.
    fn passed(&mut self, since: Option<Instant>, wait: Duration) -> bool {
        match self.age(since) {
            Some(age) if age >= wait => true,
            Some(age) => {
                self.check_after(wait.saturating_sub(age));
                false
            }
            None => false,
        }
    }

    fn check_after(&mut self, wait: Duration) {
        self.again = Some(self.again.map_or(wait, |again| again.min(wait)));
    }

    fn event(&mut self, warning: bool, reason: &str, message: &str) {
        self.actions.push(Action::Event { warning, reason: reason.to_owned(), message: message.to_owned() });
    }

    fn remember(&mut self) {
        let now = Some(self.now.instant);
        let target = self.observed.target.found();
        let runs = target.is_some_and(|target| target.spec_replicas > 0);
        if self.observed.target_ready() || !(self.observed.waited_for() || self.busy()) {
            self.memory.wakes = None;
        }
        self.memory.sent = self.memory.sent.take().filter(|sent| {
            let pending = target.is_some_and(|target| target.resource_version == sent.resource_version);
            pending && self.now.instant.saturating_duration_since(sent.at) < OUTCOME_PATIENCE
        });
        if !runs {
            self.memory.awake_since = None;
            self.memory.descent = None;
        } else if self.memory.awake_since.is_none() {
            self.memory.awake_since = now;
        }
        let intercepted = self.status().mode == Some(Mode::Proxy);
        let explained = self.memory.descent.is_some() || !runs || !self.observed.target_ready();
        self.memory.interception =
            interception::note(self.memory.interception, intercepted, explained, self.now.instant);
        let accepted = self.observed.accepted();
        if accepted != self.memory.accepted || self.observed.waited_for() || self.observed.forwarding() > 0 {
            self.memory.last_traffic = now;
            self.memory.accepted = accepted;
        }
        if !self.observed.waited_for() {
            self.memory.held_since = None;
        } else if self.memory.held_since.is_none() {
            self.memory.held_since = now;
        }
        if !runs || self.observed.target_ready() {
            (self.memory.unready_since, self.memory.diagnosed) = (None, None);
        } else if self.memory.unready_since.is_none() {
            self.memory.unready_since = now;
        }
        self.remember_draining();
        self.remember_pods();
        self.remember_connections();
        self.memory.alone_since =
            if self.observed.resolvers.is_empty() { self.memory.alone_since.or(now) } else { None };
    }

    fn reconcile(&mut self) -> Publish {
        self.wake();
        if self.leads() && !has_finalizer(self.observed) {
            self.actions.push(Action::AddFinalizer);
            return Publish::Keep;
        }
        let Some(service) = conditions::interceptable(self.observed) else {
            // Nothing can be intercepted, so nothing of ours may stay in the path.
            self.memory.descent = None;
            if self.leads() {
                self.keep_autoscaler();
            }
            self.withdraw(&[]);
            let current = self.status().mode;
            self.write_status(if self.leads() { Mode::Serve } else { current.unwrap_or(Mode::Serve) });
            // Not a removal, which is final: the Service may come again.
            return closed(self.observed, self.settings).map_or(Publish::Keep, |state| Publish::State(Box::new(state)));
        };
        self.diagnose();
        if self.leads() {
            self.keep_ports(&service);
            self.keep_private_service(&service);
            self.descend();
            self.keep_autoscaler();
        }
        let mode = self.mode();
        self.write_status(mode);
        self.keep_slices(&service);
        self.state(&service)
    }

    /// What resolvers shall know of an ElastiService that can be intercepted.
    fn state(&mut self, service: &ServiceObserved) -> Publish {
        let draining = self.draining();
        let starting = self.starting(service);
        let state = state(self.observed, service, &draining, self.holding(), self.settings);
        let Some(mut state) = state else { return Publish::Keep };
        state.asking = if starting.is_empty() { 0 } else { self.asking() };
        state.starting = starting;
        state.tracking = self.tracking();
        Publish::State(Box::new(state))
    }

    /// Whatever is held wakes a target at zero, and those that are to be woken with it; so does a trigger that sees traffic.
    fn wake(&mut self) {
        let Some(target) = self.observed.target.found() else { return };
        if target.spec_replicas > 0 || self.observed.taken_by.is_some() {
            return;
        }
        let wanted = match (self.observed.waited_for(), self.leads()) {
            (true, true) => true,
            (true, false) => self.passed(self.memory.held_since, FOLLOWER_PATIENCE),
            (false, leads) => leads && self.busy(),
        };
        if wanted && self.may_wake_again(&target.resource_version) {
            self.actions.push(Action::ScaleUp { replicas: self.observed.elasti.spec.min_target_replicas.max(1) });
        }
    }

    fn busy(&self) -> bool {
        self.observed.triggers.as_ref().is_some_and(|triggers| triggers.verdict == Verdict::Busy)
    }

    /// Whether it is time for a wake; one that may have failed is repeated at once, one that was undone ever more slowly.
    fn may_wake_again(&mut self, resource_version: &str) -> bool {
        let (last, times) = match &self.memory.wakes {
            Some(wakes) if wakes.resource_version == resource_version => {
                let carried_out = wakes.carried_out;
                return carried_out.is_none() || self.passed(carried_out, WATCH_PATIENCE);
            }
            Some(wakes) => (Some(wakes.last), wakes.times),
            None => (None, 0),
        };
        if times >= 2 && !self.passed(last, UNDONE_WAIT * 2_u32.pow((times - 2).min(UNDONE_DOUBLINGS))) {
            return false;
        }
        let resource_version = resource_version.to_owned();
        let (times, last) = (times.saturating_add(1), self.now.instant);
        self.memory.wakes = Some(Wakes { times, last, resource_version, carried_out: None });
        true
    }

    fn keep_ports(&mut self, service: &ServiceObserved) {
        let mut wanted: Vec<u16> = service.ports.iter().map(|port| port.port).collect();
        let mut owned: Vec<u16> = self.status().ports.iter().map(|port| port.port).collect();
        wanted.sort_unstable();
        owned.sort_unstable();
        if wanted != owned {
            self.actions.push(Action::AllocatePorts(wanted));
        }
    }

    fn keep_private_service(&mut self, service: &ServiceObserved) {
        if !self.observed.private.as_ref().is_some_and(|private| crate::private_service::follows(private, service)) {
            self.actions.push(Action::ApplyPrivateService);
        }
        if !self.observed.stale_private.is_empty() {
            self.actions.push(Action::DeletePrivateServices(self.observed.stale_private.clone()));
        }
    }

    fn diagnose(&mut self) {
        let first = self.memory.diagnosed.is_none();
        let wait = if first || self.observed.waited_for() { DIAGNOSE_AFTER } else { self.memory.diagnose_again };
        if self.leads()
            && self.passed(self.memory.unready_since, DIAGNOSE_AFTER)
            && (first || self.passed(self.memory.diagnosed, wait))
        {
            self.memory.diagnosed = Some(self.now.instant);
            self.memory.diagnose_again = if first { wait } else { (wait * 2).min(DIAGNOSE_LONGEST) };
            self.check_after(DIAGNOSE_AFTER);
            self.actions.push(Action::Diagnose);
        }
    }

    /// Idle for the cooldown: intercept, settle, ask again, and only then scale to zero.
    fn descend(&mut self) {
        let Some(target) = self.observed.target.found() else { return };
        if self.asks_now() {
            self.actions.push(Action::AskTriggers);
        }
        let runs = target.spec_replicas > 0;
        if runs || idleness::asks(&self.observed.elasti.spec) {
            self.check_after(self.settings.polling_interval);
        }
        if !runs {
            return;
        }
        if self.autoscaler_forbids_sleep() || !self.idle_for_cooldown() {
            self.memory.descent = None;
            return;
        }
        if cfg!(feature = "mutant-scale-before-intercept") {
            self.actions.push(Action::ScaleDown);
            return;
        }
        let descent =
            *self.memory.descent.get_or_insert(Descent { started: self.now.instant, settled: None, holding: None });
        if !(self.autoscaler_holds_still() && self.settled(descent)) {
            self.memory.descent = Some(Descent { settled: None, holding: None, ..descent });
            self.check_after(REDIRECT_PATIENCE);
            return;
        }
        let settled = descent.settled.unwrap_or(self.now.instant);
        self.memory.descent = Some(Descent { settled: Some(settled), ..descent });
        if !self.passed(Some(settled), self.settings.kube_proxy_sync) {
            return;
        }
        // The last word.
        let spoken_since = self.spoken_since(settled);
        let holding = spoken_since.then(|| descent.holding.unwrap_or(self.now.instant));
        self.memory.descent = Some(Descent { settled: Some(settled), holding, ..descent });
        if spoken_since && (self.all_hold() || self.passed(holding, REDIRECT_PATIENCE)) {
            self.actions.push(Action::ScaleDown);
            let resource_version = target.resource_version.clone();
            self.memory.sent = Some(Sent { at: self.now.instant, resource_version, refused: false });
        }
    }

    /// Whether no resolver forwards any more. What each had accepted until then it has told before.
    fn all_hold(&self) -> bool {
        let revision = self.status().revision;
        let mut staying = self.observed.resolvers.iter().filter(|resolver| !resolver.leaving);
        staying.all(|resolver| resolver.ack.as_ref().is_some_and(|ack| ack.holding && ack.revision >= revision))
    }

    /// The scale-down that was sent and may still be carried out.
    fn pending(&self) -> Option<&Sent> {
        self.memory.sent.as_ref().filter(|sent| !sent.refused)
    }

    /// Whether resolvers shall hold every connection although pods are ready.
    fn holding(&self) -> bool {
        let about_to_sleep = self.memory.descent.is_some_and(|descent| descent.holding.is_some());
        self.leads() && self.status().mode == Some(Mode::Proxy) && (about_to_sleep || self.pending().is_some())
    }

    /// Whether every connection that begins now passes through a resolver, as far as can be seen.
    fn settled(&self, descent: Descent) -> bool {
        let status = self.status();
        if status.mode != Some(Mode::Proxy) || !published(self.observed) {
            return false;
        }
        let staying = || self.observed.resolvers.iter().filter(|resolver| !resolver.leaving);
        let listening = slices::eligible(&self.observed.resolvers, status.revision).count();
        let redirecting = staying().all(|resolver| {
            resolver.identity.redirect_disabled.is_some()
                || resolver.ack.as_ref().is_some_and(|ack| ack.redirecting && ack.revision >= status.revision)
        });
        let all = listening == staying().count() && redirecting;
        listening > 0 && (all || self.age(Some(descent.started)) >= Some(REDIRECT_PATIENCE))
    }

    /// The mode that shall be, as far as this replica may change it.
    fn mode(&mut self) -> Mode {
        let current = self.status().mode;
        let target = self.observed.target.found();
        let at_zero = target.is_some_and(|target| target.spec_replicas == 0);
        if at_zero {
            return Mode::Proxy;
        }
        if !self.leads() {
            return current.unwrap_or(Mode::Serve);
        }
        if let Some(sent) = self.pending() {
            let since = sent.at;
            self.passed(Some(since), OUTCOME_PATIENCE);
            return Mode::Proxy;
        }
        if self.memory.descent.is_some() || !self.observed.target_ready() {
            return Mode::Proxy;
        }
        match self.memory.interception {
            Some(Interception::Unexplained(since)) => {
                if self.passed(Some(since), UNEXPLAINED_MAX) {
                    Mode::Serve
                } else {
                    Mode::Proxy
                }
            }
            Some(Interception::Explained) | None => Mode::Serve,
        }
    }

    fn keep_slices(&mut self, service: &ServiceObserved) {
        let intercepting = self.status().mode == Some(Mode::Proxy);
        if !intercepting {
            self.withdraw(&[]);
            return;
        }
        let wanted = slices::desired(self.observed, service, self.settings.max_slice_endpoints);
        let own: Vec<&ResolverSlice> =
            self.observed.slices.iter().filter(|slice| slice.service == self.observed.elasti.spec.service).collect();
        // A replica without the Lease publishes what is missing and leaves the rest to its holder.
        if !self.leads() && !own.is_empty() {
            if self.observed.holder_silent {
                let thinned = slices::without_silent(&own, &self.observed.resolvers);
                self.actions.extend(thinned.into_iter().map(Action::ApplySlice));
            }
            return;
        }
        let gathering = self.gathering();
        let leaving = self.observed.resolvers.iter().filter(|resolver| gathering.is_some() && resolver.leaving);
        let leaving: Vec<IpAddr> = leaving.flat_map(|resolver| resolver.identity.addresses.clone()).collect();
        let gone = |address| leaving.contains(&address) || self.observed.arrivals.gone.contains(&address);
        for mut slice in wanted.clone() {
            let present = own.iter().find(|present| present.name == slice.name);
            if let (Some(first), Some(present)) = (gathering, present) {
                let limit = self.settings.max_slice_endpoints;
                let full = !service.local_traffic_policy && present.endpoints.len() >= limit;
                slice = slices::meanwhile(present, slice, full, first, gone);
            }
            if present.is_none_or(|present| **present != slice) {
                self.actions.push(Action::ApplySlice(slice));
            }
        }
        // Where no resolver is left, the last known ones stay: an empty slice is a refused connection for sure.
        let kept = own.iter().filter(|slice| gathering.is_some() || !slices::emptied(slice, &wanted));
        let kept: Vec<&str> = kept.map(|slice| slice.name.as_str()).collect();
        self.withdraw(&kept);
    }

    /// While resolvers are still coming to a new leader, so that those that are not there are not gone: whether the first may still be
    /// to come.
    fn gathering(&mut self) -> Option<bool> {
        let leading_since = self.observed.leading_since?;
        let left = self.observed.arrivals.over(leading_since).checked_duration_since(self.now.instant)?;
        if left.is_zero() {
            return None;
        }
        let begun = self.observed.arrivals.open_since.map_or(leading_since, |open| open.max(leading_since));
        let first = FIRST_ARRIVALS.saturating_sub(self.now.instant.saturating_duration_since(begun));
        self.check_after(if first.is_zero() { left } else { first.min(left) });
        Some(!first.is_zero())
    }

    /// Deletes all slices but the named ones.
    fn withdraw(&mut self, kept: &[&str]) {
        let stale: Vec<String> = self
            .observed
            .slices
            .iter()
            .map(|slice| slice.name.clone())
            .filter(|name| !kept.contains(&name.as_str()))
            .collect();
        if self.leads() && !stale.is_empty() {
            self.actions.push(Action::DeleteSlices(stale));
        }
    }
}

fn has_finalizer(observed: &Observed<'_>) -> bool {
    observed.elasti.metadata.finalizers.iter().flatten().any(|name| name == elasti_api::names::FINALIZER)
}

#[cfg(test)]
mod tests;
