//! One Service through its cycles: down by idleness or by hand, up again by those who call.
//!
//! A plan says how a cycle goes down and in which window its burst begins. The burst lasts until a second after the return
//! to direct connections, so the windows that follow are covered too.

use std::fmt;
use std::time::Duration;

use elasti_traffic::record::{Kind, Load, Micros, now};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::clients::Running;
use super::run::{Run, Service};
use super::timeline::{Event, State};

/// Microseconds from arrival to arrival of a burst: 50 requests a second.
const ARRIVALS: Micros = 20_000;

/// Milliseconds in which sessions connect, on a busy machine too.
const SESSIONS_CONNECT: u64 = 300;

/// How the target goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By its trigger.
    Idleness,
    /// By `kubectl scale --replicas=0`.
    Hand,
}

/// Where the burst begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    /// Before the interception, and through it.
    Before,
    /// Anywhere between interception and the patch of `/scale`.
    BeforeScale,
    /// As near to that patch as can be foreseen.
    Patch,
    /// While pods drain.
    Draining,
    /// At zero.
    Zero,
}

/// One cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How the target goes down.
    pub way: Way,
    /// Where the burst begins.
    pub focus: Focus,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "by {:?}, burst at {:?}", self.way, self.focus)
    }
}

impl Plan {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// Plan by plan; after the last the first comes again.
    pub fn of(number: usize) -> Self {
        const PLANS: [Plan; Plan::COUNT] = {
            use Focus::{Before, BeforeScale, Draining, Patch, Zero};
            use Way::{Hand, Idleness};
            [
                Plan { way: Hand, focus: Before },
                Plan { way: Idleness, focus: Patch },
                Plan { way: Idleness, focus: Zero },
                Plan { way: Hand, focus: Draining },
                Plan { way: Idleness, focus: BeforeScale },
                Plan { way: Idleness, focus: Draining },
                Plan { way: Hand, focus: Zero },
                Plan { way: Idleness, focus: Before },
            ]
        };
        PLANS[number % PLANS.len()]
    }
}

/// A Service on its way.
pub struct Runner<'a> {
    run: &'a Run,
    service: &'a Service,
    random: fastrand::Rng,
}

impl<'a> Runner<'a> {
    /// `seed` decides where in its window each burst begins.
    pub fn new(run: &'a Run, service: &'a Service, seed: usize) -> Self {
        Self { run, service, random: fastrand::Rng::with_seed(seed as u64) }
    }

    /// Goes through a cycle: from direct connections to zero and back.
    pub async fn cycle(&mut self, number: usize, plan: Plan) {
        self.until("is served directly", State::is_direct).await;
        let begun = now();
        let mut loads = self.sessions(plan.way);
        self.pause(SESSIONS_CONNECT).await;
        let burst = match plan.way {
            Way::Hand => self.down_by_hand(plan.focus, begun).await,
            Way::Idleness => self.down_by_idleness(plan.focus, begun, &mut loads).await,
        };
        self.run.triggers.set_idle(&self.service.name, false);
        // The window between ready and serve is over in some milliseconds, so more than the burst begins in it.
        self.until("is ready", |state| state.is_before_serve() || state.is_direct()).await;
        loads.extend(self.burst(1));
        self.until("is served directly", State::is_direct).await;
        self.pause(1000).await;
        self.stop(&burst);
        loads.extend(burst);
        for load in loads {
            self.run.keep(self.service, number, &plan.to_string(), self.run.clients.records(load).await);
        }
    }

    /// What a cycle by hand is without Elasti: down under the same load, which begins in the same windows in turns, and up
    /// when its pods are gone.
    pub async fn control_cycle(&mut self, number: usize) {
        let focus = if number.is_multiple_of(2) { Focus::Before } else { Focus::Draining };
        self.until("is served directly", State::is_direct).await;
        let mut loads = self.sessions(Way::Hand);
        self.pause(SESSIONS_CONNECT).await;
        let burst = self.down_by_hand(focus, now()).await;
        self.pause(1000).await;
        self.stop(&burst);
        self.until("has no pod", |state| state.pods == 0).await;
        self.scale(1).await;
        self.until("is served directly", State::is_direct).await;
        // kube-proxies have their time, so that what is lost is lost by the scale-down.
        self.pause(2000).await;
        self.run.watches.note(&self.service.name, Event::Restored);
        loads.extend(burst);
        for load in loads {
            self.run.keep(self.service, number, "control", self.run.clients.records(load).await);
        }
    }

    async fn down_by_hand(&mut self, focus: Focus, begun: Micros) -> Vec<Running> {
        match focus {
            Focus::Draining | Focus::Zero => {
                self.scale_to_zero().await;
                self.await_focus(focus, begun).await;
                self.aimed_burst(focus)
            }
            Focus::Before | Focus::BeforeScale | Focus::Patch => {
                let burst = self.burst(u64::MAX);
                self.pause(500).await;
                self.scale_to_zero().await;
                self.until("is scaled to zero", |state| state.replicas == 0).await;
                burst
            }
        }
    }

