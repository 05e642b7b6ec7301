//! Signals: the first SIGTERM or SIGINT asks the program to end, the second ends it at once.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What a shell reports for a program that SIGINT has ended.
const INTERRUPTED: i32 = 130;

/// A token that the first signal cancels. Call once, within a runtime; fails when signals cannot be handled.
pub fn on_signal() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let asked = token.clone();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let first = next().await;
        tracing::info!(signal = first, "shutting down");
        asked.cancel();
        let second = next().await;
        tracing::warn!(signal = second, "second signal: ending at once");
        std::process::exit(INTERRUPTED);
    });
    Ok(token)
}

/// Waits until every task of `tasks` has ended, for `deadline` at most. Returns how many are left.
pub async fn drain(tasks: &TaskTracker, deadline: Duration) -> usize {
    tasks.close();
    match tokio::time::timeout(deadline, tasks.wait()).await {
        Ok(()) => 0,
        Err(_) => tasks.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_waits_for_tasks_and_counts_those_left() {
        let tasks = TaskTracker::new();
        tasks.spawn(async {});
        assert_eq!(drain(&tasks, Duration::from_mins(1)).await, 0);
        tasks.spawn(std::future::pending::<()>());
        assert_eq!(drain(&tasks, Duration::ZERO).await, 1);
    }
}
