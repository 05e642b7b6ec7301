//! Names, paths and addresses of a cluster: everything that is decided before anything runs.
//!
//! A cluster is known by its name alone, so `down` finds all of a cluster that crashed at any point. Addresses are the
//! same in every cluster, since each has network namespaces of its own; names of namespaces and cgroups carry the
//! cluster's name.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::process;

/// Addresses of Services, IPv4 first, which makes it the default family.
pub(super) const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:96::/112";
/// The `kubernetes` Service, which Kubernetes puts at the first address of the range.
pub(super) const API_SERVICE_IP: &str = "10.96.0.1";
/// CoreDNS, as `tests/cluster/coredns.yaml` says too.
pub(super) const DNS_SERVICE_IP: &str = "10.96.0.10";
/// Addresses of pods; each node has a part, see [`Node::pod_ranges`].
pub(super) const POD_RANGES: &str = "10.244.0.0/16,fd00:244::/56";
/// Where the API server listens, reachable from the nodes' network namespaces only.
pub(super) const API_SERVER: &str = "https://172.31.255.1:6443";

/// A cluster's name with the paths that follow from it.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    name: String,
}

impl Layout {
    /// Fails unless the name is 1 to 32 of `a-z`, `0-9` and `-`, which suits paths, namespaces and cgroups alike.
    pub(super) fn new(name: &str) -> Result<Self> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 32 || !name.chars().all(fits) || name == "bin" || name == "images" {
            bail!("cluster name {name:?}: use 1 to 32 of a-z, 0-9 and '-', other than 'bin' and 'images'");
        }
        Ok(Self { name: name.to_owned() })
    }

    /// The name, as given to `--name`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The directory of all generated files of this cluster.
    pub(super) fn dir(&self) -> PathBuf {
        root().join(&self.name)
    }

    /// The administrator's kubeconfig.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.dir().join("kubeconfig")
    }

    /// Output of each component, one file each.
    pub(super) fn logs(&self) -> PathBuf {
        self.dir().join("logs")
    }

    /// Certificates and keys.
    pub(super) fn pki(&self) -> PathBuf {
        self.dir().join("pki")
    }

    /// What the cluster was started with; there only once it was up entirely.
    pub(super) fn options(&self) -> PathBuf {
        self.dir().join("options")
    }

    /// Both nodes; the control plane shares the first one's namespaces.
    pub(super) fn nodes(&self) -> [Node; 2] {
        [1, 2].map(|number| Node { layout: self.clone(), number })
    }
}

/// The directory of clusters, their programs and images.
pub(super) fn root() -> PathBuf {
    let target = process::target();
    // Daemons run elsewhere, so paths are absolute.
    target.canonicalize().unwrap_or(target).join("cluster")
}

/// A node of a cluster, by its number: 1 or 2.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(super) layout: Layout,
    pub(super) number: u8,
}

impl Node {
    /// The name that Kubernetes knows it by.
    pub(super) fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// The name of its network namespace, and of its cgroup at the top of every hierarchy.
    pub(super) fn namespace(&self) -> String {
        format!("{}-{}", self.layout.name, self.name())
    }

    /// Its own files.
    pub(super) fn dir(&self) -> PathBuf {
        self.layout.dir().join(self.name())
    }

    /// Its address in each family.
    pub(super) fn addresses(&self) -> [String; 2] {
        [format!("172.31.255.{}", self.number), format!("fd00:255::{}", self.number)]
    }

    /// The addresses of its pods, in each family.
    pub(super) fn pod_ranges(&self) -> [String; 2] {
        let index = self.number - 1;
        [format!("10.244.{index}.0/24"), format!("fd00:244:0:{index}::/64")]
    }
}

#[cfg(test)]
mod tests {
    use super::Layout;

    #[test]
    fn names_that_leave_their_directory_or_take_anothers_are_refused() {
        for name in ["", "..", "a/b", "A", "bin", "images", &"a".repeat(33)] {
            assert!(Layout::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn nodes_share_no_name_and_no_address() {
        let [first, second] = Layout::new("elasti").unwrap().nodes();
        assert_eq!(first.namespace(), "elasti-node1");
        assert_ne!(first.namespace(), second.namespace());
        assert_ne!(first.addresses(), second.addresses());
        assert_ne!(first.pod_ranges(), second.pod_ranges());
    }
}
