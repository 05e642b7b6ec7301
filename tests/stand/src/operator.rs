//! An operator replica that says what it is told to say and remembers what it hears.
//!
//! It speaks the resolvers' stream as a real replica does: TLS, HTTP/2, a token, a snapshot, then changes and heartbeats. It
//! decides nothing.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use elasti_api::message::{HEARTBEAT_INTERVAL, OperatorMessage, ResolverMessage, ServiceState, decode, encode};
use elasti_api::names;
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;

/// The token that it takes, and that [`Identity`] puts in its file.
pub const TOKEN: &str = "token-of-the-test";

/// Certificates and the files that a resolver reads; they are removed when it is dropped.
#[derive(Debug)]
pub struct Identity {
    directory: tempfile::TempDir,
    tls: Arc<ServerConfig>,
}

impl Default for Identity {
    fn default() -> Self {
        Self::new()
    }
}

impl Identity {
    /// A new certificate authority, and a certificate that it has signed.
    pub fn new() -> Self {
        let mut ca = CertificateParams::new(vec![]).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().unwrap();
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::new(ca, ca_key);
        let certificate =
            CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.crt"), ca_certificate.pem()).unwrap();
        std::fs::write(directory.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let mut tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from(certificate.der().to_vec())],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        Self { directory, tls: Arc::new(tls) }
    }

    /// Where a file is: `ca.crt` or `token`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

#[derive(Debug)]
struct Shared {
    services: Mutex<Vec<ServiceState>>,
    summaries: bool,
    leader: bool,
    received: watch::Sender<Vec<ResolverMessage>>,
    lines: broadcast::Sender<Bytes>,
    refused: watch::Sender<u32>,
    failed_handshakes: watch::Sender<u32>,
}

/// A running replica; it stops when dropped.
#[derive(Debug)]
pub struct Operator {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Operator {
    /// Port 0 takes any. Its snapshot names `services`.
    pub async fn start(identity: &Identity, port: u16, services: Vec<ServiceState>) -> Self {
        Self::start_with(identity, port, services, false).await
    }

    /// One that understands summaries, but leaves nothing out of its snapshot.
    pub async fn start_summing(identity: &Identity, port: u16, services: Vec<ServiceState>) -> Self {
        Self::start_with(identity, port, services, true).await
    }

    async fn start_with(identity: &Identity, port: u16, services: Vec<ServiceState>, summaries: bool) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let shared = Arc::new(Shared {
            services: Mutex::new(services),
            summaries,
            leader: true,
            received: watch::Sender::new(vec![]),
            lines: broadcast::Sender::new(1024),
            refused: watch::Sender::new(0),
            failed_handshakes: watch::Sender::new(0),
        });
        let stop = CancellationToken::new();
        let address = listener.local_addr().unwrap();
        let accept = accept(listener, TlsAcceptor::from(Arc::clone(&identity.tls)), Arc::clone(&shared), stop.clone());
        let task = Some(tokio::spawn(accept));
        Self { address, shared, stop, task }
    }

    /// As kill -9: every stream breaks, the port is free afterwards.
    pub async fn kill(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap();
    }

    /// Says something on every stream that is open.
    pub fn send(&self, message: &OperatorMessage) {
        self.send_line(encode(message).unwrap());
    }

    /// The same, whatever the line is.
    pub fn send_line(&self, line: Vec<u8>) {
        self.shared.lines.send(line.into()).expect("no stream is open");
    }

    /// A new or changed state, in snapshots too.
    pub fn set(&self, state: &ServiceState) {
        let mut services = self.shared.services.lock().unwrap();
        services.retain(|old| old.uid != state.uid);
        services.push(state.clone());
        drop(services);
        self.send(&OperatorMessage::Service(Box::new(state.clone())));
    }

    /// Waits until what was received, all together, is as `condition` says.
    pub async fn hears(&self, what: &str, mut condition: impl FnMut(&[ResolverMessage]) -> bool) {
        let mut received = self.shared.received.subscribe();
        let heard = tokio::time::timeout(crate::DEADLINE, received.wait_for(|all| condition(all))).await;
        assert!(heard.is_ok(), "the operator did not hear {what}; it heard {:#?}", self.shared.received.borrow());
    }

