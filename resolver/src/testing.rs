//! What unit tests share.

use elasti_api::message::{HoldPolicy, Mode, PortState, Protocol, ServiceState, Wakes};

/// An intercepted ElastiService with one port, 80, and no backend.
pub(crate) fn service_state(uid: &str, revision: u64, interception_port: u16) -> ServiceState {
    ServiceState {
        uid: uid.into(),
        namespace: "default".into(),
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
            backends: vec![],
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
