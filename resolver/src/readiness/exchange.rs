//! One question to a container, as kubelet asks it (`pkg/probe` of Kubernetes 1.34), and whether the answer is good.
//!
//! Each question has a connection of its own. Time limits are the caller's.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use elasti_api::readiness::ProbeAction;
use http::header::{ACCEPT, CONTENT_TYPE, HOST, LOCATION, TE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::{WebPkiSupportedAlgorithms, ring};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{self, ClientConfig, DigitallySignedStruct, SignatureScheme};

use crate::forward::Dialer;

/// Programs tell kubelet's probes from other requests by the beginning of this.
const AGENT: &str = concat!("kube-probe/", env!("CARGO_PKG_VERSION"), " (elasti-resolver)");

/// What is read of an answer, in bytes, as kubelet does.
const ANSWER_MAX: usize = 10 << 10;

/// Redirects that are followed on the same host, as Go's client does.
const REDIRECTS_MAX: usize = 10;

/// Why an answer is not good.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("no answer in time")]
    Timeout,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("redirected in a circle, or to an address that cannot be read")]
    Redirect,
    #[error("not serving")]
    NotServing,
    #[error("the question is not known")]
    Unknown,
}

impl Fault {
    /// Whether nobody listens: the pod's kernel has refused the connection, and its program knows nothing of it.
    pub(super) fn is_refused(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// Asks; ends well if the answer is good. A connection must stand within `connect`.
pub(super) async fn ask(dialer: Dialer, ip: IpAddr, action: &ProbeAction, connect: Duration) -> Result<(), Fault> {
    let dial = |port| async move { dialer.connect(SocketAddr::new(ip, port), &[], connect).await };
    match action {
        ProbeAction::Tcp { port } => dial(*port).await.map(drop).map_err(Fault::from),
        ProbeAction::Grpc { port, service } => {
            let authority = SocketAddr::new(ip, *port);
            grpc(dial(*port).await?, authority, service).await
        }
        ProbeAction::Http { tls, port, path, headers } => {
            let mut at = Place { tls: *tls, port: *port, path: path.clone() };
            for _ in 0..=REDIRECTS_MAX {
                let request = at.request(ip, headers)?;
                let stream = dial(at.port).await?;
                let response = if at.tls {
                    http1(encrypt(stream, ip).await?, request).await?
                } else {
                    http1(stream, request).await?
                };
                match at.judge(ip, &response)? {
                    None => return Ok(()),
                    Some(next) => at = next,
                }
            }
            Err(Fault::Redirect)
        }
        ProbeAction::Unknown => Err(Fault::Unknown),
    }
}

/// Where a GET goes on a host.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    tls: bool,
    port: u16,
    path: String,
}

impl Place {
    fn request(&self, ip: IpAddr, wanted: &[(String, String)]) -> Result<Request<Full<Bytes>>, Fault> {
        let mut headers = HeaderMap::new();
        for (name, value) in wanted {
            let name = HeaderName::try_from(name.as_str()).map_err(http::Error::from)?;
            headers.append(name, HeaderValue::try_from(value.as_str()).map_err(http::Error::from)?);
        }
        headers.entry(USER_AGENT).or_insert(HeaderValue::from_static(AGENT));
        if headers.entry(ACCEPT).or_insert(HeaderValue::from_static("*/*")).is_empty() {
            headers.remove(ACCEPT);
        }
        if headers.get(HOST).is_none_or(HeaderValue::is_empty) {
            let host = SocketAddr::new(ip, self.port).to_string();
            headers.insert(HOST, HeaderValue::try_from(host).map_err(http::Error::from)?);
        }
        headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        let path = if self.path.starts_with('/') { self.path.clone() } else { format!("/{}", self.path) };
        let mut request = Request::get(path).body(Full::default())?;
        *request.headers_mut() = headers;
        Ok(request)
    }

