//! `elasti-bench`: measures the resolver's released program beside what would be used instead. `cargo xtask bench` builds
//! it, installs what it compares with, and runs it in a network namespace of its own.
//!
//! A suite returns what it has measured as [`report::Outcome`]; nothing else decides or prints.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use crate::report::Report;
use crate::suites::Suite;

mod clients;
mod cluster;
mod machine;
mod plot;
mod process;
mod report;
mod resolver;
mod suites;
mod target;
mod wrk;

#[derive(Parser)]
enum Command {
    /// Measure
    Run(Args),
    /// Open connections, say so, and keep them until the input ends
    Dial(clients::Dial),
    /// Connect all the time, and say where that comes out whenever it changes
    Knock(suites::flip::knocker::Knock),
}

/// Options of `run`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which; all if none is named
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// Fail if a goal is missed
    #[arg(long)]
    check: bool,
    /// Less than a minute for each suite; decides nothing
    #[arg(long)]
    short: bool,
    /// Wakes or flips of each kind, in place of 30
    #[arg(long)]
    wakes: Option<usize>,
    /// The resolver's program
    #[arg(long)]
    resolver: PathBuf,
    /// The operator's program
    #[arg(long)]
    operator: Option<PathBuf>,
    /// Where tables, JSON and plots go
    #[arg(long)]
    out: PathBuf,
}

fn main() -> Result<ExitCode> {
    match Command::parse() {
        Command::Run(args) => run(&args),
        Command::Dial(dial) => clients::keep(&dial).map(|()| ExitCode::SUCCESS),
        Command::Knock(knock) => suites::flip::knocker::knock(&knock).map(|()| ExitCode::SUCCESS),
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start a runtime")?;
    let Args { resolver, operator, short, wakes, out, .. } = args;
    let (resolver, operator, out) = (resolver.clone(), operator.clone(), out.clone());
    let bench = suites::Bench { runtime, resolver, operator, out, short: *short, wakes: *wakes };
    let suites = if args.suites.is_empty() { Suite::all() } else { args.suites.clone() };
    let mut report = Report::new(machine::describe(), args.short);
    for suite in suites {
        eprintln!("== {}", suite.name());
        report.add(suite.name(), suite.run(&bench).with_context(|| format!("suite {}", suite.name()))?);
    }
    report.write(&args.out)?;
    let missed = args.check && !args.short && report.is_missed();
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
