//! What a person sees while a cluster starts, and the one way to wait for something.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Prints steps with the seconds since the start.
pub(super) struct Progress {
    start: Instant,
}

impl Progress {
    /// Starts the clock.
    pub(super) fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// Says that something is done.
    pub(super) fn step(&self, done: &str) {
        eprintln!("[{:5.1} s] {done}", self.start.elapsed().as_secs_f32());
    }
}

/// Polls until the condition holds; an error of the condition ends the wait at once.
pub(super) fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    // Short beside a start of seconds, long beside the condition's own cost of some 50 ms.
    const INTERVAL: Duration = Duration::from_millis(100);
    let start = Instant::now();
    while !condition()? {
        if start.elapsed() > limit {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        sleep(INTERVAL);
    }
    Ok(())
}
