//! The life of connections: held, released, refused, forwarded.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use elasti_api::message::{HoldPolicy, Mode, OperatorMessage, ResolverMessage, ServiceState};
use elasti_api::readiness::{Probe, ProbeAction, StartingPod, TargetPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::backend::{backend, echo, ping, refusing};
use crate::world::{StandingClock, World, dial, free_port, is_reset, soon, state};

/// A world with one Service at zero, and connections to it.
async fn at_zero<const N: usize>(hold: HoldPolicy) -> (World, u16, [TcpStream; N]) {
    let port = free_port();
    let world = World::new(vec![ServiceState { hold, ..state("a", 1, port, &[]) }]).await;
    world.operator.hears_listening("a", 1).await;
    let mut clients = Vec::new();
    for _ in 0..N {
        clients.push(dial(port).await);
    }
    (world, port, clients.try_into().unwrap())
}

#[tokio::test]
async fn a_held_connection_is_notified_released_and_answered() {
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    client.write_all(b"early").await.unwrap();
    world.operator.hears_held("a", 1).await;
    world.operator.set(&state("a", 1, port, &[echo().await]));
    let mut answer = [0; 5];
    soon(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"early");
    world.operator.hears_held("a", 0).await;
    world.metric_is("elasti_resolver_forwarded_bytes_total", "service=\"a\"", 10.0).await;
    world.metric_is("elasti_resolver_wake_seconds_count", "phase=\"notified\"", 1.0).await;
    world.metric_is("elasti_resolver_wake_seconds_count", "phase=\"total\"", 1.0).await;
}

#[tokio::test]
async fn a_starting_pod_gets_held_connections_as_soon_as_it_answers_its_own_probe() {
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    client.write_all(b"early").await.unwrap();
    world.operator.hears_held("a", 1).await;
    let pod = echo().await;
    let probe = Probe {
        action: ProbeAction::Tcp { port: refusing().await.port() },
        successes: 1,
        period: Duration::from_secs(10),
        timeout: Duration::from_secs(1),
    };
    let starting = StartingPod {
        uid: "p".into(),
        addresses: vec![pod.ip()],
        ports: vec![TargetPort { port: 80, target: pod.port() }],
        containers: vec![vec![probe.clone()]],
        confirmation: Duration::from_mins(1),
    };
    let told = |pod: StartingPod| ServiceState { starting: vec![pod], asking: 1, ..state("a", 1, port, &[]) };
    world.operator.set(&told(starting.clone()));
    world.metric_at_least("elasti_resolver_readiness_probes_total", "failure", 3.0).await;
    world.operator.hears_held("a", 1).await;
    let open = Probe { action: ProbeAction::Tcp { port: pod.port() }, ..probe };
    world.operator.set(&told(StartingPod { containers: vec![vec![open]], ..starting }));
    let mut answer = [0; 5];
    soon(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"early");
    world.operator.hears_held("a", 0).await;
    world.metric_is("elasti_resolver_wake_seconds_count", "phase=\"addressed\"", 1.0).await;
    // The next one need not wait either.
    ping(&mut dial(port).await, b"next").await;
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    world.operator.hears_held("a", 1).await;
    let greeting = backend(|mut stream| async move { stream.write_all(b"220 ready").await.unwrap() }).await;
    world.operator.set(&state("a", 1, port, &[greeting]));
    let mut heard = String::new();
    soon(client.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "220 ready");
}

#[tokio::test]
async fn a_client_that_closes_its_sending_side_while_held_gets_its_answer() {
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    world.operator.hears_held("a", 1).await;
    // Answers only when the client has closed its sending side.
    let target = backend(|mut stream| async move {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
    })
    .await;
    world.operator.set(&state("a", 1, port, &[target]));
    let mut answer = String::new();
    soon(client.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "question");
}

#[tokio::test]
async fn a_server_that_closes_its_sending_side_still_hears_the_client() {
    let (told, mut hears) = tokio::sync::mpsc::channel(1);
    let target = backend(move |mut stream| {
        let told = told.clone();
        async move {
            stream.shutdown().await.unwrap();
            let mut all = String::new();
            stream.read_to_string(&mut all).await.unwrap();
            told.send(all).await.unwrap();
        }
    })
    .await;
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    world.operator.set(&state("a", 1, port, &[target]));
    assert_eq!(soon(client.read(&mut [0])).await.unwrap(), 0);
    client.write_all(b"still here").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(soon(hears.recv()).await.unwrap(), "still here");
}

/// Keeps out B15: clients that have left keep their places and wake targets.
#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let (world, _, [silent, resetting, mut talkative, mut secure]) = at_zero(HoldPolicy::default()).await;
    talkative.write_all(b"something unread").await.unwrap();
    // The beginning of a ClientHello.
    secure.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
    world.operator.hears_held("a", 4).await;
    drop(secure);
    world.operator.hears_held("a", 3).await;
    drop(silent);
    world.operator.hears_held("a", 2).await;
    resetting.set_zero_linger().unwrap();
    drop(resetting);
    world.operator.hears_held("a", 1).await;
    talkative.set_zero_linger().unwrap();
    drop(talkative);
    world.operator.hears_held("a", 0).await;
    world.metric_is("elasti_resolver_closed_connections_total", "client_left", 4.0).await;
}

