//! The work queue: looks at one ElastiService at a time, at once when something concerns it, and again when asked to.
//!
//! Each ElastiService has a worker of its own, so a slow or failing one delays no other; pokes that come while it works
//! are one more round, not one each. Rounds that clients wait for have turns of their own: others, however many and slow, keep none up.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::observed::ObjectKey;

/// Rounds that may run at once: enough to hide the API server's latency, few enough not to flood it after a restart. Those that
/// clients wait for are more; together they leave room among the 100 requests that one connection carries.
const USUAL: usize = 16;
const URGENT: usize = 64;

/// The first wait after a failed round; it doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(50);

/// The longest wait after a failed round: a wake must not wait long for an API server that has come back.
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// What a round ended with.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Look again when something concerns it.
    Wait,
    /// Look again after this long at the latest.
    After(Duration),
    /// There is nothing to look at any more.
    Gone,
}

/// Looks at one ElastiService.
pub trait Round: Send + Sync + 'static {
    /// One round; an error is a round to repeat.
    fn round(self: Arc<Self>, key: ObjectKey) -> impl Future<Output = anyhow::Result<Next>> + Send;

    /// Whether somebody waits for the next round. Asked again with each poke.
    fn urgent(&self, key: &ObjectKey) -> bool;
}

/// The queue.
pub struct Work<R> {
    round: Arc<R>,
    workers: Mutex<HashMap<ObjectKey, Arc<Notify>>>,
    usual: Semaphore,
    urgent: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl<R: Round> Work<R> {
    /// A queue whose workers stop with `stop`; `tasks` waits for the rounds in progress.
    pub fn new(round: Arc<R>, tasks: TaskTracker, stop: CancellationToken) -> Arc<Self> {
        let (usual, urgent) = (Semaphore::new(USUAL), Semaphore::new(URGENT));
        Arc::new(Self { round, workers: Mutex::default(), usual, urgent, tasks, stop })
    }

    /// Has `key` looked at.
    pub fn poke(self: &Arc<Self>, key: &ObjectKey) {
        if self.stop.is_cancelled() {
            return;
        }
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = workers.get(key) {
            worker.notify_one();
            return;
        }
        let notify = Arc::new(Notify::new());
        notify.notify_one();
        workers.insert(key.clone(), notify.clone());
        self.tasks.spawn(self.clone().worker(key.clone(), notify));
    }

    async fn worker(self: Arc<Self>, key: ObjectKey, poked: Arc<Notify>) {
        let mut wait: Option<Duration> = None;
        let mut backoff = MIN_BACKOFF;
        loop {
            let timer = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = poked.notified() => {}
                () = timer => {}
            }
            let Some(_turn) = self.turn(&key, &poked).await else { return };
            // Of thousands of workers few have a round in progress: the others need not have room for one.
            match Box::pin(self.round.clone().round(key.clone())).await {
                Ok(Next::Wait) => (wait, backoff) = (None, MIN_BACKOFF),
                Ok(Next::After(after)) => (wait, backoff) = (Some(after), MIN_BACKOFF),
                Ok(Next::Gone) => {
                    let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
                    if poked.notified().now_or_never().is_none() {
                        workers.remove(&key);
                        return;
                    }
                    poked.notify_one();
                }
                Err(error) => {
                    tracing::warn!(elastiservice = %key, error = format!("{error:#}"), "will be tried again");
                    wait = Some(backoff);
                    backoff = (backoff * 2).min(MAX_BACKOFF);
                }
            }
        }
    }

    async fn turn(&self, key: &ObjectKey, poked: &Notify) -> Option<SemaphorePermit<'_>> {
        let usual = self.usual.acquire();
        tokio::pin!(usual);
        loop {
            if self.round.urgent(key) {
                return self.urgent.acquire().await.ok();
            }
            tokio::select! {
                turn = &mut usual => return turn.ok(),
                () = poked.notified() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Count {
        rounds: AtomicU32,
        fail_first: bool,
        gone: bool,
    }

    impl Round for Count {
        async fn round(self: Arc<Self>, _key: ObjectKey) -> anyhow::Result<Next> {
            let round = self.rounds.fetch_add(1, Ordering::SeqCst);
            anyhow::ensure!(!(self.fail_first && round == 0), "first round fails");
            Ok(if self.gone { Next::Gone } else { Next::Wait })
        }

        fn urgent(&self, _key: &ObjectKey) -> bool {
            false
        }
    }

    /// Rounds do not end, but of the one that is urgent.
    #[derive(Default)]
    struct Stuck {
        begun: AtomicU32,
        urgent: Mutex<Option<ObjectKey>>,
        done: Notify,
    }

    impl Round for Stuck {
        async fn round(self: Arc<Self>, key: ObjectKey) -> anyhow::Result<Next> {
            self.begun.fetch_add(1, Ordering::SeqCst);
            if !self.urgent(&key) {
                std::future::pending::<()>().await;
            }
            self.done.notify_one();
            Ok(Next::Wait)
        }

        fn urgent(&self, key: &ObjectKey) -> bool {
            self.urgent.lock().unwrap().as_ref() == Some(key)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_clients_wait_for_is_kept_up_by_no_others() {
        let stuck = Arc::new(Stuck::default());
        let work = Work::new(stuck.clone(), TaskTracker::new(), CancellationToken::new());
        for number in 0..USUAL {
            work.poke(&ObjectKey::new("n", number.to_string()));
        }
        while stuck.begun.load(Ordering::SeqCst) < u32::try_from(USUAL).unwrap() {
            tokio::task::yield_now().await;
        }
        let key = ObjectKey::new("n", "held");
        work.poke(&key);
        tokio::task::yield_now().await;
        // A client comes while its round is waiting for a turn.
        *stuck.urgent.lock().unwrap() = Some(key.clone());
        work.poke(&key);
        stuck.done.notified().await;
    }

    fn work(fail_first: bool, gone: bool) -> (Arc<Work<Count>>, Arc<Count>) {
        let count = Arc::new(Count { rounds: AtomicU32::new(0), fail_first, gone });
        (Work::new(count.clone(), TaskTracker::new(), CancellationToken::new()), count)
    }

    async fn until(count: &Count, rounds: u32) {
        while count.rounds.load(Ordering::SeqCst) < rounds {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_round_is_repeated_without_a_poke() {
        let (work, count) = work(true, false);
        work.poke(&ObjectKey::new("n", "a"));
        until(&count, 2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_is_gone_comes_back_when_poked() {
        let (work, count) = work(false, true);
        let key = ObjectKey::new("n", "a");
        work.poke(&key);
        until(&count, 1).await;
        while !work.workers.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        work.poke(&key);
        until(&count, 2).await;
    }
}
