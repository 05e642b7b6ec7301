//! Resolvers that are none: each keeps a stream to the operator as a real one does and acknowledges whatever it is told at once.
//!
//! They share this machine with the operator that is measured, so they do little: a state is not read but searched for the
//! fields that an acknowledgement needs, and remembered by its fingerprint.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes, BytesMut};
use elasti_api::message::{HEARTBEAT_INTERVAL, OperatorMessage, ResolverMessage, decode, encode};
use elasti_api::names;
use elasti_api::summary::{PARTS, Summary, fingerprint, part};
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
            let mut known = Known::default();
            loop {
                // It ends with the operator; who has none tries again.
                let _ended = stream(&identity, &tls, &seen, &of_stream, &mut heard, &mut known).await;
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

/// What a simulated resolver knows, from stream to stream.
#[derive(Debug, Default)]
struct Known {
    /// Of the lines by which states came, by the fingerprint of the UID.
    states: HashMap<u64, u64>,
    summary: Summary,
}

impl Known {
    /// A state has come, or none holds any more.
    fn note(&mut self, uid: &str, state: Option<u64>) {
        let key = fingerprint(uid.as_bytes());
        let before = match state {
            Some(state) => self.states.insert(key, state),
            None => self.states.remove(&key),
        };
        if let Some(before) = before {
            self.summary.remove(part(uid), before);
        }
        if let Some(state) = state {
            self.summary.add(part(uid), state);
        }
    }

    /// That all of these parts is in effect as it asks.
    fn in_effect(&self, parts: impl Iterator<Item = u16>) -> Result<Vec<u8>> {
        let parts = parts.map(|part| (part, self.summary.of(part))).collect();
        Ok(encode(&ResolverMessage::InEffect { parts })?)
    }
}

async fn stream(
    identity: &Identity,
    tls: &TlsConnector,
    seen: &Seen,
    synced: &AtomicUsize,
    says: &mut mpsc::Receiver<ResolverMessage>,
    known: &mut Known,
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
        known: Some(known.summary.parts().to_vec()),
    };
    outgoing.send_data(encode(&hello)?.into()).await?;
    exchange(response.into_body(), outgoing, seen, synced, says, known).await
}

async fn exchange(
    mut incoming: Incoming,
    mut outgoing: Sender<Bytes>,
    seen: &Seen,
    synced: &AtomicUsize,
    says: &mut mpsc::Receiver<ResolverMessage>,
    known: &mut Known,
) -> Result<()> {
    let heartbeat = Bytes::from(encode(&ResolverMessage::Heartbeat)?);
    let mut tick = tokio::time::interval(HEARTBEAT_INTERVAL);
    let (mut buffer, mut complete) = (BytesMut::new(), false);
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
                        known.note(uid(line)?, Some(fingerprint(line.as_bytes())));
                        // Of a snapshot all is said together.
                        if complete {
                            answers.extend_from_slice(&acknowledgement(line)?);
                        }
                    } else if line.contains(r#""type":"snapshotEnd""#) {
                        complete = true;
                        synced.store(known.states.len(), Ordering::Relaxed);
                        answers.extend_from_slice(&known.in_effect((0..).take(PARTS))?);
                    } else if line.contains(r#""type":"unclear""#) {
                        if let OperatorMessage::Unclear { parts } = decode(line.as_bytes())? {
                            answers.extend_from_slice(&known.in_effect(parts.into_iter())?);
                        }
                    } else if line.contains(r#""type":"remove""#) {
                        known.note(uid(line)?, None);
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
    let uid = uid(line)?;
    let revision = after(line, r#""revision":"#).and_then(|rest| rest.split([',', '}']).next());
    let is = |field: &str| line.contains(&format!(r#""{field}":true"#));
    Ok(encode(&ResolverMessage::Ack {
        uid: uid.to_owned(),
        revision: revision.context("a state has a revision")?.parse()?,
        listening: true,
        redirecting: is("redirect"),
        holding: is("holding"),
        error: None,
    })?)
}

fn uid(line: &str) -> Result<&str> {
    after(line, r#""uid":""#).and_then(|rest| rest.split('"').next()).context("a state has a UID")
}

fn after<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.split_once(start).map(|(_, rest)| rest)
}

#[cfg(test)]
mod tests {
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
    fn what_is_known_is_what_has_come_last() {
        let mut known = Known::default();
        for (uid, state) in [("a", Some(1)), ("b", Some(2)), ("a", Some(3)), ("b", None)] {
            known.note(uid, state);
        }
        let mut summary = Summary::default();
        summary.add(part("a"), 3);
        assert_eq!((known.states.len(), known.summary), (1, summary));
    }
}
