//! A node's part of every cgroup hierarchy: made before the node starts, and the handle by which all of it is ended.
//!
//! Each node has a directory of its own at the top of every hierarchy (cgroup v1, v2 or both), so that a resolver can
//! attach its eBPF programs to one node's processes: daemons in `NODE/host`, pods in `NODE/kubepods`. Every process of a
//! node is below its cgroup2 directory, whoever its parent is: that is how `down` finds them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::progress::wait_until;

/// The mount point of a hierarchy.
struct Hierarchy {
    path: PathBuf,
    unified: bool,
}

fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts
        .lines()
        .filter_map(|line| {
            // proc_pid_mountinfo(5): the fifth field is the mount point, the first after " - " the type.
            let (mount, kind) = line.split_once(" - ")?;
            let path = PathBuf::from(mount.split(' ').nth(4)?);
            let kind = kind.split(' ').next()?;
            (kind == "cgroup" || kind == "cgroup2").then(|| Hierarchy { path, unified: kind == "cgroup2" })
        })
        .collect())
}

fn unified() -> Result<PathBuf> {
    let found = hierarchies()?.into_iter().find(|hierarchy| hierarchy.unified);
    Ok(found.context("no cgroup2 file system is mounted: mount one, e.g. on /sys/fs/cgroup/unified")?.path)
}

/// The file that puts a process among a node's own (not its pods'), and lists these.
pub(super) fn host_processes(node: &str) -> Result<PathBuf> {
    Ok(unified()?.join(node).join("host/cgroup.procs"))
}

/// Makes a node's directory in every hierarchy.
pub(super) fn create(node: &str) -> Result<()> {
    for Hierarchy { path: top, unified } in hierarchies()? {
        let dir = top.join(node);
        create_dir(&dir)?;
        if unified {
            create_dir(&dir.join("host"))?;
            for parent in [&top, &dir] {
                // Kubelet wants these where version 2 has them; a hybrid host has them in version 1.
                for controller in ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"] {
                    let available = fs::read_to_string(parent.join("cgroup.controllers"))?;
                    if available.split_whitespace().any(|name| name == controller) {
                        let file = parent.join("cgroup.subtree_control");
                        fs::write(&file, format!("+{controller}"))
                            .with_context(|| format!("cannot enable {controller} in {}", file.display()))?;
                    }
                }
            }
        }
        // Version 1 starts a child with an empty set, which no process can enter.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if !unified && dir.join(file).exists() {
                fs::write(dir.join(file), fs::read(top.join(file))?)?;
            }
        }
    }
    Ok(())
}

fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make cgroup {} (root is needed)", dir.display()))
}

/// Kills every process of a node, pods included, and removes its directories.
pub(super) fn destroy(node: &str) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(20);
    let dir = unified()?.join(node);
    if dir.exists() {
        // cgroups(7): since Linux 5.14 this kills the whole tree at once, so that nobody can restart anybody.
        fs::write(dir.join("cgroup.kill"), "1").context("cannot kill a cgroup (Linux 5.14 is needed)")?;
        wait_until(&format!("the end of all processes in {}", dir.display()), LIMIT, || {
            Ok(fs::read_to_string(dir.join("cgroup.events"))?.contains("populated 0"))
        })?;
    }
    for hierarchy in hierarchies()? {
        let dir = hierarchy.path.join(node);
        // A version 1 cgroup stays busy until its killed processes are gone entirely.
        wait_until(&format!("the removal of cgroup {}", dir.display()), LIMIT, || remove_tree(&dir))?;
    }
    Ok(())
}

/// Removes directories depth first; false while one is busy.
fn remove_tree(dir: &Path) -> Result<bool> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() && !remove_tree(&entry.path())? {
            return Ok(false);
        }
    }
    match fs::remove_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot remove cgroup {}", dir.display())),
    }
}
