//! nginx as the target behind everybody.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::Result;

use crate::process::{Cores, Server};

/// Where it listens.
pub(crate) const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);

/// Name and size of a file that it serves.
pub(crate) type File = (&'static str, usize);

/// As small as most answers.
pub(crate) const SMALL: File = ("1KiB", 1 << 10);

/// Long enough to be spliced.
pub(crate) const LARGE: File = ("1MiB", 1 << 20);

/// A running nginx; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Target {
    _nginx: Server,
    directory: tempfile::TempDir,
}

impl Target {
    /// Returns when it listens at [`ADDRESS`].
    pub(crate) fn start(cores: Cores) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let files = directory.path().join("files");
        fs::create_dir(&files)?;
        for (name, size) in [SMALL, LARGE] {
            fs::write(files.join(name), vec![b'x'; size])?;
        }
        // nginx's workers are another user's.
        for path in [directory.path(), &files] {
            fs::set_permissions(path, PermissionsExt::from_mode(0o755))?;
        }
        let configuration = include_str!("../config/nginx.conf")
            .replace("DIRECTORY", &directory.path().display().to_string())
            .replace("WORKERS", &cores.count().to_string());
        let file = directory.path().join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = cores.command("nginx");
        command.arg("-p").arg(directory.path()).arg("-c").arg(file);
        Ok(Self { _nginx: Server::listening(&mut command, ADDRESS)?, directory })
    }

    /// A directory that goes with it.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}
