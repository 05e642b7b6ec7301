//! Connections that speak HTTP: each request is forwarded on the client's own connection to the target, or held until
//! there is one, or answered with why not. hyper reads and writes both sides, so that both agree on where each message
//! ends, whatever a client tries.
//!
//! As soon as clients can reach the target directly they are asked to: HTTP/1 with `Connection: close` on a response that
//! nothing was pipelined behind, HTTP/2 with GOAWAY once it has sent a request. Neither loses one. So are those whose port is
//! intercepted no more, where each further request would be refused; of HTTP/1 they are closed while they are idle.
//! [`crate::connection`] calls [`serve`].

use std::convert::Infallible;
use std::error::Error as _;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::CONNECTION;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::{Body as _, Incoming};
use hyper::service::{Service as _, service_fn};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, Interest, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::balance::Place;
use crate::capacity::Permit;
use crate::connection::{Client, Context};
use crate::forward;
use crate::hold::{self, Closed, Concurrency, Reached, Seeker};
use crate::protocol::Spoken;
use crate::service::Service;

use body::{Answering, Body, During};
use goaway::{Ask, GoAway};
use headers::Introduction;
use inbox::Inbox;
use io::ClientIo;
use kept::Kept;
use link::{Link, Motion};
use reservation::Reservation;
use upstream::{Reuse, Upstream};

pub mod answer;
pub mod body;
pub mod bounds;
pub mod chunks;
pub mod goaway;
pub mod headers;
pub mod inbox;
pub mod io;
pub mod kept;
pub mod link;
pub mod probe;
pub mod reservation;
pub mod upstream;

/// Pause before a request goes to a target that takes connections and closes them unread.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// How long idle connections are left to their clients when the resolver is leaving: those that are used meanwhile are
/// handed over without loss.
const LEAVE_IDLE: Duration = Duration::from_secs(5);

/// How long a client of HTTP/2 that was asked to connect anew may take to hear of it: what it opens later is refused.
const HANDOVER_TIME: Duration = Duration::from_secs(3);

/// How long a refused client has to send its requests and to read their answers.
const REFUSAL_TIME: Duration = Duration::from_secs(2);

/// How long a refused client of HTTP/2 may open streams.
const REFUSAL_STREAMS: Duration = Duration::from_millis(200);

/// A client's connection, whatever becomes of it.
#[derive(Clone, Debug)]
pub struct Session {
    /// Whose target.
    pub service: Arc<Service>,
    /// The interception port.
    pub port: u16,
    /// Who.
    pub client: Client,
    /// What all connections need.
    pub context: Arc<Context>,
    /// Its place, until the last of what it has become has ended.
    pub permit: Arc<Permit>,
}

/// A request was sent, at least in part, and the target broke the connection off: so does the client's, as if nobody
/// stood between.
#[derive(Debug, thiserror::Error)]
#[error("the target broke the connection off")]
pub struct BrokenOff;

/// What the requests of one connection share.
struct Exchange {
    session: Session,
    introduction: Introduction,
    spoken: Spoken,
    inbox: Option<Arc<Inbox>>,
    upstream: Kept,
    /// Absent where nobody polls it.
    link: Option<Link>,
}

/// The requests of one client to one port of a Service, by a connection that bears others too.
#[derive(Clone)]
pub struct Requests(Arc<Exchange>);

impl Requests {
    /// The first one is still to come.
    pub fn new(spoken: Spoken, session: Session) -> Self {
        Self(Arc::new(Exchange::new(spoken, session)))
    }

    /// Whether the Service still has the port.
    pub fn is_current(&self) -> bool {
        let Session { service, port, .. } = &self.0.session;
        service.view().ports.contains(*port)
    }

