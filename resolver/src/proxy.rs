//! The proxy port of KubeElasti: HTTP for whoever dials a resolver itself and names the Service in the request, as service
//! meshes and ingress controllers do.
//!
//! Only Services of ElastiServices are reached, through the same hold as any connection; every other host is refused.
//! [`crate::app`] runs it.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use elasti_api::message::Protocol;
use http::header::{CONTENT_TYPE, HOST, HeaderName};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::capacity::{Permit, Share};
use crate::connection::{self, Client, Context, LEAVE_SILENT};
use crate::forward;
use crate::http::body::Body;
use crate::http::{Requests, Session, bounds};
use crate::metrics::Metrics;
use crate::protocol::Spoken;
use crate::report::Board;
use crate::service::Service;

pub mod host;

/// How long a client may take for one head, and be silent before a request.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);

/// Pause after a failed accept: the want behind it does not go away within microseconds.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the proxy port needs.
#[derive(Debug)]
pub struct Proxy {
    /// The Services.
    pub board: Board,
    /// What all connections need.
    pub context: Arc<Context>,
    /// Its share of what the resolver can bear.
    pub share: Share,
    /// Header that names the Service; `Host` where a request does not have it or it names none.
    pub header: Option<HeaderName>,
    /// Domain of the cluster's DNS.
    pub domain: String,
    /// What is counted.
    pub metrics: Metrics,
}

impl Proxy {
    /// Accepts connections until the context's end.
    pub async fn run(self, listener: TcpListener) {
        let proxy = Arc::new(self);
        let ended = proxy.context.ended.clone();
        while let Some(accepted) = ended.run_until_cancelled(listener.accept()).await {
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the proxy port cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = proxy.share.admit() else {
                forward::reset(&stream);
                continue;
            };
            let serving = Arc::clone(&proxy);
            proxy.context.connections.spawn(async move {
                let ended = serving.context.ended.clone();
                ended.run_until_cancelled(serving.serve(stream, Arc::new(permit))).await;
            });
        }
    }

    async fn serve(self: Arc<Self>, stream: TcpStream, permit: Arc<Permit>) {
        let (Ok(address), Ok(destination)) = (stream.peer_addr(), stream.local_addr()) else { return };
        let client =
            Client { address: connection::canonical(address), destination: connection::canonical(destination) };
        let leaving = self.context.leaving.clone();
        let Some(spoken @ (Spoken::Http1 | Spoken::Http2)) = first_word(&stream, &leaving).await else {
            return forward::reset(&stream);
        };
        let visit = Arc::new(Visit { proxy: self, client, spoken, permit, requests: Mutex::default() });
        let service = service_fn(move |request| Arc::clone(&visit).answer(request));
        let io = TokioIo::new(stream);
        let ended = if spoken == Spoken::Http2 {
            let mut connection = pin!(bounds::http2_server().serve_connection(io, service));
            tokio::select! {
                ended = &mut connection => ended,
                () = leaving.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        } else {
            let connection = bounds::http1_server()
                .preserve_header_case(true)
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(io, service)
                .with_upgrades();
            let mut connection = pin!(connection);
            tokio::select! {
                ended = &mut connection => ended,
                () = leaving.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a client's connection to the proxy port broke");
        }
    }

    /// The Service and interception port that a request is for; the error says why there is none.
    fn find<B>(&self, request: &Request<B>) -> Result<(Arc<Service>, u16), String> {
        let text = |name: &HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
        let by_header = self.header.as_ref().and_then(text).and_then(|value| host::parse(value, &self.domain));
        let host = request.uri().authority().map(http::uri::Authority::as_str).or_else(|| text(&HOST));
        let host = host.unwrap_or_default();
        let wanted = by_header.or_else(|| host::parse(host, &self.domain)).ok_or_else(|| {
            format!(
                "{host:?} names no Service; write service.namespace, such as web.shop or web.shop.svc.{}",
                self.domain
            )
        })?;
        let (namespace, name) = (&wanted.namespace, &wanted.service);
        let standby = self
            .board
            .services()
            .into_iter()
            .find(|standby| standby.is(namespace, name))
            .ok_or_else(|| format!("no ElastiService names the Service {namespace}/{name}"))?;
        let service = Arc::clone(standby.service());
        let port = {
            let ports = service.view().ports.clone();
            let numbered = |number: u16| ports.iter().find(|(_, port)| port.number == number).map(|(own, _)| own);
            match wanted.port {
                Some(number) => numbered(number),
                None => numbered(80).or_else(|| ports.iter().next().map(|(own, _)| own).filter(|_| ports.count() == 1)),
            }
        };
        let port = port.ok_or_else(|| match wanted.port {
            Some(number) => format!("the Service {namespace}/{name} has no TCP port {number}"),
            None => {
                format!("the Service {namespace}/{name} has several ports; name one, such as {name}.{namespace}:8080")
            }
        })?;
        Ok((service, port))
    }
}

/// What a client speaks, unless it says nothing for too long.
async fn first_word(stream: &TcpStream, leaving: &CancellationToken) -> Option<Spoken> {
    let left = async {
        leaving.cancelled().await;
        sleep(LEAVE_SILENT).await;
    };
    tokio::select! {
        biased;
        shown = connection::shown(stream, Protocol::Http) => shown.ok().flatten(),
        () = left => None,
        () = sleep(HEAD_TIMEOUT) => None,
    }
}

/// One connection of a client, whose requests may be for several Services.
struct Visit {
    proxy: Arc<Proxy>,
    client: Client,
    spoken: Spoken,
    permit: Arc<Permit>,
    /// By interception port.
    requests: Mutex<HashMap<u16, Requests>>,
}

impl Visit {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, crate::http::BrokenOff> {
        let found = self.proxy.find(&request);
        self.proxy.metrics.host(found.is_ok());
        let (service, port) = match found {
            Ok(found) => found,
            Err(why) => return Ok(refuse(&why)),
        };
        let requests = {
            // Every change is one insertion, so a poisoned lock still guards a sound map.
            let mut all = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
            // A Service that was made anew has the port no more. Of those that are not asked now none keeps a connection: one client
            // has one place, and could name all Services.
            all.retain(|other, requests| requests.is_current() && (*other == port || requests.is_busy()));
            let session = || {
                let (client, context) = (self.client, Arc::clone(&self.proxy.context));
                Session { service, port, client, context, permit: Arc::clone(&self.permit) }
            };
            all.entry(port).or_insert_with(|| Requests::new(self.spoken, session())).clone()
        };
        requests.answer(request).await
    }
}

fn refuse(why: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(format!("elasti: {why}\n")));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_given_up_and_sooner_when_the_resolver_leaves() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let leaving = CancellationToken::new();
        for most in [HEAD_TIMEOUT, LEAVE_SILENT] {
            let begun = Instant::now();
            assert_eq!(timeout(most * 2, first_word(&client, &leaving)).await, Ok(None));
            assert!(begun.elapsed() >= most);
            leaving.cancel();
        }
    }
}
