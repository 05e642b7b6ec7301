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
    world.pass(GRACE);
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), 1);
}

/// A regression: while 1,000 resolvers connected to a restarted operator each of 10,000 slices was written again and again, each time with
/// those that happened to be there, and the API server answered nobody any more.
#[test]
fn while_many_resolvers_come_the_slices_that_name_some_of_them_stay_as_they_are() {
    let mut world = World::asleep();
    for number in 3..=100 {
        world.connect(number);
    }
    world.acknowledge();
    world.settle();
    let before = world.slices.clone();
    assert_eq!(before[0].endpoints.len(), SETTINGS.max_slice_endpoints);
    let all = std::mem::take(&mut world.resolvers);
    world.leading_since = Some(world.now().instant);
    world.arrivals.open_since = world.leading_since;
    let named = |resolver: &ResolverObserved| {
        before[0].endpoints.iter().any(|endpoint| resolver.identity.addresses.contains(&endpoint.address))
    };
    let (of_slice, others): (Vec<_>, Vec<_>) = all.into_iter().partition(named);
    for (index, resolver) in others.into_iter().chain(of_slice).enumerate() {
        world.resolvers.push(resolver);
        world.arrivals.last = Some(world.now().instant);
        world.settle();
        assert_eq!(world.slices, before, "after {index}");
        world.pass(Duration::from_millis(20));
    }
    assert!(world.plan().again.is_some_and(|again| again <= GRACE));
    let gone = world.resolvers.pop().unwrap();
    world.settle();
    assert_eq!(world.slices, before, "it may be about to come again");
    world.pass(GRACE);
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), SETTINGS.max_slice_endpoints);
    assert!(world.slices[0].endpoints.iter().all(|endpoint| endpoint.node != gone.identity.node));
}

#[test]
fn while_resolvers_come_those_that_have_gone_or_are_leaving_leave_the_slices_at_once() {
    for number in [4, 100] {
        let mut world = World::asleep();
        for number in 3..=number {
            world.connect(number);
        }
        world.acknowledge();
        world.settle();
        world.leading_since = Some(world.now().instant);
        let named = |world: &World, resolver: &ResolverObserved| {
            world.slices[0].endpoints.iter().any(|endpoint| resolver.identity.addresses.contains(&endpoint.address))
        };
        let (mut of_slice, _): (Vec<_>, Vec<_>) =
            std::mem::take(&mut world.resolvers).into_iter().partition(|resolver| named(&world, resolver));
        let (unseen, gone) = (of_slice.pop().unwrap(), of_slice.pop().unwrap());
        world.resolvers = of_slice;
        world.resolvers.push(gone.clone());
        world.resolvers.last_mut().unwrap().leaving = true;
        world.settle();
        assert!(named(&world, &unseen) && !named(&world, &gone), "{number}: it is about to go");
        let other = world.resolvers.remove(0);
        std::sync::Arc::make_mut(&mut world.arrivals.gone).extend(&other.identity.addresses);
        world.settle();
        assert!(named(&world, &unseen) && !named(&world, &other), "{number}: it has gone");
    }
}

#[test]
fn a_full_slice_of_which_nobody_comes_gets_those_who_have() {
    let mut world = World::asleep();
    for number in 3..=40 {
        world.connect(number);
    }
    world.acknowledge();
    world.settle();
    let before = world.slices[0].endpoints.clone();
    world.resolvers.clear();
    world.connect(200);
    world.acknowledge();
    world.leading_since = Some(world.now().instant);
    world.settle();
    assert_eq!(world.slices[0].endpoints, before, "others come first");
    assert!(world.plan().again.is_some_and(|again| again <= FIRST_ARRIVALS));
    world.pass(FIRST_ARRIVALS);
    world.settle();
    assert_eq!(world.slices[0].endpoints.len(), before.len() + 1);
    world.pass(GRACE);
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

/// Connects resolvers that listen.
fn connect_many(world: &mut World, numbers: std::ops::Range<u32>) {
    for number in numbers {
        world.connect(1);
        let resolver = world.resolvers.last_mut().unwrap();
        resolver.identity = Arc::new(Identity {
            pod: format!("resolver-{number}"),
            node: format!("node-{number}"),
            addresses: vec![IpAddr::V4((0x0af8_0000 + number).into())],
            redirect_disabled: None,
        });
    }
    world.acknowledge();
    world.settle();
}

/// In which slice each resolver stands. All do, in one each, and no slice has more than it may.
fn places(world: &World) -> BTreeMap<IpAddr, String> {
    assert!(world.slices.iter().all(|slice| (1..=slices::ENDPOINTS_MAX).contains(&slice.endpoints.len())));
    let endpoints = |slice: &ResolverSlice| slice.endpoints.clone();
    let told =
        world.slices.iter().flat_map(|slice| endpoints(slice).into_iter().map(|it| (it.address, slice.name.clone())));
    let places: BTreeMap<IpAddr, String> = told.collect();
    let connected: BTreeSet<IpAddr> =
        world.resolvers.iter().flat_map(|resolver| resolver.identity.addresses.clone()).collect();
    assert!(places.keys().eq(connected.iter()));
    assert_eq!(world.slices.iter().map(|slice| slice.endpoints.len()).sum::<usize>(), connected.len());
    places
}

/// A bug once: the API server refuses a slice of more than 1,000 endpoints, so such a Service was never intercepted.
#[test]
fn more_resolvers_than_a_slice_may_name_stand_in_several_and_whoever_stays_is_not_moved() {
    let mut world = World::asleep();
    world.service.as_mut().unwrap().local_traffic_policy = true;
    world.resolvers.clear();
    connect_many(&mut world, 0..1_500);
    let before = places(&world);
    let names: BTreeSet<&String> = before.values().collect();
    assert_eq!(names.len(), 2);
    let first = elasti_api::names::resolver_slice("web", false);
    assert!(names.contains(&first));

    // One in three goes, and some come.
    let mut number = 0;
    world.resolvers.retain(|_| {
        number += 1;
        number % 3 != 0
    });
    connect_many(&mut world, 1_500..1_600);
    let after = places(&world);
    assert_eq!((after.len(), world.slices.len()), (1_100, 2));
    assert!(before.iter().all(|(address, slice)| after.get(address).is_none_or(|after| after == slice)));

    // All of one slice go: nothing is left of it.
    world.resolvers.retain(|resolver| after[&resolver.identity.addresses[0]] == first);
    world.settle();
    assert!(places(&world).values().all(|slice| *slice == first));
    // And those of the last one: it stays, with whom it has.
    world.resolvers.clear();
    world.settle();
    assert_eq!(world.slices.len(), 1);
}

#[test]
fn a_new_leader_leaves_slices_whose_resolvers_have_not_connected_to_it_yet() {
    let mut world = World::asleep();
    world.service.as_mut().unwrap().local_traffic_policy = true;
    world.resolvers.clear();
    connect_many(&mut world, 0..1_100);
    let before = places(&world);
    let first = elasti_api::names::resolver_slice("web", false);
    world.leading_since = Some(world.now().instant);
    world.resolvers.retain(|resolver| before[&resolver.identity.addresses[0]] == first);
    world.settle();
    assert_eq!(world.slices.len(), 2);
    world.pass(GRACE);
    world.settle();
    assert_eq!(world.slices.len(), 1);
}
