//! The timeline of one wake, put together from the resolver's and the operator's logs and a watch of the pod.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// A wake as it was seen.
pub(super) struct Wake {
    pub(super) answer: String,
    pub(super) phases: Phases,
    /// When the pod's container was seen running.
    pub(super) pod: Option<SystemTime>,
}

/// What the logs say.
#[derive(Debug, PartialEq)]
pub(super) struct Phases {
    /// When the first connection was accepted.
    accepted: SystemTime,
    /// From then.
    notified: Option<Duration>,
    /// When `/scale` had been patched.
    scaled: Option<SystemTime>,
    /// From accepted, when a ready pod was known.
    ready: Option<Duration>,
    /// From accepted, when the connection reached it.
    forwarded: Duration,
}

/// The wake of `service` in the logs, if it is there already.
pub(super) fn read(resolvers: &str, operators: &str, service: &str) -> Option<Phases> {
    let wake = last(resolvers, "wake", &format!("service=\"{service}\""))?;
    let ms = |field: &str| Some(Duration::from_secs_f64(field_of(wake, field)?.parse::<f64>().ok()? / 1e3));
    let forwarded = ms("total_ms")?;
    let scaled = last(operators, "woken", &format!("/{service} ")).and_then(timestamp);
    Some(Phases {
        accepted: timestamp(wake)?.checked_sub(forwarded)?,
        notified: ms("notified_ms"),
        scaled,
        ready: ms("ready_ms"),
        forwarded,
    })
}

/// The last line that says `message` and holds `field`.
fn last<'a>(log: &'a str, message: &str, field: &str) -> Option<&'a str> {
    let matching = log.lines().filter(|line| line.contains(&format!(" {message} ")) && line.contains(field));
    matching.max_by_key(|line| timestamp(line))
}

fn field_of<'a>(line: &'a str, field: &str) -> Option<&'a str> {
    line.split(' ').find_map(|word| word.strip_prefix(field)?.strip_prefix('=')).map(|value| value.trim_matches('"'))
}

/// The runtime's time of a line that `kubectl logs --prefix --timestamps` has printed.
fn timestamp(line: &str) -> Option<SystemTime> {
    let text = line.split(' ').nth(1)?;
    Some(text.parse::<jiff::Timestamp>().ok()?.into())
}

/// Notes when a pod's container runs.
pub(super) struct PodWatch {
    child: Child,
    reader: JoinHandle<Option<SystemTime>>,
}

impl PodWatch {
    pub(super) fn start(mut kubectl: Command, namespace: &str, app: &str) -> Result<Self> {
        let mut child = kubectl
            .args(["-n", namespace, "get", "pods", "-l", &format!("app={app}"), "--watch"])
            .args(["-o", "jsonpath={.status.containerStatuses[0].state}{\"\\n\"}"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdout = child.stdout.take().context("the output is piped")?;
        let reader = std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.find(|line| line.contains("running")).map(|_| SystemTime::now())
        });
        Ok(Self { child, reader })
    }

    /// When the container was seen running.
    pub(super) fn stop(mut self) -> Option<SystemTime> {
        // It may have ended by itself.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        self.reader.join().ok().flatten()
    }
}

/// The wake as text, each phase with the time since the connection was accepted.
pub(super) fn table(wake: &Wake, bare: Duration) -> String {
    let phases = &wake.phases;
    let since = |moment: SystemTime| moment.duration_since(phases.accepted).unwrap_or_default();
    let rows = [
        ("accepted", Some(Duration::ZERO), "the resolver holds the connection"),
        ("notified", phases.notified, "the operator knows"),
        ("scaled", phases.scaled.map(since), "the target's /scale is patched to 1"),
        ("pod started", wake.pod.map(since), "its container runs, as the API server says"),
        ("ready", phases.ready, "its readiness probe has succeeded"),
        ("forwarded", Some(phases.forwarded), "the connection reaches the pod"),
    ];
    let mut lines: Vec<String> = rows
        .into_iter()
        .map(|(phase, at, meaning)| {
            let at = at.map_or_else(|| "?".to_owned(), |at| format!("{:.1}", at.as_secs_f64() * 1e3));
            format!("  {phase:12} {at:>8} ms   {meaning}")
        })
        .collect();
    lines.push(format!(
        "  (a bare scale-up of nginx took {:.1} ms until kubectl saw it ready)",
        bare.as_secs_f64() * 1e3
    ));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn the_logs_tell_the_phases() {
        let resolvers = "[pod/r/resolver] 2026-11-21T08:00:02.500000000Z 2026 INFO elasti: wake namespace=\"d\" service=\"web\" \
                         notified_ms=0.1 ready_ms=900 forwarded_ms=1 total_ms=901 held=1\n";
        let operators = "[pod/o/operator] 2026-11-21T08:00:01.604000000Z 2026 INFO elasti: woken elastiservice=d/web target=web replicas=1\n";
        let phases = read(resolvers, operators, "web").unwrap();
        assert_eq!(phases.accepted, UNIX_EPOCH + Duration::from_millis(1_795_248_001_599));
        assert_eq!(phases.scaled.unwrap().duration_since(phases.accepted).unwrap(), Duration::from_millis(5));
        assert_eq!(phases.forwarded, Duration::from_millis(901));
        assert_eq!(read(resolvers, operators, "cache"), None);
    }
}
