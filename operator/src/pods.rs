//! Pods of targets that start, looked at for as long as somebody waits for them.
//!
//! A watch of its own for each ElastiService that wakes, and none for the others: most pods of a cluster are nobody's
//! business here. Why not EndpointSlices: they tell no probes, and come later. Written by the watches, read by the controller.
//! Invariant: what is known of the pods goes with the watch.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{TryStreamExt, pin_mut};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, WatchEvent, WatchParams};
use kube::core::Selector;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::DefaultBackoff;
use kube::{Client, ResourceExt};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::clients::WATCH_TIMEOUT;

/// The most watches at once; ElastiServices beyond that wait for their EndpointSlices.
const WATCHES: usize = 256;

/// The most pods of one ElastiService that are kept: the first that is ready ends the wait.
pub const PODS: usize = 16;

/// A watch that ends sooner has failed: the API server lets it run for [`WATCH_TIMEOUT`].
const SHORTEST: Duration = Duration::from_secs(1);

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
    let parameters = WatchParams::default().labels_from(&labels).timeout(WATCH_TIMEOUT);
    let (mut version, mut backoff) = (None, DefaultBackoff::default());
    loop {
        let begun = Instant::now();
        match watch_from(&api, &parameters, &mut version, &table, &changed).await {
            Ok(()) if begun.elapsed() >= SHORTEST => {
                backoff.reset();
                continue;
            }
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(
                    error = format!("{error:#}"),
                    "cannot look at starting pods; their EndpointSlices tell when they are ready"
                );
                version = None;
            }
        }
        tokio::time::sleep(backoff.next().unwrap_or_default()).await;
    }
}

/// Follows the pods until the API server ends the watch, as it does now and then; `version` is the one to go on from.
///
/// Without one a watch begins with the pods that there are ("Get State and Start at Any" of the Kubernetes API concepts): one request,
/// where a list and a watch are two.
async fn watch_from(
    api: &Api<Pod>,
    parameters: &WatchParams,
    version: &mut Option<String>,
    table: &Table,
    changed: &(impl Fn() + Send + Sync),
) -> anyhow::Result<()> {
    if version.is_none() {
        lock(table).clear();
    }
    let events = api.watch(parameters, version.as_deref().unwrap_or("0")).await?;
    pin_mut!(events);
    while let Some(event) = events.try_next().await? {
        match event {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                version.clone_from(&pod.metadata.resource_version);
                insert(&mut lock(table), pod);
            }
            WatchEvent::Deleted(pod) => {
                version.clone_from(&pod.metadata.resource_version);
                lock(table).remove(&pod.name_any());
            }
            WatchEvent::Bookmark(bookmark) => {
                *version = Some(bookmark.metadata.resource_version);
                continue;
            }
            WatchEvent::Error(status) => return Err(kube::Error::Api(status).into()),
        }
        changed();
    }
    Ok(())
}

fn insert(table: &mut BTreeMap<String, Arc<Pod>>, mut pod: Pod) {
    let name = pod.name_any();
    if table.len() >= PODS && !table.contains_key(&name) {
        return;
    }
    pod.metadata.managed_fields = None;
    table.insert(name, Arc::new(pod));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{client, events, silence};

    fn selected() -> Selected {
        Selected { namespace: "n".into(), labels: [("app".to_owned(), "x".to_owned())].into() }
    }

    fn pod(name: &str, version: &str) -> serde_json::Value {
        json!({"metadata": {"name": name, "resourceVersion": version}})
    }

    #[tokio::test(start_paused = true)]
    async fn pods_are_followed_by_one_request_which_goes_on_where_the_last_one_ended() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let client = client(move |request, _| {
            let query = request.uri.query().unwrap_or_default().to_owned();
            assert!(request.uri.path() == "/api/v1/namespaces/n/pods" && query.contains("watch=true"), "{query}");
            assert!(query.contains("labelSelector=app%3Dx"), "{query}");
            let version = query.split('&').find_map(|part| part.strip_prefix("resourceVersion=")).unwrap().to_owned();
            let mut asked = lock(&seen);
            asked.push(version);
            match asked.len() {
                1 => events(&[("ADDED", pod("a", "3")), ("ADDED", pod("b", "5"))]),
                2 => events(&[("DELETED", pod("b", "6")), ("BOOKMARK", pod("", "9"))]),
                3 => events(&[("ERROR", json!({"code": 410, "reason": "Expired", "message": "too old"}))]),
                4 => events(&[("ADDED", pod("c", "20"))]),
                _ => silence(),
            }
        });
        let (pods, (changed, mut news)) = (Pods::default(), tokio::sync::mpsc::unbounded_channel());
        pods.follow(&client, "uid", Some(selected()), move || changed.send(()).unwrap());
        for _ in 0..4 {
            news.recv().await.unwrap();
        }
        while lock(&asked).len() < 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(*lock(&asked), ["0", "5", "9", "0", "20"]);
        let names: Vec<_> = pods.of("uid").iter().map(|pod| pod.name_any()).collect();
        assert_eq!(names, ["c"], "what is not known any more is gone");
        pods.follow(&client, "uid", None, || {});
        assert_eq!(pods.of("uid"), Vec::<Arc<Pod>>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_is_ended_at_once_is_begun_anew_ever_more_slowly() {
        let asked = Arc::new(Mutex::new(0));
        let seen = Arc::clone(&asked);
        let client = client(move |_, _| {
            *lock(&seen) += 1;
            assert!(*lock(&seen) < 1000, "a storm");
            events(&[])
        });
        let pods = Pods::default();
        pods.follow(&client, "uid", Some(selected()), || {});
        tokio::time::sleep(Duration::from_mins(1)).await;
        let asked = *lock(&asked);
        assert!((2..20).contains(&asked), "{asked} times in a minute");
    }
}
