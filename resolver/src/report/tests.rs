use elasti_api::message::{HEARTBEAT_INTERVAL, encode, report_interval};

use super::*;
use crate::fallback::Phase;
use crate::forward::Dialer;
use crate::metrics::Metrics;
use crate::readiness::Asker;
use crate::service::Service;
use crate::standby::Common;
use crate::testing::service_state;

const ACK: Ack = Ack { revision: 1, listening: true, redirecting: false, holding: false, error: None };

fn traffic(held: u32, accepted: u64) -> Traffic {
    Traffic { held, forwarding: 0, accepted }
}

fn kinds(due: &[ResolverMessage]) -> Vec<&'static str> {
    let kind = |message: &ResolverMessage| match message {
        ResolverMessage::Ack { .. } => "ack",
        ResolverMessage::Traffic { .. } => "traffic",
        ResolverMessage::InEffect { .. } => "summary",
        _ => "other",
    };
    due.iter().map(kind).collect()
}

fn add(board: &Board, uid: &str) -> Arc<Service> {
    let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
    let asker = Asker::new(Dialer::default(), Duration::ZERO, metrics.clone());
    let common = Arc::new(Common { metrics, asker, bell: board.bell() });
    let state = Arc::new(service_state(uid, 1, 20_000));
    let standby = Arc::new(Standby::new(common, board.number(), state, Phase::Informed));
    board.add(&uid.into(), Arc::clone(&standby));
    Arc::clone(standby.service())
}

fn acknowledge(board: &Board, uid: &str, ack: Ack) {
    board.acknowledge([(uid.to_owned(), ack, None)]);
}

/// As the state with this fingerprint asks.
fn as_asked(board: &Board, uid: &str, fingerprint: u64) {
    board.acknowledge([(uid.to_owned(), ACK, Some(fingerprint))]);
}

