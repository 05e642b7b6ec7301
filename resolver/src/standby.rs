//! What is kept of an ElastiService until somebody connects: the newest state. What connections share, the [`Service`], is made
//! with the first of them, for on most nodes most ElastiServices never see one.
//!
//! Invariants: at most one Service is made; from then on its view is that of the newest state; its starting pods are asked from
//! when there are both. [`crate::supervisor`] says what the state is, [`crate::listeners`] and [`crate::proxy`] want the Service.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use elasti_api::message::{Mode, PortState, Protocol, ServiceState, Wakes};
use elasti_api::probe::ProbeRules;
use tokio_util::task::AbortOnDropHandle;

use crate::fallback::{self, Phase};
use crate::metrics::Metrics;
use crate::ports::PortView;
use crate::readiness::Asker;
use crate::report::{Bell, News, Traffic};
use crate::service::{Service, Starting, View};

/// What all Services are made with.
#[derive(Debug)]
pub struct Common {
    /// Counts what they do.
    pub metrics: Metrics,
    /// Asks their starting pods.
    pub asker: Asker,
    /// Rings when they have news.
    pub bell: Bell,
}

/// One ElastiService, and its Service once there is one.
#[derive(Debug)]
pub struct Standby {
    common: Arc<Common>,
    number: u64,
    told: Mutex<Told>,
    /// Made while `told` is locked.
    service: OnceLock<Arc<Service>>,
}

/// What the operators have said, and by how much it is believed.
#[derive(Debug)]
struct Told {
    state: Arc<ServiceState>,
    phase: Phase,
    asking: Option<AbortOnDropHandle<()>>,
}

impl Standby {
    /// Of this state. `number` stands for it on the [board](crate::report::Board).
    pub fn new(common: Arc<Common>, number: u64, state: Arc<ServiceState>, phase: Phase) -> Self {
        let told = Mutex::new(Told { state, phase, asking: None });
        Self { common, number, told, service: OnceLock::new() }
    }

    /// What stands for it on the board.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// From now on the state is this one. Needs a runtime when pods start.
    pub fn set(&self, state: Arc<ServiceState>, phase: Phase) {
        let mut told = self.told();
        let switched = told.state.mode != state.mode;
        (told.state, told.phase) = (state, phase);
        let state = &told.state;
        if switched {
            self.common.metrics.switched(&state.namespace, &state.service, state.mode == Mode::Proxy);
        }
        if let Some(service) = self.service.get() {
            let known = service.view().probes.clone();
            service.set(view(state, probes(known, state), phase));
            self.ask(&mut told, service);
        }
    }

    /// The Service, if there has been a connection.
    pub fn made(&self) -> Option<&Arc<Service>> {
        self.service.get()
    }

    /// The Service; it is made if there is none yet. Needs a runtime when pods start.
    pub fn service(&self) -> &Arc<Service> {
        if let Some(service) = self.service.get() {
            return service;
        }
        let mut told = self.told();
        let service = self.service.get_or_init(|| {
            let Told { state, phase, .. } = &*told;
            let news = News::new(self.number, self.common.bell.clone());
            let service = Service::new(&state.namespace, &state.service, self.common.metrics.clone(), news);
            service.set(view(state, probes(None, state), *phase));
            Arc::new(service)
        });
        self.ask(&mut told, service);
        service
    }

    fn ask(&self, told: &mut Told, service: &Arc<Service>) {
        if told.asking.is_none() && !told.state.starting.is_empty() {
            told.asking = self.common.asker.follow(service);
        }
    }

    /// The traffic at this moment.
    pub fn traffic(&self) -> Traffic {
        self.made().map(|service| service.traffic()).unwrap_or_default()
    }

    /// Whether this is the namespace and name of its Service.
    pub fn is(&self, namespace: &str, name: &str) -> bool {
        let state = &self.told().state;
        state.namespace == namespace && state.service == name
    }

    /// The ElastiService is gone: held connections are closed, forwarded ones end by themselves.
    pub fn remove(&self) {
        // Made if need be: of one that is gone none may be made later.
        self.service().remove();
        self.told().asking = None;
    }

    /// No code panics while it holds the lock.
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Namespace and name of the Service.
impl std::fmt::Display for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = &self.told().state;
        write!(f, "{}/{}", state.namespace, state.service)
    }
}

/// What connections need to know of `state`.
fn view(state: &ServiceState, probes: Option<Arc<ProbeRules>>, phase: Phase) -> View {
    // When the operators have gone silent they cannot end it.
    let holding = state.holding && phase == Phase::Informed;
    let ports = state.ports.iter().map(|port| {
        let view = PortView {
            number: port.port,
            targets: if holding { Arc::default() } else { fallback::targets(state, port, phase) },
            protocol: port.protocol,
            proxy_protocol: port.proxy_protocol,
            wakes: wakes(port, probes.is_some()),
            destinations: state.cluster_ips.iter().map(|ip| SocketAddr::new(*ip, port.port)).collect(),
        };
        (port.interception_port, view)
    });
    // Nor can they correct what they said of starting pods.
    let starting = state.starting.iter().filter(|_| !holding && phase == Phase::Informed).map(|pod| {
        let targets = state.ports.iter().map(|port| {
            let target = pod.ports.iter().find(|target| target.port == port.port).map(|target| target.target);
            let addresses = pod.addresses.iter().filter_map(|ip| target.map(|target| SocketAddr::new(*ip, target)));
            (port.interception_port, addresses.collect())
        });
        Starting { pod: Arc::new(pod.clone()), targets: targets.collect() }
    });
    View {
        hold: state.hold,
        ports: ports.collect(),
        direct: state.mode == Mode::Serve,
        starting: starting.collect(),
        asking: state.asking,
        ignored: state.tracking.iter().flat_map(|tracking| &tracking.ignore_sources).copied().collect(),
        probes,
    }
}

/// What a client of `port` must have done. Where some requests are answered in place of the target, its first request decides.
fn wakes(port: &PortState, probed: bool) -> Wakes {
    match (port.wakes, port.protocol) {
        (Wakes::Connection, Protocol::Auto) if probed => Wakes::DataOrSilence,
        (Wakes::Connection | Wakes::DataOrSilence, Protocol::Http) if probed => Wakes::Data,
        (wakes, _) => wakes,
    }
}

/// The rules of `state`: those that are known, if they are the same, since expressions are dear to compile.
fn probes(known: Option<Arc<ProbeRules>>, state: &ServiceState) -> Option<Arc<ProbeRules>> {
    if state.probes.is_empty() {
        return None;
    }
    known.filter(|known| known.source() == state.probes).or_else(|| {
        let (rules, faults) = ProbeRules::new(state.probes.clone());
        for fault in faults {
            tracing::warn!(namespace = state.namespace, service = state.service, fault, "left out");
        }
        Some(Arc::new(rules))
    })
}

#[cfg(test)]
mod tests;
