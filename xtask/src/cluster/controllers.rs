//! Controllers of other projects on a test cluster: KEDA's operator and Argo Rollouts' controller, with their
//! CRDs. They run as host processes of node 1, as administrators, and end with the cluster.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Cluster, binaries};
use crate::process;

/// Namespace of KEDA's certificates.
const KEDA: &str = "keda";

impl Cluster {
    /// Builds what is missing of both, and starts them. Called once, before anything uses their kinds.
    pub(crate) fn start_controllers_of_others(&self) -> Result<()> {
        binaries::build_controllers()?;
        let keda = binaries::sources("keda", "github.com/kedacore/keda/v2")?.join("config/crd/bases");
        let rollouts = binaries::sources("argo-rollouts", "github.com/argoproj/argo-rollouts")?.join("manifests/crds");
        for definition in definitions(&keda)?.into_iter().chain(definitions(&rollouts)?) {
            process::output(self.kubectl()?.args(["apply", "--server-side", "-f"]).arg(definition))?;
        }
        let mut wait = self.kubectl()?;
        process::output(wait.args(["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]))?;
        process::output(self.kubectl()?.args(["create", "namespace", KEDA]))?;
        let node = self.node(1)?;
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig().display());
        let program = |name| binaries::path(name).display().to_string();
        let certificates = self.layout.dir().join("keda-certificates");
        fs::create_dir_all(&certificates)?;
        node.start(
            "keda-operator",
            "env",
            &[
                format!("POD_NAMESPACE={KEDA}"),
                format!("KEDA_CLUSTER_OBJECT_NAMESPACE={KEDA}"),
                program("keda-operator"),
                kubeconfig.clone(),
                // Its metrics server and its webhooks are not there; the certificates are for the server it asks for them.
                "--enable-cert-rotation=true".to_owned(),
                format!("--cert-dir={}", certificates.display()),
                "--enable-webhook-patching=false".to_owned(),
                // Their ports would be those of the other controller.
                "--enable-prometheus-metrics=false".to_owned(),
                "--enable-apiservice-patching=false".to_owned(),
            ],
        )?;
        // Nobody else is there to lead.
        node.start(
            "rollouts-controller",
            program("rollouts-controller"),
            &[kubeconfig, "--leader-elect=false".to_owned()],
        )
    }
}

fn definitions(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.file_name().is_some_and(|name| name != "kustomization.yaml"));
    files.sort();
    Ok(files)
}
