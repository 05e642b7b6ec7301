//! The ways to the API server.
//!
//! Owns how connections to it are made; [`crate::app`] hands them out. Invariants: no way repeats a request by itself, since a
//! scale-down that comes late is wrong; a wake waits for no handshake and for no watch.

use std::time::Duration;

use anyhow::Context as _;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

/// A connection of HTTP/1.1 on which nothing is heard for this long is given up: every request has a shorter deadline but
/// lists and watches, which say something at least every 15 s.
const READ_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the API server lets one watch run before it is begun anew where it ended, in seconds: less than [`READ_TIMEOUT`], which
/// would take one in which nothing happens for dead. The watcher of kube gives one up that has been silent for 5 s longer: so a
/// connection whose other end is gone without a word blinds us for no longer.
pub const WATCH_TIMEOUT: u32 = 10;

/// How often the API server is asked for a sign of life on the connection that requests share, so that one that is dead is
/// found out before the next wake needs it. With [`PING_TIMEOUT`] it is the deadline of a wake's patch: what hangs on a dead
/// connection is repeated on a new one.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// How long that sign may take. With the interval it is half of what the Lease is certain for.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection may take: no request has longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The ways to the API server.
#[derive(Clone)]
pub struct Clients {
    /// Requests that end soon. They share one connection of HTTP/2, which the Lease's renewals keep up: a wake is one round
    /// trip, and a hundred at once are no hundred handshakes. A server that speaks HTTP/1.1 only gets that.
    pub requests: Client,
    /// Lists and watches, each on a connection of HTTP/1.1 of its own: a connection of HTTP/2 carries 100 streams at most
    /// (the API server's default), and watches never end.
    pub watches: Client,
}

/// The same for everything.
impl From<Client> for Clients {
    fn from(client: Client) -> Self {
        Self { requests: client.clone(), watches: client }
    }
}

impl Clients {
    /// For the cluster that this process runs in, or that of the kubeconfig.
    pub async fn infer() -> anyhow::Result<Self> {
        Self::new(Config::infer().await.context("neither in a cluster nor is there a kubeconfig")?)
    }

    /// For this cluster. Fails when its CA or credentials cannot be used.
    pub fn new(mut config: Config) -> anyhow::Result<Self> {
        config.default_retry = false;
        let requests = requests(&config)?;
        config.read_timeout = Some(READ_TIMEOUT);
        Ok(Self { requests, watches: Client::try_from(config)? })
    }
}

fn requests(config: &Config) -> anyhow::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    // Pings begin after the handshake, which a server that vanishes in the middle of it would leave hanging.
    connector.set_tcp_user_timeout(Some(CONNECT_TIMEOUT));
    // A request is a few small writes; none of them waits until the one before has been acknowledged.
    connector.set_nodelay(true);
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config.rustls_client_config()?)
        .https_or_http()
        .enable_all_versions()
        .wrap_connector(connector);
    let http: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .http2_keep_alive_while_idle(true)
        .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::future::join_all;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use hyper_util::server::conn::auto;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;

    use super::*;

    /// A server that speaks these protocols, answers with the version of HTTP that it was asked in, and counts connections.
    async fn server(protocols: &[&str]) -> (Clients, Arc<AtomicU32>) {
        let key = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = key.cert.der().clone();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key.signing_key.serialize_der().try_into().unwrap())
            .unwrap();
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        let (listener, tls) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), TlsAcceptor::from(Arc::new(tls)));
        let mut config = Config::new(format!("https://{}", listener.local_addr().unwrap()).parse().unwrap());
        config.root_cert = Some(vec![certificate.to_vec()]);
        let connections = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let stream = TokioIo::new(tls.accept(stream).await.unwrap());
                let answer = service_fn(|request: http::Request<_>| async move {
                    Ok::<_, Infallible>(http::Response::new(format!("{:?}", request.version())))
                });
                tokio::spawn(async move {
                    let _ended = auto::Builder::new(TokioExecutor::new()).serve_connection(stream, answer).await;
                });
            }
        });
        (Clients::new(config).unwrap(), connections)
    }

    async fn ask(client: &Client) -> String {
        client.request_text(http::Request::get("/").body(vec![]).unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn many_requests_at_once_share_one_connection_and_watches_do_not() {
        let (clients, connections) = server(&["h2", "http/1.1"]).await;
        assert_eq!(ask(&clients.requests).await, "HTTP/2.0");
        let answers = join_all((0..100).map(|_| ask(&clients.requests))).await;
        assert!(answers.iter().all(|answer| answer == "HTTP/2.0"));
        assert_eq!(connections.load(Ordering::SeqCst), 1);
        assert_eq!(ask(&clients.watches).await, "HTTP/1.1");
        assert_eq!(connections.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_server_that_knows_no_http_2_is_asked_in_http_1() {
        let (clients, _) = server(&["http/1.1"]).await;
        assert_eq!(ask(&clients.requests).await, "HTTP/1.1");
    }
}
