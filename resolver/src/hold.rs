//! The way to the target, however long it takes: dialled at once when backends are known, else held. What waits is an
//! accepted connection of which nothing has been read, or an HTTP request on a connection that was forwarded before.
//!
//! Waiting ends in one of the ways of [`Closed`]; whatever the way, its place is free again at once.

use std::future::pending;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use elasti_api::message::HTTP_CONCURRENCY;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};

use crate::balance::{Load, Place};
use crate::connection::Client;
use crate::forward::{Connect, Dialer, is_ours};
use crate::ports::PortView;
use crate::service::{Service, View};

/// A target that is up answers a dial within this, so a connection to it is never counted as held; one that takes
/// longer may be gone, and the operators must know that somebody waits. Half a packet's retransmission time (200 ms).
const GRACE: Duration = Duration::from_millis(100);

/// Pauses between rounds of dials that all failed: a pod that is ready but refuses is about to listen, or to go.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// Time for the first dial of a target. Within a cluster one takes a millisecond; when many held connections are
/// released at once and the target's accept queue is full, its kernel drops the SYN, which ours repeats only after a
/// second: a fresh dial comes sooner.
const DIAL_MIN: Duration = Duration::from_millis(200);

/// Time for later dials, for a network that really is slow.
const DIAL_MAX: Duration = Duration::from_secs(1);

/// For so long the usual limit makes wait: short requests are through by then, and streams that stay keep nobody out.
const PATIENCE: Duration = Duration::from_secs(5);

/// See [`PAUSE_MIN`]; kube-proxy's rules for the private Service change within a second.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Why a connection was closed before it reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The hold time ended; no backend was known.
    Timeout,
    /// The hold time ended; backends were known, but none could be dialled.
    DialFailed,
    /// As many connections are held as may be.
    Limit,
    /// The target keeps failing, and another client waits for it already.
    Unavailable,
    /// The client went away.
    ClientLeft,
    /// The ElastiService, or its port, is gone.
    Removed,
    /// The resolver ends.
    Shutdown,
    /// What the client sent is no HTTP that can be passed on, or it took too long for one head.
    Malformed,
}

impl Closed {
    /// All reasons.
    pub const ALL: [Self; 8] = [
        Self::Timeout,
        Self::DialFailed,
        Self::Limit,
        Self::Unavailable,
        Self::ClientLeft,
        Self::Removed,
        Self::Shutdown,
        Self::Malformed,
    ];

    /// The spelling in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::DialFailed => "dial_failed",
            Self::Limit => "limit",
            Self::Unavailable => "unavailable",
            Self::ClientLeft => "client_left",
            Self::Removed => "removed",
            Self::Shutdown => "shutdown",
            Self::Malformed => "malformed",
        }
    }
}

/// A connection to the target that nothing has been sent on, and its place at the backend.
#[derive(Debug)]
pub struct Reached<T = TcpStream> {
    /// The connection.
    pub target: T,
    /// Counts it.
    pub place: Place,
}

/// How many connections or requests one backend gets at once.
#[derive(Debug)]
pub struct Concurrency {
    said: Option<u32>,
    brief: AtomicBool,
}

impl Concurrency {
    /// As the ElastiService says; else connections go all at once, since they may stay for days.
    pub fn of_connections(said: Option<u32>) -> Self {
        Self { said, brief: AtomicBool::new(false) }
    }

    /// As the ElastiService says; else [`HTTP_CONCURRENCY`].
    pub fn of_requests(said: Option<u32>) -> Self {
        Self { said, brief: AtomicBool::new(true) }
    }

    /// A connection turns out to be there for one answer only: it counts as a request.
    pub fn mark_brief(&self) {
        self.brief.store(true, Ordering::Relaxed);
    }

    /// The limit; `None`: there is none.
    pub fn limit(&self) -> Option<u32> {
        self.said.or_else(|| self.brief.load(Ordering::Relaxed).then_some(HTTP_CONCURRENCY))
    }

    /// Waits for a place at one of `backends`.
    async fn place(&self, load: &Arc<Load>, backends: &[SocketAddr]) -> Place {
        let place = load.place(backends, self.limit());
        if self.said.is_some() {
            return place.await;
        }
        match timeout(PATIENCE, place).await {
            Ok(place) => place,
            Err(_) => load.place(backends, None).await,
        }
    }
}

