//! `config/crd/elastiservices.yaml`, generated from the Rust types of `elasti-api`.
//!
//! Their example `crd` prints it, so that the commands here compile without kube.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process;

const FILE: &str = "config/crd/elastiservices.yaml";

const HEADER: &str = "\
# Generated from operator/api/src/v1alpha1.rs: change that, then run `cargo xtask crd`.
";

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Fail if the file is not what the types say, and leave it alone
    #[arg(long)]
    check: bool,
}

/// Writes the file, or checks it.
pub(crate) fn run(args: &Args) -> Result<()> {
    let path = process::root().join(FILE);
    let printed = process::output(
        Command::new("cargo")
            .args(["run", "--quiet", "--package=elasti-api", "--features=crd", "--example=crd"])
            .current_dir(process::root())
            .stdin(Stdio::null()),
    )?;
    let wanted = format!("{HEADER}{printed}");
    let found = fs::read_to_string(&path).unwrap_or_default();
    if found == wanted {
        return Ok(());
    }
    if args.check {
        bail!("{FILE} is not what the types in operator/api say; run `cargo xtask crd` and commit the file");
    }
    fs::write(&path, wanted).with_context(|| format!("cannot write {FILE}"))?;
    eprintln!("{FILE} written");
    Ok(())
}
