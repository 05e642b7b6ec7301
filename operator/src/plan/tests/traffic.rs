//! The trigger `traffic`: what resolvers tell of connections to pods.

use elasti_api::message::{ACTIVITY_INTERVAL, ACTIVITY_LAG, digest};

use super::*;
use crate::plan::status::{SOURCES_PATIENCE, UNKNOWN_PATIENCE};
use crate::resolvers::Activity;

/// A target with a pod on each of two nodes and no other trigger; both resolvers have told that nothing was ever active.
fn quiet() -> World {
    let mut world = World::serving();
    world.elasti.spec.triggers = None;
    world.endpoints = [1, 2].map(pod).into();
    for number in 1..=2 {
        tell(&mut world, number, |_| {});
    }
    world.acknowledge();
    world.settle();
    world
}

fn pod(number: u8) -> PodEndpoint {
    let address = format!("10.244.{number}.9:8080").parse().unwrap();
    PodEndpoint { address, node: format!("node-{number}"), pod: format!("pod-{number}"), ready: true }
}

/// The resolver of the node tells of its pods, which have been idle since the start, but for the `change`.
fn tell(world: &mut World, number: u8, change: impl Fn(&mut Activity)) {
    let node = format!("node-{number}");
    let here = world.endpoints.iter().filter(|pod| pod.node == node).map(|pod| pod.address);
    let mut activity = Activity { endpoints: digest(here), open: Some(0), last: world.start, unknown: None };
    change(&mut activity);
    let resolver = world.resolvers.iter_mut().find(|resolver| resolver.identity.node == node).unwrap();
    resolver.activity = Some(activity);
}

/// Lets the cooldown pass, and everything that follows it; returns whether the target was put to sleep.
fn sleeps(world: &mut World) -> bool {
    world.pass(Duration::from_mins(1));
    let mut actions = world.settle();
    world.acknowledge();
    actions.extend(world.settle());
    world.pass(SETTINGS.kube_proxy_sync.max(ACTIVITY_LAG));
    actions.extend(world.settle());
    scales_down(&actions)
}

fn with(world: &mut World, metadata: serde_json::Value) {
    world.elasti.spec.triggers = Some(vec![ScaleTrigger { type_: "traffic".into(), metadata: Some(metadata) }]);
}

#[test]
fn without_any_trigger_a_target_sleeps_once_no_node_has_seen_connections_for_the_cooldown() {
    let mut world = quiet();
    let plan = world.plan();
    let Publish::State(state) = plan.publish else { panic!("{:?}", plan.publish) };
    let followed = state.tracking.unwrap().nodes;
    assert_eq!(followed.iter().map(|node| node.node.as_str()).collect::<Vec<_>>(), ["node-1", "node-2"]);
    assert!(!plan.actions.contains(&Action::AskTriggers), "nobody is asked");
    assert!(sleeps(&mut world));
}

#[test]
fn activity_on_any_node_puts_sleep_off_by_a_cooldown() {
    let mut world = quiet();
    world.pass(Duration::from_secs(30));
    let now = world.now().instant;
    tell(&mut world, 2, |activity| activity.last = now);
    world.pass(Duration::from_secs(59));
    assert!(!scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Serve));
    assert!(sleeps(&mut world));
}

/// How often resolvers shall tell of activity.
fn told_every(world: &mut World) -> Duration {
    let Publish::State(state) = world.plan().publish else { panic!("nothing is told") };
    state.tracking.unwrap().report_interval
}

#[test]
fn activity_while_it_is_intercepted_ends_the_way_down() {
    let mut world = quiet();
    assert_eq!(told_every(&mut world), Duration::from_secs(6), "a tenth of the cooldown");
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    assert_eq!(told_every(&mut world), ACTIVITY_INTERVAL, "what is told now decides");
    world.acknowledge();
    world.settle();
    let now = world.now().instant;
    tell(&mut world, 1, |activity| activity.last = now);
    world.pass(ACTIVITY_LAG);
    assert!(!scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Serve));
}

#[test]
fn a_scale_down_waits_for_what_resolvers_have_seen_before_everything_was_intercepted() {
    let mut world = quiet();
    world.pass(Duration::from_mins(1));
    world.settle();
    world.acknowledge();
    world.settle();
    world.pass(ACTIVITY_LAG.checked_sub(Duration::from_millis(1)).unwrap());
    assert!(!scales_down(&world.settle()));
    world.pass(Duration::from_millis(1));
    assert!(scales_down(&world.settle()));
}

