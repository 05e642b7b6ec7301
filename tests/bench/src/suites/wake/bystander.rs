//! Somebody who sees when a pod gets its address and when it can be reached, without being asked for anything.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::cluster::{Cluster, PATIENCE, PORT, Target};

/// Between two connects.
const KNOCK: Duration = Duration::from_micros(250);

/// Watches one target.
pub(super) struct Bystander {
    pod: AbortOnDropHandle<Result<(IpAddr, Instant, Instant)>>,
    slice: AbortOnDropHandle<Result<Instant>>,
}

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Of the pod.
    pub(super) address: IpAddr,
    /// When the pod's status named it.
    pub(super) addressed: Instant,
    /// When a slice named it.
    pub(super) in_slice: Instant,
    /// When the attempt to connect began that was the first to succeed.
    pub(super) listening: Instant,
}

impl Bystander {
    /// Returns once it watches.
    pub(super) async fn start(cluster: &Cluster, target: &Target) -> Result<Self> {
        let (watching, watches) = oneshot::channel();
        let (pods, of_pods) = (cluster.pods(), format!("app={}", target.name));
        let pod = async move {
            let address = first(pods, &of_pods, watching, |pod: Pod| pod.status?.pod_ip?.parse().ok()).await?;
            let addressed = Instant::now();
            let listening = tokio::task::spawn_blocking(move || knock(address)).await??;
            Ok((address, addressed, listening))
        };
        let (watching_slices, watches_slices) = oneshot::channel();
        let (slices, of_slices) = (cluster.slices(), format!("kubernetes.io/service-name={}", target.name));
        let slice = async move {
            // Those of Elasti name resolvers.
            let names_pod = |slice: EndpointSlice| {
                let ours = slice.metadata.name.is_some_and(|name| name.starts_with("elasti-"));
                (!ours && !slice.endpoints.is_empty()).then_some(())
            };
            first(slices, &of_slices, watching_slices, names_pod).await?;
            Ok(Instant::now())
        };
        let bystander =
            Self { pod: AbortOnDropHandle::new(tokio::spawn(pod)), slice: AbortOnDropHandle::new(tokio::spawn(slice)) };
        watches.await.context("the watch of the pods has not begun")?;
        watches_slices.await.context("the watch of the slices has not begun")?;
        Ok(bystander)
    }

    /// Waits until it has seen all.
    pub(super) async fn end(self) -> Result<Seen> {
        let seen = async {
            let ((address, addressed, listening), in_slice) = (self.pod.await??, self.slice.await??);
            Ok(Seen { address, addressed, in_slice, listening })
        };
        tokio::time::timeout(PATIENCE, seen).await.context("no pod could be reached")?
    }
}

/// The first thing that `seen` finds in what a watch tells; says so once the watch is up.
async fn first<K, T>(
    api: Api<K>,
    labels: &str,
    watching: oneshot::Sender<()>,
    seen: impl Fn(K) -> Option<T>,
) -> Result<T>
where
    K: kube::Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let mut watching = Some(watching);
    let mut events = pin!(watcher::watcher(api, watcher::Config::default().labels(labels)));
    while let Some(event) = events.next().await {
        match event? {
            Event::InitDone => drop(watching.take().map(|watching| watching.send(()))),
            // What was there before is of an earlier wake.
            Event::Apply(object) => {
                if let Some(found) = seen(object) {
                    return Ok(found);
                }
            }
            Event::Init | Event::InitApply(_) | Event::Delete(_) => {}
        }
    }
    bail!("the watch has ended")
}

/// Connects until it works; says when that attempt began.
fn knock(address: IpAddr) -> Result<Instant> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let begun = Instant::now();
        if TcpStream::connect_timeout(&SocketAddr::new(address, PORT), Duration::from_millis(50)).is_ok() {
            return Ok(begun);
        }
        if begun > deadline {
            bail!("{address} does not listen");
        }
        std::thread::sleep(KNOCK);
    }
}
