//! Each invariant of the plan, and the life of a Service step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use elasti_api::message::HoldPolicy;
use elasti_api::v1alpha1::{ElastiService, InterceptedPort, ScaleTrigger};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::*;
use crate::autoscaler::AutoscalerState;
use crate::observed::{
    Addressing, DrainingEndpoint, PodEndpoint, ServicePort, SourceFault, TargetObserved, TargetState, TriggersObserved,
};
use crate::resolvers::arrivals::{Arrivals, GRACE};
use crate::resolvers::{Ack, Identity, ResolverObserved, Traffic};

mod autoscaler;
mod deletion;
mod diagnosis;
mod draining;
mod ending;
mod orders;
mod partners;
mod publishing;
mod schedule;
mod sharing;
mod starting;
mod status;
mod traffic;

const SETTINGS: Settings = Settings {
    kube_proxy_sync: Duration::from_secs(2),
    polling_interval: Duration::from_secs(30),
    max_slice_endpoints: 32,
    hold: HoldPolicy::DEFAULT,
};

/// A Service's world: what is observed of it changes as actions are applied and time passes.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct World {
    elasti: ElastiService,
    service: Option<ServiceObserved>,
    private: Option<ServiceObserved>,
    target: TargetState,
    autoscaler: AutoscalerState,
    stale_pauses: Vec<AutoscalerObserved>,
    /// How often the target has changed.
    versions: u64,
    ready: bool,
    draining: Vec<DrainingEndpoint>,
    pods: Vec<std::sync::Arc<k8s_openapi::api::core::v1::Pod>>,
    endpoints: Vec<PodEndpoint>,
    ignored_pods: BTreeSet<IpAddr>,
    source_faults: Vec<SourceFault>,
    slices: Vec<ResolverSlice>,
    resolvers: Vec<ResolverObserved>,
    arrivals: Arrivals,
    triggers: Option<TriggersObserved>,
    taken_by: Option<String>,
    shared_with: Vec<String>,
    partners: crate::observed::PartnersObserved,
    partner_waits: bool,
    leading_since: Option<Instant>,
    holder_silent: bool,
    memory: Memory,
    /// A scale-down that was given up and may still be carried out: of which version of the target, and since when.
    in_flight: Option<(u64, Instant)>,
    /// Of which version of the target a scale-down was sent last.
    sent: Option<u64>,
    start: Instant,
    elapsed: Duration,
    /// Whether resolvers were last told to hold every connection.
    holding: bool,
}

