//! A real two-node Kubernetes on this machine, for the demo, the tests and by hand: `cargo xtask cluster up`.
//!
//! The control plane and the first node share one network namespace, the second node has its own, and neither has a way
//! out. Everything generated is below `target/cluster`. A cluster is known by its name; several may run at once. What
//! `up` makes, `down` removes by name alone, so it needs no orderly end before it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;
use layout::{Layout, Node};
use progress::{Progress, wait_until};

mod binaries;
mod cgroup;
mod command;
mod control_plane;
mod controllers;
pub(crate) mod images;
mod layout;
mod network;
mod node;
mod pki;
mod progress;
pub(crate) mod tools;
mod worker;

pub(crate) use command::{Args, run};

/// How kube-proxy implements Services.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ProxyMode {
    /// The usual one.
    #[default]
    Iptables,
    /// Its successor.
    Nftables,
}

impl ProxyMode {
    /// The name in kube-proxy's configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// What to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// 1 to 32 of `a-z`, `0-9` and `-`.
    pub(crate) name: String,
    /// How kube-proxy implements Services.
    pub(crate) kube_proxy: ProxyMode,
    /// Only etcd and the API server: no pod ever runs.
    pub(crate) api_server_only: bool,
}

/// A handle of a cluster; dropping it leaves the cluster as it is.
#[derive(Debug)]
pub(crate) struct Cluster {
    layout: Layout,
}

impl Cluster {
    /// The cluster of that name, whether it is up or not.
    pub(crate) fn open(name: &str) -> Result<Self> {
        Ok(Self { layout: Layout::new(name)? })
    }

    /// Returns once the cluster is up entirely: nodes and cluster DNS ready, default ServiceAccount there.
    ///
    /// A cluster that is up with the same options is kept, any other of that name is taken down first. After an error its
    /// logs and whatever runs are left for a look; the next `up` or `down` removes them.
    pub(crate) fn up(options: &Options) -> Result<Self> {
        let cluster = Self::open(&options.name)?;
        if fs::metadata("/proc/self")?.uid() != 0 {
            bail!("a cluster needs root: network namespaces, cgroups and mounts");
        }
        let _lock = cluster.lock()?;
        if cluster.is_healthy(options) {
            eprintln!("cluster {} is up already", options.name);
            return Ok(cluster);
        }
        tools::install(&tools::CLUSTER)?;
        binaries::build()?;
        cluster.remove()?;
        let name = &options.name;
        cluster.start(options).with_context(|| {
            let logs = cluster.layout.logs();
            format!("cluster {name} did not start; logs are in {}, `cluster down` removes it", logs.display())
        })?;
        fs::write(cluster.layout.options(), format!("{options:?}"))?;
        Ok(cluster)
    }

    /// Ends and removes all of the cluster; does nothing when there is none.
    pub(crate) fn down(&self) -> Result<()> {
        let _lock = self.lock()?;
        self.remove()
    }

    /// The administrator's kubeconfig; its API server is reachable from the nodes' network namespaces only.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    /// A program as a host process of a node (1 or 2): in its network namespace and cgroup, with this machine's files.
    pub(crate) fn command_in_node(&self, node: u8, program: impl AsRef<Path>) -> Result<Command> {
        self.node(node)?.command(program)
    }

    /// The name of a node's network namespace, below `/run/netns`.
    pub(crate) fn netns(&self, node: u8) -> Result<String> {
        Ok(self.node(node)?.namespace())
    }

    /// Where kubectl is.
    pub(crate) fn kubectl_path() -> PathBuf {
        binaries::path("kubectl")
    }

    /// kubectl as administrator.
    pub(crate) fn kubectl(&self) -> Result<Command> {
        if !self.kubeconfig().exists() {
            bail!("cluster {} is not up: start it with `cargo xtask cluster up`", self.layout.name());
        }
        let mut command = self.command_in_node(1, binaries::path("kubectl"))?;
        command.env("KUBECONFIG", self.kubeconfig());
        // Discovery is cached with the cluster, not in the home directory.
        command.env("KUBECACHEDIR", self.layout.dir().join("kubectl-cache"));
        Ok(command)
    }

    /// Puts the images of a docker or OCI archive on both nodes.
    pub(crate) fn load_image(&self, archive: &Path) -> Result<()> {
        self.on_both(|node| worker::load_image(node, archive))
    }

