//! When what could not be read is asked for again. Pure.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::observed::ObjectKey;

/// After the first failure; it doubles with each further one of the same object.
const FIRST: Duration = Duration::from_secs(1);

/// The longest: permissions that were missing are noticed within it.
const LONGEST: Duration = Duration::from_mins(1);

/// Objects that could not be read.
#[derive(Debug, Default)]
pub(super) struct Retries(HashMap<ObjectKey, Retry>);

#[derive(Debug)]
struct Retry {
    wait: Duration,
    due: Instant,
}

impl Retries {
    /// An object could not be read.
    pub(super) fn failed(&mut self, key: ObjectKey, now: Instant) {
        let wait = self.0.get(&key).map_or(FIRST, |before| (before.wait * 2).min(LONGEST));
        self.0.insert(key, Retry { wait, due: now + wait });
    }

    /// An object was read, or need not be read any more.
    pub(super) fn forget(&mut self, key: &ObjectKey) {
        self.0.remove(key);
    }

    /// When the next is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().map(|retry| retry.due).min()
    }

    /// Those that are due.
    pub(super) fn due(&self, now: Instant) -> BTreeSet<ObjectKey> {
        self.0.iter().filter(|(_, retry)| retry.due <= now).map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keeps out a request a second for each target whose `/scale` may not be read.
    #[test]
    fn what_cannot_be_read_is_asked_for_ever_more_slowly_and_disturbs_no_other() {
        let (mut retries, start) = (Retries::default(), Instant::now());
        let (web, shop) = (ObjectKey::new("n", "web"), ObjectKey::new("n", "shop"));
        assert_eq!(retries.next(), None);
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..8 {
            retries.failed(web.clone(), now);
            let due = retries.next().unwrap();
            waits.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        retries.failed(shop.clone(), now);
        assert_eq!(retries.due(now), [web.clone()].into());
        assert_eq!(retries.due(now + FIRST), [web.clone(), shop.clone()].into());
        retries.forget(&web);
        assert_eq!(retries.due(now + FIRST), [shop].into());
        retries.failed(web, now);
        assert_eq!(retries.next(), Some(now + FIRST), "from the beginning again");
    }
}
