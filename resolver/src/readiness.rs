//! Whether starting pods are ready, asked faster than kubelet does: every 10 ms instead of every `periodSeconds`, and every
//! millisecond while nobody listens yet.
//!
//! One task for each ElastiService that has had connections and starting pods. Invariants: a pod is asked only while this resolver holds a
//! connection for it and an operator names it; it counts as ready only when every probe has met its own thresholds, and for no
//! longer than kubelet needs to say the same. [`crate::standby`] starts the task; [`Service`] takes the answers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use elasti_api::readiness::{Probe, StartingPod};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::forward::Dialer;
use crate::metrics::Metrics;
use crate::service::Service;

mod exchange;

/// The most pods of one Service that are asked at once: the first that is ready ends the wait.
const PODS: usize = 16;

/// The most questions that are open at once, over all Services.
const QUESTIONS: usize = 256;

/// While nobody listens the pause is this part of the usual one: then only kernels have work with it.
const KNOCK_PART: u32 = 10;

/// Pods that may each be asked so often; of more each gets its share, so that kernels have no more than 16,000 questions a second.
const KNOCK_PODS: u32 = 16;

/// The pause grows to this part of the time that the pod has been asked for: what a slow starter loses by it is nothing
/// beside what it takes.
const PART: u32 = 1000;

/// The longest pause, unless the shortest is longer.
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// Resolvers that may each ask a pod as often as they are set to; where more hold connections, each asks less often.
const FULL_SPEED: u32 = 4;

/// How long a connection to a pod may take at first: within a cluster it takes a millisecond. A first packet that got lost,
/// because the pod's network was not there yet, would be repeated only after a second.
const CONNECT_MIN: Duration = Duration::from_millis(50);

/// The part of the time that a pod has been asked for that a connection may take: there are slow networks.
const CONNECT_PART: u32 = 10;

/// Asks pods. Clones share their limit.
#[derive(Clone, Debug)]
pub struct Asker {
    dialer: Dialer,
    interval: Duration,
    questions: Arc<Semaphore>,
    /// One task for each pod that is asked.
    pods: TaskTracker,
    metrics: Metrics,
}

impl Asker {
    /// One that asks every `interval`; zero: never.
    pub fn new(dialer: Dialer, interval: Duration, metrics: Metrics) -> Self {
        Self { dialer, interval, questions: Arc::new(Semaphore::new(QUESTIONS)), pods: TaskTracker::new(), metrics }
    }

    /// Asks the starting pods of `service` for as long as the result lives; nothing when pods are not to be asked.
    pub fn follow(&self, service: &Arc<Service>) -> Option<AbortOnDropHandle<()>> {
        if self.interval.is_zero() {
            return None;
        }
        Some(AbortOnDropHandle::new(tokio::spawn(follow(self.clone(), Arc::clone(service)))))
    }

    /// The pause between two questions, start to start; `refused` says that nobody listened.
    fn pause(&self, asked_for: Duration, asking: u32, refused: bool) -> Duration {
        let longest = PAUSE_MAX.max(self.interval);
        let usual = (asked_for / PART).clamp(self.interval, longest);
        let pods = u32::try_from(self.pods.len()).unwrap_or(u32::MAX);
        let knock = (self.interval / KNOCK_PART).saturating_mul(pods.div_ceil(KNOCK_PODS).max(1)).max(asked_for / PART);
        let pause = if refused { knock.min(usual) } else { usual };
        pause.saturating_mul(asking.div_ceil(FULL_SPEED).max(1))
    }
}

/// A pod that is being asked.
struct Asked {
    pod: Arc<StartingPod>,
    since: Instant,
    _task: AbortOnDropHandle<()>,
}

/// Asks whatever pods the view names.
async fn follow(asker: Asker, service: Arc<Service>) {
    let mut views = service.views();
    let mut pods: HashMap<String, Asked> = HashMap::new();
    loop {
        let starting = Arc::clone(&views.borrow_and_update().starting);
        pods.retain(|uid, _| starting.iter().any(|starting| starting.pod.uid == *uid));
        for starting in starting.iter().take(PODS) {
            let pod = &starting.pod;
            let before = pods.get(&pod.uid);
            if before.is_some_and(|before| before.pod == *pod) {
                continue;
            }
            let since = before.map_or_else(Instant::now, |before| before.since);
            let asks = ask(asker.clone(), Arc::clone(&service), Arc::clone(pod), since);
            let task = tokio::spawn(asker.pods.track_future(asks));
            let now = Asked { pod: Arc::clone(pod), since, _task: AbortOnDropHandle::new(task) };
            pods.insert(pod.uid.clone(), now);
        }
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Asks one pod until it is ready, and again when kubelet has not said the same in time.
async fn ask(asker: Asker, service: Arc<Service>, pod: Arc<StartingPod>, since: Instant) {
    let Some(address) = pod.addresses.first().copied() else { return };
    let questions = Questions { asker: &asker, service: &service, since };
    loop {
        for probe in pod.containers.iter().flatten() {
            questions.until_met(address, probe).await;
        }
        if service.set_ready(&pod.uid, true) {
            tracing::debug!(service = %service, pod = pod.uid, after = ?since.elapsed(), "a pod says that it is ready");
        }
        sleep(pod.confirmation).await;
        if service.set_ready(&pod.uid, false) {
            tracing::info!(service = %service, pod = pod.uid, "kubelet does not say that the pod is ready; asking it again");
        }
    }
}

/// The questions to one pod.
struct Questions<'a> {
    asker: &'a Asker,
    service: &'a Service,
    since: Instant,
}

impl Questions<'_> {
    /// Asks until the probe has succeeded as often in a row as it must. Only failures are repeated fast: successes in a row
    /// are meant to show that it lasts.
    async fn until_met(&self, address: std::net::IpAddr, probe: &Probe) {
        let mut successes = 0;
        loop {
            let started = Instant::now();
            let answer = self.once(address, probe).await;
            successes = if answer == Answer::Good { successes + 1 } else { 0 };
            if successes >= probe.successes {
                return;
            }
            let pause = if answer == Answer::Good { probe.period } else { self.pause(answer == Answer::Refused) };
            sleep_until(started + pause).await;
        }
    }

    /// Asks once somebody waits for the answer.
    async fn once(&self, address: std::net::IpAddr, probe: &Probe) -> Answer {
        while self.service.traffic().held == 0 {
            sleep(self.asker.interval).await;
        }
        let Ok(_permit) = self.asker.questions.acquire().await else { return Answer::Bad };
        let connect = CONNECT_MIN.max(self.since.elapsed() / CONNECT_PART).min(probe.timeout);
        let answered = exchange::ask(self.asker.dialer, address, &probe.action, connect);
        let answer = tokio::time::timeout(probe.timeout, answered).await.map_err(|_| exchange::Fault::Timeout);
        let answer = match answer {
            Ok(Ok(())) => Answer::Good,
            Ok(Err(fault)) if fault.is_refused() => Answer::Refused,
            Ok(Err(_)) | Err(_) => Answer::Bad,
        };
        self.asker.metrics.probed(answer == Answer::Good);
        answer
    }

    fn pause(&self, refused: bool) -> Duration {
        let asking = self.service.view().asking;
        self.asker.pause(self.since.elapsed(), asking, refused)
    }
}

/// What came of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The probe has succeeded.
    Good,
    /// Nobody listens.
    Refused,
    /// Anything else.
    Bad,
}

#[cfg(test)]
mod tests;
