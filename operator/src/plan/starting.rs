//! Pods that start: which of them resolvers may ask whether they are ready, and what.
//!
//! Part of the decision: pure. Invariants: none is named while a pod is ready as far as EndpointSlices know, before the Service
//! is intercepted, or while every connection shall be held; none that is about to end, was found at zero, whose readiness
//! was withdrawn, or of which anything is doubtful. Those wait for the EndpointSlice, as all did without this.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use elasti_api::message::Mode;
use elasti_api::readiness::{Probe, ProbeAction, StartingPod, TargetPort};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodSpec, Probe as PodProbe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::ending::DISBELIEF;
use super::{Action, Planner};
use crate::observed::ServiceObserved;

/// For so long after the last held connection the pods are still looked at: clients that were refused come again.
const FOLLOW_FOR: Duration = Duration::from_mins(1);

/// A second is what the times in objects are rounded to.
const ROUNDING: Duration = Duration::from_secs(1);

/// What kubelet and the control plane may need beyond the probes' own times until an EndpointSlice says that a pod is ready.
const PUBLICATION: Duration = Duration::from_secs(5);

/// Pods with longer probes are left to kubelet: a line of the stream carries a Service, and its length is limited.
const PROBE_TEXT: usize = 16 << 10;

/// What is remembered of the pods that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pods: BTreeMap<String, Known>,
    /// Since when the target has been at zero.
    zero_since: Option<Instant>,
    /// Whether the pods are being looked at.
    following: bool,
}

/// What is remembered of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    /// It was seen before kubelet had called it ready.
    starting: bool,
    /// Kubelet has called it ready.
    ready: bool,
    /// Since when each of its containers has been seen to run.
    running: BTreeMap<String, Instant>,
    /// When it was first seen although the target was at zero.
    at_zero: Option<Instant>,
}

/// What is to be known of a container.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// It is ready.
    Ready,
    /// It is ready when these have succeeded.
    Ask(Vec<Probe>),
    /// It cannot be asked yet; time alone changes that after this long.
    Later(Duration),
    /// It cannot be asked as things are.
    Doubtful,
}

impl Planner<'_> {
    /// Notes what is seen of the pods.
    pub(super) fn remember_pods(&mut self) {
        let now = self.now.instant;
        let at_zero = self.observed.target.found().is_some_and(|target| target.spec_replicas == 0);
        let memory = &mut self.memory.starting;
        memory.zero_since = at_zero.then(|| memory.zero_since.unwrap_or(now));
        // Pods follow within a second; one that is there later has been started by somebody who is about to raise the replicas.
        let doomed = memory.zero_since.is_some_and(|since| now.saturating_duration_since(since) < DISBELIEF);
        let mut before = std::mem::take(&mut memory.pods);
        for pod in &self.observed.pods {
            let Some(uid) = &pod.metadata.uid else { continue };
            let mut known = before.remove(uid).unwrap_or_default();
            known.ready |= condition(pod, "Ready");
            known.starting |= !known.ready;
            if doomed {
                known.at_zero.get_or_insert(now);
            }
            let mut running = std::mem::take(&mut known.running);
            for status in statuses(pod).filter(|status| runs(status)) {
                let since = running.remove(&status.name).unwrap_or(now);
                known.running.insert(status.name.clone(), since);
            }
            memory.pods.insert(uid.clone(), known);
        }
    }

    /// Whether the pods shall be looked at: connections are held, or were lately, for a target that starts.
    pub(super) fn follow_pods(&mut self) -> bool {
        let woken = self.actions.iter().any(|action| matches!(action, Action::ScaleUp { .. }));
        let runs = self.observed.target.found().is_some_and(|target| target.spec_replicas > 0);
        let lately = self.memory.starting.following && self.age(self.memory.last_traffic) < Some(FOLLOW_FOR);
        let wanted = (runs || woken)
            && self.status().mode == Some(Mode::Proxy)
            && !self.observed.target_ready()
            && self.observed.service.as_ref().is_some_and(|service| !service.selector.is_empty())
            && (self.observed.held() > 0 || lately);
        if wanted {
            self.check_after(FOLLOW_FOR);
        }
        self.memory.starting.following = wanted;
        wanted
    }

    /// The pods that resolvers may ask.
    pub(super) fn starting(&mut self, service: &ServiceObserved) -> Vec<StartingPod> {
        let runs = self.observed.target.found().is_some_and(|target| target.spec_replicas > 0);
        if self.status().mode != Some(Mode::Proxy) || !runs || self.observed.target_ready() || self.holding() {
            return Vec::new();
        }
        let mut starting = Vec::new();
        for pod in &self.observed.pods {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            let Some(known) = self.memory.starting.pods.get(&uid).cloned() else { continue };
            if known.at_zero.is_some() && !self.passed(known.at_zero, DISBELIEF) {
                continue;
            }
            match starting_pod(pod, &known, service, self.now.instant) {
                Ok(pod) => starting.push(pod),
                Err(Some(later)) => self.check_after(later),
                Err(None) => {}
            }
        }
        starting
    }

    /// How many resolvers ask, in steps: not every change is worth a message to all.
    pub(super) fn asking(&self) -> u32 {
        let asking = self.observed.resolvers.iter().filter(|resolver| resolver.traffic.held > 0).count();
        u32::try_from(asking.max(1).next_power_of_two()).unwrap_or(u32::MAX)
    }
}

