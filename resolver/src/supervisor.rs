//! Makes what the operators say so: one task owns the [`Directory`], the listeners and the redirects.
//!
//! The order within one round: open listeners, then redirect to them; stop redirecting, then close listeners; then say
//! what is in effect. A port that cannot be opened holds up nothing else and is tried again every second.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::message::{Asked, HEARTBEAT_TIMEOUT, Mode, OperatorMessage, PortState, Protocol, ServiceState, Wakes};
use elasti_api::probe::ProbeRules;
use elasti_runtime::admin::Readiness;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::capacity::Capacity;
use crate::claims::Claims;
use crate::connection::Context;
use crate::directory::{Directory, Speaker};
use crate::draining::Named;
use crate::fallback::{self, Patience, Phase};
use crate::interception::{self, Changes, Interception};
use crate::listener::Listener;
use crate::metrics::Metrics;
use crate::ports::PortView;
use crate::readiness::Asker;
use crate::report::{Ack, Board};
use crate::service::{Service, Starting, View};
use crate::tracking::{Track, Tracker};

/// What `/readyz` waits for.
pub const SNAPSHOT: &str = "snapshot of an operator";

/// How often ports that could not be opened are tried again, programs are looked after, and silence is measured.
const TICK: Duration = Duration::from_secs(1);

/// The redirect map is written anew every this many ticks, should somebody have changed it behind our back.
const REPAIR_TICKS: u64 = 5;

/// How long the resolver tries to open a connection to a pod of its node, to see whether that is seen.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Messages taken in before listeners and redirects follow: a snapshot costs few rounds, a lone change no wait.
const BATCH: usize = 256;

/// A message and who sent it.
#[derive(Debug)]
pub struct Said {
    /// The sender.
    pub from: Speaker,
    /// The message.
    pub message: OperatorMessage,
    /// [`elasti_api::summary::fingerprint`] of its line.
    pub fingerprint: u64,
}

/// When an operator was last heard; clones share it.
#[derive(Clone, Debug)]
pub struct Heard(Arc<Mutex<Instant>>);

