//! How many requests a target gets at once, and who has its place.

use super::*;

#[tokio::test]
async fn no_more_requests_than_the_limit_are_open_to_a_backend() {
    let zero = Zero::new(HoldPolicy { concurrency: Some(2), ..HoldPolicy::default() }).await;
    let (open, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let dialled = Arc::new(AtomicU32::new(0));
    let counts = (Arc::clone(&open), Arc::clone(&most), Arc::clone(&dialled));
    let counting = backend(move |mut stream| {
        let (open, most) = (Arc::clone(&counts.0), Arc::clone(&counts.1));
        counts.2.fetch_add(1, Ordering::SeqCst);
        async move {
            while head(&mut stream).await.is_some() {
                most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // Long enough for any other to be seen with it.
                tokio::time::sleep(Duration::from_millis(20)).await;
                open.fetch_sub(1, Ordering::SeqCst);
                stream.write_all(OK).await.unwrap();
            }
        }
    })
    .await;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = dial(zero.port).await;
        client.write_all(GET.as_bytes()).await.unwrap();
        clients.push(client);
    }
    zero.world.operator.hears_held("a", 10).await;
    zero.set(&[counting]);
    for client in &mut clients {
        assert_eq!(response(client).await.1, "ok");
    }
    assert_eq!(most.load(Ordering::SeqCst), 2);
    assert_eq!(dialled.load(Ordering::SeqCst), 10, "each client's connection was of use to it");
}

#[tokio::test]
async fn a_client_that_is_slow_to_ask_keeps_no_place() {
    let zero = Zero::new(HoldPolicy { concurrency: Some(1), ..HoldPolicy::default() }).await;
    let (address, _asked) = target(OK).await;
    let (mut slow, mut quick) = (dial(zero.port).await, dial(zero.port).await);
    slow.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    zero.world.operator.hears_held("a", 2).await;
    zero.set(&[address]);
    assert_eq!(ask(&mut quick, GET).await.1, "ok");
    slow.write_all(b"host: a\r\n\r\n").await.unwrap();
    assert_eq!(response(&mut slow).await.1, "ok");
}

#[tokio::test]
async fn a_client_whose_request_had_to_wait_for_a_place_keeps_its_connection() {
    // A connection that was idle for a second is not used again, wherever its request had to wait.
    for _ in 0..20 {
        let (dialled, took) = two_clients_for_one_place().await;
        if took < Duration::from_secs(1) {
            assert_eq!(dialled, 2);
            return;
        }
    }
    panic!("this machine never does this within a second");
}

/// Both ask, and ask again while the other's request is being answered. Returns how many connections the target saw, and how long it
/// took.
async fn two_clients_for_one_place() -> (u32, Duration) {
    let zero = Zero::new(HoldPolicy { concurrency: Some(1), ..HoldPolicy::default() }).await;
    let (dialled, answer) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
    let (asked, mut questions) = mpsc::unbounded_channel();
    let shared = (Arc::clone(&dialled), Arc::clone(&answer));
    let slow = backend(move |mut stream| {
        let (answer, asked) = (Arc::clone(&shared.1), asked.clone());
        shared.0.fetch_add(1, Ordering::SeqCst);
        async move {
            while head(&mut stream).await.is_some() {
                asked.send(()).unwrap();
                answer.acquire().await.unwrap().forget();
                stream.write_all(OK).await.unwrap();
            }
        }
    })
    .await;
    zero.set(&[slow]);
    let begun = Instant::now();
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = dial(zero.port).await;
        answer.add_permits(1);
        assert_eq!(ask(&mut client, GET).await.1, "ok");
        soon(questions.recv()).await.unwrap();
        clients.push(client);
    }
    let [first, second] = &mut clients[..] else { unreachable!("two clients") };
    first.write_all(GET.as_bytes()).await.unwrap();
    soon(questions.recv()).await.unwrap();
    second.write_all(GET.as_bytes()).await.unwrap();
    zero.world.metric_is("elasti_resolver_requests_total", "", 4.0).await;
    answer.add_permits(2);
    for client in [first, second] {
        assert_eq!(response(client).await.1, "ok");
    }
    (dialled.load(Ordering::SeqCst), begun.elapsed())
}
