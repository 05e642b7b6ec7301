//! Makes what the operators say so: one task owns the [`Directory`], the listeners and the redirects.
//!
//! The order within one round: open listeners, then redirect to them; stop redirecting, then close listeners; then say
//! what is in effect. A port that cannot be opened holds up nothing else and is tried again every second.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::message::{Asked, HEARTBEAT_TIMEOUT, OperatorMessage, PortState, ServiceState};
use elasti_runtime::admin::Readiness;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::claims::Claims;
use crate::connection::Context;
use crate::directory::{Directory, Speaker};
use crate::draining::Named;
use crate::fallback::{self, Patience, Phase};
use crate::interception::{self, Changes, Interception};
use crate::listeners::Listeners;
use crate::metrics::{Metrics, Repair};
use crate::readiness::Asker;
use crate::report::{Ack, Board};
use crate::standby::{Common, Standby};
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
    standby: Arc<Standby>,
    state: Arc<ServiceState>,
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
    /// The interception ports.
    pub listeners: Listeners,
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
    /// What all Services are made with.
    common: Arc<Common>,
    directory: Directory,
    live: BTreeMap<Arc<str>, Live>,
    /// Why ports of these are not open.
    failed: BTreeMap<Arc<str>, String>,
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
        let (metrics, asker, bell) = (parts.metrics.clone(), parts.asker.clone(), parts.board.bell());
        Self {
            common: Arc::new(Common { metrics, asker, bell }),
            parts,
            redirects,
            tracker,
            lapse: None,
            directory: Directory::default(),
            live: BTreeMap::new(),
            failed: BTreeMap::new(),
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
    fn stale(&mut self) -> BTreeSet<Arc<str>> {
        let silence = self.parts.heard.silence();
        let phase = fallback::phase(silence, self.parts.patience);
        if phase != self.phase {
            tracing::warn!(was = ?self.phase, now = ?phase, silence_s = silence.as_secs(), "operators' silence");
            self.phase = phase;
            return self.live.keys().cloned().collect();
        }
        self.failed.keys().cloned().collect()
    }

    /// Follows the connections to the pods that the states of these name.
    fn follow(&mut self, touched: &BTreeSet<Arc<str>>) {
        let now = Instant::now();
        let changed = touched.iter().map(|uid| (&**uid, self.directory.get(uid).map(|state| &**state)));
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
                        self.parts.metrics.repairs(Repair::Programs).inc();
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
    fn settle(&mut self, touched: &BTreeSet<Arc<str>>, repair: bool) {
        if touched.is_empty() && !repair {
            self.ready();
            return;
        }
        // Before anybody is sent to a pod.
        self.follow(touched);
        self.parts.board.know(self.directory.summary());
        let (mut gone, mut closing, mut changes) = (Vec::new(), Vec::new(), Changes::new());
        for uid in touched {
            let state = self.directory.get(uid).map(Arc::clone);
            if let Some(state) = state {
                self.update(uid, state, &mut closing);
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
        for (port, standby) in closing {
            self.parts.listeners.close(port, &standby);
        }
        for (uid, live) in gone {
            for port in &live.state.ports {
                self.parts.listeners.close(port.interception_port, &live.standby);
            }
            live.standby.remove();
            self.failed.remove(uid);
            self.parts.board.remove(uid);
            tracing::info!(namespace = live.state.namespace, service = live.state.service, "removed");
        }
        let concerned = self.claims.claimants(&changes);
        if all {
            self.acknowledge(self.live.keys());
        } else {
            self.acknowledge(touched.iter().chain(&concerned));
        }
        self.ready();
    }

    fn acknowledge<'a>(&self, uids: impl Iterator<Item = &'a Arc<str>>) {
        let acks = uids.filter_map(|uid| {
            let live = self.live.get(uid)?;
            let (ack, Asked { revision, redirecting, holding }) = (self.ack(uid, live), live.state.asks());
            let redirecting = redirecting && self.redirects;
            // Whoever holds has told before what it had accepted.
            let as_asked = !holding && ack == Ack { revision, listening: true, redirecting, holding, error: None };
            Some((uid, ack, self.directory.fingerprint(uid).filter(|_| as_asked)))
        });
        self.parts.board.acknowledge(acks);
    }

    fn ready(&self) {
        if self.directory.synced() {
            self.parts.readiness.done(SNAPSHOT);
            self.parts.board.settled();
        }
    }

    /// Opens what `state` lacks, shows it to connections, and names the ports that it has no more.
    fn update(&mut self, uid: &Arc<str>, state: Arc<ServiceState>, closing: &mut Vec<(u16, Arc<Standby>)>) {
        let board = &self.parts.board;
        let live = self.live.entry(Arc::clone(uid)).or_insert_with(|| {
            let standby = Standby::new(Arc::clone(&self.common), board.number(), Arc::clone(&state), self.phase);
            let standby = Arc::new(standby);
            board.add(uid, Arc::clone(&standby));
            Live { standby, state: Arc::clone(&state), redirected: None }
        });
        if live.state.mode != state.mode || live.state.revision != state.revision {
            let (namespace, service, mode) = (&state.namespace, &state.service, state.mode.as_str());
            tracing::info!(namespace, service, mode, revision = state.revision, "changed");
        }
        let has = |port: &PortState| state.ports.iter().any(|has| has.interception_port == port.interception_port);
        let gone = live.state.ports.iter().filter(|port| !has(port));
        closing.extend(gone.map(|port| (port.interception_port, Arc::clone(&live.standby))));
        live.state = state;
        live.standby.set(Arc::clone(&live.state), self.phase);
        let (was, mut failed) = (self.failed.remove(uid), None);
        for port in live.state.ports.iter().map(|port| port.interception_port) {
            if let Err(error) = self.parts.listeners.open(port, &live.standby) {
                failed = Some(format!("cannot listen on port {port}: {error}"));
            }
        }
        if let Some(error) = failed {
            if was.as_ref() != Some(&error) {
                let (namespace, service) = (&live.state.namespace, &live.state.service);
                tracing::error!(namespace, service, error, "trying again every second");
            }
            self.failed.insert(Arc::clone(uid), error);
        }
    }

    /// The state by which addresses are redirected: only what is listened for, and nothing when the operators have been silent
    /// for long.
    fn wanted(&self, uid: &str) -> Option<Arc<ServiceState>> {
        let redirects = self.phase != Phase::Abandoned && !self.parts.board.leaving();
        let live = self.live.get(uid).filter(|_| redirects && !self.failed.contains_key(uid));
        live.map(|live| Arc::clone(&live.state))
    }

    /// Notes what is to be redirected for this ElastiService from now on.
    fn redirect(
        &mut self,
        uid: &Arc<str>,
        was: Option<&ServiceState>,
        is: Option<&Arc<ServiceState>>,
        changes: &mut Changes,
    ) {
        let wanted = |state: Option<&ServiceState>| {
            state.map(|state| interception::wanted(state, &self.parts.pod)).unwrap_or_default()
        };
        self.claims.set(uid, &wanted(was), &wanted(is.map(|state| &**state)), changes);
        self.draining.replace(was, is, Instant::now());
    }

    fn redirect_draining(&mut self, repair: bool) {
        let draining = self.draining.current(&self.parts.pod, Instant::now());
        self.parts.interception.set_draining(draining, repair);
    }

    fn ack(&self, uid: &str, live: &Live) -> Ack {
        let failed = self.failed.get(uid);
        let wanted = interception::wanted(&live.state, &self.parts.pod);
        let redirecting = self.parts.interception.covers(&wanted);
        let unredirected = if wanted.is_empty() { None } else { self.parts.interception.error() };
        Ack {
            revision: live.state.revision,
            listening: failed.is_none(),
            redirecting,
            holding: live.state.holding,
            error: failed.cloned().or_else(|| unredirected.map(str::to_owned)),
        }
    }
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end.into()).await,
        None => std::future::pending().await,
    }
}
