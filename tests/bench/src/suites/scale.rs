//! What the operator takes for many ElastiServices and many resolvers: the released program before a real API server, with
//! simulated resolvers. All targets are at zero, so that every ElastiService is intercepted and every resolver listens for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use elasti_api::message::ResolverMessage;
use futures::{StreamExt, TryStreamExt, stream};

use super::{Bench, LINEAR, growth};
use crate::plot::Chart;
use crate::report::{Goal, Outcome, Row, Spread, Wanted};
use objects::ApiServer;
use operator::{Access, Operator};
use swarm::{Identity, Resolver, Seen};

mod objects;
mod operator;
mod swarm;

/// ElastiServices and resolvers, in the order in which they are added.
const CASES: [(usize, usize); 5] = [(100, 10), (1_000, 10), (10_000, 10), (10_000, 100), (10_000, 1_000)];

/// Goals: resident memory in MiB, and seconds until every resolver knows all again after a restart.
const MEMORY_GOAL: f64 = 300.0;
const RESTART_GOAL: f64 = 10.0;

/// How much more often the API server may be asked at rest for many than for few.
const FLAT: f64 = 1.2;

/// Wakes for each case.
const WAKES: usize = 10;

/// How long it may take until everything is as it shall be.
const SETTLE: Duration = Duration::from_mins(30);

/// Nothing has changed for this long: at rest.
const QUIET: Duration = Duration::from_secs(5);

/// Measures.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    bench.runtime.block_on(async {
        let mut stand = Stand::new(bench).await?;
        let mut measured = Vec::new();
        let cases = if bench.short { &CASES[..2] } else { &CASES[..] };
        for (services, resolvers) in cases {
            measured.push(stand.measure(bench, *services, *resolvers).await?);
        }
        Ok(outcome(&measured, bench.short))
    })
}

/// The API server, the operator and the resolvers.
struct Stand {
    api: ApiServer,
    access: Access,
    operator: Operator,
    program: std::path::PathBuf,
    resolvers: Vec<Resolver>,
    seen: Arc<Seen>,
    services: usize,
    window: Duration,
    /// Requests a minute that the API server makes itself.
    alone: f64,
}

/// What one case took.
struct Case {
    services: usize,
    resolvers: usize,
    /// Seconds until all that was added was intercepted.
    settled: f64,
    /// Bytes.
    memory: f64,
    /// Milliseconds of CPU time a second, and requests to the API server a minute, at rest.
    cpu: f64,
    requests: f64,
    /// Bytes a second to each resolver at rest, and of a snapshot to each.
    at_rest: f64,
    snapshot: f64,
    /// Seconds.
    restart: f64,
    /// Milliseconds: news to patch sent, news to patch answered.
    wakes: Vec<(f64, f64)>,
}

impl Stand {
    async fn new(bench: &Bench) -> Result<Self> {
        let program = bench.operator.clone().context("name the operator's program by --operator")?;
        let api = ApiServer::new().await?;
        let window = Duration::from_secs(if bench.short { 5 } else { 30 });
        let alone = per_minute(&api, window).await?;
        let access = api.access(&bench.out.join("operator.log")).await?;
        std::fs::create_dir_all(&bench.out)?;
        let operator = Operator::start(&program, &access)?;
        operator.ready()?;
        let seen = Arc::default();
        Ok(Self { api, access, operator, program, resolvers: vec![], seen, services: 0, window, alone })
    }

