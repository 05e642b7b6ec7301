//! What resolvers shall know of an ElastiService, from what is observed of it.
//!
//! Pure. The mode, the ports and the revision are those of the status as it was read back, but that a target at zero is
//! intercepted at once: whoever scaled it by hand did not wait for us. [`crate::plan`] asks for the rest.

use elasti_api::message::{Mode, PortState, ServiceState};

use super::{Settings, draining};
use crate::observed::{DrainingEndpoint, Observed, ServiceObserved};
use crate::{probes, protocol};

/// Whether the Service's slices name at least one resolver.
pub fn published(observed: &Observed<'_>) -> bool {
    let service = &observed.elasti.spec.service;
    observed.slices.iter().any(|slice| slice.service == *service && !slice.endpoints.is_empty())
}

/// What resolvers shall know, from the status as it was read back; `None` before the status says a mode and ports. That a
/// target is at zero is told under the revision that holds: to write it first takes two answers of the API server, and the
/// pods are about to end.
pub(super) fn state(
    observed: &Observed<'_>,
    service: &ServiceObserved,
    draining: &[&DrainingEndpoint],
    holding: bool,
    settings: &Settings,
) -> Option<ServiceState> {
    let elasti = observed.elasti;
    let status = elasti.status.as_ref()?;
    let at_zero = observed.target.found().is_some_and(|target| target.spec_replicas == 0);
    let written = status.mode?;
    let mode = if at_zero { Mode::Proxy } else { written };
    let ports: Vec<PortState> = service
        .ports
        .iter()
        .filter_map(|port| {
            let own = status.ports.iter().find(|own| own.port == port.port)?;
            Some(PortState {
                port: port.port,
                interception_port: own.interception_port,
                backends: observed.backends.get(&port.port).cloned().unwrap_or_default(),
                draining: draining::of_port(draining, port.port),
                protocol: protocol::protocol(&elasti.spec, port),
                proxy_protocol: protocol::port_spec(&elasti.spec, port.port)
                    .is_some_and(|spec| spec.proxy_protocol.is_some()),
                wakes: protocol::wakes(&elasti.spec, port),
            })
        })
        .collect();
    if ports.is_empty() {
        return None;
    }
    Some(ServiceState {
        uid: observed.uid().to_owned(),
        namespace: elasti.metadata.namespace.clone().unwrap_or_default(),
        name: elasti.metadata.name.clone().unwrap_or_default(),
        service: elasti.spec.service.clone(),
        revision: status.revision,
        mode,
        redirect: mode == Mode::Proxy && (published(observed) || !observed.target_ready()),
        holding,
        cluster_ips: service.cluster_ips.clone(),
        fallback: observed.private.as_ref().map(|private| private.cluster_ips.clone()).unwrap_or_default(),
        ports,
        draining_pods: draining::pods(draining),
        starting: Vec::new(),
        asking: 0,
        hold: elasti.spec.hold_policy(settings.hold),
        probes: probes::rules(&elasti.spec),
        tracking: None,
    })
}

/// The state of an ElastiService whose Service cannot be intercepted any more: no port, so every listener closes; `None`
/// when resolvers have never been told of one.
pub(super) fn closed(observed: &Observed<'_>, settings: &Settings) -> Option<ServiceState> {
    let status = observed.elasti.status.as_ref().filter(|status| !status.ports.is_empty())?;
    let metadata = &observed.elasti.metadata;
    Some(ServiceState {
        uid: observed.uid().to_owned(),
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
        service: observed.elasti.spec.service.clone(),
        revision: status.revision,
        mode: Mode::Serve,
        redirect: false,
        holding: false,
        cluster_ips: Vec::new(),
        fallback: Vec::new(),
        ports: Vec::new(),
        draining_pods: Vec::new(),
        starting: Vec::new(),
        asking: 0,
        hold: observed.elasti.spec.hold_policy(settings.hold),
        probes: Vec::new(),
        tracking: None,
    })
}
