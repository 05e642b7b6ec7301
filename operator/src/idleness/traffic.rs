//! The `traffic` trigger: idle while no connection to the target's pods is opened or carries data, as resolvers see it.
//!
//! Pure. An answer counts only if it is complete: every node with pods of the target has a resolver that follows all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use elasti_api::cidr::Cidr;
use elasti_api::message::{TrackedEndpoint, TrackedNode, Tracking, digest};
use elasti_api::v1alpha1::{ElastiServiceSpec, IgnoredPods, IgnoredSource, ScaleTrigger, TrafficMetadata};
use kube::core::Selector;

use crate::observed::{Observed, PodEndpoint};
use crate::resolvers::ResolverObserved;
use crate::sources::Selected;

/// The trigger's type.
pub(super) const TYPE: &str = "traffic";

/// What a trigger asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficTrigger {
    /// That many open connections without data keep the target awake; `None`: none do.
    pub hold: Option<u32>,
    /// Clients whose connections do not count.
    pub ignored: BTreeSet<Cidr>,
    /// Pods whose connections do not count. An empty namespace is that of the ElastiService.
    pub ignored_pods: BTreeSet<Selected>,
    /// Beginnings of `User-Agent` headers that wake nothing.
    pub ignored_agents: Vec<String>,
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
    let hold = match (metadata.idle_connections.as_deref(), metadata.min_connections) {
        (None | Some("ignore"), None) => None,
        (None | Some("ignore"), Some(_)) => {
            return Err(wrong(
                &"minConnections has a meaning only where idleConnections is hold; write that, or take it out",
            ));
        }
        (Some("hold"), Some(0)) => return Err(wrong(&"minConnections is 0; write 1 or more")),
        (Some("hold"), least) => Some(least.unwrap_or(1)),
        (Some(other), _) => return Err(wrong(&format!("idleConnections is {other:?}; write ignore or hold"))),
    };
    let mut trigger = TrafficTrigger { hold, ignored_agents: metadata.ignore_user_agents, ..TrafficTrigger::default() };
    if trigger.ignored_agents.iter().any(String::is_empty) {
        return Err(wrong(&"ignoreUserAgents has an empty string, with which every header begins; take it out"));
    }
    for source in metadata.ignore_sources {
        let ignored = |error: &dyn std::fmt::Display| wrong(&format!("ignoreSources: {error}"));
        match source {
            IgnoredSource::Range(range) => {
                trigger.ignored.insert(range.parse().map_err(|error: elasti_api::cidr::NoCidr| ignored(&error))?);
            }
            IgnoredSource::Pods(IgnoredPods { namespace, pod_selector }) => {
                let selector = Selector::try_from(pod_selector).map_err(|error| ignored(&error))?;
                if selector.selects_all() {
                    return Err(ignored(
                        &"podSelector is empty, which is every pod; write matchLabels or matchExpressions",
                    ));
                }
                let namespace = namespace.unwrap_or_default();
                trigger.ignored_pods.insert(Selected { namespace, labels: selector.to_string() });
            }
        }
    }
    Ok(trigger)
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

/// What resolvers have to follow. `ignored` are addresses of the pods that the trigger ignores.
pub fn tracking(
    trigger: &TrafficTrigger,
    pods: &[PodEndpoint],
    ignored: &BTreeSet<IpAddr>,
    report_interval: Duration,
) -> Tracking {
    let nodes = by_node(pods).into_iter().map(|(node, pods)| {
        let endpoints = pods.into_iter().map(|pod| TrackedEndpoint {
            address: pod.address,
            pod: pod.pod.clone(),
            ready: pod.ready,
        });
        TrackedNode { node: node.to_owned(), endpoints: endpoints.collect() }
    });
    let ignored: BTreeSet<Cidr> =
        trigger.ignored.iter().copied().chain(ignored.iter().copied().map(Cidr::from)).collect();
    Tracking { nodes: nodes.collect(), ignore_sources: ignored.into_iter().collect(), report_interval }
}

/// What all resolvers together know.
pub fn connections(observed: &Observed<'_>, trigger: &TrafficTrigger) -> Connections {
    let mut since = None;
    let mut open: u32 = 0;
    for (node, pods) in by_node(&observed.endpoints) {
        if node.is_empty() {
            let address = pods[0].address;
            return Connections::Unknown(format!("nobody knows on which node {address} is"));
        }
        let addresses = digest(pods.iter().map(|pod| pod.address));
        match of_node(&observed.resolvers, node, addresses, trigger.hold.is_some()) {
            Ok((last, open_there)) => {
                since = since.max(Some(last));
                open = open.saturating_add(open_there);
            }
            Err(why) => return Connections::Unknown(format!("node {node}: {why}")),
        }
    }
    if trigger.hold.is_some_and(|least| open >= least) { Connections::Open } else { Connections::Idle(since) }
}

/// When the node's pods were last active, and how many connections to them are open, as far as that is known; with `hold` it
/// has to be.
fn of_node(resolvers: &[ResolverObserved], node: &str, addresses: u64, hold: bool) -> Result<(Instant, u32), String> {
    let mut why =
        "no resolver is connected there, and without one nobody sees connections to the target's pods; look at the \
                   pods of the DaemonSet elasti-resolver"
            .to_owned();
    let mut known = None;
    for resolver in resolvers.iter().filter(|resolver| resolver.identity.node == node && !resolver.leaving) {
        let Some(activity) = resolver.activity.as_ref().filter(|activity| activity.endpoints == addresses) else {
            why = format!("resolver {} has not told of the connections to the target's pods", resolver.identity.pod);
            continue;
        };
        if let Some(unknown) = &activity.unknown {
            why = format!("{unknown}; correct that, or use a trigger of type prometheus");
        } else if hold && activity.open.is_none() {
            "there may be open connections that are older than the resolver; restart the target's pods there, or set \
             idleConnections to ignore"
                .clone_into(&mut why);
        } else {
            let (last, open) = known.unwrap_or((activity.last, 0));
            known = Some((last.max(activity.last), open.max(activity.open.unwrap_or_default())));
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
