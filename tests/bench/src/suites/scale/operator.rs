//! The operator's released program, as a process of its own with the permissions of its ServiceAccount.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use elasti_api::names;
use tempfile::TempDir;

use crate::process::Server;

/// How long it may take to be ready.
const START: Duration = Duration::from_mins(2);

/// An operator; it is asked to end when dropped.
#[derive(Debug)]
pub(super) struct Operator {
    /// Its process.
    pub(super) server: Server,
    begun: Instant,
}

/// What an operator is started with.
#[derive(Debug)]
pub(super) struct Access {
    /// Holds the kubeconfig.
    pub(super) files: TempDir,
    /// Its log, for a look after a failure.
    pub(super) log: std::path::PathBuf,
}

impl Operator {
    /// Starts it; it is not ready yet.
    pub(super) fn start(program: &Path, access: &Access) -> Result<Self> {
        let log = File::options().create(true).append(true).open(&access.log)?;
        let mut command = Command::new(program);
        command.args(["--pod-name=elasti-operator-0", "--log-level=info"]).stdin(Stdio::null());
        command.env("KUBECONFIG", access.files.path().join("kubeconfig")).stdout(log.try_clone()?).stderr(log);
        let begun = Instant::now();
        Ok(Self { server: Server::start(&mut command)?, begun })
    }

    /// Since its process was started.
    pub(super) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Waits until it says that it is ready.
    pub(super) fn ready(&self) -> Result<()> {
        while !get(names::OPERATOR_HEALTH_PORT, "/readyz").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 ")) {
            if self.age() > START {
                bail!("the operator is not ready after {} s", START.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Its metrics.
    pub(super) fn metrics() -> Result<Metrics> {
        Ok(Metrics(get(names::OPERATOR_HEALTH_PORT, "/metrics").context("the operator tells no metrics")?))
    }

    /// Where its streams are.
    pub(super) fn streams() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, names::OPERATOR_STREAM_PORT))
    }
}

fn get(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: operator\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Metrics in Prometheus' text format.
#[derive(Debug)]
pub(super) struct Metrics(pub(super) String);

impl Metrics {
    /// The sum of all series whose line begins so.
    pub(super) fn sum(&self, start: &str) -> f64 {
        let values = self.0.lines().filter(|line| line.starts_with(start));
        // The sum of nothing is -0.
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() + 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_added_up() {
        let metrics = Metrics("# HELP a x\na{b=\"1\"} 2\na{b=\"2\"} 3\nab 7\n".into());
        assert_eq!(
            [metrics.sum("a{"), metrics.sum("a{b=\"2\"}"), metrics.sum("c")].map(f64::to_bits),
            [5.0_f64, 3.0, 0.0].map(f64::to_bits)
        );
    }
}
