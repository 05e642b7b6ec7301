//! Who is it: ServiceAccount tokens, checked by the API server and remembered for a while.
//!
//! A token is good when the API server says so for our audience and its ServiceAccount is one of those allowed. "The API
//! server cannot be asked" is never "no": a caller is told to come again, and answers that are remembered still hold.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use elasti_api::names::TOKEN_AUDIENCE;
use futures::future::BoxFuture;
use http::{HeaderMap, StatusCode, header};

use crate::metrics::Metrics;

mod cache;
mod review;

use cache::Cache;
pub use review::ApiServer;

/// Longest token that is looked at, in bytes. ServiceAccount tokens are 1 to 2 kB; nobody shall have us hash and send
/// more than some times that.
const TOKEN_MAX: usize = 16 << 10;

/// What the API server says of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Review {
    /// It is genuine, unexpired and for our audience.
    Genuine(Caller),
    /// It is not.
    Refused,
}

/// Whom a token was issued to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// `system:serviceaccount:<namespace>:<name>` for a ServiceAccount.
    pub user: String,
    /// The pod that it is bound to.
    pub pod: Option<String>,
}

/// Asks about tokens. The error says why there is no answer.
pub trait TokenReviewer: Send + Sync {
    /// Whether `token` is genuine for [`TOKEN_AUDIENCE`].
    fn review(&self, token: String) -> BoxFuture<'static, Result<Review, String>>;
}

/// Why a caller is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is no bearer token, or the API server refuses it.
    #[error(
        "a ServiceAccount token with audience '{TOKEN_AUDIENCE}' is needed in 'Authorization: Bearer'; \
         this one is missing, expired or not genuine"
    )]
    Unauthenticated,
    /// The ServiceAccount is not allowed.
    #[error("'{0}' is not allowed; name its ServiceAccount in --allowed-service-accounts")]
    Forbidden(String),
    /// The API server cannot be asked.
    #[error("the token cannot be checked now, come again: {0}")]
    Unavailable(String),
}

impl AuthError {
    /// The HTTP status that says so.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Checks tokens. Clones share what is remembered.
#[derive(Clone)]
pub struct Authenticator {
    reviewer: Arc<dyn TokenReviewer>,
    /// Users as the API server names them.
    allowed: Arc<[String]>,
    cache: Arc<Mutex<Cache>>,
    metrics: Metrics,
}

impl Authenticator {
    /// Lets the ServiceAccounts `allowed` in, each as `namespace:name`.
    pub fn new(reviewer: Arc<dyn TokenReviewer>, allowed: &[String], metrics: Metrics) -> Self {
        let allowed = allowed.iter().map(|account| format!("system:serviceaccount:{account}")).collect();
        Self { reviewer, allowed, cache: Arc::default(), metrics }
    }

    /// Who sends a request with these headers.
    pub async fn caller(&self, headers: &HeaderMap) -> Result<Caller, AuthError> {
        let token = bearer(headers).ok_or(AuthError::Unauthenticated)?;
        match self.review(token).await? {
            Review::Refused => Err(AuthError::Unauthenticated),
            Review::Genuine(caller) if self.allowed.contains(&caller.user) => Ok(caller),
            Review::Genuine(caller) => Err(AuthError::Forbidden(caller.user)),
        }
    }

    async fn review(&self, token: &str) -> Result<Review, AuthError> {
        let key = cache::key(token);
        if let Some(review) = self.cache().get(&key, Instant::now()) {
            return Ok(review);
        }
        let answer = self.reviewer.review(token.to_owned()).await;
        self.metrics.token_reviewed(match &answer {
            Ok(Review::Genuine(_)) => "genuine",
            Ok(Review::Refused) => "refused",
            Err(_) => "unavailable",
        });
        let review = answer.map_err(AuthError::Unavailable)?;
        self.cache().put(key, token, review.clone(), Instant::now(), jiff::Timestamp::now());
        Ok(review)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Every change is one insertion or removal, so a poisoned lock still guards a sound cache.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    let sound = scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= TOKEN_MAX;
    sound.then_some(token)
}

#[cfg(test)]
pub(crate) mod tests;
