//! `cargo xtask bench`: builds what is measured and what measures it, installs what it is compared with, and runs the
//! measurements (`tests/bench`) in namespaces of their own: nothing else listens there, there is no way out, and every
//! process ends with them.

use std::process::Command;

use anyhow::Result;

use crate::cluster::tools;
use crate::{image, process};

/// What the measurements run, and the packages that have it. Installing nginx and haproxy starts them as Debian does; the
/// measurements start their own.
const TOOLS: [(&str, &str); 7] = [
    ("haproxy", "haproxy"),
    ("nginx", "nginx-light"),
    ("wrk", "wrk"),
    ("ip", "iproute2"),
    ("taskset", "util-linux"),
    ("unshare", "util-linux"),
    ("cc", "gcc"),
];

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Measure these only: proxy, hold, burst
    #[arg(value_name = "SUITE")]
    suites: Vec<String>,
    /// Fail if a goal is missed
    #[arg(long)]
    check: bool,
    /// Less than a minute for each suite, to see that it runs; decides nothing
    #[arg(long)]
    short: bool,
}

/// Measures, shows tables and writes them to `target/bench` with JSON and plots.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::install(&TOOLS)?;
    // One after the other: built together, the resolver would have features that only the measurements need.
    let programs = image::compile(&["elasti-resolver"], &[])?;
    image::compile(&["elasti-bench"], &[])?;
    let out = process::target().join("bench");
    let mut command = Command::new("unshare");
    command.args(["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-c", r#"ip link set lo up && exec "$0" "$@""#]);
    command.arg(programs.join("elasti-bench")).arg("run").args(&args.suites);
    command.arg("--resolver").arg(programs.join("elasti-resolver")).arg("--out").arg(&out);
    command.args(args.check.then_some("--check")).args(args.short.then_some("--short"));
    process::run(&mut command)?;
    eprintln!("tables, JSON and plots are in {}", out.display());
    Ok(())
}
