//! The level `integrations`: beside real controllers of other projects, KEDA and Argo Rollouts. Not among all tests, since
//! building KEDA takes as long as everything else; those make do with its CRDs.

use anyhow::Result;

use super::{Args, Outcome, build, with_cluster};
use crate::cluster::{Cluster, Options, ProxyMode};
use crate::install;

/// Runs the level.
pub(super) fn run(args: &Args) -> Result<()> {
    let tests = build("integrations")?;
    let options =
        Options { name: args.cluster("elasti-integrations"), kube_proxy: ProxyMode::default(), api_server_only: false };
    with_cluster(args, &options, |cluster| {
        cluster.start_controllers_of_others()?;
        install::install(cluster)?;
        let mut outcome = Outcome::default();
        for test in &tests {
            let mut command = cluster.command_in_node(1, test)?;
            command.args(&args.filter).env("KUBECONFIG", cluster.kubeconfig());
            command.env("ELASTI_KUBECTL", Cluster::kubectl_path());
            command.env("ELASTI_NODES", format!("{},{}", cluster.netns(1)?, cluster.netns(2)?));
            outcome.run(&mut command)?;
        }
        outcome.passed().map(drop)
    })
}
