//! A node as a place to run programs: a network namespace, a mount namespace and a cgroup.
//!
//! A holder process (`sleep`) keeps the mount namespace, in which the paths that kubelet, containerd and CNI hard-code
//! are the node's own: so nodes do not meet each other nor a container runtime of the machine itself, and every mount is
//! gone when the node's processes are.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cgroup;
use super::layout::Node;
use crate::process;

/// Enters a cgroup before anything else runs; every step replaces the shell, so its process id is the program's.
const FOREGROUND: &str = r#"echo $$ >"$0" && exec nsenter "$@""#;
/// The same, away from the terminal, whose end and interrupts are not the program's.
const DAEMON: &str = r#"echo $$ >"$0" && exec setsid nsenter "$@""#;

/// The holder's name among the components.
const HOLDER: &str = "holder";

/// The holder's script: `$0` is the node's directory.
const HOLD: &str = r#"set -e
mount --make-rshared /
mount -t tmpfs tmpfs /run
for dir in /var/lib/kubelet /var/lib/containerd /var/lib/cni /var/log; do
    mkdir -p "$dir" "$0$dir"
    mount --bind "$0$dir" "$dir"
done
echo ready
exec sleep infinity >/dev/null"#;

impl Node {
    /// Starts the holder; the network namespace must be there.
    pub(super) fn create(&self) -> Result<()> {
        cgroup::create(&self.namespace())?;
        fs::create_dir_all(self.dir())?;
        let log = File::create(self.log(HOLDER))?;
        let mut child = self
            .in_cgroup(DAEMON)?
            .arg(format!("--net=/run/netns/{}", self.namespace()))
            .args(["--", "unshare", "--mount", "--propagation=slave", "sh", "-c", HOLD])
            .arg(self.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start unshare")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line != "ready\n" {
            bail!("{} has no mount namespace: {}", self.namespace(), self.last_words(HOLDER));
        }
        self.record(HOLDER, child.id())
    }

    /// A program in the node's network namespace and cgroup, as one of its host processes; mounts are the caller's.
    pub(super) fn command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let mut command = self.in_cgroup(FOREGROUND)?;
        command.arg(format!("--net=/run/netns/{}", self.namespace())).arg("--").arg(program.as_ref());
        Ok(command)
    }

    /// As [`Node::command`], with the node's mounts too, so that the usual paths are its own.
    pub(super) fn command_with_mounts(&self, program: impl AsRef<Path>) -> Result<Command> {
        self.with_mounts(FOREGROUND, program)
    }

    fn with_mounts(&self, enter: &str, program: impl AsRef<Path>) -> Result<Command> {
        let holder = self.recorded(HOLDER).with_context(|| format!("{} is not up", self.namespace()))?;
        let mut command = self.in_cgroup(enter)?;
        command.arg(format!("--target={holder}")).args(["--net", "--mount", "--wd=/", "--"]).arg(program.as_ref());
        Ok(command)
    }

    fn in_cgroup(&self, enter: &str) -> Result<Command> {
        let mut command = Command::new("sh");
        command.args(["-c", enter]).arg(cgroup::host_processes(&self.namespace())?);
        Ok(command)
    }

    /// Starts a daemon; its output goes to the log of that name, its id is recorded.
    pub(super) fn start(&self, component: &str, program: impl AsRef<Path>, args: &[String]) -> Result<()> {
        let log = File::create(self.log(component))?;
        let mut child = self
            .with_mounts(DAEMON, program)?
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {component}"))?;
        // Until its shell has entered the cgroup it would pass for ended.
        while !self.processes()?.contains(&child.id()) && child.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.record(component, child.id())
    }

    /// Fails with the last lines of its log if any of the node's recorded daemons has ended.
    pub(super) fn check(&self) -> Result<()> {
        for (component, pid) in self.daemons()? {
            if pid.is_none() {
                bail!("{component} of {} has ended: {}", self.namespace(), self.last_words(&component));
            }
        }
        Ok(())
    }

    /// The recorded daemons in order of name, with the process id of those that run.
    pub(super) fn daemons(&self) -> Result<Vec<(String, Option<u32>)>> {
        let Ok(entries) = fs::read_dir(self.pids()) else { return Ok(Vec::new()) };
        let mut daemons = Vec::new();
        for entry in entries {
            let component = entry?.file_name().to_string_lossy().into_owned();
            let pid = self.recorded(&component);
            daemons.push((component, pid));
        }
        daemons.sort();
        // Read after the records: another thread may have started and recorded one meanwhile.
        let running = self.processes()?;
        for (_, pid) in &mut daemons {
            *pid = pid.filter(|pid| running.contains(pid));
        }
        Ok(daemons)
    }

    /// The node's own processes, without its pods'.
    fn processes(&self) -> Result<Vec<u32>> {
        let list = fs::read_to_string(cgroup::host_processes(&self.namespace())?).unwrap_or_default();
        Ok(list.lines().filter_map(|line| line.parse().ok()).collect())
    }

    fn pids(&self) -> PathBuf {
        self.dir().join("pids")
    }

    fn log(&self, component: &str) -> PathBuf {
        self.layout.logs().join(format!("{}-{component}.log", self.name()))
    }

    fn last_words(&self, component: &str) -> String {
        let log = self.log(component);
        format!("{}\n{}", log.display(), process::last_lines(&log))
    }

    fn record(&self, component: &str, pid: u32) -> Result<()> {
        fs::create_dir_all(self.pids())?;
        // Moved into place, so that another thread reads all of it or nothing.
        let written = self.dir().join(format!("{component}.pid"));
        fs::write(&written, pid.to_string())?;
        fs::rename(written, self.pids().join(component))?;
        Ok(())
    }

    fn recorded(&self, component: &str) -> Option<u32> {
        fs::read_to_string(self.pids().join(component)).ok()?.parse().ok()
    }
}
