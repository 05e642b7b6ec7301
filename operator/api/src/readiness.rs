//! How a starting pod is asked whether it is ready: its own probes, as far as they can be asked over the network.
//!
//! Part of [`crate::message`]. The operator says only what it is sure of: a pod that is named here is ready as soon as all of
//! its probes have succeeded. Whatever is doubtful is not named, and waits for the EndpointSlice.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A pod of the target that has an address and is not ready as far as EndpointSlices know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartingPod {
    /// UID of the pod.
    pub uid: String,
    /// Its addresses in the families of the Service, the one that kubelet asks first.
    pub addresses: Vec<IpAddr>,
    /// Where it serves the ports of the Service.
    pub ports: Vec<TargetPort>,
    /// For each container that still has to say that it is ready: its probes, one after the other. None: the pod is ready.
    pub containers: Vec<Vec<Probe>>,
    /// For how long its answers count without an EndpointSlice that says the same: as long as kubelet may need.
    pub confirmation: Duration,
}

/// Where a pod serves a port of the Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TargetPort {
    /// The number of the Service port.
    pub port: u16,
    /// The number of the pod's port.
    pub target: u16,
}

/// One probe of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// What is asked.
    pub action: ProbeAction,
    /// `successThreshold`: how many answers in a row must be good, 1 or more.
    pub successes: u32,
    /// `periodSeconds`: the time between them.
    pub period: Duration,
    /// `timeoutSeconds`: how long an answer may take.
    pub timeout: Duration,
}

/// What is asked of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum ProbeAction {
    /// A GET that must be answered with a status from 200 to 399.
    Http {
        /// Over TLS, whatever certificate the container has.
        tls: bool,
        /// The container's port.
        port: u16,
        /// Path and query.
        path: String,
        /// Headers in addition to the usual ones, or in place of them.
        headers: Vec<(String, String)>,
    },
    /// A connection that must be accepted.
    Tcp {
        /// The container's port.
        port: u16,
    },
    /// `grpc.health.v1.Health/Check`, which must be answered with `SERVING`.
    Grpc {
        /// The container's port.
        port: u16,
        /// The service that is asked for; empty: the server as a whole.
        service: String,
    },
    /// What a newer operator knows: it cannot be asked, so it never succeeds.
    #[serde(other)]
    Unknown,
}
