//! `cargo xtask bench`: builds what is measured and what measures it, installs what it is compared with, and runs the
//! measurements (`tests/bench`) in namespaces of their own: nothing else listens there, there is no way out, and every
//! process ends with them. Some run on the first node of a cluster in place of that.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::cluster::{Cluster, Options, ProxyMode, tools};
use crate::{image, install, process};

/// What the measurements run, and the packages that have it. Installing nginx and haproxy starts them as Debian does; the
/// measurements start their own.
const TOOLS: [(&str, &str); 7] = [
    ("haproxy", "haproxy"),
    ("nginx", "nginx-light"),
    ("wrk", "wrk"),
    ("ip", "iproute2"),
    ("taskset", "util-linux"),
    ("unshare", "util-linux"),
    ("cc", "gcc"),
];

/// The name of the cluster.
const CLUSTER: &str = "elasti-bench";

/// Suites that need the two-node cluster.
const ON_A_CLUSTER: [&str; 4] = ["wake", "warm", "failover", "flip"];

/// Suites that need an API server with the product's objects, and nothing that acts upon them.
const ON_AN_API_SERVER: [&str; 1] = ["scale"];

/// Suites that need neither.
const ALONE: [&str; 4] = ["proxy", "hold", "burst", "connect"];

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Measure these only
    #[arg(value_name = "SUITE", value_parser = suites())]
    suites: Vec<String>,
    /// Fail if a goal is missed
    #[arg(long)]
    check: bool,
    /// Less than a minute for each suite, to see that it runs; decides nothing
    #[arg(long)]
    short: bool,
    /// Wakes or flips of each kind, in place of 30
    #[arg(long)]
    wakes: Option<u32>,
    /// Leave the cluster up; `cargo xtask cluster --name elasti-bench down` removes it
    #[arg(long)]
    keep: bool,
}

fn suites() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(ALONE.iter().chain(&ON_A_CLUSTER).chain(&ON_AN_API_SERVER))
}

impl Args {
    /// Those of `known` that are wanted.
    fn wanted<'a>(&self, known: &[&'a str]) -> Vec<&'a str> {
        let wanted = |suite: &&str| self.suites.is_empty() || self.suites.iter().any(|named| named == suite);
        known.iter().copied().filter(wanted).collect()
    }

    fn pass(&self, command: &mut Command, suites: &[&str], programs: &Path, out: &Path) {
        command.arg("run").args(suites).arg("--out").arg(out);
        command.arg("--resolver").arg(programs.join("elasti-resolver"));
        command.arg("--operator").arg(programs.join("elasti-operator"));
        command.args(self.check.then_some("--check")).args(self.short.then_some("--short"));
        command.args(self.wakes.map(|wakes| format!("--wakes={wakes}")));
    }
}

/// Measures, shows tables and writes them to `target/bench` with JSON and plots.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::install(&TOOLS)?;
    // One after the other: built together, the programs would have features that only the measurements need.
    let programs = image::compile(&image::NAMES, &[])?;
    image::compile(&["elasti-bench"], &[])?;
    let out = process::target().join("bench");
    let mut result = Ok(());
    let alone = args.wanted(&ALONE);
    if !alone.is_empty() {
        result = measure_alone(args, &alone, &programs, &out);
    }
    let on_a_cluster = args.wanted(&ON_A_CLUSTER);
    if !on_a_cluster.is_empty() {
        result = result.and(measure_on_a_cluster(args, &on_a_cluster, &programs, &out.join("cluster")));
    }
    let on_an_api_server = args.wanted(&ON_AN_API_SERVER);
    if !on_an_api_server.is_empty() {
        result = result.and(measure_on_an_api_server(args, &on_an_api_server, &programs, &out.join("api")));
    }
    eprintln!("tables, JSON and plots are in {}", out.display());
    result
}

fn measure_alone(args: &Args, suites: &[&str], programs: &Path, out: &Path) -> Result<()> {
    let mut command = Command::new("unshare");
    command.args(["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-c", r#"ip link set lo up && exec "$0" "$@""#]);
    args.pass(command.arg(programs.join("elasti-bench")), suites, programs, out);
    process::run(&mut command)
}

fn measure_on_a_cluster(args: &Args, suites: &[&str], programs: &Path, out: &Path) -> Result<()> {
    let options = Options { name: CLUSTER.to_owned(), kube_proxy: ProxyMode::default(), api_server_only: false };
    on(&options, args.keep, |cluster| {
        install::install(cluster)?;
        measure_on(cluster, args, suites, programs, out)
    })
}

fn measure_on_an_api_server(args: &Args, suites: &[&str], programs: &Path, out: &Path) -> Result<()> {
    let name = format!("{CLUSTER}-api");
    let options = Options { name: name.clone(), kube_proxy: ProxyMode::default(), api_server_only: true };
    // What an earlier run has left would be measured too.
    Cluster::open(&name)?.down()?;
    on(&options, args.keep, |cluster| {
        install::apply(cluster)?;
        measure_on(cluster, args, suites, programs, out)
    })
}

fn measure_on(cluster: &Cluster, args: &Args, suites: &[&str], programs: &Path, out: &Path) -> Result<()> {
    let mut command = cluster.command_in_node(1, programs.join("elasti-bench"))?;
    command.env("ELASTI_NODES", format!("{},{}", cluster.netns(1)?, cluster.netns(2)?));
    args.pass(command.env("KUBECONFIG", cluster.kubeconfig()), suites, programs, out);
    process::run(&mut command)
}

/// Does something on a cluster, and takes it down unless it is to be kept.
fn on(options: &Options, keep: bool, body: impl FnOnce(&Cluster) -> Result<()>) -> Result<()> {
    let cluster = Cluster::up(options)?;
    let done = body(&cluster);
    if !keep {
        cluster.down()?;
    }
    done
}
