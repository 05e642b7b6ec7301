//! Targets of kinds that are not known beforehand: any resource with a `/scale` subresource.
//!
//! A kind is discovered when an ElastiService names it, and forgotten when none does any more. Its objects are watched by their
//! metadata, and the `/scale` of those that ElastiServices name is read whenever they change: only the API server knows where
//! such a kind keeps its replicas. What cannot be discovered or read is said by a condition, with cause and cure. [`Watches::other_targets`] is
//! called once, at the start.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, pin_mut, stream};
use k8s_openapi::api::autoscaling::v1::Scale;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, PartialObjectMeta};
use kube::discovery::{Scope as ObjectScope, pinned_kind};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::retries::Retries;
use super::watch::{Fact, Watches, key, watched};
use crate::observed::ObjectKey;
use crate::target::{self, Kind, OtherKind};

/// How often it is asked whether the cluster serves a kind, which may be installed at any time.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(10);

/// `/scale` is read of so many targets at once: thousands at the start must not take the API server's attention from wakes.
const READS: usize = 8;

/// What lets the operator read and scale another kind.
const CURE: &str =
    "let the operator list, watch and scale them as docs/targets.md says, or correct spec.scaleTargetRef";

/// A kind that is watched for as long as this is kept.
struct Followed {
    /// The targets of this kind that ElastiServices name.
    named: watch::Sender<BTreeSet<ObjectKey>>,
    _task: AbortOnDropHandle<()>,
}

impl Watches {
    /// Watches targets of other kinds for ever, as ElastiServices name them.
    pub async fn other_targets(self: Arc<Self>) {
        let mut wanted = self.caches.other_targets();
        let mut kinds: HashMap<Arc<OtherKind>, Followed> = HashMap::new();
        loop {
            let named = wanted.borrow_and_update().clone();
            kinds.retain(|kind, _| {
                let still = named.contains_key(kind);
                if !still {
                    self.caches.forget_kind(&Kind::Other(kind.clone()));
                }
                still
            });
            for (kind, keys) in named {
                if let Some(followed) = kinds.get(&kind) {
                    followed.named.send_if_modified(|before| {
                        let news = *before != keys;
                        *before = keys;
                        news
                    });
                    continue;
                }
                let named = watch::Sender::new(keys);
                let task = tokio::spawn(self.clone().other(kind.clone(), named.subscribe()));
                kinds.insert(kind, Followed { named, _task: AbortOnDropHandle::new(task) });
            }
            if wanted.changed().await.is_err() {
                return;
            }
        }
    }

    /// Watches the targets of one kind.
    async fn other(self: Arc<Self>, other: Arc<OtherKind>, mut named: watch::Receiver<BTreeSet<ObjectKey>>) {
        let kind = &Kind::Other(other.clone());
        let resource = self.discovered(&other).await;
        self.caches.set_resource(kind, resource.clone());
        let apis = self.scope.dynamic_apis::<PartialObjectMeta<DynamicObject>>(&self.client, &resource);
        let facts = watched(apis, self.alone.clone(), false);
        pin_mut!(facts);
        let mut known = named.borrow_and_update().clone();
        let (mut changed, mut complete) = (known.clone(), false);
        let mut retries = Retries::default();
        loop {
            if complete {
                changed.extend(retries.due(Instant::now()));
                self.read(kind, &resource, std::mem::take(&mut changed), &mut retries).await;
            }
            let next = retries.next();
            tokio::select! {
                fact = facts.next() => {
                    let Some(fact) = fact else { return };
                    self.concern.watched(&resource.kind, fact.counted());
                    match fact {
                        Fact::There(object) => {
                            let key = key(&object);
                            if known.contains(&key) {
                                changed.insert(key);
                            }
                        }
                        Fact::Gone(key) => {
                            changed.remove(&key);
                            retries.forget(&key);
                            self.concern.look(self.caches.remove_target(kind, &key));
                        }
                        Fact::Complete => {
                            complete = true;
                            self.concern.look(self.caches.set_kind_unread(kind, None));
                        }
                        Fact::Failed(error) => {
                            tracing::warn!(kind = resource.kind, %error, "cannot watch; trying again");
                            if !complete {
                                let why = format!("{other} cannot be read ({error}); {CURE}");
                                self.concern.look(self.caches.set_kind_unread(kind, Some(why)));
                            }
                        }
                    }
                }
                Ok(()) = named.changed() => {
                    let now = named.borrow_and_update().clone();
                    changed.extend(now.difference(&known).cloned());
                    changed.retain(|key| now.contains(key));
                    known.difference(&now).for_each(|dropped| retries.forget(dropped));
                    known = now;
                }
                () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() => {}
            }
        }
    }

    /// Reads the `/scale` of these targets.
    async fn read(&self, kind: &Kind, resource: &ApiResource, targets: BTreeSet<ObjectKey>, retries: &mut Retries) {
        let reads: Vec<_> = targets.into_iter().map(|key| scale(self.client.clone(), resource.clone(), key)).collect();
        let mut reads = stream::iter(reads).buffer_unordered(READS);
        while let Some((scale, key)) = reads.next().await {
            self.concern.look(match scale {
                Ok(scale) => {
                    retries.forget(&key);
                    self.caches.apply_target(kind, target::of_scale(&key, scale))
                }
                Err(kube::Error::Api(status)) if status.is_not_found() => {
                    retries.forget(&key);
                    self.caches.remove_target(kind, &key)
                }
                Err(error) => {
                    let why = format!("the scale of {} {} cannot be read ({error}); {CURE}", resource.kind, key.name);
                    let concerned = self.caches.set_target_unread(kind, &key, why);
                    retries.failed(key, Instant::now());
                    concerned
                }
            });
        }
    }

    /// Waits until the cluster serves a kind with a `/scale` subresource; until then it is said why it is not scaled.
    async fn discovered(&self, other: &Arc<OtherKind>) -> ApiResource {
        let kind = &Kind::Other(other.clone());
        loop {
            let why = match pinned_kind(&self.client, &other.gvk()).await {
                Ok((_, capabilities)) if capabilities.scope == ObjectScope::Cluster => {
                    format!("{other} belongs to no namespace; correct spec.scaleTargetRef")
                }
                Ok((resource, capabilities)) => {
                    if capabilities.subresources.iter().any(|(subresource, _)| subresource.plural == "scale") {
                        return resource;
                    }
                    format!("{other} has no /scale subresource, so it cannot be scaled; correct spec.scaleTargetRef")
                }
                Err(kube::Error::Api(status)) if status.code != 404 => {
                    format!("it cannot be asked whether the cluster serves {other} ({status})")
                }
                Err(kube::Error::Api(_) | kube::Error::Discovery(_)) => {
                    format!("the cluster serves no {other}; install what provides it, or correct spec.scaleTargetRef")
                }
                Err(error) => format!("it cannot be asked whether the cluster serves {other} ({error})"),
            };
            self.concern.look(self.caches.set_kind_unread(kind, Some(why)));
            tokio::time::sleep(DISCOVERY_INTERVAL).await;
        }
    }
}

async fn scale(client: Client, resource: ApiResource, key: ObjectKey) -> (Result<Scale, kube::Error>, ObjectKey) {
    let api: Api<DynamicObject> = Api::namespaced_with(client, &key.namespace, &resource);
    (api.get_scale(&key.name).await, key)
}
