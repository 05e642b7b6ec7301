//! Pods whose connections are no traffic: those that triggers of type `traffic` ignore by their labels.
//!
//! One watch for each selector that is written somewhere, however many ElastiServices have it. Invariants: an address is ignored
//! only while its pod is known to have it; what a new list does not name is ignored no more; nothing is said of a selector before
//! its first list. Written by the watches, read by the controller.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use futures::{Stream, TryStreamExt, pin_mut};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Client, ResourceExt};
use tokio_util::task::AbortOnDropHandle;

use crate::clients::WATCH_TIMEOUT;
use crate::observed::SourceFault;

/// The most watches at once: scrapers and health checkers of a cluster are of few kinds. Pods of selectors beyond that count.
const WATCHES: usize = 64;

/// The most pods of one selector whose connections are ignored; those of others count. Every resolver that follows a target has
/// their addresses in one map of the kernel, with 16,384 entries for all its targets.
const PODS: usize = 256;

/// Which pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selected {
    /// Their namespace.
    pub namespace: String,
    /// Their labels, as the API server takes a label selector.
    pub labels: String,
}

/// The pods that are ignored, by the UID of the ElastiService that does.
#[derive(Default)]
pub struct Sources {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    named: HashMap<String, BTreeSet<Selected>>,
    watched: HashMap<Selected, Watched>,
}

struct Watched {
    addresses: BTreeSet<IpAddr>,
    /// Why none of its pods is ignored, and since when.
    fault: Option<SourceFault>,
    _watch: AbortOnDropHandle<()>,
}

/// What a watch has to tell.
enum News {
    /// It selects these addresses, of at least one pod.
    Addresses(BTreeSet<IpAddr>),
    /// It selects no pod.
    NoPod,
    /// Pods cannot be looked at: why.
    Failed(String),
}

impl Sources {
    /// Addresses of the pods that an ElastiService ignores, as far as they are known.
    pub fn addresses(&self, uid: &str) -> BTreeSet<IpAddr> {
        let state = lock(&self.state);
        let selected = state.named.get(uid).into_iter().flatten();
        selected
            .filter_map(|selected| state.watched.get(selected))
            .flat_map(|watched| &watched.addresses)
            .copied()
            .collect()
    }

    /// Which of the selectors of an ElastiService ignore nobody, and why.
    pub fn faults(&self, uid: &str) -> Vec<SourceFault> {
        let state = lock(&self.state);
        let selected = state.named.get(uid).into_iter().flatten();
        selected.filter_map(|selected| state.watched.get(selected)?.fault.clone()).collect()
    }

    /// An ElastiService ignores these pods and no others. `changed` is told its UID whenever others have their labels.
    pub fn follow(
        &self,
        client: &Client,
        uid: &str,
        selected: BTreeSet<Selected>,
        changed: impl Fn(&str) + Clone + Send + Sync + 'static,
    ) {
        let mut state = lock(&self.state);
        for missing in &selected {
            if state.watched.len() < WATCHES && !state.watched.contains_key(missing) {
                let watch = watch(client.clone(), missing.clone(), Arc::downgrade(&self.state), changed.clone());
                let watch = AbortOnDropHandle::new(tokio::spawn(watch));
                let watched = Watched { addresses: BTreeSet::new(), fault: None, _watch: watch };
                state.watched.insert(missing.clone(), watched);
            }
        }
        state.name(uid, selected);
    }

    /// The ElastiService is gone.
    pub fn forget(&self, uid: &str) {
        lock(&self.state).name(uid, BTreeSet::new());
    }
}

impl State {
    fn name(&mut self, uid: &str, selected: BTreeSet<Selected>) {
        let before =
            if selected.is_empty() { self.named.remove(uid) } else { self.named.insert(uid.to_owned(), selected) };
        for dropped in before.into_iter().flatten() {
            if !self.named.values().any(|named| named.contains(&dropped)) {
                self.watched.remove(&dropped);
            }
        }
    }

    /// Takes in what the watch of a selector tells; returns whom that concerns. Who was ignored stays so while the watch fails.
    fn set(&mut self, selected: &Selected, news: News, now: Instant) -> Vec<String> {
        let Some(watched) = self.watched.get_mut(selected) else { return Vec::new() };
        let (addresses, why) = match news {
            News::Addresses(addresses) => (addresses, None),
            News::NoPod => (BTreeSet::new(), Some(no_pod(selected))),
            News::Failed(error) => (watched.addresses.clone(), Some(not_seen(selected, &error))),
        };
        let since = watched.fault.as_ref().map_or(now, |fault| fault.since);
        let fault = why.map(|why| SourceFault { since, why });
        if watched.addresses == addresses && watched.fault == fault {
            return Vec::new();
        }
        (watched.addresses, watched.fault) = (addresses, fault);
        let concerned = self.named.iter().filter(|(_, named)| named.contains(selected));
        concerned.map(|(uid, _)| uid.clone()).collect()
    }
}

