//! The resolver in the path, beside `HAProxy` on the same cores, and beside nobody.
//!
//! nginx answers and wrk asks, both on the other cores. Within a round every case is run by every contender, one right after
//! the other and each round in another order; ratios are of runs of the same round, so that what the machine does meanwhile
//! hits all of them. Ratios are turned so that more than 1 is better than `HAProxy`.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use elasti_api::message::{Protocol, ServiceState};

use super::Bench;
use crate::plot::Chart;
use crate::process::{Cores, Server};
use crate::report::{Goal, Outcome, Row, Wanted};
use crate::resolver::{self, Resolver};
use crate::target::{self, File, LARGE, SMALL, Target};
use crate::wrk::Wrk;

/// Interception ports: the first is said to carry bytes, the second HTTP.
const PORTS: [(u16, Protocol); 2] = [(20_001, Protocol::Tcp), (20_002, Protocol::Http)];

/// What a contender takes connections for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bytes,
    Http,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Bytes, Self::Http];

    fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Http => "HTTP",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Direct,
    Haproxy,
    /// `HAProxy` that gives each client a connection of its own to the target, as a resolver does.
    HaproxyUnshared,
    Elasti,
}

impl Contender {
    const ALL: [Self; 4] = [Self::Direct, Self::Haproxy, Self::HaproxyUnshared, Self::Elasti];

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Haproxy => "HAProxy",
            Self::HaproxyUnshared => "HAProxy, nothing shared",
            Self::Elasti => "elasti",
        }
    }

    fn port(self, kind: Kind) -> u16 {
        match (self, kind) {
            (Self::Direct, _) => 8080,
            (Self::Haproxy, Kind::Bytes) => 8081,
            (Self::Haproxy, Kind::Http) => 8082,
            (Self::HaproxyUnshared, _) => 8083,
            (Self::Elasti, Kind::Bytes) => PORTS[0].0,
            (Self::Elasti, Kind::Http) => PORTS[1].0,
        }
    }

    /// Whether this case is another for it than for the others: sharing matters where connections are made.
    fn takes_part(self, kind: Kind, load: Load) -> bool {
        self != Self::HaproxyUnshared || kind == Kind::Http && !load.kept
    }
}

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    connections: usize,
    body: File,
    /// Connections last for many requests, or for one.
    kept: bool,
}

const LOADS: [Load; 5] = [
    Load { connections: 1, body: SMALL, kept: true },
    Load { connections: 32, body: SMALL, kept: true },
    Load { connections: 256, body: SMALL, kept: true },
    Load { connections: 32, body: LARGE, kept: true },
    Load { connections: 32, body: SMALL, kept: false },
];

impl Load {
    fn name(self, kind: Kind) -> String {
        let Self { connections, body, kept } = self;
        let how = if kept { "kept" } else { "new each time" };
        let plural = if connections == 1 { "" } else { "s" };
        format!("{}, {connections} connection{plural} {how}, {}", kind.name(), body.0)
    }
}

/// What one run came to.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// A second.
    requests: f64,
    /// In microseconds.
    p50: f64,
    p99: f64,
    /// Of the contender's process, in microseconds for each request; 0 for nobody.
    cpu: f64,
}

/// All of them, running.
struct Stand {
    haproxy: Server,
    resolver: Resolver,
    _target: Target,
}

impl Stand {
    fn new(bench: &Bench) -> Result<Self> {
        let target = Target::start(Cores::Others)?;
        let configuration = target.directory().join("haproxy.cfg");
        let threads = Cores::Measured.count().to_string();
        fs::write(&configuration, include_str!("../../config/haproxy.cfg").replace("THREADS", &threads))?;
        let mut command = Cores::Measured.command("haproxy");
        command.arg("-db").arg("-f").arg(configuration);
        let haproxy = Server::listening(&mut command, ([127, 0, 0, 1], Contender::Haproxy.port(Kind::Http)).into())?;
        let services = PORTS.map(|(port, protocol)| {
            let mut state: ServiceState = resolver::state(&format!("service-{port}"), port, &[target::ADDRESS]);
            state.ports[0].protocol = protocol;
            state
        });
        let resolver = Resolver::start(bench, Cores::Measured, services.into())?;
        Ok(Self { haproxy, resolver, _target: target })
    }

    fn measured(&self, contender: Contender) -> Result<Duration> {
        match contender {
            Contender::Direct => Ok(Duration::ZERO),
            Contender::Haproxy | Contender::HaproxyUnshared => self.haproxy.cpu(),
            Contender::Elasti => self.resolver.server.cpu(),
        }
    }

    fn run(&self, contender: Contender, kind: Kind, load: Load, length: Duration) -> Result<Run> {
        let url = format!("http://127.0.0.1:{}/{}", contender.port(kind), load.body.0);
        let wrk = Wrk { connections: load.connections, kept: load.kept, length };
        let before = self.measured(contender)?;
        let told = wrk.run(Cores::Others, &url)?;
        let cpu = self.measured(contender)?.saturating_sub(before);
        let requests = f64::from(told.requests);
        Ok(Run { requests: told.rate(), p50: told.p50, p99: told.p99, cpu: cpu.as_secs_f64() * 1e6 / requests })
    }
}

/// The runs of one case, by contender and round.
struct Case {
    kind: Kind,
    load: Load,
    runs: [Vec<Run>; 4],
}

