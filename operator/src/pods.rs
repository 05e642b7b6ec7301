//! Pods of targets that start, looked at for as long as somebody waits for them.
//!
//! A watch of its own for each ElastiService that wakes, and none for the others: most pods of a cluster are nobody's
//! business here. Why not EndpointSlices: they tell no probes, and come later. Written by the watches, read by the controller.
//! Invariant: what is known of the pods goes with the watch.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::core::Selector;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use tokio_util::task::AbortOnDropHandle;

/// The most watches at once; ElastiServices beyond that wait for their EndpointSlices.
const WATCHES: usize = 256;

/// The most pods of one ElastiService that are kept: the first that is ready ends the wait.
pub const PODS: usize = 16;

/// The pods that are looked at, by the UID of their ElastiService.
#[derive(Default)]
pub struct Pods {
    followed: Mutex<HashMap<String, Followed>>,
}

struct Followed {
    selector: Selected,
    pods: Table,
    _watch: AbortOnDropHandle<()>,
}

type Table = Arc<Mutex<BTreeMap<String, Arc<Pod>>>>;

/// Which pods are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// Their namespace.
    pub namespace: String,
    /// Their labels.
    pub labels: BTreeMap<String, String>,
}

impl Pods {
    /// The pods of an ElastiService that are looked at.
    pub fn of(&self, uid: &str) -> Vec<Arc<Pod>> {
        let table = self.followed().get(uid).map(|followed| Arc::clone(&followed.pods));
        table.map(|table| lock(&table).values().cloned().collect()).unwrap_or_default()
    }

    /// Looks at these pods, or (`None`) at none any more. `changed` is told of every change.
    pub fn follow(
        &self,
        client: &Client,
        uid: &str,
        selected: Option<Selected>,
        changed: impl Fn() + Send + Sync + 'static,
    ) {
        let mut followed = self.followed();
        let Some(selector) = selected else {
            followed.remove(uid);
            return;
        };
        let known = followed.get(uid).is_some_and(|known| known.selector == selector);
        if known || (followed.len() >= WATCHES && !followed.contains_key(uid)) {
            return;
        }
        let pods = Table::default();
        let watch = tokio::spawn(watch(client.clone(), selector.clone(), Arc::clone(&pods), changed));
        followed.insert(uid.to_owned(), Followed { selector, pods, _watch: AbortOnDropHandle::new(watch) });
    }

    /// The ElastiService is gone.
    pub fn forget(&self, uid: &str) {
        self.followed().remove(uid);
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<String, Followed>> {
        lock(&self.followed)
    }
}

/// Every change is one insertion or removal, so a poisoned lock still guards a sound table.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn watch(client: Client, selected: Selected, table: Table, changed: impl Fn() + Send + Sync) {
    let api: Api<Pod> = Api::namespaced(client, &selected.namespace);
    let labels: Selector = selected.labels.into_iter().collect();
    let config = watcher::Config::default().labels_from(&labels);
    let events = watcher(api, config).default_backoff();
    pin_mut!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(pod) | Event::InitApply(pod)) => insert(&mut lock(&table), pod),
            Ok(Event::Delete(pod)) => drop(lock(&table).remove(&pod.name_any())),
            // What a new list does not name is gone.
            Ok(Event::Init) => lock(&table).clear(),
            Ok(Event::InitDone) => {}
            Err(error) => {
                tracing::debug!(%error, "cannot look at starting pods; their EndpointSlices tell when they are ready");
                continue;
            }
        }
        changed();
    }
}

fn insert(table: &mut BTreeMap<String, Arc<Pod>>, mut pod: Pod) {
    let name = pod.name_any();
    if table.len() >= PODS && !table.contains_key(&name) {
        return;
    }
    pod.metadata.managed_fields = None;
    table.insert(name, Arc::new(pod));
}