    /// Nothing if the answer is good, or where to ask next. A redirect to another host is a good answer.
    fn judge(&self, ip: IpAddr, response: &Response<()>) -> Result<Option<Self>, Fault> {
        let status = response.status();
        if !(200..400).contains(&status.as_u16()) {
            return Err(Fault::Status(status));
        }
        let location =
            response.headers().get(LOCATION).filter(|_| matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308));
        let Some(location) = location else { return Ok(None) };
        let location: Uri = location.to_str().ok().and_then(|text| text.parse().ok()).ok_or(Fault::Redirect)?;
        let path = location.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let Some(host) = location.host() else { return Ok(Some(Self { path, ..*self })) };
        if host.trim_matches(['[', ']']).parse() != Ok(ip) {
            return Ok(None);
        }
        let tls = location.scheme_str().map_or(self.tls, |scheme| scheme == "https");
        let port = location.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Some(Self { tls, port, path }))
    }
}

/// Sends a request and reads its answer, of which the body does not count.
async fn http1<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<()>, Fault>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let (mut sender, connection) =
        http1::Builder::new().title_case_headers(true).handshake(TokioIo::new(stream)).await?;
    let answered = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        drop(Limited::new(body, ANSWER_MAX).collect().await);
        Ok(Response::from_parts(head, ()))
    };
    driven(connection, answered).await
}

/// Drives a connection until the answer is there.
async fn driven<T>(
    connection: impl Future<Output = hyper::Result<()>>,
    answered: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let connection = async {
        connection.await?;
        // The end of the connection may be the end of the answer.
        std::future::pending::<Result<T, Fault>>().await
    };
    tokio::select! {
        biased;
        answer = answered => answer,
        broken = connection => broken,
    }
}

async fn grpc(stream: TcpStream, authority: SocketAddr, service: &str) -> Result<(), Fault> {
    let (mut sender, connection) = http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await?;
    let request = Request::post(format!("http://{authority}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header(USER_AGENT, AGENT)
        .body(Full::new(health_request(service)))?;
    let answered = async {
        let response: Response<Incoming> = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(Fault::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(|_| Fault::NotServing)?;
        let status = body.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
        let good = status.is_some_and(|status| status == "0") && serves(body.to_bytes());
        if good { Ok(()) } else { Err(Fault::NotServing) }
    };
    driven(connection, answered).await
}

/// A `HealthCheckRequest` as a message of gRPC: not compressed, its length, and in field 1 the name of the service.
fn health_request(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(1 << 3 | 2);
        let mut length = service.len();
        while length >= 0x80 {
            message.put_u8(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
            length >>= 7;
        }
        message.put_u8(u8::try_from(length).unwrap_or_default());
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or_default());
    framed.put_slice(&message);
    framed.freeze()
}

/// Whether a `HealthCheckResponse` as a message of gRPC says `SERVING`: 1 in field 1, the only one there is.
fn serves(mut framed: Bytes) -> bool {
    if framed.len() < 5 || framed.get_u8() != 0 {
        return false;
    }
    framed.advance(4);
    framed[..] == [1 << 3, 1]
}

async fn encrypt(stream: TcpStream, ip: IpAddr) -> io::Result<TlsStream<TcpStream>> {
    static CONFIG: LazyLock<Result<Arc<ClientConfig>, rustls::Error>> = LazyLock::new(|| {
        let provider = ring::default_provider();
        let algorithms = provider.signature_verification_algorithms;
        let config = ClientConfig::builder_with_provider(Arc::new(provider)).with_safe_default_protocol_versions()?;
        let any = Arc::new(AnyCertificate(algorithms));
        Ok(Arc::new(config.dangerous().with_custom_certificate_verifier(any).with_no_client_auth()))
    });
    let config = CONFIG.as_ref().map_err(|error| io::Error::other(error.clone()))?;
    TlsConnector::from(Arc::clone(config)).connect(ServerName::from(ip), stream).await
}

/// Takes any certificate, as kubelet's probes do: what is asked is whether somebody serves, and nothing is told him.
#[derive(Debug)]
struct AnyCertificate(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
