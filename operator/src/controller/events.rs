//! Events: what people read of an ElastiService beside its status.
//!
//! Written in the background by the [`Controller`], a few at a time. Invariants: what clients wait for comes first; a lost event harms
//! nobody; what is remembered of events to count repetitions is limited.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use elasti_api::v1alpha1::ElastiService;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tokio::sync::Semaphore;

use super::{Controller, REPORTER};

/// Events that are written at once.
const AT_ONCE: usize = 16;

/// Events after which those before are forgotten: a repetition is then an event of its own. The recorder keeps a copy of each for
/// minutes and goes over all of them for every further one.
const REMEMBERED: usize = 1000;

/// For so long an event waits where clients wait too: a hundred wakes in a second keep the API server busy enough.
const PATIENCE: Duration = Duration::from_secs(1);

/// Writes events.
pub(super) struct Events {
    client: Client,
    reporter: Reporter,
    recorder: Mutex<(Recorder, usize)>,
    turns: Semaphore,
}

impl Events {
    /// Writes them in the name of this replica.
    pub(super) fn new(client: Client, replica: String) -> Self {
        let reporter = Reporter { controller: REPORTER.to_owned(), instance: Some(replica) };
        let recorder = Mutex::new((Recorder::new(client.clone(), reporter.clone()), 0));
        Self { client, reporter, recorder, turns: Semaphore::new(AT_ONCE) }
    }

    fn recorder(&self) -> Recorder {
        // A recorder and a count of what it has written: any two go together.
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        let (current, written) = &mut *recorder;
        if *written >= REMEMBERED {
            (*current, *written) = (Recorder::new(self.client.clone(), self.reporter.clone()), 0);
        }
        *written += 1;
        current.clone()
    }
}

/// An event.
pub(super) fn event(warning: bool, reason: &str, message: String) -> Event {
    Event {
        type_: if warning { EventType::Warning } else { EventType::Normal },
        reason: reason.to_owned(),
        note: Some(message),
        action: "Reconcile".to_owned(),
        secondary: None,
    }
}

impl Controller {
    /// Records an event.
    pub(super) fn record(&self, elasti: &ElastiService, event: Event) {
        let (events, reference) = (Arc::clone(&self.events), elasti.object_ref(&()));
        let uid = elasti.metadata.uid.as_deref().unwrap_or_default();
        let patience = if self.parts.resolvers.held_since(uid).is_some() { PATIENCE } else { Duration::ZERO };
        self.parts.tasks.spawn(async move {
            tokio::time::sleep(patience).await;
            let Ok(_turn) = events.turns.acquire().await else { return };
            if let Err(error) = Box::pin(events.recorder().publish(&event, &reference)).await {
                tracing::debug!(%error, "cannot record an event");
            }
        });
    }
}