#[tokio::test]
async fn the_end_of_the_hold_time_resets() {
    let hold = HoldPolicy { timeout: Duration::from_millis(300), ..HoldPolicy::default() };
    let start = Instant::now();
    let (world, _, [mut client]) = at_zero(hold).await;
    is_reset(&mut client).await;
    assert!(start.elapsed() >= hold.timeout);
    world.metric_is("elasti_resolver_closed_connections_total", "timeout", 1.0).await;
}

#[tokio::test]
async fn a_target_that_never_answers_resets_with_its_own_reason() {
    // Longer than any machine takes for the steps below: the hold time ends when the test says so.
    let hold = HoldPolicy { timeout: Duration::from_mins(1), ..HoldPolicy::default() };
    let (world, port, []) = at_zero(hold).await;
    world.operator.set(&ServiceState { hold, ..state("a", 2, port, &[refusing().await]) });
    world.operator.hears_listening("a", 2).await;
    let mut client = dial(port).await;
    world.operator.hears_held("a", 1).await;
    let standing = StandingClock::new();
    tokio::time::advance(hold.timeout).await;
    standing.goes_on();
    is_reset(&mut client).await;
    world.metric_is("elasti_resolver_closed_connections_total", "dial_failed", 1.0).await;
}

#[tokio::test]
async fn more_connections_than_the_limit_are_reset_at_once_and_a_free_place_is_taken() {
    let hold = HoldPolicy { max_connections: 2, ..HoldPolicy::default() };
    let (world, port, [first, second]) = at_zero(hold).await;
    world.operator.hears_held("a", 2).await;
    is_reset(&mut dial(port).await).await;
    drop(first);
    world.operator.hears_held("a", 1).await;
    let third = dial(port).await;
    world.operator.hears_held("a", 2).await;
    world.metric_is("elasti_resolver_closed_connections_total", "limit", 1.0).await;
    drop((second, third));
}

/// Keeps out B3: five held requests are released a second. No timer of the resolver ends while they are answered, however long
/// the machine takes.
#[tokio::test]
async fn two_hundred_held_connections_are_answered_while_the_clock_stands() {
    let (world, port, clients) = at_zero::<200>(HoldPolicy::default()).await;
    world.operator.hears_held("a", 200).await;
    let target = echo().await;
    let clock = StandingClock::new();
    world.operator.set(&state("a", 1, port, &[target]));
    let mut answers = JoinSet::new();
    for mut client in clients {
        answers.spawn(async move { ping(&mut client, b"hello").await });
    }
    answers.join_all().await;
    assert_eq!(clock.goes_on(), Duration::ZERO, "some were answered only when time passed");
}

