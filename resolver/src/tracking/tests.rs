use elasti_api::message::{TrackedEndpoint, TrackedNode, Tracking};

use proptest::prelude::*;

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

/// The operators say this, and nothing of other ElastiServices any more.
fn tell(tracker: &mut Tracker, states: &[&ServiceState], now: Instant) {
    let gone: Vec<String> = tracker.services.keys().cloned().collect();
    let gone = gone.iter().filter(|uid| states.iter().all(|state| state.uid != **uid));
    let told = states.iter().map(|state| (state.uid.as_str(), Some(*state)));
    tracker.update(gone.map(|uid| (uid.as_str(), None)).chain(told), now);
}

/// A tracker that has known the ElastiService `u`, without pods, for long.
fn settled(start: Instant) -> (Tracker, Instant) {
    let mut tracker = Tracker::new("here".into(), start);
    tell(&mut tracker, &[&state("u", &[], &[])], start);
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
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", true)], &[]), &silent], now);
    assert_eq!(tracker.wanted(now).into_keys().collect::<Vec<_>>(), [address()]);
    let outcome = tracker.outcome(Ok(&seen(0, 1)), now);
    assert_eq!(outcome.answers.into_keys().collect::<Vec<_>>(), ["u"]);
}

#[test]
fn connections_of_a_pod_that_is_new_are_all_known() {
    let (mut tracker, now) = settled(Instant::now());
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", false)], &[])], now);
    assert_eq!(adopts(&tracker, now), None);
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", true)], &[])], now);
    assert_eq!(adopts(&tracker, now), None, "ready later");
    assert_eq!(tracker.outcome(Ok(&seen(0, 2)), now).answers["u"].open, Some(2));
}

#[test]
fn a_client_may_be_faster_than_the_word_that_a_pod_is_ready() {
    let (mut tracker, now) = settled(Instant::now());
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", true)], &[])], now);
    assert_eq!(adopts(&tracker, now).as_deref(), Some("p"));
    assert_eq!(adopts(&tracker, now + OVERTAKING), None);
}

#[test]
fn a_pod_that_may_be_older_than_the_resolver_keeps_being_adopted_and_has_an_unknown_number_open() {
    let start = Instant::now();
    let pods = [(ADDRESS, "p", true)];
    let long = start + Duration::from_hours(1);
    let mut first = Tracker::new("here".into(), start);
    tell(&mut first, &[&state("u", &pods, &[])], start);
    let (mut silence, now) = settled(start);
    silence.missed(now);
    tell(&mut silence, &[&state("u", &pods, &[])], now);
    let (mut lapse, now) = settled(start);
    tell(&mut lapse, &[&state("u", &pods, &[])], now);
    lapse.lapsed(now);
    let (mut new_service, now) = settled(start);
    tell(&mut new_service, &[&state("u", &[], &[]), &state("v", &pods, &[])], now);
    for mut tracker in [first, silence, lapse, new_service] {
        assert_eq!(adopts(&tracker, long).as_deref(), Some("p"));
        let outcome = tracker.outcome(Ok(&seen(0, 2)), long);
        assert_eq!(outcome.answers.values().next_back().unwrap().open, None);
    }
}

#[test]
fn an_address_that_another_pod_has_taken_is_a_new_one() {
    let (mut tracker, now) = settled(Instant::now());
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", true)], &[])], now);
    let later = now + Duration::from_hours(1);
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "q", true)], &[])], later);
    assert_eq!(adopts(&tracker, later).as_deref(), Some("q"));
}

#[test]
fn following_begins_with_activity_and_what_a_gone_pod_did_is_remembered() {
    let (mut tracker, now) = settled(Instant::now());
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", false)], &[]), &state("v", &[(ADDRESS, "p", false)], &[])], now);
    assert_eq!(tracker.outcome(Ok(&seen(3600, 0)), now).answers["v"].last, now);
    let later = now + Duration::from_mins(5);
    tracker.outcome(Ok(&seen(1, 0)), later);
    tell(&mut tracker, &[&state("u", &[("10.244.0.10:8080", "q", false)], &[])], later);
    let other = [("10.244.0.10:8080".parse().unwrap(), Seen { visible: true, idle: later - now, ..Seen::default() })];
    assert_eq!(
        tracker.outcome(Ok(&other.into()), later).answers["u"].last,
        later.checked_sub(Duration::from_secs(1)).unwrap()
    );
}

