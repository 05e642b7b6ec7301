//! Endpoints that are ready although their pods have been told to end.

use super::*;
use crate::plan::ending::DISBELIEF;

fn told(world: &mut World) -> usize {
    let Publish::State(state) = world.plan().publish else { panic!("a state is published") };
    state.ports[0].backends.len()
}

/// Scaled to zero by somebody else while the slices still name the pod.
fn scaled_away() -> World {
    let mut world = World::serving();
    world.settle();
    assert_eq!(told(&mut world), 1);
    world.scale(0);
    world
}

#[test]
fn a_target_at_zero_is_redirected_and_held_although_its_pod_still_looks_ready() {
    let mut world = scaled_away();
    assert_eq!(told(&mut world), 0);
    let first = world.settle();
    assert!(
        first.iter().any(|action| matches!(action, Action::WriteStatus(status) if status.mode == Some(Mode::Proxy)))
    );
    let Publish::State(state) = world.plan().publish else { panic!("a state is published") };
    assert!(state.redirect && state.ports[0].backends.is_empty());
}

#[test]
fn a_wake_does_not_bring_the_ending_pod_back() {
    let mut world = scaled_away();
    world.settle();
    world.scale(1);
    assert_eq!(told(&mut world), 0);
    assert_eq!(world.settle().iter().filter(|action| matches!(action, Action::DeleteSlices(_))).count(), 0);
    world.ready = false;
    assert_eq!(told(&mut world), 0);
    world.ready = true;
    assert_eq!(told(&mut world), 1, "a new pod, if with the old address");
}

#[test]
fn an_endpoint_that_stays_is_somebody_elses_and_is_believed_in_the_end() {
    let mut world = scaled_away();
    world.settle();
    assert!(world.plan().again.is_some_and(|again| again <= DISBELIEF), "nothing else need happen");
    world.pass(DISBELIEF);
    assert_eq!(told(&mut world), 1);
    world.pass(Duration::from_hours(1));
    assert_eq!(told(&mut world), 1);
}
