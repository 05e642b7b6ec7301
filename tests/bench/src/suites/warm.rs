//! A Service that is not intercepted, on a real cluster with Elasti and without: nothing of it may be noticed.
//!
//! The client is a process of a node, where the programs run for each of its connections; nginx runs in a pod behind a cluster
//! IP. With and without take turns within each round: operator and resolvers are removed and come back.

use anyhow::Result;

use super::Bench;
use crate::cluster::{Cluster, Target};
use crate::process::Cores;
use crate::report::{Goal, Outcome, Row, Wanted};
use crate::wrk::{Told, Wrk};

/// What is left of 1.00 for the noise.
const NOISE: f64 = 0.05;

/// Connections at once, and whether they are kept.
const LOADS: [(usize, bool); 3] = [(1, true), (32, true), (32, false)];

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    bench.runtime.block_on(measure(bench))
}

async fn measure(bench: &Bench) -> Result<Outcome> {
    let cluster = Cluster::new("elasti-bench-warm").await?;
    let target = Target { name: "warm".to_owned(), listens_after: std::time::Duration::ZERO, sleeps: true, runs: true };
    let address = cluster.add(&target).await?;
    cluster.asleep(&target).await?;
    cluster.scale(&target, 1).await?;
    cluster.awake(&target).await?;
    let mut runs: [[Vec<Told>; 2]; LOADS.len()] = Default::default();
    for round in 0..bench.rounds() {
        eprintln!("warm: round {} of {}", round + 1, bench.rounds());
        for turn in 0..2 {
            let with = (turn + round) % 2 == 0;
            cluster.installed(with).await?;
            for ((connections, kept), runs) in LOADS.into_iter().zip(&mut runs) {
                let wrk = Wrk { connections, kept, length: bench.load() };
                let url = format!("http://{address}/");
                let told = tokio::task::spawn_blocking(move || wrk.run(Cores::All, &url)).await??;
                runs[usize::from(with)].push(told);
            }
        }
    }
    cluster.installed(true).await?;
    cluster.remove().await?;
    Ok(outcome(&runs))
}

type Figure = (&'static str, &'static str, fn(&Told) -> f64);

const FIGURES: [Figure; 3] = [
    ("rate", "requests/s", Told::rate),
    ("latency p50", "µs", |told| told.p50),
    ("latency p99", "µs", |told| told.p99),
];

fn outcome(runs: &[[Vec<Told>; 2]]) -> Outcome {
    let mut outcome = Outcome::default();
    for ((connections, kept), [without, with]) in LOADS.into_iter().zip(runs) {
        let how = if kept { "kept" } else { "new each time" };
        let case = format!("{connections} connections {how}");
        for (figure, unit, of) in FIGURES {
            for (contender, runs) in [("without", without), ("with elasti", with)] {
                let values = runs.iter().map(of).collect();
                outcome.rows.push(Row {
                    case: format!("{case}: {figure}"),
                    contender: contender.to_owned(),
                    unit,
                    values,
                });
            }
        }
        let ratios = without.iter().zip(with).map(|(without, with)| with.rate() / without.rate());
        outcome.goals.push(Goal {
            figure: format!("{case}: rate"),
            unit: "× without",
            wanted: Wanted::AtLeast(1.0 - NOISE),
            values: ratios.collect(),
        });
    }
    outcome.notes.push(
        "With and without operator and resolvers on the cluster, by turns; ratios are of runs of the same round."
            .to_owned(),
    );
    outcome
}
