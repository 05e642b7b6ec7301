//! Many Services woken in one second, by turns with as many bare patches of `/scale` in the same rhythm.
//!
//! The machine is as busy with Kubernetes' own controllers one way as the other, so what the bare patches wait for is the API server's
//! share, and what wakes wait for beyond it ours.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;

use super::{millis, percentile, trace};
use crate::cluster::{Clock, Cluster, OPERATORS, Target, until};
use crate::report::{Goal, Row, Wanted};

/// Milliseconds.
const GOAL: f64 = 50.0;

/// Services that are woken in one second.
const TOGETHER: usize = 100;

/// Of each kind.
const ROUNDS: usize = 3;

/// Milliseconds, a list for each round.
#[derive(Default)]
pub(super) struct Together {
    sent: Vec<Vec<f64>>,
    answered: Vec<Vec<f64>>,
    bare: Vec<Vec<f64>>,
}

/// Measures.
pub(super) async fn measure(cluster: &Cluster, short: bool) -> Result<Together> {
    let (count, rounds) = if short { (10, 1) } else { (TOGETHER, ROUNDS) };
    let pause = Duration::from_secs(1) / u32::try_from(count)?;
    let targets = |kind: &str, sleeps| -> Vec<Target> {
        let name = |index| format!("{kind}-{index}");
        let target = |index| Target { name: name(index), listens_after: Duration::ZERO, sleeps, runs: false };
        (0..count).map(target).collect()
    };
    let (woken, patched) = (targets("together", true), targets("together-bare", false));
    let mut addresses = Vec::new();
    for target in &woken {
        addresses.push(cluster.add(target).await?);
    }
    for target in &patched {
        cluster.add(target).await?;
    }
    let mut together = Together::default();
    for round in 0..rounds {
        eprintln!("wake: {count} Services in a second, round {} of {rounds}", round + 1);
        all_asleep(cluster, &woken).await?;
        let (sent, answered) = wake(cluster, &woken, &addresses, pause).await?.into_iter().unzip();
        together.sent.push(sent);
        together.answered.push(answered);
        all_asleep(cluster, &woken).await?;
        all_asleep(cluster, &patched).await?;
        together.bare.push(patch(cluster, &patched, pause).await?);
        all_asleep(cluster, &patched).await?;
    }
    Ok(together)
}

async fn all_asleep(cluster: &Cluster, targets: &[Target]) -> Result<()> {
    for target in targets {
        cluster.scale(target, 0).await?;
    }
    for target in targets {
        cluster.asleep(target).await?;
    }
    Ok(())
}

/// Of each: milliseconds from the call until the patch was sent, and until it was answered.
async fn wake(
    cluster: &Cluster,
    targets: &[Target],
    addresses: &[SocketAddr],
    pause: Duration,
) -> Result<Vec<(f64, f64)>> {
    let (clock, from) = (Clock::start(), SystemTime::now());
    let calls = (0..).zip(addresses.to_vec()).map(|(number, address)| {
        tokio::spawn(async move {
            tokio::time::sleep(pause * number).await;
            let asked = Instant::now();
            anyhow::Ok((asked, tokio::net::TcpStream::connect(address).await?))
        })
    });
    let calls: Vec<_> = futures::future::try_join_all(calls).await?.into_iter().collect::<Result<_>>()?;
    let woken = until("the operator has logged every wake", || async {
        let lines = cluster.logs(OPERATORS, from.elapsed().unwrap_or_default()).await?;
        let woken = targets.iter().map(|target| trace::woken(&lines, cluster.namespace(), &target.name, from));
        Ok(woken.collect::<Option<Vec<trace::Woken>>>())
    });
    let woken = woken.await?;
    // The connections were held until here.
    let of_each = woken.iter().zip(calls).map(|(woken, (asked, _connection))| {
        let after = |moment| anyhow::Ok(millis(clock.instant(moment)?.saturating_duration_since(asked)));
        Ok((after(woken.sent)?, after(woken.scaled)?))
    });
    of_each.collect()
}

/// Of each: milliseconds from the patch until it was answered.
async fn patch(cluster: &Cluster, targets: &[Target], pause: Duration) -> Result<Vec<f64>> {
    let patches = (0..).zip(targets).map(|(number, target)| async move {
        tokio::time::sleep(pause * number).await;
        let asked = Instant::now();
        cluster.scale(target, 1).await?;
        anyhow::Ok(millis(asked.elapsed()))
    });
    futures::future::try_join_all(patches).await
}

impl Together {
    /// Of all rounds.
    pub(super) fn rows(&self) -> Vec<Row> {
        let count = self.sent.first().map_or(0, Vec::len);
        let row = |phase: &str, who: &str, rounds: &[Vec<f64>]| Row {
            case: format!("{count} Services in a second: {phase}"),
            contender: who.to_owned(),
            unit: "ms",
            values: rounds.concat(),
        };
        vec![
            row("call, patch sent", "elasti", &self.sent),
            row("call, patch answered", "elasti", &self.answered),
            row("patch sent, answered", "bare patch", &self.bare),
        ]
    }

    /// Of each round.
    pub(super) fn goals(&self) -> Vec<Goal> {
        let p99 =
            |rounds: &[Vec<f64>]| -> Vec<f64> { rounds.iter().filter_map(|values| percentile(values, 0.99)).collect() };
        let beyond = p99(&self.answered).into_iter().zip(p99(&self.bare)).map(|(own, bare)| own - bare);
        let goal = |figure: &str, values| Goal {
            figure: format!("many Services in one second, {figure}"),
            unit: "ms",
            wanted: Wanted::AtMost(GOAL),
            values,
        };
        vec![
            goal("call to the patch sent, p99", p99(&self.sent)),
            goal("call to the answer of `/scale`, p99, less that of a bare patch", beyond.collect()),
        ]
    }
}
