//! The resolver stream: what operator and resolver say to each other, one JSON object a line.
//!
//! A resolver opens one HTTP/2 POST to every operator replica; the request body carries [`ResolverMessage`]s, the
//! response body [`OperatorMessage`]s. Every message says the protocol version that its reader must understand; fields
//! that a reader does not know are ignored, so additions need no new version. State flows from operator to resolver;
//! what flows back are states too (acknowledged, held), repeated whole on every new stream, so that none can be lost.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::probe::ProbeRule;

use crate::cidr::Cidr;
use crate::readiness::StartingPod;

/// The newest protocol version that this build reads, and the one that it writes.
pub const PROTOCOL: u32 = 1;

/// Longest line that a reader accepts, in bytes: a snapshot is sent as one message per Service, so a line carries one
/// Service at most, with up to 1,000 backends on each of its ports.
pub const MAX_LINE: usize = 4 << 20;

/// Both sides send [`OperatorMessage::Heartbeat`] or [`ResolverMessage::Heartbeat`] this often.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);

/// A peer that has been silent for this long is taken for gone: four heartbeats, so that one late packet
/// (TCP retransmits after 200 ms at the least) costs nobody the stream.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);

/// For how long the address of a pod that is about to end is redirected at most: a client whose endpoint list is older than
/// this has other troubles, and the address must be free for the next pod soon.
pub const DRAINING_LIFETIME: Duration = Duration::from_secs(3);

/// While connections come or carry data, [`ResolverMessage::Activity`] is sent no more often than this, and as often where it
/// matters: while a target is intercepted.
pub const ACTIVITY_INTERVAL: Duration = Duration::from_secs(2);

/// The longest [`Tracking::report_interval`].
pub const ACTIVITY_INTERVAL_MAX: Duration = Duration::from_secs(30);

/// How often activity is told of a target that clients reach directly: often enough that it cannot seem idle for a cooldown.
pub fn report_interval(cooldown: Duration) -> Duration {
    (cooldown / 10).clamp(ACTIVITY_INTERVAL, ACTIVITY_INTERVAL_MAX)
}

/// By how much what an operator knows of connections to pods may lag behind while the target is intercepted: sockets are looked at
/// every second, and told of within [`ACTIVITY_INTERVAL`]; the rest is for the way.
pub const ACTIVITY_LAG: Duration = Duration::from_secs(4);

/// Whether connections to a Service are intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Clients reach the target directly; nothing of ours is in the path.
    Serve,
    /// Resolvers accept connections, hold them while the target is down, and forward them.
    Proxy,
}

impl Mode {
    /// The one spelling, in the resource, in metrics and in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Serve => "serve",
            Self::Proxy => "proxy",
        }
    }
}

/// From operator to resolver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum OperatorMessage {
    /// First on every stream: who speaks. A snapshot follows.
    Hello {
        /// Identity of the operator replica: its pod's name.
        replica: String,
        /// Whether the replica holds the Lease. Only a leader's snapshot removes what it does not name.
        leader: bool,
        /// How often the Lease has changed hands; a leader of a lower epoch is not the leader any more.
        epoch: u64,
        /// Whether it understands [`ResolverMessage::InEffect`].
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        summaries: bool,
    },
    /// The state of one Service: new, or changed.
    Service(Box<ServiceState>),
    /// The snapshot is complete: it named these ElastiServices (by UID), and no other exists in the parts that it was about.
    SnapshotEnd {
        /// UIDs of all ElastiServices of those parts.
        uids: Vec<String>,
        /// The snapshot was not about these parts ([`crate::summary::part`]), in which the resolver had said to know all already.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        unchanged: Vec<u16>,
    },
    /// What [`ResolverMessage::InEffect`] said of these parts is not understood, for other states hold by now: their
    /// acknowledgements are to be told one by one.
    Unclear {
        /// The parts.
        parts: Vec<u16>,
    },
    /// The ElastiService is gone; its UID never comes back.
    Remove {
        /// UID of the ElastiService.
        uid: String,
    },
    /// Sent every [`HEARTBEAT_INTERVAL`].
    Heartbeat {
        /// As in [`OperatorMessage::Hello`].
        leader: bool,
        /// As in [`OperatorMessage::Hello`].
        epoch: u64,
    },
}

