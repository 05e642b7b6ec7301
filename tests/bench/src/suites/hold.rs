//! Memory of a resolver that waits: for each held connection, and for each idle interception port.
//!
//! Memory is what is resident beyond that of a resolver with nothing to do. What the kernel keeps for sockets is not in it:
//! it is the same for every program that has a connection open. Where a process may not open enough files for all
//! connections, several resolvers share them, and their memory is added up.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use elasti_api::message::ServiceState;

use super::{Bench, LINEAR, growth};
use crate::clients::Silent;
use crate::plot::Chart;
use crate::process::{Cores, Server};
use crate::report::{Goal, Outcome, Row, Spread, Wanted};
use crate::resolver::{self, Resolver};

/// Most that a held connection may cost, in bytes.
const CONNECTION_GOAL: f64 = 4096.0;

/// Most that an idle interception port may cost, in bytes.
const PORT_GOAL: f64 = 2048.0;

/// 10.96.0.0: cluster IPs follow it.
const CLUSTER_IPS: u32 = 0x0a60_0000;

/// The first interception port.
const PORT: u16 = 20_000;

const UID: &str = "held";

/// How long it may take until so many are held.
const PATIENCE: Duration = Duration::from_mins(1);

/// What is varied.
struct Quantity {
    name: &'static str,
    sizes: &'static [u32],
    goal: f64,
    /// Bytes of memory for each of so many.
    measure: fn(&Bench, u32) -> Result<f64>,
}

/// Measures all of it.
pub(crate) fn run(bench: &Bench) -> Result<Outcome> {
    let quantities = [
        Quantity {
            name: "held connection",
            sizes: &[1_000, 10_000, 50_000],
            goal: CONNECTION_GOAL,
            measure: connections,
        },
        Quantity { name: "idle interception port", sizes: &[100, 1_000, 10_000], goal: PORT_GOAL, measure: ports },
    ];
    let mut outcome = Outcome::default();
    let most = resolver::most_connections();
    outcome.notes.push(format!(
        "Resident memory beyond that of an idle resolver. One resolver takes {most} connections on a port with the files and the connection tracking \
         of this machine; more are held by several."
    ));
    for Quantity { name, sizes, goal, measure } in quantities {
        let sizes = if bench.short { &sizes[..2] } else { sizes };
        let mut line = Vec::new();
        let mut rows: Vec<Row> = sizes.iter().map(|size| row(name, *size)).collect();
        for round in 0..bench.rounds().min(3) {
            eprintln!("hold: {name}, round {}", round + 1);
            for (size, row) in sizes.iter().zip(&mut rows) {
                row.values.push(measure(bench, *size)?);
            }
        }
        for (size, row) in sizes.iter().zip(&rows) {
            if let Some(spread) = Spread::of(&row.values) {
                line.push((f64::from(*size), spread.median * f64::from(*size)));
            }
        }
        // The smallest is left out: there a page more or less is much.
        if let [_, small, .., large] = line[..] {
            let figure = format!("growth of memory with {name}s");
            let values = vec![growth(small, large)];
            outcome.goals.push(Goal { figure, unit: "(1 is linear)", wanted: Wanted::AtMost(LINEAR), values });
        }
        if let (Some(row), false) = (rows.last(), bench.short) {
            let goal = Goal {
                figure: row.case.clone(),
                unit: row.unit,
                wanted: Wanted::AtMost(goal),
                values: row.values.clone(),
            };
            outcome.goals.push(goal);
        }
        outcome.rows.extend(rows);
        outcome.charts.push(Chart {
            name: format!("hold-{}", name.replace(' ', "-")),
            title: format!("Memory of {name}s"),
            x: "how many",
            y: "bytes",
            lines: vec![("elasti".to_owned(), line)],
        });
    }
    Ok(outcome)
}

fn row(name: &str, size: u32) -> Row {
    Row { case: format!("{name}, {size} of them"), contender: "elasti".to_owned(), unit: "bytes each", values: vec![] }
}

fn connections(bench: &Bench, count: u32) -> Result<f64> {
    let count = count as usize;
    let (mut resolvers, mut addresses) = (Vec::new(), Vec::new());
    for (index, begun) in (PORT..).zip((0..count).step_by(resolver::most_connections())) {
        resolvers.push(Resolver::start(bench, Cores::All, vec![resolver::state(UID, index, &[])])?);
        addresses.push((
            std::net::SocketAddr::from(([127, 0, 0, 1], index)),
            resolver::most_connections().min(count - begun),
        ));
    }
    let before = resident(resolvers.iter().map(|resolver| &resolver.server))?;
    let clients = addresses.into_iter().map(|(address, part)| Silent::connect(address, part));
    let clients: Vec<Silent> = clients.collect::<Result<_>>()?;
    resolver::wait_held(&resolvers, UID, count, PATIENCE)?;
    let after = resident(resolvers.iter().map(|resolver| &resolver.server))?;
    drop(clients);
    Ok(each(before, after, count))
}

fn ports(bench: &Bench, count: u32) -> Result<f64> {
    let services = (PORT..).take(count as usize).map(service);
    let before = Resolver::start(bench, Cores::All, vec![resolver::state(UID, PORT - 1, &[])])?.server.resident()?;
    let after = Resolver::start(bench, Cores::All, services.collect())?.server.resident()?;
    Ok(each(before, after, count as usize))
}

/// One with a UID and a cluster IP of its own, as Kubernetes makes them.
fn service(port: u16) -> ServiceState {
    let state = resolver::state(&format!("service-{port}"), port, &[]);
    let uid = format!("00000000-0000-4000-8000-{port:012}");
    ServiceState { uid, cluster_ips: vec![Ipv4Addr::from(CLUSTER_IPS + u32::from(port)).into()], ..state }
}

fn resident<'a>(servers: impl Iterator<Item = &'a Server>) -> Result<u64> {
    servers.map(Server::resident).sum()
}

#[expect(clippy::cast_precision_loss, reason = "bytes of memory, far below 2^53")]
fn each(before: u64, after: u64, count: usize) -> f64 {
    (after as f64 - before as f64) / count as f64
}
