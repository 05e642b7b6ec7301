use elasti_api::message::{
    HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT, HoldPolicy, MAX_LINE, Mode, OperatorMessage, PortState, Protocol,
    ResolverMessage, ServiceState, Wakes, decode, encode,
};
use elasti_api::summary;
use http_body_util::BodyExt;
use http_body_util::channel::Sender;
use hyper::client::conn::http2::SendRequest;
use prometheus::Registry;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::certificates::Certificate;
use crate::certificates::authority::Authority;
use crate::elastiserver::auth::tests::{FakeReviewer, authenticator};
use crate::resolvers::{Ack, Change, ResolverObserved, Traffic};

const HOST: &str = "operators";

/// Longer than anything here takes, for tests must fail rather than hang.
const PATIENCE: Duration = Duration::from_secs(20);

struct World {
    streams: Streams,
    reviewer: Arc<FakeReviewer>,
    authority: Authority,
    address: SocketAddr,
}

impl Drop for World {
    fn drop(&mut self) {
        self.streams.shutdown.cancel();
    }
}

async fn world() -> World {
    let publication = Publication::new("replica".into());
    publication.set_synced();
    world_of(publication).await
}

async fn world_of(publication: Publication) -> World {
    let now = jiff::Timestamp::now();
    let authority = Authority::new(now).unwrap();
    let certificate = Certificate::default();
    certificate.renew(authority.sign(&[HOST.to_owned()], now).unwrap());
    let server = StreamServer::bind(0, Arc::new(certificate)).await.unwrap();
    let reviewer = Arc::<FakeReviewer>::default();
    let streams = Streams {
        authenticator: authenticator(&reviewer),
        resolvers: Resolvers::new(),
        publication: Arc::new(publication),
        metrics: Metrics::new(&Registry::new()).unwrap(),
        tasks: TaskTracker::new(),
        shutdown: CancellationToken::new(),
    };
    let address = (Ipv4Addr::LOCALHOST, server.address().port()).into();
    tokio::spawn(server.serve(streams.clone()));
    World { streams, reviewer, authority, address }
}

/// A hand-made resolver.
struct Resolver {
    outgoing: Arc<Mutex<Sender<Bytes>>>,
    incoming: Incoming,
    buffer: Vec<u8>,
    _connection: SendRequest<Channel<Bytes>>,
    beat_task: Option<AbortOnDropHandle<()>>,
}

impl World {
    async fn request(&self, request: http::request::Builder) -> (StatusCode, Resolver) {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.certificate.as_bytes()).unwrap()).unwrap();
        let mut tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let socket = TcpStream::connect(self.address).await.unwrap();
        let socket =
            TlsConnector::from(Arc::new(tls)).connect(ServerName::try_from(HOST).unwrap(), socket).await.unwrap();
        let mut http = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        http.initial_stream_window_size(WINDOW);
        let (mut sender, connection) = http.handshake(TokioIo::new(socket)).await.unwrap();
        tokio::spawn(connection);
        let (outgoing, body) = Channel::new(1);
        let response = sender.send_request(request.body(body).unwrap()).await.unwrap();
        let status = response.status();
        let (outgoing, incoming) = (Arc::new(Mutex::new(outgoing)), response.into_body());
        let resolver = Resolver { outgoing, incoming, buffer: vec![], _connection: sender, beat_task: None };
        (status, resolver)
    }

    async fn open(&self, token: &str) -> (StatusCode, Resolver) {
        let uri = format!("https://{HOST}{STREAM_PATH}");
        self.request(Request::post(uri).header("authorization", format!("Bearer {token}"))).await
    }

    /// A resolver that has said Hello, has been taken in, and sends heartbeats.
    async fn resolver(&self, pod: &str, node: &str) -> Resolver {
        let mut resolver = self.silent_resolver(pod, node).await;
        let outgoing = resolver.outgoing.clone();
        resolver.beat_task = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let beat = encode(&ResolverMessage::Heartbeat).unwrap();
            while outgoing.lock().await.send_data(beat.clone().into()).await.is_ok() {
                tokio::time::sleep(HEARTBEAT_INTERVAL).await;
            }
        })));
        resolver
    }

    async fn silent_resolver(&self, pod: &str, node: &str) -> Resolver {
        let (status, mut resolver) = self.open(&format!("good:elasti:resolver:{pod}")).await;
        assert_eq!(status, StatusCode::OK);
        resolver.say(&hello(pod, node)).await;
        self.until(|observed| observed.iter().any(|one| one.identity.pod == pod && one.identity.node == node)).await;
        resolver
    }

    /// Waits until what is observed of the ElastiService `u` is so.
    async fn until(&self, so: impl Fn(&[ResolverObserved]) -> bool) {
        let mut changes = self.streams.resolvers.changes();
        let wait = async {
            while !so(&self.streams.resolvers.observed("u")) {
                changes.next().await;
            }
        };
        let waited = timeout(PATIENCE, wait).await;
        assert!(waited.is_ok(), "still {:?}", self.streams.resolvers.observed("u"));
    }
}

