//! Many connections that are held and released at once: how long until the last one has its answer, and whether any has
//! none. Beside it the same requests sent straight to the target, all at once: what nginx and the machine take by themselves.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use elasti_api::message::Protocol;

use super::{Bench, LINEAR, growth};
use crate::clients;
use crate::plot::Chart;
use crate::process::Cores;
use crate::report::{Goal, Outcome, Row, Spread, Wanted};
use crate::resolver::{self, Resolver};
use crate::target::{self, Target};

const SIZES: [u32; 4] = [1, 100, 1_000, 10_000];

/// The largest burst is answered within this, in milliseconds.
const GOAL: f64 = 1000.0;

/// The first interception port.
const PORT: u16 = 20_000;

const UID: &str = "burst";

/// How long it may take until all are held, or answered.
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Direct,
    Bytes,
    Http,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Direct, Self::Bytes, Self::Http];

    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Bytes => "elasti, bytes",
            Self::Http => "elasti, HTTP",
        }
    }
}

/// What one burst came to, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Burst {
    /// From the release to the first answer.
    first: f64,
    /// From the release to the last answer.
    last: f64,
    lost: u32,
}

/// The bursts of one size, by contender and round.
type Bursts = [Vec<Burst>; 3];

/// Measures all of it.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    let _target = Target::start(Cores::All)?;
    let sizes = if bench.short { &SIZES[..3] } else { &SIZES[..] };
    let mut measured: Vec<(u32, Bursts)> = sizes.iter().map(|size| (*size, Bursts::default())).collect();
    for round in 0..bench.rounds() {
        eprintln!("burst: round {} of {}", round + 1, bench.rounds());
        for (size, bursts) in &mut measured {
            for turn in 0..Contender::ALL.len() {
                let contender = Contender::ALL[(turn + round) % Contender::ALL.len()];
                let burst = burst(bench, contender, *size)
                    .with_context(|| format!("{size} connections, {}", contender.name()))?;
                bursts[contender as usize].push(burst);
            }
        }
    }
    Ok(outcome(bench, &measured))
}

fn burst(bench: &Bench, contender: Contender, count: u32) -> Result<Burst> {
    let protocol = match contender {
        Contender::Direct => return answered(bench, vec![target::ADDRESS; count as usize], |_| Ok(Instant::now())),
        Contender::Bytes => Protocol::Tcp,
        Contender::Http => Protocol::Http,
    };
    let most = resolver::most_connections();
    let (mut resolvers, mut states, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
    for (port, begun) in (PORT..).zip((0..count as usize).step_by(most)) {
        let mut state = resolver::state(UID, port, &[]);
        state.ports[0].protocol = protocol;
        resolvers.push(Resolver::start(bench, Cores::All, vec![state.clone()])?);
        states.push(state);
        addresses.extend(vec![SocketAddr::from(([127, 0, 0, 1], port)); most.min(count as usize - begun)]);
    }
    answered(bench, addresses, |count| {
        resolver::wait_held(&resolvers, UID, count, PATIENCE)?;
        let released = Instant::now();
        for (resolver, state) in resolvers.iter().zip(&mut states) {
            state.ports[0].backends = vec![target::ADDRESS];
            resolver.operator.set(state);
        }
        Ok(released)
    })
}

/// Asks at every address at once; `release` says from when on answers may come.
fn answered(
    bench: &Bench,
    addresses: Vec<SocketAddr>,
    release: impl FnOnce(usize) -> Result<Instant>,
) -> Result<Burst> {
    let count = addresses.len();
    let ask = |address| async move { tokio::time::timeout(2 * PATIENCE, clients::ask(address)).await };
    let clients: Vec<_> = addresses.into_iter().map(|address| bench.runtime.spawn(ask(address))).collect();
    let released = release(count)?;
    let mut times = Vec::new();
    for client in clients {
        match bench.runtime.block_on(client)? {
            Ok(Ok(at)) => times.push(at.saturating_duration_since(released).as_secs_f64() * 1e3),
            Ok(Err(error)) => eprintln!("lost: {error:#}"),
            Err(_) => eprintln!("lost: no answer"),
        }
    }
    let spread = Spread::of(&times).context("nobody was answered")?;
    Ok(Burst { first: spread.min, last: spread.max, lost: u32::try_from(count - times.len())? })
}

type Figure = (&'static str, &'static str, fn(&Burst) -> f64);

const FIGURES: [Figure; 3] = [
    ("release to first answer", "ms", |burst| burst.first),
    ("first to last answer", "ms", |burst| burst.last - burst.first),
    ("lost", "connections", |burst| f64::from(burst.lost)),
];

fn outcome(bench: &Bench, measured: &[(u32, Bursts)]) -> Outcome {
    let mut outcome = Outcome::default();
    let most = resolver::most_connections();
    outcome.notes.push(format!(
        "One resolver takes {most} connections on a port with the files and the connection tracking of this \
         machine; more are held by several. Directly, a burst begins when its clients begin to connect."
    ));
    let mut lines = Contender::ALL.map(|contender| (contender.name().to_owned(), vec![]));
    for (size, bursts) in measured {
        for contender in Contender::ALL {
            let bursts = &bursts[contender as usize];
            for (figure, unit, of) in FIGURES {
                let case = format!("{size} held: {figure}");
                let values = bursts.iter().map(of).collect();
                outcome.rows.push(Row { case, contender: contender.name().to_owned(), unit, values });
            }
            let last: Vec<f64> = bursts.iter().map(|burst| burst.last).collect();
            if let Some(spread) = Spread::of(&last) {
                lines[contender as usize].1.push((f64::from(*size), spread.median));
            }
        }
    }
    for contender in [Contender::Bytes, Contender::Http] {
        let all = measured.iter().flat_map(|(_, bursts)| &bursts[contender as usize]);
        let lost = all.map(|burst| f64::from(burst.lost)).sum();
        let figure = format!("lost of all, {}", contender.name());
        outcome.goals.push(Goal { figure, unit: "", wanted: Wanted::AtMost(0.0), values: vec![lost] });
        if let Some((size, bursts)) = measured.last().filter(|_| !bench.short) {
            let values = bursts[contender as usize].iter().map(|burst| burst.last).collect();
            let figure = format!("{size} held: release to last answer, {}", contender.name());
            outcome.goals.push(Goal { figure, unit: "ms", wanted: Wanted::AtMost(GOAL), values });
        }
        if let [.., small, large] = lines[contender as usize].1[..] {
            let figure = format!("growth of the time to the last answer, {}", contender.name());
            let values = vec![growth(small, large)];
            outcome.goals.push(Goal { figure, unit: "(1 is linear)", wanted: Wanted::AtMost(LINEAR), values });
        }
    }
    outcome.charts.push(Chart {
        name: "burst".to_owned(),
        title: "From the release to the last answer".to_owned(),
        x: "held connections",
        y: "ms",
        lines: lines.into(),
    });
    outcome
}
