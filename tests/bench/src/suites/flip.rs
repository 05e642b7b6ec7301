//! How long after the decision every node redirects the connections to a Service, and how long after the opposite one none does,
//! on a real cluster: by eBPF, beside a changed EndpointSlice that kube-proxy acts upon.
//!
//! The decision is there for everybody when a watch tells of it: of the mode in the status of the ElastiService, or of the slice.
//! On each node somebody connects all the time; a flip has come to a node with the first connection begun there that comes out
//! where it shall.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::pin::pin;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio_util::task::AbortOnDropHandle;

use super::{Bench, percentile};
use crate::cluster::{Cluster, FIELD_MANAGER, PORT, RESOLVERS, Target, is_ready, until};
use crate::plot::Chart;
use crate::report::{Goal, Outcome, Row, Wanted};
use knocker::{DIRECT, Knocker, REDIRECTED, Seen, now};

pub(crate) mod knocker;

/// Goal, in milliseconds.
const P99_GOAL: f64 = 5.0;

/// Flips of each kind and direction.
const ROUNDS: usize = 30;

/// Before a slice is changed. kube-proxy writes its rules once a second at most, so that a change soon after another one waits;
/// on a cluster that is busy more of them do.
const REST: Duration = Duration::from_secs(2);

/// The Service that has no pods, but listeners of this process.
const SLICED: &str = "sliced";

/// What the two listeners greet with.
const GREETINGS: [&str; 2] = ["a", "b"];

/// The least that the chart shows, in milliseconds.
const SHORTEST: f64 = 0.1;

/// What is measured, in the order of the table.
const CASES: [(&str, &str); 3] =
    [("to the resolvers", "elasti"), ("back to the pods", "elasti"), ("to another endpoint", "slice and kube-proxy")];

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    bench.runtime.block_on(measure(bench))
}

async fn measure(bench: &Bench) -> Result<Outcome> {
    let nodes = std::env::var("ELASTI_NODES").context("run this by `cargo xtask bench`")?;
    let nodes: Vec<&str> = nodes.split(',').collect();
    let cluster = Cluster::new("elasti-bench-flip").await?;
    let (flipped, sliced) = (Flipped::new(&cluster, &nodes).await?, Sliced::new(&cluster, &nodes).await?);
    let rounds = bench.wakes.unwrap_or(if bench.short { 2 } else { ROUNDS });
    let mut values: [Vec<f64>; CASES.len()] = Default::default();
    for round in 0..rounds {
        eprintln!("flip: round {} of {rounds}", round + 1);
        let [to, back] = flipped.there_and_back(&cluster).await?;
        values[0].push(to);
        values[1].push(back);
        for towards in [1, 0] {
            tokio::time::sleep(REST).await;
            values[2].push(sliced.flip(&cluster, towards).await?);
        }
    }
    cluster.remove().await?;
    Ok(outcome(values))
}

/// What shows that a flip has come: to everybody, and to each node.
struct Watched {
    decided: Seen,
    nodes: Vec<Knocker>,
    _watch: AbortOnDropHandle<()>,
}

impl Watched {
    /// Waits until this was decided, and until connections of all nodes come out so; both from their moments on. Says when both were.
    async fn flip(&self, decision: &str, decided_from: Duration, way: &str, from: Duration) -> Result<Flip> {
        until(&format!("connections of all nodes come out at {way}"), || async {
            let decided = self.decided.first(decision, decided_from);
            let came: Option<Vec<Duration>> = self.nodes.iter().map(|node| node.seen.first(way, from)).collect();
            let came = came.and_then(|came| came.into_iter().max());
            Ok(decided.zip(came).map(|(decided, came)| Flip { decided, came }))
        })
        .await
    }

    /// Waits until connections of all nodes come out so.
    async fn settled(&self, way: &str) -> Result<()> {
        until(&format!("connections of all nodes come out at {way}"), || async {
            Ok(self.nodes.iter().all(|node| node.seen.is(way)).then_some(()))
        })
        .await
    }
}

/// When a flip was decided, and when it had come to the last node.
#[derive(Clone, Copy, Debug)]
struct Flip {
    decided: Duration,
    came: Duration,
}

impl Flip {
    /// Milliseconds between the two; below zero when a node was quicker than the watch.
    fn took(self) -> f64 {
        (self.came.as_secs_f64() - self.decided.as_secs_f64()) * 1e3
    }
}

