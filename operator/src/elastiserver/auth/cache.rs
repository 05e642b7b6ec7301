//! What the API server has said of tokens, by their hash: the tokens themselves are not kept.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::Review;

/// How long a token stays good without being asked for again: the time for which a deleted pod's token still opens a
/// stream. Long enough to live through a restart of the API server.
const GENUINE_FOR: Duration = Duration::from_mins(5);

/// How long a token stays bad: keeps a broken client from asking the API server at every try, and a token that the API
/// server did not know yet from being refused for long.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// Tokens remembered: one per resolver of the largest cluster that Kubernetes supports (5,000 nodes), and room for the
/// tokens of a rotation and for strangers.
const SIZE: usize = 16_384;

/// SHA-256 of a token.
pub(super) type Key = [u8; 32];

#[derive(Debug, Default)]
pub(super) struct Cache(HashMap<Key, (Review, Instant)>);

pub(super) fn key(token: &str) -> Key {
    Sha256::digest(token).into()
}

impl Cache {
    pub(super) fn get(&self, key: &Key, now: Instant) -> Option<Review> {
        self.0.get(key).filter(|(_, until)| now < *until).map(|(review, _)| review.clone())
    }

    pub(super) fn put(&mut self, key: Key, token: &str, review: Review, now: Instant, clock: Timestamp) {
        let lasts = match review {
            Review::Genuine(_) => expires_in(token, clock).map_or(GENUINE_FOR, |left| left.min(GENUINE_FOR)),
            Review::Refused => REFUSED_FOR,
        };
        if self.0.len() >= SIZE {
            self.0.retain(|_, (_, until)| now < *until);
        }
        // Strangers' tokens go first: they cannot push out what resolvers live on.
        if self.0.len() >= SIZE {
            self.0.retain(|_, (review, _)| *review != Review::Refused);
        }
        if self.0.len() < SIZE {
            self.0.insert(key, (review, now + lasts));
        }
    }
}

/// How long a JWT is still good for by its own `exp` claim. The API server has checked the signature.
fn expires_in(token: &str, clock: Timestamp) -> Option<Duration> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: i64,
    }
    let claims = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let Claims { exp } = serde_json::from_slice(&claims).ok()?;
    Some(Duration::from_secs(exp.saturating_sub(clock.as_second()).try_into().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::super::Caller;
    use super::*;

    fn genuine() -> Review {
        Review::Genuine(Caller { user: "u".into(), pod: None })
    }

    fn lasts(token: &str, review: Review) -> Duration {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.put(key(token), token, review, now, Timestamp::from_second(1000).unwrap());
        let second = Duration::from_secs(1);
        (0..=600).map(|passed| second * passed).find(|passed| cache.get(&key(token), now + *passed).is_none()).unwrap()
    }

    #[test]
    fn answers_are_remembered_for_as_long_as_they_are_good() {
        let jwt = |exp: i64| format!("h.{}.s", BASE64_URL_SAFE_NO_PAD.encode(format!(r#"{{"exp":{exp}}}"#)));
        assert_eq!(lasts("opaque", genuine()), GENUINE_FOR);
        assert_eq!(lasts(&jwt(1007), genuine()), Duration::from_secs(7));
        assert_eq!(lasts(&jwt(99_999), genuine()), GENUINE_FOR);
        assert_eq!(lasts(&jwt(99_999), Review::Refused), REFUSED_FOR);
    }

    #[test]
    fn strangers_do_not_push_resolvers_out() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.put(key("resolver"), "resolver", genuine(), now, Timestamp::UNIX_EPOCH);
        for token in 0..=SIZE {
            cache.put(key(&token.to_string()), "", Review::Refused, now, Timestamp::UNIX_EPOCH);
        }
        assert!(cache.0.len() <= SIZE);
        assert_eq!(cache.get(&key("resolver"), now), Some(genuine()));
    }
}
