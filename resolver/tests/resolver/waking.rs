//! What a client must do to wake its target, and what it is until then: nothing.

use elasti_api::message::{Mode, ResolverMessage, ServiceState, Wakes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::backend::{backend, echo, ping};
use crate::world::{World, dial, free_port, soon, state};

/// An ElastiService at zero that is woken so.
async fn at_zero(wakes: Wakes) -> (World, u16, ServiceState) {
    let port = free_port();
    let mut at_zero = state("a", 1, port, &[]);
    at_zero.ports[0].wakes = wakes;
    let world = World::new(vec![at_zero.clone()]).await;
    world.operator.hears_listening("a", 1).await;
    (world, port, at_zero)
}

/// All that the operator was ever told is that so many at most were held and accepted.
async fn at_most(world: &World, held: u32, accepted: u64) {
    let within = |message: &ResolverMessage| match message {
        ResolverMessage::Traffic { held: now, accepted: ever, .. } => *now <= held && *ever <= accepted,
        _ => true,
    };
    world.operator.hears("no more than that", |messages| messages.iter().all(within)).await;
}

#[tokio::test]
async fn a_health_check_that_only_connects_wakes_nothing_and_is_no_traffic() {
    for wakes in [Wakes::DataOrSilence, Wakes::Data] {
        let (world, port, _) = at_zero(wakes).await;
        drop(dial(port).await);
        world.metric_is("elasti_resolver_closed_connections_total", "reason=\"client_left\"", 1.0).await;
        let mut client = dial(port).await;
        client.write_all(b"x").await.unwrap();
        world.operator.hears_held("a", 1).await;
        at_most(&world, 1, 1).await;
    }
}

#[tokio::test]
async fn who_stays_silent_waits_for_the_server_to_speak_and_wakes_it() {
    let (world, port, mut state) = at_zero(Wakes::DataOrSilence).await;
    let mut client = dial(port).await;
    world.operator.hears_held("a", 1).await;
    let greeter = backend(|mut stream| async move { stream.write_all(b"220 ready").await.unwrap() }).await;
    state.ports[0].backends = vec![greeter];
    world.operator.set(&state);
    let mut greeting = [0; 9];
    soon(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

#[tokio::test]
async fn where_only_data_wakes_a_silent_client_waits_for_another_to_wake_the_target() {
    let (world, port, mut state) = at_zero(Wakes::Data).await;
    let mut silent = dial(port).await;
    let mut client = dial(port).await;
    client.write_all(b"x").await.unwrap();
    world.operator.hears_held("a", 1).await;
    at_most(&world, 1, 1).await;
    state.ports[0].backends = vec![echo().await];
    world.operator.set(&state);
    soon(client.read_exact(&mut [0])).await.unwrap();
    // Until clients can reach the target directly it may be on its way down again: silence is no traffic.
    at_most(&world, 1, 1).await;
    world.operator.set(&ServiceState { mode: Mode::Serve, revision: 2, ..state });
    world.metric_is("elasti_resolver_forwarded_connections", "service=\"a\"", 2.0).await;
    ping(&mut silent, b"at last").await;
}

#[tokio::test]
async fn a_client_that_never_says_anything_is_closed_when_the_hold_time_ends() {
    let (world, port, mut state) = at_zero(Wakes::Data).await;
    state.hold.timeout = std::time::Duration::from_millis(200);
    world.operator.set(&ServiceState { revision: 2, ..state });
    world.operator.hears_listening("a", 2).await;
    let mut client = dial(port).await;
    assert_eq!(soon(client.read(&mut [0])).await.unwrap_or(0), 0);
    world.metric_is("elasti_resolver_closed_connections_total", "reason=\"timeout\"", 1.0).await;
    at_most(&world, 0, 0).await;
}
