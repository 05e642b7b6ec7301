//! The level `cycles`: no request is lost while Services go to zero and come again.
//!
//! Two clusters one after the other, for kube-proxy in each mode; half of the cycles on each. What was counted goes to
//! `target/cycles/report.json`, one entry a run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Args, build, with_cluster};
use crate::cluster::{Cluster, Options, ProxyMode, images};
use crate::{image, install, process};

/// The program of targets and clients.
pub(super) const TRAFFIC: &str = "elasti-traffic";

/// Takes the interception before a scale-down out of the operator.
const MUTANT: &str = "elasti-operator/mutant-scale-before-intercept";

/// Options of the level.
#[derive(clap::Args)]
pub(super) struct CyclesArgs {
    /// Cycles in all, of the level `cycles`; 1,000 if it is run alone, else 20
    #[arg(long, value_name = "N")]
    cycles: Option<usize>,
    /// Services side by side, of the level `cycles`; 8 if it is run alone, else 4
    #[arg(long, value_name = "N")]
    services: Option<usize>,
    /// Seconds of idleness before a target sleeps, of the level `cycles`; 900 is that of an ElastiService which says none
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    cooldown: u32,
    /// Run the level `cycles` with kube-proxy in one mode only
    #[arg(long, value_enum, value_name = "MODE")]
    kube_proxy: Option<ProxyMode>,
    /// Run the level `cycles` with an operator that scales to zero before it intercepts, and fail unless requests are lost
    #[arg(long)]
    mutant: bool,
    /// Run the level `cycles` with eBPF switched off on every node, so that EndpointSlices alone bring connections
    #[arg(long)]
    without_ebpf: bool,
}

/// Runs the level.
pub(super) fn run(args: &Args) -> Result<()> {
    let mutant = args.cycles.mutant;
    let long = args.only.is_some() && !mutant;
    let cycles = args.cycles.cycles.unwrap_or(if long { 1000 } else { 20 });
    let services = args.cycles.services.unwrap_or(if long { 8 } else { 4 });
    let modes = args.cycles.kube_proxy.map_or(vec![ProxyMode::Iptables, ProxyMode::Nftables], |mode| vec![mode]);
    let each = cycles.div_ceil(modes.len());
    let directory = process::target().join("cycles");
    fs::create_dir_all(&directory)?;
    let directory = directory.canonicalize()?;
    let mut reports: Vec<Value> = Vec::new();
    let mut outcome = Ok(());
    for (number, mode) in modes.into_iter().enumerate() {
        let report = directory.join(format!("{}.json", mode.name()));
        fs::remove_file(&report).ok();
        let half = Half { mode, services, cycles: each, first: number * each, report: &report };
        outcome = half.run(args);
        if let Ok(text) = fs::read_to_string(&report) {
            reports.push(serde_json::from_str(&text).context("a report is JSON")?);
        }
        if outcome.is_err() {
            break;
        }
    }
    let path = directory.join("report.json");
    fs::write(&path, serde_json::to_string_pretty(&reports)?)?;
    eprintln!("the report is in {}", path.display());
    if args.cycles.mutant { mutant_was_seen(&outcome, &reports) } else { outcome }
}

/// A proof that lets the mutant pass proves nothing; nor does one that fails for another reason than lost requests.
fn mutant_was_seen(outcome: &Result<()>, reports: &[Value]) -> Result<()> {
    let failed: u64 = reports.iter().filter_map(|report| report["total"]["failed"].as_u64()).sum();
    match outcome {
        Err(_) if failed > 0 => {
            eprintln!("as it must: without interception {failed} requests failed");
            Ok(())
        }
        Err(error) => bail!("the run of the mutant broke before it lost a request: {error:#}"),
        Ok(()) => bail!("an operator that scales to zero before it intercepts passes the test"),
    }
}

/// The part of the cycles that runs with kube-proxy in one mode.
struct Half<'a> {
    mode: ProxyMode,
    services: usize,
    cycles: usize,
    /// The number of its first cycle, which decides what that does.
    first: usize,
    report: &'a Path,
}

impl Half<'_> {
    fn run(&self, args: &Args) -> Result<()> {
        let tests = build("cycles")?;
        let traffic = image::compile(&[TRAFFIC], &[])?.join(TRAFFIC);
        let options = Options { name: args.cluster("elasti-cycles"), kube_proxy: self.mode, api_server_only: false };
        with_cluster(args, &options, |cluster| {
            install::install_with(cluster, if args.cycles.mutant { &[MUTANT] } else { &[] })?;
            cluster.load_image(&images::traffic(&traffic)?)?;
            cluster.load_image(&images::postgres()?)?;
            for test in &tests {
                let mut command = cluster.command_in_node(1, test)?;
                command.args(&args.filter).arg("--nocapture");
                command.env("KUBECONFIG", cluster.kubeconfig()).env("ELASTI_KUBECTL", Cluster::kubectl_path());
                command.env("ELASTI_HOST_CLIENTS", serde_json::to_string(&host_clients(cluster, &traffic)?)?);
                command.env("ELASTI_CYCLES", self.cycles.to_string());
                command.env("ELASTI_CYCLES_FIRST", self.first.to_string());
                command.env("ELASTI_CYCLES_SERVICES", self.services.to_string());
                command.env("ELASTI_CYCLES_COOLDOWN", args.cycles.cooldown.to_string());
                command.env("ELASTI_CYCLES_NAME", format!("kube-proxy {}", self.mode.name()));
                command.env("ELASTI_CYCLES_REPORT", self.report);
                command.env("ELASTI_EBPF", if args.cycles.without_ebpf { "off" } else { "auto" });
                process::run(&mut command)?;
            }
            Ok(())
        })
    }
}

/// The command lines of clients that are host processes of the nodes.
fn host_clients(cluster: &Cluster, program: &Path) -> Result<Vec<Vec<String>>> {
    let line = |node| {
        let mut command = cluster.command_in_node(node, program)?;
        command.arg("client");
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        Ok(words.map(|word| word.to_string_lossy().into_owned()).collect())
    };
    [1, 2].into_iter().map(line).collect()
}
