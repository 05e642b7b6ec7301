//! ElastiServices that are woken together.

use elasti_api::v1alpha1::WakePartner;

use super::*;
use crate::observed::{ObjectKey, PartnersObserved};

#[test]
fn a_target_wakes_with_those_that_it_is_to_be_woken_with_and_sleeps_by_its_own_triggers() {
    let mut world = World::asleep();
    world.pass(Duration::from_mins(1));
    assert!(!scales_up(&world.settle()));
    world.partner_waits = true;
    world.leading_since = None;
    assert!(!scales_up(&world.plan().actions), "its holder comes first");
    world.pass(FOLLOWER_PATIENCE);
    assert!(scales_up(&world.settle()));
    world.ready = true;
    world.leading_since = world.start.checked_sub(Duration::from_hours(1));
    world.acknowledge();
    world.idle();
    world.pass(Duration::from_mins(1));
    world.idle();
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Serve), "somebody who waits for its partner will want it");
    world.partner_waits = false;
    world.pass(Duration::from_mins(1));
    world.settle();
    assert_eq!(world.status().mode, Some(Mode::Proxy), "idle for its cooldown");
}

#[test]
fn partners_that_are_missing_and_circles_are_told() {
    let mut world = World::serving();
    let told = |world: &mut World| {
        world.settle();
        let condition = world.status().conditions.iter().find(|condition| condition.type_ == "WakeWith").cloned();
        condition.map(|condition| (condition.status, condition.reason, condition.message))
    };
    assert_eq!(told(&mut world), None);
    let partner = WakePartner { name: "db".into(), namespace: None };
    world.elasti.spec.wake_with = Some(vec![partner]);
    assert_eq!(told(&mut world).map(|(status, reason, _)| status + &reason), Some("TrueResolved".into()));
    let [web, db] = ["web", "db"].map(|name| ObjectKey::new("shop", name));
    world.partners.missing = vec![db.clone()];
    let (status, reason, message) = told(&mut world).unwrap();
    assert_eq!((&*status, &*reason), ("False", "PartnerNotFound"));
    assert!(message.contains("shop/db"), "{message}");
    world.partners = PartnersObserved { missing: vec![], cycle: Some(vec![web.clone(), db, web]) };
    let (status, reason, message) = told(&mut world).unwrap();
    assert_eq!((&*status, &*reason), ("True", "Cycle"));
    assert!(message.contains("shop/web wakes shop/db wakes shop/web"), "{message}");
}
