//! `enabledPeriod`: when a target may sleep.
//!
//! Pure. A period begins at each time that the cron expression names, in its time zone, and lasts for its duration. A time that
//! the clocks skip begins no period; one that they repeat begins two, of which the second goes on from the first.

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

/// The time zone of a period, and its cron expression without one. The prefixes are those of KubeElasti's cron library.
fn zone(period: &EnabledPeriod) -> Result<(&str, &str), String> {
    let schedule = period.schedule.trim();
    let prefixed = ["CRON_TZ=", "TZ="].iter().find_map(|prefix| schedule.strip_prefix(prefix));
    let (prefix, cron) = match prefixed {
        Some(rest) => rest.split_once(char::is_whitespace).map_or((Some(rest), ""), |(zone, cron)| (Some(zone), cron)),
        None => (None, schedule),
    };
    let zone = match (prefix, period.time_zone.as_deref()) {
        (Some(prefix), Some(field)) if prefix != field => {
            return Err(format!("enabledPeriod.schedule names the time zone {prefix} and timeZone {field}; name one"));
        }
        (prefix, field) => prefix.or(field).unwrap_or("UTC"),
    };
    Ok((zone, cron))
}

fn open(period: &EnabledPeriod, now: Timestamp) -> Result<bool, String> {
    let lasts = duration(&period.duration)
        .ok_or_else(|| format!("enabledPeriod.duration {:?} is not a duration such as 8h", period.duration))?;
    let (zone, cron) = zone(period)?;
    TimeZone::get(zone).map_err(|_| {
        format!("enabledPeriod: {zone:?} is not a time zone; write its IANA name, such as Europe/Berlin")
    })?;
    // A sixth field would be taken for the time zone.
    // KubeElasti's cron library takes `?` for `*`.
    let fields: Vec<&str> = cron.split_whitespace().map(|field| if field == "?" { "*" } else { field }).collect();
    if fields.len() != 5 {
        return Err(format!("enabledPeriod.schedule {:?} has {} fields, not 5", period.schedule, fields.len()));
    }
    let cron: cronexpr::Crontab = cronexpr::parse_crontab(&format!("{} {zone}", fields.join(" ")))
        .map_err(|error| format!("enabledPeriod.schedule {:?} is not a cron expression: {error}", period.schedule))?;
    // A duration is a span of time, whatever clocks on walls do meanwhile.
    let start = now.checked_sub(lasts).map_err(|error| format!("enabledPeriod.duration: {error}"))?;
    // The first beginning after (now - duration): if it is not after now, its period is open.
    let begins = cron.find_next(start).map_err(|error| format!("enabledPeriod.schedule: {error}"))?;
    Ok(begins.timestamp() <= now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn period(schedule: &str, duration: &str, zone: Option<&str>) -> EnabledPeriod {
        EnabledPeriod { schedule: schedule.into(), duration: duration.into(), time_zone: zone.map(str::to_owned) }
    }

    fn closed_in(zone: Option<&str>, schedule: &str, duration: &str, now: &str) -> bool {
        let period = Some(period(schedule, duration, zone));
        let spec = ElastiServiceSpec { enabled_period: period, ..ElastiServiceSpec::default() };
        closed(&spec, now.parse().unwrap())
    }

    fn closed_at(schedule: &str, duration: &str, now: &str) -> bool {
        closed_in(None, schedule, duration, now)
    }

    /// Open in `[from, until)` and closed a second before and from `until` on.
    fn open_between(zone: Option<&str>, schedule: &str, duration: &str, from: &str, until: &str) {
        let times = |at: &str| {
            let at: Timestamp = at.parse().unwrap();
            (at.checked_sub(std::time::Duration::from_secs(1)).unwrap().to_string(), at.to_string())
        };
        let ((before, first), (last, after)) = (times(from), times(until));
        let closed = [&before, &first, &last, &after].map(|at| closed_in(zone, schedule, duration, at));
        assert_eq!(closed, [true, false, false, true], "{schedule} of {zone:?} from {from} to {until}");
    }

    #[test]
    fn a_period_is_open_from_its_beginning_for_its_duration() {
        let weekdays = "0 9 * * 1-5";
        // 2026-11-20 is a Friday.
        open_between(None, weekdays, "8h", "2026-11-20T09:00:00Z", "2026-11-20T17:00:00Z");
        assert!(closed_at(weekdays, "8h", "2026-11-21T10:00:00Z"), "a Saturday");
        assert!(!closed_at("0 0 * * *", "24h", "2026-11-21T12:00:00Z"), "the default is always open");
        assert!(!closed_at("0 9 1 * *", "2s", "2026-12-01T09:00:01Z"), "shorter than a minute");
    }

    #[test]
    fn a_period_goes_on_across_midnight_months_and_years() {
        open_between(None, "0 22 * * *", "4h", "2026-11-20T22:00:00Z", "2026-11-21T02:00:00Z");
        open_between(None, "30 23 31 12 *", "1h", "2026-12-31T23:30:00Z", "2027-01-01T00:30:00Z");
        open_between(None, "0 0 29 2 *", "48h", "2028-02-29T00:00:00Z", "2028-03-02T00:00:00Z");
        open_between(None, "0 20 * * 5", "60h", "2026-11-20T20:00:00Z", "2026-11-23T08:00:00Z");
    }

    #[test]
    fn periods_that_overlap_are_one() {
        assert!(!closed_at("0 */2 * * *", "3h", "2026-11-20T11:59:59Z"));
        assert!(!closed_at("0 */2 * * *", "3h", "2026-11-20T12:00:00Z"));
    }

    #[test]
    fn a_period_follows_the_clocks_of_its_time_zone() {
        let zone = Some("Europe/Berlin");
        open_between(zone, "0 9 * * *", "8h", "2026-01-15T08:00:00Z", "2026-01-15T16:00:00Z");
        open_between(zone, "0 9 * * *", "8h", "2026-07-15T07:00:00Z", "2026-07-15T15:00:00Z");
        for prefix in ["CRON_TZ", "TZ"] {
            let schedule = format!("{prefix}=Asia/Kolkata 0 9 * * *");
            open_between(None, &schedule, "1h", "2026-07-15T03:30:00Z", "2026-07-15T04:30:00Z");
        }
        // The days of the week are those of the zone too: Monday morning there is Sunday evening in UTC.
        open_between(Some("Pacific/Auckland"), "0 8 * * 1", "1h", "2026-07-12T20:00:00Z", "2026-07-12T21:00:00Z");
    }

    #[test]
    fn clocks_that_are_put_forward_or_back_within_a_period_do_not_change_how_long_it_lasts() {
        let zone = Some("Europe/Berlin");
        // 2026-03-29: 02:00 becomes 03:00. 2026-10-25: 03:00 becomes 02:00.
        open_between(zone, "0 22 * * *", "8h", "2026-03-28T21:00:00Z", "2026-03-29T05:00:00Z");
        open_between(zone, "0 22 * * *", "8h", "2026-10-24T20:00:00Z", "2026-10-25T04:00:00Z");
        // The next day begins at its own 22:00 again.
        open_between(zone, "0 22 * * *", "8h", "2026-03-29T20:00:00Z", "2026-03-30T04:00:00Z");
    }

    #[test]
    fn a_beginning_that_clocks_skip_is_left_out_and_one_that_they_repeat_comes_twice() {
        let zone = Some("Europe/Berlin");
        for hour in 0..4 {
            assert!(closed_in(zone, "30 2 * * *", "30m", &format!("2026-03-29T0{hour}:45:00Z")), "{hour}");
        }
        for (at, closed) in [("00:29", true), ("00:45", false), ("01:15", true), ("01:45", false), ("02:45", true)] {
            assert_eq!(closed_in(zone, "30 2 * * *", "30m", &format!("2026-10-25T{at}:00Z")), closed, "{at}");
        }
    }

    #[test]
    fn a_question_mark_is_an_asterisk_as_in_kubeelasti() {
        open_between(None, "0 20 ? * 1-5", "1h", "2026-01-02T20:00:00Z", "2026-01-02T21:00:00Z");
    }

    #[test]
    fn a_bad_period_never_sleeps_a_service_and_is_named() {
        for (bad, word) in [
            (period("whenever", "8h", None), "whenever"),
            (period("0 9 * * *", "soon", None), "soon"),
            (period("0 25 * * *", "8h", None), "0 25"),
            (period("0 9 * * * Europe/Berlin", "8h", None), "6 fields"),
            (period("0 9 * * *", "8h", Some("Mars/Olympus")), "Mars/Olympus"),
            (period("TZ=Europe/Berlin 0 9 * * *", "8h", Some("Asia/Tokyo")), "name one"),
            (period("TZ=Europe/Berlin", "8h", None), "0 fields"),
        ] {
            assert!(fault(&bad).unwrap().contains(word), "{bad:?}: {:?}", fault(&bad));
            let spec = ElastiServiceSpec { enabled_period: Some(bad), ..ElastiServiceSpec::default() };
            assert!(closed(&spec, "2026-11-20T10:00:00Z".parse().unwrap()));
        }
        assert_eq!(fault(&period("0 9 * * *", "8h", None)), None);
    }
}
