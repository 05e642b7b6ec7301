//! A stand for resolvers: a scripted operator, and the states that it tells. Used by the resolver's own tests, where the
//! resolver is part of the test's process, and by the benchmarks, where it is the released program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a harness fails loudly"
)]

use std::net::SocketAddr;
use std::time::Duration;

use elasti_api::message::{HoldPolicy, Mode, PortState, Protocol, ServiceState, Wakes};

use crate::operator::{Identity, Operator};

pub mod operator;

/// Conditions come true within milliseconds; a busy machine gets more.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// What must happen before the deadline.
pub async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.expect("it did not happen in time")
}

/// An intercepted ElastiService with one port and these backends.
pub fn state(uid: &str, revision: u64, interception_port: u16, backends: &[SocketAddr]) -> ServiceState {
    ServiceState {
        uid: uid.into(),
        namespace: "shop".into(),
        name: uid.into(),
        service: uid.into(),
        revision,
        mode: Mode::Proxy,
        redirect: true,
        holding: false,
        cluster_ips: vec!["10.96.0.1".parse().unwrap()],
        fallback: vec![],
        ports: vec![PortState {
            port: 80,
            interception_port,
            backends: backends.to_vec(),
            draining: vec![],
            protocol: Protocol::Auto,
            proxy_protocol: false,
            wakes: Wakes::default(),
        }],
        draining_pods: vec![],
        starting: vec![],
        asking: 0,
        hold: HoldPolicy::default(),
        probes: vec![],
        tracking: None,
    }
}

/// The flags of a resolver that is to connect to this operator; its own ports are any.
pub fn flags(operator: &Operator, identity: &Identity) -> [String; 8] {
    [
        format!("--operator=localhost:{}", operator.address.port()),
        format!("--ca-file={}", identity.file("ca.crt").display()),
        format!("--token-file={}", identity.file("token").display()),
        "--pod=resolver-0".to_owned(),
        "--node=node-0".to_owned(),
        "--pod-ips=127.0.0.1".to_owned(),
        "--resolver-port=0".to_owned(),
        "--resolver-proxy-port=0".to_owned(),
    ]
}
