//! The autoscaler is paused before its target sleeps, scales again once it is awake, and a user's pause is left alone.

use elasti_api::v1alpha1::AutoscalerRef;

use super::*;
use crate::autoscaler::{Kind, Pause};

impl World {
    /// Does to an autoscaler what is wished.
    pub(super) fn annotate(&mut self, autoscaler: &AutoscalerObserved, wish: Wish) {
        let pause = match wish {
            Wish::Hold => Pause::Ours { by: "uid".into(), at_zero: false },
            Wish::AtZero => Pause::Ours { by: "uid".into(), at_zero: true },
            Wish::Resume => Pause::None,
        };
        self.stale_pauses.retain(|stale| stale.name != autoscaler.name);
        if let AutoscalerState::Found(found) = &mut self.autoscaler
            && found.name == autoscaler.name
        {
            found.pause = pause;
        }
    }

    fn with_autoscaler(mut self, kind: Kind, min_replicas: i32, pause: Pause) -> Self {
        let type_ = if kind == Kind::ScaledObject { "keda" } else { "hpa" };
        self.elasti.spec.autoscaler = Some(AutoscalerRef { type_: type_.into(), name: "web".into() });
        self.autoscaler = AutoscalerState::Found(scaled_object("web", min_replicas, pause));
        if let AutoscalerState::Found(found) = &mut self.autoscaler {
            found.kind = kind;
        }
        self.acknowledge();
        self.idle();
        self.settle();
        self
    }

    fn pause(&self) -> &Pause {
        &self.autoscaler.found().unwrap().pause
    }

    /// Lets the cooldown and everything after it pass.
    fn fall_asleep(&mut self) -> Vec<Action> {
        self.pass(Duration::from_mins(1));
        let mut applied = self.settle();
        for wait in [Duration::ZERO, SETTINGS.kube_proxy_sync] {
            self.acknowledge();
            self.pass(wait);
            applied.extend(self.settle());
        }
        applied
    }
}

fn scaled_object(name: &str, min_replicas: i32, pause: Pause) -> AutoscalerObserved {
    let (namespace, resource_version) = ("shop".to_owned(), "1".to_owned());
    AutoscalerObserved {
        kind: Kind::ScaledObject,
        namespace,
        name: name.to_owned(),
        resource_version,
        min_replicas,
        pause,
    }
}

fn keda(pause: Pause) -> World {
    World::serving().with_autoscaler(Kind::ScaledObject, 1, pause)
}

fn wishes(actions: &[Action]) -> Vec<Wish> {
    let wish = |action: &Action| match action {
        Action::AnnotateAutoscaler { wish, .. } => Some(*wish),
        _ => None,
    };
    actions.iter().filter_map(wish).collect()
}

fn ready_reason(world: &World) -> String {
    let status = world.status();
    status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap().reason.clone()
}

#[test]
fn keda_is_paused_before_its_target_sleeps_and_scales_again_when_it_is_awake() {
    let mut world = keda(Pause::None);
    let applied = world.fall_asleep();
    assert!(scales_down(&applied));
    assert_eq!(wishes(&applied), [Wish::Hold, Wish::AtZero], "at zero only when it is there");
    let down = applied.iter().position(|action| *action == Action::ScaleDown);
    let paused = applied.iter().position(|action| matches!(action, Action::AnnotateAutoscaler { .. }));
    assert!(paused < down);
    world.resolvers[0].traffic.held = 1;
    let applied = world.settle();
    assert!(scales_up(&applied));
    assert_eq!(wishes(&applied), [Wish::Resume]);
    assert_eq!(*world.pause(), Pause::None);
}

#[test]
fn nothing_sleeps_before_the_pause_has_been_read_back() {
    let mut world = keda(Pause::None);
    world.pass(Duration::from_mins(1));
    for _ in 0..5 {
        let actions = world.plan().actions;
        assert!(!scales_down(&actions));
        for action in actions.iter().filter(|action| !matches!(action, Action::AnnotateAutoscaler { .. })) {
            world.apply(action);
        }
        world.acknowledge();
        world.idle();
        world.pass(SETTINGS.kube_proxy_sync);
    }
    assert_eq!(*world.pause(), Pause::None);
}

#[test]
fn a_scale_down_that_is_given_up_lets_keda_scale_again() {
    let mut world = keda(Pause::None);
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!(*world.pause(), Pause::Ours { by: "uid".into(), at_zero: false });
    world.resolvers[0].traffic.accepted += 1;
    world.settle();
    assert_eq!(*world.pause(), Pause::None);
}

#[test]
fn b29_a_pause_of_the_user_is_never_changed() {
    for replicas in [None, Some(0)] {
        let mut world = keda(Pause::User { replicas });
        let mut applied = world.fall_asleep();
        assert!(scales_down(&applied), "a paused autoscaler disturbs nobody");
        world.resolvers[0].traffic.held = 1;
        applied.extend(world.settle());
        assert!(scales_up(&applied));
        assert_eq!(wishes(&applied), []);
    }
    let mut world = keda(Pause::User { replicas: Some(3) });
    let applied = world.fall_asleep();
    assert!(!scales_down(&applied), "KEDA would scale it up again");
    assert_eq!((wishes(&applied), ready_reason(&world).as_str()), (vec![], "AutoscalerPaused"));
}