/// How a pod is asked; or that it cannot be, and after how long time alone may change that.
fn starting_pod(
    pod: &Pod,
    known: &Known,
    service: &ServiceObserved,
    now: Instant,
) -> Result<StartingPod, Option<Duration>> {
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else { return Err(None) };
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    // A pod in its node's network has an address at which anybody may answer.
    if pod.metadata.deletion_timestamp.is_some() || ended || spec.host_network == Some(true) || !known.starting {
        return Err(None);
    }
    let ready = condition(pod, "Ready");
    if !ready && (known.ready || withdrawn(pod)) {
        return Err(None);
    }
    let gates = spec.readiness_gates.iter().flatten().all(|gate| condition(pod, &gate.condition_type));
    let initialized = spec.init_containers.iter().flatten().all(is_sidecar) || condition(pod, "Initialized");
    if !gates || !initialized {
        return Err(None);
    }
    let own = || status.pod_ip.iter().chain(status.pod_ips.iter().flatten().map(|ip| &ip.ip));
    let mut addresses: Vec<std::net::IpAddr> = own()
        .filter_map(|ip| ip.parse().ok())
        .filter(|ip: &std::net::IpAddr| service.cluster_ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4()))
        .collect();
    addresses.dedup();
    let ports = target_ports(spec, service);
    if addresses.is_empty() || ports.is_empty() {
        return Err(None);
    }
    let mut asked = Vec::new();
    let mut confirmation = Duration::ZERO;
    for container in containers(spec) {
        let status = statuses(pod).find(|status| status.name == container.name);
        let alone = containers(spec).count() == 1;
        let answer = if ready { Answer::Ready } else { answer(container, status, known, now, alone.then_some(&ports)) };
        match answer {
            Answer::Ready => {}
            Answer::Ask(probes) => asked.push(probes),
            Answer::Later(later) => return Err(Some(later)),
            Answer::Doubtful => return Err(None),
        }
        confirmation = confirmation.max(kubelets_time(container));
    }
    if asked.iter().flatten().map(length).sum::<usize>() > PROBE_TEXT {
        return Err(None);
    }
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    Ok(StartingPod { uid, addresses, ports, containers: asked, confirmation: confirmation + PUBLICATION })
}

/// Whether a container is ready, or how it is asked. `alone` has the pod's ports if it is the only one: without a probe it is
/// ready as soon as it runs, and what listens there cannot be anybody else.
fn answer(
    container: &Container,
    status: Option<&ContainerStatus>,
    known: &Known,
    now: Instant,
    alone: Option<&Vec<TargetPort>>,
) -> Answer {
    if status.is_some_and(|status| status.ready) {
        return Answer::Ready;
    }
    let started = status.is_some_and(|status| status.started == Some(true));
    let startup = container.startup_probe.as_ref().filter(|_| !started);
    let mut asked = Vec::new();
    for spec in startup.into_iter().chain(&container.readiness_probe) {
        let Some(action) = action(spec, container) else { return Answer::Doubtful };
        // An open port proves little, so the time that its author wants to pass first does. Who answers a request says it itself.
        let delay = seconds(spec.initial_delay_seconds, 0);
        if matches!(action, ProbeAction::Tcp { .. }) && !delay.is_zero() {
            let Some(since) = known.running.get(&container.name) else { return Answer::Doubtful };
            let age = now.saturating_duration_since(*since);
            if age < delay {
                return Answer::Later(delay.saturating_sub(age));
            }
        }
        asked.push(Probe {
            action,
            successes: spec.success_threshold.and_then(|times| u32::try_from(times).ok()).unwrap_or(1).max(1),
            period: seconds(spec.period_seconds, 10),
            timeout: seconds(spec.timeout_seconds, 1),
        });
    }
    if container.readiness_probe.is_some() || startup.is_some() {
        return Answer::Ask(asked);
    }
    match alone {
        _ if status.is_some_and(runs) => Answer::Ready,
        Some(ports) => Answer::Ask(ports.iter().map(|port| open(port.target)).collect()),
        None => Answer::Doubtful,
    }
}