    /// A burst before the patch aborts the scale-down: then the next one is left alone until the target is at zero.
    async fn down_by_idleness(&mut self, focus: Focus, begun: Micros, loads: &mut Vec<Running>) -> Vec<Running> {
        self.run.triggers.set_idle(&self.service.name, true);
        let burst = if focus == Focus::Before {
            let burst = self.burst(u64::MAX);
            self.until("is intercepted", |state| state.intercepting).await;
            burst
        } else {
            self.await_focus(focus, begun).await;
            self.aimed_burst(focus)
        };
        if matches!(focus, Focus::Draining | Focus::Zero) {
            return burst;
        }
        self.pause(500).await;
        if self.run.watches.was_at_zero_since(&self.service.name, begun) {
            return burst;
        }
        self.stop(&burst);
        loads.extend(burst);
        self.await_focus(Focus::Zero, begun).await;
        self.burst(u64::MAX)
    }

    /// Waits for a moment within a window; or until that has passed: a late session has woken the target already, or it was
    /// scaled before it was intercepted.
    async fn await_focus(&mut self, focus: Focus, begun: Micros) {
        let (what, is, within): (_, fn(&State) -> bool, _) = match focus {
            Focus::Before => ("is served directly", State::is_direct, 0..1),
            Focus::BeforeScale => ("is intercepted", State::is_before_scale, 0..1800),
            // kube-proxy's time (2 s) passes, and triggers are asked once more.
            Focus::Patch => ("is intercepted", State::is_before_scale, 1950..2150),
            Focus::Draining => ("is scaled to zero", |state| state.replicas == 0, 0..500),
            Focus::Zero => ("is at zero", State::is_at_zero, 0..500),
        };
        let watches = &self.run.watches;
        let over = |state: &State| {
            let passed = state.is_direct() || matches!(focus, Focus::BeforeScale | Focus::Patch);
            passed && watches.was_at_zero_since(&self.service.name, begun)
        };
        self.until(what, |state| is(state) || over(state)).await;
        // Half of them at the first moment, where a step that is out of order would show.
        if focus != Focus::Draining || self.random.bool() {
            let wait = self.random.u64(within);
            self.pause(wait).await;
        }
    }

    /// Connections with an exchange that lasts over the scale-down, begun directly to the pod.
    fn sessions(&self, way: Way) -> Vec<Running> {
        let messages = if way == Way::Hand { 40 } else { 100 };
        let mut sessions = Vec::new();
        for kind in self.service.kinds().iter().filter(|kind| matches!(kind, Kind::Grpc | Kind::WebSocket)) {
            for place in 0..self.run.clients.places() {
                sessions.push(self.run.clients.begin(place, &Load { most: 1, messages, ..self.load(*kind) }));
            }
        }
        sessions
    }

    /// The burst of a cycle. Pods may have ended some milliseconds after they were told to, so more of it comes at once then.
    fn aimed_burst(&self, focus: Focus) -> Vec<Running> {
        let mut burst = self.burst(u64::MAX);
        if focus == Focus::Draining {
            burst.extend(self.burst(1));
            burst.extend(self.burst(1));
        }
        burst
    }

    /// All kinds from all places: one request of each at once, then 50 a second in all, up to `most` of each.
    fn burst(&self, most: u64) -> Vec<Running> {
        let (kinds, places) = (self.service.kinds(), self.run.clients.places());
        let interval = ARRIVALS * (kinds.len() * places) as u64;
        let mut burst = Vec::new();
        for kind in kinds {
            for place in 0..places {
                let phase = ARRIVALS * burst.len() as u64;
                burst.push(self.run.clients.begin(place, &Load { most, interval, phase, ..self.load(*kind) }));
            }
        }
        burst
    }

    fn load(&self, kind: Kind) -> Load {
        let (messages, pause) = match kind {
            Kind::NewConnection | Kind::Redis | Kind::Postgres => (1, 0),
            Kind::KeepAlive => (1, 50_000),
            Kind::Grpc | Kind::WebSocket => (5, 100_000),
        };
        Load { load: 0, address: self.service.address, kind, most: u64::MAX, interval: 0, phase: 0, messages, pause }
    }

    fn stop(&self, loads: &[Running]) {
        for load in loads {
            self.run.clients.stop(*load);
        }
    }

    async fn scale_to_zero(&self) {
        self.run.watches.note(&self.service.name, Event::ByHand);
        self.scale(0).await;
    }

    async fn scale(&self, replicas: u32) {
        let deployments = Api::<Deployment>::namespaced(self.run.api.clone(), &self.run.sandbox.namespace);
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        deployments.patch_scale(&self.service.name, &PatchParams::default(), &patch).await.expect("scaled by hand");
    }

    async fn until(&self, what: &str, is: impl Fn(&State) -> bool) {
        self.run.watches.until(&self.service.name, what, is).await;
    }

    async fn pause(&self, milliseconds: u64) {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }
}
