//! What runs from the start on: the watches, and what waits for their first lists.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kube::Client;
use kube::core::ApiResource;
use tokio::sync::watch;

use crate::autoscaler;
use crate::caches::Caches;
use crate::caches::watch::Watches;
use crate::target::Kind;

/// How often it is asked whether the cluster serves Argo Rollouts or KEDA, which may be installed at any time.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(30);

/// Watches everything for ever; calls `complete` once each watch has its first list.
pub(super) async fn watch(watches: Arc<Watches>, client: Client, caches: &Caches, complete: impl FnOnce()) {
    let lists: [watch::Sender<bool>; 8] = std::array::from_fn(|_| watch::Sender::new(false));
    let waiting = join_all(lists.each_ref().map(|list| {
        let mut list = list.subscribe();
        async move {
            // Fails only when the watch has ended, which it does not.
            drop(list.wait_for(|complete| *complete).await);
        }
    }));
    let [elastis, services, slices, deployments, stateful_sets, rollouts, scaled_objects, horizontal] = lists;
    let [deployment, stateful_set] = Kind::BUILT_IN;
    tokio::join!(
        watches.clone().elasti_services(elastis),
        watches.clone().services(services),
        watches.clone().slices(slices),
        watches.clone().targets(deployment, deployments),
        watches.clone().targets(stateful_set, stateful_sets),
        watch_rollouts(watches.clone(), client.clone(), caches, rollouts),
        watch_scaled_objects(watches.clone(), client, caches, scaled_objects),
        watches.clone().autoscalers(autoscaler::Kind::HorizontalPodAutoscaler, horizontal),
        watches.other_targets(),
        async {
            waiting.await;
            complete();
        },
    );
}

/// Watches Rollouts once the cluster serves them; until then it is said that it does not.
async fn watch_rollouts(watches: Arc<Watches>, client: Client, caches: &Caches, complete: watch::Sender<bool>) {
    let Some(resource) = Kind::Rollout.resource() else { return };
    caches.set_kind_unread(&Kind::Rollout, Some("Rollouts have not been read yet".to_owned()));
    served(&client, &resource, |what| {
        let why = format!("the cluster serves no {what}; install Argo Rollouts, or correct spec.scaleTargetRef");
        caches.set_kind_unread(&Kind::Rollout, Some(why));
        complete.send_replace(true);
    })
    .await;
    watches.targets(Kind::Rollout, complete).await;
}

/// Watches KEDA's `ScaledObjects` once the cluster serves them; until then it is said that it does not.
async fn watch_scaled_objects(watches: Arc<Watches>, client: Client, caches: &Caches, complete: watch::Sender<bool>) {
    const KIND: autoscaler::Kind = autoscaler::Kind::ScaledObject;
    caches.set_autoscalers_unread(KIND, Some("ScaledObjects have not been read yet".to_owned()));
    served(&client, &KIND.resource(), |what| {
        let why = format!("the cluster serves no {what}; install KEDA, or remove spec.autoscaler");
        caches.set_autoscalers_unread(KIND, Some(why));
        complete.send_replace(true);
    })
    .await;
    watches.autoscalers(KIND, complete).await;
}

/// Waits until the cluster serves a resource; calls `absent` with what it is each time that it has been found not to. That its API group
/// is served says nothing: Argo CD's is that of Argo Rollouts.
async fn served(client: &Client, wanted: &ApiResource, absent: impl Fn(&str)) {
    let what = format!("{} of {}", wanted.kind, wanted.api_version);
    let mut known = false;
    loop {
        match client.list_api_group_resources(&wanted.api_version).await {
            Ok(served) if served.resources.iter().any(|resource| resource.name == wanted.plural) => return,
            Err(error) if !is_not_served(&error) => {
                tracing::warn!(kind = what, %error, "cannot ask whether the cluster serves it; trying again");
            }
            Ok(_) | Err(_) => {
                absent(&what);
                known = true;
            }
        }
        tokio::time::sleep(if known { DISCOVERY_INTERVAL } else { Duration::from_secs(1) }).await;
    }
}

/// Whether the API server serves nothing at a path: it says so in plain text, whose reason kube takes for one that is known.
fn is_not_served(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Calls `done` once there is a certificate.
pub(super) async fn certificate(mut ready: watch::Receiver<bool>, done: impl FnOnce()) {
    if ready.wait_for(|ready| *ready).await.is_ok() {
        done();
    }
}
