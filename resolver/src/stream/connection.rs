//! One stream to one operator replica: TLS, one HTTP/2 POST, lines both ways, heartbeats.
//!
//! Files are read anew at each connection, for the CA and the token are rotated. Lines that this build does not
//! understand are skipped and cost nothing else.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use elasti_api::message::{
    DecodeError, HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT, MAX_LINE, OperatorMessage, ResolverMessage, decode, encode,
};
use elasti_api::names;
use elasti_api::summary::fingerprint;
use http::{Request, StatusCode, header};
use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prometheus::IntGauge;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use tokio_util::codec::{AnyDelimiterCodec, AnyDelimiterCodecError, Decoder};
use tokio_util::task::AbortOnDropHandle;

use crate::directory::Speaker;
use crate::forward::Dialer;
use crate::metrics::Metrics;
use crate::report::{Board, Sent};
use crate::supervisor::{Heard, Said};

/// For TLS, the handshake of HTTP/2 and the answer's header together. The operator may ask the API server about the
/// token first.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Messages on their way into the connection; a peer that reads slower than this is taken for gone.
const SEND_BUFFER: usize = 16;

/// Lines are sent together until they are this long, in bytes.
const FRAME: usize = 16 << 10;

/// An error's text that is worth a log line.
const ERROR_TEXT: usize = 1024;

/// Who this resolver is, and where the operators are.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Host name or address of the operators; also what their certificate must name.
    pub host: String,
    /// Their port.
    pub port: u16,
    /// PEM bundle of CAs that may sign the certificate.
    pub ca: PathBuf,
    /// The ServiceAccount token.
    pub token: PathBuf,
    /// Name of this pod.
    pub pod: String,
    /// Name of its node.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Why connections are not redirected on the node, if they are not.
    pub redirect_disabled: Option<String>,
}

/// Opens streams.
#[derive(Clone, Debug)]
pub struct Connector {
    identity: Arc<Identity>,
    dialer: Dialer,
    board: Board,
    heard: Heard,
    metrics: Metrics,
    said: mpsc::Sender<Said>,
    newer_told: Arc<AtomicBool>,
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The CA bundle or the token could not be read.
    #[error("cannot read {}: {source}; is the volume mounted?", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The CA bundle is no PEM, or empty.
    #[error("{} holds no usable certificate: {cause}", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// TCP or TLS failed.
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    /// The TLS set-up is impossible.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The host is neither a name nor an address, or the token is no header value.
    #[error("cannot form the request: {0}")]
    Request(String),
    /// HTTP/2 failed.
    #[error("the connection broke: {0}")]
    Http(#[from] hyper::Error),
    /// The operator said no.
    #[error("the operator answered {status}: {text}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// What it said.
        text: String,
    },
    /// A line is too long.
    #[error("a message is longer than {MAX_LINE} bytes: {0}")]
    Line(#[from] AnyDelimiterCodecError),
    /// The operator closed the stream.
    #[error("the operator closed the stream")]
    Closed,
    /// Nothing came in time.
    #[error("the operator is silent")]
    Silent,
}

impl Connector {
    /// What is heard goes to `said`, what is on `board` to the operators.
    pub fn new(
        identity: Identity,
        dialer: Dialer,
        board: Board,
        heard: Heard,
        metrics: Metrics,
        said: mpsc::Sender<Said>,
    ) -> Self {
        Self { identity: Arc::new(identity), dialer, board, heard, metrics, said, newer_told: Arc::default() }
    }

    /// Host name or address of the operators.
    pub fn host(&self) -> &str {
        &self.identity.host
    }

    /// Port of the operators.
    pub fn port(&self) -> u16 {
        self.identity.port
    }

