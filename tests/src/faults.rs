//! What goes wrong on purpose: processes of pods and nodes that are killed, frozen or cut off.
//!
//! The nodes' processes are this machine's, in cgroups that name node and pod: that is how they are found.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{get, kubectl, list, until};
use crate::netns::cgroup2;

/// How long something is away in tests of absence: 15 s, or what `ELASTI_ABSENCE` says, such as 60.
pub fn absence() -> Duration {
    let seconds = std::env::var("ELASTI_ABSENCE").ok().map(|text| text.parse().expect("ELASTI_ABSENCE: seconds"));
    Duration::from_secs(seconds.unwrap_or(15))
}

/// A process of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(u32);

impl Process {
    /// The process of a pod's program.
    pub fn of_pod(pod: &Value, program: &str) -> Self {
        let uid = pod["metadata"]["uid"].as_str().expect("a UID");
        Self::find(|cgroups, name| cgroups.contains(uid) && program.starts_with(name))
            .unwrap_or_else(|| panic!("no process {program} of pod {uid}"))
    }

    /// A component of a node, numbered from 1.
    pub fn of_node(node: usize, program: &str) -> Self {
        let cgroup = format!("/{}/host", namespaces()[node - 1]);
        Self::find(|cgroups, name| cgroups.contains(&cgroup) && program.starts_with(name))
            .unwrap_or_else(|| panic!("no process {program} of node {node}"))
    }

    /// By its cgroups and its name, which the kernel cuts after 15 characters.
    fn find(matches: impl Fn(&str, &str) -> bool) -> Option<Self> {
        std::fs::read_dir("/proc").expect("/proc is readable").flatten().find_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
            let name = read("comm")?;
            (name.len() > 5 && matches(&read("cgroup")?, name.trim())).then_some(Self(id))
        })
    }

    /// Those of all pods of a node, numbered from 1.
    fn of_pods(node: usize) -> Vec<Self> {
        let cgroup = format!("/{}/", namespaces()[node - 1]);
        let cgroups = |id: u32| std::fs::read_to_string(format!("/proc/{id}/cgroup")).unwrap_or_default();
        let all = std::fs::read_dir("/proc").expect("/proc is readable").flatten();
        let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        all.filter(|id| cgroups(*id).contains(&cgroup) && cgroups(*id).contains("/kubepods")).map(Self).collect()
    }

    /// Sends it a signal.
    pub fn signal(self, signal: &str) {
        let status = Command::new("kill").args([&format!("-{signal}"), &self.0.to_string()]).status();
        assert!(status.expect("kill starts").success(), "{self:?} is there");
    }

    /// The most memory that its pod has used, and its limit, in bytes.
    pub fn memory(self) -> (u64, u64) {
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", self.0)).expect("it runs");
        let path = |hierarchy: &str| cgroups.lines().find_map(|line| line.split_once(hierarchy)).map(|(_, path)| path);
        let (directory, files) = if let Some(path) = path(":memory:") {
            (format!("/sys/fs/cgroup/memory{path}"), ["memory.max_usage_in_bytes", "memory.limit_in_bytes"])
        } else {
            let path = path("0::").expect("a cgroup").trim_start_matches('/');
            (cgroup2().join(path).display().to_string(), ["memory.peak", "memory.max"])
        };
        let [peak, limit] = files.map(|file| {
            let text = std::fs::read_to_string(format!("{directory}/{file}"));
            text.unwrap_or_else(|error| panic!("{directory}/{file}: {error}")).trim().parse().expect("bytes")
        });
        (peak, limit)
    }
}

/// The network namespaces of the nodes, whose names are those of their cgroups too.
fn namespaces() -> Vec<String> {
    let names = std::env::var("ELASTI_NODES").expect("run this by `cargo xtask test --only cluster`");
    names.split(',').map(str::to_owned).collect()
}

/// The cgroup2 directory of a node, numbered from 1.
pub fn cgroup_of_node(node: usize) -> PathBuf {
    cgroup2().join(&namespaces()[node - 1])
}

/// A process that is stopped until this is dropped.
pub struct Stopped(Process);