    fn node(&self, number: u8) -> Result<Node> {
        let node = self.layout.nodes().into_iter().find(|node| node.number == number);
        node.with_context(|| format!("there is no node {number}: use 1 or 2"))
    }

    /// Keeps two commands from changing one cluster at once, until the file is dropped.
    fn lock(&self) -> Result<File> {
        fs::create_dir_all(layout::root())?;
        let lock = File::create(layout::root().join(format!("{}.lock", self.layout.name())))?;
        lock.lock().context("cannot lock the cluster's name")?;
        Ok(lock)
    }

    fn start(&self, options: &Options) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(90);
        let progress = Progress::new();
        let nodes = self.layout.nodes();
        fs::create_dir_all(self.layout.logs())?;
        pki::create(&self.layout)?;
        network::create(&nodes)?;
        nodes.iter().try_for_each(Node::create)?;
        progress.step("certificates and network namespaces");
        if options.api_server_only {
            network::leave_interception_ports(&nodes[0])?;
            control_plane::start_api_server(self)?;
            progress.step("API server answers");
            return Ok(());
        }
        let images = [images::pause()?, images::coredns()?];
        std::thread::scope(|scope| {
            let containers = scope.spawn(|| {
                self.on_both(|node| {
                    worker::start_containerd(node)?;
                    images.iter().try_for_each(|archive| worker::load_image(node, archive))
                })
            });
            control_plane::start_api_server(self)?;
            progress.step("API server answers");
            join(containers)?;
            progress.step("containerd runs on both nodes");
            anyhow::Ok(())
        })?;
        control_plane::start_controllers(&self.layout)?;
        for node in &nodes {
            worker::start_kubernetes(node, options.kube_proxy)?;
        }
        let manifest = process::root().join("tests/cluster/coredns.yaml");
        process::output(self.kubectl()?.args(["apply", "-f"]).arg(manifest))?;
        progress.step("controllers, kubelets, kube-proxies and CoreDNS started");
        let wait = |what, condition: fn(&Self) -> bool| {
            wait_until(what, LIMIT, || {
                nodes.iter().try_for_each(Node::check)?;
                Ok(condition(self))
            })?;
            progress.step(what);
            anyhow::Ok(())
        };
        wait("both nodes are ready", Self::has_ready_nodes)?;
        wait("default ServiceAccount is there", Self::has_service_account)?;
        wait("cluster DNS is ready", Self::has_ready_dns)
    }

    fn remove(&self) -> Result<()> {
        for node in self.layout.nodes() {
            cgroup::destroy(&node.namespace())?;
            network::destroy(&node)?;
        }
        match fs::remove_dir_all(self.layout.dir()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.layout.dir().display()))
            }
            _ => Ok(()),
        }
    }

    fn is_healthy(&self, options: &Options) -> bool {
        fs::read_to_string(self.layout.options()).is_ok_and(|earlier| earlier == format!("{options:?}"))
            && self.layout.nodes().iter().all(|node| node.check().is_ok())
            && self.prints(&["get", "--raw", "/readyz"], "ok")
            && (options.api_server_only || self.has_ready_nodes() && self.has_ready_dns())
    }

    fn has_ready_nodes(&self) -> bool {
        let path = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
        self.prints(&["get", "nodes", "-o", path], "True True")
    }

    fn has_ready_dns(&self) -> bool {
        let service = "kubernetes.io/service-name=kube-dns";
        let path = "jsonpath={.items[*].endpoints[*].conditions.ready}";
        self.prints(&["get", "endpointslices", "-n", "kube-system", "-l", service, "-o", path], "true")
    }

    fn has_service_account(&self) -> bool {
        self.prints(&["get", "serviceaccount", "default", "-o", "name"], "serviceaccount/default")
    }

    fn prints(&self, kubectl: &[&str], expected: &str) -> bool {
        let run = || process::output(self.kubectl()?.args(kubectl).arg("--request-timeout=5s"));
        run().is_ok_and(|printed| printed.trim() == expected)
    }

    /// Does the same on both nodes at once.
    fn on_both(&self, action: impl Fn(&Node) -> Result<()> + Sync) -> Result<()> {
        let [first, second] = self.layout.nodes();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| action(&second));
            action(&first)?;
            join(other)
        })
    }
}

fn join(thread: std::thread::ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| bail!("a thread of xtask panicked"))
}
