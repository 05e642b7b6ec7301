//! What is missed when a process of Elasti is killed, on a real cluster: wakes without the leader, requests without a resolver.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::StreamExt;
use futures::future::join_all;
use kube::api::ListParams;
use kube::runtime::watcher::{self, Event};
use rustix::process::{Signal, kill_process};
use tokio_util::task::AbortOnDropHandle;

use super::Bench;
use crate::cluster::{Cluster, RESOLVERS, Target, ask, process_of, until};
use crate::report::{Goal, Outcome, Row, Wanted};

/// Goals: seconds, and the part of the requests that must be answered.
const WAKE_GOAL: f64 = 1.0;
const ANSWERED_GOAL: f64 = 0.99;

/// Services that are called one after the other while the leader is killed, how often, and after how many it is.
const CALLED: usize = 60;
const PAUSE: Duration = Duration::from_millis(50);
const KILLED_AFTER: usize = 20;

/// Requests while a resolver is killed, how often, and after how many it is.
const REQUESTS: usize = 300;
const REQUEST_PAUSE: Duration = Duration::from_millis(20);
const REQUESTS_BEFORE: usize = 50;

/// Longer than requests are begun, so that all of them are held.
const LISTENS_AFTER: Duration = Duration::from_secs(8);

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    bench.runtime.block_on(measure(bench))
}

async fn measure(bench: &Bench) -> Result<Outcome> {
    let cluster = Cluster::new("elasti-bench-failover").await?;
    let mut sleepers = Vec::new();
    for index in 0..CALLED {
        let name = format!("sleeper-{index}");
        let target = Target { name, listens_after: Duration::ZERO, sleeps: true, runs: false };
        let address = cluster.add(&target).await?;
        sleepers.push((target, address));
    }
    let slow = Target { name: "slow".to_owned(), listens_after: LISTENS_AFTER, sleeps: true, runs: true };
    let address = cluster.add(&slow).await?;
    let (mut wakes, mut answered) = ([vec![], vec![]], [vec![], vec![]]);
    for round in 0..bench.rounds().min(3) {
        eprintln!("failover: round {}", round + 1);
        let [usual, killed] = without_leader(&cluster, &sleepers).await?;
        wakes[0].push(usual);
        wakes[1].push(killed);
        let [before, after] = without_resolver(&cluster, &slow, address).await?;
        answered[0].push(before);
        answered[1].push(after);
    }
    cluster.remove().await?;
    let [usual, killed] = wakes;
    let [before, after] = answered;
    let row = |case: &str, unit, values: &Vec<f64>| Row {
        case: case.to_owned(),
        contender: "elasti".to_owned(),
        unit,
        values: values.clone(),
    };
    let goal = |figure: &str, unit, wanted, values| Goal { figure: figure.to_owned(), unit, wanted, values };
    Ok(Outcome {
        rows: vec![
            row("slowest wake before the leader is killed", "s", &usual),
            row("slowest wake after the leader is killed", "s", &killed),
            row("requests held when a resolver is killed, answered", "of 1", &before),
            row("requests begun after a resolver is killed, answered", "of 1", &after),
        ],
        goals: vec![
            goal("slowest wake after the leader is killed", "s", Wanted::AtMost(WAKE_GOAL), killed),
            goal("requests begun after a resolver is killed, answered", "of 1", Wanted::AtLeast(ANSWERED_GOAL), after),
        ],
        notes: vec![format!(
            "Call to the change of `spec.replicas` as a watch tells it, one Service each {} ms; one request each {} ms to a Service \
             that is held on the node whose resolver is killed.",
            PAUSE.as_millis(),
            REQUEST_PAUSE.as_millis()
        )],
        ..Outcome::default()
    })
}

/// The slowest wake, in seconds, of those before and after the leader is killed.
async fn without_leader(cluster: &Cluster, sleepers: &[(Target, SocketAddr)]) -> Result<[f64; 2]> {
    cluster.installation_is_ready().await?;
    for (target, _) in sleepers {
        cluster.asleep(target).await?;
    }
    let leader = cluster.leader().await?;
    let process = process_of(&leader, "elasti-operator")?;
    let woken: Arc<Mutex<HashMap<String, Instant>>> = Arc::default();
    let (seen, deployments) = (woken.clone(), cluster.deployments());
    let _watching = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut events = pin!(watcher::watcher(deployments, watcher::Config::default()));
        while let Some(event) = events.next().await {
            let Ok(Event::Apply(deployment) | Event::InitApply(deployment)) = event else { continue };
            if deployment.spec.and_then(|spec| spec.replicas) > Some(0) {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.entry(deployment.metadata.name.unwrap_or_default()).or_insert_with(Instant::now);
            }
        }
    }));
    let mut calls = Vec::new();
    let mut tick = tokio::time::interval(PAUSE);
    for (index, (_, address)) in sleepers.iter().enumerate() {
        tick.tick().await;
        if index == KILLED_AFTER {
            kill_process(process, Signal::KILL)?;
        }
        let (called, address) = (Instant::now(), *address);
        let connection = tokio::spawn(async move { tokio::net::TcpStream::connect(address).await });
        calls.push((called, connection));
    }
    let took = until("all are woken", || async {
        let woken = woken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_each = sleepers.iter().zip(&calls).map(|((target, _), (called, _))| {
            Some(woken.get(&target.name)?.saturating_duration_since(*called).as_secs_f64())
        });
        Ok(of_each.collect::<Option<Vec<f64>>>())
    });
    let took = took.await?;
    drop(calls);
    for (target, _) in sleepers {
        cluster.scale(target, 0).await?;
    }
    let slowest = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
    let (before, after) = took.split_at_checked(KILLED_AFTER).context("more are called than that")?;
    Ok([slowest(before), slowest(after)])
}

/// The part of the requests that was answered, of those before and after the resolver of this node is killed.
async fn without_resolver(cluster: &Cluster, target: &Target, address: SocketAddr) -> Result<[f64; 2]> {
    cluster.installation_is_ready().await?;
    cluster.asleep(target).await?;
    let resolvers = cluster.own_pods().list(&ListParams::default().labels(RESOLVERS)).await?.items;
    let on_this_node = |pod: &&k8s_openapi::api::core::v1::Pod| {
        pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some("node1")
    };
    let resolver = resolvers.iter().find(on_this_node).context("this node has no resolver")?;
    let process = process_of(resolver, "elasti-resolver")?;
    let mut requests = Vec::new();
    let mut tick = tokio::time::interval(REQUEST_PAUSE);
    for index in 0..REQUESTS {
        tick.tick().await;
        if index == REQUESTS_BEFORE {
            kill_process(process, Signal::KILL)?;
        }
        requests.push(tokio::spawn(ask(address)));
    }
    let answered: Vec<bool> = join_all(requests).await.into_iter().map(|answer| matches!(answer, Ok(Ok(_)))).collect();
    cluster.awake(target).await?;
    cluster.scale(target, 0).await?;
    let (before, after) = answered.split_at_checked(REQUESTS_BEFORE).context("more are made than that")?;
    #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
    let part = |part: &[bool]| part.iter().filter(|answered| **answered).count() as f64 / part.len() as f64;
    Ok([part(before), part(after)])
}