impl World {
    /// A target with one ready pod, long served, and two resolvers; this replica has led for an hour.
    fn serving() -> Self {
        let start = Instant::now() + Duration::from_hours(2);
        let mut elasti = ElastiService::default();
        elasti.metadata.uid = Some("uid".into());
        elasti.metadata.name = Some("web".into());
        elasti.metadata.namespace = Some("shop".into());
        elasti.metadata.finalizers = Some(vec![elasti_api::names::FINALIZER.into()]);
        elasti.spec.service = "web".into();
        elasti.spec.min_target_replicas = 1;
        elasti.spec.cooldown_period = 60;
        elasti.spec.triggers = Some(vec![ScaleTrigger { type_: "prometheus".into(), metadata: None }]);
        elasti.spec.triggers.as_mut().unwrap()[0].metadata = Some(serde_json::json!({"query": "q", "threshold": 1}));
        elasti.status = Some(ElastiServiceStatus {
            mode: Some(Mode::Serve),
            revision: 1,
            ports: vec![InterceptedPort { port: 80, interception_port: 20_080 }],
            ..ElastiServiceStatus::default()
        });
        let service = ServiceObserved {
            cluster_ips: vec!["10.96.0.10".parse().unwrap()],
            ports: vec![ServicePort { name: "http".into(), port: 80, app_protocol: None }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..ServiceObserved::default()
        };
        let mut world = Self {
            elasti,
            private: Some(ServiceObserved { owner_uid: Some("uid".into()), ..service.clone() }),
            service: Some(service),
            target: TargetState::Missing,
            autoscaler: AutoscalerState::Unnamed,
            stale_pauses: vec![],
            versions: 0,
            ready: true,
            draining: vec![],
            pods: vec![],
            endpoints: vec![],
            ignored_pods: BTreeSet::new(),
            source_faults: vec![],
            slices: vec![],
            resolvers: vec![],
            arrivals: Arrivals::default(),
            triggers: None,
            taken_by: None,
            shared_with: vec![],
            partners: crate::observed::PartnersObserved::default(),
            partner_waits: false,
            leading_since: start.checked_sub(Duration::from_hours(1)),
            holder_silent: false,
            memory: Memory::default(),
            in_flight: None,
            sent: None,
            start,
            elapsed: Duration::ZERO,
            holding: false,
        };
        world.scale(1);
        for number in 1..=2 {
            world.connect(number);
        }
        world
    }

    fn scale(&mut self, spec_replicas: i32) {
        self.versions += 1;
        self.target = TargetState::Found(TargetObserved {
            spec_replicas,
            pod_network: true,
            resource_version: self.versions.to_string(),
            ..TargetObserved::default()
        });
    }

    fn connect(&mut self, number: u8) {
        self.resolvers.push(ResolverObserved {
            identity: Arc::new(Identity {
                pod: format!("resolver-{number}"),
                node: format!("node-{number}"),
                addresses: vec![format!("10.244.{number}.2").parse().unwrap()],
                redirect_disabled: None,
            }),
            leaving: false,
            ack: None,
            activity: None,
            traffic: Traffic::default(),
        });
    }

    fn status(&self) -> ElastiServiceStatus {
        self.elasti.status.clone().unwrap()
    }

    /// Every resolver does as the status says.
    fn acknowledge(&mut self) {
        let status = self.status();
        for resolver in &mut self.resolvers {
            resolver.ack = Some(Ack {
                revision: status.revision,
                listening: true,
                redirecting: status.mode == Some(Mode::Proxy),
                holding: self.holding,
                error: None,
            });
        }
    }

    /// Resolvers that have acknowledged anything hold, or do so no more, as they were told last.
    fn acknowledge_holding(&mut self) {
        for ack in self.resolvers.iter_mut().filter_map(|resolver| resolver.ack.as_mut()) {
            ack.holding = self.holding;
        }
    }

    fn idle(&mut self) {
        let idle_since = self.triggers.as_ref().and_then(|triggers| triggers.idle_since);
        let asked = self.now().instant;
        self.triggers =
            Some(TriggersObserved { verdict: Verdict::Idle, asked, idle_since: idle_since.or(Some(asked)) });
    }

    fn now(&self) -> Now {
        Now { instant: self.start + self.elapsed, timestamp: "2026-01-02T03:04:05Z".parse().unwrap() }
    }

    fn plan(&mut self) -> Plan {
        let backends: BTreeMap<u16, Vec<std::net::SocketAddr>> =
            [(80, self.ready.then(|| "10.244.1.9:8080".parse().unwrap()).into_iter().collect())].into();
        let observed = Observed {
            elasti: &self.elasti,
            taken_by: self.taken_by.clone(),
            shared_with: self.shared_with.clone(),
            service: self.service.clone(),
            private: self.private.clone(),
            target: self.target.clone(),
            autoscaler: self.autoscaler.clone(),
            stale_pauses: self.stale_pauses.clone(),
            backends,
            draining: self.draining.clone(),
            pods: self.pods.clone(),
            endpoints: self.endpoints.clone(),
            ignored_pods: self.ignored_pods.clone(),
            source_faults: self.source_faults.clone(),
            slices: self.slices.clone(),
            stale_private: vec![],
            resolvers: self.resolvers.clone(),
            arrivals: self.arrivals.clone(),
            triggers: self.triggers.clone(),
            diagnosis: None,
            partners: self.partners.clone(),
            partner_waits: self.partner_waits,
            leading_since: self.leading_since,
            holder_silent: self.holder_silent,
        };
        let plan = plan(&observed, &self.memory, &SETTINGS, self.now());
        self.memory = plan.memory.clone();
        if let Publish::State(state) = &plan.publish {
            self.holding = state.holding;
        }
        plan
    }

    /// Applies one action, as the controller and the cluster would.
    fn apply(&mut self, action: &Action) {
        match action {
            Action::WriteStatus(status) => self.elasti.status = Some(*status.clone()),
            Action::ApplySlice(slice) => {
                self.slices.retain(|present| present.name != slice.name);
                self.slices.push(slice.clone());
            }
            Action::DeleteSlices(names) => self.slices.retain(|slice| !names.contains(&slice.name)),
            Action::AnnotateAutoscaler { autoscaler, wish } => self.annotate(autoscaler, *wish),
            Action::ApplyPrivateService => {
                self.private = Some(ServiceObserved { owner_uid: Some("uid".into()), ..self.service.clone().unwrap() });
            }
            Action::ScaleUp { replicas } => self.scale(*replicas),
            Action::ScaleDown => {
                self.scale(0);
                self.ready = false;
            }
            Action::AskTriggers if self.triggers.as_ref().is_some_and(|t| t.verdict == Verdict::Idle) => self.idle(),
            _ => {}
        }
    }

    /// Plans and applies until nothing changes; returns what was applied.
    fn settle(&mut self) -> Vec<Action> {
        let mut applied = vec![];
        for _ in 0..10 {
            let held = self.holding;
            let actions = self.plan().actions;
            let before = (self.status(), self.slices.clone(), self.target.clone(), self.triggers.clone());
            for action in &actions {
                self.apply(action);
            }
            applied.extend(actions);
            let after = (self.status(), self.slices.clone(), self.target.clone(), self.triggers.clone());
            if before == after && held == self.holding {
                break;
            }
            self.acknowledge_holding();
        }
        applied
    }

    fn pass(&mut self, time: Duration) {
        self.elapsed += time;
    }

    /// Idle for the cooldown and intercepted, up to the moment before kube-proxy's time has passed.
    fn descending() -> Self {
        let mut world = Self::serving();
        world.acknowledge();
        world.idle();
        world.settle();
        world.pass(Duration::from_mins(1));
        world.settle();
        assert_eq!(world.status().mode, Some(Mode::Proxy), "idle for the cooldown is intercepted first");
        world.acknowledge();
        world.settle();
        world
    }

    fn asleep() -> Self {
        let mut world = Self::descending();
        world.pass(SETTINGS.kube_proxy_sync);
        let applied = world.settle();
        assert!(applied.contains(&Action::ScaleDown), "{applied:?}");
        world.settle();
        world
    }
}

fn scales_down(actions: &[Action]) -> bool {
    actions.contains(&Action::ScaleDown)
}

fn scales_up(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::ScaleUp { .. }))
}

