//! What makes a node take pods: containerd with CNI, kubelet and kube-proxy.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::ProxyMode;
use super::binaries;
use super::images;
use super::layout::{DNS_SERVICE_IP, Node, POD_RANGES};
use super::progress::wait_until;

/// Where Debian has the CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";
/// The `ptp` plugin for pods whose IPv6 addresses work at once.
///
/// Duplicate address detection would add one to two seconds to the start of each pod, and a new network namespace takes
/// the kernel's defaults rather than its parent's (`devconf_inherit_init_net` in the kernel's sysctl/net).
const PTP_WITHOUT_DAD: &str = r#"#!/bin/sh
set -e
if [ "$CNI_COMMAND" = ADD ]; then
    nsenter --net="$CNI_NETNS" sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
fi
exec /usr/lib/cni/ptp
"#;

/// Starts containerd and waits until it answers.
pub(super) fn start_containerd(node: &Node) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(30);
    let dir = node.dir();
    fs::create_dir_all(dir.join("cni/bin"))?;
    fs::write(dir.join("cni/10-elasti.conflist"), cni(node))?;
    let plugin = dir.join("cni/bin/ptp-without-dad");
    fs::write(&plugin, PTP_WITHOUT_DAD)?;
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;
    for plugin in ["host-local", "loopback", "portmap"] {
        symlink(Path::new(CNI_PLUGINS).join(plugin), dir.join("cni/bin").join(plugin))?;
    }
    let config = dir.join("containerd.toml");
    fs::write(&config, containerd(node))?;
    node.start("containerd", "containerd", &[format!("--config={}", config.display())])?;
    wait_until(&format!("containerd of {}", node.namespace()), LIMIT, || {
        node.check()?;
        Ok(ctr(node)?.arg("version").output()?.status.success())
    })
}

/// The `ctr` command for the images and containers of a node's pods.
pub(super) fn ctr(node: &Node) -> Result<Command> {
    let mut command = node.command_with_mounts("ctr")?;
    command.arg("--namespace=k8s.io");
    Ok(command)
}

/// Starts kubelet and kube-proxy; the API server must answer.
pub(super) fn start_kubernetes(node: &Node, mode: ProxyMode) -> Result<()> {
    let (dir, pki, name) = (node.dir(), node.layout.pki(), node.name());
    let config = dir.join("kubelet.yaml");
    fs::write(&config, kubelet(node))?;
    node.start(
        "kubelet",
        binaries::path("kubelet"),
        &[
            format!("--config={}", config.display()),
            format!("--kubeconfig={}", pki.join(format!("{name}.kubeconfig")).display()),
            format!("--hostname-override={name}"),
            format!("--node-ip={}", node.addresses().join(",")),
        ],
    )?;
    let config = dir.join("kube-proxy.yaml");
    fs::write(&config, kube_proxy(node, mode))?;
    node.start("kube-proxy", binaries::path("kube-proxy"), &[format!("--config={}", config.display())])
}

fn containerd(node: &Node) -> String {
    // restrict_oom_score_adj: runc may not lower the score where the machine itself lacks CAP_SYS_RESOURCE.
    format!(
        r#"version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}/bin"
conf_dir = "{cni}"
"#,
        images::PAUSE,
        cni = node.dir().join("cni").display(),
    )
}

fn cni(node: &Node) -> String {
    let [ipv4, ipv6] = node.pod_ranges();
    // ptp routes every packet, so kube-proxy's rules see pods of the same node too, with or without bridge-nf-call.
    // No masquerading: a pod's own address is what its peers see.
    format!(
        r#"{{
  "cniVersion": "1.0.0",
  "name": "{}",
  "plugins": [
    {{
      "type": "ptp-without-dad",
      "ipMasq": false,
      "ipam": {{
        "type": "host-local",
        "ranges": [[{{"subnet": "{ipv4}"}}], [{{"subnet": "{ipv6}"}}]],
        "routes": [{{"dst": "0.0.0.0/0"}}, {{"dst": "::/0"}}]
      }}
    }},
    {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
  ]
}}
"#,
        node.namespace(),
    )
}

fn kubelet(node: &Node) -> String {
    let pki = node.layout.pki();
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: '{pki}/ca.crt'}}
authorization: {{mode: Webhook}}
tlsCertFile: '{pki}/{name}.crt'
tlsPrivateKeyFile: '{pki}/{name}.key'
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /{cgroup}
clusterDNS: [{DNS_SERVICE_IP}]
clusterDomain: cluster.local
# The machine's own resolver is out of reach.
resolvConf: ''
failSwapOn: false
serializeImagePulls: false
# Images cannot be pulled again, and a full disk of the machine is not this cluster's matter.
imageGCHighThresholdPercent: 100
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%}}
",
        pki = pki.display(),
        name = node.name(),
        cgroup = node.namespace(),
    )
}

fn kube_proxy(node: &Node, mode: ProxyMode) -> String {
    // minSyncPeriod: by default a change waits up to a second after any other Service's change; tests want steady delays.
    // conntrack: its limits belong to the machine.
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {mode}
clientConnection: {{kubeconfig: '{kubeconfig}'}}
hostnameOverride: {name}
clusterCIDR: {POD_RANGES}
conntrack: {{maxPerCore: 0, min: 0}}
iptables: {{minSyncPeriod: 10ms}}
nftables: {{minSyncPeriod: 10ms}}
",
        mode = mode.name(),
        kubeconfig = node.layout.pki().join("kube-proxy.kubeconfig").display(),
        name = node.name(),
    )
}

/// Puts the images of a docker archive into a node's containerd.
pub(super) fn load_image(node: &Node, archive: &Path) -> Result<()> {
    // Through standard input, because the node's mounts may hide the archive.
    let output = ctr(node)?.args(["images", "import", "-"]).stdin(fs::File::open(archive)?).output()?;
    if !output.status.success() {
        anyhow::bail!(
            "cannot load {} into {}: {}",
            archive.display(),
            node.namespace(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(())
}