/// That a port is open, for a container that has no probe.
fn open(port: u16) -> Probe {
    let second = Duration::from_secs(1);
    Probe { action: ProbeAction::Tcp { port }, successes: 1, period: second, timeout: second }
}

/// What a probe asks; nothing when it cannot be asked over the network, or not of the pod.
fn action(probe: &PodProbe, container: &Container) -> Option<ProbeAction> {
    if let Some(http) = &probe.http_get {
        let headers = http.http_headers.iter().flatten();
        let port = resolve(&http.port, std::iter::once(container))?;
        return http.host.as_deref().unwrap_or_default().is_empty().then(|| ProbeAction::Http {
            tls: http.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")),
            port,
            path: http.path.clone().unwrap_or_else(|| "/".to_owned()),
            headers: headers.map(|header| (header.name.clone(), header.value.clone())).collect(),
        });
    }
    if let Some(tcp) = &probe.tcp_socket {
        let port = resolve(&tcp.port, std::iter::once(container))?;
        return tcp.host.as_deref().unwrap_or_default().is_empty().then_some(ProbeAction::Tcp { port });
    }
    let grpc = probe.grpc.as_ref()?;
    Some(ProbeAction::Grpc { port: grpc.port.try_into().ok()?, service: grpc.service.clone().unwrap_or_default() })
}

fn length(probe: &Probe) -> usize {
    match &probe.action {
        ProbeAction::Http { path, headers, .. } => {
            path.len() + headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
        }
        ProbeAction::Grpc { service, .. } => service.len(),
        ProbeAction::Tcp { .. } | ProbeAction::Unknown => 0,
    }
}

/// Where the pod serves the Service's ports.
fn target_ports(spec: &PodSpec, service: &ServiceObserved) -> Vec<TargetPort> {
    let of_port = |port: u16| {
        let spec_port = service
            .spec_ports
            .iter()
            .find(|spec| spec.port == i32::from(port) && spec.protocol.as_deref().unwrap_or("TCP") == "TCP")?;
        match &spec_port.target_port {
            Some(target) if *target != IntOrString::Int(0) => resolve(target, containers(spec)),
            _ => Some(port),
        }
    };
    let ports = service.ports.iter();
    ports.filter_map(|port| Some(TargetPort { port: port.port, target: of_port(port.port)? })).collect()
}

/// A port by its number, or by its name in one of these containers.
fn resolve<'a>(port: &IntOrString, mut containers: impl Iterator<Item = &'a Container>) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => containers.find_map(|container| {
            let mut ports = container.ports.iter().flatten();
            let named = ports
                .find(|port| port.name.as_ref() == Some(name) && port.protocol.as_deref().unwrap_or("TCP") == "TCP")?;
            u16::try_from(named.container_port).ok()
        }),
    }
    .filter(|port| *port > 0)
}

/// How long kubelet may take for a container's probes once they succeed.
fn kubelets_time(container: &Container) -> Duration {
    let probes = container.startup_probe.iter().chain(&container.readiness_probe);
    probes
        .map(|probe| {
            let times = u32::try_from(probe.success_threshold.unwrap_or(1)).unwrap_or(1);
            seconds(probe.initial_delay_seconds, 0) + seconds(probe.period_seconds, 10) * times
        })
        .sum()
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
}

/// The containers whose readiness is the pod's.
fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers.iter().flatten().filter(|container| is_sidecar(container)).chain(&spec.containers)
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn statuses(pod: &Pod) -> impl Iterator<Item = &ContainerStatus> {
    let status = pod.status.iter();
    status.flat_map(|status| status.init_container_statuses.iter().chain(&status.container_statuses).flatten())
}

fn runs(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

fn condition(pod: &Pod, type_: &str) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == type_ && condition.status == "True")
}

/// Whether a pod that is not ready has been: kubelet notes `Ready` as false when it first hears of a pod, and again only when
/// it was true in between.
fn withdrawn(pod: &Pod) -> bool {
    let Some(status) = &pod.status else { return false };
    let ready = status.conditions.iter().flatten().find(|condition| condition.type_ == "Ready");
    let Some(since) = ready.and_then(|ready| ready.last_transition_time.as_ref()) else { return false };
    status.start_time.as_ref().is_none_or(|start| since.0.duration_since(start.0) > signed(ROUNDING))
}

fn signed(duration: Duration) -> jiff::SignedDuration {
    jiff::SignedDuration::try_from(duration).unwrap_or(jiff::SignedDuration::MAX)
}
