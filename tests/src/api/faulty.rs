//! A way to the API server that fails as a test says: requests are refused, lost, carried out late, or connections die.
//!
//! The operator speaks plain HTTP to it; it speaks TLS to the API server and passes the operator's token on.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The API server refuses it with this status.
    Refused(u16),
    /// It is carried out, and the connection breaks before the answer.
    AnswerLost,
    /// It never reaches the API server, and nobody says so.
    Swallowed,
    /// It is carried out when [`FaultyWay::release`] says so, whether or not anybody still waits for the answer.
    Late,
}

struct Rule {
    method: Method,
    path: String,
    fault: Fault,
    times: u32,
}

/// A request that was carried out with success, as far as it is a change.
#[derive(Clone, Debug)]
pub struct Done {
    /// PATCH, POST, PUT or DELETE.
    pub method: Method,
    /// Path without its query.
    pub path: String,
    /// What was sent.
    pub body: String,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    done: Vec<Done>,
    late: Vec<tokio::sync::oneshot::Sender<()>>,
    connections: JoinSet<()>,
    down: bool,
}

/// The way. It ends with the test's runtime.
#[derive(Clone)]
pub struct FaultyWay {
    /// Where it listens.
    pub(super) address: SocketAddr,
    state: Arc<Mutex<State>>,
    frozen: tokio::sync::watch::Sender<u64>,
}

type Answer = Response<UnsyncBoxBody<Bytes, kube::Error>>;

impl FaultyWay {
    /// A way on which nothing fails yet.
    pub async fn new() -> Self {
        let mut access = kube::Config::infer().await.unwrap();
        access.auth_info = kube::config::AuthInfo::default();
        access.default_retry = false;
        let client = Client::try_from(access).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let way = Self {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
            frozen: tokio::sync::watch::Sender::new(0),
        };
        let accepting = way.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if accepting.state().down {
                    continue;
                }
                let (way, client) = (accepting.clone(), client.clone());
                let mut frozen = accepting.frozen.subscribe();
                frozen.mark_unchanged();
                accepting.state().connections.spawn(async move {
                    let service = service_fn(|request| way.clone().serve(client.clone(), request));
                    let connection =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                    tokio::pin!(connection);
                    tokio::select! {
                        _ = &mut connection => {}
                        // The socket stays open and nobody reads or writes it any more.
                        _ = frozen.changed() => std::future::pending().await,
                    }
                });
            }
        });
        way
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next `times` requests of this method whose path ends so fail.
    pub fn fail(&self, method: Method, path: &str, fault: Fault, times: u32) {
        self.state().rules.push(Rule { method, path: path.to_owned(), fault, times });
    }

    /// Whether all failures that were asked for have happened.
    pub fn all_have_failed(&self) -> bool {
        self.state().rules.is_empty()
    }

    /// Requests that are late and wait for [`FaultyWay::release`].
    pub fn late(&self) -> usize {
        self.state().late.len()
    }

    /// What is late is carried out now.
    pub fn release(&self) {
        for late in std::mem::take(&mut self.state().late) {
            let _gone = late.send(());
        }
    }

    /// Breaks every open connection.
    pub fn cut(&self) {
        self.state().connections.abort_all();
    }

    /// Every open connection falls silent without a word; new ones work.
    pub fn freeze(&self) {
        self.frozen.send_modify(|count| *count += 1);
    }

    /// Breaks every connection and accepts none until it is told that the API server is up again.
    pub fn set_down(&self, down: bool) {
        self.state().down = down;
        self.cut();
    }

    /// Changes that were carried out, in order.
    pub fn done(&self) -> Vec<Done> {
        self.state().done.clone()
    }

    fn fault(&self, method: &Method, path: &str) -> Option<Fault> {
        let mut state = self.state();
        let rule = state.rules.iter_mut().find(|rule| rule.method == *method && path.ends_with(&rule.path))?;
        let fault = rule.fault;
        rule.times -= 1;
        state.rules.retain(|rule| rule.times > 0);
        Some(fault)
    }

    async fn serve(self, client: Client, request: Request<Incoming>) -> Result<Answer, std::io::Error> {
        let (mut parts, body) = request.into_parts();
        let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
        parts.headers.remove(http::header::HOST);
        parts.uri = parts.uri.path_and_query().unwrap().as_str().parse().unwrap();
        let (method, path) = (parts.method.clone(), parts.uri.path().to_owned());
        let forward = {
            let (way, body) = (self.clone(), body.clone());
            async move {
                let text = String::from_utf8_lossy(&body).into_owned();
                let done = Done { method: parts.method.clone(), path: parts.uri.path().to_owned(), body: text };
                let answer = client.send(Request::from_parts(parts, Body::from(body.to_vec()))).await;
                let answer = answer.map_err(std::io::Error::other)?;
                if done.method != Method::GET && answer.status().is_success() {
                    way.state().done.push(done);
                }
                Ok::<_, std::io::Error>(answer)
            }
        };
        match self.fault(&method, &path) {
            None => Ok(forward.await?.map(BodyExt::boxed_unsync)),
            Some(Fault::Refused(code)) => Ok(refusal(code)),
            Some(Fault::AnswerLost) => {
                forward.await?;
                Err(std::io::Error::other("the answer is lost"))
            }
            Some(Fault::Swallowed) => std::future::pending().await,
            Some(Fault::Late) => {
                let (release, released) = tokio::sync::oneshot::channel();
                self.state().late.push(release);
                // A task of its own: it goes on when its client has given up.
                tokio::spawn(async move {
                    if released.await.is_ok() {
                        let _nobody_waits = forward.await;
                    }
                });
                std::future::pending().await
            }
        }
    }
}

fn refusal(code: u16) -> Answer {
    let reason = match code {
        409 => "Conflict",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": "as the test says",
    });
    let body = Full::from(status.to_string()).map_err(|never: Infallible| match never {});
    Response::builder()
        .status(StatusCode::from_u16(code).unwrap())
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body.boxed_unsync())
        .unwrap()
}
