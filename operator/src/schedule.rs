//! `enabledPeriod`: when a target may sleep.
//!
//! Pure. A period begins at each time that the cron expression names, in UTC, and lasts for its duration.

use elasti_api::v1alpha1::{ElastiServiceSpec, EnabledPeriod, duration};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Whether the target must not be put to sleep now: outside its period, or the period is not one. Bad input never sleeps a
/// Service; [`fault`] says what is wrong with it.
pub fn closed(spec: &ElastiServiceSpec, now: Timestamp) -> bool {
    spec.enabled_period.as_ref().is_some_and(|period| !open(period, now).unwrap_or(false))
}

/// What is wrong with a period, with cause and cure.
pub fn fault(period: &EnabledPeriod) -> Option<String> {
    open(period, Timestamp::UNIX_EPOCH).err()
}

fn open(period: &EnabledPeriod, now: Timestamp) -> Result<bool, String> {
    let lasts = duration(&period.duration)
        .ok_or_else(|| format!("enabledPeriod.duration {:?} is not a duration such as 8h", period.duration))?;
    let cron: cronexpr::Crontab = cronexpr::parse_crontab(&format!("{} UTC", period.schedule))
        .map_err(|error| format!("enabledPeriod.schedule {:?} is not a cron expression: {error}", period.schedule))?;
    let start = now.to_zoned(TimeZone::UTC).checked_sub(lasts).map_err(|error| error.to_string())?;
    // The first beginning after (now - duration): if it is not after now, its period is open.
    let begins = cron.find_next(start.timestamp()).map_err(|error| error.to_string())?;
    Ok(begins.timestamp() <= now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed_at(schedule: &str, duration: &str, now: &str) -> bool {
        let period = EnabledPeriod { schedule: schedule.into(), duration: duration.into() };
        let spec = ElastiServiceSpec { enabled_period: Some(period), ..ElastiServiceSpec::default() };
        closed(&spec, now.parse().unwrap())
    }

    #[test]
    fn a_period_is_open_from_its_beginning_for_its_duration() {
        let weekdays = "0 9 * * 1-5";
        // 2026-11-20 is a Friday.
        assert!(!closed_at(weekdays, "8h", "2026-11-20T09:00:00Z"));
        assert!(!closed_at(weekdays, "8h", "2026-11-20T16:59:59Z"));
        assert!(closed_at(weekdays, "8h", "2026-11-20T17:00:00Z"));
        assert!(closed_at(weekdays, "8h", "2026-11-21T10:00:00Z"));
        assert!(!closed_at("0 22 * * *", "4h", "2026-11-21T01:30:00Z"), "across midnight");
        assert!(!closed_at("0 0 * * *", "24h", "2026-11-21T12:00:00Z"), "the default is always open");
    }

    #[test]
    fn a_bad_period_never_sleeps_a_service_and_is_named() {
        assert!(closed_at("whenever", "8h", "2026-11-20T10:00:00Z"));
        assert!(closed_at("0 9 * * *", "soon", "2026-11-20T10:00:00Z"));
        let bad = EnabledPeriod { schedule: "whenever".into(), duration: "8h".into() };
        assert!(fault(&bad).unwrap().contains("whenever"));
        assert_eq!(fault(&EnabledPeriod { schedule: "0 9 * * *".into(), duration: "8h".into() }), None);
    }
}
