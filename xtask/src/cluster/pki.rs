//! Certificates, keys and kubeconfigs of a cluster, made by the openssl command.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::layout::{API_SERVER, API_SERVICE_IP, Layout};
use crate::process;

/// Makes all of it: `pki/NAME.crt` and `pki/NAME.key`, and `pki/NAME.kubeconfig` for the clients of the API server.
pub(super) fn create(layout: &Layout) -> Result<()> {
    let dir = layout.pki();
    fs::create_dir_all(&dir)?;
    openssl(&dir, "ca", "/CN=elasti-test-cluster", &[])?;
    // Signs ServiceAccount tokens; the API server reads the public half from the private key.
    process::output(
        Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(dir.join("service-account.key")),
    )?;
    let names = "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,\
                 DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:127.0.0.1";
    let node_names = |addresses: [String; 2]| addresses.map(|address| format!("IP:{address}")).join(",");
    let nodes = layout.nodes();
    let api_server = format!("{names},IP:{API_SERVICE_IP},{}", node_names(nodes[0].addresses()));
    issue(&dir, "kube-apiserver", "/CN=kube-apiserver", Some(&api_server))?;
    issue(&dir, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", None)?;

    issue(&dir, "admin", "/O=system:masters/CN=admin", None)?;
    fs::write(layout.kubeconfig(), kubeconfig(&dir, "admin"))?;
    for client in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
        issue(&dir, client, &format!("/CN=system:{client}"), None)?;
        fs::write(dir.join(format!("{client}.kubeconfig")), kubeconfig(&dir, client))?;
    }
    for node in nodes {
        let name = node.name();
        let subject = format!("/O=system:nodes/CN=system:node:{name}");
        let names = format!("DNS:{name},{}", node_names(node.addresses()));
        issue(&dir, &name, &subject, Some(&names))?;
        fs::write(dir.join(format!("{name}.kubeconfig")), kubeconfig(&dir, &name))?;
    }
    Ok(())
}

fn issue(dir: &Path, name: &str, subject: &str, alternative_names: Option<&str>) -> Result<()> {
    let (ca, key) = (dir.join("ca.crt"), dir.join("ca.key"));
    let mut args = vec![
        "-CA".to_owned(),
        ca.display().to_string(),
        "-CAkey".to_owned(),
        key.display().to_string(),
        "-addext".to_owned(),
        "basicConstraints=critical,CA:FALSE".to_owned(),
        "-addext".to_owned(),
        "extendedKeyUsage=clientAuth,serverAuth".to_owned(),
    ];
    if let Some(names) = alternative_names {
        args.extend(["-addext".to_owned(), format!("subjectAltName={names}")]);
    }
    openssl(dir, name, subject, &args)
}

/// An elliptic key and a certificate for it: self-signed unless the arguments name an issuer.
fn openssl(dir: &Path, name: &str, subject: &str, args: &[String]) -> Result<()> {
    process::output(
        Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"])
            .args(["-days", "365", "-subj", subject, "-keyout"])
            .arg(dir.join(format!("{name}.key")))
            .arg("-out")
            .arg(dir.join(format!("{name}.crt")))
            .args(args),
    )
    .map(drop)
}

fn kubeconfig(dir: &Path, user: &str) -> String {
    let dir = dir.display();
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: elasti
  cluster: {{server: '{API_SERVER}', certificate-authority: '{dir}/ca.crt'}}
users:
- name: {user}
  user: {{client-certificate: '{dir}/{user}.crt', client-key: '{dir}/{user}.key'}}
contexts:
- name: elasti
  context: {{cluster: elasti, user: {user}}}
current-context: elasti
"
    )
}
