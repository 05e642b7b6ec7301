//! Who leads: one Lease, held by one replica at a time, as client-go's leader election does it.
//!
//! Times are ages on the own monotonic clock, never compared between machines: a foreign hold has run out when the
//! Lease has not changed before our eyes for its whole duration, and every write carries the resourceVersion that was
//! read, so that of two takers one fails. The holder stops believing in its hold well before others may take it.
//! (kube-lease-manager, the one crate for our version of kube, compares wall clocks and takes over unconditionally.)

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long others leave a silent holder alone, client-go's default: an API server that restarts is back sooner.
pub const LEASE_DURATION: Duration = Duration::from_secs(15);

/// How long a renewal makes the hold certain, client-go's `RenewDeadline`. What is left to [`LEASE_DURATION`] is for a
/// request that the API server carries out after its sender has given it up.
pub const CERTAIN: Duration = Duration::from_secs(10);

/// How often the Lease is renewed by its holder; client-go's default: four renewals may fail in a row.
const RETRY: Duration = Duration::from_secs(2);

/// How often others read it, so that they soon see a holder fall silent.
const FOLLOW: Duration = Duration::from_millis(500);

/// A holder that has not renewed for so long is silent: a renewal is late by what it takes to see it, [`FOLLOW`], and as
/// much again for the requests.
const SILENT: Duration = Duration::from_secs(3);

/// A replica that has just begun to follow does not judge: whoever is to be heard by it is still connecting.
const FOLLOWER_GRACE: Duration = Duration::from_secs(5);

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// Whether this replica leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderState {
    /// It holds the Lease.
    pub leader: bool,
    /// How often the Lease has changed hands, as far as is known.
    pub epoch: u64,
    /// When `leader` became what it is.
    pub since: Instant,
    /// The hold is certain until then, and lost after it unless it is renewed; in the past when it is not held.
    pub valid_until: Instant,
    /// Another replica holds the Lease and does not renew it: it may be gone together with its node. That entitles to
    /// nothing that a late holder could not live with.
    pub holder_silent: bool,
}

impl LeaderState {
    fn follower(epoch: u64, now: Instant) -> Self {
        Self { leader: false, epoch, since: now, valid_until: now, holder_silent: false }
    }
}

/// A replica that stands for election.
#[derive(Debug)]
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    state: watch::Sender<LeaderState>,
    seen: Seen,
}

/// What is remembered of the Lease.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// The foreign hold as it was last seen, and when it was first seen so.
    foreign: Option<(LeaseSpec, Instant)>,
    /// The highest epoch seen: it must not fall when the Lease is deleted.
    epoch: u64,
}

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There is none: make one.
    Create,
    /// Nobody holds it, or its holder has been silent for too long.
    Take,
    /// It is ours.
    Renew,
    /// Another one's.
    Wait,
}

impl Seen {
    fn step(&mut self, lease: Option<&LeaseSpec>, identity: &str, leader: bool, now: Instant) -> Step {
        let Some(spec) = lease else { return Step::Create };
        self.epoch = self.epoch.max(epoch(spec));
        match spec.holder_identity.as_deref() {
            None | Some("") => Step::Take,
            Some(holder) if holder == identity && leader => Step::Renew,
            // Our pod's earlier container: it is gone, and what it remembered too.
            Some(holder) if holder == identity => Step::Take,
            Some(_) => match &self.foreign {
                Some((seen, since)) if seen == spec => {
                    if now.duration_since(*since) >= duration(spec) {
                        Step::Take
                    } else {
                        Step::Wait
                    }
                }
                _ => {
                    self.foreign = Some((spec.clone(), now));
                    Step::Wait
                }
            },
        }
    }
}

impl Seen {
    /// Whether the hold, just read, has not been renewed; `following` is since when this replica follows.
    fn holder_silent(&self, following: Instant, now: Instant) -> bool {
        let silence = self.foreign.as_ref().map(|(_, since)| now.duration_since(*since));
        silence >= Some(SILENT) && now.duration_since(following) >= FOLLOWER_GRACE
    }
}

fn epoch(spec: &LeaseSpec) -> u64 {
    spec.lease_transitions.and_then(|transitions| transitions.try_into().ok()).unwrap_or_default()
}

fn duration(spec: &LeaseSpec) -> Duration {
    let seconds = spec.lease_duration_seconds.and_then(|seconds| seconds.try_into().ok());
    seconds.map_or(LEASE_DURATION, Duration::from_secs)
}

/// Why the Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("no answer within {} s", REQUEST_TIMEOUT.as_secs())]
    Timeout(#[from] tokio::time::error::Elapsed),
}

impl LeaseError {
    /// Somebody else was faster.
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Api(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists())
    }
}

impl Election {
    /// Stands for the Lease `name`; `identity` is the name of this pod, unique among the replicas.
    pub fn new(client: Client, namespace: &str, name: impl Into<String>, identity: impl Into<String>) -> Self {
        let state = watch::Sender::new(LeaderState::follower(0, Instant::now()));
        let api = Api::namespaced(client, namespace);
        Self { api, name: name.into(), identity: identity.into(), state, seen: Seen::default() }
    }

    /// Whether this replica leads; follows every change. The sender lives until [`Election::run`] has ended.
    pub fn state(&self) -> watch::Receiver<LeaderState> {
        self.state.subscribe()
    }

