//! What a wake costs beyond what the pod itself needs, on a real cluster: wakes by a connection take turns with bare patches of
//! `/scale`, of targets that are alike.
//!
//! The own share of a wake is the time from accept until `/scale` was answered, and that from the first moment at which the pod
//! could be reached until the connection to it stands, on which the client's first byte is forwarded. The pod is asked for that
//! moment by a bystander, who learns its address
//! from a watch as anybody may and connects to it every quarter of a millisecond.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;

use super::{Bench, percentile};
use crate::cluster::{Clock, Cluster, OPERATORS, PORT, RESOLVERS, Target, ask, until};
use crate::report::{Goal, Outcome, Row, Spread, Wanted};
use bystander::Bystander;
use picture::Whose;
use together::Together;
use trace::{Held, Woken};

mod bystander;
mod picture;
mod together;
mod trace;

/// Goals for the own share, in milliseconds.
const P50_GOAL: f64 = 5.0;
const P99_GOAL: f64 = 20.0;

/// Wakes of each kind.
const ROUNDS: usize = 30;

/// When a target begins to listen, after its container has started.
const KINDS: [(&str, Duration); 2] =
    [("listens at once", Duration::ZERO), ("listens after 1.5 s", Duration::from_millis(1500))];

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    bench.runtime.block_on(measure(bench))
}

async fn measure(bench: &Bench) -> Result<Outcome> {
    let cluster = Cluster::new("elasti-bench").await?;
    let mut table = Table::default();
    let rounds = bench.wakes.unwrap_or(if bench.short { 2 } else { ROUNDS });
    let mut targets = Vec::new();
    for (index, (kind, listens_after)) in KINDS.into_iter().enumerate() {
        for (name, sleeps) in [("woken", true), ("bare", false)] {
            let target = Target { name: format!("{name}-{index}"), listens_after, sleeps, runs: true };
            let address = cluster.add(&target).await?;
            cluster.asleep(&target).await?;
            targets.push((kind, target, address));
        }
    }
    for round in 0..rounds {
        eprintln!("wake: round {} of {rounds}", round + 1);
        // Each round begins with another one.
        targets.rotate_left(1);
        for (kind, target, address) in &targets {
            if target.sleeps {
                table.take(kind, &woken(&cluster, target, *address).await?);
            } else {
                table.take_bare(kind, &bare(&cluster, target).await?);
            }
            cluster.awake(target).await?;
            cluster.scale(target, 0).await?;
            cluster.asleep(target).await?;
        }
    }
    let together = together::measure(&cluster, bench.short).await?;
    cluster.remove().await?;
    Ok(table.outcome(&together))
}

/// A wake by a connection, on one clock.
struct Wake {
    clock: Clock,
    asked: Instant,
    held: Held,
    woken: Woken,
    /// When the pod's address could be known from its status and from a slice, and when it could be reached.
    addressed: Instant,
    in_slice: Instant,
    listening: Instant,
    first_byte: Instant,
}

async fn woken(cluster: &Cluster, target: &Target, address: SocketAddr) -> Result<Wake> {
    let bystander = Bystander::start(cluster, target).await?;
    let (clock, from, asked) = (Clock::start(), SystemTime::now(), Instant::now());
    let first_byte = ask(address).await?;
    let bystander::Seen { addressed, in_slice, listening, .. } = bystander.end().await?;
    let (namespace, name) = (cluster.namespace(), &target.name);
    let held = until("the resolver has logged the wake", || async {
        let lines = cluster.logs(RESOLVERS, asked.elapsed()).await?;
        Ok(trace::held(&lines, namespace, name, from))
    });
    let held = held.await?;
    let woken = until("the operator has logged the wake", || async {
        let lines = cluster.logs(OPERATORS, asked.elapsed()).await?;
        Ok(trace::woken(&lines, namespace, name, from))
    });
    Ok(Wake { clock, asked, held, woken: woken.await?, addressed, in_slice, listening, first_byte })
}