/// All that a resolver needs to know of one ElastiService.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceState {
    /// UID of the ElastiService: the key of everything, so that a namesake is never mistaken for it.
    pub uid: String,
    /// Namespace of the ElastiService and of its Service.
    pub namespace: String,
    /// Name of the ElastiService.
    pub name: String,
    /// Name of the public Service.
    pub service: String,
    /// Counts the changes of mode and ports that were written to the resource's status. A resolver ignores a state
    /// with a lower revision than the one it has; of two with the same revision the later message holds.
    pub revision: u64,
    /// Whether connections are intercepted.
    pub mode: Mode,
    /// Whether the resolver redirects connections on its node. In [`Mode::Proxy`] only, and only once the slices are
    /// published or no pod is left that could serve.
    pub redirect: bool,
    /// The target is about to be scaled to zero: every connection is held although pods are ready. What was accepted before
    /// this was in effect is in the [`ResolverMessage::Traffic`] that precedes the acknowledgement.
    #[serde(default)]
    pub holding: bool,
    /// The Service's cluster IPs, one per family; their connections are redirected.
    pub cluster_ips: Vec<IpAddr>,
    /// Cluster IPs of the private Service, which kube-proxy keeps fresh: where a resolver forwards to when it has heard
    /// from no operator for long.
    pub fallback: Vec<IpAddr>,
    /// The Service's TCP ports.
    pub ports: Vec<PortState>,
    /// UIDs of the pods behind [`PortState::draining`]: what they dial themselves is not redirected.
    #[serde(default)]
    pub draining_pods: Vec<String>,
    /// Pods that may be ready before EndpointSlices say so; resolvers that hold connections ask them. None while a pod is
    /// ready as far as slices know.
    #[serde(default)]
    pub starting: Vec<StartingPod>,
    /// How many resolvers hold connections and ask, rounded up to a power of two: they share what a pod is asked.
    #[serde(default)]
    pub asking: u32,
    /// How connections are held.
    pub hold: HoldPolicy,
    /// HTTP requests that are answered in place of the target.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<ProbeRule>,
    /// Connections to the target's pods are to be followed; `None` when no trigger asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracking: Option<Tracking>,
}

/// What is in effect of a [`ServiceState`] when all is as it asks, and nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// [`ServiceState::revision`].
    pub revision: u64,
    /// Connections are redirected, where the resolver redirects at all.
    pub redirecting: bool,
    /// Every connection is held.
    pub holding: bool,
}

impl ServiceState {
    /// What a resolver acknowledges that has all of it in effect.
    pub fn asks(&self) -> Asked {
        let redirecting = self.mode == Mode::Proxy && self.redirect;
        Asked { revision: self.revision, redirecting, holding: self.holding }
    }
}

/// Which connections to pods resolvers follow, each those of the pods on its own node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tracking {
    /// The addresses of the target's pods, ready or not, by node.
    pub nodes: Vec<TrackedNode>,
    /// Clients whose connections do not count.
    #[serde(default)]
    pub ignore_sources: Vec<Cidr>,
    /// How often activity is told while it lasts; less than [`ACTIVITY_INTERVAL`] stands for that.
    #[serde(default)]
    pub report_interval: Duration,
}

/// The addresses of the target's pods on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackedNode {
    /// Name of the node.
    pub node: String,
    /// The addresses.
    pub endpoints: Vec<TrackedEndpoint>,
}

/// One address of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackedEndpoint {
    /// Pod address and target port.
    pub address: SocketAddr,
    /// UID of the pod; empty when the endpoint is none of a pod.
    pub pod: String,
    /// Whether clients may be sent there.
    pub ready: bool,
}

/// A number that stands for a set of addresses, in whatever order: [`ResolverMessage::Activity`] says by it which pods it is
/// about. FNV-1a of 64 bits, over the sorted texts.
pub fn digest(addresses: impl IntoIterator<Item = SocketAddr>) -> u64 {
    let mut texts: Vec<String> = addresses.into_iter().map(|address| format!("{address};")).collect();
    texts.sort_unstable();
    texts
        .iter()
        .flat_map(|text| text.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// One TCP port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortState {
    /// The port's number in the Service: what clients dial.
    pub port: u16,
    /// The resolver's listener for it, unique in the cluster.
    pub interception_port: u16,
    /// Ready endpoints of the target for this port: pod address and target port.
    pub backends: Vec<SocketAddr>,
    /// Addresses of the target's pods that are about to end, while it has no ready one: what pods still dial there is
    /// redirected too, for no longer than [`DRAINING_LIFETIME`] after the resolver first heard of the address.
    #[serde(default)]
    pub draining: Vec<SocketAddr>,
    /// What is spoken on the port, as far as anybody has said.
    #[serde(default)]
    pub protocol: Protocol,
    /// Connections to the target begin with a PROXY protocol v2 header that names the client.
    #[serde(default)]
    pub proxy_protocol: bool,
    /// What a client does that wakes the target.
    #[serde(default)]
    pub wakes: Wakes,
}

/// What a client of a target at zero does that wakes it. One that leaves before that has never been there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Wakes {
    /// It connects.
    #[default]
    Connection,
    /// It sends something, or stays for a moment ([`SILENCE`]).
    DataOrSilence,
    /// It sends something.
    Data,
}