    /// Stands for election until `end`, then gives the Lease back. Cancel `end` only when nothing acts as the leader
    /// any more: another replica may lead within two seconds.
    pub async fn run(mut self, end: CancellationToken) {
        let mut failing = false;
        while !end.is_cancelled() {
            let certain = self.state.borrow().valid_until;
            let leader = self.state.borrow().leader;
            let round = self.round();
            let result = if leader {
                tokio::time::timeout_at(certain.into(), round).await.unwrap_or_else(|elapsed| Err(elapsed.into()))
            } else {
                round.await
            };
            match result {
                Ok(()) => failing = false,
                Err(error) if error.is_conflict() => {}
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(lease = self.name, %error, "cannot reach the Lease; trying again");
                    }
                }
            }
            self.wait(&end).await;
        }
        self.release().await;
    }

    /// Until the next round; a hold that nobody renews ends meanwhile.
    async fn wait(&self, end: &CancellationToken) {
        let LeaderState { leader, valid_until, .. } = *self.state.borrow();
        let next = tokio::time::Instant::now() + if leader { RETRY } else { FOLLOW };
        let until = if leader { next.min(valid_until.into()) } else { next };
        end.run_until_cancelled(tokio::time::sleep_until(until)).await;
        if leader && Instant::now() >= valid_until {
            self.follow("the hold ran out before it was renewed");
        }
    }

    async fn round(&mut self) -> Result<(), LeaseError> {
        let found = tokio::time::timeout(REQUEST_TIMEOUT, self.api.get_opt(&self.name)).await??;
        let spec = found.as_ref().map(|lease| lease.spec.clone().unwrap_or_default());
        // Every hold counts from before the request that made it.
        let asked = Instant::now();
        let leader = self.state.borrow().leader;
        let step = self.seen.step(spec.as_ref(), &self.identity, leader, asked);
        if leader && step != Step::Renew {
            self.follow("the Lease was taken away");
        }
        let lease = match step {
            Step::Wait => {
                self.state.send_if_modified(|state| {
                    let silent = self.seen.holder_silent(state.since, asked);
                    std::mem::replace(&mut state.holder_silent, silent) != silent
                });
                return Ok(());
            }
            Step::Renew => self.held(found, spec.as_ref(), false),
            Step::Create | Step::Take => self.held(found, spec.as_ref(), true),
        };
        let params = PostParams::default();
        let written = async {
            match step {
                Step::Create => self.api.create(&params, &lease).await,
                _ => self.api.replace(&self.name, &params, &lease).await,
            }
        };
        let written = tokio::time::timeout(REQUEST_TIMEOUT, written).await??;
        self.seen.epoch = self.seen.epoch.max(written.spec.as_ref().map(epoch).unwrap_or_default());
        self.lead(asked);
        Ok(())
    }

    /// The Lease with us as its holder.
    fn held(&self, found: Option<Lease>, spec: Option<&LeaseSpec>, anew: bool) -> Lease {
        let now = MicroTime(jiff::Timestamp::now());
        let mut lease = found.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
            spec: None,
        });
        let mut held = spec.cloned().unwrap_or_default();
        held.holder_identity = Some(self.identity.clone());
        held.renew_time = Some(now.clone());
        held.lease_duration_seconds = LEASE_DURATION.as_secs().try_into().ok();
        if anew {
            held.acquire_time = Some(now);
            held.lease_transitions = (self.seen.epoch + 1).try_into().ok();
        }
        lease.spec = Some(held);
        lease
    }

    fn lead(&self, asked: Instant) {
        let (epoch, before) = (self.seen.epoch, *self.state.borrow());
        let anew = !before.leader || before.epoch != epoch;
        let since = if anew { Instant::now() } else { before.since };
        self.state.send_replace(LeaderState {
            leader: true,
            epoch,
            since,
            valid_until: asked + CERTAIN,
            holder_silent: false,
        });
        if anew {
            tracing::info!(lease = self.name, epoch, "leading");
        }
    }

    fn follow(&self, why: &str) {
        tracing::warn!(lease = self.name, why, "not leading any more");
        self.state.send_replace(LeaderState::follower(self.seen.epoch, Instant::now()));
    }

    /// Gives the Lease back, so that nobody waits for it to run out.
    async fn release(self) {
        if !self.state.borrow().leader {
            return;
        }
        self.state.send_replace(LeaderState::follower(self.seen.epoch, Instant::now()));
        let released = async {
            let mut lease = self.api.get(&self.name).await?;
            let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
            if spec.holder_identity.as_deref() != Some(&*self.identity) {
                return Ok(());
            }
            spec.holder_identity = None;
            spec.renew_time = None;
            spec.acquire_time = None;
            self.api.replace(&self.name, &PostParams::default(), &lease).await.map(|_| ())
        };
        match tokio::time::timeout(REQUEST_TIMEOUT, released).await.map_err(LeaseError::from) {
            Ok(Ok(())) => tracing::info!(lease = self.name, "Lease given back"),
            Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "the Lease was not given back; it runs out"),
            Err(error) => tracing::warn!(lease = self.name, %error, "the Lease was not given back; it runs out"),
        }
    }
}

#[cfg(test)]
mod tests;
