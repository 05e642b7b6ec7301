//! Resolvers that are none: each keeps a stream to the operator as a real one does and acknowledges whatever it is told at once.
//!
//! They share this machine with the operator that is measured, so they do little: a state is not read but searched for the
//! fields that an acknowledgement needs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use elasti_api::message::{HEARTBEAT_INTERVAL, ResolverMessage, encode};
use elasti_api::names;
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_util::task::AbortOnDropHandle;

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);

/// Messages on their way into a connection.
const SEND_BUFFER: usize = 16;

/// What they have seen together.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Bytes of messages that the operator has sent to all of them.
    pub(super) bytes: AtomicU64,
    /// States that it has sent to all of them.
    pub(super) states: AtomicU64,
}

/// A simulated resolver; its stream ends when it is dropped.
#[derive(Debug)]
pub(super) struct Resolver {
    /// ElastiServices in the snapshot of the stream that is up; 0 while there is none.
    synced: Arc<AtomicUsize>,
    says: mpsc::Sender<ResolverMessage>,
    _task: AbortOnDropHandle<()>,
}

/// Who a simulated resolver is, and whom it talks to.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// Name of its pod.
    pub(super) pod: String,
    /// Its ServiceAccount token, bound to that pod.
    pub(super) token: String,
    /// Which one it is: its address follows from it.
    pub(super) number: u16,
    /// The operator's port for streams.
    pub(super) operator: SocketAddr,
}

/// Trusts the operators' CA, PEM as the ConfigMap has it.
pub(super) fn tls(ca: &str) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
        roots.add(certificate?)?;
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

impl Resolver {
    /// Keeps a stream up from now on.
    pub(super) fn start(identity: Identity, tls: TlsConnector, seen: Arc<Seen>) -> Self {
        let (says, mut heard) = mpsc::channel(SEND_BUFFER);
        let synced = Arc::new(AtomicUsize::new(0));
        let of_stream = synced.clone();
        let task = async move {
            loop {
                // It ends with the operator; who has none tries again.
                let _ended = stream(&identity, &tls, &seen, &of_stream, &mut heard).await;
                of_stream.store(0, Ordering::Relaxed);
                tokio::time::sleep(PAUSE).await;
            }
        };
        Self { synced, says, _task: AbortOnDropHandle::new(tokio::spawn(task)) }
    }

    /// How many ElastiServices the operator has told it of in the snapshot of this stream.
    pub(super) fn synced(&self) -> usize {
        self.synced.load(Ordering::Relaxed)
    }

    /// Says something on its own account.
    pub(super) async fn say(&self, message: ResolverMessage) -> Result<()> {
        self.says.send(message).await.context("the simulated resolver has ended")
    }
}