    /// Keeps a stream as long as it lasts. Returns why it ended, and whether a snapshot had come.
    pub async fn connect(&self, address: SocketAddr) -> (bool, StreamError) {
        let opened = timeout(CONNECT_TIMEOUT, Box::pin(self.open(address))).await;
        let (incoming, outgoing, _connection) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return (false, error),
            Err(_) => return (false, StreamError::Silent),
        };
        tracing::info!(%address, "stream to an operator replica is up");
        let _up = Up::new(self.metrics.streams.clone());
        let mut exchange =
            Exchange { connector: self, outgoing, sent: Sent::opening(), speaker: Speaker::default(), synced: false };
        let Err(error) = exchange.run(incoming).await;
        (exchange.synced, error)
    }

    async fn open(&self, address: SocketAddr) -> Result<(Incoming, Sender<Bytes>, AbortOnDropHandle<()>), StreamError> {
        let token = read(&self.identity.token).await?;
        let token = String::from_utf8_lossy(&token);
        let tls = TlsConnector::from(Arc::new(self.tls().await?));
        let name = ServerName::try_from(self.identity.host.clone())
            .map_err(|error| StreamError::Request(format!("'{}' is no host: {error}", self.identity.host)))?;
        let stream = self.dialer.connect(address, &[], CONNECT_TIMEOUT).await?;
        let stream = tls.connect(name, stream).await?;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            // The body tells of the same error.
            drop(connection.await);
        }));
        let (outgoing, body) = Channel::<Bytes>::new(SEND_BUFFER);
        let uri = format!("https://{}:{}{}", self.identity.host, self.identity.port, names::STREAM_PATH);
        let request = Request::post(uri)
            .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
            .body(body)
            .map_err(|error| StreamError::Request(error.to_string()))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let text = Limited::new(response.into_body(), ERROR_TEXT).collect().await;
            let text = text.map(|text| String::from_utf8_lossy(&text.to_bytes()).trim().to_owned()).unwrap_or_default();
            return Err(StreamError::Refused { status, text });
        }
        Ok((response.into_body(), outgoing, connection))
    }

    async fn tls(&self) -> Result<ClientConfig, StreamError> {
        let path = &self.identity.ca;
        let unusable = |cause: String| StreamError::Ca { path: path.clone(), cause };
        let pem = read(path).await?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(unusable("it is empty".to_owned()));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

async fn read(path: &PathBuf) -> Result<Vec<u8>, StreamError> {
    tokio::fs::read(path).await.map_err(|source| StreamError::File { path: path.clone(), source })
}

/// Counts a stream as up until it goes.
struct Up(IntGauge);

impl Up {
    fn new(streams: IntGauge) -> Self {
        streams.inc();
        Self(streams)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// An open stream.
struct Exchange<'a> {
    connector: &'a Connector,
    outgoing: Sender<Bytes>,
    sent: Sent,
    speaker: Speaker,
    synced: bool,
}

impl Exchange<'_> {
    async fn run(&mut self, mut incoming: Incoming) -> Result<std::convert::Infallible, StreamError> {
        let Identity { pod, node, addresses, redirect_disabled, .. } = &*self.connector.identity;
        let hello = ResolverMessage::Hello {
            pod: pod.clone(),
            node: node.clone(),
            addresses: addresses.clone(),
            redirect_disabled: redirect_disabled.clone(),
            known: Some(self.connector.board.known().parts().to_vec()),
        };
        self.send(&hello).await?;
        let mut news = self.connector.board.follow();
        news.mark_changed();
        let mut tick = interval(HEARTBEAT_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lines = AnyDelimiterCodec::new_with_max_length(b"\n".to_vec(), b"\n".to_vec(), MAX_LINE);
        let mut buffer = BytesMut::new();
        let mut leaving_told = false;
        let mut deadline = Instant::now() + HEARTBEAT_TIMEOUT;
        loop {
            tokio::select! {
                _ = news.changed() => {
                    let leaving = *news.borrow_and_update();
                    if leaving && !std::mem::replace(&mut leaving_told, true) {
                        self.send(&ResolverMessage::Leaving).await?;
                    }
                    self.report(false).await?;
                }
                _ = tick.tick() => {
                    self.send(&ResolverMessage::Heartbeat).await?;
                    self.report(true).await?;
                }
                frame = incoming.frame() => {
                    let frame = frame.ok_or(StreamError::Closed)??;
                    deadline = Instant::now() + HEARTBEAT_TIMEOUT;
                    buffer.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
                    let mut asks = false;
                    while let Some(line) = lines.decode(&mut buffer)? {
                        asks |= self.take(&line).await;
                    }
                    if asks {
                        self.report(false).await?;
                    }
                }
                () = sleep_until(deadline) => return Err(StreamError::Silent),
            }
        }
    }

    /// Hands a message on. What this build does not understand is told and skipped. Returns whether it asks for a report.
    async fn take(&mut self, line: &[u8]) -> bool {
        let message = match decode::<OperatorMessage>(line) {
            Ok(message) => message,
            Err(error @ DecodeError::NewerVersion { .. }) => {
                self.connector.heard.now();
                self.connector.metrics.newer_messages.inc();
                if !self.connector.newer_told.swap(true, Ordering::Relaxed) {
                    tracing::error!(%error, "the operator is newer than this resolver; keeping the state");
                }
                return false;
            }
            Err(error) => {
                tracing::warn!(%error, "skipping a line of the operator");
                return false;
            }
        };
        self.connector.heard.now();
        let mut asks = false;
        match &message {
            OperatorMessage::Hello { leader, epoch, summaries, .. } => {
                self.speaker = Speaker { leader: *leader, epoch: *epoch };
                self.sent.greeted(*summaries);
                asks = true;
            }
            OperatorMessage::Heartbeat { leader, epoch } => self.speaker = Speaker { leader: *leader, epoch: *epoch },
            OperatorMessage::Unclear { parts } => {
                self.connector.board.unclear(&mut self.sent, parts);
                asks = true;
            }
            OperatorMessage::SnapshotEnd { .. } => self.synced = true,
            OperatorMessage::Service(_) | OperatorMessage::Remove { .. } => {}
        }
        // Fails only when the supervisor has ended, and this stream is about to.
        drop(self.connector.said.send(Said { from: self.speaker, message, fingerprint: fingerprint(line) }).await);
        asks
    }

    /// Sends what is due, as much as fits into a frame at once: a new stream tells of thousands of Services.
    async fn report(&mut self, regular: bool) -> Result<(), StreamError> {
        let due = self.connector.board.due(&mut self.sent, regular);
        let (mut frame, mut held) = (Vec::new(), Vec::new());
        for message in due {
            frame.extend(line(&message)?);
            if let ResolverMessage::Traffic { uid, held: 1.., .. } = message {
                held.push(uid);
            }
            if frame.len() >= FRAME {
                self.tell(std::mem::take(&mut frame), std::mem::take(&mut held)).await?;
            }
        }
        if frame.is_empty() { Ok(()) } else { self.tell(frame, held).await }
    }

    /// Sends lines, by which operators learn that connections of these ElastiServices are held.
    async fn tell(&mut self, lines: Vec<u8>, held: Vec<String>) -> Result<(), StreamError> {
        let sent = self.write(lines).await;
        for uid in held {
            self.connector.metrics.told(sent.is_ok());
            if sent.is_ok() {
                self.connector.board.notified(&uid);
            }
        }
        sent
    }

    async fn send(&mut self, message: &ResolverMessage) -> Result<(), StreamError> {
        self.write(line(message)?).await
    }

    async fn write(&mut self, lines: Vec<u8>) -> Result<(), StreamError> {
        match timeout(HEARTBEAT_TIMEOUT, self.outgoing.send_data(lines.into())).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(StreamError::Closed),
            Err(_) => Err(StreamError::Silent),
        }
    }
}

fn line(message: &ResolverMessage) -> Result<Vec<u8>, StreamError> {
    encode(message).map_err(|error| StreamError::Request(error.to_string()))
}
