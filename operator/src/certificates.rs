//! The certificate of the resolver stream, and the authorities that sign it.
//!
//! The authorities are in a Secret, their certificates in a ConfigMap that resolvers mount. The Lease holder alone writes
//! both; every replica reads them and signs itself a certificate that it keeps in memory. An authority is replaced long
//! before it expires, and signs only after resolvers have had time to learn of it, so no handshake ever fails for a
//! rotation. Reading order: [`rotation`] (what to do when; pure), [`authority`] (keys and certificates), `store` (the
//! two objects).

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub mod authority;
pub mod rotation;
mod store;

use authority::{Leaf, SignError};
use rotation::Step;
use store::{Store, StoreError};

use crate::leader::LeaderState;

/// How often the two objects are read again: much shorter than [`rotation::SPREAD`], seldom enough to cost nothing.
const INTERVAL: Duration = Duration::from_mins(1);

/// How soon to look again while there is no certificate: at the first start the leader makes the authority meanwhile.
const RETRY: Duration = Duration::from_secs(1);

/// How long one look may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Steps in one round: one of each kind is due at the most, and some room for conflicts.
const STEPS: usize = 8;

/// The certificate in force; every TLS handshake asks for it. Clones share it.
#[derive(Clone, Default)]
pub struct Certificate(Arc<RwLock<Option<Leaf>>>);

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificate")
    }
}

impl Certificate {
    pub(crate) fn renew(&self, leaf: Leaf) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(leaf);
    }

    fn due(&self, signer: &authority::Authority, now: Timestamp) -> bool {
        let leaf = self.0.read().unwrap_or_else(PoisonError::into_inner);
        leaf.as_ref().is_none_or(|leaf| leaf.due(signer, now))
    }

    fn exists(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(Leaf::certified)
    }
}

/// Keeps the certificate good.
pub struct Keeper {
    store: Store,
    names: Vec<String>,
    certificate: Certificate,
    ready: watch::Sender<bool>,
}

/// Why the certificate could not be looked after.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot make a certificate: {0}")]
    Sign(#[from] SignError),
    #[error("the API server has not answered within {} s", TIMEOUT.as_secs())]
    Timeout(#[from] tokio::time::error::Elapsed),
}

/// The names under which resolvers may know the stream's Service.
pub fn names(service: &str, namespace: &str, cluster_domain: &str) -> Vec<String> {
    let svc = format!("{service}.{namespace}.svc");
    let domain = cluster_domain.trim_matches('.');
    vec![svc.clone(), format!("{svc}.{domain}"), format!("{service}.{namespace}")]
}

impl Keeper {
    /// Keeps a certificate for `names` with authorities in `namespace`.
    pub fn new(client: Client, namespace: &str, names: Vec<String>) -> Self {
        let store = Store::new(client, namespace);
        Self { store, names, certificate: Certificate::default(), ready: watch::Sender::new(false) }
    }

    /// The certificate, for the TLS server; handshakes fail until there is one.
    pub fn certificate(&self) -> Certificate {
        self.certificate.clone()
    }

    /// Whether there is a certificate.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Keeps it until `end`.
    pub async fn run(self, mut leadership: watch::Receiver<LeaderState>, end: CancellationToken) {
        let work = async {
            loop {
                let leader = leadership.borrow_and_update().leader;
                let round = tokio::time::timeout(TIMEOUT, self.round(leader, Timestamp::now())).await;
                match round.map_err(KeepError::from).flatten() {
                    Ok(()) => {}
                    // Another replica was faster; the next look shows what it has done.
                    Err(KeepError::Store(error)) if error.is_conflict() => {}
                    Err(error) => tracing::warn!(%error, "cannot look after the stream's certificate; trying again"),
                }
                let interval = if self.certificate.exists() { INTERVAL } else { RETRY };
                // Renewals of the Lease are no reason to look; having become its holder is.
                let led = async { leadership.wait_for(|state| state.leader && !leader).await.map(|_| ()) };
                if let Ok(Err(_)) = tokio::time::timeout(interval, led).await {
                    tokio::time::sleep(interval).await;
                }
            }
        };
        end.run_until_cancelled(work).await;
    }

    async fn round(&self, leader: bool, now: Timestamp) -> Result<(), KeepError> {
        let mut state = self.store.read().await?;
        for _ in 0..STEPS {
            let step = rotation::step(&state.authorities, state.bundle.as_deref(), now).filter(|_| leader);
            let Some(step) = step else { break };
            tracing::info!(%step, "authorities of the resolver stream");
            match step {
                Step::Publish(bundle) => self.store.publish(state.config_map, bundle).await?,
                Step::Add => {
                    state.authorities.push(authority::Authority::new(now)?);
                    self.store.write(state.secret, &state.authorities).await?;
                }
                Step::Drop => {
                    state.authorities.retain(|authority| now < authority.not_after);
                    self.store.write(state.secret, &state.authorities).await?;
                }
                Step::Stamp => {
                    for authority in &mut state.authorities {
                        authority.published.get_or_insert(now);
                    }
                    self.store.write(state.secret, &state.authorities).await?;
                }
            }
            state = self.store.read().await?;
        }
        if let Some(signer) = rotation::signer(&state.authorities, now)
            && self.certificate.due(signer, now)
        {
            self.certificate.renew(signer.sign(&self.names, now)?);
            tracing::info!(names = ?self.names, "the stream has a new certificate");
            self.ready.send_replace(true);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
