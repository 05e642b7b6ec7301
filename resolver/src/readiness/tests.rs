//! When a pod is asked, how often, and what comes of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use elasti_api::readiness::{ProbeAction, TargetPort};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::ports::PortView;
use crate::report::Board;
use crate::service::{Starting, View};

const DEADLINE: Duration = Duration::from_secs(20);

/// The interception port.
const PORT: u16 = 20_000;

fn asker() -> Asker {
    let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
    Asker::new(Dialer::default(), Duration::from_millis(10), metrics)
}

fn service() -> Arc<Service> {
    let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
    Arc::new(Service::new("n", "s", metrics, Board::default().news()))
}

fn probe(action: ProbeAction) -> Probe {
    Probe { action, successes: 1, period: Duration::from_millis(20), timeout: Duration::from_secs(1) }
}

fn http(port: u16) -> Probe {
    probe(ProbeAction::Http { tls: false, port, path: "/ready".into(), headers: vec![] })
}

fn pod(containers: Vec<Vec<Probe>>) -> StartingPod {
    StartingPod {
        uid: "p".into(),
        addresses: vec!["127.0.0.1".parse().unwrap()],
        ports: vec![TargetPort { port: 80, target: 8080 }],
        containers,
        confirmation: Duration::from_mins(1),
    }
}

fn view(backends: &[SocketAddr], pods: &[StartingPod]) -> View {
    let port = PortView { targets: backends.into(), ..PortView::default() };
    let starting = pods.iter().map(|pod| Starting {
        pod: Arc::new(pod.clone()),
        targets: BTreeMap::from([(PORT, vec!["127.0.0.1:8080".parse().unwrap()])]),
    });
    View { ports: [(PORT, port)].into(), starting: starting.collect(), ..View::default() }
}

/// A server that answers the first `bad` requests with 503 and the others with 200; counts them.
async fn server(bad: u32) -> (u16, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, count) = (listener.local_addr().unwrap().port(), Arc::new(AtomicU32::new(0)));
    let requests = Arc::clone(&count);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].starts_with(b"GET /ready HTTP/1.1\r\n"));
            let status = if requests.fetch_add(1, Ordering::SeqCst) < bad { "503 No" } else { "200 OK" };
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (port, count)
}

async fn reachable(service: &Service, wanted: bool) {
    let mut views = service.views();
    let reached = tokio::time::timeout(DEADLINE, views.wait_for(|view| view.reachable(PORT) == wanted)).await;
    drop(reached.expect("it did not happen in time").unwrap());
}