impl Default for Heard {
    /// The start counts as a word: operators get the same time to speak up.
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Heard {
    /// An operator was heard now.
    pub fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn silence(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

struct Live {
    service: Arc<Service>,
    state: Arc<ServiceState>,
    /// By interception port.
    listeners: Vec<(u16, Listener)>,
    /// Asks starting pods, once there have been some.
    asking: Option<AbortOnDropHandle<()>>,
    error: Option<String>,
    probes: Option<Arc<ProbeRules>>,
    /// The state by which addresses are redirected; none while a listener is missing.
    redirected: Option<Arc<ServiceState>>,
}

/// What the supervisor is made of.
pub struct Parts {
    /// The addresses of this pod, at most one per family.
    pub pod: Vec<IpAddr>,
    /// When to believe whom.
    pub patience: Patience,
    /// What redirects.
    pub interception: Interception,
    /// What follows connections to pods, or why nothing does.
    pub track: Result<Box<dyn Track>, String>,
    /// Name of this node.
    pub node: String,
    /// What connections need.
    pub context: Context,
    /// Asks starting pods.
    pub asker: Asker,
    /// Gives each listener its share.
    pub capacity: Capacity,
    /// Where to say what is in effect.
    pub board: Board,
    /// When an operator was last heard.
    pub heard: Heard,
    /// Told when the first snapshot is in effect.
    pub readiness: Readiness,
    /// For Services' metrics.
    pub metrics: Metrics,
}

/// Owns all state.
pub struct Supervisor {
    parts: Parts,
    /// That of `parts`, which all connections share.
    context: Arc<Context>,
    directory: Directory,
    live: BTreeMap<String, Live>,
    claims: Claims,
    draining: Named,
    tracker: Tracker,
    /// Why connections to pods are not followed at the moment.
    lapse: Option<String>,
    phase: Phase,
    /// Operators were told that connections are redirected on this node.
    redirects: bool,
}

impl Supervisor {
    /// Knows of no ElastiService yet.
    pub fn new(parts: Parts) -> Self {
        let tracker = Tracker::new(parts.node.clone(), Instant::now());
        let redirects = parts.interception.redirects();
        Self {
            context: Arc::new(parts.context.clone()),
            parts,
            redirects,
            tracker,
            lapse: None,
            directory: Directory::default(),
            live: BTreeMap::new(),
            claims: Claims::default(),
            draining: Named::default(),
            phase: Phase::Informed,
        }
    }

    /// Works until the context's end. From `leaving` on nothing is redirected, the listeners stay.
    pub async fn run(mut self, mut said: mpsc::Receiver<Said>, leaving: CancellationToken) {
        let ended = self.parts.context.ended.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0;
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let draining_ends = self.draining.next_end(Instant::now());
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                () = leaving.cancelled(), if !self.parts.board.leaving() => self.leave(),
                received = said.recv_many(&mut batch, BATCH) => {
                    if received == 0 {
                        return;
                    }
                    let apply = |said: Said| self.directory.apply(said.from, said.message, said.fingerprint);
                    let touched = batch.drain(..).flat_map(apply).collect();
                    self.settle(&touched, false);
                }
                () = until(draining_ends) => self.redirect_draining(false),
                _ = tick.tick() => {
                    ticks += 1;
                    let touched = self.stale();
                    let repair = self.parts.interception.check() || ticks % REPAIR_TICKS == 0;
                    self.settle(&touched, repair);
                    self.observe();
                }
            }
        }
    }

    fn leave(&mut self) {
        self.parts.interception.stop();
        self.parts.track = Err("the resolver is about to stop".to_owned());
        self.parts.board.leave();
    }

    /// What time alone has made stale: all when the phase is another one, else what lacks a listener.
    fn stale(&mut self) -> BTreeSet<String> {
        let silence = self.parts.heard.silence();
        let phase = fallback::phase(silence, self.parts.patience);
        if phase != self.phase {
            tracing::warn!(was = ?self.phase, now = ?phase, silence_s = silence.as_secs(), "operators' silence");
            self.phase = phase;
            return self.live.keys().cloned().collect();
        }
        self.live.iter().filter(|(_, live)| live.error.is_some()).map(|(uid, _)| uid.clone()).collect()
    }

    /// Follows the connections to the pods that the states of these name.
    fn follow(&mut self, touched: &BTreeSet<String>) {
        let now = Instant::now();
        let states = self.directory.services();
        let changed = touched.iter().map(|uid| (uid.as_str(), states.get(uid).map(|state| &**state)));
        let concerns = self.tracker.update(changed, now);
        if let Ok(track) = &mut self.parts.track
            && concerns
        {
            track.sync(&self.tracker.wanted(now));
        }
    }

    /// Looks at the connections to pods, and says what they do.
    fn observe(&mut self) {
        let now = Instant::now();
        if self.parts.heard.silence() > HEARTBEAT_TIMEOUT {
            self.tracker.missed(now);
        }
        let seen = match &mut self.parts.track {
            Ok(track) => {
                match track.reattach() {
                    Ok(false) => {}
                    Ok(true) => {
                        self.lapse = None;
                        tracing::warn!("what follows connections was detached by somebody else, and is attached again");
                        self.parts.metrics.repairs("programs").inc();
                        self.tracker.lapsed(now);
                    }
                    Err(error) => {
                        // Active until it can be attached.
                        self.tracker.lapsed(now);
                        if self.lapse.replace(error.clone()).is_none() {
                            tracing::error!(error, "connections to pods are not followed meanwhile");
                        }
                    }
                }
                track.sync(&self.tracker.wanted(now));
                track.look()
            }
            Err(why) => Err(why.clone()),
        };
        let outcome = self.tracker.outcome(seen.as_ref().map_err(String::as_str), now);
        self.parts.board.observe(outcome.answers);
        let Context { dialer, connections, .. } = &self.parts.context;
        for address in outcome.dials {
            let dialer = *dialer;
            connections.spawn(async move {
                if let Err(error) = dialer.connect(address, &[], DIAL_TIMEOUT).await {
                    tracing::debug!(%address, %error, "cannot dial a pod");
                }
            });
        }
    }

    /// Makes what `touched` names as the directory says. Looks at no other ElastiService, unless something is repaired that all
    /// have in common.
    fn settle(&mut self, touched: &BTreeSet<String>, repair: bool) {
        if touched.is_empty() && !repair {
            self.ready();
            return;
        }
        // Before anybody is sent to a pod.
        self.follow(touched);
        self.parts.board.know(self.directory.summary());
        let (mut gone, mut changes) = (Vec::new(), Changes::new());
        for uid in touched {
            let state = self.directory.services().get(uid).map(Arc::clone);
            if let Some(state) = state {
                self.update(uid, state);
            } else if let Some(live) = self.live.remove(uid) {
                gone.push((uid, live));
            }
        }
        for (uid, live) in &gone {
            self.redirect(uid, live.redirected.as_deref(), None, &mut changes);
        }
        for uid in touched {
            let wanted = self.wanted(uid);
            let Some(live) = self.live.get_mut(uid) else { continue };
            let before = std::mem::replace(&mut live.redirected, wanted.clone());
            self.redirect(uid, before.as_deref(), wanted.as_ref(), &mut changes);
        }
        let all = self.parts.interception.update(&changes, repair) || repair;
        self.redirect_draining(repair);
        for uid in touched {
            if let Some(live) = self.live.get_mut(uid) {
                let ports = &live.state.ports;
                live.listeners.retain(|(open, _)| ports.iter().any(|port| port.interception_port == *open));
            }
        }
        for (uid, live) in gone {
            drop(live.listeners);
            live.service.remove();
            self.parts.board.remove(uid);
            tracing::info!(namespace = live.state.namespace, service = live.state.service, "removed");
        }
        let concerned = self.claims.claimants(&changes);
        if all {
            self.acknowledge(self.live.keys().map(String::as_str));
        } else {
            self.acknowledge(touched.iter().map(String::as_str).chain(concerned.iter().map(|uid| &**uid)));
        }
        self.ready();
    }

    fn acknowledge<'a>(&self, uids: impl Iterator<Item = &'a str>) {
        let acks = uids.filter_map(|uid| {
            let live = self.live.get(uid)?;
            let (ack, Asked { revision, redirecting, holding }) = (self.ack(live), live.state.asks());
            let redirecting = redirecting && self.redirects;
            // Whoever holds has told before what it had accepted.
            let as_asked = !holding && ack == Ack { revision, listening: true, redirecting, holding, error: None };
            Some((uid.to_owned(), ack, self.directory.fingerprint(uid).filter(|_| as_asked)))
        });
        self.parts.board.acknowledge(acks);
    }

