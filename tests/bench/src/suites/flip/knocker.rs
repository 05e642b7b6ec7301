//! Somebody on a node who connects to an address all the time, and says where he came out: a process in the node's network
//! namespace and cgroup.
//!
//! Times are of `CLOCK_MONOTONIC`, which all processes of the machine share.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::net::sockopt::set_socket_linger;
use rustix::time::{ClockId, clock_gettime};

use crate::process::{Server, cgroup2};

/// Between two connections.
const PAUSE: Duration = Duration::from_micros(500);

/// For a connection, and for a greeting.
const TIMEOUT: Duration = Duration::from_millis(100);

/// Where a connection without greeting came out.
pub(super) const REDIRECTED: &str = "redirected";
pub(super) const DIRECT: &str = "direct";

/// It came out nowhere.
const NOWHERE: &str = "nowhere";

/// What the process is told.
#[derive(clap::Args)]
pub(crate) struct Knock {
    /// Where to connect
    address: SocketAddr,
    /// Address of the node's resolver: say whether the connection goes there, in place of the greeting that it gets
    #[arg(long)]
    resolver: Option<IpAddr>,
}

/// The process: writes when a connection was begun that came out elsewhere than the one before, and where.
pub(crate) fn knock(told: &Knock) -> Result<()> {
    let towards_resolver = told.resolver.map(|resolver| source(resolver, told.address)).transpose()?;
    let (mut output, mut before) = (std::io::stdout(), String::new());
    loop {
        let begun = now();
        let answer = match towards_resolver {
            Some(source) => way(told.address, source).map(str::to_owned),
            None => greeting(told.address),
        };
        let answer = answer.unwrap_or_else(|_| NOWHERE.to_owned());
        if answer != before {
            writeln!(output, "{} {answer}", begun.as_nanos())?;
            output.flush()?;
            before = answer;
        }
        thread::sleep(PAUSE);
    }
}

/// The address from which this node reaches its resolver's pod. By it the kernel tells where it has really connected to, since
/// the programs hide that from `getpeername`.
fn source(resolver: IpAddr, service: SocketAddr) -> Result<IpAddr> {
    let towards = |address: SocketAddr| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        // Sends nothing, and the programs leave it alone.
        socket.connect(address)?;
        anyhow::Ok(socket.local_addr()?.ip())
    };
    let source = towards(SocketAddr::new(resolver, service.port()))?;
    if source == towards(service)? {
        bail!("this node reaches its pods and Services from one address, {source}: nobody can tell them apart");
    }
    Ok(source)
}

fn way(address: SocketAddr, towards_resolver: IpAddr) -> Result<&'static str> {
    let source = connect(address)?.local_addr()?.ip();
    Ok(if source == towards_resolver { REDIRECTED } else { DIRECT })
}

fn greeting(address: SocketAddr) -> Result<String> {
    let mut greeting = [0];
    connect(address)?.read_exact(&mut greeting)?;
    Ok(char::from(greeting[0]).to_string())
}

/// A connection that leaves nothing behind, so that ports do not run out.
fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    set_socket_linger(&stream, Some(Duration::ZERO))?;
    Ok(stream)
}

/// The machine's clock.
pub(super) fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (u64::try_from(now.tv_sec), u32::try_from(now.tv_nsec));
    Duration::new(seconds.unwrap_or_default(), nanoseconds.unwrap_or_default())
}

/// Since when something was so, in the order in which it was seen. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Arc<Mutex<Vec<(Duration, String)>>>);

impl Seen {
    /// From this moment on it is so.
    pub(super) fn push(&self, at: Duration, what: &str) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.last().is_none_or(|(_, last)| last != what) {
            seen.push((at, what.to_owned()));
        }
    }

    /// When it became so first, from this moment on.
    pub(super) fn first(&self, what: &str, from: Duration) -> Option<Duration> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().find(|(at, seen)| *at >= from && seen == what).map(|(at, _)| *at)
    }

    /// Whether it is so.
    pub(super) fn is(&self, what: &str) -> bool {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.last().is_some_and(|(_, last)| last == what)
    }
}

/// A knocker, until it is dropped.
pub(super) struct Knocker {
    /// Where its connections came out.
    pub(super) seen: Seen,
    _process: Server,
}

impl Knocker {
    /// Starts it on a node, which is the name of a network namespace and of a cgroup.
    pub(super) fn start(node: &str, address: SocketAddr, resolver: Option<IpAddr>) -> Result<Self> {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{node}"))
            .args(["sh", "-c", r#"echo $$ > "$0" && exec "$@""#])
            .arg(cgroup2()?.join(node).join("host/cgroup.procs"))
            .arg(std::env::current_exe()?)
            .args(["knock", &address.to_string()])
            .args(resolver.map(|resolver| format!("--resolver={resolver}")));
        let mut process = Server::start(command.stdout(Stdio::piped()))?;
        let output = process.child().stdout.take().context("the output is piped")?;
        let seen = Seen::default();
        let writer = seen.clone();
        // Ends with the process.
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let Some((at, what)) = line.split_once(' ') else { continue };
                if let Ok(at) = at.parse() {
                    writer.push(Duration::from_nanos(at), what);
                }
            }
        });
        Ok(Self { seen, _process: process })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_kind_counts_from_when_it_is_asked_for() {
        let (seen, at) = (Seen::default(), Duration::from_millis);
        for (moment, what) in [(1, DIRECT), (2, REDIRECTED), (3, REDIRECTED), (4, NOWHERE), (5, REDIRECTED)] {
            seen.push(at(moment), what);
        }
        assert_eq!(seen.first(REDIRECTED, at(0)), Some(at(2)));
        assert_eq!(seen.first(REDIRECTED, at(3)), Some(at(5)), "it went on being so");
        assert_eq!(seen.first(DIRECT, at(2)), None);
        assert!(seen.is(REDIRECTED) && !seen.is(DIRECT));
    }
}
