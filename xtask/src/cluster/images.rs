//! Container images made on the spot as docker archives, since the nodes reach no registry.
//!
//! An archive is made again only when what it is made from changed: that text is kept beside it. Pods use these images
//! with `imagePullPolicy: Never` or `IfNotPresent`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{binaries, layout, tools};
use crate::process;

/// What every pod's sandbox runs.
pub(super) const PAUSE: &str = "docker.io/library/elasti-pause:dev";
/// CoreDNS, as `tests/cluster/coredns.yaml` says too.
const COREDNS: &str = "docker.io/library/elasti-coredns:dev";
/// Debian's nginx and redis-server with clients for both (curl, redis-cli, openssl, socat, nc) and a shell. nginx answers
/// `nginx on HOSTNAME` on ports 80 and 443, the latter with the self-signed `/etc/ssl/targets.crt`.
pub(crate) const TARGETS: &str = "docker.io/library/elasti-targets:dev";
/// Debian's PostgreSQL 15 with an empty database that trusts everybody; runs as user 100.
const POSTGRES: &str = "docker.io/library/elasti-postgres:dev";
/// Files of packages that nobody here reads. LLVM compiles PostgreSQL's large queries, and is larger than all the rest.
const UNUSED: [&str; 8] = [
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/perl/*",
    "/usr/lib/*/perl/*",
    "/usr/lib/*/libLLVM-*",
    "/usr/lib/*/libz3.so*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
];