/// Measures all of it.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    let stand = Stand::new(bench)?;
    let mut cases: Vec<Case> = Kind::ALL
        .into_iter()
        .flat_map(|kind| LOADS.map(|load| Case { kind, load, runs: Default::default() }))
        .collect();
    for round in 0..bench.rounds() {
        eprintln!("proxy: round {} of {}", round + 1, bench.rounds());
        for case in &mut cases {
            for turn in 0..Contender::ALL.len() {
                let contender = Contender::ALL[(turn + round) % Contender::ALL.len()];
                if !contender.takes_part(case.kind, case.load) {
                    continue;
                }
                case.runs[contender as usize].push(stand.run(contender, case.kind, case.load, bench.load())?);
            }
        }
    }
    Ok(outcome(&cases))
}

type Figure = (&'static str, &'static str, fn(&Run) -> f64);

const FIGURES: [Figure; 4] = [
    ("rate", "requests/s", |run| run.requests),
    ("latency p50", "µs", |run| run.p50),
    ("latency p99", "µs", |run| run.p99),
    ("CPU", "µs/request", |run| run.cpu),
];

fn outcome(cases: &[Case]) -> Outcome {
    let mut outcome = Outcome::default();
    outcome.notes.push(
        "Ratios are to HAProxy, of runs of the same round; above 1 is better than HAProxy. Added latency is what a contender \
         adds to the direct way. HAProxy shares its connections to the target among clients, which a resolver never does; \
         where connections are made it is measured without that too, which decides nothing."
            .to_owned(),
    );
    for case in cases {
        for contender in Contender::ALL.into_iter().filter(|one| one.takes_part(case.kind, case.load)) {
            for (figure, unit, of) in FIGURES {
                let values: Vec<f64> = case.runs[contender as usize].iter().map(of).collect();
                if contender != Contender::Direct || figure != "CPU" {
                    let case = format!("{}: {figure}", case.load.name(case.kind));
                    outcome.rows.push(Row { case, contender: contender.name().to_owned(), unit, values });
                }
            }
        }
        outcome.rows.extend(beside_unshared(case));
        outcome.goals.extend(goals(case));
    }
    outcome.charts.extend(Kind::ALL.map(|kind| chart(cases, kind)));
    outcome
}

fn goals(case: &Case) -> Vec<Goal> {
    let name = case.load.name(case.kind);
    let goal = |figure: &str, ratio: fn(&Run, &Run, &Run) -> f64| {
        let [direct, haproxy, _, elasti] = &case.runs;
        let values =
            direct.iter().zip(haproxy).zip(elasti).map(|((direct, haproxy), elasti)| ratio(direct, haproxy, elasti));
        let figure = format!("{name}: {figure}");
        Goal { figure, unit: "× HAProxy", wanted: Wanted::AtLeast(1.0), values: values.collect() }
    };
    let mut goals = vec![
        goal("rate", |_, haproxy, elasti| elasti.requests / haproxy.requests),
        goal("CPU per request", |_, haproxy, elasti| haproxy.cpu / elasti.cpu),
    ];
    // Where all are busy, latency is the rate once more.
    if case.load.connections == 1 {
        goals.push(goal("added latency p50", |direct, haproxy, elasti| added(haproxy.p50, direct.p50, elasti.p50)));
        goals.push(goal("added latency p99", |direct, haproxy, elasti| added(haproxy.p99, direct.p99, elasti.p99)));
    }
    goals
}

/// The resolver beside `HAProxy` that shares nothing either.
fn beside_unshared(case: &Case) -> Vec<Row> {
    let unshared = &case.runs[Contender::HaproxyUnshared as usize];
    let runs = || unshared.iter().zip(&case.runs[Contender::Elasti as usize]);
    let row = |figure: &str, values: Vec<f64>| Row {
        case: format!("{}: {figure} beside HAProxy that shares nothing", case.load.name(case.kind)),
        contender: Contender::Elasti.name().to_owned(),
        unit: "× HAProxy",
        values,
    };
    if unshared.is_empty() {
        return vec![];
    }
    vec![
        row("rate", runs().map(|(haproxy, elasti)| elasti.requests / haproxy.requests).collect()),
        row("CPU per request", runs().map(|(haproxy, elasti)| haproxy.cpu / elasti.cpu).collect()),
    ]
}

/// What one adds to a latency as a multiple of what the other adds, of which no more than a microsecond can be told.
fn added(by: f64, direct: f64, by_other: f64) -> f64 {
    (by - direct).max(1.0) / (by_other - direct).max(1.0)
}

fn chart(cases: &[Case], kind: Kind) -> Chart {
    let line = |contender: Contender| {
        let kept = cases.iter().filter(|case| case.kind == kind && case.load.kept && case.load.body == SMALL);
        let points = kept.filter_map(|case| {
            let rates: Vec<f64> = case.runs[contender as usize].iter().map(|run| run.requests).collect();
            let connections = u32::try_from(case.load.connections).ok()?;
            Some((f64::from(connections), crate::report::Spread::of(&rates)?.median))
        });
        (contender.name().to_owned(), points.collect())
    };
    Chart {
        name: format!("proxy-{}", kind.name().to_lowercase()),
        title: format!("Requests of 1 KiB through {}", kind.name()),
        x: "kept connections",
        y: "requests/s",
        lines: [Contender::Direct, Contender::Haproxy, Contender::Elasti].map(line).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_adds_half_as_much_is_twice_as_good() {
        assert!((added(60.0, 40.0, 50.0) - 2.0).abs() < 1e-9);
        assert!((added(60.0, 40.0, 30.0) - 20.0).abs() < 1e-9, "less than nothing counts as a microsecond");
    }
}
