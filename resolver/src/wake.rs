//! The timeline of one wake of a Service: from the first held connection to the first forwarded one. Pure.

use std::time::{Duration, Instant};

/// From the moment that held connections left zero until they are zero again.
#[derive(Debug)]
pub struct Episode {
    accepted: Instant,
    notified: Option<Instant>,
    addressed: Option<Instant>,
    ready: Option<Instant>,
    told: bool,
}

/// How long the parts of a wake took. Parts that did not happen, or did before the connection came, are absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// From accept until the first operator replica was sent the news.
    pub notified: Option<Duration>,
    /// From accept until the address of a pod was known that may be asked whether it is ready.
    pub addressed: Option<Duration>,
    /// From accept until a backend was known.
    pub ready: Option<Duration>,
    /// From then until a connection to a backend stood.
    pub forwarded: Option<Duration>,
    /// From accept until a connection to a backend stood.
    pub total: Duration,
}

impl Episode {
    /// Begins with the first connection that is held.
    pub fn new(accepted: Instant) -> Self {
        Self { accepted, notified: None, addressed: None, ready: None, told: false }
    }

    /// An operator replica was sent the news; only the first counts.
    pub fn notified(&mut self, at: Instant) {
        self.notified.get_or_insert(at);
    }

    /// The address of a starting pod is known; only the first counts.
    pub fn addressed(&mut self, at: Instant) {
        self.addressed.get_or_insert(at);
    }

    /// A backend is known; only the first counts.
    pub fn ready(&mut self, at: Instant) {
        self.ready.get_or_insert(at);
    }

    /// A held connection reached a backend: the timeline, once.
    pub fn forwarded(&mut self, at: Instant) -> Option<Timeline> {
        if std::mem::replace(&mut self.told, true) {
            return None;
        }
        let since = |moment: Instant| moment.saturating_duration_since(self.accepted);
        Some(Timeline {
            notified: self.notified.map(since),
            addressed: self.addressed.map(since),
            ready: self.ready.map(since),
            forwarded: self.ready.map(|ready| at.saturating_duration_since(ready)),
            total: since(at),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_is_told_once_with_its_parts() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut episode = Episode::new(start);
        episode.notified(at(1));
        episode.notified(at(2));
        episode.addressed(at(200));
        episode.addressed(at(250));
        episode.ready(at(300));
        episode.ready(at(400));
        let millis = Duration::from_millis;
        assert_eq!(
            episode.forwarded(at(304)),
            Some(Timeline {
                notified: Some(millis(1)),
                addressed: Some(millis(200)),
                ready: Some(millis(300)),
                forwarded: Some(millis(4)),
                total: millis(304)
            })
        );
        assert_eq!(episode.forwarded(at(305)), None);
    }
}
