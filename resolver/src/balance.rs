//! Which backend of one ElastiService gets the next connection or request: the one with the fewest from this resolver,
//! never more than a limit, and one that could not be dialled lately only when no other is left.
//!
//! A [`Place`] counts; dropping it frees the place, whatever the way. [`crate::hold`] and [`crate::http`] take places.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// For this long after a failed dial others come first: about as long as the cluster takes to notice that a pod has gone
/// with its node's network still up.
const SUSPECT_FOR: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Backend {
    open: u32,
    suspect_until: Option<Instant>,
}

impl Backend {
    fn is_suspect(&self, now: Instant) -> bool {
        self.suspect_until.is_some_and(|until| until > now)
    }
}

/// The open connections and requests of one ElastiService, by backend.
#[derive(Debug, Default)]
pub struct Load {
    backends: Mutex<HashMap<SocketAddr, Backend>>,
    freed: Notify,
}

impl Load {
    /// A place at the best of `backends`; `None` when each has `limit` already, or there is none.
    pub fn take(self: &Arc<Self>, backends: &[SocketAddr], limit: Option<u32>) -> Option<Place> {
        let now = Instant::now();
        let mut known = self.backends();
        let rank = |address: &SocketAddr| {
            let backend = known.get(address);
            let open = backend.map_or(0, |backend| backend.open);
            let suspect = backend.is_some_and(|backend| backend.is_suspect(now));
            limit.is_none_or(|limit| open < limit).then_some((suspect, open))
        };
        // Equals get their turn by chance: every resolver counts for itself, and all would begin with the same one.
        let first = fastrand::usize(..backends.len().max(1));
        let (before, after) = backends.split_at_checked(first)?;
        let ranked = after.iter().chain(before).filter_map(|address| Some((rank(address)?, *address)));
        let (_, address) = ranked.min_by_key(|(rank, _)| *rank)?;
        known.entry(address).or_default().open += 1;
        Some(Place { load: Arc::clone(self), backend: address })
    }

    /// Waits until a place may have become free since the last call: a place that was freed in between counts.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }

    /// Connections and requests that are open now, over all backends.
    pub fn open(&self) -> u32 {
        self.backends().values().map(|backend| backend.open).sum()
    }

    /// No code panics while it holds the lock; if one did, counts would still be whole.
    fn backends(&self) -> MutexGuard<'_, HashMap<SocketAddr, Backend>> {
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection or request to a backend.
#[derive(Debug)]
#[must_use]
pub struct Place {
    load: Arc<Load>,
    backend: SocketAddr,
}

impl Place {
    /// Where to.
    pub fn backend(&self) -> SocketAddr {
        self.backend
    }

    /// The backend could not be dialled: frees the place, and lets others come first for a while.
    pub fn failed(self) {
        let now = Instant::now();
        let mut known = self.load.backends();
        if let Some(backend) = known.get_mut(&self.backend) {
            backend.suspect_until = Some(now + SUSPECT_FOR);
        }
        known.retain(|_, backend| backend.open > 0 || backend.is_suspect(now));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut known = self.load.backends();
            if let Some(backend) = known.get_mut(&self.backend) {
                backend.open = backend.open.saturating_sub(1);
                if backend.open == 0 && !backend.is_suspect(Instant::now()) {
                    known.remove(&self.backend);
                }
            }
        }
        self.load.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(count: u16) -> Vec<SocketAddr> {
        (1..=count).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect()
    }

    #[test]
    fn the_backend_with_the_fewest_is_next() {
        let (load, backends) = (Arc::new(Load::default()), addresses(3));
        let places: Vec<Place> = (0..9).filter_map(|_| load.take(&backends, None)).collect();
        for address in &backends {
            assert_eq!(places.iter().filter(|place| place.backend() == *address).count(), 3);
        }
        drop(places);
        assert_eq!((load.open(), load.backends().len()), (0, 0));
        assert!(load.take(&[], None).is_none());
    }

    #[test]
    fn a_limit_holds_for_each_backend() {
        let (load, backends) = (Arc::new(Load::default()), addresses(2));
        let mut places: Vec<Place> = (0..4).filter_map(|_| load.take(&backends, Some(2))).collect();
        assert_eq!(places.len(), 4);
        assert!(load.take(&backends, Some(2)).is_none());
        let freed = places.pop().map(|place| place.backend());
        assert_eq!(load.take(&backends, Some(2)).map(|place| place.backend()), freed);
    }

    #[tokio::test]
    async fn a_place_that_was_freed_before_anybody_waited_is_not_missed() {
        let (load, backends) = (Arc::new(Load::default()), addresses(1));
        drop(load.take(&backends, Some(1)));
        tokio::time::timeout(Duration::from_secs(20), load.freed()).await.unwrap();
    }

    #[test]
    fn a_backend_that_failed_comes_last() {
        let (load, backends) = (Arc::new(Load::default()), addresses(2));
        let failed = load.take(&backends, None).unwrap();
        let bad = failed.backend();
        failed.failed();
        let others: Vec<Place> = (0..5).filter_map(|_| load.take(&backends, None)).collect();
        assert!(others.iter().all(|place| place.backend() != bad));
        assert_eq!(load.take(&[bad], None).map(|place| place.backend()), Some(bad), "better than none");
    }
}
