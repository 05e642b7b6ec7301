//! Which cgroup the programs are attached to: the top of this node's pods and processes.
//!
//! On an ordinary node that is the root of the cgroup2 hierarchy. Where several nodes share a machine, each has a
//! subtree; the resolver's own pod lies in it, so what stands before `/kubepods` in its own path is the node's.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why the node's cgroup was not found.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There is no cgroup2 hierarchy to be seen.
    #[error("no cgroup2 hierarchy is mounted at or below {0}; mount the host's /sys/fs/cgroup there (hostPath)")]
    NotMounted(PathBuf),
    /// The process table cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// Finds the node's cgroup: below `host`, where the host's cgroup hierarchies are mounted.
pub fn find(host: &Path) -> Result<PathBuf, CgroupError> {
    let read =
        |path: &'static str| std::fs::read_to_string(path).map_err(|source| CgroupError::Unreadable { path, source });
    let mount =
        mount_point(&read("/proc/self/mountinfo")?, host).ok_or_else(|| CgroupError::NotMounted(host.to_owned()))?;
    Ok(mount.join(node_subtree(&read("/proc/self/cgroup")?)))
}

/// The cgroup that holds all pods of the node whose cgroup this is, and neither kubelet nor the container runtime: `kubepods`,
/// or `kubepods.slice` under systemd, at the top or, where kubelet was told so (`--cgroup-root`), a level below.
pub fn pods(node: &Path) -> Option<PathBuf> {
    let found = |parent: &Path| children(parent).find(|child| is_pods(child));
    found(node).or_else(|| children(node).find_map(|child| found(&child)))
}

fn is_pods(directory: &Path) -> bool {
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice")
}

fn children(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let mut children: Vec<PathBuf> =
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect();
    children.sort();
    children.into_iter()
}

/// The cgroup of a pod, if it runs on this node; `pods` holds them all, in classes of quality of service, as kubelet's cgroup
/// drivers name them. In the names of systemd's slices dashes part the levels, so the UID's become underscores.
pub fn pod(pods: &Path, uid: &str) -> Option<PathBuf> {
    if uid.is_empty() || !uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return None;
    }
    let top = pods.file_name()?.to_string_lossy().into_owned();
    let candidate = |class: Option<&str>| match top.strip_suffix(".slice") {
        Some(prefix) => {
            let level = class.map_or_else(|| prefix.to_owned(), |class| format!("{prefix}-{class}"));
            let pod = format!("{level}-pod{}.slice", uid.replace('-', "_"));
            if class.is_some() { pods.join(format!("{level}.slice")).join(pod) } else { pods.join(pod) }
        }
        None => class.map_or_else(|| pods.to_owned(), |class| pods.join(class)).join(format!("pod{uid}")),
    };
    [None, Some("burstable"), Some("besteffort")].into_iter().map(candidate).find(|path| path.is_dir())
}

/// The id that the kernel knows a cgroup by: the inode number of its directory, on every machine of 64 bits.
pub fn id(cgroup: &Path) -> Option<u64> {
    std::fs::metadata(cgroup).ok().map(|metadata| metadata.ino())
}

/// The mount point of a cgroup2 hierarchy at or below `host`. See `proc_pid_mountinfo(5)` for the lines.
fn mount_point(mountinfo: &str, host: &Path) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = Path::new(mount.split(' ').nth(4)?);
        (kind.split(' ').next() == Some("cgroup2") && point.starts_with(host)).then(|| point.to_owned())
    })
}

/// The node's part of the path that this process has in cgroup2, relative; empty on an ordinary node, and in a private
/// cgroup namespace, whose path is `/`. See cgroups(7) for the lines.
fn node_subtree(cgroups: &str) -> PathBuf {
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let node = Path::new(own)
        .iter()
        .take_while(|part| !part.to_string_lossy().starts_with("kubepods"))
        .filter(|part| *part != "/" && *part != "..");
    // A process outside of any pod, such as in development, stands for the whole machine.
    if own.contains("/kubepods") { node.collect() } else { PathBuf::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
        30 23 0:26 / /host-cgroup ro - tmpfs tmpfs rw\n\
        31 30 0:27 / /host-cgroup/cpu rw - cgroup cgroup rw,cpu\n\
        32 30 0:28 / /host-cgroup/unified rw - cgroup2 cgroup2 rw\n\
        33 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_hierarchy_is_found_below_the_hosts_mount_only() {
        assert_eq!(mount_point(HYBRID, Path::new("/host-cgroup")), Some("/host-cgroup/unified".into()));
        let pure = "32 30 0:28 / /host-cgroup rw - cgroup2 cgroup2 rw";
        assert_eq!(mount_point(pure, Path::new("/host-cgroup")), Some("/host-cgroup".into()));
        assert_eq!(mount_point(HYBRID, Path::new("/elsewhere")), None);
    }

    #[test]
    fn the_nodes_subtree_is_what_stands_before_the_pods() {
        let subtree = |path: &str| node_subtree(&format!("4:cpu:/x\n0::{path}\n"));
        assert_eq!(subtree("/kubepods/besteffort/pod1/c"), Path::new(""));
        assert_eq!(subtree("/kubepods.slice/kubepods-pod1.slice/c.scope"), Path::new(""));
        assert_eq!(subtree("/node2/kubepods/pod1/c"), Path::new("node2"));
        assert_eq!(subtree("/"), Path::new(""), "a private cgroup namespace");
        assert_eq!(subtree("/user.slice/session-1.scope"), Path::new(""), "no pod at all");
    }

    #[test]
    fn pods_are_found_as_kubelets_cgroup_drivers_name_them() {
        let uid = "01234567-89ab-cdef-0123-456789abcdef";
        let under = "01234567_89ab_cdef_0123_456789abcdef";
        for (top, pod_below) in [
            ("kubepods", format!("pod{uid}")),
            ("kubepods", format!("burstable/pod{uid}")),
            ("kubepods.slice", format!("kubepods-pod{under}.slice")),
            ("kubepods.slice", format!("kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice")),
            (
                "kubelet.slice/kubelet-kubepods.slice",
                format!("kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{under}.slice"),
            ),
        ] {
            let node = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(node.path().join("system.slice/kubelet.service")).unwrap();
            assert_eq!(pods(node.path()), None);
            let expected = node.path().join(top).join(&pod_below);
            std::fs::create_dir_all(&expected).unwrap();
            let found = pods(node.path()).unwrap();
            assert_eq!(found, node.path().join(top));
            assert_eq!(pod(&found, uid), Some(expected), "{top} {pod_below}");
            assert_eq!(pod(&found, "another"), None);
            assert_eq!(pod(&found, "../burstable"), None);
        }
    }
}
