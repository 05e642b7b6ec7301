//! `cargo xtask build-ebpf`: builds the eBPF object that the resolver embeds.
//!
//! The object is committed, so that stable Rust alone builds everything; it has the same bytes from any checkout, so that
//! `--check` can tell whether source and object agree. The toolchain is Debian's, since its Rust and its LLVM fit each
//! other and nothing has to be downloaded but packages.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// Debian's Rust, the sources of its `core`, and the LLVM that `bpf-linker` links with.
const PACKAGES: [&str; 4] = ["rustc-web", "rust-web-src", "llvm-22-dev", "libzstd-dev"];

/// Debian's compiler.
const RUSTC: &str = "/usr/bin/rustc";

/// Where Debian's LLVM is.
const LLVM: &str = "/usr/lib/llvm-22";

/// The linker's version; its feature must name the LLVM above.
const BPF_LINKER: &str = "0.13.0";

/// Where the resolver embeds the object from.
const OBJECT: &str = "resolver/src/redirect/elasti.bpf.o";

/// Options of `build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Change nothing; fail when the committed object is not what the source builds
    #[arg(long)]
    check: bool,
}

/// Builds the object and puts it in its place, or compares it with the one that is there.
pub(crate) fn run(args: &Args) -> Result<()> {
    process::apt_install(&PACKAGES)?;
    let linker = bpf_linker()?;
    let object = std::fs::read(build(&linker)?)?;
    let place = process::root().join(OBJECT);
    if args.check {
        if std::fs::read(&place).with_context(|| format!("{OBJECT} is missing; run `cargo xtask build-ebpf`"))?
            != object
        {
            bail!("{OBJECT} is not what resolver-ebpf/ builds; run `cargo xtask build-ebpf` and commit the result");
        }
        eprintln!("{OBJECT} agrees with its source");
    } else {
        std::fs::write(&place, &object).with_context(|| format!("cannot write {OBJECT}"))?;
        eprintln!("{OBJECT}: {} bytes", object.len());
    }
    Ok(())
}

/// The linker, built once.
fn bpf_linker() -> Result<PathBuf> {
    let tools = process::target().join("tools");
    let linker = tools.join("bin/bpf-linker");
    let version = process::output(Command::new(&linker).arg("--version"));
    if !version.is_ok_and(|version| version.contains(BPF_LINKER)) {
        eprintln!("building bpf-linker {BPF_LINKER} (about a minute, once)");
        process::run(
            Command::new("cargo")
                .args(["install", "--quiet", "--locked", "--force", "--version", BPF_LINKER])
                .args(["--no-default-features", "--features", "llvm-22", "--root"])
                .arg(&tools)
                .arg("bpf-linker")
                .env("LLVM_PREFIX", LLVM),
        )?;
    }
    Ok(linker)
}

/// Builds the object; returns where it is.
fn build(linker: &Path) -> Result<PathBuf> {
    let root = process::root();
    let target = process::target().join("ebpf");
    let sysroot = process::output(Command::new(RUSTC).args(["--print", "sysroot"]))?;
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))?;
    // Paths stand in the BTF; without this they would tell where the checkout is.
    let remap = |from: &str, to: &str| format!("--remap-path-prefix={from}={to}");
    let flags = [
        r#"--cfg=bpf_target_arch="x86_64""#.to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
        remap(&root.display().to_string(), "."),
        remap(&format!("{home}/registry/src"), "registry"),
        remap(sysroot.trim_end(), "rust"),
    ];
    process::run(
        Command::new("cargo")
            .args(["build", "--quiet", "--locked", "--release", "--package", "resolver-ebpf", "--bins"])
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
            .arg(&target)
            .current_dir(&root)
            .env("RUSTC", RUSTC)
            // `build-std` is unstable; Debian's stable compiler takes it when told so.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("CARGO_PROFILE_RELEASE_STRIP", "none")
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER"),
    )?;
    let built = target.join("bpfel-unknown-none/release/elasti");
    let object = target.join("elasti.bpf.o");
    process::run(Command::new(format!("{LLVM}/bin/llvm-strip")).arg("-g").arg("-o").arg(&object).arg(&built))?;
    Ok(object)
}