/// What wants to reach the target.
#[derive(Clone, Copy, Debug)]
pub struct Seeker<'a, C = Dialer> {
    /// Whose target.
    pub service: &'a Arc<Service>,
    /// The interception port.
    pub port: u16,
    /// Opens connections.
    pub dialer: C,
    /// Who asks: what a PROXY protocol header says.
    pub client: Client,
    /// How many may be with one backend.
    pub concurrency: &'a Concurrency,
    /// Since when it has been wanted; the hold time counts from here.
    pub since: Instant,
}

/// Reaches the target, or says why it never will. `left` ends when the client has gone.
pub async fn reach<C: Connect>(
    seeker: &Seeker<'_, C>,
    left: impl Future<Output = ()>,
) -> Result<Reached<C::Connection>, Closed> {
    let Seeker { service, port, since, .. } = *seeker;
    let views = service.views();
    let (policy, reachable) = {
        let view = views.borrow();
        (view.hold, view.reachable(port))
    };
    let end = tokio::time::Instant::now().checked_add(policy.timeout.saturating_sub(since.elapsed()));
    let mut target = pin!(dial(views, seeker));
    // No timer for a target that is down: even one of zero costs a millisecond.
    if reachable && let Ok(reached) = timeout(GRACE, &mut target).await {
        return reached;
    }
    let held = service.hold(since, policy.max_connections)?;
    tokio::select! {
        reached = &mut target => {
            if reached.is_ok() {
                held.reached();
            }
            reached
        }
        () = left => Err(Closed::ClientLeft),
        () = ended(end) => {
            held.failed();
            let reachable = service.view().reachable(port);
            Err(if reachable { Closed::DialFailed } else { Closed::Timeout })
        }
    }
}

/// Waits for the end of the hold time; one that is past all clocks has none.
async fn ended(end: Option<tokio::time::Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => pending().await,
    }
}

/// Dials what the view names, round after round, and starts anew when it changes. Ends only with a connection, or
/// because the port is gone.
async fn dial<C: Connect>(
    mut views: watch::Receiver<View>,
    seeker: &Seeker<'_, C>,
) -> Result<Reached<C::Connection>, Closed> {
    let (mut within, mut pause) = (DIAL_MIN, PAUSE_MIN);
    loop {
        let port = views.borrow_and_update().ports.get(seeker.port).cloned().ok_or(Closed::Removed)?;
        tokio::select! {
            reached = round(seeker, &port, within, pause) => {
                if let Some(reached) = reached {
                    return Ok(reached);
                }
                (within, pause) = ((within * 2).min(DIAL_MAX), (pause * 2).min(PAUSE_MAX));
            }
            changed = changed(&mut views, seeker.port, &port) => {
                changed?;
                (within, pause) = (DIAL_MIN, PAUSE_MIN);
            }
        }
    }
}

/// Dials each backend once, as places become free; a pause follows when all fail. Without backends it never ends.
async fn round<C: Connect>(
    seeker: &Seeker<'_, C>,
    port: &PortView,
    within: Duration,
    pause: Duration,
) -> Option<Reached<C::Connection>> {
    let load = seeker.service.load();
    let header = if port.proxy_protocol { seeker.client.proxy_header() } else { Vec::new() };
    let mut untried = port.targets.to_vec();
    loop {
        if untried.is_empty() && !port.targets.is_empty() {
            sleep(pause).await;
            return None;
        }
        let place = seeker.concurrency.place(load, &untried);
        let place = if untried.len() == port.targets.len() {
            place.await
        } else {
            // One that refused may be back long before one that is full has a place.
            timeout(pause, place).await.ok()?
        };
        let backend = place.backend();
        match seeker.dialer.connect(backend, &header, within).await {
            Ok(target) => return Some(Reached { target, place }),
            Err(error) => {
                tracing::debug!(%backend, %error, "dial failed");
                if is_ours(&error) {
                    drop(place);
                } else {
                    place.failed();
                }
                untried.retain(|address| *address != backend);
            }
        }
    }
}

/// Waits until the port has other targets.
async fn changed(views: &mut watch::Receiver<View>, port: u16, old: &PortView) -> Result<(), Closed> {
    let changed = views.wait_for(|view| view.ports.get(port) != Some(old)).await;
    changed.map(drop).map_err(|_| Closed::Removed)
}

#[cfg(test)]
mod tests;
