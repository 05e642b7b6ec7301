//! Whether clients are still held for a target that keeps failing. Pure; [`crate::service`] asks it under its lock.
//!
//! It opens only when clients have waited in vain for minutes, one after the other. While it is open one client at a time
//! is held, so that the operators go on waking the target and somebody notices when it is back; the others get their error
//! at once. It closes when a client reaches the target, and when the target changes in any way.

use std::time::{Duration, Instant};

/// Clients in a row that were held to the end of the hold time, none of them served.
const FAILURES: u32 = 5;

/// How long the target must have failed: a slow start, or an image that is pulled, is no failure.
const FAILING_FOR: Duration = Duration::from_mins(5);

/// The breaker of one Service.
#[derive(Debug, Default)]
pub struct Breaker {
    failures: u32,
    /// Since when the first of them was held.
    since: Option<Instant>,
    open: bool,
}

impl Breaker {
    /// Whether it is open.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Whether one more client may be held where `held` are.
    pub fn admits(&self, held: u32) -> bool {
        !self.open || held == 0
    }

    /// A client was held since `since` in vain, until `now`.
    pub fn failed(&mut self, since: Instant, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        let begun = self.since.map_or(since, |begun| begun.min(since));
        self.since = Some(begun);
        let long = now.saturating_duration_since(begun) >= FAILING_FOR;
        self.open = self.open || self.failures >= FAILURES && long;
    }

    /// The target was reached, or is another one now.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_when_clients_fail_in_a_row_for_minutes_and_holds_one_at_a_time() {
        let (mut breaker, start) = (Breaker::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for number in 0..20 {
            breaker.failed(at(number), at(number + 5));
        }
        assert!(breaker.admits(7), "a start of half a minute is no failure");
        breaker.failed(at(298), at(303));
        assert!(breaker.is_open());
        assert!(breaker.admits(0) && !breaker.admits(1));
        breaker.reset();
        assert!(breaker.admits(1));
        for number in 0..4 {
            breaker.failed(at(400), at(1000 + number));
        }
        assert!(breaker.admits(1), "four are few");
        breaker.failed(at(401), at(1005));
        assert!(!breaker.admits(1));
    }
}