/// Keeps out B16: a refused dial becomes 502.
#[tokio::test]
async fn a_failed_dial_is_retried_on_another_backend() {
    let (dead, alive) = (refusing().await, echo().await);
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[dead, alive])]).await;
    world.operator.hears_listening("a", 1).await;
    // Either backend may come first.
    for _ in 0..16 {
        ping(&mut dial(port).await, b"hello").await;
    }
    world.metric_is("elasti_resolver_held_connections", "service=\"a\"", 0.0).await;
}

#[tokio::test]
async fn a_connection_to_a_dead_backend_is_held_and_takes_the_next_one() {
    let port = free_port();
    let world = World::new(vec![state("a", 1, port, &[refusing().await])]).await;
    world.operator.hears_listening("a", 1).await;
    let mut client = dial(port).await;
    world.operator.hears_held("a", 1).await;
    world.operator.set(&state("a", 1, port, &[echo().await]));
    ping(&mut client, b"hello").await;
}

/// Keeps out B8: both slices are live during the hand-over.
#[tokio::test]
async fn late_arrivals_are_forwarded_in_serve_mode_and_count_as_accepted() {
    let port = free_port();
    let serving = ServiceState { mode: Mode::Serve, redirect: false, ..state("a", 2, port, &[echo().await]) };
    let world = World::new(vec![serving]).await;
    world.operator.hears_listening("a", 2).await;
    ping(&mut dial(port).await, b"late").await;
    world.metric_is("elasti_resolver_accepted_connections_total", "service=\"a\"", 1.0).await;
}

#[tokio::test]
async fn a_removed_service_resets_held_connections_and_refuses_new_ones() {
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    world.operator.hears_held("a", 1).await;
    world.operator.send(&OperatorMessage::Remove { uid: "a".into() });
    is_reset(&mut client).await;
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
}

#[tokio::test]
async fn a_broken_target_resets_the_client() {
    let breaking = backend(|mut stream| async move {
        stream.write_all(b"half an ans").await.unwrap();
        drop(stream.read(&mut [0]).await);
        stream.set_zero_linger().unwrap();
    })
    .await;
    let (world, port, [mut client]) = at_zero(HoldPolicy::default()).await;
    world.operator.set(&state("a", 1, port, &[breaking]));
    soon(client.read_exact(&mut [0; 11])).await.unwrap();
    client.write_all(b"?").await.unwrap();
    is_reset(&mut client).await;
}

/// Keeps out B6: one queue for all Services.
#[tokio::test]
async fn one_service_in_trouble_does_not_hold_up_another() {
    let (taken, free) = (free_port(), free_port());
    let occupier = std::net::TcpListener::bind(("0.0.0.0", taken)).unwrap();
    let alive: SocketAddr = echo().await;
    let world = World::new(vec![state("a", 1, taken, &[alive]), state("b", 1, free, &[alive])]).await;
    world.operator.hears_listening("b", 1).await;
    ping(&mut dial(free).await, b"hello").await;
    world
        .operator
        .hears("why a does not listen", |all| {
            all.iter().any(|message| {
                matches!(message, ResolverMessage::Ack { uid, listening: false, error: Some(error), .. }
                    if uid == "a" && error.contains(&taken.to_string()))
            })
        })
        .await;
    drop(occupier);
    world.operator.hears_listening("a", 1).await;
}

#[tokio::test]
async fn a_target_that_wants_to_know_learns_its_client_first() {
    const HEADER: usize = 28;
    let (told, mut hears) = tokio::sync::mpsc::unbounded_channel();
    let target = backend(move |mut stream| {
        let told = told.clone();
        async move {
            let mut header = [0; HEADER];
            stream.read_exact(&mut header).await.unwrap();
            told.send(header).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            drop(stream.read(&mut [0; 64]).await);
        }
    })
    .await;
    let port = free_port();
    let mut intercepted = state("a", 1, port, &[target]);
    intercepted.ports[0].proxy_protocol = true;
    let world = World::new(vec![intercepted]).await;
    world.operator.hears_listening("a", 1).await;
    for request in ["\x16\x03\x01", "GET / HTTP/1.1\r\nhost: a\r\n\r\n"] {
        let mut client = dial(port).await;
        client.write_all(request.as_bytes()).await.unwrap();
        let header = soon(hears.recv()).await.unwrap();
        assert_eq!(header[..12], *b"\r\n\r\n\0\r\nQUIT\n");
        // The client, and the Service that it has dialled.
        assert_eq!(header[16..24], [127, 0, 0, 1, 10, 96, 0, 1]);
        assert_eq!(header[24..26], client.local_addr().unwrap().port().to_be_bytes());
        assert_eq!(header[26..28], 80_u16.to_be_bytes());
        drop(soon(client.read(&mut [0; 64])).await);
    }
}

