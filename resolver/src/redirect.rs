//! Redirection by eBPF: loads the programs, attaches them to this node's cgroups and feeds their map.
//!
//! Everything belongs to the [`Redirector`]: when it is dropped, or its process ends, the kernel detaches the programs and
//! connections pass untouched. The programs also do nothing when the heartbeat stops. Used by `main` through
//! [`crate::interception::Redirect`].

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::CgroupSockAddr;
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use resolver_ebpf::{
    COUNTERS, Counter, DRAINING, DRAINING_PODS, Endpoint, FILTER, FOLLOW, HEARTBEAT, OFFSETS, OWN_MARK, PODS_CGROUP,
    REDIRECTS,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpSocket;
use tokio::task::JoinHandle;

use crate::draining::Draining;
use crate::interception::{Changes, Entries, Redirect};

use filter::{Filter, Part};
use link::{Hook, Link};
use offsets::Offsets;
use sockets::Sockets;

pub mod cgroup;
mod filter;
pub mod link;
mod offsets;
pub mod sockets;

/// The programs, as `cargo xtask build-ebpf` builds them.
static OBJECT: &[u8] = aya::include_bytes_aligned!("redirect/elasti.bpf.o");

/// The four programs and where each is attached.
const PROGRAMS: [(&str, Hook); 4] = [
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
    ("getpeername4", Hook::Getpeername4),
    ("getpeername6", Hook::Getpeername6),
];

/// How often the heartbeat is written: ten times within the age at which the programs give up on the resolver.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(200);

/// How often the programs' log is read, where it is wanted at all: soon enough for a reader, and its buffer holds
/// thousands of lines.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// Why connections are not redirected on this node.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The cgroup to attach to was not found.
    #[error(transparent)]
    Cgroup(#[from] cgroup::CgroupError),
    /// The cgroup cannot be opened.
    #[error("cannot open the cgroup {path}: {source}")]
    Open {
        /// Its directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not take the programs. The verifier's log, if it was asked, is part of the cause.
    #[error(
        "the kernel does not take the eBPF programs (it must be 5.11 or later, and the container needs the capabilities BPF and \
         NET_ADMIN; from 5.8 on it does with an unlimited RLIMIT_MEMLOCK): {0}"
    )]
    Kernel(String),
}

/// Redirects connections until it is dropped.
pub struct Redirector {
    filter: Filter,
    redirects: HashMap<MapData, Endpoint, Endpoint>,
    draining: HashMap<MapData, Endpoint, Endpoint>,
    draining_pods: HashMap<MapData, u64, u8>,
    /// Where the node's pods are, if that is known.
    pods: Option<PathBuf>,
    counters: PerCpuArray<MapData, u64>,
    heartbeat: JoinHandle<()>,
    log: Option<JoinHandle<()>>,
    /// One for each of [`PROGRAMS`], absent while it cannot be attached.
    links: [Option<Link>; PROGRAMS.len()],
    cgroup: File,
    programs: Ebpf,
}

impl Redirector {
    /// Loads the programs and attaches them below `cgroup`; `log` has every redirected connection logged. Must run in a
    /// Tokio runtime, which drives heartbeat and log: a runtime that is stuck cannot accept, so its heartbeat must stop.
    pub fn load(cgroup: &std::path::Path, log: bool) -> Result<Self, LoadError> {
        Self::load_with(cgroup, log, None).map(|(redirector, _)| redirector)
    }

    /// As [`Redirector::load`], and follows connections to pods too, or says why that is not to be had; `probers` are names of
    /// processes whose connections do not count, such as kubelet.
    pub fn load_following(
        cgroup: &std::path::Path,
        log: bool,
        probers: &[String],
    ) -> Result<(Self, Result<Sockets, String>), LoadError> {
        let missing = match Offsets::of_this_kernel() {
            Ok(offsets) => match Self::load_with(cgroup, log, Some((offsets, probers))) {
                Ok((redirector, Some(sockets))) => return Ok((redirector, Ok(sockets))),
                Ok((redirector, None)) => return Ok((redirector, Err("nothing follows connections".to_owned()))),
                Err(error) => error.to_string(),
            },
            Err(missing) => missing,
        };
        Ok((Self::load(cgroup, log)?, Err(missing)))
    }

