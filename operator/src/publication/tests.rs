use elasti_api::message::{HoldPolicy, MAX_LINE, Mode, PortState, Protocol, Wakes, decode};
use futures::FutureExt;

use super::*;

fn state(uid: &str, revision: u64) -> ServiceState {
    ServiceState {
        uid: uid.into(),
        namespace: "n".into(),
        name: "e".into(),
        service: "s".into(),
        revision,
        mode: Mode::Proxy,
        redirect: false,
        holding: false,
        cluster_ips: vec![],
        fallback: vec![],
        ports: vec![],
        draining_pods: vec![],
        starting: vec![],
        asking: 0,
        hold: HoldPolicy::default(),
        probes: vec![],
        tracking: None,
    }
}

fn publication() -> Arc<Publication> {
    Arc::new(Publication::new("replica".into()))
}

fn follow(publication: &Arc<Publication>) -> Feed {
    publication.clone().follow().now_or_never().expect("is synced").unwrap()
}

/// What can be sent now.
fn told(feed: &mut Feed) -> Vec<OperatorMessage> {
    let due = std::iter::from_fn(|| feed.next().now_or_never());
    due.map(|line| decode(&line.unwrap().bytes).unwrap()).collect()
}

fn hello(leader: bool, epoch: u64) -> OperatorMessage {
    OperatorMessage::Hello { replica: "replica".into(), leader, epoch, summaries: true }
}

fn service(uid: &str, revision: u64) -> OperatorMessage {
    OperatorMessage::Service(Box::new(state(uid, revision)))
}

fn remove(uid: &str) -> OperatorMessage {
    OperatorMessage::Remove { uid: uid.into() }
}

fn end(uids: &[&str]) -> OperatorMessage {
    // As their parts have it.
    let mut uids: Vec<String> = uids.iter().map(ToString::to_string).collect();
    uids.sort_by_key(|uid| part(uid));
    OperatorMessage::SnapshotEnd { uids, unchanged: vec![] }
}

/// What a resolver knows that has been told all of these.
fn knows(told: &[OperatorMessage]) -> Summary {
    let mut summary = Summary::default();
    for message in told {
        if let OperatorMessage::Service(state) = message {
            summary.add(part(&state.uid), fingerprint(&encode(message).unwrap()));
        }
    }
    summary
}

#[test]
fn a_feed_is_a_snapshot_and_then_what_changes() {
    let publication = publication();
    publication.publish(state("a", 1));
    publication.publish(state("b", 1));
    publication.set_leader(true, 3);
    publication.set_synced();
    let mut feed = follow(&publication);
    assert_eq!(told(&mut feed), [hello(true, 3), service("a", 1), service("b", 1), end(&["a", "b"])]);

    publication.publish(state("a", 1));
    assert_eq!(told(&mut feed), [], "an equal state is no news");
    publication.publish(state("a", 2));
    publication.remove("b");
    publication.remove("never there");
    assert_eq!(told(&mut feed), [service("a", 2), remove("b")]);
}

/// Keeps out B13: an operator that restarts answers 200 and wakes nothing.
#[test]
fn no_snapshot_before_the_caches_are_filled() {
    let publication = publication();
    assert!(publication.clone().follow().now_or_never().is_none());
    publication.set_synced();
    assert_eq!(told(&mut follow(&publication)), [hello(false, 0), end(&[])]);
}

#[test]
fn a_slow_reader_gets_the_latest_state_only_and_nothing_piles_up() {
    let publication = publication();
    publication.set_synced();
    let mut feed = follow(&publication);
    for revision in 1..=10_000 {
        publication.publish(state("a", revision));
    }
    assert_eq!(publication.log().entries.len(), 1);
    assert_eq!(told(&mut feed), [hello(false, 0), service("a", 10_000), end(&["a"])]);
}

#[test]
fn removals_are_kept_within_bounds_and_who_has_missed_one_is_told_so() {
    let publication = publication();
    publication.set_synced();
    let mut slow = follow(&publication);
    for uid in 0..=REMOVALS {
        publication.publish(state(&uid.to_string(), 1));
        publication.remove(&uid.to_string());
    }
    assert_eq!(publication.log().entries.len(), REMOVALS);
    assert!(slow.next().now_or_never().unwrap().is_ok(), "hello");
    assert!(matches!(slow.next().now_or_never(), Some(Err(FeedError::Behind))));
    assert_eq!(told(&mut follow(&publication)).last(), Some(&end(&[])), "a new feed starts afresh");
}

#[test]
fn a_new_leader_says_again_what_there_is() {
    let publication = publication();
    publication.publish(state("a", 1));
    publication.set_synced();
    let mut feed = follow(&publication);
    told(&mut feed);
    publication.set_leader(true, 4);
    assert_eq!(told(&mut feed), [OperatorMessage::Heartbeat { leader: true, epoch: 4 }, end(&["a"])]);
    publication.set_leader(false, 5);
    assert_eq!(told(&mut feed), [OperatorMessage::Heartbeat { leader: false, epoch: 5 }]);
}

