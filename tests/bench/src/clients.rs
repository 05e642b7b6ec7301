//! Clients: those that only stay, in processes of their own since each may open only so many files, and those that ask and
//! remember when they were answered.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::process::Server;
use crate::target::SMALL;

/// What a client process says when it has all its connections.
const CONNECTED: &str = "connected";

/// Connections of one client process: fewer than it may open files, and than there are ports for one destination.
const MOST: usize = 10_000;

/// What a client process is told.
#[derive(clap::Args)]
pub(crate) struct Dial {
    /// Where to
    address: SocketAddr,
    /// How many connections
    count: usize,
}

/// A client process.
pub(crate) fn keep(dial: &Dial) -> Result<()> {
    let connect = |_| std::net::TcpStream::connect(dial.address);
    let connections: Vec<_> = (0..dial.count).map(connect).collect::<std::io::Result<_>>()?;
    let mut output = std::io::stdout();
    writeln!(output, "{CONNECTED}")?;
    output.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(connections);
    Ok(())
}

/// Connections that say nothing, until dropped.
#[derive(Debug)]
pub(crate) struct Silent(#[expect(dead_code, reason = "their end is that of the connections")] Vec<Server>);

impl Silent {
    /// Returns when all are connected.
    pub(crate) fn connect(address: SocketAddr, count: usize) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut processes = Vec::new();
        for begun in (0..count).step_by(MOST) {
            let part = MOST.min(count - begun);
            let mut command = Command::new(&program);
            command.arg("dial").args([address.to_string(), part.to_string()]);
            let mut process = Server::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
            let output = process.child().stdout.take().context("the output is piped")?;
            let mut line = String::new();
            BufReader::new(output).read_line(&mut line)?;
            if line.trim() != CONNECTED {
                bail!("{part} connections to {address} cannot be opened");
            }
            processes.push(process);
        }
        Ok(Self(processes))
    }
}

/// Asks for [`SMALL`] and returns when the whole answer was there.
pub(crate) async fn ask(address: SocketAddr) -> Result<Instant> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET /{} HTTP/1.1\r\nhost: target\r\nconnection: close\r\n\r\n", SMALL.0);
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(2 * SMALL.1);
    stream.read_to_end(&mut answer).await?;
    if !answer.starts_with(b"HTTP/1.1 200 ") || !answer.ends_with(&[b'x'; SMALL.1]) {
        bail!("{}", String::from_utf8_lossy(&answer[..answer.len().min(100)]));
    }
    Ok(Instant::now())
}
