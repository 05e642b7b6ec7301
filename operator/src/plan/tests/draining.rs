//! Addresses of pods that are about to end.

use elasti_api::message::DRAINING_LIFETIME;

use super::*;
use crate::plan::draining::ELSEWHERE_INTERVAL;

fn drain(world: &mut World, ip: &str, elsewhere: bool) {
    world.draining.push(DrainingEndpoint {
        port: 80,
        address: format!("{ip}:8080").parse().unwrap(),
        pod: format!("uid-of-{ip}"),
        elsewhere,
    });
}

/// Intercepted at zero, with a pod that is about to end.
fn draining() -> World {
    let mut world = World::asleep();
    drain(&mut world, "10.244.1.9", false);
    world
}

/// What resolvers are told.
fn told(world: &mut World) -> Vec<String> {
    let Publish::State(state) = world.plan().publish else { panic!("a state is published") };
    assert_eq!(state.draining_pods.is_empty(), state.ports[0].draining.is_empty());
    state.ports[0].draining.iter().map(ToString::to_string).collect()
}

#[test]
fn a_draining_address_is_told_for_three_seconds_and_no_longer() {
    let mut world = draining();
    assert_eq!(told(&mut world), ["10.244.1.9:8080"]);
    assert!(world.plan().again.is_some_and(|again| again <= DRAINING_LIFETIME), "nothing else need happen");
    world.pass(Duration::from_millis(2999));
    assert_eq!(told(&mut world).len(), 1);
    world.pass(Duration::from_millis(1));
    assert!(told(&mut world).is_empty());
    world.pass(Duration::from_mins(1));
    assert!(told(&mut world).is_empty(), "its time does not begin again");
}

#[test]
fn a_draining_address_goes_when_its_containers_have_ended() {
    let mut world = draining();
    assert_eq!(told(&mut world).len(), 1);
    world.draining.clear();
    assert!(told(&mut world).is_empty());
}

#[test]
fn a_draining_address_that_somebody_else_has_is_not_told() {
    let mut world = draining();
    world.draining[0].elsewhere = true;
    assert!(told(&mut world).is_empty());
    assert!(world.plan().again.is_some_and(|again| again <= ELSEWHERE_INTERVAL), "it is looked at again");
    world.draining[0].elsewhere = false;
    assert_eq!(told(&mut world).len(), 1);
    let taken = world.draining[0].address.ip();
    Arc::make_mut(&mut world.resolvers[0].identity).addresses = vec![taken];
    assert!(told(&mut world).is_empty(), "a resolver has it");
}

#[test]
fn nothing_drains_while_a_pod_is_ready_or_before_the_service_is_intercepted() {
    let mut world = draining();
    world.ready = true;
    world.scale(1);
    assert!(told(&mut world).is_empty());
    let mut world = World::serving();
    drain(&mut world, "10.244.1.9", false);
    world.ready = false;
    assert!(told(&mut world).is_empty(), "mode serve, as read back");
}

#[test]
fn addresses_of_nodes_are_not_told() {
    let mut world = draining();
    world.target = TargetState::Found(TargetObserved { pod_network: false, ..TargetObserved::default() });
    assert!(told(&mut world).is_empty(), "pods in the host's network, or no template that says otherwise");
    world.target = TargetState::Missing;
    assert!(told(&mut world).is_empty());
}
