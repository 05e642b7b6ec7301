//! A wake as the logs of resolver and operator tell it. Pure.

use std::time::{Duration, SystemTime};

/// What the resolver that held the connection says. Times are from accept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Held {
    /// When the connection was accepted.
    pub(super) accepted: SystemTime,
    /// Until the news was sent.
    pub(super) notified: Option<Duration>,
    /// Until the address of the pod was known.
    pub(super) addressed: Option<Duration>,
    /// Until the pod was known to be ready.
    pub(super) ready: Option<Duration>,
    /// Until the connection to it stood.
    pub(super) forwarded: Duration,
}

/// What the operator says that has patched `/scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Woken {
    /// When the news had come.
    pub(super) told: SystemTime,
    /// When the patch was handed to the client.
    pub(super) sent: SystemTime,
    /// When the API server had answered.
    pub(super) scaled: SystemTime,
}

/// The first wake of a Service in a resolver's log that was accepted at this time or later.
pub(super) fn held(lines: &[String], namespace: &str, service: &str, from: SystemTime) -> Option<Held> {
    let names = (format!("namespace=\"{namespace}\""), format!("service=\"{service}\""));
    lines.iter().filter(|line| line.contains(&names.0) && line.contains(&names.1)).find_map(|line| {
        let forwarded = millis(line, "total_ms")?;
        let accepted = timestamp(line)?.checked_sub(forwarded)?;
        (accepted >= from).then(|| Held {
            accepted,
            notified: millis(line, "notified_ms"),
            addressed: millis(line, "addressed_ms"),
            ready: millis(line, "ready_ms"),
            forwarded,
        })
    })
}

/// The first patch of an ElastiService in an operator's log that was answered at this time or later.
pub(super) fn woken(lines: &[String], namespace: &str, elasti: &str, from: SystemTime) -> Option<Woken> {
    let name = format!("elastiservice={namespace}/{elasti} ");
    lines.iter().filter(|line| line.contains(&name)).find_map(|line| {
        let (scaled, after) = (timestamp(line)?, millis(line, "after_ms")?);
        let told = scaled.checked_sub(after)?;
        (scaled >= from).then_some(Woken { told, sent: told + millis(line, "sent_ms")?, scaled })
    })
}

fn millis(line: &str, field: &str) -> Option<Duration> {
    let value = line.split(' ').find_map(|word| word.strip_prefix(field)?.strip_prefix('='))?;
    Duration::try_from_secs_f64(value.parse::<f64>().ok()? / 1e3).ok()
}

/// The program's own time of a line, to the microsecond.
fn timestamp(line: &str) -> Option<SystemTime> {
    Some(line.split(' ').next()?.parse::<jiff::Timestamp>().ok()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SystemTime {
        text.parse::<jiff::Timestamp>().unwrap().into()
    }

    #[test]
    fn the_wake_that_is_meant_is_found_and_its_times_are_put_on_one_clock() {
        let resolver = |time: &str| {
            format!(
                "2026-11-21T08:00:{time}Z  INFO elasti_resolver::service: wake namespace=\"n\" service=\"web\" \
                 notified_ms=0.05 addressed_ms=200 ready_ms=300 forwarded_ms=1 total_ms=301 held=1"
            )
        };
        let lines = [resolver("02.500000"), resolver("09.301000")];
        let held = held(&lines, "n", "web", at("2026-11-21T08:00:08Z")).unwrap();
        assert_eq!(held.accepted, at("2026-11-21T08:00:09Z"));
        assert_eq!((held.notified, held.ready), (Some(Duration::from_micros(50)), Some(Duration::from_millis(300))));
        assert_eq!(super::held(&lines, "n", "we", at("2026-11-21T08:00:00Z")), None);
    }

    #[test]
    fn the_patch_is_told_with_when_it_was_sent() {
        let lines = ["2026-11-21T08:00:09.010000Z  INFO elasti_operator::controller::apply: woken \
                      elastiservice=n/web target=web replicas=1 sent_ms=0.5 after_ms=4.5"
            .to_owned()];
        let woken = woken(&lines, "n", "web", at("2026-11-21T08:00:09Z")).unwrap();
        let since = |moment: SystemTime| moment.duration_since(woken.told).unwrap();
        assert_eq!((since(woken.sent), since(woken.scaled)), (Duration::from_micros(500), Duration::from_micros(4500)));
    }
}
