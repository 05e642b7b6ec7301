//! Programs that are measured or measure: where they run, what they use, and their end.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// How long a server may take to listen.
const START: Duration = Duration::from_secs(10);

/// Cores of the machine.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A part of the machine's cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cores {
    /// The upper half: what is measured.
    Measured,
    /// The lower half: who measures, and the target behind.
    Others,
    /// All.
    All,
}

impl Cores {
    /// How many there are of this part.
    pub(crate) fn count(self) -> usize {
        let all = cores();
        match self {
            Self::All => all,
            Self::Measured => (all / 2).max(1),
            Self::Others => (all - all / 2).max(1),
        }
    }

    /// A command that runs on these alone.
    pub(crate) fn command(self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let (all, part) = (cores(), self.count());
        let first = if self == Self::Measured { all - part } else { 0 };
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", &format!("{first}-{}", first + part - 1)]).arg(program);
        command
    }
}

/// Where the machine has its cgroup2 hierarchy.
pub(crate) fn cgroup2() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = mounts.lines().map(|line| line.split(' ')).find_map(|mut fields| {
        let point = fields.nth(1)?;
        (fields.next()? == "cgroup2").then_some(point)
    });
    Ok(mount.context("cgroup2 is not mounted")?.into())
}

/// A running program; it is asked to end when dropped.
#[derive(Debug)]
pub(crate) struct Server(Child);

impl Server {
    /// Starts a command.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        Ok(Self(command.spawn().with_context(|| format!("cannot start {command:?}"))?))
    }

    /// Starts a command and waits until it takes connections at this address.
    pub(crate) fn listening(command: &mut Command, address: SocketAddr) -> Result<Self> {
        let mut server = Self::start(command)?;
        let deadline = Instant::now() + START;
        while TcpStream::connect(address).is_err() {
            if let Some(status) = server.0.try_wait()? {
                bail!("{command:?} ended: {status}");
            }
            if Instant::now() > deadline {
                bail!("{command:?} does not listen at {address}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.0.id());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).context("smaps_rollup has no Rss")?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib << 10)
    }

    /// Time on a CPU so far, of all threads that still live, from /proc/PID/task/TID/schedstat: its first field is in
    /// nanoseconds, where the ticks of /proc/PID/stat are 10 ms.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let mut sum = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            // A thread may end meanwhile.
            let text = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            sum += text.split(' ').next().and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
        }
        Ok(Duration::from_nanos(sum))
    }

    /// Its input and output, where they are pipes.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Server {
    /// Asks it to end, and waits for that; what has not ended after a second is killed.
    pub(crate) fn end(&mut self) {
        if matches!(self.0.try_wait(), Ok(Some(_))) {
            // Its number may be another process's by now.
            return;
        }
        // Not killed at once: nginx's main process has to end its workers.
        let _gone = Pid::from_raw(self.0.id().cast_signed()).map(|pid| kill_process(pid, Signal::TERM));
        let deadline = Instant::now() + Duration::from_secs(1);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}
