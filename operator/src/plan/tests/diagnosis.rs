//! When the pods of a target that does not get ready are looked at.

use super::*;

/// The seconds, of the next so many, at which they are.
fn looked_at(world: &mut World, seconds: u64) -> Vec<u64> {
    let mut looks = |_: &u64| {
        world.pass(Duration::from_secs(1));
        world.plan().actions.contains(&Action::Diagnose)
    };
    (1..=seconds).filter(|second| looks(second)).collect()
}

/// Keeps out a list of pods every 3 s for each target that stays broken.
#[test]
fn a_target_that_stays_unready_is_looked_at_ever_more_rarely_unless_somebody_waits_for_it() {
    let mut world = World::serving();
    world.ready = false;
    world.plan();
    assert_eq!(looked_at(&mut world, 200), [3, 6, 12, 24, 48, 96, 156]);
    world.resolvers[0].traffic.held = 1;
    assert_eq!(looked_at(&mut world, 9), [1, 4, 7]);
    world.resolvers[0].traffic.held = 0;
    world.ready = true;
    assert_eq!(looked_at(&mut world, 10), Vec::<u64>::new());
    world.ready = false;
    world.plan();
    assert_eq!(looked_at(&mut world, 6), [3, 6], "from the beginning again");
}