fn warns(action: &Action, about: &str) -> bool {
    matches!(action, Action::Event { warning: true, reason, .. } if reason == about)
}

fn published_mode(plan: &Plan) -> Option<(Mode, bool)> {
    match &plan.publish {
        Publish::State(state) => Some((state.mode, state.redirect)),
        Publish::Remove | Publish::Keep => None,
    }
}

/// Keeps out B7: scaled to zero before connections are redirected.
#[test]
fn an_idle_target_is_intercepted_then_published_then_put_to_sleep() {
    let mut world = World::serving();
    world.acknowledge();
    world.idle();
    assert!(!scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Serve), "the cooldown has not passed");
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!((world.status().mode, world.status().revision), (Some(Mode::Proxy), 2));
    assert!(world.slices.is_empty(), "no resolver has acknowledged this revision");
    assert_eq!(published_mode(&world.plan()), Some((Mode::Proxy, false)), "not redirected before published");
    world.acknowledge();
    assert!(!scales_down(&world.settle()), "kube-proxy has not had its time");
    assert_eq!(world.slices[0].endpoints.len(), 2);
    assert_eq!(published_mode(&world.plan()), Some((Mode::Proxy, true)));
    world.pass(SETTINGS.kube_proxy_sync);
    assert!(scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Proxy));
}