/// Every change leaves a sound state, so a poisoned lock still guards one.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_pod(Selected { namespace, labels }: &Selected) -> String {
    format!(
        "ignoreSources of the traffic trigger names pods with the labels {labels} in namespace {namespace}, and there are none: \
         correct podSelector or its namespace, or create them; until then nobody is ignored by it"
    )
}

fn not_seen(Selected { namespace, labels }: &Selected, error: &str) -> String {
    format!(
        "ignoreSources of the traffic trigger names pods with the labels {labels} in namespace {namespace}, which the operator \
         cannot look at: {error}; let it list and watch pods there, or name ranges of addresses; until then new ones count"
    )
}

/// Follows the pods of a selector for as long as `state` is kept. A watch that has failed is begun anew with a list: kube's would go on
/// where it ended and say nothing until a pod changes, and who is looked after by it would be told of a fault that is over.
async fn watch(client: Client, selected: Selected, state: Weak<Mutex<State>>, changed: impl Fn(&str) + Send + Sync) {
    let api: Api<Pod> = Api::namespaced(client, &selected.namespace);
    let config = watcher::Config::default().labels(&selected.labels).timeout(WATCH_TIMEOUT);
    let tell = |news| {
        let state = state.upgrade()?;
        let concerned = lock(&state).set(&selected, news, Instant::now());
        for uid in &concerned {
            changed(uid);
        }
        Some(())
    };
    let mut backoff = DefaultBackoff::default();
    loop {
        let Err(error) = watch_until_failure(watcher(api.clone(), config.clone()), &tell).await else { return };
        let Selected { namespace, labels } = &selected;
        tracing::warn!(namespace, labels, %error, "cannot look at the pods that a trigger ignores; new ones count");
        if tell(News::Failed(error.to_string())).is_none() {
            return;
        }
        tokio::time::sleep(backoff.next().unwrap_or_default()).await;
    }
}

/// Tells what a watch sees until it fails; ends without an error when nobody is there any more who is told (`tell` is `None`).
async fn watch_until_failure(
    events: impl Stream<Item = watcher::Result<Event<Pod>>> + Send,
    tell: &(impl Fn(News) -> Option<()> + Send + Sync),
) -> watcher::Result<()> {
    pin_mut!(events);
    let (mut pods, mut listed) = (BTreeMap::new(), BTreeMap::new());
    while let Some(event) = events.try_next().await? {
        match event {
            Event::Init => {
                listed.clear();
                continue;
            }
            Event::InitApply(pod) => {
                listed.insert(pod.name_any(), addresses(&pod));
                continue;
            }
            Event::InitDone => pods = std::mem::take(&mut listed),
            Event::Apply(pod) => drop(pods.insert(pod.name_any(), addresses(&pod))),
            Event::Delete(pod) => drop(pods.remove(&pod.name_any())),
        }
        let news = if pods.is_empty() {
            News::NoPod
        } else {
            let known = pods.values().filter(|addresses| !addresses.is_empty());
            News::Addresses(known.take(PODS).flatten().copied().collect())
        };
        if tell(news).is_none() {
            break;
        }
    }
    Ok(())
}

