use elasti_api::message::{TrackedEndpoint, TrackedNode, Tracking};

use super::*;
use crate::testing::service_state;

const ADDRESS: &str = "10.244.0.9:8080";

fn address() -> SocketAddr {
    ADDRESS.parse().unwrap()
}

fn state(uid: &str, endpoints: &[(&str, &str, bool)], ignored: &[&str]) -> ServiceState {
    let endpoints = endpoints
        .iter()
        .map(|(address, pod, ready)| TrackedEndpoint {
            address: address.parse().unwrap(),
            pod: (*pod).to_owned(),
            ready: *ready,
        })
        .collect();
    let elsewhere = vec![TrackedEndpoint { address: "10.244.1.1:80".parse().unwrap(), pod: "x".into(), ready: true }];
    let tracking = Tracking {
        nodes: vec![
            TrackedNode { node: "here".into(), endpoints },
            TrackedNode { node: "there".into(), endpoints: elsewhere },
        ],
        ignore_sources: ignored.iter().map(|range| range.parse().unwrap()).collect(),
        report_interval: Duration::default(),
    };
    ServiceState { tracking: Some(tracking), ..service_state(uid, 1, 20_000) }
}

/// A tracker that has known the ElastiService `u`, without pods, for long.
fn settled(start: Instant) -> (Tracker, Instant) {
    let mut tracker = Tracker::new("here".into(), start);
    tracker.update([&state("u", &[], &[])], start);
    (tracker, start + Duration::from_mins(10))
}

fn adopts(tracker: &Tracker, now: Instant) -> Option<String> {
    tracker.wanted(now)[&address()].adopt.clone()
}

fn seen(idle: u64, open: u32) -> BTreeMap<SocketAddr, Seen> {
    let seen = Seen { opened: 3, open, idle: Duration::from_secs(idle), visible: true, fault: None };
    [(address(), seen)].into()
}

#[test]
fn only_pods_of_this_node_are_followed_and_only_where_a_trigger_asks_for_it() {
    let (mut tracker, now) = settled(Instant::now());
    let silent = ServiceState { tracking: None, ..state("v", &[("10.244.0.7:80", "w", true)], &[]) };
    tracker.update([&state("u", &[(ADDRESS, "p", true)], &[]), &silent], now);
    assert_eq!(tracker.wanted(now).into_keys().collect::<Vec<_>>(), [address()]);
    let outcome = tracker.outcome(Ok(&seen(0, 1)), now);
    assert_eq!(outcome.answers.into_keys().collect::<Vec<_>>(), ["u"]);
}

#[test]
fn connections_of_a_pod_that_is_new_are_all_known() {
    let (mut tracker, now) = settled(Instant::now());
    tracker.update([&state("u", &[(ADDRESS, "p", false)], &[])], now);
    assert_eq!(adopts(&tracker, now), None);
    tracker.update([&state("u", &[(ADDRESS, "p", true)], &[])], now);
    assert_eq!(adopts(&tracker, now), None, "ready later");
    assert_eq!(tracker.outcome(Ok(&seen(0, 2)), now).answers["u"].open, Some(2));
}

#[test]
fn a_client_may_be_faster_than_the_word_that_a_pod_is_ready() {
    let (mut tracker, now) = settled(Instant::now());
    tracker.update([&state("u", &[(ADDRESS, "p", true)], &[])], now);
    assert_eq!(adopts(&tracker, now).as_deref(), Some("p"));
    assert_eq!(adopts(&tracker, now + OVERTAKING), None);
}

#[test]
fn a_pod_that_may_be_older_than_the_resolver_keeps_being_adopted_and_has_an_unknown_number_open() {
    let start = Instant::now();
    let pods = [(ADDRESS, "p", true)];
    let long = start + Duration::from_hours(1);
    let mut first = Tracker::new("here".into(), start);
    first.update([&state("u", &pods, &[])], start);
    let (mut silence, now) = settled(start);
    silence.missed(now);
    silence.update([&state("u", &pods, &[])], now);
    let (mut lapse, now) = settled(start);
    lapse.update([&state("u", &pods, &[])], now);
    lapse.lapsed(now);
    let (mut new_service, now) = settled(start);
    new_service.update([&state("u", &[], &[]), &state("v", &pods, &[])], now);
    for mut tracker in [first, silence, lapse, new_service] {
        assert_eq!(adopts(&tracker, long).as_deref(), Some("p"));
        let outcome = tracker.outcome(Ok(&seen(0, 2)), long);
        assert_eq!(outcome.answers.values().next_back().unwrap().open, None);
    }
}

