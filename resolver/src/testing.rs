//! What unit tests share.

use std::sync::Arc;
use std::time::Duration;

use elasti_api::message::{HoldPolicy, Mode, PortState, Protocol, ServiceState, Wakes};

use crate::fallback::Phase;
use crate::forward::Dialer;
use crate::metrics::Metrics;
use crate::readiness::Asker;
use crate::report::Board;
use crate::standby::{Common, Standby};

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

/// Of this state, without a Service. Starting pods are asked every `interval`, if it is not zero.
pub(crate) fn standby(state: ServiceState, interval: Duration) -> Arc<Standby> {
    standby_counted(state, interval, &prometheus::Registry::new())
}

/// The same, with metrics in this registry.
pub(crate) fn standby_counted(
    state: ServiceState,
    interval: Duration,
    registry: &prometheus::Registry,
) -> Arc<Standby> {
    let metrics = Metrics::new(registry).unwrap();
    let asker = Asker::new(Dialer::default(), interval, metrics.clone());
    let common = Common { metrics, asker, bell: Board::default().bell() };
    Arc::new(Standby::new(Arc::new(common), 1, Arc::new(state), Phase::Informed))
}
