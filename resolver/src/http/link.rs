//! The client's own connection to the target, moved on by the task that serves the client: a task of its own would be woken for
//! each request and wake the client's for each answer, and would have to be made for each connection.
//!
//! Invariant: whoever polls the client's side polls this with the same waker ([`beside`]), so that what one side does for the
//! other is seen by the other. [`super::serve`] does, for HTTP/1; [`super::upstream`] puts connections here.

use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

/// Moves one connection on until it ends, or hands it over to who has it after an upgrade.
pub type Motion = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

/// What moves the connection on, while there is one.
#[derive(Default)]
pub struct Link(Mutex<Option<Motion>>);

impl Link {
    /// From now on this connection; the one before ends here.
    pub fn put(&self, motion: Motion) {
        let before = self.motion().replace(motion);
        drop(before);
    }

    /// The connection goes its own way.
    pub fn take(&self) -> Option<Motion> {
        self.motion().take()
    }

    fn poll(&self, cx: &mut Context<'_>) {
        let mut motion = self.motion();
        if let Some(Poll::Ready(ended)) = motion.as_mut().map(|motion| motion.as_mut().poll(cx)) {
            told(ended);
            *motion = None;
        }
    }

    /// What panics in a connection ends the process; else a poisoned lock would still guard a sound value.
    fn motion(&self) -> MutexGuard<'_, Option<Motion>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The client's side, with the target's beside it.
pub async fn beside<F: Future>(mut client: Pin<&mut F>, link: Option<&Link>) -> F::Output {
    std::future::poll_fn(|cx| {
        // The answer, before the client's side looks for it.
        link.inspect(|link| link.poll(cx));
        let ended = client.as_mut().poll(cx);
        if ended.is_pending() {
            // The request that it may have brought.
            link.inspect(|link| link.poll(cx));
        }
        ended
    })
    .await
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

/// Says how a connection to a target ended.
pub fn told(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to a target broke");
    }
}
