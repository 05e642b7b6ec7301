//! Which backend of one ElastiService gets the next connection or request: the one with the fewest from this resolver,
//! never more than a limit, and one that could not be dialled lately only when no other is left.
//!
//! A [`Place`] counts; dropping it frees the place, whatever the way. A place that becomes free is given to the one that has
//! waited longest among those that can use it: nobody who waits is passed over, and no place stays free while somebody
//! waits for it. [`crate::hold`] and [`crate::http`] take places.

use std::collections::{BTreeMap, HashMap};
use std::future::pending;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::sync::{Mutex, MutexGuard};

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

/// Somebody who waits for a place.
#[derive(Debug)]
struct Waiter {
    backends: Box<[SocketAddr]>,
    limit: Option<u32>,
    granted: oneshot::Sender<Place>,
}

#[derive(Debug, Default)]
struct State {
    backends: HashMap<SocketAddr, Backend>,
    /// In the order in which they came.
    waiters: BTreeMap<u64, Waiter>,
    tickets: u64,
}

impl State {
    /// Counts one more at the best of `backends`; `None` when each has `limit` already, or there is none.
    fn take(&mut self, backends: &[SocketAddr], limit: Option<u32>) -> Option<SocketAddr> {
        let now = Instant::now();
        let rank = |address: &SocketAddr| {
            let backend = self.backends.get(address);
            let open = backend.map_or(0, |backend| backend.open);
            let suspect = backend.is_some_and(|backend| backend.is_suspect(now));
            limit.is_none_or(|limit| open < limit).then_some((suspect, open))
        };
        // Equals get their turn by chance: every resolver counts for itself, and all would begin with the same one.
        let first = fastrand::usize(..backends.len().max(1));
        let (before, after) = backends.split_at_checked(first)?;
        let ranked = after.iter().chain(before).filter_map(|address| Some((rank(address)?, *address)));
        let (_, address) = ranked.min_by_key(|(rank, _)| *rank)?;
        self.backends.entry(address).or_default().open += 1;
        Some(address)
    }

    /// Counts one less, or hands the place on to the one who is returned.
    fn free(&mut self, address: SocketAddr) -> Option<oneshot::Sender<Place>> {
        let backend = self.backends.get_mut(&address)?;
        backend.open = backend.open.saturating_sub(1);
        let open = backend.open;
        let can_use =
            |waiter: &Waiter| waiter.backends.contains(&address) && waiter.limit.is_none_or(|limit| open < limit);
        if let Some(ticket) = self.waiters.iter().find_map(|(ticket, waiter)| can_use(waiter).then_some(*ticket)) {
            backend.open += 1;
            return self.waiters.remove(&ticket).map(|waiter| waiter.granted);
        }
        if open == 0 && !backend.is_suspect(Instant::now()) {
            self.backends.remove(&address);
        }
        None
    }
}

/// The open connections and requests of one ElastiService, by backend.
#[derive(Debug, Default)]
pub struct Load(Mutex<State>);

impl Load {
    /// A place at the best of `backends`; `None` when each has `limit` already, or there is none.
    pub fn take(self: &Arc<Self>, backends: &[SocketAddr], limit: Option<u32>) -> Option<Place> {
        let backend = self.state().take(backends, limit)?;
        Some(Place { load: Arc::clone(self), backend })
    }

    /// Waits for a place at one of `backends`; without any it never ends.
    pub async fn place(self: &Arc<Self>, backends: &[SocketAddr], limit: Option<u32>) -> Place {
        let (granted, ticket) = {
            let mut state = self.state();
            if let Some(backend) = state.take(backends, limit) {
                return Place { load: Arc::clone(self), backend };
            }
            let (granted, place) = oneshot::channel();
            state.tickets += 1;
            let ticket = state.tickets;
            state.waiters.insert(ticket, Waiter { backends: backends.into(), limit, granted });
            (place, ticket)
        };
        // Dropped before what was granted meanwhile: whoever gives up is not given anything any more.
        let _queued = Queued { load: self, ticket };
        match granted.await {
            Ok(place) => place,
            // Who is in the queue can be granted.
            Err(_) => pending().await,
        }
    }

    /// Connections and requests that are open now, over all backends.
    pub fn open(&self) -> u32 {
        self.state().backends.values().map(|backend| backend.open).sum()
    }

    /// No code panics while it holds the lock; if one did, counts would still be whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a waiter out of the queue.
struct Queued<'a> {
    load: &'a Load,
    ticket: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let waiter = self.load.state().waiters.remove(&self.ticket);
        drop(waiter);
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
        let mut state = self.load.state();
        if let Some(backend) = state.backends.get_mut(&self.backend) {
            backend.suspect_until = Some(now + SUSPECT_FOR);
        }
        state.backends.retain(|_, backend| backend.open > 0 || backend.is_suspect(now));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let granted = self.load.state().free(self.backend);
        if let Some(granted) = granted {
            let place = Self { load: Arc::clone(&self.load), backend: self.backend };
            // One who gave up at this moment does not take it: it comes back and is freed once more.
            drop(granted.send(place));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

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
        assert_eq!((load.open(), load.state().backends.len()), (0, 0));
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

    fn wait(load: &Arc<Load>, backends: &[SocketAddr]) -> JoinHandle<Place> {
        let (load, backends) = (Arc::clone(load), backends.to_vec());
        tokio::spawn(async move { load.place(&backends, Some(1)).await })
    }

    #[tokio::test]
    async fn a_place_is_given_to_one_who_can_use_it() {
        let (load, backends) = (Arc::new(Load::default()), addresses(2));
        let _first = load.take(&backends[..1], Some(1)).unwrap();
        let second = load.take(&backends[1..], Some(1)).unwrap();
        let for_first = wait(&load, &backends[..1]);
        tokio::task::yield_now().await;
        let for_second = wait(&load, &backends[1..]);
        tokio::task::yield_now().await;
        drop(second);
        assert_eq!(timeout(DEADLINE, for_second).await.unwrap().unwrap().backend(), backends[1]);
        assert!(!for_first.is_finished());
    }

    #[tokio::test]
    async fn places_are_given_in_the_order_of_coming_and_not_to_those_who_gave_up() {
        let (load, backends) = (Arc::new(Load::default()), addresses(1));
        let place = load.take(&backends, Some(1)).unwrap();
        let mut waiters = Vec::new();
        for _ in 0..3 {
            waiters.push(wait(&load, &backends));
            tokio::task::yield_now().await;
        }
        let last = waiters.pop().unwrap();
        let gone = waiters.remove(0);
        gone.abort();
        assert!(gone.await.is_err());
        drop(place);
        let place = timeout(DEADLINE, &mut waiters[0]).await.unwrap().unwrap();
        assert!(!last.is_finished() && load.take(&backends, Some(1)).is_none());
        // Granted, and given up before it was taken: the place is free again.
        drop(place);
        last.abort();
        drop(last.await);
        let state = load.state();
        assert!(state.waiters.is_empty() && state.backends.is_empty(), "{state:?}");
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