/// A target with an ElastiService.
struct Flipped {
    target: Target,
    watched: Watched,
}

impl Flipped {
    async fn new(cluster: &Cluster, nodes: &[&str]) -> Result<Self> {
        let target = Target { name: "flipped".to_owned(), listens_after: Duration::ZERO, sleeps: true, runs: true };
        let address = cluster.add(&target).await?;
        cluster.asleep(&target).await?;
        cluster.scale(&target, 1).await?;
        cluster.awake(&target).await?;
        let mode = |elasti: kube::api::DynamicObject| Some(elasti.data["status"]["mode"].as_str()?.to_owned());
        let (decided, watch) = watch(cluster.elastis(), mode);
        let resolvers = cluster.own_pods().list(&ListParams::default().labels(RESOLVERS)).await?.items;
        let mut knockers = Vec::new();
        for (number, node) in (1..).zip(nodes) {
            let name = format!("node{number}");
            let here = resolvers
                .iter()
                .find(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(&name));
            let ip = here.and_then(|pod| pod.status.as_ref()?.pod_ip.as_deref()).context("a node has no resolver")?;
            knockers.push(Knocker::start(node, address, Some(ip.parse()?))?);
        }
        let watched = Watched { decided, nodes: knockers, _watch: watch };
        watched.settled(DIRECT).await?;
        Ok(Self { target, watched })
    }

    /// Milliseconds until every node redirected, and until none did any more.
    async fn there_and_back(&self, cluster: &Cluster) -> Result<[f64; 2]> {
        self.settled(cluster).await?;
        let from = now();
        cluster.scale(&self.target, 0).await?;
        let to = self.watched.flip("proxy", from, REDIRECTED, from).await?;
        // What the knockers open wakes it too.
        cluster.scale(&self.target, 1).await?;
        let back = self.watched.flip("serve", to.decided, DIRECT, to.came).await?;
        Ok([to.took(), back.took()])
    }

    /// Waits until nothing of the round before goes on.
    async fn settled(&self, cluster: &Cluster) -> Result<()> {
        let selected = ListParams::default().labels(&format!("app={}", self.target.name));
        until("the target has one pod, which is ready", || async {
            let pods = cluster.pods().list(&selected).await?.items;
            Ok((pods.len() == 1 && pods.iter().all(is_ready)).then_some(()))
        })
        .await?;
        cluster.awake(&self.target).await?;
        self.watched.settled(DIRECT).await
    }
}

/// A Service without a selector, whose slice names one of two listeners of this process.
struct Sliced {
    ports: [u16; 2],
    address: IpAddr,
    watched: Watched,
}

impl Sliced {
    async fn new(cluster: &Cluster, nodes: &[&str]) -> Result<Self> {
        let mut ports = [0; 2];
        for (port, greeting) in ports.iter_mut().zip(GREETINGS) {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            *port = listener.local_addr()?.port();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    // Who is gone needs no greeting.
                    let _greeted = stream.and_then(|mut stream| stream.write_all(greeting.as_bytes()));
                }
            });
        }
        let here = Api::<Node>::all(cluster.client.clone()).get("node1").await?;
        let mut addresses = here.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let address = addresses.find(|address| address.type_ == "InternalIP").context("node1 has no address")?;
        let address = address.address.parse()?;
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": SLICED, "namespace": cluster.namespace()},
            "spec": {"ports": [{"port": PORT}]},
        });
        let services: Api<Service> = Api::namespaced(cluster.client.clone(), cluster.namespace());
        let service = services.patch(SLICED, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(service)).await?;
        let ip = service.spec.and_then(|spec| spec.cluster_ip).context("the Service has no cluster IP")?;
        let dialled = SocketAddr::new(ip.parse()?, PORT);
        let greeting = move |slice: EndpointSlice| {
            let port = slice.metadata.name.filter(|name| name == SLICED).and(slice.ports)?.first()?.port?;
            let index = ports.iter().position(|known| i32::from(*known) == port)?;
            Some(GREETINGS[index].to_owned())
        };
        let (decided, watch) = watch(cluster.slices(), greeting);
        let nodes = nodes.iter().map(|node| Knocker::start(node, dialled, None)).collect::<Result<_>>()?;
        let sliced = Self { ports, address, watched: Watched { decided, nodes, _watch: watch } };
        sliced.name(cluster, 0).await?;
        sliced.watched.settled(GREETINGS[0]).await?;
        Ok(sliced)
    }

    /// Has the slice name one of the listeners.
    async fn name(&self, cluster: &Cluster, listener: usize) -> Result<()> {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": SLICED, "namespace": cluster.namespace(),
                "labels": {"kubernetes.io/service-name": SLICED, "endpointslice.kubernetes.io/managed-by": FIELD_MANAGER},
            },
            "endpoints": [{"addresses": [self.address], "conditions": {"ready": true}}],
            "ports": [{"name": "", "port": self.ports[listener], "protocol": "TCP"}],
        });
        cluster.slices().patch(SLICED, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(slice)).await?;
        Ok(())
    }

    /// Milliseconds until connections of all nodes came to this listener, and none to the other one.
    async fn flip(&self, cluster: &Cluster, listener: usize) -> Result<f64> {
        let (from, greeting) = (now(), GREETINGS[listener]);
        self.name(cluster, listener).await?;
        Ok(self.watched.flip(greeting, from, greeting, from).await?.took())
    }
}