#[test]
fn a_node_that_cannot_answer_keeps_the_target_awake_and_is_named() {
    type Break = fn(&mut World);
    let cases: [(&str, Break); 6] = [
        ("no resolver is connected", |world| world.resolvers.truncate(1)),
        ("no resolver is connected", |world| world.resolvers[1].leaving = true),
        ("has not told", |world| world.resolvers[1].activity = None),
        ("has not told", |world| tell(world, 2, |activity| activity.endpoints += 1)),
        ("switched off", |world| tell(world, 2, |activity| activity.unknown = Some("switched off".into()))),
        ("has not told", |world| {
            world.endpoints.push(PodEndpoint { address: "10.244.2.10:8080".parse().unwrap(), ..pod(2) });
        }),
    ];
    for (named, break_it) in cases {
        let mut world = quiet();
        break_it(&mut world);
        world.settle();
        assert_eq!(world.status().conditions[0].reason, "Reconciled", "{named}: not at once");
        world.pass(UNKNOWN_PATIENCE);
        world.settle();
        assert!(!sleeps(&mut world), "{named}");
        let ready = world.status().conditions[0].clone();
        assert_eq!((ready.type_.as_str(), ready.reason.as_str()), ("Ready", "TriggerFailed"));
        assert!(ready.message.contains(named) && ready.message.contains("node-2"), "{}", ready.message);
    }
}

#[test]
fn one_resolver_of_a_node_that_knows_is_enough() {
    let mut world = quiet();
    world.connect(2);
    let newer = world.resolvers.last_mut().unwrap();
    Arc::make_mut(&mut newer.identity).pod = "resolver-2-newer".into();
    world.acknowledge();
    assert!(sleeps(&mut world));
}

#[test]
fn open_connections_hold_only_where_that_is_said() {
    for (idle_connections, open, sleeping) in [
        ("ignore", Some(1), true),
        ("ignore", None, true),
        ("hold", Some(0), true),
        ("hold", Some(1), false),
        ("hold", None, false),
    ] {
        let mut world = quiet();
        with(&mut world, serde_json::json!({"idleConnections": idle_connections}));
        tell(&mut world, 1, |activity| activity.open = open);
        assert_eq!(sleeps(&mut world), sleeping, "{idle_connections} {open:?}");
    }
}

#[test]
fn fewer_connections_than_the_minimum_hold_nothing_and_those_of_all_nodes_count_together() {
    for (open, sleeping) in [([Some(1), Some(1)], true), ([Some(1), Some(2)], false), ([None, Some(0)], false)] {
        let mut world = quiet();
        with(&mut world, serde_json::json!({"idleConnections": "hold", "minConnections": 3}));
        for (number, open) in (1..).zip(open) {
            tell(&mut world, number, |activity| activity.open = open);
        }
        assert_eq!(sleeps(&mut world), sleeping, "{open:?}");
    }
}

#[test]
fn resolvers_are_told_the_addresses_of_pods_that_are_ignored() {
    let mut world = quiet();
    with(
        &mut world,
        serde_json::json!({"ignoreSources": ["10.0.0.0/8", {"podSelector": {"matchLabels": {"a": "b"}}}]}),
    );
    world.ignored_pods = ["10.9.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into();
    let Publish::State(state) = world.plan().publish else { panic!("nothing is told") };
    let ignored = state.tracking.unwrap().ignore_sources;
    assert_eq!(ignored, ["10.0.0.0/8", "10.9.0.1", "fd00::1"].map(|range| range.parse().unwrap()));
}

#[test]
fn a_selector_that_matches_no_pod_is_told_once_that_has_lasted_and_keeps_nothing_awake() {
    let mut world = quiet();
    let since = world.now().instant;
    world.source_faults = vec![SourceFault { since, why: "there are none".into() }];
    world.settle();
    assert_eq!(world.status().conditions[0].reason, "Reconciled", "not at once");
    world.pass(SOURCES_PATIENCE);
    let told =
        |action: &Action| matches!(action, Action::Event { warning: true, reason, .. } if reason == "SourcesNotFound");
    assert_eq!(world.settle().iter().filter(|action| told(action)).count(), 1);
    let ready = world.status().conditions[0].clone();
    assert_eq!((ready.status.as_str(), ready.message.as_str()), ("True", "there are none"));
    assert!(sleeps(&mut world));
}

#[test]
fn all_triggers_must_agree() {
    for (metrics, traffic, sleeping) in [(true, true, true), (true, false, false), (false, true, false)] {
        let mut world = quiet();
        world.elasti.spec.triggers = World::serving().elasti.spec.triggers;
        world.elasti.spec.triggers.as_mut().unwrap().push(ScaleTrigger { type_: "traffic".into(), metadata: None });
        if metrics {
            world.idle();
        }
        if !traffic {
            let soon = world.start + Duration::from_secs(59);
            tell(&mut world, 1, |activity| activity.last = soon);
        }
        world.settle();
        assert_eq!(sleeps(&mut world), sleeping, "{metrics} {traffic}");
    }
}

#[test]
fn a_trigger_that_is_written_wrong_puts_nothing_to_sleep_and_is_named() {
    let mut world = quiet();
    with(&mut world, serde_json::json!({"idle": "hold"}));
    assert!(!sleeps(&mut world));
    let ready = world.status().conditions[0].clone();
    assert_eq!(ready.reason, "InvalidTrigger");
    assert!(ready.message.contains("idleConnections") && ready.message.contains("ignoreSources"), "{}", ready.message);
}

#[test]
fn a_target_runs_for_its_minimum_after_a_wake() {
    let mut world = quiet();
    world.elasti.spec.min_uptime = Some(300);
    assert!(!sleeps(&mut world));
    world.pass(Duration::from_mins(4));
    assert!(sleeps(&mut world));
}