/// A client that has sent nothing for this long waits for the server to speak first; a health check that only connects has
/// left by then, and one that sends does so at once.
pub const SILENCE: Duration = Duration::from_millis(200);

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Nobody has said: whoever speaks first shows it.
    #[default]
    Auto,
    /// HTTP/1 or HTTP/2 without TLS.
    Http,
    /// Anything else: bytes.
    Tcp,
}

/// How long and how many connections are held for one ElastiService.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HoldPolicy {
    /// A connection that has been held for this long is closed.
    pub timeout: Duration,
    /// More connections than this are refused, per resolver.
    pub max_connections: u32,
    /// What a held connection may send before its sender has to wait, in bytes; `None`: as much as the kernel takes.
    #[serde(default)]
    pub max_buffered_bytes: Option<u32>,
    /// Connections, or requests of HTTP, that one resolver has open to each ready pod at once; more wait. `None`: any
    /// number of connections; of requests [`HTTP_CONCURRENCY`], beyond which they wait for a while only.
    #[serde(default)]
    pub concurrency: Option<u32>,
}

/// HTTP requests that one resolver has open to each ready pod at once, where nothing else is said. All that are held go at
/// the instant their target listens, when the first of its workers may have to take them all: nginx has 512 to 1024
/// connections for each (`worker_connections`), Apache 150 workers and 511 in the queue, and two nodes come at once.
pub const HTTP_CONCURRENCY: u32 = 250;

impl HoldPolicy {
    /// Ten minutes, as KubeElasti holds, and 10,000 connections, as Knative's activator queues for a revision.
    pub const DEFAULT: Self =
        Self { timeout: Duration::from_mins(10), max_connections: 10_000, max_buffered_bytes: None, concurrency: None };
}

impl Default for HoldPolicy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// From resolver to operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ResolverMessage {
    /// First on every stream: who speaks.
    Hello {
        /// Name of the resolver's pod; must be the pod that the token was issued for.
        pod: String,
        /// Name of its node.
        node: String,
        /// The pod's addresses, at most one per family: what slices publish.
        addresses: Vec<IpAddr>,
        /// `None` when connections are redirected on the node by eBPF, else why they are not.
        redirect_disabled: Option<String>,
        /// What the resolver knows already, by parts ([`crate::summary::Summary`]): the snapshot may leave out where the operator
        /// has the same.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        known: Option<Vec<u64>>,
    },
    /// Of each of these parts ([`crate::summary`]), what the resolver has in effect are the states with this summary, each as it asks
    /// ([`ServiceState::asks`]), and there is no traffic but that which is told. Sent only to operators that understand it.
    InEffect {
        /// Part and summary.
        parts: Vec<(u16, u64)>,
    },
    /// What the resolver has made of a [`ServiceState`].
    Ack {
        /// UID of the ElastiService.
        uid: String,
        /// Revision of the state that is in effect.
        revision: u64,
        /// Every interception port of the state has an open listener.
        listening: bool,
        /// Connections on the node are redirected.
        redirecting: bool,
        /// Every connection is held, as [`ServiceState::holding`] asks.
        #[serde(default)]
        holding: bool,
        /// Why it is not as the state says, if so.
        error: Option<String>,
    },
    /// How much traffic an ElastiService has at this resolver: sent at once when `held` leaves zero or returns to it, and before
    /// an acknowledgement of something new, else no more often than every [`HEARTBEAT_INTERVAL`] while it changes.
    Traffic {
        /// UID of the ElastiService.
        uid: String,
        /// Connections that are waiting for the target now.
        held: u32,
        /// Connections that are forwarded now.
        forwarding: u32,
        /// Connections accepted since the resolver started; growth is traffic.
        accepted: u64,
    },
    /// What the connections to the pods of an ElastiService on this node do, those of resolvers and probers aside. Sent only where
    /// a state has [`Tracking`] with pods of the node: at the next heartbeat when another answer than before is given to
    /// whether anything is known or open, else every [`Tracking::report_interval`] while there is activity.
    Activity {
        /// UID of the ElastiService.
        uid: String,
        /// [`digest`] of the addresses that this is about.
        endpoints: u64,
        /// Connections that are open now; `None` when some may be that are older than the programs and silent since.
        open: Option<u32>,
        /// Connections opened since they are followed.
        opened: u64,
        /// For how long no connection was opened or carried data, in ms: at the time of sending, and no longer than they have
        /// been followed.
        idle_ms: u64,
        /// Why nothing of this can be relied on, if so.
        unknown: Option<String>,
    },
    /// The resolver is about to stop: it must leave all slices; it goes on serving meanwhile.
    Leaving,
    /// Sent every [`HEARTBEAT_INTERVAL`].
    Heartbeat,
}