    fn load_with(
        cgroup: &std::path::Path,
        log: bool,
        following: Option<(Offsets, &[String])>,
    ) -> Result<(Self, Option<Sockets>), LoadError> {
        let directory = File::open(cgroup).map_err(|source| LoadError::Open { path: cgroup.to_owned(), source })?;
        let pods = cgroup::pods(cgroup);
        let pods_cgroup = pods.as_deref().and_then(cgroup::id).unwrap_or_default();
        if pods_cgroup == 0 {
            let cgroup = cgroup.display();
            tracing::warn!(%cgroup, "no cgroup of pods is below it; addresses of ending pods are not redirected");
        }
        let [received, acknowledged, state] =
            following.map_or([0; 3], |(offsets, _)| [offsets.bytes_received, offsets.bytes_acked, offsets.state]);
        let mut programs = EbpfLoader::new()
            .override_global("LOG_CONNECTS", &u32::from(log), true)
            .override_global(PODS_CGROUP, &pods_cgroup, true)
            .override_global(FOLLOW, &u32::from(following.is_some()), true)
            .override_global(OFFSETS[0], &received, true)
            .override_global(OFFSETS[1], &acknowledged, true)
            .override_global(OFFSETS[2], &state, true)
            .load(OBJECT)
            .map_err(kernel)?;
        let mut heartbeat: Array<_, u64> = Array::try_from(take(&mut programs, HEARTBEAT)?).map_err(kernel)?;
        let filter = Filter::new(take(&mut programs, FILTER)?)?;
        let redirects = HashMap::try_from(take(&mut programs, REDIRECTS)?).map_err(kernel)?;
        let draining = HashMap::try_from(take(&mut programs, DRAINING)?).map_err(kernel)?;
        let draining_pods = HashMap::try_from(take(&mut programs, DRAINING_PODS)?).map_err(kernel)?;
        let counters = PerCpuArray::try_from(take(&mut programs, COUNTERS)?).map_err(kernel)?;
        heartbeat.set(0, now(), 0).map_err(kernel)?;
        let log = if log { Some(drive_log(&mut programs)?) } else { None };
        for (name, _) in PROGRAMS {
            program(&mut programs, name)?.load().map_err(kernel)?;
        }
        let mut links = [const { None }; PROGRAMS.len()];
        attach(&mut programs, &directory, &mut links)?;
        let sockets = match following {
            Some((_, probers)) => {
                let node = directory.try_clone().map_err(kernel)?;
                Some(Sockets::new(&mut programs, filter.clone(), node, pods.clone(), probers)?)
            }
            None => None,
        };
        let heartbeat = tokio::spawn(async move {
            let mut interval = tokio::time::interval(HEARTBEAT_INTERVAL);
            loop {
                interval.tick().await;
                if let Err(error) = heartbeat.set(0, now(), 0) {
                    tracing::error!(%error, "cannot write the heartbeat of the eBPF programs");
                }
            }
        });
        let redirector = Self {
            filter,
            redirects,
            draining,
            draining_pods,
            pods,
            counters,
            heartbeat,
            log,
            links,
            cgroup: directory,
            programs,
        };
        Ok((redirector, sockets))
    }

    /// One of the programs' counters, over all CPUs.
    pub fn counter(&self, counter: Counter) -> u64 {
        self.counters.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum())
    }

    /// Stops the heartbeat, as a runtime that is stuck would: from [`resolver_ebpf::HEARTBEAT_TTL_NS`] on connections
    /// pass untouched.
    pub fn stop_heartbeat(&self) {
        self.heartbeat.abort();
    }
}

/// Makes a map hold these and nothing else. The map itself is read, not a memory of it: somebody else may have changed it.
/// Returns whether anything had to be changed.
fn make_equal<K, V>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &std::collections::HashMap<K, V>,
) -> Result<bool, MapError>
where
    K: aya::Pod + Eq + std::hash::Hash,
    V: aya::Pod + PartialEq,
{
    let present: std::collections::HashMap<K, V> = map.iter().collect::<Result<_, _>>()?;
    for key in present.keys().filter(|key| !wanted.contains_key(*key)) {
        map.remove(key)?;
    }
    for (key, value) in wanted.iter().filter(|(key, value)| present.get(key) != Some(value)) {
        map.insert(key, value, 0)?;
    }
    Ok(present != *wanted)
}

fn endpoints(entries: &Entries) -> std::collections::HashMap<Endpoint, Endpoint> {
    entries.iter().map(|(from, to)| (Endpoint::from(*from), Endpoint::from(*to))).collect()
}

