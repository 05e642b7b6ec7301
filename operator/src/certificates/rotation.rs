//! When authorities come, sign and go. Pure.
//!
//! Invariants: there is always an authority with a third of its life left; none signs before resolvers have had
//! [`SPREAD`] to learn of it, unless there is no other; none leaves the bundle before it has expired.

use std::fmt;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::authority::Authority;

/// How long resolvers get to learn of an authority before it signs. kubelet refreshes a mounted ConfigMap within one to
/// two minutes; an hour forgives a node that is out of touch for a while.
pub const SPREAD: Duration = Duration::from_hours(1);

/// What the Lease holder has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Take the expired authorities out.
    Drop,
    /// Make a new authority.
    Add,
    /// Write this bundle.
    Publish(String),
    /// The bundle holds all authorities: write down since when.
    Stamp,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Drop => "taking out what has expired",
            Self::Add => "making a new one",
            Self::Publish(_) => "publishing the bundle",
            Self::Stamp => "noting that the bundle is published",
        })
    }
}

/// The next step, given the published bundle; nothing when all is as it should be.
pub fn step(authorities: &[Authority], bundle: Option<&str>, now: Timestamp) -> Option<Step> {
    if authorities.iter().any(|authority| authority.not_after <= now) {
        return Some(Step::Drop);
    }
    if authorities.iter().all(|authority| past_two_thirds(authority.not_before, authority.not_after, now)) {
        return Some(Step::Add);
    }
    let wanted: String = authorities.iter().map(|authority| authority.certificate.as_str()).collect();
    if bundle != Some(&wanted) {
        return Some(Step::Publish(wanted));
    }
    authorities.iter().any(|authority| authority.published.is_none()).then_some(Step::Stamp)
}

/// The authority that signs now: the newest that resolvers know, else the one that they have had the longest time to
/// learn of.
pub fn signer(authorities: &[Authority], now: Timestamp) -> Option<&Authority> {
    let good = || authorities.iter().filter(|authority| now < authority.not_after);
    let known = |authority: &&Authority| {
        let since = authority.published.and_then(|published| published.checked_add(SPREAD).ok());
        since.is_some_and(|since| since <= now)
    };
    let newest = good().filter(known).max_by_key(|authority| authority.not_before);
    newest.or_else(|| good().min_by_key(|authority| authority.not_before))
}

/// Whether two thirds of a life have passed.
pub fn past_two_thirds(from: Timestamp, until: Timestamp, now: Timestamp) -> bool {
    let (life, age): (SignedDuration, SignedDuration) = (until.duration_since(from), now.duration_since(from));
    age.saturating_mul(3) >= life.saturating_mul(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_hours(24);

    fn day(day: u32) -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap() + DAY * day
    }

    fn authority(name: &str, from: u32, published: Option<u32>) -> Authority {
        Authority {
            certificate: name.into(),
            key: String::new(),
            not_before: day(from),
            not_after: day(from + 30),
            published: published.map(day),
        }
    }

    #[test]
    fn the_first_start_makes_publishes_and_notes_an_authority() {
        assert_eq!(step(&[], None, day(0)), Some(Step::Add));
        let unpublished = [authority("a", 0, None)];
        assert_eq!(step(&unpublished, None, day(0)), Some(Step::Publish("a".into())));
        assert_eq!(step(&unpublished, Some("a"), day(0)), Some(Step::Stamp));
        assert_eq!(step(&[authority("a", 0, Some(0))], Some("a"), day(0)), None);
    }

    #[test]
    fn the_next_comes_after_two_thirds_and_the_old_one_stays_until_it_expires() {
        let old = authority("a", 0, Some(0));
        assert_eq!(step(std::slice::from_ref(&old), Some("a"), day(19)), None);
        assert_eq!(step(std::slice::from_ref(&old), Some("a"), day(20)), Some(Step::Add));
        let both = [old, authority("b", 20, Some(20))];
        assert_eq!(step(&both, Some("a"), day(20)), Some(Step::Publish("ab".into())));
        assert_eq!(step(&both, Some("ab"), day(29)), None);
        assert_eq!(step(&both, Some("ab"), day(30)), Some(Step::Drop));
        assert_eq!(step(&both[1..], Some("ab"), day(30)), Some(Step::Publish("b".into())));
    }

    #[test]
    fn a_bundle_that_somebody_has_changed_is_written_again() {
        assert_eq!(step(&[authority("a", 0, Some(0))], Some(""), day(1)), Some(Step::Publish("a".into())));
    }

    #[test]
    fn the_newest_signs_once_it_has_spread() {
        let both = [authority("a", 0, Some(0)), authority("b", 20, Some(20))];
        let signs = |authorities: &[Authority], now| signer(authorities, now).map(|one| one.certificate.clone());
        assert_eq!(signs(&both, day(20)), Some("a".into()));
        assert_eq!(signs(&both, day(20) + SPREAD), Some("b".into()));
        assert_eq!(signs(&[authority("a", 0, None)], day(0)), Some("a".into()), "there is no other");
        assert_eq!(signs(&[authority("a", 0, Some(0)), authority("b", 20, None)], day(25)), Some("a".into()));
        assert_eq!(signs(&both[..1], day(30)), None, "expired");
    }
}