impl Resolver {
    async fn say(&mut self, message: &ResolverMessage) {
        self.send(encode(message).unwrap()).await.unwrap();
    }

    async fn send(&mut self, line: impl Into<Bytes>) -> Result<(), ()> {
        self.outgoing.lock().await.send_data(line.into()).await.map_err(|_| ())
    }

    /// The next message that is no heartbeat; `None` when the stream has ended.
    async fn hear(&mut self) -> Option<OperatorMessage> {
        timeout(PATIENCE, async {
            loop {
                if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = self.buffer.drain(..=end).collect();
                    match decode(&line).unwrap() {
                        OperatorMessage::Heartbeat { .. } => {}
                        message => return Some(message),
                    }
                } else {
                    let frame = self.incoming.frame().await?.ok()?;
                    self.buffer.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
                }
            }
        })
        .await
        .unwrap()
    }

    async fn hear_snapshot(&mut self) {
        while !matches!(self.hear().await.unwrap(), OperatorMessage::SnapshotEnd { .. }) {}
    }

    async fn is_ended(&mut self) {
        while self.hear().await.is_some() {}
    }
}

fn hello(pod: &str, node: &str) -> ResolverMessage {
    let addresses = vec!["10.244.0.3".parse().unwrap()];
    ResolverMessage::Hello { pod: pod.into(), node: node.into(), addresses, redirect_disabled: None, known: None }
}

fn ack(revision: u64) -> ResolverMessage {
    ResolverMessage::Ack { uid: "u".into(), revision, listening: true, redirecting: true, holding: false, error: None }
}

fn state(revision: u64, backends: usize) -> ServiceState {
    let backends = vec!["10.244.0.9:8080".parse().unwrap(); backends];
    ServiceState {
        uid: "u".into(),
        namespace: "n".into(),
        name: "e".into(),
        service: "s".into(),
        revision,
        mode: Mode::Proxy,
        redirect: false,
        holding: false,
        cluster_ips: vec![],
        fallback: vec![],
        ports: vec![PortState {
            port: 80,
            interception_port: 20_000,
            backends,
            draining: vec![],
            protocol: Protocol::Auto,
            proxy_protocol: false,
            wakes: Wakes::default(),
        }],
        draining_pods: vec![],
        starting: vec![],
        asking: 0,
        hold: HoldPolicy::default(),
        probes: vec![],
        tracking: None,
    }
}

#[tokio::test]
async fn a_resolver_gets_a_snapshot_then_changes_and_what_it_says_is_observed() {
    let world = world().await;
    world.streams.publication.publish(state(1, 1));
    let mut resolver = world.resolver("r-1", "node").await;
    assert!(matches!(resolver.hear().await, Some(OperatorMessage::Hello { replica, .. }) if replica == "replica"));
    assert_eq!(resolver.hear().await, Some(OperatorMessage::Service(Box::new(state(1, 1)))));
    assert_eq!(resolver.hear().await, Some(OperatorMessage::SnapshotEnd { uids: vec!["u".into()], unchanged: vec![] }));
    world.streams.publication.publish(state(2, 1));
    assert_eq!(resolver.hear().await, Some(OperatorMessage::Service(Box::new(state(2, 1)))));
    world.streams.publication.remove("u");
    assert_eq!(resolver.hear().await, Some(OperatorMessage::Remove { uid: "u".into() }));

    resolver.say(&ack(2)).await;
    resolver.say(&ResolverMessage::Traffic { uid: "u".into(), held: 3, forwarding: 1, accepted: 9 }).await;
    resolver.say(&ResolverMessage::Leaving).await;
    world.until(|observed| observed[0].leaving).await;
    let observed = &world.streams.resolvers.observed("u")[0];
    assert_eq!(
        observed.ack,
        Some(Ack { revision: 2, listening: true, redirecting: true, holding: false, error: None })
    );
    assert_eq!(observed.traffic, Traffic { held: 3, forwarding: 1, accepted: 9 });
    assert_eq!(world.streams.metrics.streams.get(), 1);

    drop(resolver);
    world.until(<[_]>::is_empty).await;
}

