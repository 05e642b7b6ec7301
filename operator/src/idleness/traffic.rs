//! The `traffic` trigger: idle while no connection to the target's pods is opened or carries data, as resolvers see it.
//!
//! Pure. An answer counts only if it is complete: every node with pods of the target has a resolver that follows all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use elasti_api::cidr::Cidr;
use elasti_api::message::{TrackedEndpoint, TrackedNode, Tracking, digest};
use elasti_api::v1alpha1::{ElastiServiceSpec, ScaleTrigger, TrafficMetadata};

use crate::observed::{Observed, PodEndpoint};
use crate::resolvers::ResolverObserved;

/// The trigger's type.
pub(super) const TYPE: &str = "traffic";

/// What a trigger asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficTrigger {
    /// Whether an open connection without data keeps the target awake.
    pub hold: bool,
    /// Clients whose connections do not count.
    pub ignored: BTreeSet<Cidr>,
}

/// What is known of the connections to the target's pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connections {
    /// Nothing that can be relied on, and why: the target is taken for busy.
    Unknown(String),
    /// Connections are open that keep the target awake.
    Open,
    /// None was opened or has carried data since then; `None`: there is no pod.
    Idle(Option<Instant>),
}

/// Reads a trigger's metadata; the error says what is wrong with it.
pub(super) fn metadata(trigger: &ScaleTrigger) -> Result<TrafficTrigger, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("metadata of the traffic trigger: {error}");
    let metadata = match &trigger.metadata {
        None | Some(serde_json::Value::Null) => TrafficMetadata::default(),
        Some(metadata) => serde_json::from_value(metadata.clone()).map_err(|error| wrong(&error))?,
    };
    let hold = match metadata.idle_connections.as_deref() {
        None | Some("ignore") => false,
        Some("hold") => true,
        Some(other) => return Err(wrong(&format!("idleConnections is {other:?}; write ignore or hold"))),
    };
    let ignored = metadata.ignore_sources.iter().map(|range| range.parse()).collect::<Result<_, _>>();
    Ok(TrafficTrigger { hold, ignored: ignored.map_err(|error| wrong(&format!("ignoreSources: {error}")))? })
}

/// The trigger of this type, if there is one: it is the one that an ElastiService without triggers has. `None` too where what is
/// written of it cannot be read, which [`super::fault`] tells.
pub fn trigger(spec: &ElastiServiceSpec) -> Option<TrafficTrigger> {
    let triggers = spec.triggers.as_deref().unwrap_or_default();
    if triggers.is_empty() {
        return Some(TrafficTrigger::default());
    }
    triggers.iter().find(|trigger| trigger.type_ == TYPE).and_then(|trigger| metadata(trigger).ok())
}

/// What resolvers have to follow.
pub fn tracking(trigger: &TrafficTrigger, pods: &[PodEndpoint]) -> Tracking {
    let nodes = by_node(pods).into_iter().map(|(node, pods)| {
        let endpoints = pods.into_iter().map(|pod| TrackedEndpoint {
            address: pod.address,
            pod: pod.pod.clone(),
            ready: pod.ready,
        });
        TrackedNode { node: node.to_owned(), endpoints: endpoints.collect() }
    });
    Tracking { nodes: nodes.collect(), ignore_sources: trigger.ignored.iter().copied().collect() }
}

/// What all resolvers together know.
pub fn connections(observed: &Observed<'_>, trigger: &TrafficTrigger) -> Connections {
    let mut since = None;
    let mut open = false;
    for (node, pods) in by_node(&observed.endpoints) {
        if node.is_empty() {
            let address = pods[0].address;
            return Connections::Unknown(format!("nobody knows on which node {address} is"));
        }
        let addresses = digest(pods.iter().map(|pod| pod.address));
        match of_node(&observed.resolvers, node, addresses, trigger.hold) {
            Ok((last, some_open)) => {
                since = since.max(Some(last));
                open |= some_open;
            }
            Err(why) => return Connections::Unknown(format!("node {node}: {why}")),
        }
    }
    if open && trigger.hold { Connections::Open } else { Connections::Idle(since) }
}

/// When the node's pods were last active, and whether connections to them are open.
fn of_node(resolvers: &[ResolverObserved], node: &str, addresses: u64, hold: bool) -> Result<(Instant, bool), String> {
    let mut why =
        "no resolver is connected there, and without one nobody sees connections to the target's pods; look at the \
                   pods of the DaemonSet elasti-resolver"
            .to_owned();
    let mut known = None;
    for resolver in resolvers.iter().filter(|resolver| resolver.node == node && !resolver.leaving) {
        let Some(activity) = resolver.activity.as_ref().filter(|activity| activity.endpoints == addresses) else {
            why = format!("resolver {} has not told of the connections to the target's pods", resolver.pod);
            continue;
        };
        if let Some(unknown) = &activity.unknown {
            why = format!("{unknown}; correct that, or use a trigger of type prometheus");
        } else if hold && activity.open.is_none() {
            "there may be open connections that are older than the resolver; restart the target's pods there, or set \
             idleConnections to ignore"
                .clone_into(&mut why);
        } else {
            let (last, open) = known.unwrap_or((activity.last, false));
            known = Some((last.max(activity.last), open || activity.open.is_none_or(|open| open > 0)));
        }
    }
    known.ok_or(why)
}

fn by_node(pods: &[PodEndpoint]) -> BTreeMap<&str, Vec<&PodEndpoint>> {
    let mut nodes: BTreeMap<&str, Vec<&PodEndpoint>> = BTreeMap::new();
    for pod in pods {
        nodes.entry(&pod.node).or_default().push(pod);
    }
    nodes
}
