//! What the status says, and when.

use super::*;
use crate::plan::status::{RESOLVER_PATIENCE, STATUS_PATIENCE};

fn status_of(plan: &Plan) -> Option<&ElastiServiceStatus> {
    plan.actions.iter().find_map(|action| match action {
        Action::WriteStatus(status) => Some(&**status),
        _ => None,
    })
}

#[test]
fn the_status_tells_once_of_a_wake_and_not_while_clients_have_just_begun_to_wait() {
    let mut world = World::asleep();
    world.resolvers[0].traffic.held = 1;
    let plan = world.plan();
    assert!(scales_up(&plan.actions) && status_of(&plan).is_none(), "{:?}", plan.actions);
    let woken = world.now();
    world.memory.woken(woken);
    world.scale(1);
    let plan = world.plan();
    assert_eq!(status_of(&plan), None);
    assert!(plan.again <= Some(STATUS_PATIENCE), "not for ever");
    world.pass(STATUS_PATIENCE);
    let plan = world.plan();
    let written = status_of(&plan).unwrap().clone();
    let time = written.last_scaled_up_time.clone().unwrap().0;
    assert_eq!(time.as_second(), woken.timestamp.as_second());
    assert!(written.conditions.iter().any(|condition| condition.reason == "Starting"), "{written:?}");
    // Times are read back without their fractions.
    world.elasti.status = Some(serde_json::from_value(serde_json::to_value(written).unwrap()).unwrap());
    assert_eq!(status_of(&world.plan()), None);
}

/// Regression: an operator that was restarted told of each ElastiService that there is no resolver, before any could connect.
#[test]
fn that_no_resolver_is_connected_is_told_once_it_lasts() {
    let mut world = World::asleep();
    let ready = |world: &World| {
        let conditions = &world.elasti.status.as_ref().unwrap().conditions;
        conditions.iter().find(|condition| condition.type_ == "Ready").map(|ready| ready.reason.clone()).unwrap()
    };
    let connected = std::mem::take(&mut world.resolvers);
    world.memory = Memory::default();
    world.settle();
    assert_eq!(ready(&world), "Reconciled", "resolvers are still connecting to an operator that has just started");
    world.resolvers = connected;
    world.pass(RESOLVER_PATIENCE);
    world.settle();
    world.resolvers.clear();
    world.settle();
    assert_eq!(ready(&world), "Reconciled", "one that is replaced comes back");
    world.pass(RESOLVER_PATIENCE);
    world.settle();
    assert_eq!(ready(&world), "NoResolver");
    world.connect(1);
    world.settle();
    assert_eq!(ready(&world), "Reconciled");
}

#[test]
fn who_is_new_is_told_at_once_that_no_resolver_is_connected() {
    let mut world = World::serving();
    world.resolvers.clear();
    world.settle();
    let conditions = &world.elasti.status.as_ref().unwrap().conditions;
    assert!(conditions.iter().any(|condition| condition.reason == "NoResolver"), "{conditions:?}");
}

/// Regression: a replica that does not lead said of each new ElastiService that clients reach its target, ready or not.
#[test]
fn only_the_leader_says_that_clients_are_left_to_the_pods() {
    let mut world = World::serving();
    world.ready = false;
    world.elasti.status = None;
    world.leading_since = None;
    assert_eq!(status_of(&world.plan()), None);
    world.scale(0);
    assert_eq!(status_of(&world.plan()).and_then(|status| status.mode), Some(Mode::Proxy));
}