#[test]
fn a_scale_down_asks_the_triggers_again_after_everything_is_intercepted() {
    let mut world = World::descending();
    world.pass(SETTINGS.kube_proxy_sync);
    let first = world.plan();
    assert!(!scales_down(&first.actions), "the last answer is older than the interception");
    assert!(first.actions.contains(&Action::AskTriggers));
    world.idle();
    assert!(scales_down(&world.settle()));
}

#[test]
fn no_pod_gets_a_connection_from_the_last_word_on() {
    let mut world = World::descending();
    world.pass(SETTINGS.kube_proxy_sync);
    world.idle();
    assert!(!scales_down(&world.plan().actions) && world.holding, "resolvers are asked to hold first");
    world.resolvers[0].ack.as_mut().unwrap().holding = true;
    assert!(!scales_down(&world.plan().actions), "one of them still forwards");
    // What it tells before it acknowledges: somebody came.
    world.resolvers[1].traffic.accepted += 1;
    world.resolvers[1].ack.as_mut().unwrap().holding = true;
    assert!(!scales_down(&world.settle()));
    assert!(!world.holding, "whoever is held is let through at once");
    assert_eq!(world.status().mode, Some(Mode::Serve));
}

#[test]
fn a_resolver_that_never_holds_is_not_waited_for_for_ever() {
    let mut world = World::descending();
    world.pass(SETTINGS.kube_proxy_sync);
    world.idle();
    world.plan();
    world.pass(REDIRECT_PATIENCE);
    assert!(scales_down(&world.plan().actions));
}

#[test]
fn a_refused_scale_down_lets_everybody_through_and_is_repeated_after_the_triggers_were_asked_again() {
    let mut world = sent();
    assert!(world.holding, "it may be carried out at any moment");
    world.memory.scale_down_refused();
    assert!(!scales_down(&world.plan().actions));
    assert!(!world.holding);
    world.pass(Duration::from_secs(1));
    world.idle();
    assert!(scales_down(&world.settle()));
}

#[test]
fn a_connection_during_the_way_down_aborts_it() {
    let mut world = World::descending();
    world.resolvers[1].traffic.accepted += 1;
    world.pass(SETTINGS.kube_proxy_sync);
    assert!(!scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Serve), "the target serves on");
    assert!(world.slices.is_empty());
}

#[test]
fn a_busy_or_failing_trigger_aborts_the_way_down() {
    for verdict in [Verdict::Busy, Verdict::Unknown("gone".into())] {
        let mut world = World::descending();
        world.pass(SETTINGS.kube_proxy_sync);
        let asked = world.now().instant;
        world.triggers = Some(TriggersObserved { verdict, asked, idle_since: None });
        assert!(!scales_down(&world.settle()));
        assert_eq!(world.status().mode, Some(Mode::Serve));
    }
}

/// The moment when a scale-down is sent; what becomes of it is not known.
fn sent() -> World {
    let mut world = World::descending();
    world.pass(SETTINGS.kube_proxy_sync);
    world.idle();
    world.plan();
    world.acknowledge_holding();
    assert!(scales_down(&world.plan().actions));
    world
}

#[test]
fn a_scale_down_whose_answer_was_lost_stays_intercepted_though_connections_come() {
    let mut world = sent();
    world.resolvers[0].traffic.accepted += 1;
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy), "it may still be carried out");
    assert_eq!(world.slices.len(), 1);
    world.scale(0);
    world.ready = false;
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    world.resolvers[0].traffic.held = 1;
    assert!(scales_up(&world.settle()));
}

#[test]
fn a_scale_down_that_may_have_failed_is_repeated_only_after_the_triggers_were_asked_again() {
    let mut world = sent();
    world.pass(Duration::from_secs(5));
    let plan = world.plan();
    assert!(!scales_down(&plan.actions) && plan.actions.contains(&Action::AskTriggers), "{:?}", plan.actions);
    world.idle();
    assert!(scales_down(&world.plan().actions));
}

