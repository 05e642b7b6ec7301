//! Which resolvers the slices name.

use super::*;

/// Keeps out B11: no orderly end of a resolver.
#[test]
fn slices_follow_the_resolvers() {
    let mut world = World::asleep();
    world.connect(3);
    world.acknowledge();
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 3);
    world.resolvers.remove(0);
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 2);
    world.resolvers[0].leaving = true;
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 1);
    world.resolvers.clear();
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 1, "the last known resolver stays");
}

#[test]
fn a_new_leader_takes_no_resolver_out_before_they_had_time_to_connect() {
    let mut world = World::asleep();
    world.leading_since = Some(world.now().instant);
    world.resolvers.remove(0);
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 2);
    world.pass(LEADER_GRACE);
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 1);
}

#[test]
fn a_slice_that_was_removed_by_hand_comes_back() {
    let mut world = World::asleep();
    world.slices.clear();
    world.settle();
    assert_eq!(world.slices.len(), 1);
}

#[test]
fn a_resolver_that_is_gone_leaves_the_slices_though_the_leader_is_gone_with_it() {
    let mut world = World::asleep();
    assert_eq!(world.slices[0].endpoints.len(), 2);
    world.leading_since = None;
    let gone = world.resolvers.pop().unwrap();
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 2, "that is the holder's to do");
    world.holder_silent = true;
    world.settle();
    let left = |world: &World| world.slices[0].endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>();
    assert_eq!(left(&world), world.resolvers[0].identity.addresses);
    assert_ne!(left(&world), gone.identity.addresses);
    world.resolvers.clear();
    world.settle();
    assert_eq!(left(&world).len(), 1, "the last one stays");
}

#[test]
fn a_resolver_that_does_not_redirect_in_time_is_left_to_the_slices() {
    let mut world = World::descending();
    world.resolvers[0].ack.as_mut().unwrap().redirecting = false;
    world.memory.descent.as_mut().unwrap().settled = None;
    world.plan();
    world.pass(SETTINGS.kube_proxy_sync);
    assert!(!scales_down(&world.settle()), "it is waited for");
    world.pass(REDIRECT_PATIENCE);
    world.settle();
    world.pass(SETTINGS.kube_proxy_sync);
    assert!(scales_down(&world.settle()));
}

/// Its pods are about to end: what takes two answers of the API server comes too late for who connects meanwhile.
#[test]
fn a_target_scaled_to_zero_by_hand_is_intercepted_before_the_status_is_written() {
    for leads in [true, false] {
        let mut world = World::serving();
        if !leads {
            world.leading_since = None;
        }
        assert_eq!(published_mode(&world.plan()), Some((Mode::Serve, false)));
        world.scale(0);
        let plan = world.plan();
        assert_eq!(published_mode(&plan), Some((Mode::Proxy, true)));
        assert_eq!(world.status().mode, Some(Mode::Serve));
        let Publish::State(state) = plan.publish else { unreachable!("it was published") };
        assert_eq!(state.revision, world.status().revision);
        assert!(plan.actions.iter().any(|action| matches!(action, Action::WriteStatus(_))), "it is written too");
    }
}

/// A regression: the leader, to whom the target's watch brought nothing for a tenth of a second, undid at once what another
/// replica had begun, and clients reached pods that ended.
#[test]
fn interception_that_another_replica_began_is_not_undone_by_a_leader_who_sees_less() {
    let mut world = World::serving();
    world.acknowledge();
    world.settle();
    let status = world.elasti.status.as_mut().unwrap();
    (status.mode, status.revision) = (Some(Mode::Proxy), 2);
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    world.pass(UNEXPLAINED_MAX / 2);
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    world.pass(UNEXPLAINED_MAX / 2);
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Serve), "the target runs after all");
}