#[tokio::test]
async fn a_slow_reader_is_sent_the_latest_state_and_few_outdated_ones() {
    const STATES: u64 = 500;
    let world = world().await;
    let mut resolver = world.resolver("r-1", "node").await;
    for revision in 1..=STATES {
        world.streams.publication.publish(state(revision, 1000));
        tokio::task::yield_now().await;
    }
    let (mut received, mut last) = (0, 0);
    while last < STATES {
        if let OperatorMessage::Service(state) = resolver.hear().await.unwrap() {
            assert!(state.revision > last);
            (received, last) = (received + 1, state.revision);
        }
    }
    assert!(received < 25, "{received} states were queued");
}

#[tokio::test]
async fn a_silent_resolver_is_gone_and_one_that_beats_stays() {
    let world = world().await;
    let _beating = world.resolver("r-1", "node").await;
    let mut silent = world.silent_resolver("r-2", "node").await;
    let started = Instant::now();
    world.until(|observed| observed.len() == 1).await;
    assert_eq!(world.streams.resolvers.observed("u")[0].identity.pod, "r-1");
    assert!(started.elapsed() + HEARTBEAT_TIMEOUT / 4 >= HEARTBEAT_TIMEOUT);
    silent.is_ended().await;
}

#[tokio::test]
async fn of_a_flood_of_heartbeats_few_are_answered() {
    let world = world().await;
    let mut resolver = world.silent_resolver("r-1", "node").await;
    resolver.hear_snapshot().await;
    let started = Instant::now();
    for _ in 0..100 {
        resolver.say(&ResolverMessage::Heartbeat).await;
    }
    world.streams.publication.publish(state(1, 1));
    while !resolver.buffer.windows(9).any(|text| text == br#""service""#) {
        let frame = resolver.incoming.frame().await.unwrap().unwrap();
        resolver.buffer.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
    }
    let beats = resolver.buffer.windows(11).filter(|text| text == br#""heartbeat""#).count();
    let most = started.elapsed().as_millis() / (HEARTBEAT_INTERVAL / 2).as_millis() + 1;
    assert!(beats as u128 <= most, "{beats}");
}

/// A regression: an operator that was busy for seconds, as with a thousand resolvers at once, ended the streams of all that it had not
/// listened to meanwhile, and was the busier for it.
#[tokio::test]
async fn who_was_not_listened_to_is_not_silent() {
    let world = world().await;
    let mut resolver = world.resolver("r-1", "node").await;
    // This runtime has one thread: nobody is listened to, and nobody speaks.
    std::thread::sleep(HEARTBEAT_TIMEOUT + HEARTBEAT_INTERVAL);
    resolver.say(&ack(1)).await;
    world.until(|observed| observed.iter().any(|one| one.ack.is_some())).await;
}

#[tokio::test]
async fn a_resolver_that_reconnects_is_known_by_its_new_stream() {
    let world = world().await;
    let old = world.resolver("r-1", "old").await;
    let mut new = world.resolver("r-1", "new").await;
    new.say(&ack(1)).await;
    world.until(|observed| observed.iter().any(|one| one.ack.is_some())).await;
    let mut changes = world.streams.resolvers.changes();
    drop(old);
    // The old stream's task has ended once only one is counted.
    while world.streams.metrics.streams.get() > 1 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let observed = world.streams.resolvers.observed("u");
    assert_eq!((observed.len(), observed[0].identity.node.as_str(), observed[0].ack.is_some()), (1, "new", true));
    new.say(&ResolverMessage::Leaving).await;
    assert_eq!(changes.next().await, Change::Members, "told of the first time for Leaving");
    assert!(world.streams.resolvers.observed("u")[0].leaving);
}

/// Keeps out B36: namesakes of the resolver's Service are taken for resolvers.
#[tokio::test]
async fn nobody_speaks_for_another_pod() {
    let world = world().await;
    let (status, mut impostor) = world.open("good:elasti:resolver:r-1").await;
    assert_eq!(status, StatusCode::OK);
    impostor.say(&hello("r-2", "node")).await;
    impostor.is_ended().await;
    assert!(world.streams.resolvers.is_empty());

    let (_, mut mute) = world.open("good:elasti:resolver:r-1").await;
    mute.say(&ack(1)).await;
    mute.is_ended().await;
    assert!(world.streams.resolvers.is_empty(), "Hello comes first");
}

#[tokio::test]
async fn who_may_not_open_a_stream_is_told_why() {
    let world = world().await;
    assert_eq!(world.open("forged").await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(world.open("good:default:resolver:r-1").await.0, StatusCode::FORBIDDEN);
    world.reviewer.down.store(true, Ordering::SeqCst);
    assert_eq!(world.open("good:elasti:resolver:r-1").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let stream = format!("https://{HOST}{STREAM_PATH}");
    assert_eq!(world.request(Request::get(stream)).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(world.request(Request::post(format!("https://{HOST}/"))).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_stream_begins_once_the_caches_are_filled() {
    let world = world_of(Publication::new("replica".into())).await;
    let opening = world.open("good:elasti:resolver:r-1");
    tokio::pin!(opening);
    // Let in by the API server, and still waiting.
    while world.reviewer.asked.load(Ordering::SeqCst) == 0 {
        assert!(timeout(Duration::from_millis(10), &mut opening).await.is_err());
    }
    world.streams.publication.set_synced();
    assert_eq!(opening.await.0, StatusCode::OK);
}

#[tokio::test]
async fn what_is_newer_or_malformed_is_ignored_and_the_stream_goes_on() {
    let world = world().await;
    let mut resolver = world.resolver("r-1", "node").await;
    resolver
        .send(&b"{\"v\":2,\"type\":\"teleport\"}\nGET / HTTP/1.1\n{\"v\":1,\"type\":\"dance\"}\n"[..])
        .await
        .unwrap();
    resolver.say(&ack(1)).await;
    world.until(|observed| observed[0].ack.is_some()).await;
    resolver.hear_snapshot().await;
}

#[tokio::test]
async fn an_endless_line_ends_the_stream() {
    let world = world().await;
    // Heartbeats would end the line.
    let mut resolver = world.silent_resolver("r-1", "node").await;
    let flood = Bytes::from(vec![b'x'; 64 << 10]);
    let mut sent = 0;
    while resolver.send(flood.clone()).await.is_ok() && sent <= 2 * MAX_LINE {
        sent += flood.len();
    }
    world.until(<[_]>::is_empty).await;
    assert!(sent <= 2 * MAX_LINE, "{sent} bytes were taken");
}

#[tokio::test]
async fn shutdown_ends_streams_at_once() {
    let world = world().await;
    let mut resolver = world.resolver("r-1", "node").await;
    world.streams.shutdown.cancel();
    world.streams.tasks.close();
    timeout(PATIENCE, world.streams.tasks.wait()).await.unwrap();
    resolver.is_ended().await;
    assert!(world.streams.resolvers.is_empty());
}

#[tokio::test]
async fn a_resolver_that_has_all_in_effect_says_so_in_one_word_and_where_it_has_not_is_asked_for_each() {
    let world = world().await;
    let state = ServiceState { redirect: true, ..state(7, 1) };
    let line = encode(&OperatorMessage::Service(Box::new(state.clone()))).unwrap();
    world.streams.publication.publish(state.clone());
    let (part, summary) = (summary::part("u"), summary::fingerprint(&line));
    let (status, mut resolver) = world.open("good:elasti:resolver:r-1").await;
    assert_eq!(status, StatusCode::OK);
    let mut known = summary::Summary::default();
    known.add(part, summary);
    let mut first = hello("r-1", "node");
    if let ResolverMessage::Hello { known: told, .. } = &mut first {
        *told = Some(known.parts().to_vec());
    }
    resolver.say(&first).await;
    assert!(matches!(resolver.hear().await, Some(OperatorMessage::Hello { summaries: true, .. })));
    let Some(OperatorMessage::SnapshotEnd { uids, unchanged }) = resolver.hear().await else { panic!("no state") };
    assert_eq!((uids.len(), unchanged.len()), (0, summary::PARTS));
    resolver.say(&ResolverMessage::InEffect { parts: vec![(part, summary)] }).await;
    world.until(|observed| observed[0].ack.is_some()).await;
    let ack = Ack { revision: 7, listening: true, redirecting: true, holding: false, error: None };
    assert_eq!(world.streams.resolvers.observed("u")[0].ack, Some(ack.clone()));

    resolver.say(&ResolverMessage::InEffect { parts: vec![(part, summary.wrapping_add(1))] }).await;
    assert_eq!(resolver.hear().await, Some(OperatorMessage::Unclear { parts: vec![part] }));
    assert_eq!(world.streams.resolvers.observed("u")[0].ack, Some(ack), "what was said before holds");
}
