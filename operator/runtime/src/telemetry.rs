//! Logs: text or JSON lines on stderr, with a level that can be changed while the program runs.

use std::io::{self, IsTerminal as _};
use std::str::FromStr;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::reporting;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line, for machines.
    Json,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("must be 'text' or 'json'"),
        }
    }
}

/// Which events are logged, as `tracing_subscriber::EnvFilter` reads it: `info`, `elasti_resolver=debug,info`…
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level(String);

impl FromStr for Level {
    type Err = tracing_subscriber::filter::ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        EnvFilter::try_new(text).map(|_| Self(text.to_owned()))
    }
}

impl Default for Level {
    fn default() -> Self {
        Self("info".to_owned())
    }
}

/// Changes the level of a running program.
#[derive(Clone, Debug)]
pub struct Levels(reload::Handle<EnvFilter, Registry>);

impl Levels {
    /// The level in force; empty when the subscriber is gone.
    pub fn current(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Puts another level in force; fails only when the subscriber is gone.
    pub fn set(&self, level: &Level) -> Result<(), reload::Error> {
        self.0.reload(EnvFilter::new(&level.0))
    }
}

/// A subscriber that is not installed yet; tests use it by itself. Its errors go to Sentry while
/// [`crate::reporting::Reporting::begin`] is in force.
pub fn subscriber(format: Format, level: &Level) -> (impl tracing::Subscriber + Send + Sync + use<>, Levels) {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(&level.0));
    let lines = match format {
        Format::Text => fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).boxed(),
        Format::Json => fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed(),
    };
    (Registry::default().with(filter).with(lines).with(reporting::layer()), Levels(handle))
}

/// Logs the program's events from now on. Fails when logs are set up already.
pub fn init(format: Format, level: &Level) -> Result<Levels, TryInitError> {
    let (subscriber, levels) = subscriber(format, level);
    subscriber.try_init()?;
    Ok(levels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_changes_while_events_flow() {
        let (subscriber, levels) = subscriber(Format::Json, &Level::default());
        tracing::subscriber::with_default(subscriber, || {
            assert!(!tracing::enabled!(tracing::Level::DEBUG));
            levels.set(&"debug".parse().unwrap()).unwrap();
            assert!(tracing::enabled!(tracing::Level::DEBUG));
            assert_eq!(levels.current(), "debug");
        });
    }

    #[test]
    fn bad_names_are_refused() {
        assert!("loud=very".parse::<Level>().is_err());
        assert!("yaml".parse::<Format>().is_err());
    }
}