    /// Waits until a resolver acknowledged this revision, listening.
    pub async fn hears_listening(&self, wanted: &str, wanted_revision: u64) {
        self.hears(&format!("listening of {wanted} at {wanted_revision}"), |all| {
            all.iter().any(|message| {
                matches!(message, ResolverMessage::Ack { uid, revision, listening: true, .. }
                    if uid == wanted && *revision == wanted_revision)
            })
        })
        .await;
    }

    /// Waits until the latest word on held connections is this many.
    pub async fn hears_held(&self, wanted: &str, count: u32) {
        self.hears(&format!("{count} held of {wanted}"), |all| latest_held(all, wanted) == Some(count)).await;
    }

    /// The latest word on held connections.
    pub fn held(&self, uid: &str) -> Option<u32> {
        latest_held(&self.shared.received.borrow(), uid)
    }

    /// Waits until this many requests were refused for their token.
    pub async fn refuses(&self, count: u32) {
        reaches(&self.shared.refused, count).await;
    }

    /// Waits until this many TLS handshakes failed.
    pub async fn fails_handshakes(&self, count: u32) {
        reaches(&self.shared.failed_handshakes, count).await;
    }
}

fn latest_held(all: &[ResolverMessage], wanted: &str) -> Option<u32> {
    all.iter().rev().find_map(|message| match message {
        ResolverMessage::Traffic { uid, held, .. } if uid == wanted => Some(*held),
        _ => None,
    })
}

async fn reaches(counter: &watch::Sender<u32>, count: u32) {
    let mut counter = counter.subscribe();
    crate::soon(counter.wait_for(|reached| *reached >= count)).await.unwrap();
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = tokio::task::JoinSet::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (stream, _) = accepted.unwrap();
        let (tls, shared, stop) = (tls.clone(), Arc::clone(&shared), stop.clone());
        connections.spawn(async move {
            let Ok(stream) = tls.accept(stream).await else {
                shared.failed_handshakes.send_modify(|failed| *failed += 1);
                return;
            };
            let service = hyper::service::service_fn(move |request| {
                let answer = answer(request, &shared, &stop);
                std::future::ready(Ok::<_, std::convert::Infallible>(answer))
            });
            drop(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await,
            );
        });
    }
    connections.shutdown().await;
}

fn answer(request: Request<Incoming>, shared: &Arc<Shared>, stop: &CancellationToken) -> Response<Channel<Bytes>> {
    assert_eq!(request.uri().path(), names::STREAM_PATH);
    let (sender, body) = Channel::new(1024);
    let mut response = Response::new(body);
    if request.headers()["authorization"] != format!("Bearer {TOKEN}") {
        shared.refused.send_modify(|refused| *refused += 1);
        *response.status_mut() = StatusCode::UNAUTHORIZED;
        return response;
    }
    let (listen, speak) =
        (listen(request.into_body(), Arc::clone(shared)), speak(sender, Arc::clone(shared), shared.lines.subscribe()));
    let stop = stop.clone();
    tokio::spawn(stop.run_until_cancelled_owned(async { tokio::join!(listen, speak) }));
    response
}

async fn listen(mut body: Incoming, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        buffer.extend_from_slice(frame.data_ref().unwrap());
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let message: ResolverMessage = decode(&line).unwrap();
            shared.received.send_modify(|all| all.push(message));
        }
    }
}

async fn speak(mut to: Sender<Bytes>, shared: Arc<Shared>, mut lines: broadcast::Receiver<Bytes>) {
    let services = shared.services.lock().unwrap().clone();
    let uids = services.iter().map(|state| state.uid.clone()).collect();
    let leader = shared.leader;
    let mut first =
        vec![OperatorMessage::Hello { replica: "operator-0".into(), leader, epoch: 1, summaries: shared.summaries }];
    first.extend(services.into_iter().map(|state| OperatorMessage::Service(Box::new(state))));
    first.push(OperatorMessage::SnapshotEnd { uids, unchanged: vec![] });
    for message in first {
        if to.send_data(encode(&message).unwrap().into()).await.is_err() {
            return;
        }
    }
    let heartbeat = encode(&OperatorMessage::Heartbeat { leader, epoch: 1 }).unwrap();
    let mut tick = tokio::time::interval(HEARTBEAT_INTERVAL.min(Duration::from_millis(500)));
    loop {
        let line = tokio::select! {
            line = lines.recv() => line.unwrap(),
            _ = tick.tick() => heartbeat.clone().into(),
        };
        if to.send_data(line).await.is_err() {
            return;
        }
    }
}