/// A bare patch of `/scale`, and an impatient client.
struct Bare {
    scaled: Duration,
    addressed: Duration,
    listening: Duration,
    first_byte: Duration,
}

async fn bare(cluster: &Cluster, target: &Target) -> Result<Bare> {
    let bystander = Bystander::start(cluster, target).await?;
    let begun = Instant::now();
    cluster.scale(target, 1).await?;
    let scaled = begun.elapsed();
    let bystander::Seen { address, addressed, listening, .. } = bystander.end().await?;
    let first_byte = ask(SocketAddr::new(address, PORT)).await?;
    let since = |moment: Instant| moment.saturating_duration_since(begun);
    Ok(Bare { scaled, addressed: since(addressed), listening: since(listening), first_byte: since(first_byte) })
}

/// What ends a phase, whose it is, and its values in ms.
type Pictured = (&'static str, Whose, Vec<f64>);

/// Milliseconds, by what was measured and who was measured.
#[derive(Default)]
struct Table {
    rows: BTreeMap<(String, usize, &'static str, &'static str), Vec<f64>>,
    own: Vec<f64>,
    beyond_patch: Vec<f64>,
    /// By title of the row: phases that follow each other, as the picture shows them.
    pictured: BTreeMap<String, Vec<Pictured>>,
}

impl Table {
    fn put(&mut self, kind: &str, order: usize, phase: &'static str, who: &'static str, value: f64) {
        self.rows.entry((kind.to_owned(), order, phase, who)).or_default().push(value);
    }

    fn take(&mut self, kind: &str, wake: &Wake) {
        let Wake { held, woken, .. } = wake;
        let at = |moment: SystemTime| wake.clock.instant(moment).unwrap_or(wake.asked);
        let accepted = at(held.accepted);
        let to_patch = between(accepted, at(woken.sent));
        let patch = between(at(woken.sent), at(woken.scaled));
        let after = between(wake.listening, wake.first_byte);
        // The bystander may be later than the resolver.
        let connected = (between(wake.listening, accepted) + millis(held.forwarded)).max(0.0);
        let from_accept = |time: Option<Duration>| time.map_or(f64::NAN, millis);
        let phases = [
            ("accept, news sent", from_accept(held.notified)),
            ("accept, news received", between(accepted, at(woken.told))),
            ("accept, patch sent", to_patch),
            ("patch sent, answered", patch),
            ("patch answered, address to be had", between(at(woken.scaled), wake.addressed)),
            ("address to be had from the pod, from a slice", between(wake.addressed, wake.in_slice)),
            (
                "address to be had, known to the resolver",
                between(wake.addressed, accepted) + from_accept(held.addressed),
            ),
            ("reachable, known to the resolver", between(wake.listening, accepted) + from_accept(held.ready)),
            ("reachable, connected by the resolver", connected),
            ("reachable, first byte", after),
            ("own share", to_patch + patch + connected),
            ("own share beyond the patch", to_patch + connected),
            ("total", between(wake.asked, wake.first_byte)),
        ];
        for (order, (phase, value)) in phases.into_iter().enumerate() {
            if value.is_finite() {
                self.put(kind, order, phase, "elasti", value);
            }
        }
        self.picture(
            format!("Woken by a connection, {kind}"),
            [
                ("news sent", Whose::Elasti, from_accept(held.notified)),
                ("operator has it", Whose::Elasti, between(accepted, at(woken.told)) - from_accept(held.notified)),
                ("patch sent", Whose::Elasti, between(at(woken.told), at(woken.sent))),
                ("patch answered", Whose::Kubernetes, patch),
                ("pod has an address", Whose::Kubernetes, between(at(woken.scaled), wake.addressed)),
                ("pod can be reached", Whose::Pod, between(wake.addressed, wake.listening)),
                ("resolver is connected", Whose::Elasti, connected),
                ("first byte at the client", Whose::Elasti, after - connected),
            ],
        );
        self.own.push(to_patch + patch + connected);
        self.beyond_patch.push(to_patch + connected);
    }

    fn picture<const N: usize>(&mut self, row: String, phases: [(&'static str, Whose, f64); N]) {
        let row =
            self.pictured.entry(row).or_insert_with(|| phases.map(|(name, whose, _)| (name, whose, vec![])).into());
        for ((_, _, values), (_, _, value)) in row.iter_mut().zip(phases) {
            values.push(value);
        }
    }

    fn take_bare(&mut self, kind: &str, bare: &Bare) {
        let phases = [
            (3, "patch sent, answered", bare.scaled),
            (4, "patch answered, address to be had", bare.addressed.saturating_sub(bare.scaled)),
            (9, "reachable, first byte", bare.first_byte.saturating_sub(bare.listening)),
            (12, "total", bare.first_byte),
        ];
        for (order, phase, value) in phases {
            self.put(kind, order, phase, "bare patch", millis(value));
        }
        let since = |from: Duration, to: Duration| millis(to) - millis(from);
        self.picture(
            format!("A bare patch, {kind}"),
            [
                ("patch answered", Whose::Kubernetes, millis(bare.scaled)),
                ("pod has an address", Whose::Kubernetes, since(bare.scaled, bare.addressed)),
                ("pod can be reached", Whose::Pod, since(bare.addressed, bare.listening)),
                ("first byte at the client", Whose::Pod, since(bare.listening, bare.first_byte)),
            ],
        );
    }

    fn outcome(self, together: &Together) -> Outcome {
        let goal = |figure: &str, wanted, values| Goal {
            figure: figure.to_owned(),
            unit: "ms",
            wanted: Wanted::AtMost(wanted),
            values,
        };
        let median = |values: &[f64]| Spread::of(values).map_or(f64::NAN, |spread| spread.median);
        let pictured = self.pictured.iter().map(|(title, phases)| {
            let phases = phases.iter().map(|(name, whose, values)| (*name, *whose, median(values)));
            (title.clone(), phases.collect())
        });
        let picture = picture::draw(&pictured.collect::<Vec<_>>());
        let p99 = |values: &[f64]| percentile(values, 0.99).into_iter().collect::<Vec<_>>();
        let rows = self.rows.into_iter().map(|((kind, _, phase, who), values)| Row {
            case: format!("{kind}: {phase}"),
            contender: who.to_owned(),
            unit: "ms",
            values,
        });
        let notes = format!(
            "{} wakes by a connection and as many by a bare patch, by turns. The own share is accept to the answer of `/scale`, and \
             from the first moment at which the pod could be reached until the connection to it stands. A p99 of fewer than 100 is \
             the worst. Pods of the Services that are woken in one second are taken by no node, so that the machine is not measured; the bare \
             patches are sent in the same second-long rhythm, by turns.",
            self.own.len()
        );
        Outcome {
            rows: rows.chain(together.rows()).collect(),
            goals: [
                goal("own share of a wake, p50", P50_GOAL, self.own.clone()),
                goal("own share of a wake, p99", P99_GOAL, p99(&self.own)),
                goal(
                    "own share beyond the patch, which a bare one waits for too, p50",
                    P50_GOAL,
                    self.beyond_patch.clone(),
                ),
                goal(
                    "own share beyond the patch, which a bare one waits for too, p99",
                    P99_GOAL,
                    p99(&self.beyond_patch),
                ),
            ]
            .into_iter()
            .chain(together.goals())
            .collect(),
            notes: vec![notes],
            pictures: vec![("wake-phases", picture)],
            ..Outcome::default()
        }
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Milliseconds from one moment to another, negative if it is the other way round.
fn between(from: Instant, to: Instant) -> f64 {
    millis(to.saturating_duration_since(from)) - millis(from.saturating_duration_since(to))
}