/// The archive of [`PAUSE`].
pub(super) fn pause() -> Result<PathBuf> {
    let source = process::root().join("tests/cluster/pause.c");
    cached(PAUSE, &fs::read_to_string(&source)?, |root| {
        process::run(Command::new("cc").args(["-Os", "-static", "-o"]).arg(root.join("pause")).arg(&source))?;
        Ok(r#"["/pause"]"#)
    })
}

/// The archive of [`COREDNS`]; the program must have been built.
pub(super) fn coredns() -> Result<PathBuf> {
    let program = binaries::path("coredns");
    let built = fs::metadata(&program)?.modified()?;
    cached(COREDNS, &format!("{built:?}"), |root| {
        fs::copy(&program, root.join("coredns"))?;
        Ok(r#"["/coredns"]"#)
    })
}

/// The archive of `elasti-traffic`, the target and clients of the proof that no request is lost; `program` is linked
/// statically.
pub(crate) fn traffic(program: &Path) -> Result<PathBuf> {
    let built = fs::metadata(program)?.modified()?;
    cached("docker.io/library/elasti-traffic:dev", &format!("{built:?}"), |root| {
        fs::copy(program, root.join("elasti-traffic"))?;
        Ok(r#"["/elasti-traffic"]"#)
    })
}

/// The archive of [`TARGETS`].
pub(crate) fn targets() -> Result<PathBuf> {
    const PACKAGES: &str = "redis-server,redis-tools,nginx-light,openssl,curl,socat,netcat-openbsd,\
                            dash,coreutils,grep,sed,libc-bin";
    // Packages are unpacked without their set-up scripts, so what those would make is written here.
    const FILES: [(&str, &str); 3] = [
        ("etc/passwd", "root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\n"),
        ("etc/group", "root:x:0:\nwww-data:x:33:\n"),
        (
            "etc/nginx/sites-enabled/default",
            "server {
    listen 80; listen [::]:80; listen 443 ssl; listen [::]:443 ssl;
    ssl_certificate /etc/ssl/targets.crt;
    ssl_certificate_key /etc/ssl/targets.key;
    default_type text/plain;
    location / { return 200 \"nginx on $hostname\\n\"; }
}
",
        ),
    ];
    const LINKS: [(&str, &str); 3] = [
        ("/dev/stdout", "var/log/nginx/access.log"),
        ("/dev/stderr", "var/log/nginx/error.log"),
        ("nc.openbsd", "bin/nc"),
    ];
    const DIRECTORIES: [&str; 8] =
        ["etc/nginx/sites-enabled", "proc", "root", "run", "sys", "var/log/nginx", "var/lib/nginx", "usr/local/bin"];
    cached(TARGETS, &format!("{PACKAGES} {FILES:?} {LINKS:?} {DIRECTORIES:?} {UNUSED:?}"), |root| {
        unpack(root, PACKAGES)?;
        for path in DIRECTORIES {
            fs::create_dir_all(root.join(path))?;
        }
        for (path, text) in FILES {
            fs::remove_file(root.join(path)).ok();
            fs::write(root.join(path), text).with_context(|| format!("cannot write {path}"))?;
        }
        for (to, path) in LINKS {
            fs::remove_file(root.join(path)).ok();
            symlink(to, root.join(path)).with_context(|| format!("cannot link {path}"))?;
        }
        process::output(
            Command::new("openssl")
                .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"])
                .args(["-days", "3650", "-subj", "/CN=targets", "-addext", "subjectAltName=DNS:targets"])
                .args(["-keyout", "etc/ssl/targets.key", "-out", "etc/ssl/targets.crt"])
                .current_dir(root),
        )?;
        Ok("null")
    })
}

/// The archive of [`POSTGRES`].
pub(crate) fn postgres() -> Result<PathBuf> {
    const PACKAGES: &str = "postgresql-15,dash,coreutils,libc-bin";
    const USERS: &str = "root:x:0:0::/root:/bin/sh\npostgres:x:100:100::/var/lib/postgresql:/bin/sh\n";
    const GROUPS: &str = "root:x:0:\npostgres:x:100:\n";
    const SETTINGS: &str =
        "jit = off\nlisten_addresses = '*'\nunix_socket_directories = '/tmp'\nmax_connections = 500\n";
    const ANYBODY: &str = "host all all all trust\n";
    cached(POSTGRES, &format!("{PACKAGES} {UNUSED:?} {USERS} {GROUPS} {SETTINGS} {ANYBODY}"), |root| {
        unpack(root, PACKAGES)?;
        fs::write(root.join("etc/passwd"), USERS)?;
        fs::write(root.join("etc/group"), GROUPS)?;
        for path in ["dev", "proc", "sys", "tmp", "var/lib/postgresql"] {
            fs::create_dir_all(root.join(path))?;
        }
        chown(root.join("var/lib/postgresql"), Some(100), Some(100))?;
        process::output(
            Command::new("chroot")
                .arg("--userspec=100:100")
                .arg(root)
                .args(["/usr/lib/postgresql/15/bin/initdb", "--pgdata=/var/lib/postgresql/data", "--auth=trust"])
                .args(["--locale=C", "--encoding=UTF8", "--no-sync"]),
        )?;
        let data = root.join("var/lib/postgresql/data");
        append(&data.join("postgresql.conf"), SETTINGS)?;
        append(&data.join("pg_hba.conf"), ANYBODY)?;
        Ok(r#"["/usr/lib/postgresql/15/bin/postgres", "-D", "/var/lib/postgresql/data"]"#)
    })
}

/// Unpacks Debian packages and what they depend on, without what is [`UNUSED`].
fn unpack(root: &Path, packages: &str) -> Result<()> {
    tools::install(&[
        ("mmdebstrap", "mmdebstrap"),
        ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ])?;
    process::run(
        Command::new("mmdebstrap")
            .args(["--variant=extract", "--quiet"])
            .args(UNUSED.map(|path| format!("--dpkgopt=path-exclude={path}")))
            .arg(format!("--include={packages}"))
            .arg("bookworm")
            .arg(root),
    )
}

fn append(path: &Path, text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new().append(true).open(path)?;
    file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}

/// The archive of an image; `fill` puts its files into an empty directory and returns the entry point as JSON.
fn cached(image: &str, made_from: &str, fill: impl FnOnce(&Path) -> Result<&'static str>) -> Result<PathBuf> {
    let dir = layout::root().join("images");
    let name = image.trim_start_matches("docker.io/library/").replace(':', "-");
    let (archive, stamp) = (dir.join(format!("{name}.tar")), dir.join(format!("{name}.made-from")));
    if archive.is_file() && fs::read_to_string(&stamp).is_ok_and(|earlier| earlier == made_from) {
        return Ok(archive);
    }
    eprintln!("making image {image}");
    fs::create_dir_all(&dir)?;
    let work = dir.join(format!("{name}.work.{}", std::process::id()));
    let root = work.join("root");
    fs::create_dir_all(&root)?;
    let entrypoint = fill(&root).with_context(|| format!("cannot make image {image}"))?;
    write_archive(&work, image, entrypoint)?;
    // Moved into place, so that nobody reads half of it.
    fs::rename(work.join("image.tar"), &archive)?;
    fs::write(stamp, made_from)?;
    fs::remove_dir_all(work)?;
    Ok(archive)
}

/// The format of `docker save`: a layer, its configuration and a manifest.
fn write_archive(work: &Path, image: &str, entrypoint: &str) -> Result<()> {
    let tar = |archive: &str, from: &str, what: &[&str]| {
        let mut command = Command::new("tar");
        command.args(["--sort=name", "--numeric-owner", "-C", from, "-cf", archive]).args(what);
        process::output(command.current_dir(work))
    };
    tar("layer.tar", "root", &["."])?;
    let sum = process::output(Command::new("sha256sum").arg("layer.tar").current_dir(work))?;
    let digest = sum.split_whitespace().next().context("sha256sum printed nothing")?;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    fs::write(
        work.join("config.json"),
        format!(
            r#"{{"architecture":"{architecture}","os":"linux","config":{{"Env":["PATH={path}"],"Entrypoint":{entrypoint}}},"rootfs":{{"type":"layers","diff_ids":["sha256:{digest}"]}}}}"#
        ),
    )?;
    fs::write(
        work.join("manifest.json"),
        format!(r#"[{{"Config":"config.json","RepoTags":["{image}"],"Layers":["layer.tar"]}}]"#),
    )?;
    tar("image.tar", ".", &["manifest.json", "config.json", "layer.tar"])?;
    Ok(())
}
