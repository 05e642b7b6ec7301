//! Controllers of other projects on a test cluster: KEDA's operator and Argo Rollouts' controller, with their
//! CRDs. They run as host processes of node 1, as administrators, and end with the cluster.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Cluster, binaries};
use crate::process;

/// Namespace that KEDA takes for its own.
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
        // For the server that its metrics server would ask: any will do, since that is not there.
        for (from, to) in [("ca.crt", "ca.crt"), ("node1.crt", "tls.crt"), ("node1.key", "tls.key")] {
            fs::copy(self.layout.pki().join(from), certificates.join(to))?;
        }
        node.start(
            "keda-operator",
            "env",
            &[
                format!("POD_NAMESPACE={KEDA}"),
                "WATCH_NAMESPACE=".to_owned(),
                format!("KEDA_CLUSTER_OBJECT_NAMESPACE={KEDA}"),
                program("keda-operator"),
                kubeconfig.clone(),
                format!("--cert-dir={}", certificates.display()),
                // Their ports would be those of the other controller.
                "--enable-prometheus-metrics=false".to_owned(),
            ],
        )?;
        // It makes a directory for plugins where it stands; nobody else is there to lead.
        let scratch = self.layout.dir().join("rollouts");
        fs::create_dir_all(&scratch)?;
        let stands = format!("--chdir={}", scratch.display());
        let leads = "--leader-elect=false".to_owned();
        node.start("rollouts-controller", "env", &[stands, program("rollouts-controller"), kubeconfig, leads])
    }
}

fn definitions(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.file_name().is_some_and(|name| name != "kustomization.yaml"));
    files.sort();
    Ok(files)
}
