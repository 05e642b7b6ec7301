//! etcd, the API server, the controller manager and the scheduler, all on the first node.

use std::time::Duration;

use anyhow::Result;

use super::Cluster;
use super::binaries;
use super::layout::{Layout, Node, POD_RANGES, SERVICE_RANGES};
use super::progress::wait_until;

/// Starts etcd and the API server, and waits until it answers.
pub(super) fn start_api_server(cluster: &Cluster) -> Result<()> {
    const LIMIT: Duration = Duration::from_mins(1);
    let [node, _] = cluster.layout.nodes();
    node.start("etcd", binaries::path("etcd"), &etcd(&node))?;
    node.start("kube-apiserver", binaries::path("kube-apiserver"), &api_server(&cluster.layout, &node))?;
    wait_until("the API server", LIMIT, || {
        node.check()?;
        let answer = cluster.kubectl()?.args(["get", "--raw", "/readyz"]).output()?;
        Ok(answer.status.success())
    })
}

/// Starts the controller manager and the scheduler.
pub(super) fn start_controllers(layout: &Layout) -> Result<()> {
    let [node, _] = layout.nodes();
    let manager = "kube-controller-manager";
    node.start(manager, binaries::path(manager), &controller_manager(layout))?;
    let kubeconfig = layout.pki().join("kube-scheduler.kubeconfig");
    node.start(
        "kube-scheduler",
        binaries::path("kube-scheduler"),
        &[format!("--kubeconfig={}", kubeconfig.display()), "--leader-elect=false".to_owned()],
    )
}

fn etcd(node: &Node) -> Vec<String> {
    vec![
        format!("--data-dir={}", node.dir().join("etcd").display()),
        // The data lives as long as the cluster, so nothing is worth the wait for a disk.
        "--unsafe-no-fsync".to_owned(),
        "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
        "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
        "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
        "--log-level=warn".to_owned(),
    ]
}

fn api_server(layout: &Layout, node: &Node) -> Vec<String> {
    let pki = layout.pki();
    let pki = pki.display();
    let [address, _] = node.addresses();
    vec![
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--advertise-address={address}"),
        format!("--service-cluster-ip-range={SERVICE_RANGES}"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        format!("--client-ca-file={pki}/ca.crt"),
        format!("--tls-cert-file={pki}/kube-apiserver.crt"),
        format!("--tls-private-key-file={pki}/kube-apiserver.key"),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!("--service-account-signing-key-file={pki}/service-account.key"),
        format!("--service-account-key-file={pki}/service-account.key"),
        format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
        format!("--kubelet-client-key={pki}/kubelet-client.key"),
        format!("--kubelet-certificate-authority={pki}/ca.crt"),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--cert-dir={}", node.dir().display()),
    ]
}

fn controller_manager(layout: &Layout) -> Vec<String> {
    let pki = layout.pki();
    let pki = pki.display();
    vec![
        format!("--kubeconfig={pki}/kube-controller-manager.kubeconfig"),
        "--leader-elect=false".to_owned(),
        "--use-service-account-credentials=true".to_owned(),
        // By default 20 a second, which the accounts of some 40 controllers at the start use up for seconds.
        "--kube-api-qps=200".to_owned(),
        "--kube-api-burst=400".to_owned(),
        format!("--root-ca-file={pki}/ca.crt"),
        format!("--service-account-private-key-file={pki}/service-account.key"),
        format!("--service-cluster-ip-range={SERVICE_RANGES}"),
        format!("--cluster-cidr={POD_RANGES}"),
        // Each node's range is decided beforehand, because its CNI configuration and the routes to it are.
        "--allocate-node-cidrs=false".to_owned(),
    ]
}
