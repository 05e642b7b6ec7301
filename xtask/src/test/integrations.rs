//! The level `integrations`: beside real controllers of other projects, KEDA and Argo Rollouts. Not among all tests, since
//! building KEDA takes as long as everything else; those make do with its CRDs.

use anyhow::Result;

use super::{Args, build, build_some, run_on, with_cluster};
use crate::cluster::{Options, ProxyMode};

/// Runs the level: its own tests, and KubeElasti's end-to-end cases once more.
pub(super) fn run(args: &Args) -> Result<()> {
    let mut tests = build("integrations")?;
    for test in ["cluster_kubeelasti", "cluster_installation"] {
        tests.extend(build_some("cluster", test)?);
    }
    let options =
        Options { name: args.cluster("elasti-integrations"), kube_proxy: ProxyMode::default(), api_server_only: false };
    with_cluster(args, &options, |cluster| {
        cluster.start_controllers_of_others()?;
        run_on(cluster, args, &tests).map(drop)
    })
}
