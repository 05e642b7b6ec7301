//! Whether this replica has seen why a target is intercepted. Part of the decision: pure.
//!
//! Each watch brings its objects in its own time, so that another replica may have seen more: its word stands until this one
//! can know better.

use std::time::{Duration, Instant};

/// For this long a target stays intercepted by another replica's word.
pub(super) const UNEXPLAINED_MAX: Duration = Duration::from_secs(2);

/// An interception that the status tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interception {
    /// The target slept, or was about to, or was not ready.
    Explained,
    /// Nothing of that was seen since the status says so.
    Unexplained(Instant),
}

/// What is known now; `None`: the status tells of no interception.
pub(super) fn note(
    before: Option<Interception>,
    intercepted: bool,
    explained: bool,
    now: Instant,
) -> Option<Interception> {
    if !intercepted {
        None
    } else if explained {
        Some(Interception::Explained)
    } else {
        before.or(Some(Interception::Unexplained(now)))
    }
}