#[test]
fn what_cannot_be_known_is_unknown() {
    let (mut tracker, now) = settled(Instant::now());
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", false)], &[])], now);
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
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", false)], &[])], now);
    let outcome = tracker.outcome(Ok(&nothing), now);
    assert!(outcome.dials.is_empty() && outcome.answers["u"].unknown.is_none(), "it is not ready");
    tell(&mut tracker, &[&state("u", &[(ADDRESS, "p", true)], &[])], now);
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
    tell(&mut tracker, &[&state("u", &pods, &["10.0.0.0/8", "fd00::/8"]), &state("v", &pods, &["fd00::/8"])], now);
    let ignored = tracker.wanted(now)[&address()].ignored.clone();
    assert_eq!(ignored.iter().map(ToString::to_string).collect::<Vec<_>>(), ["fd00::/8"]);
}

/// What is followed after all states were looked at, not only those that have changed.
fn from_scratch(
    tracker: &Tracker,
    states: &[&ServiceState],
    now: Instant,
) -> (BTreeMap<String, Service>, BTreeMap<SocketAddr, Endpoint>) {
    let (mut services, mut endpoints) = (BTreeMap::new(), BTreeMap::<SocketAddr, Endpoint>::new());
    for state in states {
        let Some(tracking) = &state.tracking else { continue };
        let known = tracker.services.get(&state.uid);
        let last = known.map_or(now, |known| known.last);
        let mut service = Service { last, interval: tracking.report_interval, endpoints: BTreeSet::new() };
        let ignored: Arc<BTreeSet<Cidr>> = Arc::new(tracking.ignore_sources.iter().copied().collect());
        for told in tracking.nodes.iter().filter(|node| node.node == tracker.node).flat_map(|node| &node.endpoints) {
            service.endpoints.insert(told.address);
            if let Some(shared) = endpoints.get_mut(&told.address) {
                shared.ignored = Arc::new(shared.ignored.intersection(&ignored).copied().collect());
                shared.old |= known.is_none();
                continue;
            }
            let before = tracker.endpoints.get(&told.address).filter(|before| before.pod == told.pod);
            let endpoint = Endpoint {
                since: before.map_or(now, |before| before.since),
                old: before.map_or(known.is_none() || now < tracker.settled, |before| before.old),
                first_ready: before.map_or(told.ready, |before| before.first_ready),
                ready: told.ready,
                pod: told.pod.clone(),
                ignored: Arc::clone(&ignored),
                dialled: before.and_then(|before| before.dialled),
            };
            endpoints.insert(told.address, endpoint);
        }
        services.insert(state.uid.clone(), service);
    }
    (services, endpoints)
}

fn any_state() -> impl Strategy<Value = ServiceState> {
    let endpoints = prop::collection::btree_map(0_u8..3, (0_u8..2, any::<bool>()), 0..3);
    let ignored = prop::sample::subsequence(vec!["10.0.0.0/8", "fd00::/8"], 0..=2);
    (0_u8..3, endpoints, ignored).prop_map(|(uid, endpoints, ignored)| {
        let endpoints: Vec<_> = endpoints
            .into_iter()
            .map(|(address, (pod, ready))| (format!("10.244.0.{address}:80"), format!("pod-{pod}"), ready))
            .collect();
        let endpoints: Vec<_> =
            endpoints.iter().map(|(address, pod, ready)| (address.as_str(), pod.as_str(), *ready)).collect();
        state(&uid.to_string(), &endpoints, &ignored)
    })
}

proptest! {
    #[test]
    fn what_is_followed_is_as_if_all_states_were_looked_at(
        steps in prop::collection::vec((prop::collection::vec((any_state(), any::<bool>()), 1..4), 0_u64..10), 0..20)
    ) {
        let mut now = Instant::now();
        let mut tracker = Tracker::new("here".into(), now);
        let mut states = BTreeMap::new();
        for (changed, seconds) in steps {
            now += Duration::from_secs(seconds);
            let mut uids = BTreeSet::new();
            for (state, there) in changed {
                uids.insert(state.uid.clone());
                if there {
                    states.insert(state.uid.clone(), state);
                } else {
                    states.remove(&state.uid);
                }
            }
            let expected = from_scratch(&tracker, &states.values().collect::<Vec<_>>(), now);
            tracker.update(uids.iter().map(|uid| (uid.as_str(), states.get(uid))), now);
            prop_assert_eq!((&tracker.services, &tracker.endpoints), (&expected.0, &expected.1));
            prop_assert!(tracker.told.keys().eq(tracker.endpoints.keys()), "nothing is kept of what nobody names");
        }
    }
}

#[test]
fn news_of_who_has_no_pods_here_concerns_no_address() {
    let (mut tracker, now) = settled(Instant::now());
    let (here, elsewhere) = (state("u", &[(ADDRESS, "p", true)], &[]), state("v", &[], &[]));
    assert!(tracker.update([("u", Some(&here))], now));
    assert!(!tracker.update([("v", Some(&elsewhere))], now));
    assert!(!tracker.update([("v", None)], now));
    assert!(tracker.update([("u", None)], now));
    assert!(tracker.wanted(now).is_empty());
}