    async fn measure(&mut self, bench: &Bench, services: usize, resolvers: usize) -> Result<Case> {
        eprintln!("scale: {services} ElastiServices, {resolvers} resolvers");
        let tls = swarm::tls(&self.api.ca().await?)?;
        let numbers = self.resolvers.len()..resolvers;
        let api = &self.api;
        let made: Vec<_> = stream::iter(numbers)
            .map(|number| async move { anyhow::Ok((number, api.resolver(number).await?)) })
            .buffered(16)
            .try_collect()
            .await?;
        for (number, (pod, token)) in made {
            let identity = Identity { pod, token, number: u16::try_from(number + 10)?, operator: Operator::streams() };
            self.resolvers.push(Resolver::start(identity, tls.clone(), self.seen.clone()));
        }
        self.api.add(self.services..services).await?;
        self.services = services;
        let added = Instant::now();
        self.settle().await?;
        let settled = (added.elapsed().saturating_sub(QUIET)).as_secs_f64();
        eprintln!("scale: settled after {settled:.1} s");
        self.rest().await?;

        let (cpu, bytes, begun) = (self.operator.server.cpu()?, self.bytes(), Instant::now());
        let requests = per_minute(&self.api, self.window).await? - self.alone;
        let seconds = begun.elapsed().as_secs_f64();
        let cpu = self.operator.server.cpu()?.saturating_sub(cpu).as_secs_f64() * 1e3 / seconds;
        let each = real(u64::try_from(self.resolvers.len())?);
        let at_rest = real(self.bytes() - bytes) / seconds / each;
        #[expect(clippy::cast_precision_loss, reason = "bytes of memory, far below 2^53")]
        let memory = self.operator.server.resident()? as f64;

        let wakes = self.wakes(if bench.short { 2 } else { WAKES }).await?;
        self.settle().await?;
        self.rest().await?;
        let restart = self.restart()?;
        self.wait_synced().await?;
        let restart = restart.elapsed().as_secs_f64();
        let snapshot = real(self.bytes()) / each;
        eprintln!("scale: all is known again after {restart:.1} s");
        self.settle().await?;
        self.rest().await?;
        Ok(Case { services, resolvers, settled, memory, cpu, requests, at_rest, snapshot, restart, wakes })
    }

    fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }

    /// Waits until every ElastiService is intercepted and nothing is told any more.
    async fn settle(&self) -> Result<()> {
        let begun = Instant::now();
        let (mut last, mut quiet_since) = (u64::MAX, Instant::now());
        loop {
            let states = self.seen.states.load(Ordering::Relaxed);
            if states != last {
                (last, quiet_since) = (states, Instant::now());
            }
            if quiet_since.elapsed() >= QUIET && self.all_intercepted()? {
                return Ok(());
            }
            if begun.elapsed() > SETTLE {
                bail!("{} ElastiServices are not settled after {} s", self.services, SETTLE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until nothing is written any more: events, and slices that name other resolvers.
    async fn rest(&self) -> Result<()> {
        let (mut last, begun) = (self.api.writes().await?, Instant::now());
        loop {
            tokio::time::sleep(QUIET).await;
            let writes = self.api.writes().await?;
            if writes - last < 1.0 {
                return Ok(());
            }
            last = writes;
            if begun.elapsed() > SETTLE {
                bail!("the operator still writes after {} s", SETTLE.as_secs());
            }
        }
    }

    fn all_intercepted(&self) -> Result<bool> {
        let metrics = Operator::metrics()?;
        let (modes, streams) = (metrics.sum("elasti_operator_mode{"), metrics.sum("elasti_operator_resolver_streams"));
        Ok(modes >= real(self.services as u64) && streams >= real(self.resolvers.len() as u64))
    }

    /// Starts another operator in place of this one; says when.
    fn restart(&mut self) -> Result<Instant> {
        self.operator.server.end();
        self.seen.bytes.store(0, Ordering::Relaxed);
        let begun = Instant::now();
        self.operator = Operator::start(&self.program, &self.access)?;
        Ok(begun)
    }

    /// Waits until every resolver has been told of every ElastiService.
    async fn wait_synced(&self) -> Result<()> {
        let begun = Instant::now();
        while !self.resolvers.iter().all(|resolver| resolver.synced() == self.services) {
            if begun.elapsed() > SETTLE {
                bail!("resolvers have not been told of all after {} s", SETTLE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Wakes targets one after the other, by the word of a resolver that it holds a connection.
    async fn wakes(&self, count: usize) -> Result<Vec<(f64, f64)>> {
        let mut wakes = Vec::new();
        let resolver = self.resolvers.first().context("there are resolvers")?;
        let took = || {
            let metrics = Operator::metrics()?;
            let sum =
                |phase: &str| metrics.sum(&format!(r#"elasti_operator_wake_seconds_sum{{phase="{phase}"}}"#)) * 1e3;
            anyhow::Ok((sum("sent"), sum("scaled")))
        };
        for number in 0..count {
            let uid = self.api.uid(number).await?;
            let traffic = |held| ResolverMessage::Traffic { uid: uid.clone(), held, forwarding: 0, accepted: 1 };
            let before = took()?;
            resolver.say(traffic(1)).await?;
            self.api.woken(number).await?;
            let mut after = took()?;
            // The API server may tell of it sooner than the operator has its answer.
            while after.1 <= before.1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                after = took()?;
            }
            wakes.push((after.0 - before.0, after.1 - before.1));
            resolver.say(traffic(0)).await?;
            self.api.put_to_sleep(number).await?;
        }
        Ok(wakes)
    }
}

/// Requests to the API server a minute, our own aside.
async fn per_minute(api: &ApiServer, window: Duration) -> Result<f64> {
    let (before, begun) = (api.requests().await?, Instant::now());
    tokio::time::sleep(window).await;
    // The first of these two is counted in the second.
    let requests = api.requests().await? - before - 1.0;
    Ok(requests * 60.0 / begun.elapsed().as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn real(number: u64) -> f64 {
    number as f64
}

fn outcome(cases: &[Case], short: bool) -> Outcome {
    let mut outcome = Outcome::default();
    for case in cases {
        let name = format!("{} ElastiServices, {} resolvers", case.services, case.resolvers);
        let mut row = |what: &str, unit, values| {
            let row = Row { case: format!("{name}: {what}"), contender: "elasti".into(), unit, values };
            outcome.rows.push(row);
        };
        row("memory of the operator", "MiB", vec![case.memory / f64::from(1 << 20)]);
        row("CPU time at rest", "ms a second", vec![case.cpu]);
        row("API requests at rest", "a minute", vec![case.requests]);
        row("to each resolver at rest", "bytes a second", vec![case.at_rest]);
        row("to each resolver after a restart", "bytes", vec![case.snapshot]);
        row("restart until every resolver knows all", "s", vec![case.restart]);
        row("until those that were added are intercepted", "s", vec![case.settled]);
        row("wake: news, patch sent", "ms", case.wakes.iter().map(|wake| wake.0).collect());
        row("wake: news, patch answered", "ms", case.wakes.iter().map(|wake| wake.1).collect());
    }
    outcome.notes.push(
        "Targets are at zero: each ElastiService is intercepted, and each resolver listens for it. One run of each case; a restart \
         begins with the start of the process."
            .to_owned(),
    );
    let (Some(first), Some(last)) = (cases.first(), cases.last()) else { return outcome };
    let few = |cases: &[Case]| -> Vec<(f64, f64)> {
        let of = cases.iter().filter(|case| case.resolvers == first.resolvers);
        of.map(|case| (real(case.services as u64), case.memory)).collect()
    };
    let line = few(cases);
    if let [.., small, large] = line[..] {
        let values = vec![growth(small, large)];
        let figure = "growth of memory with ElastiServices".to_owned();
        outcome.goals.push(Goal { figure, unit: "(1 is linear)", wanted: Wanted::AtMost(LINEAR), values });
    }
    let mut goal = |figure: &str, unit, wanted, value| {
        outcome.goals.push(Goal {
            figure: figure.to_owned(),
            unit,
            wanted: Wanted::AtMost(wanted),
            values: vec![value],
        });
    };
    if !short {
        let most = |of: fn(&Case) -> f64| cases.iter().map(of).fold(0.0, f64::max);
        goal("most memory of the operator", "MiB", MEMORY_GOAL, most(|case| case.memory) / f64::from(1 << 20));
        goal("longest restart until every resolver knows all", "s", RESTART_GOAL, most(|case| case.restart));
    }
    goal("API requests at rest, most ElastiServices times fewest", "", FLAT, last.requests / first.requests);
    let median = |case: &Case| {
        let sent: Vec<f64> = case.wakes.iter().map(|wake| wake.0).collect();
        Spread::of(&sent).map_or(f64::NAN, |spread| spread.median)
    };
    goal("news to the patch sent, most ElastiServices", "ms", 5.0, median(last));
    outcome.charts.push(Chart {
        name: "scale-memory".to_owned(),
        title: format!("Memory of the operator, {} resolvers", first.resolvers),
        x: "ElastiServices",
        y: "bytes",
        lines: vec![("elasti".to_owned(), line)],
    });
    outcome
}