    fn ready(&self) {
        if self.directory.synced() {
            self.parts.readiness.done(SNAPSHOT);
            self.parts.board.settled();
        }
    }

    /// Opens what `state` lacks, and shows it to connections.
    fn update(&mut self, uid: &str, state: Arc<ServiceState>) {
        let Parts { metrics, board, capacity, asker, .. } = &self.parts;
        let live = self.live.entry(uid.to_owned()).or_insert_with(|| {
            let service = Service::new(&state.namespace, &state.service, metrics.clone(), board.news());
            let service = Arc::new(service);
            board.add(uid, Arc::clone(&service));
            let listeners = Vec::with_capacity(state.ports.len());
            Live {
                service,
                state: Arc::clone(&state),
                listeners,
                asking: None,
                error: None,
                probes: None,
                redirected: None,
            }
        });
        if live.state.mode != state.mode || live.state.revision != state.revision {
            let (namespace, service, mode) = (&state.namespace, &state.service, state.mode.as_str());
            tracing::info!(namespace, service, mode, revision = state.revision, "changed");
        }
        if live.state.mode != state.mode {
            live.service.switched(state.mode == Mode::Proxy);
        }
        live.state = state;
        live.probes = probes(live.probes.take(), &live.state);
        live.service.set(view(&live.state, live.probes.clone(), self.phase));
        if live.asking.is_none() && !live.state.starting.is_empty() {
            live.asking = asker.follow(&live.service);
        }
        let was = live.error.take();
        for port in live.state.ports.iter().map(|port| port.interception_port) {
            if live.listeners.iter().any(|(open, _)| *open == port) {
                continue;
            }
            match Listener::open(port, Arc::clone(&live.service), Arc::clone(&self.context), capacity.share()) {
                Ok(listener) => live.listeners.push((port, listener)),
                Err(error) => live.error = Some(format!("cannot listen on port {port}: {error}")),
            }
        }
        if let Some(error) = &live.error
            && was.as_ref() != Some(error)
        {
            let (namespace, service) = (&live.state.namespace, &live.state.service);
            tracing::error!(namespace, service, error, "trying again every second");
        }
    }

    /// The state by which addresses are redirected: only what is listened for, and nothing when the operators have been silent
    /// for long.
    fn wanted(&self, uid: &str) -> Option<Arc<ServiceState>> {
        let redirects = self.phase != Phase::Abandoned && !self.parts.board.leaving();
        let live = self.live.get(uid).filter(|live| redirects && live.error.is_none());
        live.map(|live| Arc::clone(&live.state))
    }

    /// Notes what is to be redirected for this ElastiService from now on.
    fn redirect(
        &mut self,
        uid: &str,
        was: Option<&ServiceState>,
        is: Option<&Arc<ServiceState>>,
        changes: &mut Changes,
    ) {
        let wanted = is.map(|state| interception::wanted(state, &self.parts.pod)).unwrap_or_default();
        self.claims.set(uid, wanted, changes);
        self.draining.replace(was, is, Instant::now());
    }

    fn redirect_draining(&mut self, repair: bool) {
        let draining = self.draining.current(&self.parts.pod, Instant::now());
        self.parts.interception.set_draining(draining, repair);
    }

    fn ack(&self, live: &Live) -> Ack {
        let wanted = interception::wanted(&live.state, &self.parts.pod);
        let redirecting = self.parts.interception.covers(&wanted);
        let unredirected = if wanted.is_empty() { None } else { self.parts.interception.error() };
        Ack {
            revision: live.state.revision,
            listening: live.error.is_none(),
            redirecting,
            holding: live.state.holding,
            error: live.error.clone().or_else(|| unredirected.map(str::to_owned)),
        }
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

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end.into()).await,
        None => std::future::pending().await,
    }
}