#[test]
fn a_scale_down_that_cannot_be_carried_out_any_more_is_forgotten() {
    let mut world = sent();
    world.resolvers[0].traffic.accepted += 1;
    world.scale(1);
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Serve), "the target has changed: the patch would be refused");

    let mut world = sent();
    let asked = world.now().instant;
    world.triggers = Some(TriggersObserved { verdict: Verdict::Busy, asked, idle_since: None });
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    assert!(world.plan().again.is_some_and(|again| again <= OUTCOME_PATIENCE));
    world.pass(OUTCOME_PATIENCE);
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Serve), "no API server works on a request for so long");
}

#[test]
fn a_wake_is_repeated_at_once_if_it_may_have_failed_but_not_before_the_watch_can_tell_of_it() {
    let mut world = World::asleep();
    world.resolvers[0].traffic.held = 1;
    for _ in 0..2 {
        assert!(scales_up(&world.plan().actions), "nobody knows whether it was carried out");
    }
    let woken = world.now();
    world.memory.woken(woken);
    let plan = world.plan();
    assert!(!scales_up(&plan.actions));
    world.pass(plan.again.expect("the watch may be silent"));
    assert!(scales_up(&world.plan().actions));
}

#[test]
fn a_wake_that_somebody_undoes_is_repeated_at_once_and_then_ever_more_slowly() {
    let mut world = World::asleep();
    world.resolvers[0].traffic.held = 1;
    let mut waits = vec![];
    for _ in 0..10 {
        let mut waited = Duration::ZERO;
        while !scales_up(&world.settle()) {
            let again = world.plan().again.expect("it is tried again");
            world.pass(again);
            waited += again;
        }
        waits.push(waited);
        world.plan();
        world.scale(0);
    }
    assert_eq!(waits[..2], [Duration::ZERO; 2], "the wake, and once more");
    assert_eq!(waits[2..5], [1, 2, 4].map(|times| UNDONE_WAIT * times));
    assert_eq!(waits[9], UNDONE_WAIT * 2_u32.pow(UNDONE_DOUBLINGS), "and never more slowly than this");
    world.resolvers[0].traffic.held = 0;
    world.settle();
    world.resolvers[0].traffic.held = 1;
    assert!(scales_up(&world.settle()), "the next client is not made to wait for it");
}

#[test]
fn a_step_that_fails_keeps_only_those_from_being_taken_that_act_away_from_availability() {
    let steps = [Action::ApplyPrivateService, Action::ScaleUp { replicas: 1 }, Action::AddFinalizer];
    assert!(steps.iter().all(|step| !step.needs_all_before()));
    assert!(Action::ScaleDown.needs_all_before() && Action::RemoveFinalizer.needs_all_before());
}

#[test]
fn nothing_is_put_to_sleep_without_a_resolver_that_listens() {
    let mut world = World::serving();
    world.resolvers.clear();
    world.idle();
    world.pass(Duration::from_mins(10));
    assert!(!scales_down(&world.settle()));
    world.pass(Duration::from_mins(10));
    assert!(!scales_down(&world.settle()));
}

#[test]
fn a_new_leader_starts_the_cooldown_afresh() {
    let mut world = World::descending();
    world.leading_since = Some(world.now().instant);
    world.memory = Memory::default();
    world.settle();
    world.pass(Duration::from_secs(30));
    assert!(!scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Serve), "and serves meanwhile");
}

#[test]
fn a_replica_without_the_lease_never_scales_down_or_stops_intercepting() {
    let mut world = World::descending();
    world.leading_since = None;
    world.pass(Duration::from_hours(1));
    world.idle();
    let actions = world.settle();
    assert!(!scales_down(&actions), "{actions:?}");
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    assert_eq!(world.slices.len(), 1);
}

#[test]
fn whatever_is_held_wakes_a_target_at_zero() {
    let mut world = World::asleep();
    world.resolvers[0].traffic.held = 1;
    let plan = world.plan();
    assert_eq!(plan.actions.first(), Some(&Action::ScaleUp { replicas: 1 }), "before anything else");
}

