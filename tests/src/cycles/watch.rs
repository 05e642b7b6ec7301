//! Watches: turns what the API server tells into each Service's [`Timeline`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elasti_api::message::Mode;
use elasti_api::names;
use elasti_api::v1alpha1::ElastiService;
use elasti_traffic::record::{Micros, now};
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event as Watched, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use super::timeline::{Event, State, Timeline};
use crate::cluster::PATIENCE;

/// What is seen of all Services of a namespace. Service, Deployment and ElastiService have one name, which is the label
/// `app` of the pods too.
#[derive(Clone)]
pub struct Watches {
    seen: Arc<Mutex<Seen>>,
    changed: Arc<Notify>,
    patience: Duration,
}

#[derive(Default)]
struct Seen {
    timelines: BTreeMap<String, Timeline>,
    pods: BTreeMap<String, BTreeSet<String>>,
    ready: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Watches {
    /// Begins to watch a namespace; ends with the runtime. What takes a cooldown of its own has that time too.
    pub fn new(client: &Client, namespace: &str, cooldown: Duration) -> Self {
        let watches = Self { seen: Arc::default(), changed: Arc::default(), patience: PATIENCE + cooldown };
        watches.watch(client, namespace, |seen, object: &ElastiService, gone| {
            let mode = object.status.as_ref().and_then(|status| status.mode);
            seen.add(&object.name_any(), Event::Intercepting(!gone && mode == Some(Mode::Proxy)));
        });
        watches.watch(client, namespace, |seen, object: &Deployment, gone| {
            let replicas = object.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
            seen.add(&object.name_any(), Event::Replicas(if gone { 0 } else { replicas.into() }));
        });
        watches.watch(client, namespace, |seen, object: &Pod, gone| {
            let Some(service) = object.labels().get("app").cloned() else { return };
            // A pod whose containers have ended serves nobody, however long its object stays.
            let phase = object.status.as_ref().and_then(|status| status.phase.as_deref());
            let ended = gone || matches!(phase, Some("Succeeded" | "Failed"));
            let pods = seen.pods.entry(service.clone()).or_default();
            if ended {
                pods.remove(&object.name_any());
            } else {
                pods.insert(object.name_any());
            }
            let count = pods.len();
            seen.add(&service, Event::Pods(count));
        });
        watches.watch(client, namespace, |seen, object: &EndpointSlice, gone| {
            let Some(service) = object.labels().get("kubernetes.io/service-name").cloned() else { return };
            let ready = |slice: &EndpointSlice| {
                let ready = slice.endpoints.iter().filter(|endpoint| {
                    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
                });
                ready.count()
            };
            let count = if gone { 0 } else { ready(object) };
            let name = object.name_any();
            if name == names::resolver_slice(&service, false) {
                seen.add(&service, Event::Published(count > 0));
            } else if name != names::resolver_slice(&service, true) {
                let slices = seen.ready.entry(service.clone()).or_default();
                slices.insert(name, count);
                let total = slices.values().sum();
                seen.add(&service, Event::Ready(total));
            }
        });
        watches
    }

    fn watch<K>(&self, client: &Client, namespace: &str, see: impl Fn(&mut Seen, &K, bool) + Send + Sync + 'static)
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug
            + Send
            + 'static,
    {
        let events = watcher(Api::<K>::namespaced(client.clone(), namespace), watcher::Config::default());
        let watches = self.clone();
        tokio::spawn(async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                match event.unwrap_or_else(|error| panic!("a watch of the harness broke: {error}")) {
                    Watched::Apply(object) | Watched::InitApply(object) => see(&mut watches.lock(), &object, false),
                    Watched::Delete(object) => see(&mut watches.lock(), &object, true),
                    Watched::Init | Watched::InitDone => {}
                }
                watches.changed.notify_waiters();
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the harness itself does to a Service.
    pub fn note(&self, service: &str, event: Event) {
        self.lock().add(service, event);
    }

    /// All that was seen of a Service.
    pub fn timeline(&self, service: &str) -> Timeline {
        self.lock().timelines.get(service).cloned().unwrap_or_default()
    }

    /// Whether a Service's target was scaled to zero after a moment.
    pub fn was_at_zero_since(&self, service: &str, time: Micros) -> bool {
        self.lock().timelines.get(service).is_some_and(|timeline| timeline.was_at_zero_since(time))
    }

    /// The state of a Service.
    pub fn now(&self, service: &str) -> State {
        self.lock().timelines.get(service).map(Timeline::now).unwrap_or_default()
    }

    /// Waits until a Service is in such a state.
    pub async fn until(&self, service: &str, what: &str, is: impl Fn(&State) -> bool) {
        let seen = async {
            loop {
                let changed = self.changed.notified();
                if is(&self.now(service)) {
                    return;
                }
                changed.await;
            }
        };
        let in_time = tokio::time::timeout(self.patience, seen).await.is_ok();
        assert!(in_time, "waited in vain until {service} {what}: {:?}", self.now(service));
    }
}

impl Seen {
    fn add(&mut self, service: &str, event: Event) {
        self.timelines.entry(service.to_owned()).or_default().add(now(), event);
    }
}
