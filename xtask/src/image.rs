//! Container images of operator and resolver, made without a container engine: static binaries packed as OCI archives.
//!
//! An archive is `<target>/images/<program>.tar`; `ctr images import` gives its image the name
//! `docker.io/elasti/<program>:<tag>`, which `config/` refers to. Same binary, same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use archive::Image;

mod archive;
#[cfg(feature = "push")]
mod push;

/// Where the images in `config/` belong.
const REPOSITORY: &str = "docker.io/elasti";

/// Tag of images in `config/`.
const TAG: &str = "dev";

/// An image is pulled while somebody waits for a node; more than this means that something slipped in.
const SIZE_MAX: usize = 30_000_000;

/// Both programs. Kubernetes lets the resolver have its capabilities only as root, which its manifest then strips of
/// everything else; the operator needs none.
const PROGRAMS: [Program; 2] =
    [Program { name: "elasti-operator", user: "65532:65532" }, Program { name: "elasti-resolver", user: "0:0" }];

/// Their names.
pub(crate) const NAMES: [&str; 2] = [PROGRAMS[0].name, PROGRAMS[1].name];

struct Program {
    /// Of package, binary and image.
    name: &'static str,
    /// Who it runs as unless the pod says otherwise.
    user: &'static str,
}

/// Options of the command.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Send the images to a registry too, such as ghcr.io/you; who may is taken from `docker login`
    #[arg(long, value_name = "REGISTRY/PREFIX")]
    push: Option<String>,
    /// Tag of the images
    #[arg(long, default_value = TAG)]
    tag: String,
}

/// Makes the archives and pushes the images if asked to.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.push {
        None => build(&args.tag, &[]).map(drop),
        Some(prefix) => push(prefix, &args.tag),
    }
}

/// Makes the archives of operator and resolver, with features (`PACKAGE/FEATURE`); their paths.
pub(crate) fn build(tag: &str, features: &[&str]) -> Result<Vec<PathBuf>> {
    make(tag, features)?.into_iter().map(|(program, image)| write(program, &image, tag)).collect()
}

#[cfg(feature = "push")]
fn push(prefix: &str, tag: &str) -> Result<()> {
    for (program, image) in make(tag, &[])? {
        write(program, &image, tag)?;
        push::push(&image, &format!("{prefix}/{}:{tag}", program.name))?;
    }
    Ok(())
}

/// The registry client takes longer to compile than all other commands together, so only this one waits for it.
#[cfg(not(feature = "push"))]
fn push(prefix: &str, tag: &str) -> Result<()> {
    process::run(
        Command::new("cargo")
            .args(["run", "--quiet", "--package=xtask", "--features=push", "--", "image"])
            .args(["--push", prefix, "--tag", tag])
            .current_dir(process::root()),
    )
}

fn make(tag: &str, features: &[&str]) -> Result<Vec<(&'static Program, Image)>> {
    check_tag(tag)?;
    let binaries = compile(&NAMES, features)?;
    PROGRAMS.iter().map(|program| Ok((program, image(program, &binaries.join(program.name))?))).collect()
}

/// Builds packages with features (`PACKAGE/FEATURE`) and says where their programs are. Linked against Debian's static glibc: no other target and no musl need be
/// installed, and names are resolved without NSS files.
pub(crate) fn compile(packages: &[&str], features: &[&str]) -> Result<PathBuf> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let root = process::root();
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"), PathBuf::from);
    // Paths of this machine are nobody's matter, and would make each machine's binaries differ.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=elasti", root.display()),
        format!("--remap-path-prefix={}=cargo", cargo_home.display()),
    ];
    process::run(
        Command::new("cargo")
            .args(["build", "--release", "--target", &triple])
            .args(packages.iter().map(|package| format!("--package={package}")))
            .args(features.iter().map(|feature| format!("--features={feature}")))
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env_remove("RUSTFLAGS")
            .current_dir(root),
    )?;
    Ok(process::target().join(triple).join("release"))
}

fn image(program: &Program, binary: &Path) -> Result<Image> {
    let binary = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let image = Image::new(program.name, &binary, program.user)?;
    if image.unpacked > SIZE_MAX {
        bail!("image {} has {} bytes, which is above its limit of {SIZE_MAX}", program.name, image.unpacked);
    }
    Ok(image)
}

fn write(program: &Program, image: &Image, tag: &str) -> Result<PathBuf> {
    let directory = process::target().join("images");
    fs::create_dir_all(&directory)?;
    let path = directory.join(format!("{}.tar", program.name));
    let reference = format!("{REPOSITORY}/{}:{tag}", program.name);
    // Moved into place, so that nobody reads half of it.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, image.archive(&reference)?)?;
    fs::rename(&partial, &path).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("{reference} ({} MB) in {}", image.unpacked.div_ceil(1_000_000), path.display());
    Ok(path)
}

/// Told here, where the cause is plain, rather than by a registry or containerd.
fn check_tag(tag: &str) -> Result<()> {
    let allowed = |(at, c): (usize, char)| c.is_ascii_alphanumeric() || c == '_' || (at > 0 && (c == '.' || c == '-'));
    if tag.is_empty() || tag.len() > 128 || !tag.chars().enumerate().all(allowed) {
        bail!("'{tag}' is no tag: up to 128 of a-z, A-Z, 0-9 and _, and after the first also . and -");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_that_no_registry_takes_is_refused() {
        assert!(check_tag("v1.2.3-rc.1").is_ok());
        for tag in ["", "a/b", ".x", "a:b", &"x".repeat(129)] {
            assert!(check_tag(tag).is_err(), "{tag}");
        }
    }

    #[test]
    fn an_image_above_its_limit_is_refused() {
        let binary = std::env::temp_dir().join(format!("elasti-image-test-{}", std::process::id()));
        fs::write(&binary, vec![0; SIZE_MAX]).unwrap();
        let refused = image(&PROGRAMS[0], &binary).is_err();
        fs::remove_file(&binary).unwrap();
        assert!(refused);
    }
}
