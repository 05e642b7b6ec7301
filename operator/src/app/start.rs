//! What runs from the start on: the watches, and what waits for their first lists.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use kube::Client;
use tokio::sync::watch;

use crate::autoscaler;
use crate::caches::Caches;
use crate::caches::watch::Watches;
use crate::target::Kind;

/// How often it is asked whether the cluster serves Argo Rollouts or KEDA, which may be installed at any time.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(30);

/// API group of Argo Rollouts.
const ROLLOUTS: &str = "argoproj.io";

/// API group of KEDA.
const KEDA: &str = "keda.sh";

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
    caches.set_kind_unread(&Kind::Rollout, Some("Rollouts have not been read yet".to_owned()));
    served(&client, ROLLOUTS, || {
        let why = format!("the cluster serves no {ROLLOUTS}; install Argo Rollouts, or correct spec.scaleTargetRef");
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
    served(&client, KEDA, || {
        let why = format!("the cluster serves no {KEDA}; install KEDA, or remove spec.autoscaler");
        caches.set_autoscalers_unread(KIND, Some(why));
        complete.send_replace(true);
    })
    .await;
    watches.autoscalers(KIND, complete).await;
}

/// Waits until the cluster serves an API group; calls `absent` each time that it has been found not to.
async fn served(client: &Client, wanted: &str, absent: impl Fn()) {
    let mut known = false;
    loop {
        match client.list_api_groups().await {
            Ok(groups) if groups.groups.iter().any(|group| group.name == wanted) => return,
            Ok(_) => {
                absent();
                known = true;
            }
            Err(error) => tracing::warn!(%error, "cannot ask which APIs the cluster serves; trying again"),
        }
        tokio::time::sleep(if known { DISCOVERY_INTERVAL } else { Duration::from_secs(1) }).await;
    }
}

/// Calls `done` once there is a certificate.
pub(super) async fn certificate(mut ready: watch::Receiver<bool>, done: impl FnOnce()) {
    if ready.wait_for(|ready| *ready).await.is_ok() {
        done();
    }
}
