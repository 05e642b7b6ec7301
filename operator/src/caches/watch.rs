//! The watches that feed the caches: each lists, watches and lists again for as long as the operator runs.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use elasti_api::v1alpha1::ElastiService;
use futures::stream::select_all;
use futures::{Stream, StreamExt, future, pin_mut};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, DeserializeGuard};
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use tokio::sync::watch;

use super::namespaces::{Completeness, LeftAlone};
use super::{Caches, Concerned};
use crate::autoscaler;
use crate::clients::WATCH_TIMEOUT;
use crate::metrics::Watched;
use crate::observed::ObjectKey;
use crate::scope::Scope;
use crate::target::{self, Kind};

/// The status with which the API server says that it does not serve a resource.
const NOT_FOUND: u16 = 404;

/// The status with which the API server says that a resource may not be read.
const FORBIDDEN: u16 = 403;

/// Longer than a watch of the same namespace takes to ask again.
const READMISSION: Duration = Duration::from_secs(5);

/// The kind whose watches decide which namespaces are left alone.
const ELASTI_SERVICE: &str = "ElastiService";

/// Waits after failed requests of a watch: they double up to two seconds, since a client may be held for what it would tell.
/// (The usual ones double up to thirty.)
struct Retry(Duration);

impl Default for Retry {
    fn default() -> Self {
        Self(Duration::from_millis(100))
    }
}

impl Iterator for Retry {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = self.0;
        self.0 = (wait * 2).min(Duration::from_secs(2));
        Some(wait)
    }
}

impl Backoff for Retry {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// What a watch has seen.
pub(super) enum Fact<K> {
    /// The object is there, new or changed.
    There(K),
    /// No object of this key is there any more.
    Gone(ObjectKey),
    /// Everything that is there has been told.
    Complete,
    /// The API server cannot be asked, and why.
    Failed(watcher::Error),
}

impl<K> Fact<K> {
    pub(super) fn counted(&self) -> Watched {
        match self {
            Self::There(_) | Self::Gone(_) => Watched::Changed,
            Self::Complete => Watched::Complete,
            Self::Failed(_) => Watched::Failed,
        }
    }
}

/// What is seen by one watch for each of these. It is complete once each is, but for namespaces that are left alone; the watches of
/// ElastiServices are those that decide which are.
pub(super) fn watched<K>(apis: Vec<Api<K>>, alone: LeftAlone, decides: bool) -> impl Stream<Item = Fact<K>> + Send
where
    K: Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let namespaces = apis.iter().map(|api| api.namespace().map(str::to_owned)).collect();
    let completeness = Completeness::new(namespaces, alone.clone(), decides);
    let watches = apis.into_iter().enumerate().map(move |(number, api)| {
        let (namespace, alone) = (api.namespace().filter(|_| decides).map(Arc::<str>::from), alone.clone());
        let events = watcher(api, watcher::Config::default().timeout(WATCH_TIMEOUT));
        // That a list is begun is no success, which would end the waits.
        let news = events.filter(|event| future::ready(!matches!(event, Ok(Event::Init)))).backoff(Retry::default());
        let facts = facts(news).then(move |fact| after_the_others(namespace.clone(), alone.clone(), fact));
        facts.map(move |fact| (number, fact)).boxed()
    });
    together(completeness, select_all(watches))
}

/// Has the ElastiServices of a namespace that was left alone wait until the watches of other kinds, too, can read it: one whose Service
/// is not known would be intercepted no more.
async fn after_the_others<K>(namespace: Option<Arc<str>>, alone: LeftAlone, fact: Fact<K>) -> Fact<K> {
    if let Some(namespace) = namespace
        && !matches!(fact, Fact::Failed(_))
        && alone.contains(&namespace)
    {
        tokio::time::sleep(READMISSION).await;
        alone.end(&namespace);
        tracing::info!(%namespace, "this namespace can be read again and is looked after");
    }
    fact
}

/// Facts of several watches, each told with the number of its watch.
fn together<K: Send>(
    mut completeness: Completeness,
    facts: impl Stream<Item = (usize, Fact<K>)> + Send,
) -> impl Stream<Item = Fact<K>> + Send {
    facts.flat_map(move |(number, fact)| {
        let complete = match &fact {
            Fact::Complete => completeness.listed(number),
            Fact::Failed(error) if refusal(error) == Some(FORBIDDEN) => completeness.refused(number, Instant::now()),
            _ => false,
        };
        let told = (!matches!(fact, Fact::Complete)).then_some(fact);
        futures::stream::iter(told.into_iter().chain(complete.then_some(Fact::Complete)))
    })
}