    /// Whether a request is on its way to the target, or waits for it.
    pub fn is_busy(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Forwards a request, or says why not.
    pub async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, BrokenOff> {
        Arc::clone(&self.0).answer(request, None).await
    }
}

/// Serves a connection that speaks HTTP to its end; `reached` is a connection to the target that nothing was sent on, if there
/// is one already.
pub async fn serve(spoken: Spoken, stream: TcpStream, reached: Option<Reached>, session: Session) {
    let bytes = session.service.metrics().bytes.clone();
    let context = Arc::clone(&session.context);
    let inbox = (spoken == Spoken::Http1).then(Arc::<Inbox>::default);
    let link = (spoken == Spoken::Http1).then(Link::default);
    let (upstream, place) = match reached {
        Some(Reached { target, place }) => match Upstream::new(spoken, target, place.backend(), link.as_ref()).await {
            Ok(upstream) => (Some(upstream), Some(place)),
            Err(_) => (None, None),
        },
        None => (None, None),
    };
    // A connection between two requests is no traffic: each request but the first takes a place of its own.
    let reservation = Arc::new(Reservation::new(place));
    let ask = Ask::default();
    let io = ClientIo::new(stream, bytes, inbox.clone()).with_reservation(Arc::clone(&reservation));
    let (port, mut views) = (session.port, session.service.views());
    let upstream = Kept::new(upstream);
    let exchange =
        Arc::new(Exchange { inbox: inbox.clone(), upstream, link, ..Exchange::new(spoken, session.clone()) });
    let answering = Arc::clone(&exchange);
    let service = service_fn(move |request| {
        // Now, not when the answer is first polled: hyper reads on before that.
        Arc::clone(&answering).answer(request, reservation.take())
    });
    let leaving_idle = async {
        context.leaving.cancelled().await;
        sleep(LEAVE_IDLE).await;
    };
    let served = async {
        if spoken == Spoken::Http2 {
            let io = io.with_goaway(GoAway::new(ask.clone()));
            let begun = CancellationToken::new();
            let first = begun.clone();
            let service = service_fn(move |request| {
                first.cancel();
                service.call(request)
            });
            let mut connection = pin!(bounds::http2_server().serve_connection(io, service));
            let handed_over = async {
                tokio::select! {
                    _ = views.wait_for(|view| view.shall_reconnect(port)) => {}
                    () = context.leaving.cancelled() => {}
                }
                tokio::select! {
                    () = begun.cancelled() => {}
                    () = leaving_idle => {}
                }
            };
            tokio::select! {
                ended = &mut connection => return ended,
                () = handed_over => ask.send(),
            }
            tokio::select! {
                ended = &mut connection => return ended,
                () = sleep(HANDOVER_TIME) => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        } else {
            let connection = bounds::http1_server()
                .preserve_header_case(true)
                .auto_date_header(false)
                .serve_connection(io, service)
                .with_upgrades();
            let mut connection = pin!(connection);
            let link = exchange.link.as_ref();
            let dismissed = async {
                tokio::select! {
                    () = leaving_idle => {}
                    _ = views.wait_for(|view| !view.ports.contains(port)) => {}
                }
            };
            tokio::select! {
                // A request that has come is answered.
                biased;
                ended = link::beside(connection.as_mut(), link) => return ended,
                () = dismissed => connection.as_mut().graceful_shutdown(),
            }
            link::beside(connection, link).await
        }
    };
    if let Some(Err(error)) = context.ended.run_until_cancelled(served).await {
        tracing::debug!(%error, "a client's connection broke");
        if is_malformed(&error) {
            session.service.close(Closed::Malformed);
        }
    }
    if let Some((stream, unread)) = inbox.and_then(|inbox| inbox.take_back()) {
        forward_bytes(&session, stream, &unread).await;
    }
}

/// Whether a connection was given up because of what the client sent, or did not send.
fn is_malformed(error: &hyper::Error) -> bool {
    let source = error.source();
    let late = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    let unframed = source.and_then(|source| source.downcast_ref::<h2::Error>());
    error.is_parse()
        || late.is_some_and(|error| error.kind() == std::io::ErrorKind::TimedOut)
        || unframed.is_some_and(|error| error.is_library() && error.reason() != Some(h2::Reason::NO_ERROR))
}

/// Forwards the rest of a connection as bytes, of which `unread` come first: hyper would not pass them on as they are.
async fn forward_bytes(session: &Session, stream: TcpStream, unread: &[u8]) {
    let Session { service, port, client, context, .. } = session;
    let concurrency = &Concurrency::of_connections(service.view().hold.concurrency);
    let since = Instant::now();
    let seeker = Seeker { service, port: *port, dialer: context.dialer, client: *client, concurrency, since };
    let broken = async { drop(stream.ready(Interest::ERROR).await) };
    let reached = context.ended.run_until_cancelled(hold::reach(&seeker, broken)).await;
    let sent = match reached.unwrap_or(Err(Closed::Shutdown)) {
        Ok(Reached { mut target, place }) => target.write_all(unread).await.map(|()| (target, place)),
        Err(reason) => {
            service.close(reason);
            Err(std::io::ErrorKind::NotConnected.into())
        }
    };
    let Ok((target, place)) = sent else { return forward::reset(&stream) };
    let counted = (service.forward(client.address.ip()), place);
    forward::copy(stream, target, &context.pipes, &service.metrics().bytes, &context.ended).await;
    drop(counted);
}

/// Answers the requests of a connection that is not served: why not.
pub async fn refuse(spoken: Spoken, stream: TcpStream, service: &Service, reason: Closed) {
    let name = service.to_string();
    let io = ClientIo::new(stream, service.metrics().bytes.clone(), None);
    let answer = service_fn(|request: Request<Incoming>| {
        let answer = answer::answer(reason, &name, answer::is_grpc(request.headers()));
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let refused = async {
        if spoken == Spoken::Http2 {
            let mut connection = pin!(bounds::http2_server().serve_connection(io, answer));
            tokio::select! {
                _ = &mut connection => return,
                () = sleep(REFUSAL_STREAMS) => connection.as_mut().graceful_shutdown(),
            }
            drop(connection.await);
        } else {
            drop(bounds::http1_server().keep_alive(false).serve_connection(io, answer).await);
        }
    };
    // A client that is slower than this is reset.
    drop(timeout(REFUSAL_TIME, refused).await);
}

impl Exchange {
    /// There is no connection to the target yet, and nobody watches the client's.
    fn new(spoken: Spoken, session: Session) -> Self {
        let introduction = Introduction::of(session.client.address.ip());
        Self { session, introduction, spoken, inbox: None, upstream: Kept::default(), link: None }
    }

    /// Forwards a request, or says why not; `place` is one at the backend of the client's own connection, if it has one already.
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        mut place: Option<Place>,
    ) -> Result<Response<Body>, BrokenOff> {
        let since = Instant::now();
        let answering = self.inbox.as_ref().map(Answering::new);
        let Session { service, client, .. } = &self.session;
        if let Some(response) = self.probed(&request) {
            let mut response = response.map(|body| body.during(During { answering, forwarding: None }));
            self.hand_over(request.body().size_hint().exact(), response.headers_mut());
            return Ok(response);
        }
        service.request(client.address.ip());
        let grpc = answer::is_grpc(request.headers());
        let (mut parts, body) = request.into_parts();
        if let (Some(inbox), Some(length), true) = (&self.inbox, body.size_hint().exact(), headers::is_last(&parts)) {
            inbox.set_last(length);
        }
        self.introduction.put_into(&mut parts);
        let (length, connect) = (body.size_hint().exact(), parts.method == Method::CONNECT);
        let mut request = Request::from_parts(parts, body);
        let upgrade = hyper::upgrade::on(&mut request);
        let (response, forwarding) = loop {
            let (mut upstream, place) = match self.upstream(since, place.take()).await {
                Ok(reached) => reached,
                Err(reason) => {
                    service.close(reason);
                    let mut response = answer::answer(reason, &service.to_string(), grpc);
                    self.hand_over(length, response.headers_mut());
                    service.metrics().answered(response.status(), since.elapsed().as_secs_f64());
                    return Ok(response.map(|body| body.during(During { answering, forwarding: None })));
                }
            };
            // The target is at work from now on; it may take in a body for long, or compute, before it answers.
            let forwarding = (place, service.forward(client.address.ip()));
            match upstream.send(request).await {
                Ok(response) => {
                    if self.spoken == Spoken::Http1 {
                        self.upstream.keep(upstream).await;
                    }
                    break (response, forwarding);
                }
                Err(mut error) => {
                    tracing::debug!(backend = %upstream.backend(), error = %error.error(), "a request failed");
                    request = error.take_message().ok_or(BrokenOff)?;
                    drop(forwarding);
                    sleep(RETRY_PAUSE).await;
                }
            }
        };
        service.metrics().answered(response.status(), since.elapsed().as_secs_f64());
        let tunnel = response.status() == StatusCode::SWITCHING_PROTOCOLS || connect && response.status().is_success();
        let (mut parts, body) = response.into_parts();
        headers::strip(&mut parts.headers);
        if tunnel {
            self.inbox.as_ref().inspect(|inbox| inbox.tunnel());
            let mut response = Response::from_parts(parts, body);
            let target = hyper::upgrade::on(&mut response);
            let (ended, permit) = (self.session.context.ended.clone(), Arc::clone(&self.session.permit));
            let connection = self.link.as_ref().and_then(Link::take);
            let copied = async move {
                ended.run_until_cancelled(copy(upgrade, target, connection)).await;
                drop((forwarding, permit));
            };
            self.session.context.connections.spawn(copied);
            return Ok(response.map(|_| Body::default().during(During { answering, forwarding: None })));
        }
        self.hand_over(length, &mut parts.headers);
        let during = During { answering, forwarding: Some(forwarding) };
        Ok(Response::from_parts(parts, Body::of(body).during(during)))
    }

    /// The answer to a request that the target shall not be woken for. It is no traffic.
    fn probed(&self, request: &Request<Incoming>) -> Option<Response<Body>> {
        let service = &self.session.service;
        let rules = service.view().probes.clone()?;
        let response = probe::answer(&rules, request)?;
        service.metrics().probes.inc();
        Some(response)
    }

    /// Asks a client that shall connect anew, and can without loss, to do so. A request whose body has this length is being
    /// answered, with these headers.
    fn hand_over(&self, length: Option<u64>, headers: &mut HeaderMap) {
        let Session { service, port, context, .. } = &self.session;
        let anew = || service.view().shall_reconnect(*port) || context.leaving.is_cancelled();
        if self.inbox.as_ref().is_some_and(|inbox| anew() && inbox.is_all(length)) {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// A connection for the next request, however long it takes: the client's own if it is still good, and gets a place.
    async fn upstream(&self, since: Instant, place: Option<Place>) -> Result<(Upstream, Place), Closed> {
        let Session { service, port, client, context, .. } = &self.session;
        let (policy, targets) = {
            let view = service.view();
            (view.hold, view.ports.get(*port).map(|port| Arc::clone(&port.targets)))
        };
        let targets = targets.ok_or(Closed::Removed)?;
        let concurrency = &Concurrency::of_requests(policy.concurrency);
        // Streams of one connection wait for one dial, each for its own time.
        let left = || policy.timeout.saturating_sub(since.elapsed());
        let mut own = self.upstream.own(left()).await.ok_or(Closed::Timeout)?;
        let mut known = own.upstream.take().filter(|upstream| targets.contains(&upstream.backend()));
        if let Some(mut upstream) = known.take()
            && upstream.usable().await
        {
            let backend = upstream.backend();
            let place = place.filter(|place| place.backend() == backend);
            if let Some(place) = place.or_else(|| service.load().take(&[backend], concurrency.limit())) {
                own.upstream = upstream.share();
                return Ok((upstream, place));
            }
            known = Some(upstream);
        } else {
            // Else it would be waited for by whom it belongs to.
            drop(place);
        }
        if left().is_zero() {
            return Err(Closed::DialFailed);
        }
        let dialer = Reuse::new(known, context.dialer, self.spoken, self.link.as_ref());
        let seeker = Seeker { service, port: *port, dialer, client: *client, concurrency, since };
        // hyper drops the request when the client leaves.
        let Reached { target: upstream, place } = hold::reach(&seeker, std::future::pending()).await?;
        own.upstream = upstream.share();
        Ok((upstream, place))
    }
}

/// Copies both ways what follows an upgrade. `connection` is the target's, if nobody else moves it on.
async fn copy(client: OnUpgrade, target: OnUpgrade, connection: Option<Motion>) {
    let moved = async {
        if let Some(connection) = connection {
            link::told(connection.await);
        }
    };
    let both = async { Ok::<_, hyper::Error>((client.await?, target.await?)) };
    match tokio::join!(both, moved).0 {
        Ok((client, target)) => {
            drop(copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(target)).await);
        }
        Err(error) => tracing::debug!(%error, "an upgrade failed"),
    }
}
