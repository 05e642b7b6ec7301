//! Errors told to a Sentry server, where one is named: what is logged as an error, with its fields, and panics. Nothing of
//! lower levels goes there, no name of the machine, and no address of a client, which no error that is logged names.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sentry::integrations::tracing::ErrorLayer;
use sentry::types::Dsn;
use sentry::{ClientInitGuard, ClientOptions};
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::registry::LookupSpan;

/// Which Sentry server, and as what. Its `Debug` form is fit for logs: the address holds a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Reporting {
    /// Where to.
    pub dsn: Dsn,
    /// `production`, `staging`…; empty for Sentry's own default.
    pub environment: String,
}

impl fmt::Debug for Reporting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.dsn.host(), self.environment)
    }
}

impl Reporting {
    /// Of a DSN and an environment as users write them; none without a DSN.
    pub fn new(dsn: &str, environment: &str) -> Result<Option<Self>, <Dsn as FromStr>::Err> {
        match dsn.trim() {
            "" => Ok(None),
            dsn => Ok(Some(Self { dsn: dsn.parse()?, environment: environment.trim().to_owned() })),
        }
    }

    /// Reports from now on, until the result is dropped, which waits for what is on its way.
    pub fn begin(&self, program: &'static str, version: &str) -> ClientInitGuard {
        sentry::init(self.options(program, version))
    }

    fn options(&self, program: &'static str, version: &str) -> ClientOptions {
        let mut options = ClientOptions::new().release(format!("{program}@{version}")).send_default_pii(false);
        options.dsn = Some(self.dsn.clone());
        if !self.environment.is_empty() {
            options.environment = Some(self.environment.clone().into());
        }
        options.before_send = Some(Arc::new(|mut event| {
            // Neither is set by what we use of the crate; should that change, it stays so.
            (event.user, event.request, event.server_name) = (None, None, None);
            Some(event)
        }));
        options
    }
}

/// What turns logged errors into reports.
pub(crate) fn layer<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    ErrorLayer::new().with_filter(LevelFilter::ERROR)
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use sentry::{Envelope, Hub, Transport};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Default)]
    struct Kept(Mutex<Vec<u8>>);

    impl Transport for Kept {
        fn send_envelope(&self, envelope: Envelope) {
            envelope.to_writer(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).unwrap();
        }
    }

    #[test]
    fn errors_are_reported_with_their_fields_and_nothing_else_is() {
        let reporting = Reporting::new("https://key@sentry.invalid/1", "staging").unwrap().unwrap();
        assert!(!format!("{reporting:?}").contains("key"), "{reporting:?}");
        let kept = Arc::new(Kept::default());
        let options = reporting.options("elasti-test", "1").transport(Arc::clone(&kept));
        let hub = Hub::new(Some(Arc::new(options.into())), Arc::default());
        let subscriber = tracing_subscriber::registry().with(layer());
        Hub::run(Arc::new(hub), || {
            tracing::subscriber::with_default(subscriber, || {
                tracing::warn!("only a warning");
                tracing::error!(namespace = "shop", service = "web", "cannot listen");
            });
        });
        let told = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        for word in ["cannot listen", "shop", "staging", "elasti-test@1"] {
            assert!(told.contains(word), "{word} in {told}");
        }
        for word in ["only a warning", "server_name", "\"user\""] {
            assert!(!told.contains(word), "{word} in {told}");
        }
    }

    #[test]
    fn nothing_is_reported_without_an_address_and_a_wrong_one_is_a_fault() {
        assert_eq!(Reporting::new(" ", "staging").unwrap(), None);
        assert!(Reporting::new("sentry.invalid", "").is_err());
    }
}