#[test]
fn a_replica_without_the_lease_wakes_when_its_holder_does_not() {
    let mut world = World::asleep();
    world.leading_since = None;
    world.resolvers[0].traffic.held = 1;
    let plan = world.plan();
    assert!(!scales_up(&plan.actions));
    assert!(plan.again.is_some_and(|again| again <= FOLLOWER_PATIENCE));
    world.pass(FOLLOWER_PATIENCE);
    assert!(scales_up(&world.plan().actions));
}

#[test]
fn a_trigger_that_sees_traffic_wakes_a_target_at_zero() {
    let mut world = World::asleep();
    world.pass(SETTINGS.polling_interval);
    let plan = world.plan();
    assert!(plan.actions.contains(&Action::AskTriggers), "it is asked there too");
    assert_eq!(plan.again, Some(SETTINGS.polling_interval));
    let asked = world.now().instant;
    world.triggers = Some(TriggersObserved { verdict: Verdict::Busy, asked, idle_since: None });
    assert!(scales_up(&world.settle()));
}

#[test]
fn interception_ends_when_the_target_is_ready_and_not_before() {
    let mut world = World::asleep();
    world.resolvers[0].traffic.held = 1;
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy), "woken, not ready");
    world.resolvers[0].traffic.held = 0;
    world.ready = true;
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Serve));
    assert!(world.slices.is_empty());
}

#[test]
fn a_target_that_somebody_scaled_to_zero_is_intercepted_at_once_and_redirected_before_published() {
    for leads in [true, false] {
        let mut world = World::serving();
        if !leads {
            world.leading_since = None;
        }
        world.scale(0);
        world.ready = false;
        let actions = world.plan().actions;
        let wrote = actions
            .iter()
            .any(|action| matches!(action, Action::WriteStatus(status) if status.mode == Some(Mode::Proxy)));
        assert!(wrote, "leads: {leads}, {actions:?}");
        world.settle();
        assert_eq!(published_mode(&world.plan()), Some((Mode::Proxy, true)));
        world.acknowledge();
        world.settle();
        assert_eq!(world.slices.len(), 1);
    }
}

#[test]
fn what_cannot_be_intercepted_is_said_with_its_cure_and_never_sleeps() {
    type Break = fn(&mut World);
    let cases: [(&str, Break); 5] = [
        ("ServiceNotFound", |world| world.service = None),
        ("HeadlessService", |world| world.service.as_mut().unwrap().addressing = Addressing::Headless),
        ("ServiceWithoutSelector", |world| world.service.as_mut().unwrap().selector.clear()),
        ("NoTcpPort", |world| world.service.as_mut().unwrap().ports.clear()),
        ("ServiceTaken", |world| world.taken_by = Some("older".into())),
    ];
    for (reason, break_it) in cases {
        let mut world = World::serving();
        world.acknowledge();
        break_it(&mut world);
        world.idle();
        let told = world.settle().iter().filter(|action| warns(action, reason)).count();
        assert_eq!(told, 1, "one event says {reason}");
        world.pass(Duration::from_hours(1));
        assert!(!scales_down(&world.settle()), "{reason}");
        let Publish::State(state) = world.plan().publish else { panic!("{reason}: a removal would be final") };
        assert!(state.ports.is_empty(), "{reason}: every listener closes");
        let ready = world.status().conditions.into_iter().find(|condition| condition.type_ == "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", reason));
        assert!(ready.message.contains("web"), "names the object: {}", ready.message);
    }
}

#[test]
fn a_missing_target_is_said_and_its_clients_are_held() {
    let mut world = World::serving();
    world.target = TargetState::Missing;
    world.ready = false;
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    let ready = &world.status().conditions[0];
    assert_eq!((ready.type_.as_str(), ready.reason.as_str()), ("Ready", "TargetNotFound"));
}

#[test]
fn an_unchanged_world_writes_nothing() {
    let mut world = World::serving();
    world.acknowledge();
    world.idle();
    world.settle();
    let plan = world.plan();
    assert_eq!((plan.actions, plan.again), (vec![], Some(SETTINGS.polling_interval)));
}