#[tokio::test]
async fn a_pod_is_ready_with_the_first_good_answer() {
    let (service, (port, count)) = (service(), server(3).await);
    let _held = service.hold(std::time::Instant::now(), 9);
    service.set(view(&[], &[pod(vec![vec![http(port)]])]));
    let _asking = asker().follow(&service);
    reachable(&service, true).await;
    assert_eq!(count.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn nobody_is_asked_while_nothing_is_held() {
    let (service, (port, count)) = (service(), server(0).await);
    service.set(view(&[], &[pod(vec![vec![http(port)]])]));
    let _asking = asker().follow(&service);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(count.load(Ordering::SeqCst), 0);
    let _held = service.hold(std::time::Instant::now(), 9);
    reachable(&service, true).await;
}

#[tokio::test]
async fn every_container_must_be_ready_and_startup_comes_first() {
    let (service, (first, asked_first), (second, asked_second)) = (service(), server(2).await, server(1).await);
    let _held = service.hold(std::time::Instant::now(), 9);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let open = probe(ProbeAction::Tcp { port: listener.local_addr().unwrap().port() });
    service.set(view(&[], &[pod(vec![vec![open, http(first)], vec![http(second)]])]));
    let _asking = asker().follow(&service);
    reachable(&service, true).await;
    assert_eq!((asked_first.load(Ordering::SeqCst), asked_second.load(Ordering::SeqCst)), (3, 2));
    let unknown = probe(ProbeAction::Unknown);
    service.set(view(&[], &[StartingPod { uid: "q".into(), ..pod(vec![vec![http(second)], vec![unknown]]) }]));
    reachable(&service, false).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!service.view().reachable(PORT), "what cannot be asked is never ready");
}

#[tokio::test]
async fn successes_in_a_row_are_asked_for_at_the_probes_own_pace() {
    let (service, (port, count)) = (service(), server(1).await);
    let _held = service.hold(std::time::Instant::now(), 9);
    service.set(view(&[], &[pod(vec![vec![Probe { successes: 3, ..http(port) }]])]));
    let _asking = asker().follow(&service);
    let started = Instant::now();
    reachable(&service, true).await;
    assert_eq!(count.load(Ordering::SeqCst), 4);
    assert!(started.elapsed() >= Duration::from_millis(50), "10 ms and two periods");
}

#[tokio::test]
async fn what_kubelet_does_not_confirm_counts_no_longer_and_what_it_does_stays() {
    let (service, (port, _)) = (service(), server(0).await);
    let held = service.hold(std::time::Instant::now(), 9);
    let unconfirmed = StartingPod { confirmation: Duration::from_millis(50), ..pod(vec![vec![http(port)]]) };
    service.set(view(&[], std::slice::from_ref(&unconfirmed)));
    let _asking = asker().follow(&service);
    reachable(&service, true).await;
    drop(held);
    reachable(&service, false).await;
    let _held = service.hold(std::time::Instant::now(), 9);
    reachable(&service, true).await;
    // The operators take it out of what starts and put it among the backends.
    let backend = "127.0.0.1:8080".parse().unwrap();
    service.set(view(&[backend], &[]));
    assert_eq!(service.view().ports.get(PORT).unwrap().targets[..], [backend]);
    service.set(view(&[], &[]));
    assert!(!service.view().reachable(PORT), "a pod that is named no more is forgotten");
    service.set(view(&[], &[StartingPod { containers: vec![vec![probe(ProbeAction::Unknown)]], ..unconfirmed }]));
    assert!(!service.view().reachable(PORT));
}

#[tokio::test]
async fn backends_that_the_operators_know_come_before_pods_that_start() {
    let service = service();
    let known = "10.0.0.1:8080".parse().unwrap();
    service.set(view(&[known], &[pod(vec![])]));
    assert!(service.set_ready("p", true));
    assert_eq!(service.view().ports.get(PORT).unwrap().targets[..], [known]);
    assert!(!service.set_ready("stranger", true));
}

#[test]
fn slow_starters_are_asked_less_often_and_so_are_pods_that_many_wait_for() {
    let (asker, millis) = (asker(), Duration::from_millis);
    assert_eq!(asker.pause(millis(0), 1, false), millis(10));
    assert_eq!(asker.pause(Duration::from_secs(10), 1, false), millis(10));
    assert_eq!(asker.pause(Duration::from_mins(1), 1, false), millis(60));
    assert_eq!(asker.pause(Duration::from_hours(1), 1, false), millis(250));
    assert_eq!(asker.pause(millis(0), 0, false), millis(10), "an operator that does not say how many");
    assert_eq!(asker.pause(millis(0), 4, false), millis(10));
    assert_eq!(asker.pause(millis(0), 1024, false), millis(2560), "400 questions a second in all");
}

#[test]
fn a_port_on_which_nobody_listens_is_asked_for_more_often_and_less_so_by_and_by() {
    let (asker, millis) = (asker(), Duration::from_millis);
    assert_eq!(asker.pause(millis(0), 1, true), millis(1));
    assert_eq!(asker.pause(millis(3000), 1, true), millis(3));
    assert_eq!(asker.pause(Duration::from_secs(15), 1, true), millis(15), "no faster than others then");
    assert_eq!(asker.pause(Duration::from_mins(1), 1, true), millis(60), "no slower than an answer that is no success");
    assert_eq!(asker.pause(millis(0), 1024, true), millis(256));
    let pods: Vec<_> = (0..17).map(|_| asker.pods.track_future(std::future::pending::<()>())).collect();
    assert_eq!(asker.pause(millis(0), 1, true), millis(2), "many pods share what one kernel is asked");
    drop(pods);
    assert_eq!(asker.pause(millis(0), 1, true), millis(1));
}

#[tokio::test]
async fn a_pod_that_does_not_listen_yet_is_told_from_one_that_says_no() {
    let (service, (port, _)) = (service(), server(1).await);
    let _held = service.hold(std::time::Instant::now(), 9);
    let asker = asker();
    let questions = Questions { asker: &asker, service: &service, since: Instant::now() };
    let local = std::net::IpAddr::from([127, 0, 0, 1]);
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    assert_eq!(questions.once(local, &http(closed)).await, Answer::Refused);
    assert_eq!(questions.once(local, &probe(ProbeAction::Tcp { port: closed })).await, Answer::Refused);
    assert_eq!(questions.once(local, &http(port)).await, Answer::Bad);
    assert_eq!(questions.once(local, &http(port)).await, Answer::Good);
}
