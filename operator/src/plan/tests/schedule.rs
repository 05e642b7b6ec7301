//! `enabledPeriod`: outside of it nothing is put to sleep, and nothing that sleeps is woken for it.

use elasti_api::v1alpha1::EnabledPeriod;

use super::*;

impl World {
    /// The world's clock stands at 03:04 UTC.
    fn enabled(mut self, schedule: &str) -> Self {
        let period = EnabledPeriod { schedule: schedule.into(), duration: "1h".into(), time_zone: None };
        self.elasti.spec.enabled_period = Some(period);
        self
    }
}

#[test]
fn b47_outside_the_period_a_running_target_stays_up_and_one_at_zero_sleeps_on_and_wakes_for_a_connection() {
    let mut world = World::serving().enabled("0 12 * * *");
    world.acknowledge();
    world.idle();
    world.pass(Duration::from_mins(10));
    assert!(!scales_down(&world.settle()));
    assert_eq!(world.status().mode, Some(Mode::Serve));

    let mut world = World::asleep().enabled("0 12 * * *");
    world.pass(Duration::from_mins(10));
    assert!(!scales_up(&world.settle()), "the end of the period wakes nobody");
    assert_eq!(world.status().mode, Some(Mode::Proxy));
    world.resolvers[0].traffic.held = 1;
    assert!(scales_up(&world.settle()));
}

#[test]
fn within_the_period_an_idle_target_is_put_to_sleep_and_its_end_stops_that() {
    assert!(scales_down(&{
        let mut world = World::descending().enabled("0 3 * * *");
        world.pass(SETTINGS.kube_proxy_sync);
        world.settle()
    }));
    let mut ended = World::descending().enabled("0 2 * * *");
    ended.pass(SETTINGS.kube_proxy_sync);
    assert!(!scales_down(&ended.settle()));
    assert_eq!(ended.status().mode, Some(Mode::Serve));
}
