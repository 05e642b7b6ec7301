//! Until when a resolver that is not connected may only not have come yet.
//!
//! Pure. After a restart of the operator or a change of its leader a thousand resolvers come one after the other, for seconds; who is taken
//! out of the slices meanwhile is put into them again a moment later, and each of that is a write for every ElastiService. Who has been
//! there and is gone is not waited for. Kept by [`super::Resolvers`], asked by [`crate::plan`].

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For this long after one has come others may follow: a resolver that has found nobody for a while tries every five seconds.
pub const GRACE: Duration = Duration::from_secs(5);

/// For this long at most, though they keep coming: as they do for minutes while the DaemonSet is rolled out.
pub const GRACE_MAX: Duration = Duration::from_secs(15);

/// Addresses of the gone that are remembered: of two resolvers for each node of the largest cluster that Kubernetes supports (5,000), with
/// two addresses each. Beyond that all are forgotten: they are waited for as if they had not come.
const GONE_MAX: usize = 20_000;

/// When resolvers came, and who has gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Since when this replica lets them in; `None` while it does not.
    pub open_since: Option<Instant>,
    /// When the last one came that had not been there; not a new stream of one that was.
    pub last: Option<Instant>,
    /// Addresses of those that were there and have gone. Shared: every look at an ElastiService takes a copy.
    pub gone: Arc<BTreeSet<IpAddr>>,
}

impl Arrivals {
    /// A resolver with these addresses has come; `new` if it was not there.
    pub(super) fn came(&mut self, addresses: &[IpAddr], new: bool, now: Instant) {
        if new {
            self.last = Some(now);
        }
        if addresses.iter().any(|address| self.gone.contains(address)) {
            Arc::make_mut(&mut self.gone).retain(|address| !addresses.contains(address));
        }
    }

    /// A resolver with these addresses has gone.
    pub(super) fn went(&mut self, addresses: &[IpAddr]) {
        let gone = Arc::make_mut(&mut self.gone);
        if gone.len() >= GONE_MAX {
            gone.clear();
        }
        gone.extend(addresses);
    }

    /// When all are there that are going to come, to a replica that has led for this long.
    pub fn over(&self, leading_since: Instant) -> Instant {
        let begun = self.open_since.map_or(leading_since, |open| open.max(leading_since));
        let last = self.last.map_or(begun, |last| last.max(begun));
        (last + GRACE).min(begun + GRACE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_waited_for_from_when_they_can_come_and_for_as_long_as_they_do() {
        let leads = Instant::now();
        let after = |seconds| leads + Duration::from_secs(seconds);
        let over = |open_since, last| Arrivals { open_since, last, ..Arrivals::default() }.over(leads);
        assert_eq!(over(None, None), after(5));
        assert_eq!(over(Some(leads.checked_sub(GRACE_MAX).unwrap()), Some(leads)), after(5), "others led before");
        assert_eq!(over(Some(after(3)), None), after(8), "caches were filled first");
        assert_eq!(over(Some(after(3)), Some(after(7))), after(12));
        assert_eq!(over(Some(after(3)), Some(after(600))), after(18), "a rollout");
    }

    #[test]
    fn who_comes_again_is_not_gone_and_no_number_of_the_gone_is_remembered_for_ever() {
        let (now, mut arrivals) = (Instant::now(), Arrivals::default());
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        arrivals.came(&[address(1)], true, now);
        arrivals.went(&[address(1), address(2)]);
        assert_eq!(arrivals.gone.len(), 2);
        arrivals.came(&[address(1)], false, now + GRACE);
        assert_eq!((arrivals.gone.iter().copied().collect::<Vec<_>>(), arrivals.last), (vec![address(2)], Some(now)));
        for number in 0..=u32::try_from(GONE_MAX).unwrap() {
            arrivals.went(&[address(number)]);
        }
        assert!(arrivals.gone.len() <= GONE_MAX && arrivals.gone.contains(&address(u32::try_from(GONE_MAX).unwrap())));
    }
}