impl Stopped {
    /// Stops it: to its peers it hangs.
    pub fn new(process: Process) -> Self {
        process.signal("STOP");
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.signal("CONT");
    }
}

/// A node that is cut off and whose processes stand still until this is dropped: to the others it is switched off. When it
/// comes back its pods are dead, as after a reboot.
pub struct Vanished(usize);

impl Vanished {
    /// Takes node 2 away; the control plane is on node 1.
    pub fn new() -> Self {
        let vanished = Self(2);
        // Before any routing, both ways; its kernel would go on answering for frozen processes.
        let rules = "table inet vanished {
            chain in { type filter hook prerouting priority -500; iifname eth0 drop; }
            chain out { type filter hook postrouting priority 500; oifname eth0 drop; }
        }";
        vanished.nft(rules);
        std::fs::write(cgroup_of_node(vanished.0).join("cgroup.freeze"), "1").expect("a node can be frozen");
        vanished
    }

    fn nft(&self, rules: &str) {
        use std::io::Write;
        let mut child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", namespaces()[self.0 - 1]))
            .args(["nft", "-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("nft starts");
        child.stdin.take().expect("piped").write_all(rules.as_bytes()).expect("nft reads");
        assert!(child.wait().expect("nft ends").success(), "{rules}");
    }
}

impl Default for Vanished {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Vanished {
    fn drop(&mut self) {
        for process in Process::of_pods(self.0) {
            process.signal("KILL");
        }
        std::fs::write(cgroup_of_node(self.0).join("cgroup.freeze"), "0").expect("a node can be thawed");
        self.nft("delete table inet vanished");
    }
}

/// The resolver's pod on a node, numbered from 1.
pub fn resolver_on(node: usize) -> Value {
    let mut pods = crate::cluster::resolvers();
    pods.retain(|pod| pod["spec"]["nodeName"] == crate::cluster::NODES[node - 1]);
    pods.pop().expect("a resolver on each node")
}

/// The operator's pod that holds the Lease.
pub fn leader() -> Value {
    let namespace = elasti_api::names::NAMESPACE;
    until("somebody leads", || {
        let lease = list(namespace, "lease", "").pop()?;
        let holder = lease["spec"]["holderIdentity"].as_str()?.to_owned();
        get(namespace, "pod", &holder)
    })
}

/// Sees to it that the operator's leader is on a node, numbered from 1, and the other replica on the other.
pub fn lead_from(node: usize) {
    let namespace = elasti_api::names::NAMESPACE;
    until("the leader is where it shall be", || {
        installation_is_ready();
        let pods = list(namespace, "pods", "app.kubernetes.io/name=elasti-operator");
        let [one, other] = &pods[..] else { return None };
        let leader = leader();
        let spread = one["spec"]["nodeName"] != other["spec"]["nodeName"];
        if spread && leader["spec"]["nodeName"] == crate::cluster::NODES[node - 1] {
            return Some(());
        }
        // The other one leads then; what replaces it is put where there is none.
        kubectl(&["-n", namespace, "delete", "pod", leader["metadata"]["name"].as_str()?, "--ignore-not-found"]);
        None
    });
}

/// Waits until all of the installation is ready. For resolvers `kubectl rollout status` would also wait until those that
/// are about to end have ended, which they do not while they hold connections.
pub fn installation_is_ready() {
    let namespace = elasti_api::names::NAMESPACE;
    kubectl(&["-n", namespace, "rollout", "status", "deployment/elasti-operator", "--timeout=180s"]);
    resolvers_are_ready(|_| true);
}

/// Waits until each node has one resolver that is not about to end, of this kind and ready.
pub fn resolvers_are_ready(kind: impl Fn(&Value) -> bool) {
    let ready = |pod: &Value| {
        let conditions = pod["status"]["conditions"].as_array();
        conditions.is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
    };
    until("resolvers are ready on both nodes", || {
        let resolvers = crate::cluster::resolvers();
        let nodes = crate::cluster::NODES.len();
        (resolvers.len() == nodes && resolvers.iter().all(|pod| ready(pod) && kind(pod))).then_some(())
    });
}
