//! The programs of Kubernetes, etcd and CoreDNS, and the controllers of other projects that tests run beside ours, built
//! from the Go modules pinned in `tests/cluster`.
//!
//! A program is built again only when its module's `go.mod` or `go.sum` changed: a copy of both is kept beside the
//! programs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::layout;
use crate::process;

struct Module {
    /// Its directory below `tests/cluster`.
    path: &'static str,
    programs: &'static [&'static str],
    /// How long a first build takes on two cores, to set expectations.
    first_build: &'static str,
}

const MODULES: [Module; 3] = [
    Module {
        path: ".",
        programs: &["kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"],
        first_build: "6 minutes",
    },
    Module { path: "etcd", programs: &["etcd"], first_build: "1 minute" },
    Module { path: "coredns", programs: &["coredns"], first_build: "1.5 minutes" },
];

/// Controllers that no cluster needs.
const CONTROLLERS: [Module; 2] = [
    Module { path: "argo-rollouts", programs: &["rollouts-controller"], first_build: "6 minutes" },
    Module { path: "keda", programs: &["keda-operator"], first_build: "12 minutes" },
];

/// The path of a program, whether built or not.
pub(super) fn path(program: &str) -> PathBuf {
    dir().join(program)
}

fn dir() -> PathBuf {
    layout::root().join("bin")
}

/// Builds what is missing or out of date.
pub(super) fn build() -> Result<()> {
    build_modules(&MODULES)
}

/// As [`build`], for the controllers of other projects.
pub(super) fn build_controllers() -> Result<()> {
    build_modules(&CONTROLLERS)
}

/// Where the sources of a Go module are that the one at `tests/cluster/{path}` pins.
pub(super) fn sources(path: &str, module: &str) -> Result<PathBuf> {
    let mut go = Command::new("go");
    go.current_dir(process::root().join("tests/cluster").join(path)).args(["list", "-m", "-f", "{{.Dir}}", module]);
    Ok(process::output(&mut go)?.trim_end().into())
}

fn build_modules(modules: &[Module]) -> Result<()> {
    fs::create_dir_all(dir())?;
    let lock = File::create(dir().join(".lock"))?;
    lock.lock().context("cannot lock the directory of programs")?;
    modules.iter().try_for_each(build_module)
}

fn build_module(module: &Module) -> Result<()> {
    let source = process::root().join("tests/cluster").join(module.path);
    let go_mod = fs::read_to_string(source.join("go.mod"))?;
    let pinned = go_mod.clone() + &fs::read_to_string(source.join("go.sum"))?;
    let stamp = dir().join(format!(".{}.pinned", module.programs[0]));
    let built = module.programs.iter().all(|program| path(program).is_file());
    if built && fs::read_to_string(&stamp).is_ok_and(|earlier| earlier == pinned) {
        return Ok(());
    }
    // One program is written to its own name, several into the directory.
    let output = if let [program] = module.programs { path(program) } else { dir().join("") };
    let mut go = Command::new("go");
    go.current_dir(&source)
        .env("CGO_ENABLED", "0")
        .args(["build", "-buildvcs=false"])
        .arg(format!("-ldflags=-s -w {}", version_flags(&go_mod)))
        .arg("-o")
        .arg(output)
        .arg("tool");
    run_long(&mut go, &dir().join(format!("{}.log", module.programs[0])), module)?;
    fs::write(stamp, pinned)?;
    Ok(())
}

/// Kubernetes built as a module says v0.0.0 of itself, which Helm's and others' version checks refuse.
fn version_flags(go_mod: &str) -> String {
    let version = go_mod.lines().find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes v"));
    let Some(version) = version.and_then(|rest| rest.split_whitespace().next()) else { return String::new() };
    let mut parts = version.split('.');
    let package = "k8s.io/component-base/version";
    format!(
        "-X {package}.gitVersion=v{version} -X {package}.gitMajor={} -X {package}.gitMinor={}",
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    )
}

fn run_long(command: &mut Command, log: &Path, module: &Module) -> Result<()> {
    const SAY_EVERY: Duration = Duration::from_secs(15);
    const POLL: Duration = Duration::from_millis(200);
    let programs = module.programs.join(", ");
    eprintln!("building {programs} (first time about {} on two cores)", module.first_build);
    let output = File::create(log)?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .context("cannot start go: install Go 1.26 or later, see https://go.dev/dl")?;
    let start = Instant::now();
    let mut say_at = SAY_EVERY;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() >= say_at {
            eprintln!("  … still building {programs}: {} s", say_at.as_secs());
            say_at += SAY_EVERY;
        }
        std::thread::sleep(POLL);
    };
    if !status.success() {
        bail!("cannot build {programs}: {status}\n{}", process::last_lines(log));
    }
    eprintln!("  built in {} s", start.elapsed().as_secs());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::version_flags;

    #[test]
    fn programs_say_the_pinned_version() {
        let flags = version_flags("require (\n\tk8s.io/kubernetes v1.34.4 // indirect\n)\n");
        let package = "k8s.io/component-base/version";
        let expected = format!("-X {package}.gitVersion=v1.34.4 -X {package}.gitMajor=1 -X {package}.gitMinor=34");
        assert_eq!(flags, expected);
    }

    #[test]
    fn other_modules_get_no_version() {
        assert_eq!(version_flags("tool example.org/x\n"), "");
    }
}
