//! How many connections this resolver can bear, and which are refused when more come.
//!
//! Invariants: every connection that is served has a [`Permit`]; one that gets none is refused at once;
//! no port can take so much that another gets nothing. Limits are those of the process, open files and, in a container,
//! memory, and a part of the node's connection tracking. Called by [`crate::listeners`] for every connection and every failed
//! accept, set up by [`crate::app`].
//!
//! When connection tracking is full all the same, by others, the node's kernel drops the packets that would begin a
//! connection, before any program sees them. Clients' kernels repeat them, and the resolver repeats its dials.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use socket2::SockRef;

use crate::metrics::Metrics;

/// Files that are no connections: the pipes of [`crate::forward`] (two for each of 64), streams to operators, admin
/// requests, eBPF maps and links, the runtime's own.
const OTHER_DESCRIPTORS: u64 = 256;

/// A forwarded connection's two sockets; a held one must be able to become one.
const DESCRIPTORS_PER_CONNECTION: u64 = 2;

/// Bytes that the resolver takes without any connection, with tens of thousands of ElastiServices.
const OTHER_MEMORY: u64 = 64 << 20;

/// Bytes of a forwarded connection: two buffers, its task, and what the kernel charges for its two sockets as a rule.
const MEMORY_PER_CONNECTION: u64 = 50 << 10;

/// Entries of the node's connection tracking that a forwarded connection has: the client's to us, and ours to the target.
const TRACKED_PER_CONNECTION: u64 = 2;

/// The part of the node's connection tracking that the resolver's connections may fill: one half. It is everybody's.
const TRACKED_SHARE: u64 = 2;

/// How many connections a node tracks at most, as kernels with connection tracking tell every network namespace.
const TRACKED_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// The part of the memory limit that is kept free, since sockets' buffers grow after the connection is there: one eighth.
const FREE_MEMORY: u64 = 8;

/// How often the memory in use is read: a burst of connections within this time is bounded by their number.
const MEMORY_INTERVAL: Duration = Duration::from_millis(250);

/// One port may have this many times what is left for all: two thirds of all places if it alone is busy, and the next
/// one finds some.
const SHARE: u64 = 2;

/// Pause between two log lines about refusals.
const QUIET: Duration = Duration::from_mins(1);

/// Why a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Open files are at their limit.
    Descriptors,
    /// Memory is at its limit.
    Memory,
    /// The resolver's part of the node's connection tracking is at its limit.
    Conntrack,
    /// The port has more than its share of what is left.
    Share,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Descriptors, Self::Memory, Self::Conntrack, Self::Share];

    /// The spelling in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Memory => "memory",
            Self::Conntrack => "conntrack",
            Self::Share => "share",
        }
    }
}

/// What the process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files open at once.
    pub descriptors: u64,
    /// Bytes of memory; `None` when nobody limits them.
    pub memory: Option<u64>,
    /// Connections that the node can track; `None` when it tracks none.
    pub conntrack: Option<u64>,
}

/// What is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Connections of all ports.
    pub connections: u64,
    /// Connections of the port that one more comes to.
    pub of_this_port: u64,
    /// Open listeners.
    pub listeners: u64,
    /// Bytes of memory.
    pub memory: u64,
}

/// Whether one more connection is refused, and why.
pub fn refusal(limits: Limits, usage: Usage) -> Option<Refusal> {
    let files = limits.descriptors.saturating_sub(OTHER_DESCRIPTORS + usage.listeners) / DESCRIPTORS_PER_CONNECTION;
    let room = limits.memory.map_or(u64::MAX, |memory| memory.saturating_sub(OTHER_MEMORY) / MEMORY_PER_CONNECTION);
    let tracked = limits.conntrack.map_or(u64::MAX, |entries| entries / TRACKED_SHARE / TRACKED_PER_CONNECTION);
    let left = files.min(room).min(tracked).saturating_sub(usage.connections);
    let full = limits.memory.is_some_and(|memory| usage.memory > memory - memory / FREE_MEMORY);
    if full || (left == 0 && room < files.min(tracked)) {
        Some(Refusal::Memory)
    } else if left == 0 && tracked < files {
        Some(Refusal::Conntrack)
    } else if left == 0 {
        Some(Refusal::Descriptors)
    } else if usage.of_this_port >= left.saturating_mul(SHARE) {
        Some(Refusal::Share)
    } else {
        None
    }
}

/// Counts connections and refuses those that would be too many. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Limits,
    connections: AtomicU64,
    listeners: AtomicU64,
    memory: AtomicU64,
    /// Given up for a moment to accept, and refuse, a connection when no more files may be opened.
    spare: Mutex<Option<File>>,
    logged: Mutex<Option<Instant>>,
    metrics: Metrics,
}

impl Capacity {
    /// Nothing is in use yet.
    pub fn new(limits: Limits, metrics: Metrics) -> Self {
        Self(Arc::new(Inner {
            limits,
            connections: AtomicU64::new(0),
            listeners: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            spare: Mutex::new(spare()),
            logged: Mutex::default(),
            metrics,
        }))
    }

    /// The share of a listener that has just been opened.
    pub fn share(&self) -> Share {
        self.0.listeners.fetch_add(1, Ordering::Relaxed);
        Share { capacity: self.clone(), connections: OnceLock::new() }
    }