fn accept(service: &Service) {
    service.accept(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
}

#[test]
fn a_new_stream_tells_all_once() {
    let mut sent = SentOfOne::default();
    assert_eq!(kinds(&sent.due("a", &Arc::new(ACK), traffic(0, 0), false)), ["traffic", "ack"]);
    assert!(sent.due("a", &Arc::new(ACK), traffic(0, 0), true).is_empty());
}

#[test]
fn each_stream_is_told_of_each_change_and_what_could_wait_at_the_next_heartbeat() {
    let board = Board::default();
    let (a, b) = (add(&board, "a"), add(&board, "b"));
    let mut streams = [Sent::default(), Sent::default()];
    for uid in ["a", "b"] {
        acknowledge(&board, uid, ACK);
    }
    for sent in &mut streams {
        assert_eq!(kinds(&board.due(sent, false)), ["traffic", "ack", "traffic", "ack"]);
    }
    accept(&a);
    let held = b.hold(Instant::now(), 9).unwrap();
    for sent in &mut streams {
        let told = board.due(sent, false);
        assert!(matches!(&told[..], [ResolverMessage::Traffic { uid, held: 1, .. }] if uid == "b"), "{told:?}");
    }
    drop(held);
    for sent in &mut streams {
        let told = board.due(sent, true);
        assert!(
            matches!(
                &told[..],
                [ResolverMessage::Traffic { accepted: 1, .. }, ResolverMessage::Traffic { held: 0, .. }]
            ),
            "{told:?}"
        );
        assert!(board.due(sent, true).is_empty());
    }
}

/// One Service after the other has news, as ever more of them are there: what streams look at does not grow with them.
#[test]
fn what_is_looked_at_for_news_does_not_grow_with_the_number_of_services() {
    for services in [10, 1000] {
        let board = Board::default();
        let all: Vec<_> = (0..services).map(|number| add(&board, &number.to_string())).collect();
        board.acknowledge((0..services).map(|number| (number.to_string(), ACK, None)));
        let mut streams = [Sent::default(), Sent::default()];
        for sent in &mut streams {
            assert_eq!(board.due(sent, false).len(), 2 * services);
        }
        for service in &all[..10] {
            accept(service);
            let revision = board.entries().latest;
            acknowledge(&board, "0", Ack { revision, ..ACK });
            for sent in &mut streams {
                let looked_at = board.concerned(&mut board.entries(), sent, true);
                assert!(looked_at.len() <= 2, "{looked_at:?}");
            }
        }
    }
}

#[test]
fn a_service_that_comes_again_is_a_new_one_and_nothing_is_kept_of_those_that_are_gone() {
    let (board, mut sent) = (Board::default(), Sent::default());
    for round in 0..3 {
        let service = add(&board, "a");
        acknowledge(&board, "a", ACK);
        assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic", "ack"], "round {round}");
        accept(&service);
        assert!(board.due(&mut sent, false).is_empty(), "it can wait");
        board.remove("a");
    }
    assert!(board.due(&mut sent, true).is_empty());
    assert!(sent.of.is_empty() && sent.later.is_empty());
    let entries = board.entries();
    assert!(entries.order.is_empty() && entries.services.is_empty() && entries.numbers.is_empty());
}

#[test]
fn a_stream_that_begins_tells_what_is_as_asked_in_one_message_and_the_rest_one_by_one() {
    let board = Board::default();
    let services: Vec<_> = (0..3000).map(|number| add(&board, &number.to_string())).collect();
    for number in 0..3000 {
        as_asked(&board, &number.to_string(), number);
    }
    acknowledge(&board, "7", Ack { listening: false, ..ACK });
    accept(&services[8]);
    let mut sent = Sent::opening();
    assert!(board.due(&mut sent, true).is_empty(), "the operator has not spoken");
    sent.greeted(true);
    assert!(board.due(&mut sent, true).is_empty(), "no snapshot is in effect");
    board.settled();
    let told = board.due(&mut sent, false);
    let [ResolverMessage::Traffic { accepted: 1, .. }, ResolverMessage::InEffect { parts }, ..] = &told[..] else {
        panic!("{told:?}");
    };
    let with_7: Vec<u64> = (0..3000).filter(|number| part(&number.to_string()) == part("7")).collect();
    let mut expected = BTreeMap::<u16, u64>::new();
    for number in (0..3000).filter(|number| !with_7.contains(number)) {
        *expected.entry(part(&number.to_string())).or_default() += number;
    }
    assert_eq!(parts, &expected.into_iter().collect::<Vec<_>>());
    let acknowledged: BTreeSet<u64> = told
        .iter()
        .filter_map(|message| match message {
            ResolverMessage::Ack { uid, .. } => uid.parse().ok(),
            _ => None,
        })
        .collect();
    assert_eq!(acknowledged, with_7.iter().copied().collect());
    assert_eq!(told.len(), 2 + 2 * with_7.len());
    assert!(board.due(&mut sent, true).is_empty());

    board.unclear(&mut sent, &[part("9")]);
    let with_9 = (0..3000).filter(|number| part(&number.to_string()) == part("9")).count();
    assert_eq!(board.due(&mut sent, false).len(), 2 * with_9);
    assert!(board.due(&mut sent, true).is_empty());
}

#[test]
fn an_operator_that_understands_no_summaries_is_told_each_and_a_held_connection_waits_for_neither() {
    let board = Board::default();
    let (_a, b) = (add(&board, "a"), add(&board, "b"));
    as_asked(&board, "a", 1);
    as_asked(&board, "b", 2);
    board.settled();
    for summaries in [false, true] {
        let mut sent = Sent::opening();
        let held = b.hold(Instant::now(), 9).unwrap();
        assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic", "ack"]);
        sent.greeted(summaries);
        let told = kinds(&board.due(&mut sent, false));
        assert_eq!(told, if summaries { vec!["summary"] } else { vec!["traffic", "ack"] });
        drop(held);
        assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic"]);
        assert!(board.due(&mut sent, true).is_empty());
    }
}

#[test]
fn activity_is_told_at_heartbeats_as_long_as_there_are_pods() {
    let (board, mut sent) = (Board::default(), Sent::default());
    add(&board, "a");
    let of = |endpoints| {
        let (last, interval) = (Instant::now(), Duration::ZERO);
        let activity = Activity { endpoints, open: Some(0), opened: 0, last, interval, unknown: None };
        BTreeMap::from([("a".to_owned(), activity)])
    };
    board.observe(of(1));
    assert!(board.due(&mut sent, true).is_empty(), "not in effect");
    acknowledge(&board, "a", ACK);
    assert_eq!(kinds(&board.due(&mut sent, false)), ["traffic", "ack"]);
    assert_eq!(kinds(&board.due(&mut sent, true)), ["other"]);
    board.observe(BTreeMap::new());
    assert!(board.due(&mut sent, true).is_empty());
    board.observe(of(2));
    assert_eq!(kinds(&board.due(&mut sent, true)), ["other"]);
}

/// Keeps out B4: up to 3 s until readiness is noticed.
#[test]
fn the_first_and_the_last_held_connection_cannot_wait_other_traffic_can() {
    let mut sent = SentOfOne::default();
    sent.due("a", &Arc::new(ACK), traffic(0, 0), true);
    assert!(sent.due("a", &Arc::new(ACK), traffic(0, 1), false).is_empty());
    assert_eq!(kinds(&sent.due("a", &Arc::new(ACK), traffic(1, 2), false)), ["traffic"]);
    assert!(sent.due("a", &Arc::new(ACK), traffic(2, 3), false).is_empty());
    assert_eq!(kinds(&sent.due("a", &Arc::new(ACK), traffic(0, 3), false)), ["traffic"]);
}

#[test]
fn what_is_in_effect_is_told_at_once_and_nothing_before() {
    let (board, mut nothing) = (Board::default(), Sent::default());
    accept(&add(&board, "a"));
    assert!(board.due(&mut nothing, true).is_empty());
    let mut sent = SentOfOne::default();
    sent.due("a", &Arc::new(ACK), traffic(0, 0), false);
    let redirecting = Ack { redirecting: true, ..ACK };
    assert_eq!(kinds(&sent.due("a", &Arc::new(redirecting.clone()), traffic(0, 0), false)), ["ack"]);
    let holding = Ack { holding: true, ..redirecting };
    assert_eq!(kinds(&sent.due("a", &Arc::new(holding), traffic(0, 1), false)), ["traffic", "ack"]);
}

#[test]
fn activity_is_told_when_it_is_news_and_else_every_two_seconds_while_there_is_any() {
    let (start, mut sent) = (Instant::now(), SentOfOne::default());
    let interval = Duration::ZERO;
    let activity = Activity { endpoints: 1, open: Some(0), opened: 0, last: start, interval, unknown: None };
    let told = sent.activity_due("a", &activity, start + ACTIVITY_INTERVAL);
    assert!(matches!(told, Some(ResolverMessage::Activity { idle_ms: 2000, .. })), "{told:?}");
    let later = start + ACTIVITY_INTERVAL * 100;
    assert_eq!(sent.activity_due("a", &activity, later), None, "nothing has happened");
    let used = Activity { opened: 1, last: later, ..activity.clone() };
    assert!(sent.activity_due("a", &used, later).is_some());
    let again = Activity { opened: 2, ..used.clone() };
    assert_eq!(sent.activity_due("a", &again, later + ACTIVITY_INTERVAL / 2), None);
    assert!(sent.activity_due("a", &again, later + ACTIVITY_INTERVAL).is_some());
    let rarely = Activity { opened: 3, interval: ACTIVITY_INTERVAL * 2, ..again.clone() };
    let again_at = later + ACTIVITY_INTERVAL;
    assert_eq!(sent.activity_due("a", &rarely, again_at + ACTIVITY_INTERVAL), None);
    assert!(sent.activity_due("a", &rarely, again_at + ACTIVITY_INTERVAL * 2).is_some());
    let unknown = Some("x".to_owned());
    for news in [
        Activity { unknown, ..again.clone() },
        Activity { endpoints: 2, ..again.clone() },
        Activity { open: None, ..again },
    ] {
        assert!(sent.activity_due("a", &news, later + ACTIVITY_INTERVAL).is_some(), "{news:?}");
    }
}

/// A thousand nodes, ten thousand ElastiServices with three pods each, all of them busy at any moment, and two operators.
#[test]
fn reports_of_a_large_cluster_are_below_a_megabyte_a_second() {
    const NODES: usize = 1000;
    const OPERATORS: usize = 2;
    const FOLLOWED: u32 = 30;
    const SECONDS: u32 = 300;
    /// The default.
    const COOLDOWN: Duration = Duration::from_mins(15);
    // A frame of HTTP/2 has 9 bytes, a record of TLS 1.3 has 22 besides what is in it.
    const FRAMING: usize = 9 + 22;
    let length = |message: &ResolverMessage| encode(message).unwrap().len() + FRAMING;
    let start = Instant::now();
    let interval = report_interval(COOLDOWN);
    let mut sent: Vec<SentOfOne> = (0..FOLLOWED).map(|_| SentOfOne::default()).collect();
    let uid = |number: usize| format!("01234567-89ab-cdef-0123-{number:012}");
    let mut bytes = 0;
    for beat in 1..=SECONDS * 2 {
        let now = start + HEARTBEAT_INTERVAL * beat;
        bytes += length(&ResolverMessage::Heartbeat);
        for (number, sent) in sent.iter_mut().enumerate() {
            let opened = 1_000_000_000 + u64::from(beat);
            let activity =
                Activity { endpoints: u64::MAX, open: Some(99_999), opened, last: now, interval, unknown: None };
            bytes += sent.activity_due(&uid(number), &activity, now).iter().map(length).sum::<usize>();
        }
    }
    let all = bytes * NODES * OPERATORS / SECONDS as usize;
    assert!(all < 1_000_000, "{all} bytes a second");
    assert!(all > 300_000, "{all} bytes a second: something was left out");
}

#[test]
fn streams_learn_at_once_of_what_is_newly_in_effect() {
    let board = Board::default();
    let mut news = board.follow();
    add(&board, "a");
    acknowledge(&board, "a", ACK);
    assert!(news.has_changed().unwrap());
    news.mark_unchanged();
    acknowledge(&board, "a", ACK);
    assert!(!news.has_changed().unwrap());
    assert_eq!(kinds(&board.due(&mut Sent::default(), false)), ["traffic", "ack"]);
}
