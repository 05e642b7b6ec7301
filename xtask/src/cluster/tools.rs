//! Programs of the machine that a cluster or a measurement needs, installed from Debian where they are missing.

use std::path::Path;

use anyhow::Result;

use crate::process;

/// What every cluster needs: a program (or a file), and the package that has it.
///
/// By program rather than by package, since another package may have it: Docker's `containerd.io` conflicts with Debian's.
pub(super) const CLUSTER: [(&str, &str); 13] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("ipset", "ipset"),
    ("conntrack", "conntrack"),
    ("ethtool", "ethtool"),
    ("ip", "iproute2"),
    ("sysctl", "procps"),
    ("openssl", "openssl"),
    ("cc", "gcc"),
    // A client of the whole-cluster tests.
    ("curl", "curl"),
];

/// Installs the packages of those programs that are missing.
pub(crate) fn install(tools: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> =
        tools.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
    process::apt_install(&missing)
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An absolute name stays as it is when joined.
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
        || Path::new("/usr/sbin").join(program).is_file()
}
