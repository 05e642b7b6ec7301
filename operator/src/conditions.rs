//! Conditions: what is wrong with an ElastiService, with cause and cure, in words for its user.
//!
//! Pure. `Ready` says whether it does its work, `Intercepting` whether connections pass through resolvers, `TargetReady`
//! whether the target serves, and `WakeWith`, where it is given, whether those that shall wake together are there.

use elasti_api::message::Mode;
use elasti_api::v1alpha1::ElastiServiceStatus;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::observed::{Addressing, ObjectKey, Observed, PartnersObserved, ServiceObserved, TargetState, Verdict};
use crate::plan::{self, published};
use crate::{idleness, probes, schedule};

/// A condition's reason and message.
type Cause = (&'static str, String);

/// The reason of `Ready` where all is well but what is written means nothing in part.
const IGNORED: &str = "UnknownKeysIgnored";

/// The reason of `Ready` where pods shall be ignored and there are none.
const NO_SOURCE: &str = "SourcesNotFound";

/// What has been wrong for long enough to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lasting {
    /// Why connections to the target's pods are not known: it is not put to sleep.
    pub unknown: Option<String>,
    /// Why pods that shall be ignored are not: they may keep the target awake.
    pub sources: Option<String>,
    /// No resolver is connected.
    pub alone: bool,
}

/// The Service, if its connections can be intercepted.
pub fn interceptable(observed: &Observed<'_>) -> Option<ServiceObserved> {
    if service_fault(observed).is_some() { None } else { observed.service.clone() }
}

/// Why the Service cannot be intercepted.
fn service_fault(observed: &Observed<'_>) -> Option<Cause> {
    let name = &observed.elasti.spec.service;
    if let Some(owner) = &observed.taken_by {
        return Some((
            "ServiceTaken",
            format!("Service {name} already belongs to the older ElastiService {owner}; delete one of the two"),
        ));
    }
    let Some(service) = &observed.service else {
        return Some(("ServiceNotFound", format!("there is no Service {name}; create it or correct spec.service")));
    };
    if service.addressing == Addressing::ExternalName {
        return Some((
            "ExternalNameService",
            format!("Service {name} is an ExternalName, which has no address; name a Service with a selector"),
        ));
    }
    if service.addressing == Addressing::Headless {
        return Some((
            "HeadlessService",
            format!(
                "Service {name} is headless: its clients dial pods, which do not exist at zero; give it a cluster IP"
            ),
        ));
    }
    if service.selector.is_empty() {
        return Some((
            "ServiceWithoutSelector",
            format!("Service {name} has no selector, so nobody can tell when its target is ready; give it one"),
        ));
    }
    if service.ports.is_empty() {
        return Some(("NoTcpPort", format!("Service {name} has no TCP port; only TCP connections can be held")));
    }
    None
}

fn target_fault(observed: &Observed<'_>) -> Option<Cause> {
    let target = &observed.elasti.spec.scale_target_ref;
    match &observed.target {
        TargetState::Found(_) | TargetState::Unread => None,
        TargetState::Missing => Some((
            "TargetNotFound",
            format!("there is no {} {}; create it or correct spec.scaleTargetRef", target.kind(), target.name),
        )),
        TargetState::UnknownKind(why) => Some(("UnknownTargetKind", why.clone())),
    }
}

fn sharing_fault(observed: &Observed<'_>) -> Option<Cause> {
    let target = &observed.elasti.spec.scale_target_ref;
    let others = observed.shared_with.join(", ");
    (!others.is_empty()).then(|| {
        let message = format!(
            "{} {} is also the target of ElastiService {others}, for another Service, whose clients would lose it; put the ports of all into one Service with one ElastiService; the target is not put to sleep meanwhile",
            target.kind(),
            target.name
        );
        ("TargetShared", message)
    })
}

fn trigger_fault(observed: &Observed<'_>) -> Option<Cause> {
    let spec = &observed.elasti.spec;
    if let Some(fault) = spec.enabled_period.as_ref().and_then(schedule::fault) {
        return Some(("InvalidSchedule", format!("{fault}; the target is never put to sleep meanwhile")));
    }
    if let Some(fault) = idleness::fault(spec) {
        return Some(("InvalidTrigger", format!("{fault}; the target is never put to sleep meanwhile")));
    }
    match observed.triggers.as_ref().map(|triggers| &triggers.verdict) {
        Some(Verdict::Unknown(why)) => {
            Some(("TriggerFailed", format!("{why}; the target is not put to sleep meanwhile")))
        }
        _ => None,
    }
}

fn autoscaler_fault(observed: &Observed<'_>) -> Option<Cause> {
    plan::autoscaler::fault(&observed.autoscaler, observed.elasti.spec.autoscaler.as_ref())
        .map(|(_, reason, message)| (reason, message))
}

fn probe_fault(observed: &Observed<'_>) -> Option<Cause> {
    let fault = probes::fault(&observed.elasti.spec)?;
    Some(("InvalidProbeResponse", format!("{fault}; the rule is left out, so what it should answer wakes the target")))
}

fn resolver_fault(observed: &Observed<'_>) -> Option<Cause> {
    let status = observed.elasti.status.clone().unwrap_or_default();
    observed.resolvers.iter().find_map(|resolver| {
        let error = resolver.ack.as_ref().filter(|ack| ack.revision == status.revision)?.error.as_ref()?;
        Some(("ResolverFailed", format!("resolver {}: {error}", resolver.identity.pod)))
    })
}