/// Turns a watcher's events into facts: what a new list does not name is gone.
fn facts<K: Resource>(events: impl Stream<Item = watcher::Result<Event<K>>>) -> impl Stream<Item = Fact<K>> {
    let (mut known, mut listed) = (HashSet::new(), HashSet::new());
    events.flat_map(move |event| {
        futures::stream::iter(match event {
            Ok(Event::Init) => {
                listed.clear();
                vec![]
            }
            Ok(Event::InitApply(object)) => {
                listed.insert(key(&object));
                vec![Fact::There(object)]
            }
            Ok(Event::InitDone) => {
                let gone = forget(&mut known, &mut listed);
                gone.into_iter().map(Fact::Gone).chain([Fact::Complete]).collect()
            }
            Ok(Event::Apply(object)) => {
                known.insert(key(&object));
                vec![Fact::There(object)]
            }
            Ok(Event::Delete(object)) => {
                known.remove(&key(&object));
                vec![Fact::Gone(key(&object))]
            }
            Err(error) => {
                // A list that was begun is begun anew.
                listed.clear();
                vec![Fact::Failed(error)]
            }
        })
    })
}

/// With which status the API server refuses a list or a watch.
fn refusal(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

fn forget<T: Hash + Eq + Clone>(known: &mut HashSet<T>, listed: &mut HashSet<T>) -> Vec<T> {
    let gone = known.difference(listed).cloned().collect();
    *known = std::mem::take(listed);
    gone
}

pub(super) fn key<K: Resource>(object: &K) -> ObjectKey {
    ObjectKey::new(object.meta().namespace.clone().unwrap_or_default(), object.name_any())
}

/// What the watches tell their caller.
pub trait Concern: Send + Sync {
    /// These ElastiServices must be looked at.
    fn look(&self, concerned: Concerned);
    /// The watch of a kind has met with something.
    fn watched(&self, kind: &str, what: Watched);
    /// The ElastiService with this name and UID is gone.
    fn forget(&self, key: &ObjectKey, uid: &str);
}

/// The watches.
pub struct Watches {
    pub(super) client: Client,
    pub(super) scope: Scope,
    pub(super) caches: Arc<Caches>,
    pub(super) concern: Arc<dyn Concern>,
    pub(super) alone: LeftAlone,
}

impl Watches {
    /// Watches of `scope` that feed `caches` and tell `concern`.
    pub fn new(client: Client, scope: Scope, caches: Arc<Caches>, concern: Arc<dyn Concern>) -> Arc<Self> {
        Arc::new(Self { client, scope, caches, concern, alone: LeftAlone::default() })
    }

    /// Watches ElastiServices. One that does not deserialize is named in the log and disturbs no other.
    pub async fn elasti_services(self: Arc<Self>, complete: watch::Sender<bool>) {
        let apis: Vec<Api<DeserializeGuard<ElastiService>>> = self.scope.apis(&self.client);
        self.drive(ELASTI_SERVICE, apis, complete, |this, fact| match fact {
            Ok(DeserializeGuard(Ok(elasti))) => {
                let key = key(&elasti);
                let (concerned, gone) = this.caches.apply_elasti(elasti);
                if let Some(uid) = gone {
                    this.concern.forget(&key, &uid);
                }
                this.concern.look(concerned);
            }
            Ok(DeserializeGuard(Err(invalid))) => {
                let key = ObjectKey::new(
                    invalid.metadata.namespace.clone().unwrap_or_default(),
                    invalid.metadata.name.clone().unwrap_or_default(),
                );
                this.concern.watched(ELASTI_SERVICE, Watched::Invalid);
                tracing::error!(elastiservice = %key, error = %invalid, "this ElastiService is not valid and is left alone; correct it");
            }
            Err(key) => {
                let (concerned, uid) = this.caches.remove_elasti(&key);
                this.concern.look(concerned);
                if let Some(uid) = uid {
                    this.concern.forget(&key, &uid);
                }
            }
        })
        .await;
    }

    /// Watches Services.
    pub async fn services(self: Arc<Self>, complete: watch::Sender<bool>) {
        let apis: Vec<Api<Service>> = self.scope.apis(&self.client);
        self.drive("Service", apis, complete, |this, fact| {
            this.concern.look(match fact {
                Ok(service) => this.caches.apply_service(&service),
                Err(key) => this.caches.remove_service(&key),
            });
        })
        .await;
    }

    /// Watches EndpointSlices.
    pub async fn slices(self: Arc<Self>, complete: watch::Sender<bool>) {
        let apis: Vec<Api<EndpointSlice>> = self.scope.apis(&self.client);
        self.drive("EndpointSlice", apis, complete, |this, fact| {
            this.concern.look(match fact {
                Ok(slice) => this.caches.apply_slice(&slice),
                Err(key) => this.caches.remove_slice(&key),
            });
        })
        .await;
    }

    /// Watches the targets of a kind that is known beforehand. One that the cluster does not serve is asked for again and again, so that it may
    /// be installed later; `complete` is set when the kind is known, or when it is known that it is not served.
    pub async fn targets(self: Arc<Self>, kind: Kind, complete: watch::Sender<bool>) {
        let Some(resource) = kind.resource() else { return };
        let what = format!("{} of {}", resource.kind, resource.api_version);
        let (kind, mut read) = (&kind, false);
        self.caches.set_kind_unread(kind, Some(format!("{what} have not been read yet")));
        self.optional(&resource, |this, fact| match fact {
            Fact::There(object) => this.caches.apply_target(kind, target::observed(&object)),
            Fact::Gone(key) => this.caches.remove_target(kind, &key),
            Fact::Complete => {
                read = true;
                complete.send_replace(true);
                this.caches.set_kind_unread(kind, None)
            }
            Fact::Failed(_) if read => Concerned::new(),
            Fact::Failed(error) => {
                // There are none, and nobody else shall wait for them.
                if refusal(&error) == Some(NOT_FOUND) {
                    complete.send_replace(true);
                }
                let why = format!(
                    "{what} cannot be read ({error}); install what provides them, or correct spec.scaleTargetRef"
                );
                this.caches.set_kind_unread(kind, Some(why))
            }
        })
        .await;
    }

    /// Watches the autoscalers of one kind. `complete` is set when they are known, or when it is known why they are not:
    /// wakes do not need them.
    pub async fn autoscalers(self: Arc<Self>, kind: autoscaler::Kind, complete: watch::Sender<bool>) {
        let resource = kind.resource();
        let mut read = false;
        self.caches.set_autoscalers_unread(kind, Some(format!("{}s have not been read yet", kind.name())));
        self.optional(&resource, |this, fact| match fact {
            Fact::There(object) => this.caches.apply_autoscaler(autoscaler::observed(kind, &object)),
            Fact::Gone(key) => this.caches.remove_autoscaler(kind, &key),
            Fact::Complete => {
                read = true;
                complete.send_replace(true);
                this.caches.set_autoscalers_unread(kind, None)
            }
            Fact::Failed(_) if read => Concerned::new(),
            Fact::Failed(error) => {
                complete.send_replace(true);
                let why = format!("{}s cannot be read ({error}); correct spec.autoscaler", kind.name());
                this.caches.set_autoscalers_unread(kind, Some(why))
            }
        })
        .await;
    }

    async fn optional<F>(&self, resource: &ApiResource, mut apply: F)
    where
        F: FnMut(&Self, Fact<DynamicObject>) -> Concerned + Send,
    {
        let facts =
            watched(self.scope.dynamic_apis::<DynamicObject>(&self.client, resource), self.alone.clone(), false);
        pin_mut!(facts);
        while let Some(fact) = facts.next().await {
            if let Fact::Failed(error) = &fact {
                tracing::warn!(kind = resource.kind, %error, "cannot watch; trying again");
            }
            self.concern.watched(&resource.kind, fact.counted());
            let concerned = apply(self, fact);
            self.concern.look(concerned);
        }
    }

    async fn drive<K, F>(
        self: Arc<Self>,
        what: &'static str,
        apis: Vec<Api<K>>,
        complete: watch::Sender<bool>,
        apply: F,
    ) where
        K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
        F: Fn(&Self, Result<K, ObjectKey>) + Send,
    {
        let facts = watched(apis, self.alone.clone(), what == ELASTI_SERVICE);
        pin_mut!(facts);
        while let Some(fact) = facts.next().await {
            self.concern.watched(what, fact.counted());
            match fact {
                Fact::There(object) => apply(&self, Ok(object)),
                Fact::Gone(key) => apply(&self, Err(key)),
                Fact::Complete => {
                    complete.send_replace(true);
                }
                Fact::Failed(error) => tracing::warn!(kind = what, %error, "cannot watch; trying again"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::testing::{answer, client};

    /// Keeps out ten requests a second for each kind that may not be read.
    #[tokio::test(start_paused = true)]
    async fn lists_that_are_refused_are_repeated_ever_more_slowly() {
        let asked = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&asked);
        let client = client(move |_, _| {
            counted.fetch_add(1, Ordering::Relaxed);
            answer(403, "Forbidden")
        });
        let facts = watched::<Service>(Scope::default().apis(&client), LeftAlone::default(), false);
        let all = facts.for_each(|_| future::ready(()));
        assert!(tokio::time::timeout(Duration::from_mins(1), all).await.is_err(), "it never ends");
        let asked = asked.load(Ordering::Relaxed);
        assert!((20..40).contains(&asked), "{asked} times in a minute");
    }

    #[tokio::test]
    async fn watches_of_several_namespaces_are_complete_when_each_is() {
        let service = |name: &str| {
            let object = serde_json::json!({"metadata": {"namespace": "n", "name": name}});
            Fact::There(serde_json::from_value::<Service>(object).unwrap())
        };
        let told =
            [(0, service("a")), (0, Fact::Complete), (0, Fact::Complete), (1, service("b")), (1, Fact::Complete)];
        let namespaces = ["a", "b"].map(|name| Some(name.to_owned())).into();
        let completeness = Completeness::new(namespaces, LeftAlone::default(), true);
        let facts: Vec<Fact<Service>> = together(completeness, futures::stream::iter(told)).collect().await;
        let complete: Vec<bool> = facts.iter().map(|fact| matches!(fact, Fact::Complete)).collect();
        assert_eq!(complete, [false, false, true]);
    }
}