impl Redirect for Redirector {
    fn change(&mut self, changes: &Changes) -> Result<(), String> {
        let kept = changes.iter().filter(|(_, to)| to.is_some()).map(|(from, _)| Endpoint::from(*from));
        // Bits of those that go stay until the whole map is compared: they cost a look-up, and no look at the others.
        self.filter.add(Part::Redirects, &kept.collect::<Vec<_>>());
        for (from, to) in changes {
            let from = Endpoint::from(*from);
            let result = match to {
                Some(to) => self.redirects.insert(from, Endpoint::from(*to), 0),
                None => match self.redirects.remove(&from) {
                    Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
                    removed => removed,
                },
            };
            result.map_err(|error| format!("cannot change the map of redirected addresses: {}", chain(&error)))?;
        }
        Ok(())
    }

    fn sync(&mut self, entries: &Entries) -> Result<bool, String> {
        let wanted = endpoints(entries);
        self.filter.widen(wanted.keys());
        let changed = make_equal(&mut self.redirects, &wanted)
            .map_err(|error| format!("cannot change the map of redirected addresses: {}", chain(&error)))?;
        self.filter.narrow(Part::Redirects, wanted.keys());
        Ok(changed)
    }

    fn sync_draining(&mut self, draining: &Draining) -> Result<(), String> {
        let Some(pods) = &self.pods else { return Ok(()) };
        let on_this_node = draining.pods.iter().filter_map(|uid| cgroup::id(&cgroup::pod(pods, uid)?));
        let wanted = endpoints(&draining.entries);
        self.filter.widen(wanted.keys());
        // The pods first: none of them may meet an entry that is not for it.
        make_equal(&mut self.draining_pods, &on_this_node.map(|cgroup| (cgroup, 1)).collect())
            .and_then(|_| make_equal(&mut self.draining, &wanted))
            .map_err(|error| format!("cannot change the map of ending pods: {}", chain(&error)))?;
        self.filter.narrow(Part::Draining, wanted.keys());
        Ok(())
    }

    fn passed(&self) -> u64 {
        self.counter(Counter::Stale)
    }

    fn reattach(&mut self) -> Result<bool, String> {
        for link in &mut self.links {
            link.take_if(|link| !link.is_attached());
        }
        if self.links.iter().all(Option::is_some) {
            return Ok(false);
        }
        attach(&mut self.programs, &self.cgroup, &mut self.links).map_err(|error| error.to_string())?;
        Ok(true)
    }
}

impl Drop for Redirector {
    fn drop(&mut self) {
        self.heartbeat.abort();
        if let Some(log) = &self.log {
            log.abort();
        }
    }
}

/// Keeps a connection of the resolver's own from being redirected.
pub fn mark(socket: &TcpSocket) -> io::Result<()> {
    socket2::SockRef::from(socket).set_mark(OWN_MARK)
}

/// What the map holds, for tests and diagnosis.
pub fn entries(redirector: &Redirector) -> Entries {
    let pairs = redirector.redirects.iter().filter_map(Result::ok);
    pairs.map(|(from, to)| (SocketAddr::from(from), SocketAddr::from(to))).collect()
}

/// A program of the object, loaded or not.
fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr, LoadError> {
    let program = programs.program_mut(name);
    program.ok_or_else(|| LoadError::Kernel(format!("the object has no program {name}")))?.try_into().map_err(kernel)
}

/// Attaches the loaded programs whose links are absent.
fn attach(programs: &mut Ebpf, cgroup: &File, links: &mut [Option<Link>]) -> Result<(), LoadError> {
    for ((name, hook), link) in PROGRAMS.into_iter().zip(links).filter(|(_, link)| link.is_none()) {
        let fd = program(programs, name)?.fd().map_err(kernel)?.as_fd();
        let attached = Link::attach(fd, cgroup, hook);
        *link = Some(attached.map_err(|error| LoadError::Kernel(format!("cannot attach {name}: {error}")))?);
    }
    Ok(())
}

fn take(programs: &mut Ebpf, name: &str) -> Result<Map, LoadError> {
    programs.take_map(name).ok_or_else(|| LoadError::Kernel(format!("the object has no map {name}")))
}

fn drive_log(programs: &mut Ebpf) -> Result<JoinHandle<()>, LoadError> {
    let mut logger = EbpfLogger::init(programs).map_err(kernel)?;
    Ok(tokio::spawn(async move {
        let mut interval = tokio::time::interval(LOG_INTERVAL);
        loop {
            interval.tick().await;
            logger.flush();
        }
    }))
}

/// `CLOCK_MONOTONIC` in ns: the clock of `bpf_ktime_get_ns`.
fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn kernel(error: impl std::error::Error) -> LoadError {
    LoadError::Kernel(chain(&error))
}

/// An error with all its causes: the innermost holds the errno, or the verifier's log.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