/// All conditions. A condition whose status does not change keeps its transition time.
pub fn conditions(observed: &Observed<'_>, mode: Mode, lasting: Lasting, now: Timestamp) -> Vec<Condition> {
    let Lasting { unknown, sources, alone } = lasting;
    let unknown = || unknown.map(|why| ("TriggerFailed", format!("{why}; the target is not put to sleep meanwhile")));
    let alone = alone.then(|| {
        let message = "no resolver is connected; look at the pods of the DaemonSet elasti-resolver";
        ("NoResolver", message.to_owned())
    });
    let faults =
        [service_fault, target_fault, sharing_fault, trigger_fault, autoscaler_fault, probe_fault, resolver_fault];
    let ready = faults.iter().find_map(|fault| fault(observed)).or(alone).or_else(unknown);
    let ready = if let Some((reason, message)) = ready {
        ("Ready", false, reason.to_owned(), message)
    } else {
        let ignored = || idleness::ignored(&observed.elasti.spec).map(|message| (IGNORED, message));
        let sources = sources.map(|message| (NO_SOURCE, message));
        let (reason, message) =
            sources.or_else(ignored).unwrap_or_else(|| ("Reconciled", "connections wake the target".to_owned()));
        ("Ready", true, reason.to_owned(), message)
    };
    let (on, reason, message) = intercepting(observed, mode);
    let intercepting = ("Intercepting", on, reason, message);
    let (on, reason, message) = target_ready(observed);
    let target_ready = ("TargetReady", on, reason, message);
    let woken = wake_with(observed).map(|(on, reason, message)| ("WakeWith", on, reason, message));
    [ready, intercepting, target_ready]
        .into_iter()
        .chain(woken)
        .map(|(type_, on, reason, message)| condition(observed, now, type_, on, reason, message))
        .collect()
}

/// What is to be said of `spec.wakeWith`, where it is given.
fn wake_with(observed: &Observed<'_>) -> Option<(bool, String, String)> {
    let named = observed.elasti.spec.wake_with.as_ref().filter(|named| !named.is_empty())?;
    let list =
        |keys: &[ObjectKey], between: &str| keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(between);
    let PartnersObserved { missing, cycle } = &observed.partners;
    if !missing.is_empty() {
        let message = format!(
            "spec.wakeWith names ElastiServices that do not exist: {}; create them or take the names out",
            list(missing, ", ")
        );
        return Some((false, "PartnerNotFound".to_owned(), message));
    }
    if let Some(cycle) = cycle {
        let message = format!(
            "spec.wakeWith leads in a circle: {}; each of them wakes all, which does no harm, but if one way is meant take the other out",
            list(cycle, " wakes ")
        );
        return Some((true, "Cycle".to_owned(), message));
    }
    Some((true, "Resolved".to_owned(), format!("{} wake together with this one", named.len())))
}

/// Whether a status says that the ElastiService does its work.
pub fn ready(status: &ElastiServiceStatus) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The condition `Ready`, if it names a fault that it did not name before, or what has no effect.
pub fn new_fault<'a>(before: &[Condition], after: &'a [Condition]) -> Option<&'a Condition> {
    let ready = |condition: &&Condition| condition.type_ == "Ready";
    let told = |ready: &&Condition| ready.status == "False" || [IGNORED, NO_SOURCE].contains(&ready.reason.as_str());
    let fault = after.iter().find(ready).filter(told)?;
    let known = before.iter().find(ready).is_some_and(|before| before.reason == fault.reason);
    (!known).then_some(fault)
}

fn intercepting(observed: &Observed<'_>, mode: Mode) -> (bool, String, String) {
    if mode == Mode::Serve {
        return (false, "Serving".to_owned(), "clients reach the target directly".to_owned());
    }
    if published(observed) {
        (true, "Published".to_owned(), "resolvers accept the Service's connections".to_owned())
    } else {
        (false, "NotPublished".to_owned(), "no resolver listens for the Service yet".to_owned())
    }
}

fn target_ready(observed: &Observed<'_>) -> (bool, String, String) {
    if observed.target_ready() {
        return (true, "Ready".to_owned(), "the target serves".to_owned());
    }
    match (&observed.target, &observed.diagnosis) {
        (TargetState::Found(target), _) if target.spec_replicas == 0 => {
            (false, "AtZero".to_owned(), "the target sleeps and wakes with the next connection".to_owned())
        }
        (TargetState::Found(_), Some(diagnosis)) => (false, diagnosis.reason.clone(), diagnosis.message.clone()),
        (TargetState::Found(_), None) => (false, "Starting".to_owned(), "no pod of the target is ready yet".to_owned()),
        _ => target_fault(observed).map_or((false, "Unknown".to_owned(), String::new()), |(reason, message)| {
            (false, reason.to_owned(), message)
        }),
    }
}

fn condition(
    observed: &Observed<'_>,
    now: Timestamp,
    type_: &str,
    on: bool,
    reason: String,
    message: String,
) -> Condition {
    let status = if on { "True" } else { "False" };
    let before = observed
        .elasti
        .status
        .as_ref()
        .and_then(|status| status.conditions.iter().find(|condition| condition.type_ == type_));
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason,
        message,
        observed_generation: observed.elasti.metadata.generation,
        last_transition_time: before
            .filter(|before| before.status == status)
            .map_or_else(|| Time(now), |before| before.last_transition_time.clone()),
    }
}
