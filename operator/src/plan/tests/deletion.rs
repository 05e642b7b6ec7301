//! A deleted ElastiService on its way out.

use super::*;
use crate::plan::deletion::FINALIZE_PATIENCE;

fn delete(world: &mut World) {
    world.elasti.metadata.deletion_timestamp = Some(Time(world.now().timestamp));
}

fn told(world: &mut World) -> ServiceState {
    match world.plan().publish {
        Publish::State(state) => *state,
        other => panic!("clients are served until the end: {other:?}"),
    }
}

#[test]
fn deletion_wakes_the_target_waits_for_it_and_leaves_nothing() {
    let mut world = World::asleep();
    delete(&mut world);
    let actions = world.settle();
    assert!(scales_up(&actions));
    assert!(!actions.contains(&Action::RemoveFinalizer), "clients are held until the target is ready");
    world.ready = true;
    world.settle();
    assert!(world.slices.is_empty());
    assert!(!world.plan().actions.contains(&Action::RemoveFinalizer), "kube-proxy may still send connections");
    world.pass(SETTINGS.kube_proxy_sync);
    let plan = world.plan();
    assert!(plan.actions.contains(&Action::RemoveFinalizer));
    assert_eq!(plan.publish, Publish::Remove);
}

#[test]
fn deletion_does_not_wait_for_ever_for_a_target_that_never_starts() {
    let mut world = World::asleep();
    delete(&mut world);
    world.settle();
    world.pass(FINALIZE_PATIENCE);
    world.settle();
    world.pass(SETTINGS.kube_proxy_sync);
    assert!(world.plan().actions.contains(&Action::RemoveFinalizer));
}

#[test]
fn clients_of_a_deleted_elasti_service_are_held_forwarded_and_then_left_to_the_pods() {
    for leads in [true, false] {
        let mut world = World::asleep();
        world.acknowledge();
        world.resolvers[0].traffic.held = 1;
        delete(&mut world);
        if !leads {
            world.leading_since = None;
        }
        let state = told(&mut world);
        assert_eq!((state.mode, state.redirect, state.holding), (Mode::Proxy, true, false), "leads: {leads}");
        world.scale(1);
        world.ready = true;
        let state = told(&mut world);
        assert_eq!(state.ports[0].backends.len(), 1, "who is held reaches the pod; leads: {leads}");
        world.leading_since = Some(world.now().instant);
        world.settle();
        let state = told(&mut world);
        assert_eq!((state.mode, state.redirect), (Mode::Serve, false), "nobody is redirected to listeners that close");
        assert!(world.slices.is_empty());
        world.pass(SETTINGS.kube_proxy_sync);
        assert_eq!(world.plan().publish, Publish::Remove);
    }
}

#[test]
fn who_is_held_for_a_scale_down_is_forwarded_when_the_elasti_service_is_deleted() {
    let mut world = World::descending();
    world.pass(SETTINGS.kube_proxy_sync);
    for action in world.plan().actions {
        world.apply(&action);
    }
    world.plan();
    assert!(world.holding, "about to sleep");
    delete(&mut world);
    world.settle();
    assert!(!world.holding);
    world.pass(SETTINGS.kube_proxy_sync);
    assert_eq!(world.plan().publish, Publish::Remove);
}

#[test]
fn what_was_not_intercepted_is_let_go_at_once() {
    let mut world = World::serving();
    world.acknowledge();
    delete(&mut world);
    let plan = world.plan();
    assert!(plan.actions.contains(&Action::RemoveFinalizer));
    assert_eq!(plan.publish, Publish::Remove);
}
