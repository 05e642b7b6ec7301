//! Prometheus's checker of rules, out of Debian's package. The package is unpacked and not installed, since that would
//! start a Prometheus on the machine.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// The path of `promtool`: that of the machine, or one that is downloaded once.
pub(crate) fn path() -> Result<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    let own = process::target().join("promtool");
    let unpacked = own.join("usr/bin/promtool");
    let installed = std::env::split_paths(&search).map(|directory| directory.join("promtool"));
    if let Some(found) = installed.chain([unpacked.clone()]).find(|program| program.is_file()) {
        return Ok(found);
    }
    fs::create_dir_all(&own)?;
    eprintln!("downloading promtool");
    process::output(Command::new("apt-get").args(["update", "-q"]))?;
    process::output(Command::new("apt-get").args(["download", "-q", "prometheus"]).current_dir(&own))
        .context("cannot download Debian's package prometheus, which has promtool")?;
    let package = fs::read_dir(&own)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get has downloaded no package")?;
    process::output(Command::new("dpkg-deb").arg("--extract").args([&package, &own]))?;
    fs::remove_file(package)?;
    Ok(unpacked)
}
