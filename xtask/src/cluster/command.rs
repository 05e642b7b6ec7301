//! The `cluster` command line.

use std::io::{Write, stdout};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Cluster, Options, ProxyMode, images};

/// Run a real two-node Kubernetes on this machine
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the cluster; several may run at once
    #[arg(long, global = true, default_value = "elasti")]
    name: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Start the cluster, unless it is up
    Up {
        /// How kube-proxy implements Services
        #[arg(long, value_enum, default_value_t)]
        kube_proxy: ProxyMode,
        /// Only etcd and the API server
        #[arg(long)]
        api_server_only: bool,
    },
    /// End the cluster and remove all of it
    Down,
    /// Show the nodes and the components' processes
    Status,
    /// Run kubectl as administrator
    Kubectl {
        /// Arguments of kubectl
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a program as a host process of a node, e.g. `exec 2 -- curl 10.96.0.1`
    Exec {
        /// 1 or 2
        node: u8,
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Put images on both nodes
    Load {
        /// Docker or OCI archives; the image of real targets (nginx, redis) if none is given
        archives: Vec<PathBuf>,
    },
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<()> {
    let cluster = Cluster::open(&args.name)?;
    match &args.action {
        Action::Up { kube_proxy, api_server_only } => {
            let options =
                Options { name: args.name.clone(), kube_proxy: *kube_proxy, api_server_only: *api_server_only };
            Cluster::up(&options)?;
            eprintln!("try: cargo xtask cluster --name {} kubectl -- get all -A", args.name);
            Ok(())
        }
        Action::Down => cluster.down(),
        Action::Status => status(&cluster),
        Action::Kubectl { args } => replace(cluster.kubectl()?.args(args)),
        Action::Exec { node, command } => match command.as_slice() {
            [program, args @ ..] => replace(cluster.command_in_node(*node, program)?.args(args)),
            [] => Ok(()),
        },
        Action::Load { archives } if archives.is_empty() => cluster.load_image(&images::targets()?),
        Action::Load { archives } => archives.iter().try_for_each(|archive| cluster.load_image(archive)),
    }
}

/// Becomes the command, so that its terminal, signals and exit code are the caller's own.
fn replace(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {command:?}"))
}

fn status(cluster: &Cluster) -> Result<()> {
    let mut out = stdout().lock();
    if !cluster.kubeconfig().exists() {
        writeln!(out, "cluster {} is down", cluster.layout.name())?;
        return Ok(());
    }
    writeln!(out, "kubeconfig {}", cluster.kubeconfig().display())?;
    for node in cluster.layout.nodes() {
        writeln!(out, "network namespace {}", cluster.netns(node.number)?)?;
        for (component, pid) in node.daemons()? {
            let pid = pid.map_or_else(|| "ended".to_owned(), |pid| format!("pid {pid}"));
            writeln!(out, "  {component:24} {pid}")?;
        }
    }
    let nodes = cluster.kubectl()?.args(["get", "nodes", "-o", "wide", "--request-timeout=5s"]).output()?;
    out.write_all(&nodes.stdout)?;
    out.write_all(&nodes.stderr)?;
    Ok(())
}