async fn stream(
    identity: &Identity,
    tls: &TlsConnector,
    seen: &Seen,
    synced: &AtomicUsize,
    says: &mut mpsc::Receiver<ResolverMessage>,
) -> Result<()> {
    let host = format!("{}.{}.svc", names::OPERATOR_STREAM_SERVICE, names::NAMESPACE);
    let socket = TcpStream::connect(identity.operator).await?;
    socket.set_nodelay(true)?;
    let socket = tls.connect(ServerName::try_from(host.clone())?, socket).await?;
    let (mut requests, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let (mut outgoing, body) = Channel::<Bytes>::new(SEND_BUFFER);
    let request = Request::post(format!("https://{host}:{}{}", names::OPERATOR_STREAM_PORT, names::STREAM_PATH));
    let request = request.header("authorization", format!("Bearer {}", identity.token)).body(body)?;
    let response = requests.send_request(request).await?;
    if response.status() != StatusCode::OK {
        bail!("the operator answered {}", response.status());
    }
    let [high, low] = identity.number.to_be_bytes();
    let hello = ResolverMessage::Hello {
        pod: identity.pod.clone(),
        node: format!("node-{}", identity.number),
        addresses: vec![IpAddr::V4(Ipv4Addr::new(10, 244, high, low))],
        redirect_disabled: None,
    };
    outgoing.send_data(encode(&hello)?.into()).await?;
    exchange(response.into_body(), outgoing, seen, synced, says).await
}

async fn exchange(
    mut incoming: Incoming,
    mut outgoing: Sender<Bytes>,
    seen: &Seen,
    synced: &AtomicUsize,
    says: &mut mpsc::Receiver<ResolverMessage>,
) -> Result<()> {
    let heartbeat = Bytes::from(encode(&ResolverMessage::Heartbeat)?);
    let mut tick = tokio::time::interval(HEARTBEAT_INTERVAL);
    let mut buffer = BytesMut::new();
    loop {
        tokio::select! {
            _ = tick.tick() => outgoing.send_data(heartbeat.clone()).await?,
            Some(message) = says.recv() => outgoing.send_data(encode(&message)?.into()).await?,
            frame = incoming.frame() => {
                let frame = frame.context("the operator has closed the stream")??;
                let Some(data) = frame.data_ref() else { continue };
                seen.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                buffer.extend_from_slice(data);
                let mut answers = BytesMut::new();
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line = std::str::from_utf8(&buffer[..end])?;
                    if line.contains(r#""type":"service""#) {
                        seen.states.fetch_add(1, Ordering::Relaxed);
                        answers.extend_from_slice(&acknowledgement(line)?);
                    } else if line.contains(r#""type":"snapshotEnd""#) {
                        synced.store(uids(line), Ordering::Relaxed);
                    }
                    buffer.advance(end + 1);
                }
                if !answers.is_empty() {
                    outgoing.send_data(answers.freeze()).await?;
                }
            }
        }
    }
}

/// All that a state asks for is in effect.
fn acknowledgement(line: &str) -> Result<Vec<u8>> {
    let uid = after(line, r#""uid":""#).and_then(|rest| rest.split('"').next()).context("a state has a UID")?;
    let revision = after(line, r#""revision":"#).and_then(|rest| rest.split([',', '}']).next());
    let is = |field: &str| line.contains(&format!(r#""{field}":true"#));
    Ok(encode(&ResolverMessage::Ack {
        uid: uid.to_owned(),
        revision: revision.context("a state has a revision")?.parse()?,
        listening: line.contains(r#""mode":"proxy""#),
        redirecting: is("redirect"),
        holding: is("holding"),
        error: None,
    })?)
}

/// How many UIDs the end of a snapshot names.
fn uids(line: &str) -> usize {
    let list = after(line, r#""uids":["#).and_then(|rest| rest.split(']').next()).unwrap_or_default();
    if list.is_empty() { 0 } else { list.split(',').count() }
}

fn after<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.split_once(start).map(|(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use elasti_api::message::{OperatorMessage, decode};

    use super::*;

    #[test]
    fn a_state_is_acknowledged_as_it_says() {
        let state = elasti_stand::state("u-1", 7, 20_000, &[]);
        let line = encode(&OperatorMessage::Service(Box::new(state))).unwrap();
        let answer = acknowledgement(std::str::from_utf8(&line).unwrap()).unwrap();
        let ResolverMessage::Ack { uid, revision, listening, redirecting, holding, error } = decode(&answer).unwrap()
        else {
            panic!("no acknowledgement");
        };
        assert_eq!(
            (uid.as_str(), revision, listening, redirecting, holding, error),
            ("u-1", 7, true, true, false, None)
        );
    }

    #[test]
    fn the_end_of_a_snapshot_is_counted() {
        let counted = |uids: &[&str]| {
            let end = OperatorMessage::SnapshotEnd { uids: uids.iter().map(|uid| (*uid).to_owned()).collect() };
            super::uids(std::str::from_utf8(&encode(&end).unwrap()).unwrap())
        };
        assert_eq!((counted(&[]), counted(&["a"]), counted(&["a", "b", "c"])), (0, 1, 3));
    }
}
