//! Until when a resolver that is not connected may only not have come yet.
//!
//! Pure. After a restart of the operator or a change of its leader a thousand resolvers come one after the other, for seconds; who is taken
//! out of the slices meanwhile is put into them again a moment later, and each of that is a write for every ElastiService. Kept by
//! [`super::Resolvers`], asked by [`crate::plan`].

use std::time::{Duration, Instant};

/// For this long after one has come others may follow: a resolver that has found nobody for a while tries every five seconds.
pub const GRACE: Duration = Duration::from_secs(5);

/// For this long at most, though they keep coming: as they do for minutes while the DaemonSet is rolled out.
pub const GRACE_MAX: Duration = Duration::from_secs(30);

/// When resolvers came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Since when this replica lets them in; `None` while it does not.
    pub open_since: Option<Instant>,
    /// When the last one came that had not been there; not a new stream of one that was.
    pub last: Option<Instant>,
}

impl Arrivals {
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
        let over = |open_since, last| Arrivals { open_since, last }.over(leads);
        assert_eq!(over(None, None), after(5));
        assert_eq!(over(Some(leads.checked_sub(GRACE_MAX).unwrap()), Some(leads)), after(5), "others led before");
        assert_eq!(over(Some(after(3)), None), after(8), "caches were filled first");
        assert_eq!(over(Some(after(3)), Some(after(7))), after(12));
        assert_eq!(over(Some(after(3)), Some(after(600))), after(33), "a rollout");
    }
}