/// Why a line is not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The sender is newer and means something that this build cannot know.
    #[error("the message needs protocol version {needed}, this build knows {PROTOCOL}: upgrade it")]
    NewerVersion {
        /// The version that the message needs.
        needed: u32,
    },
    /// Not JSON, or not a message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Malformed(#[from] serde_json::Error),
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    /// The protocol version that the reader must understand.
    v: u32,
    #[serde(flatten)]
    message: T,
}

/// One line, newline included.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(&Envelope { v: PROTOCOL, message })?;
    line.push(b'\n');
    Ok(line)
}

/// Reads one line. A message of a newer protocol version is told apart from a broken one.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, DecodeError> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let Version { v } = serde_json::from_slice(line)?;
    if v > PROTOCOL {
        return Err(DecodeError::NewerVersion { needed: v });
    }
    Ok(serde_json::from_slice::<Envelope<T>>(line)?.message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::{Probe, ProbeAction, TargetPort};

    fn starting() -> StartingPod {
        let probe =
            |action| Probe { action, successes: 1, period: Duration::from_secs(10), timeout: Duration::from_secs(1) };
        let http = ProbeAction::Http {
            tls: true,
            port: 8443,
            path: "/healthz?full".into(),
            headers: vec![("x-probe".into(), "1".into())],
        };
        StartingPod {
            uid: "q".into(),
            addresses: vec!["10.244.0.9".parse().unwrap()],
            ports: vec![TargetPort { port: 80, target: 8080 }],
            containers: vec![
                vec![probe(ProbeAction::Tcp { port: 8080 }), probe(http)],
                vec![probe(ProbeAction::Grpc { port: 9090, service: String::new() })],
            ],
            confirmation: Duration::from_secs(15),
        }
    }

    fn service() -> ServiceState {
        ServiceState {
            uid: "u".into(),
            namespace: "n".into(),
            name: "e".into(),
            service: "s".into(),
            revision: 3,
            mode: Mode::Proxy,
            redirect: true,
            holding: true,
            cluster_ips: vec!["10.96.0.1".parse().unwrap(), "fd00:96::1".parse().unwrap()],
            fallback: vec![],
            ports: vec![PortState {
                port: 80,
                interception_port: 20_000,
                backends: vec!["10.244.0.9:8080".parse().unwrap(), "[fd00::9]:8080".parse().unwrap()],
                draining: vec!["10.244.0.8:8080".parse().unwrap()],
                protocol: Protocol::Http,
                proxy_protocol: true,
                wakes: Wakes::Data,
            }],
            draining_pods: vec!["p".into()],
            starting: vec![starting()],
            asking: 2,
            hold: HoldPolicy::default(),
            probes: vec![],
            tracking: Some(Tracking {
                nodes: vec![TrackedNode {
                    node: "n".into(),
                    endpoints: vec![TrackedEndpoint {
                        address: "10.244.0.9:8080".parse().unwrap(),
                        pod: "p".into(),
                        ready: true,
                    }],
                }],
                ignore_sources: vec!["10.0.0.0/8".parse().unwrap()],
                report_interval: report_interval(Duration::from_mins(1)),
            }),
        }
    }

    #[test]
    fn a_set_of_addresses_has_one_digest_and_another_set_another() {
        let [a, b, c] = ["10.0.0.1:80", "10.0.0.1:81", "[fd00::1]:80"].map(|address| address.parse().unwrap());
        assert_eq!(digest([a, b, c]), digest([c, a, b]));
        assert_ne!(digest([a, b]), digest([a, c]));
        assert_ne!(digest([]), digest([a]));
    }

    #[test]
    fn activity_is_told_many_times_in_a_cooldown_and_no_more_often_than_need_be() {
        for (cooldown, interval) in [(1, 2), (20, 2), (60, 6), (300, 30), (900, 30), (604_800, 30)] {
            assert_eq!(report_interval(Duration::from_secs(cooldown)), Duration::from_secs(interval));
        }
    }

    #[test]
    fn messages_survive_the_wire() {
        let messages = [
            OperatorMessage::Hello { replica: "a".into(), leader: true, epoch: 4, summaries: true },
            OperatorMessage::Service(Box::new(service())),
            OperatorMessage::SnapshotEnd { uids: vec!["u".into()], unchanged: vec![3] },
            OperatorMessage::Unclear { parts: vec![1023] },
            OperatorMessage::Heartbeat { leader: false, epoch: 4 },
        ];
        for message in messages {
            let line = encode(&message).unwrap();
            assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
            assert_eq!(decode::<OperatorMessage>(&line).unwrap(), message);
        }
        let ack = ResolverMessage::Ack {
            uid: "u".into(),
            revision: 1,
            listening: true,
            redirecting: false,
            holding: true,
            error: None,
        };
        assert_eq!(decode::<ResolverMessage>(&encode(&ack).unwrap()).unwrap(), ack);
        let activity = ResolverMessage::Activity {
            uid: "u".into(),
            endpoints: u64::MAX,
            open: None,
            opened: 7,
            idle_ms: 1500,
            unknown: Some("x".into()),
        };
        assert_eq!(decode::<ResolverMessage>(&encode(&activity).unwrap()).unwrap(), activity);
        let in_effect = ResolverMessage::InEffect { parts: vec![(0, u64::MAX), (1023, 1)] };
        assert_eq!(decode::<ResolverMessage>(&encode(&in_effect).unwrap()).unwrap(), in_effect);
        let leaving = encode(&ResolverMessage::Leaving).unwrap();
        assert_eq!(decode::<ResolverMessage>(&leaving).unwrap(), ResolverMessage::Leaving);
    }

    #[test]
    fn peers_that_know_no_summaries_are_understood() {
        let hello = br#"{"v":1,"type":"hello","replica":"a","leader":true,"epoch":4}"#;
        let expected = OperatorMessage::Hello { replica: "a".into(), leader: true, epoch: 4, summaries: false };
        assert_eq!(decode::<OperatorMessage>(hello).unwrap(), expected);
        let end = br#"{"v":1,"type":"snapshotEnd","uids":["u"]}"#;
        let expected = OperatorMessage::SnapshotEnd { uids: vec!["u".into()], unchanged: vec![] };
        assert_eq!(decode::<OperatorMessage>(end).unwrap(), expected);
        let hello = br#"{"v":1,"type":"hello","pod":"p","node":"n","addresses":[],"redirectDisabled":null}"#;
        let ResolverMessage::Hello { known, .. } = decode(hello).unwrap() else { panic!("no hello") };
        assert_eq!(known, None);
    }

    #[test]
    fn a_state_of_an_operator_that_knows_no_draining_pods_is_read() {
        let mut old = serde_json::to_value(service()).unwrap();
        old.as_object_mut().unwrap().remove("drainingPods").unwrap();
        old.as_object_mut().unwrap().remove("tracking").unwrap();
        old["ports"][0].as_object_mut().unwrap().remove("draining").unwrap();
        old["ports"][0].as_object_mut().unwrap().remove("wakes").unwrap();
        let read: ServiceState = serde_json::from_value(old).unwrap();
        assert!(read.draining_pods.is_empty() && read.ports[0].draining.is_empty());
        assert_eq!(read.ports[0].wakes, Wakes::Connection);
    }

    #[test]
    fn a_state_of_an_operator_that_knows_no_starting_pods_is_read_and_so_is_a_kind_of_probe_that_is_not_known() {
        let mut old = serde_json::to_value(service()).unwrap();
        old.as_object_mut().unwrap().remove("starting").unwrap();
        old.as_object_mut().unwrap().remove("asking").unwrap();
        let read: ServiceState = serde_json::from_value(old).unwrap();
        assert!(read.starting.is_empty() && read.asking == 0);
        let mut newer = serde_json::to_value(service()).unwrap();
        newer["starting"][0]["containers"][0][0]["action"] = serde_json::json!({"kind": "telepathy", "to": "pod"});
        let read: ServiceState = serde_json::from_value(newer).unwrap();
        assert_eq!(read.starting[0].containers[0][0].action, ProbeAction::Unknown);
    }

    #[test]
    fn unknown_fields_are_ignored_and_newer_versions_are_named() {
        let added = br#"{"v":1,"type":"remove","uid":"u","because":"new"}"#;
        assert_eq!(decode::<OperatorMessage>(added).unwrap(), OperatorMessage::Remove { uid: "u".into() });
        let newer = br#"{"v":2,"type":"teleport"}"#;
        assert!(matches!(decode::<OperatorMessage>(newer), Err(DecodeError::NewerVersion { needed: 2 })));
        assert!(matches!(decode::<OperatorMessage>(b"GET /"), Err(DecodeError::Malformed(_))));
    }
}