/// The addresses that are a pod's own for now: on its node's network it has none, and one that has ended has none any more.
fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    let Some(status) = pod.status.as_ref().filter(|_| !host_network) else { return Vec::new() };
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return Vec::new();
    }
    let all = status.pod_ips.iter().flatten().map(|address| &address.ip).chain(&status.pod_ip);
    all.filter_map(|address| address.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::testing::{answer, client, silence};

    fn pod(spec: &serde_json::Value, status: &serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "p"}, "spec": spec, "status": status})).unwrap()
    }

    #[test]
    fn addresses_of_a_node_and_of_pods_that_have_ended_are_not_ignored() {
        let containers = serde_json::json!({"containers": []});
        let status =
            |phase: &str| serde_json::json!({"phase": phase, "podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]});
        let both: Vec<IpAddr> = vec!["10.1.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        assert_eq!(addresses(&pod(&containers, &status("Running"))), both);
        assert_eq!(addresses(&pod(&containers, &status("Failed"))), Vec::<IpAddr>::new());
        assert_eq!(addresses(&pod(&containers, &serde_json::json!({}))), Vec::<IpAddr>::new());
        let on_host = serde_json::json!({"containers": [], "hostNetwork": true});
        assert_eq!(addresses(&pod(&on_host, &status("Running"))), Vec::<IpAddr>::new());
    }

    #[tokio::test]
    async fn a_selector_is_watched_once_for_all_who_name_it_and_no_longer_than_one_does() {
        let lists = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&lists);
        let client = client(move |request, _| {
            let query = request.uri.query().unwrap_or_default();
            assert_eq!((request.uri.path(), query.contains("app%3Dx")), ("/api/v1/namespaces/n/pods", true));
            if query.contains("watch=") {
                return silence();
            }
            counted.fetch_add(1, Ordering::Relaxed);
            let pod = pod(&serde_json::json!({"containers": []}), &serde_json::json!({"podIP": "10.1.0.1"}));
            answer(200, serde_json::json!({"metadata": {"resourceVersion": "1"}, "items": [pod]}))
        });
        let (sources, selected) = (Sources::default(), Selected { namespace: "n".into(), labels: "app=x".into() });
        let (changed, mut news) = tokio::sync::mpsc::unbounded_channel();
        for uid in ["a", "b"] {
            let changed = changed.clone();
            let told = move |uid: &str| changed.send(uid.to_owned()).unwrap();
            sources.follow(&client, uid, BTreeSet::from([selected.clone()]), told);
        }
        let concerned = BTreeSet::from([news.recv().await.unwrap(), news.recv().await.unwrap()]);
        assert_eq!(concerned, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
        let addresses = BTreeSet::from(["10.1.0.1".parse().unwrap()]);
        assert_eq!((sources.addresses("a"), sources.addresses("c")), (addresses.clone(), BTreeSet::new()));
        sources.forget("a");
        assert_eq!((sources.addresses("a"), sources.addresses("b")), (BTreeSet::new(), addresses));
        sources.follow(&client, "b", BTreeSet::new(), |_| {});
        assert!(lock(&sources.state).watched.is_empty());
        assert_eq!(lists.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_failed_is_begun_anew_with_a_list_which_ends_its_fault() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let client = client(move |request, _| {
            let query = request.uri.query().unwrap_or_default();
            let watches = query.contains("watch=");
            assert!(!watches || query.contains("timeoutSeconds=10"), "within the read timeout: {query}");
            let mut asked = seen.lock().unwrap();
            asked.push(watches);
            match asked.len() {
                2 => answer(403, "Forbidden"),
                _ if watches => silence(),
                _ => {
                    let pod = pod(&serde_json::json!({"containers": []}), &serde_json::json!({"podIP": "10.1.0.1"}));
                    answer(200, serde_json::json!({"metadata": {"resourceVersion": "1"}, "items": [pod]}))
                }
            }
        });
        let (sources, (changed, mut news)) = (Sources::default(), tokio::sync::mpsc::unbounded_channel());
        let selected = Selected { namespace: "n".into(), labels: "app=x".into() };
        sources.follow(&client, "a", BTreeSet::from([selected]), move |uid| changed.send(uid.to_owned()).unwrap());
        for what in ["the pod", "the fault", "its end"] {
            let told = tokio::time::timeout(std::time::Duration::from_mins(1), news.recv()).await;
            assert_eq!(told, Ok(Some("a".to_owned())), "{what}");
        }
        assert_eq!(sources.faults("a"), []);
        while asked.lock().unwrap().len() < 4 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(asked.lock().unwrap()[..4], [false, true, false, true]);
    }

    #[test]
    fn a_selector_that_ignores_nobody_is_told_with_its_cause_until_it_does() {
        let (mut state, start) = (State::default(), Instant::now());
        let selected = Selected { namespace: "n".into(), labels: "app=x".into() };
        state.name("a", BTreeSet::from([selected.clone()]));
        assert_eq!(state.set(&selected, News::NoPod, start), Vec::<String>::new(), "nobody watches it any more");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let watch = AbortOnDropHandle::new(runtime.spawn(std::future::pending()));
        state.watched.insert(selected.clone(), Watched { addresses: BTreeSet::new(), fault: None, _watch: watch });
        let sources = Sources { state: Arc::new(Mutex::new(state)) };
        let set = |news, now| lock(&sources.state).set(&selected, news, now);
        assert_eq!(sources.faults("a"), []);
        assert_eq!(set(News::NoPod, start), ["a"]);
        let later = start + std::time::Duration::from_secs(1);
        assert_eq!(set(News::NoPod, later), Vec::<String>::new(), "no news");
        let fault = sources.faults("a").pop().unwrap();
        assert_eq!(fault.since, start);
        assert!(["app=x", "namespace n", "correct"].iter().all(|part| fault.why.contains(part)), "{}", fault.why);
        let addresses = BTreeSet::from(["10.1.0.1".parse().unwrap()]);
        assert_eq!(set(News::Addresses(addresses.clone()), later), ["a"]);
        assert_eq!(sources.faults("a"), []);
        assert_eq!(set(News::Failed("forbidden".into()), later), ["a"]);
        assert!(sources.faults("a")[0].why.contains("forbidden"));
        assert_eq!(sources.addresses("a"), addresses, "those that are known stay ignored");
    }
}
