//! The client's own connection to the target between two requests: for as long as it may be used again, and no longer. An open one
//! may keep its target awake, and is a socket that nobody counts. [`super::Session`]s' requests keep it here.

use std::sync::{Arc, Weak};

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{Duration, sleep, timeout};

use super::upstream::Upstream;

/// Where the connection is kept; locked by who looks for a connection, so that others wait for what he finds.
#[derive(Debug, Default)]
pub struct Kept(Arc<Mutex<Own>>);

/// The connection.
#[derive(Debug, Default)]
pub struct Own {
    /// Absent while it is in use, and when there is none.
    pub upstream: Option<Upstream>,
    /// A task sees to it that it goes.
    watched: bool,
}

impl Kept {
    /// With the connection that the first request shall use, if there is one.
    pub fn new(upstream: Option<Upstream>) -> Self {
        Self(Arc::new(Mutex::new(Own { upstream, watched: false })))
    }

    /// The connection, for whoever is the only one who looks for it; `None` when others take longer than `within`.
    pub async fn own(&self, within: Duration) -> Option<MutexGuard<'_, Own>> {
        match self.0.try_lock() {
            Ok(own) => Some(own),
            Err(_) => timeout(within, self.0.lock()).await.ok(),
        }
    }

    /// Keeps a connection that the next request may use. Needs a runtime.
    pub async fn keep(&self, upstream: Upstream) {
        let mut own = self.0.lock().await;
        own.upstream = Some(upstream);
        if !own.watched {
            own.watched = true;
            tokio::spawn(forget(Arc::downgrade(&self.0)));
        }
    }
}

/// Drops the connection once it is too old to be used again, or ends when it is in use then.
async fn forget(kept: Weak<Mutex<Own>>) {
    let mut rest = super::upstream::IDLE_MAX;
    loop {
        sleep(rest).await;
        let Some(kept) = kept.upgrade() else { return };
        // Who has it locked wants to use it.
        let Ok(mut own) = kept.try_lock() else { continue };
        rest = own.upstream.as_ref().map(Upstream::usable_for).unwrap_or_default();
        if rest.is_zero() {
            *own = Own::default();
            return;
        }
    }
}
