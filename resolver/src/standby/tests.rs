use std::net::IpAddr;
use std::time::Duration;

use elasti_api::readiness::StartingPod;

use super::*;
use crate::testing::{self, service_state};

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

fn standby() -> Arc<Standby> {
    testing::standby(service_state("a", 1, 20_000), Duration::from_millis(10))
}

fn asking(standby: &Standby) -> bool {
    standby.told().asking.is_some()
}

/// There are as many of these as ElastiServices in the cluster.
#[test]
fn it_costs_little() {
    assert!(size_of::<Standby>() <= 80, "{} bytes", size_of::<Standby>());
}

#[test]
fn the_service_is_made_with_the_first_need_and_follows_the_state_from_then_on() {
    let standby = standby();
    assert_eq!((standby.made().is_none(), standby.traffic()), (true, Traffic::default()));
    let mut state = service_state("a", 2, 20_000);
    state.ports[0].backends = vec!["10.0.0.1:80".parse().unwrap()];
    standby.set(Arc::new(state.clone()), Phase::Informed);
    assert!(standby.made().is_none());
    assert!(standby.service().view().reachable(20_000));
    standby.service().accept(CLIENT);
    state.ports[0].backends.clear();
    standby.set(Arc::new(state), Phase::Informed);
    assert!(!standby.service().view().reachable(20_000));
    assert_eq!(standby.traffic().accepted, 1, "it is the same");
}

#[tokio::test]
async fn starting_pods_are_asked_once_there_is_a_service_whatever_comes_first() {
    let pod = StartingPod {
        uid: "p".into(),
        addresses: vec![],
        ports: vec![],
        containers: vec![],
        confirmation: Duration::from_secs(1),
    };
    let starting = Arc::new(ServiceState { starting: vec![pod], ..service_state("a", 2, 20_000) });
    let (before, after) = (standby(), standby());
    before.service();
    for standby in [&before, &after] {
        assert!(!asking(standby));
        standby.set(Arc::clone(&starting), Phase::Informed);
    }
    assert_eq!((asking(&before), asking(&after)), (true, false));
    after.service();
    assert!(asking(&after));
    after.remove();
    assert!(!asking(&after));
}

#[test]
fn of_one_that_is_gone_nothing_is_counted_however_late_somebody_comes() {
    let registry = prometheus::Registry::new();
    let standby = testing::standby_counted(service_state("a", 1, 20_000), Duration::ZERO, &registry);
    let told = || registry.gather().iter().filter(|family| !family.get_metric().is_empty()).count();
    let idle = told();
    let serving = ServiceState { mode: Mode::Serve, ..service_state("a", 2, 20_000) };
    standby.set(Arc::new(serving), Phase::Informed);
    assert_eq!((told(), standby.made().is_none()), (idle + 1, true), "a switch of the mode needs no Service");
    standby.remove();
    standby.service().accept(CLIENT);
    assert_eq!((told(), standby.service().view().ports.count()), (idle, 0));
}