/// What a watch says of the objects that say something, until the handle is dropped.
fn watch<K>(api: Api<K>, says: impl Fn(K) -> Option<String> + Send + 'static) -> (Seen, AbortOnDropHandle<()>)
where
    K: kube::Resource + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static,
{
    let seen = Seen::default();
    let writer = seen.clone();
    let watching = tokio::spawn(async move {
        let mut events = pin!(watcher::watcher(api, watcher::Config::default()));
        while let Some(event) = events.next().await {
            // One that fails is begun anew.
            let Ok(Event::Apply(object) | Event::InitApply(object)) = event else { continue };
            if let Some(what) = says(object) {
                writer.push(now(), &what);
            }
        }
    });
    (seen, AbortOnDropHandle::new(watching))
}

fn outcome(values: [Vec<f64>; CASES.len()]) -> Outcome {
    let p99 = |values: &[f64]| percentile(values, 0.99).into_iter().collect::<Vec<_>>();
    let mut outcome = Outcome::default();
    let mut lines = Vec::new();
    for ((case, contender), values) in CASES.into_iter().zip(values) {
        for (figure, values) in [("last node", values.clone()), ("last node, p99", p99(&values))] {
            let (case, contender) = (format!("{case}: {figure}"), contender.to_owned());
            outcome.rows.push(Row { case, contender, unit: "ms", values });
        }
        if contender == "elasti" {
            outcome.goals.push(Goal {
                figure: format!("decision to the last node, {case}, p99"),
                unit: "ms",
                wanted: Wanted::AtMost(P99_GOAL),
                values: p99(&values),
            });
        }
        lines.push((format!("{case}, {contender}"), distribution(values)));
    }
    outcome.notes.push(format!(
        "From when a watch tells of the decision until the last of two nodes acts upon it, as somebody on each sees who connects \
         every half a millisecond; below zero he saw it before the watch did. A slice is changed after {} s without another change, \
         so that kube-proxy has nothing to wait for. A p99 of fewer than 100 is the worst.",
        REST.as_secs()
    ));
    outcome.charts.push(Chart {
        name: "flip".to_owned(),
        title: "Part of the flips that have come to every node".to_owned(),
        x: "ms after the decision",
        y: "part",
        lines,
    });
    outcome
}

/// Points of the part of the values that lie at or below each. Logarithmic axes have no zero.
fn distribution(mut values: Vec<f64>) -> Vec<(f64, f64)> {
    values.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "few values")]
    let part = |index: usize| (index + 1) as f64 / values.len() as f64;
    values.iter().enumerate().map(|(index, value)| (value.max(SHORTEST), part(index))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_at_one_and_knows_no_zero() {
        assert_eq!(distribution(vec![2.0, -1.0]), [(SHORTEST, 0.5), (2.0, 1.0)]);
    }

    #[test]
    fn a_flip_that_a_node_saw_before_the_watch_is_below_zero() {
        let flip = Flip { decided: Duration::from_millis(7), came: Duration::from_millis(5) };
        assert!((flip.took() + 2.0).abs() < 1e-9);
    }
}
