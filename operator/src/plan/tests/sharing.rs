//! A target that several ElastiServices name.

use super::*;

#[test]
fn a_target_behind_two_services_is_not_put_to_sleep_and_wakes_for_either() {
    let mut world = World::descending();
    world.shared_with = vec!["web-grpc".into()];
    world.pass(SETTINGS.kube_proxy_sync);
    world.idle();
    let applied = world.settle();
    assert!(!scales_down(&applied), "nobody sees the connections of the other Service: {applied:?}");
    assert_eq!(applied.iter().filter(|action| warns(action, "TargetShared")).count(), 1);
    assert_eq!(world.status().mode, Some(Mode::Serve));
    let ready = &world.status().conditions[0];
    assert!(ready.message.contains("web-grpc") && ready.message.contains("one Service"), "{}", ready.message);

    let mut world = World::asleep();
    world.shared_with = vec!["web-grpc".into()];
    assert!(!scales_up(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    world.resolvers[0].traffic.held = 1;
    assert!(scales_up(&world.plan().actions));
}
