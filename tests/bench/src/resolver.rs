//! A resolver's program as a process of its own, between a scripted operator and whatever backends there are.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, bail};
use elasti_api::message::{HoldPolicy, ServiceState};
use elasti_stand::operator::{Identity, Operator};
use rustix::process::{Resource, getrlimit};

use crate::process::{Cores, Server};
use crate::suites::Bench;

/// More than any suite holds.
const MANY: u32 = 1_000_000;

/// Files of a resolver that are no connections, with room to spare.
const OTHER_FILES: u64 = 300;

/// A resolver and its operator; both end when dropped.
#[derive(Debug)]
pub(crate) struct Resolver {
    /// Whom it listens to.
    pub(crate) operator: Operator,
    /// Its process.
    pub(crate) server: Server,
    _identity: Identity,
}

impl Resolver {
    /// Returns when it listens for every service.
    pub(crate) fn start(bench: &Bench, cores: Cores, services: Vec<ServiceState>) -> Result<Self> {
        let identity = Identity::new();
        let last = services.last().map(|state| state.uid.clone()).unwrap_or_default();
        let operator = bench.runtime.block_on(Operator::start(&identity, 0, services));
        let mut command = cores.command(&bench.resolver);
        command.args(elasti_stand::flags(&operator, &identity)).args(["--ebpf=off", "--drain-timeout=0"]);
        command.args(["--log-level=error"]).stdout(Stdio::null());
        let server = Server::start(&mut command)?;
        bench.runtime.block_on(operator.hears_listening(&last, 1));
        Ok(Self { operator, server, _identity: identity })
    }

    /// The connections that it says that it holds for this ElastiService.
    pub(crate) fn held(&self, uid: &str) -> usize {
        self.operator.held(uid).unwrap_or_default() as usize
    }
}

/// As [`elasti_stand::state`], and holds as many as come.
pub(crate) fn state(uid: &str, interception_port: u16, backends: &[SocketAddr]) -> ServiceState {
    let hold = HoldPolicy { max_connections: MANY, ..HoldPolicy::default() };
    ServiceState { hold, ..elasti_stand::state(uid, 1, interception_port, backends) }
}

/// How many connections one resolver takes on one port: a forwarded one needs two files of those that this machine lets a
/// process open, and two entries of the half of its connection tracking that resolvers use; one port gets two thirds.
pub(crate) fn most_connections() -> usize {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX >> 1);
    let tracked = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").ok();
    let tracked = tracked.and_then(|text| text.trim().parse().ok()).unwrap_or(u64::MAX);
    usize::try_from((files.saturating_sub(OTHER_FILES) / 3).min(tracked / 6)).unwrap_or(usize::MAX)
}

/// Waits until the resolvers hold so many together.
pub(crate) fn wait_held(resolvers: &[Resolver], uid: &str, count: usize, within: Duration) -> Result<()> {
    let deadline = std::time::Instant::now() + within;
    loop {
        let held: usize = resolvers.iter().map(|resolver| resolver.held(uid)).sum();
        if held == count {
            return Ok(());
        }
        if std::time::Instant::now() > deadline {
            bail!("{held} connections are held, not {count}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