#[tokio::test]
async fn no_more_connections_than_the_limit_are_open_to_a_backend() {
    let hold = HoldPolicy { concurrency: Some(1), ..HoldPolicy::default() };
    let (world, port, [mut first, mut second]) = at_zero(hold).await;
    world.operator.hears_held("a", 2).await;
    world.operator.set(&ServiceState { hold, ..state("a", 1, port, &[echo().await]) });
    world.operator.hears_held("a", 1).await;
    first.write_all(b"1").await.unwrap();
    second.write_all(b"2").await.unwrap();
    tokio::select! {
        _ = first.readable() => drop(std::mem::replace(&mut first, second)),
        _ = second.readable() => drop(second),
    }
    soon(first.read_exact(&mut [0])).await.unwrap();
    world.operator.hears_held("a", 0).await;
}

#[tokio::test]
async fn a_held_client_that_sends_too_much_has_to_wait_and_loses_nothing() {
    const BOUND: u32 = 8192;
    let hold = HoldPolicy { max_buffered_bytes: Some(BOUND), ..HoldPolicy::default() };
    let (world, port, [client]) = at_zero(hold).await;
    world.operator.hears_held("a", 1).await;
    // Far more than the own sending side may buffer too.
    socket2::SockRef::from(&client).set_send_buffer_size(8192).unwrap();
    let all: Vec<u8> = (0..1 << 20).map(|at: u32| u8::try_from(at % 251).unwrap()).collect();
    let mut sent = 0;
    while let Ok(Ok(more)) = tokio::time::timeout(Duration::from_millis(200), async {
        client.writable().await.unwrap();
        client.try_write(&all[sent..])
    })
    .await
    {
        sent += more;
    }
    assert!(sent < 300_000, "{sent} bytes were taken of a client that is held");
    let (mut from, mut to) = client.into_split();
    let rest = all[sent..].to_vec();
    let sending = tokio::spawn(async move { to.write_all(&rest).await.map(|()| to) });
    world.operator.set(&ServiceState { hold, ..state("a", 1, port, &[echo().await]) });
    let mut back = vec![0; all.len()];
    soon(from.read_exact(&mut back)).await.unwrap();
    assert!(back == all);
    soon(sending).await.unwrap().unwrap();
}

#[tokio::test]
async fn while_the_target_is_about_to_sleep_connections_are_held_and_counted_before_it_is_acknowledged() {
    let port = free_port();
    let awake = state("a", 1, port, &[echo().await]);
    let world = World::new(vec![awake.clone()]).await;
    world.operator.hears_listening("a", 1).await;
    let mut before = dial(port).await;
    ping(&mut before, b"before").await;
    world.operator.set(&ServiceState { holding: true, ..awake.clone() });
    world
        .operator
        .hears("what came before, and then the acknowledgement", |all| {
            let traffic = all.iter().position(|message| {
                matches!(message, ResolverMessage::Traffic { forwarding: 1, accepted: 1, held: 0, .. })
            });
            let holding = all.iter().position(|message| matches!(message, ResolverMessage::Ack { holding: true, .. }));
            traffic.zip(holding).is_some_and(|(traffic, holding)| traffic < holding)
        })
        .await;
    ping(&mut before, b"still forwarded").await;
    let mut after = dial(port).await;
    after.write_all(b"held").await.unwrap();
    world.operator.hears_held("a", 1).await;
    world.operator.set(&awake);
    let mut answer = [0; 4];
    soon(after.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"held");
}
