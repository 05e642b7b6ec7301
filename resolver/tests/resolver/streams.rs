//! The streams to the operators: what survives their end, and what is believed.

use std::time::Duration;

use elasti_api::message::{OperatorMessage, ResolverMessage, ServiceState, encode};
use elasti_api::summary::{PARTS, fingerprint, part};
use elasti_resolver::fallback::Patience;
use elasti_stand::operator::TOKEN;

use crate::backend::{echo, ping};
use crate::operator::{Identity, Operator};
use crate::world::{World, dial, free_port, is_reset, off, soon, state};

#[tokio::test]
async fn readiness_comes_with_the_first_snapshot() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    world.metric_is("elasti_resolver_operator_streams", "", 1.0).await;
    let ready = async {
        while !world.page("/readyz").await.starts_with("HTTP/1.1 200") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(ready).await;
}

#[tokio::test]
async fn hello_says_who_it_is_and_comes_first() {
    let world = World::new(vec![]).await;
    world.operator.hears("hello", |all| !all.is_empty()).await;
    world
        .operator
        .hears("who it is", |all| {
            all[0]
                == ResolverMessage::Hello {
                    pod: "resolver-0".into(),
                    node: "node-0".into(),
                    addresses: vec!["127.0.0.1".parse().unwrap()],
                    redirect_disabled: Some("in tests".into()),
                    known: Some(vec![0; PARTS]),
                }
        })
        .await;
}

#[tokio::test]
async fn a_stale_revision_is_ignored() {
    let (old, new) = (free_port(), free_port());
    let world = World::new(vec![state("a", 2, new, &[echo().await])]).await;
    world.operator.hears_listening("a", 2).await;
    world.operator.set(&state("a", 1, old, &[]));
    // Messages are taken in order: once a later one is in effect, the stale one has been ignored.
    world.operator.set(&state("b", 1, free_port(), &[]));
    world.operator.hears_listening("b", 1).await;
    ping(&mut dial(new).await, b"hello").await;
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", old)).await.is_err());
}

#[tokio::test]
async fn a_newer_version_and_garbage_keep_the_state() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[echo().await])]).await;
    world.operator.hears_listening("a", 1).await;
    world.operator.send_line(b"{\"v\":2,\"type\":\"service\",\"uid\":\"a\",\"ports\":\"all\"}\n".to_vec());
    world.operator.send_line(b"no message at all\n".to_vec());
    world.metric_is("elasti_resolver_newer_version_messages_total", "", 1.0).await;
    ping(&mut dial(port).await, b"hello").await;
    world.operator.set(&state("a", 2, port, &[]));
    world.operator.hears_listening("a", 2).await;
    world.metric_is("elasti_resolver_operator_streams", "", 1.0).await;
}