#[test]
fn an_address_that_another_pod_has_taken_is_a_new_one() {
    let (mut tracker, now) = settled(Instant::now());
    tracker.update([&state("u", &[(ADDRESS, "p", true)], &[])], now);
    let later = now + Duration::from_hours(1);
    tracker.update([&state("u", &[(ADDRESS, "q", true)], &[])], later);
    assert_eq!(adopts(&tracker, later).as_deref(), Some("q"));
}

#[test]
fn following_begins_with_activity_and_what_a_gone_pod_did_is_remembered() {
    let (mut tracker, now) = settled(Instant::now());
    tracker.update([&state("u", &[(ADDRESS, "p", false)], &[]), &state("v", &[(ADDRESS, "p", false)], &[])], now);
    assert_eq!(tracker.outcome(Ok(&seen(3600, 0)), now).answers["v"].last, now);
    let later = now + Duration::from_mins(5);
    tracker.outcome(Ok(&seen(1, 0)), later);
    tracker.update([&state("u", &[("10.244.0.10:8080", "q", false)], &[])], later);
    let other = [("10.244.0.10:8080".parse().unwrap(), Seen { visible: true, idle: later - now, ..Seen::default() })];
    assert_eq!(
        tracker.outcome(Ok(&other.into()), later).answers["u"].last,
        later.checked_sub(Duration::from_secs(1)).unwrap()
    );
}

#[test]
fn what_cannot_be_known_is_unknown() {
    let (mut tracker, now) = settled(Instant::now());
    tracker.update([&state("u", &[(ADDRESS, "p", false)], &[])], now);
    let unknown = |tracker: &mut Tracker, seen: Result<&BTreeMap<_, _>, &str>| {
        tracker.outcome(seen, now).answers["u"].unknown.clone().unwrap_or_default()
    };
    assert_eq!(unknown(&mut tracker, Err("off")), "off");
    assert!(unknown(&mut tracker, Ok(&BTreeMap::new())).contains("not followed"));
    let fault = Seen { fault: Some("no cgroup".into()), ..Seen::default() };
    assert_eq!(unknown(&mut tracker, Ok(&[(address(), fault)].into())), "no cgroup");
    assert_eq!(unknown(&mut tracker, Ok(&seen(0, 0))), "");
}

#[test]
fn a_ready_pod_without_connections_is_dialled_and_one_where_that_is_not_seen_is_unknown() {
    let (mut tracker, now) = settled(Instant::now());
    let nothing: BTreeMap<_, _> = [(address(), Seen { idle: Duration::from_mins(5), ..Seen::default() })].into();
    tracker.update([&state("u", &[(ADDRESS, "p", false)], &[])], now);
    let outcome = tracker.outcome(Ok(&nothing), now);
    assert!(outcome.dials.is_empty() && outcome.answers["u"].unknown.is_none(), "it is not ready");
    tracker.update([&state("u", &[(ADDRESS, "p", true)], &[])], now);
    let first = tracker.outcome(Ok(&nothing), now);
    assert_eq!((first.dials, first.answers["u"].last), (vec![address()], now));
    assert!(tracker.outcome(Ok(&nothing), now).dials.is_empty(), "not at once again");
    let later = tracker.outcome(Ok(&nothing), now + DIAL_PATIENCE);
    assert_eq!(later.dials, [address()]);
    assert!(later.answers["u"].unknown.as_ref().unwrap().contains(ADDRESS));
    assert_eq!(tracker.outcome(Ok(&seen(0, 0)), now + DIAL_PATIENCE).answers["u"].unknown, None);
}

#[test]
fn of_two_elasti_services_with_the_same_pods_only_what_both_ignore_is_ignored() {
    let (mut tracker, now) = settled(Instant::now());
    let pods = [(ADDRESS, "p", true)];
    tracker.update([&state("u", &pods, &["10.0.0.0/8", "fd00::/8"]), &state("v", &pods, &["fd00::/8"])], now);
    let ignored = tracker.wanted(now)[&address()].ignored.clone();
    assert_eq!(ignored.iter().map(ToString::to_string).collect::<Vec<_>>(), ["fd00::/8"]);
}
