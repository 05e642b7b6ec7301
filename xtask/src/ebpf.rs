//! `cargo xtask build-ebpf`: builds the eBPF object that the resolver embeds.
//!
//! The object is committed, so that stable Rust alone builds everything; it has the same bytes from any checkout, so that
//! `--check` can tell whether source and object agree. The toolchain is Debian's, since its Rust and its LLVM fit each
//! other and nothing has to be downloaded but packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

mod btf;

/// Debian's Rust, the sources of its `core`, and the LLVM that `bpf-linker` links with.
const PACKAGES: [&str; 4] = ["rustc-web", "rust-web-src", "llvm-22-dev", "libzstd-dev"];

/// Debian's compiler.
const RUSTC: &str = "/usr/bin/rustc";

/// Where Debian's LLVM is.
const LLVM: &str = "/usr/lib/llvm-22";

/// The linker's version; its feature must name the LLVM above.
const BPF_LINKER: &str = "0.13.0";

/// Variables of the caller that change what cargo and rustc build.
const FOREIGN: [&str; 5] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_", "RUSTC_"];

/// The architecture of the programs: the BPF machine, little endian.
const TARGET: &str = "bpfel-unknown-none";

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
    eprintln!("building the eBPF object (about a minute the first time)");
    let built = build(&linker)?;
    let object = fs::read(&built)?;
    let place = process::root().join(OBJECT);
    if !args.check {
        fs::write(&place, &object).with_context(|| format!("cannot write {OBJECT}"))?;
        eprintln!("{OBJECT}: {} bytes", object.len());
        return Ok(());
    }
    let committed = fs::read(&place).with_context(|| format!("{OBJECT} is missing; run `cargo xtask build-ebpf`"))?;
    if committed != object {
        bail!(
            "{OBJECT} ({} bytes) is not what resolver-ebpf/ builds here ({} bytes, in {}).\n\
             Run `cargo xtask build-ebpf` and commit the result. Where no source changed, a package did; here it is {}",
            committed.len(),
            object.len(),
            built.display(),
            process::output(Command::new(RUSTC).arg("--version"))?.trim_end(),
        );
    }
    eprintln!("{OBJECT} agrees with its source");
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
    let root = root
        .canonicalize()
        .with_context(|| format!("this xtask was built from {}, which is gone; build it anew", root.display()))?;
    let target = process::target().join("ebpf");
    // The registry's directories are there from here on.
    process::run(cargo(&root).args(["fetch", "--quiet", "--locked", "--target", TARGET]))?;
    process::run(
        cargo(&root)
            .args(["build", "--quiet", "--locked", "--release", "--package", "resolver-ebpf", "--bins"])
            .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
            .arg(&target)
            .env("CARGO_ENCODED_RUSTFLAGS", flags(&root, linker)?.join("\u{1f}"))
            // The linker wants them; llvm-strip leaves the ones that the loader wants.
            .env("CARGO_PROFILE_RELEASE_STRIP", "none"),
    )?;
    let built = target.join(TARGET).join("release/elasti");
    let (object, section) = (target.join("elasti.bpf.o"), target.join("elasti.btf"));
    process::run(Command::new(format!("{LLVM}/bin/llvm-strip")).arg("-g").arg("-o").arg(&object).arg(&built))?;
    let copy = |how: &str| {
        let mut copy = Command::new(format!("{LLVM}/bin/llvm-objcopy"));
        process::run(copy.arg(format!("--{how}-section=.BTF={}", section.display())).arg(&object))
    };
    copy("dump")?;
    let mut types = fs::read(&section)?;
    btf::settle(&mut types)?;
    fs::write(&section, types)?;
    copy("update")?;
    Ok(object)
}

/// Cargo with Debian's compiler and nothing of the caller's that could change what is built.
fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new("cargo");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| FOREIGN.iter().any(|prefix| name.starts_with(prefix))) {
            cargo.env_remove(name);
        }
    }
    // `build-std` is unstable; Debian's stable compiler takes it when told so.
    cargo.current_dir(root).env("RUSTC", RUSTC).env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTFLAGS");
    cargo
}

/// The compiler's flags. Paths stand in the BTF: each is replaced, or the bytes would tell where the checkout is, and
/// from which registry its crates come.
fn flags(root: &Path, linker: &Path) -> Result<Vec<String>> {
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let sysroot = process::output(Command::new(RUSTC).args(["--print", "sysroot"]))?;
    let mut flags = vec![
        r#"--cfg=bpf_target_arch="x86_64""#.to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
        remap(root, "."),
        remap(Path::new(sysroot.trim_end()), "rust"),
    ];
    let home = std::env::var("CARGO_HOME").or_else(|_| std::env::var("HOME").map(|home| format!("{home}/.cargo")))?;
    let sources = Path::new(&home).join("registry/src");
    for registry in fs::read_dir(&sources).with_context(|| format!("cannot list {}", sources.display()))? {
        flags.push(remap(&registry?.path(), "registry"));
    }
    Ok(flags)
}
