//! When everything is looked at: not before what the last look may have cost has passed since, so that a thousand resolvers that come or go
//! one after the other leave time to talk to them.
//!
//! Pure. Used by [`crate::app`].

use std::time::{Duration, Instant};

/// More than it takes to look at one ElastiService, for each resolver that is connected.
const LOOK: Duration = Duration::from_nanos(200);

/// The longest pause: 10,000 ElastiServices with 1,000 resolvers.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Who has gone is looked after sooner, by this factor: connections may still be sent there.
const GONE_SOONER: u32 = 8;

/// When the next look is due, and when it may be.
#[derive(Debug, Default)]
pub struct Pace {
    due: Option<Instant>,
    /// The last look, and the pause after it.
    last: Option<(Instant, Duration)>,
}

impl Pace {
    /// There is something to look at.
    pub fn wanted(&mut self, now: Instant) {
        self.want(1, now);
    }

    /// A resolver has gone.
    pub fn gone(&mut self, now: Instant) {
        self.want(GONE_SOONER, now);
    }

    fn want(&mut self, sooner: u32, now: Instant) {
        let next = self.last.map_or(now, |(last, pause)| (last + pause / sooner).max(now));
        self.due = Some(self.due.map_or(next, |due| due.min(next)));
    }

    /// When everything is to be looked at; `None` while nothing is wanted.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// So many ElastiServices are looked at from now on, with so many resolvers.
    pub fn looked(&mut self, elasti_services: usize, resolvers: usize, now: Instant) {
        let pairs = u32::try_from(elasti_services.saturating_mul(resolvers)).unwrap_or(u32::MAX);
        self.due = None;
        self.last = Some((now, LOOK.saturating_mul(pairs).min(PAUSE_MAX)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_look_is_at_once_and_the_next_when_there_has_been_time_for_it() {
        let (now, mut pace) = (Instant::now(), Pace::default());
        assert_eq!(pace.due(), None);
        pace.wanted(now);
        assert_eq!(pace.due(), Some(now));
        pace.looked(10_000, 100, now);
        assert_eq!(pace.due(), None);
        pace.wanted(now);
        pace.wanted(now + Duration::from_millis(100));
        assert_eq!(pace.due(), Some(now + Duration::from_millis(200)));
        pace.looked(10, 10, now);
        pace.wanted(now + Duration::from_secs(1));
        assert_eq!(pace.due(), Some(now + Duration::from_secs(1)), "where there is little, nothing waits");
        pace.looked(usize::MAX, 2, now);
        pace.wanted(now);
        assert_eq!(pace.due(), Some(now + PAUSE_MAX));
        pace.gone(now);
        pace.wanted(now);
        assert_eq!(pace.due(), Some(now + PAUSE_MAX / GONE_SOONER), "who has gone is not waited for as long");
        pace.gone(now + PAUSE_MAX);
        assert_eq!(pace.due(), Some(now + PAUSE_MAX / GONE_SOONER), "what is due stays so");
    }
}