#[tokio::test]
async fn a_restarted_operator_learns_of_held_connections_again() {
    let port = free_port();
    let mut world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    world.operator.hears_held("a", 1).await;

    let stream_port = world.operator.address.port();
    let spare = Operator::start(&world.identity, 0, vec![]).await;
    std::mem::replace(&mut world.operator, spare).kill().await;
    world.metric_is("elasti_resolver_operator_streams", "", 0.0).await;
    let mut second = dial(port).await;
    world.operator = Operator::start(&world.identity, stream_port, vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    world.operator.hears_held("a", 2).await;
    world.operator.set(&state("a", 1, port, &[echo().await]));
    ping(&mut client, b"first").await;
    ping(&mut second, b"second").await;
}

#[tokio::test]
async fn a_resolver_that_connects_again_says_in_one_message_what_it_knows_and_in_another_what_is_in_effect() {
    let (port, closed) = (free_port(), free_port());
    let occupied = std::net::TcpListener::bind(("0.0.0.0", closed)).unwrap();
    let states = vec![ServiceState { redirect: false, ..state("a", 1, port, &[]) }, state("b", 1, closed, &[])];
    let line = |state: &ServiceState| encode(&OperatorMessage::Service(Box::new(state.clone()))).unwrap();
    let [(a, of_a), (b, of_b)] = [0, 1].map(|at| (part(&states[at].uid), fingerprint(&line(&states[at]))));
    let acknowledges = |all: &[ResolverMessage], wanted: &str| {
        all.iter().any(|message| matches!(message, ResolverMessage::Ack { uid, .. } if uid == wanted))
    };
    let in_effect = |all: &[ResolverMessage]| {
        all.contains(&ResolverMessage::InEffect { parts: vec![(a, of_a)] }) && acknowledges(all, "b")
    };
    let identity = Identity::new();
    let operator = Operator::start_summing(&identity, 0, states.clone()).await;
    let mut world = World::start(identity, operator, off(), Patience::default()).await;
    world.operator.hears("what is in effect", in_effect).await;

    let stream_port = world.operator.address.port();
    let spare = Operator::start(&world.identity, 0, vec![]).await;
    std::mem::replace(&mut world.operator, spare).kill().await;
    world.metric_is("elasti_resolver_operator_streams", "", 0.0).await;
    world.operator = Operator::start_summing(&world.identity, stream_port, states).await;
    world.operator.hears("what is in effect, again", in_effect).await;
    let knows = |all: &[ResolverMessage]| {
        let ResolverMessage::Hello { known: Some(known), .. } = &all[0] else { return false };
        known[usize::from(a)] == of_a
            && known[usize::from(b)] == of_b
            && known.iter().filter(|sum| **sum != 0).count() == 2
    };
    world.operator.hears("what it knows", knows).await;
    world.operator.hears("nothing of a by itself", |all| !acknowledges(all, "a")).await;
    world.operator.send(&OperatorMessage::Unclear { parts: vec![a] });
    world.operator.hears("what is in effect of a", |all| acknowledges(all, "a")).await;
    drop(occupied);
}

#[tokio::test]
async fn the_private_service_takes_over_when_operators_are_silent() {
    let target = echo().await;
    let port = free_port();
    let patience = Patience { fallback: Duration::from_secs(1), redirect: Duration::from_hours(1) };
    let mut with_fallback = ServiceState { fallback: vec![target.ip()], ..state("a", 1, port, &[]) };
    with_fallback.ports[0].port = target.port();
    let mut world = World::with(vec![with_fallback], off(), patience).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    world.operator.hears_held("a", 1).await;
    let spare = Operator::start(&world.identity, 0, vec![]).await;
    std::mem::replace(&mut world.operator, spare).kill().await;
    ping(&mut client, b"hello").await;
}

#[tokio::test]
async fn a_refused_token_is_read_again() {
    let identity = Identity::new();
    std::fs::write(identity.file("token"), "expired").unwrap();
    let port = free_port();
    let operator = Operator::start(&identity, 0, vec![state("a", 1, port, &[])]).await;
    let world = World::start(identity, operator, off(), Patience::default()).await;
    world.operator.refuses(2).await;
    std::fs::write(world.identity.file("token"), TOKEN).unwrap();
    world.operator.hears_listening("a", 1).await;
}

#[tokio::test]
async fn an_unknown_ca_gets_no_token() {
    let (known, unknown) = (Identity::new(), Identity::new());
    let operator = Operator::start(&unknown, 0, vec![]).await;
    let world = World::start(known, operator, off(), Patience::default()).await;
    world.operator.fails_handshakes(2).await;
    assert!(world.page("/readyz").await.starts_with("HTTP/1.1 503"));
    // The right CA arrives: files are read anew.
    std::fs::copy(unknown.file("ca.crt"), world.identity.file("ca.crt")).unwrap();
    world.operator.hears("hello", |all| !all.is_empty()).await;
}

#[tokio::test]
async fn a_leader_that_does_not_name_a_service_removes_it() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    world.operator.hears_held("a", 1).await;
    world.operator.send(&OperatorMessage::SnapshotEnd { uids: vec![], unchanged: vec![] });
    is_reset(&mut client).await;
}

#[tokio::test]
async fn a_leaving_resolver_says_so_and_goes_on_serving() {
    let port = free_port();
    let mut world = World::new(vec![state("a", 1, port, &[])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut held = dial(port).await;
    world.operator.hears_held("a", 1).await;
    world.shutdown.cancel();
    world.operator.hears("leaving", |all| all.contains(&ResolverMessage::Leaving)).await;
    let mut late = dial(port).await;
    world.operator.hears_held("a", 2).await;
    assert!(world.page("/readyz").await.starts_with("HTTP/1.1 503"));
    world.operator.set(&state("a", 1, port, &[echo().await]));
    ping(&mut held, b"held").await;
    ping(&mut late, b"late").await;
    drop((held, late));
    // It ends by itself, long before the drain time.
    soon(&mut world.resolver).await.unwrap();
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err());
}