#[test]
fn the_longest_state_fits_a_line() {
    let backend = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap();
    for ports in [1, 40, 400] {
        let ports = (0..ports).map(|port| PortState {
            port,
            interception_port: 59_999,
            backends: vec![backend; 2000],
            draining: vec![backend; 2000],
            protocol: Protocol::Auto,
            proxy_protocol: false,
            wakes: Wakes::default(),
        });
        let publication = publication();
        publication.publish(ServiceState {
            ports: ports.collect(),
            draining_pods: vec!["01234567-89ab-cdef-0123-456789abcdef".to_owned(); 10_000],
            ..state("a", 1)
        });
        assert!(publication.log().entries[&1].line.len() < MAX_LINE);
    }
}

#[test]
fn a_resolver_that_knows_all_is_told_nothing_but_that_and_then_what_changes() {
    let (publication, restarted) = (publication(), publication());
    for publication in [&publication, &restarted] {
        // Another order is the same.
        let order = if Arc::ptr_eq(publication, &restarted) { ["b", "a", "c"] } else { ["a", "b", "c"] };
        for uid in order {
            publication.publish(state(uid, 1));
        }
        publication.set_synced();
    }
    let known = knows(&told(&mut follow(&publication)));
    let mut feed = follow(&restarted);
    feed.resume(&known);
    restarted.publish(state("a", 2));
    let told_then = told(&mut feed);
    let [OperatorMessage::Hello { .. }, changed, OperatorMessage::SnapshotEnd { uids, unchanged }] = &told_then[..]
    else {
        panic!("{told_then:?}");
    };
    assert_eq!((changed, &uids[..], unchanged.len()), (&service("a", 2), &[][..], PARTS));
    restarted.remove("b");
    assert_eq!(told(&mut feed), [remove("b")]);
    restarted.set_leader(true, 4);
    assert_eq!(told(&mut feed).last(), Some(&end(&["a", "c"])), "a new leader names all");
}

#[test]
fn a_resolver_that_knows_something_else_is_told_the_parts_in_which_that_is() {
    let (publication, restarted) = (publication(), publication());
    for uid in ["a", "b", "c", "gone"] {
        publication.publish(state(uid, 1));
    }
    publication.set_synced();
    let known = knows(&told(&mut follow(&publication)));
    restarted.publish(state("a", 1));
    restarted.publish(state("b", 2));
    restarted.publish(state("new", 1));
    restarted.publish(state("removed", 1));
    restarted.remove("removed");
    restarted.set_synced();
    let mut feed = follow(&restarted);
    feed.resume(&known);
    let told = told(&mut feed);
    assert_eq!(told[1..3], [service("b", 2), service("new", 1)]);
    let Some(OperatorMessage::SnapshotEnd { uids, unchanged }) = told.last() else { panic!("{told:?}") };
    let mut uids = uids.clone();
    uids.sort_unstable();
    assert_eq!(uids, ["b", "new"]);
    assert!(unchanged.contains(&part("a")));
    assert!(["b", "c", "gone", "new"].iter().all(|uid| !unchanged.contains(&part(uid))));
}

#[test]
fn what_states_of_a_part_ask_is_told_to_whom_has_them() {
    let publication = publication();
    publication.publish(state("a", 1));
    publication.publish(ServiceState { redirect: true, holding: true, ..state("b", 7) });
    publication.set_synced();
    let known = knows(&told(&mut follow(&publication)));
    let asked = |uid: &str| publication.asked(part(uid), known.of(part(uid))).map(|asked| asked.to_vec());
    assert_eq!(asked("a"), Some(vec![("a".into(), Asked { revision: 1, redirecting: false, holding: false })]));
    assert_eq!(asked("b"), Some(vec![("b".into(), Asked { revision: 7, redirecting: true, holding: true })]));
    publication.publish(state("a", 2));
    assert_eq!(asked("a"), None);
    publication.remove("b");
    assert_eq!(asked("b"), None);
    assert_eq!(publication.asked(part("b"), 0).map(|asked| asked.len()), Some(0), "nothing is in it");
}

#[test]
fn the_summary_is_that_of_what_is_published() {
    let publication = publication();
    for round in 0..3 {
        for uid in 0..50 {
            publication.publish(state(&uid.to_string(), round));
        }
        for uid in 0..50 {
            if uid % 3 == round {
                publication.remove(&uid.to_string());
            }
        }
    }
    publication.set_synced();
    let known = knows(&told(&mut follow(&publication)));
    assert_eq!(publication.log().summary, known);
}
