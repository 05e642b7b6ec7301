//! Puts the product and the targets' image on a test cluster, as a user would: images, then `kubectl apply -k`.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::cluster::{Cluster, images};
use crate::{image, process};

/// The tag of images that are built here; `config/default` names it too.
const TAG: &str = "dev";

/// Builds and loads the images, applies `config/default` and waits until everything is ready.
pub(crate) fn install(cluster: &Cluster) -> Result<()> {
    install_with(cluster, &[])
}

/// As [`install`], built with features (`PACKAGE/FEATURE`).
pub(crate) fn install_with(cluster: &Cluster, features: &[&str]) -> Result<()> {
    eprintln!("building the images (some minutes the first time)");
    let archives = image::build(TAG, features)?;
    for archive in archives.iter().chain([&images::targets()?]) {
        cluster.load_image(archive)?;
    }
    let begun = Instant::now();
    apply(cluster)?;
    // The tag stays the same, so pods of an earlier build have to be told.
    process::output(cluster.kubectl()?.args(["-n", "elasti", "rollout", "restart", "deployment,daemonset"]))?;
    for workload in ["deployment/elasti-operator", "daemonset/elasti-resolver"] {
        let mut rollout = cluster.kubectl()?;
        rollout.args(["-n", "elasti", "rollout", "status", workload, "--timeout=180s"]);
        process::output(&mut rollout).with_context(|| {
            format!("{workload} does not become ready; see `cargo xtask cluster kubectl -- -n elasti describe pods`")
        })?;
    }
    eprintln!("installed in {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Applies `config/default`, and waits for nothing.
pub(crate) fn apply(cluster: &Cluster) -> Result<()> {
    let config = process::root().join("config/default");
    process::output(cluster.kubectl()?.args(["apply", "--server-side", "--force-conflicts", "-k"]).arg(config))?;
    Ok(())
}
