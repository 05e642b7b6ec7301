//! The life of one connection until it reaches the target: dialled at once when backends are known, else held.
//!
//! A held connection ends in one of the ways of [`Closed`]; whatever the way, its place is free again at once.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::forward::{self, Dialer};
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
    /// The client went away.
    ClientLeft,
    /// The ElastiService, or its port, is gone.
    Removed,
    /// The resolver ends.
    Shutdown,
}

impl Closed {
    /// All reasons.
    pub const ALL: [Self; 6] =
        [Self::Timeout, Self::DialFailed, Self::Limit, Self::ClientLeft, Self::Removed, Self::Shutdown];

    /// The spelling in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::DialFailed => "dial_failed",
            Self::Limit => "limit",
            Self::ClientLeft => "client_left",
            Self::Removed => "removed",
            Self::Shutdown => "shutdown",
        }
    }
}

/// Serves one accepted connection to its end. `ended` ends it with a reset.
pub async fn serve(service: Arc<Service>, port: u16, client: TcpStream, dialer: Dialer, ended: CancellationToken) {
    let accepted = Instant::now();
    service.accept();
    match ended.run_until_cancelled(reach(&service, port, &client, dialer, accepted)).await {
        Some(Ok(target)) => {
            let _forwarding = service.forward();
            forward::copy(client, target, &service.metrics().bytes, &ended).await;
        }
        refused => {
            let reason = refused.and_then(Result::err).unwrap_or(Closed::Shutdown);
            service.close(reason);
            forward::reset(&client);
        }
    }
}

/// A connection to the target, however long it takes.
async fn reach(
    service: &Arc<Service>,
    port: u16,
    client: &TcpStream,
    dialer: Dialer,
    accepted: Instant,
) -> Result<TcpStream, Closed> {
    let views = service.views();
    let (policy, reachable) = {
        let view = views.borrow();
        (view.hold, view.reachable(port))
    };
    let mut target = pin!(dial(views, port, dialer));
    // No timer for a target that is down: even one of zero costs a millisecond.
    if reachable && let Ok(reached) = timeout(GRACE, &mut target).await {
        return reached;
    }
    let held = service.hold(accepted, policy.max_connections).ok_or(Closed::Limit)?;
    tokio::select! {
        reached = &mut target => {
            if reached.is_ok() {
                held.reached();
            }
            reached
        }
        () = left(client) => Err(Closed::ClientLeft),
        () = sleep(policy.timeout.saturating_sub(accepted.elapsed())) => {
            let reachable = service.views().borrow().reachable(port);
            Err(if reachable { Closed::DialFailed } else { Closed::Timeout })
        }
    }
}

/// Dials what the view names, round after round, and starts anew when it changes. Ends only with a connection, or
/// because the port is gone.
async fn dial(mut views: watch::Receiver<View>, port: u16, dialer: Dialer) -> Result<TcpStream, Closed> {
    let (mut within, mut pause) = (DIAL_MIN, PAUSE_MIN);
    loop {
        let targets = views.borrow_and_update().targets.get(&port).cloned().ok_or(Closed::Removed)?;
        tokio::select! {
            reached = round(&dialer, &targets, within, pause) => {
                if let Some(target) = reached {
                    return Ok(target);
                }
                (within, pause) = ((within * 2).min(DIAL_MAX), (pause * 2).min(PAUSE_MAX));
            }
            changed = changed(&mut views, port, &targets) => {
                changed?;
                (within, pause) = (DIAL_MIN, PAUSE_MIN);
            }
        }
    }
}

/// Dials each target once; a pause follows when all fail. Without targets it never ends.
async fn round(dialer: &Dialer, targets: &[SocketAddr], within: Duration, pause: Duration) -> Option<TcpStream> {
    if targets.is_empty() {
        return std::future::pending().await;
    }
    let reached = dialer.any(targets, within).await;
    if reached.is_none() {
        sleep(pause).await;
    }
    reached
}

/// Waits until the port has other targets.
async fn changed(views: &mut watch::Receiver<View>, port: u16, old: &Arc<[SocketAddr]>) -> Result<(), Closed> {
    let changed = views.wait_for(|view| view.targets.get(&port) != Some(old)).await;
    changed.map(drop).map_err(|_| Closed::Removed)
}

/// Waits until the client has left: its connection broke, or it closed it without having sent anything. A client that
/// has sent something and then closed its sending side may be waiting for the answer.
async fn left(client: &TcpStream) {
    let mut first = [0];
    if let Ok(1..) = client.peek(&mut first).await {
        // The kernel reports a broken connection (EPOLLERR) whatever is unread; what else fails counts as broken too.
        drop(client.ready(Interest::ERROR).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::report::Board;

    /// Ten thousand held connections, the default limit of a Service, cost 40 MB at most.
    #[tokio::test]
    async fn a_connection_costs_less_than_four_kilobytes() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        let service = Arc::new(Service::new("n", "s", metrics, Board::default().news()));
        let connection = serve(service, 1, client, Dialer::default(), CancellationToken::new());
        assert!(size_of_val(&connection) < 4096, "{} bytes", size_of_val(&connection));
    }
}