#[test]
fn an_autoscaler_that_cannot_be_paused_keeps_its_target_up_and_no_client_waiting() {
    for state in [AutoscalerState::Missing, AutoscalerState::Unread("no KEDA".into())] {
        let mut world = keda(Pause::None);
        world.autoscaler = state;
        assert!(!scales_down(&world.fall_asleep()));
        assert_eq!((ready_reason(&world).as_str(), world.status().mode), ("AutoscalerNotFound", Some(Mode::Serve)));
        let (named, told) = (world.elasti.spec.autoscaler.clone().unwrap().name, &world.status().conditions[0].message);
        let missing = world.autoscaler == AutoscalerState::Missing;
        assert!(!missing || told.contains(&format!("no ScaledObject {named};")), "{told}");
        world.scale(0);
        world.ready = false;
        world.resolvers[0].traffic.held = 1;
        assert!(scales_up(&world.settle()));
    }
}

#[test]
fn an_hpa_needs_no_pause_and_one_that_scales_to_zero_itself_is_named() {
    let mut world = World::serving().with_autoscaler(Kind::HorizontalPodAutoscaler, 1, Pause::None);
    let applied = world.fall_asleep();
    assert!(scales_down(&applied) && wishes(&applied).is_empty());
    assert_eq!(ready_reason(&world), "Reconciled");
    let world = World::serving().with_autoscaler(Kind::HorizontalPodAutoscaler, 0, Pause::None);
    assert_eq!(ready_reason(&world), "AutoscalerScalesToZero");
    let mut unknown = World::serving().with_autoscaler(Kind::HorizontalPodAutoscaler, 1, Pause::None);
    unknown.autoscaler = AutoscalerState::Missing;
    assert!(scales_down(&unknown.fall_asleep()), "nobody looked at it in KubeElasti");
}

#[test]
fn b26_keda_scales_again_when_the_elastiservice_is_deleted_at_zero() {
    let mut world = keda(Pause::None);
    world.fall_asleep();
    world.elasti.metadata.deletion_timestamp =
        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(world.now().timestamp));
    let applied = world.settle();
    assert!(scales_up(&applied));
    assert_eq!(*world.pause(), Pause::None);
}

#[test]
fn an_autoscaler_that_is_named_no_more_scales_again() {
    let mut world = World::serving();
    world.stale_pauses = vec![scaled_object("former", 1, Pause::Ours { by: "uid".into(), at_zero: true })];
    assert_eq!(wishes(&world.settle()), [Wish::Resume]);
    assert!(world.stale_pauses.is_empty());
}

#[test]
fn a_pause_that_kubeelasti_has_left_is_taken_over_and_one_that_looks_like_it_is_not() {
    let sleeping = |generation| {
        let mut world = World::serving();
        world.scale(0);
        world.ready = false;
        world.elasti.metadata.generation = Some(1);
        world.elasti.status.as_mut().unwrap().observed_generation = generation;
        world.with_autoscaler(Kind::ScaledObject, 1, Pause::KubeElasti)
    };
    let mut world = sleeping(None);
    assert_eq!(*world.pause(), Pause::Ours { by: "uid".into(), at_zero: true });
    world.resolvers[0].traffic.held = 1;
    world.settle();
    assert_eq!(*world.pause(), Pause::None, "it scales again at the wake");
    assert_eq!(*sleeping(Some(1)).pause(), Pause::KubeElasti);
}

#[test]
fn a_pause_that_kubeelasti_has_left_is_not_forgotten_though_its_target_is_woken_first_or_the_patch_fails() {
    let inherited = |replicas| {
        let mut world = World::serving();
        world.scale(replicas);
        world.ready = replicas > 0;
        world.elasti.metadata.generation = Some(1);
        world.elasti.spec.autoscaler = Some(AutoscalerRef { type_: "keda".into(), name: "web".into() });
        world.autoscaler = AutoscalerState::Found(scaled_object("web", 1, Pause::KubeElasti));
        world
    };
    let mut world = inherited(1);
    world.settle();
    assert_eq!(*world.pause(), Pause::None, "KEDA would scale it to zero again");

    let mut world = inherited(0);
    world.resolvers[0].traffic.held = 1;
    for action in world.plan().actions {
        if !matches!(action, Action::AnnotateAutoscaler { .. }) {
            world.apply(&action);
        }
    }
    assert_eq!(*world.pause(), Pause::KubeElasti);
    world.ready = true;
    world.resolvers[0].traffic.held = 0;
    world.settle();
    assert_eq!(*world.pause(), Pause::None);
    assert_eq!(world.status().observed_generation, Some(1));
}