    /// Keeps up with the memory in use; never ends.
    pub async fn follow(self, memory: Memory) {
        let mut interval = tokio::time::interval(MEMORY_INTERVAL);
        loop {
            interval.tick().await;
            self.0.memory.store(memory.used(), Ordering::Relaxed);
        }
    }

    /// Resets one connection that waits to be accepted although no file can be opened for it. Returns whether there was
    /// one.
    pub fn refuse(&self, listener: &impl AsFd) -> bool {
        let mut file = self.0.spare.lock().unwrap_or_else(PoisonError::into_inner);
        drop(file.take());
        let refused = SockRef::from(listener).accept().is_ok_and(|(client, _)| {
            // What cannot be reset is closed, which a client takes for the end as well.
            drop(client.set_linger(Some(Duration::ZERO)));
            true
        });
        *file = spare();
        drop(file);
        if refused {
            self.tell(Refusal::Descriptors);
        }
        refused
    }

    fn tell(&self, refusal: Refusal) {
        self.0.metrics.refused(refusal).inc();
        let mut logged = self.0.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|logged| logged.elapsed() > QUIET) {
            *logged = Some(Instant::now());
            let (connections, limits) = (self.0.connections.load(Ordering::Relaxed), self.0.limits);
            tracing::warn!(reason = refusal.as_str(), connections, ?limits, "refusing connections");
        }
    }
}

/// Nothing that anybody else needs.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// One listener's share.
#[derive(Debug)]
pub struct Share {
    capacity: Capacity,
    /// Made with the first connection: most ports never have one.
    connections: OnceLock<Arc<AtomicU64>>,
}

impl Share {
    /// A place for one more connection. A refusal is counted, and logged once in a while.
    pub fn admit(&self) -> Result<Permit, Refusal> {
        let Inner { limits, connections, listeners, memory, .. } = &*self.capacity.0;
        let of_port = self.connections.get_or_init(Arc::default);
        let usage = Usage {
            connections: connections.load(Ordering::Relaxed),
            of_this_port: of_port.load(Ordering::Relaxed),
            listeners: listeners.load(Ordering::Relaxed),
            memory: memory.load(Ordering::Relaxed),
        };
        if let Some(refusal) = refusal(*limits, usage) {
            self.capacity.tell(refusal);
            return Err(refusal);
        }
        connections.fetch_add(1, Ordering::Relaxed);
        of_port.fetch_add(1, Ordering::Relaxed);
        Ok(Permit { all: self.capacity.clone(), of_port: Arc::clone(of_port) })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.capacity.0.listeners.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The place of one connection, free again when dropped.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    all: Capacity,
    of_port: Arc<AtomicU64>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.all.0.connections.fetch_sub(1, Ordering::Relaxed);
        self.of_port.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The memory of this container, as its cgroup counts it.
#[derive(Clone, Debug)]
pub struct Memory {
    limit: Option<u64>,
    directory: PathBuf,
    usage: &'static str,
    reclaimable: &'static str,
}

impl Memory {
    /// Of the cgroup whose files are in `root`, which is `/sys/fs/cgroup` in a container: version 2, or 1 in `memory`.
    pub fn of(root: &Path) -> Self {
        let v2 =
            Self { limit: None, directory: root.to_owned(), usage: "memory.current", reclaimable: "inactive_file" };
        let v1 = Self {
            directory: root.join("memory"),
            usage: "memory.usage_in_bytes",
            reclaimable: "total_inactive_file",
            ..v2.clone()
        };
        if let Some(limit) = v1.number("memory.limit_in_bytes") {
            return Self { limit: Some(limit), ..v1 };
        }
        // `max` is no number, and no limit.
        Self { limit: v2.number("memory.max"), ..v2 }
    }

    /// Bytes in use that the kernel cannot take back; 0 when there is no limit that they could reach.
    fn used(&self) -> u64 {
        let Some(limit) = self.limit else { return 0 };
        let used = self.number(self.usage).unwrap_or(0);
        // The statistics cost the kernel some work, and matter only when it is tight.
        if used <= limit - limit / FREE_MEMORY {
            return used;
        }
        let text = std::fs::read_to_string(self.directory.join("memory.stat")).unwrap_or_default();
        let reclaimable = text.lines().find_map(|line| line.strip_prefix(self.reclaimable)?.trim().parse().ok());
        used.saturating_sub(reclaimable.unwrap_or(0))
    }

    fn number(&self, file: &str) -> Option<u64> {
        std::fs::read_to_string(self.directory.join(file)).ok()?.trim().parse().ok()
    }
}

impl Limits {
    /// Those of this process, whose memory is this, and of its node.
    pub fn of_process(memory: &Memory) -> Self {
        let conntrack = std::fs::read_to_string(TRACKED_MAX).ok().and_then(|text| text.trim().parse().ok());
        Self { descriptors: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), memory: memory.limit, conntrack }
    }
}

/// Whether an accept failed because the process, or the machine, has no more of something; else only the one
/// connection is lost (see accept(2) on network errors).
pub fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS))
}

#[cfg(test)]
mod tests;
