//! Connections to pods by eBPF: writes which addresses are followed, has the kernel look at their sockets, and reads what was
//! seen.
//!
//! Everything belongs to [`Sockets`]: when it is dropped, or its process ends, nothing is followed any more and nothing is
//! left. Used by [`crate::supervisor`] through [`crate::tracking::Track`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::{CgroupSkb, Iter, SockOps};
use aya::{Btf, Ebpf};
use elasti_api::cidr::Cidr;
use resolver_ebpf::{
    ACTIVITY, Activity, CONNECTIONS, Endpoint, IGNORED_SOURCES, LOOK, PROBER_NAMES, Source, TRACKED, Tracked,
};

use super::filter::{Filter, Part};
use super::link::{Hook, Iterator, Link};
use super::{LoadError, cgroup, chain, kernel, now, take};
use crate::tracking::{Seen, Track, Wanted};

/// Of `comm` in the kernel, the zero at its end included.
const NAME_LENGTH: usize = 16;

/// Bits before the address in a [`Source`].
const GROUP_BITS: u32 = 32;

/// Follows connections until it is dropped.
pub struct Sockets {
    filter: Filter,
    tracked: HashMap<MapData, Endpoint, Tracked>,
    activity: HashMap<MapData, u32, Activity>,
    sources: LpmTrie<MapData, Source, u8>,
    number: Array<MapData, u64>,
    looks: u64,
    /// The programs `follow` and `adopt`.
    follow: OwnedFd,
    adopt: OwnedFd,
    node: File,
    /// Where the node's pods are, if that is known.
    pods: Option<PathBuf>,
    /// Of `follow` at the node's cgroup; absent while it cannot be attached.
    link: Option<Link>,
    iterator: Iterator,
    /// Of `adopt` at the cgroups of pods, by UID.
    adopting: BTreeMap<String, Link>,
    endpoints: BTreeMap<SocketAddr, Followed>,
    /// Why connections to an address cannot be followed.
    faults: BTreeMap<SocketAddr, String>,
    groups: BTreeMap<Arc<BTreeSet<Cidr>>, u32>,
    last_id: u32,
    last_group: u32,
}

/// An address that is followed.
struct Followed {
    tracked: Tracked,
    /// [`Activity::opened`] at the latest look.
    opened: u64,
    /// The look at which that had grown last, in ns of `CLOCK_MONOTONIC`; zero when it never has.
    grown: u64,
}

impl Sockets {
    /// Attaches the programs of the loaded object to the node's cgroup. `probers` are names of processes outside of pods whose
    /// connections do not count.
    pub(super) fn new(
        programs: &mut Ebpf,
        filter: Filter,
        node: File,
        pods: Option<PathBuf>,
        probers: &[String],
    ) -> Result<Self, LoadError> {
        let mut names: HashMap<_, [u8; NAME_LENGTH], u8> =
            HashMap::try_from(take(programs, PROBER_NAMES)?).map_err(kernel)?;
        for prober in probers {
            names.insert(comm(prober), 1, 0).map_err(kernel)?;
        }
        let Map::SkStorage(connections) = take(programs, CONNECTIONS)? else {
            return Err(LoadError::Kernel(format!("{CONNECTIONS} is no socket storage")));
        };
        let follow: &mut SockOps = program(programs, "follow")?;
        follow.load().map_err(kernel)?;
        let follow = own(follow.fd().map_err(kernel)?.as_fd())?;
        let adopt: &mut CgroupSkb = program(programs, "adopt")?;
        adopt.load().map_err(kernel)?;
        let adopt = own(adopt.fd().map_err(kernel)?.as_fd())?;
        let look: &mut Iter = program(programs, "look")?;
        look.load("bpf_sk_storage_map", &Btf::from_sys_fs().map_err(kernel)?).map_err(kernel)?;
        let iterator =
            Iterator::attach(look.fd().map_err(kernel)?.as_fd(), connections.fd().as_fd()).map_err(kernel)?;
        let mut sockets = Self {
            filter,
            tracked: HashMap::try_from(take(programs, TRACKED)?).map_err(kernel)?,
            activity: HashMap::try_from(take(programs, ACTIVITY)?).map_err(kernel)?,
            sources: LpmTrie::try_from(take(programs, IGNORED_SOURCES)?).map_err(kernel)?,
            number: Array::try_from(take(programs, LOOK)?).map_err(kernel)?,
            looks: 0,
            follow,
            adopt,
            node,
            pods,
            link: None,
            iterator,
            adopting: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            faults: BTreeMap::new(),
            groups: BTreeMap::new(),
            last_id: 0,
            last_group: 0,
        };
        sockets.attach().map_err(|error| LoadError::Kernel(format!("cannot attach follow: {error}")))?;
        Ok(sockets)
    }

    fn attach(&mut self) -> std::io::Result<()> {
        self.link = Some(Link::attach(self.follow.as_fd(), &self.node, Hook::SockOps)?);
        Ok(())
    }

    /// The number under which the trie has these ranges; zero for none.
    fn group(&mut self, ranges: &Arc<BTreeSet<Cidr>>) -> Result<u32, String> {
        if ranges.is_empty() {
            return Ok(0);
        }
        if let Some(group) = self.groups.get(ranges) {
            return Ok(*group);
        }
        self.last_group += 1;
        self.groups.insert(Arc::clone(ranges), self.last_group);
        for range in ranges.iter() {
            let added = self.sources.insert(&key(self.last_group, range), 1, 0);
            added.map_err(|error| format!("cannot ignore clients of {range}: {}", chain(&error)))?;
        }
        Ok(self.last_group)
    }

    fn drop_groups(&mut self) {
        let Self { groups, endpoints, sources, .. } = self;
        groups.retain(|ranges, group| {
            let used = endpoints.values().any(|followed| followed.tracked.sources == *group);
            if !used {
                for range in ranges.iter() {
                    // One that cannot be removed is of a number that nobody has.
                    drop(sources.remove(&key(*group, range)));
                }
            }
            used
        });
    }

    fn follow(&mut self, address: SocketAddr, wanted: &Wanted) -> Result<(), String> {
        let failed = |error: aya::maps::MapError| format!("cannot follow connections to {address}: {}", chain(&error));
        let sources = self.group(&wanted.ignored)?;
        let tracked = match self.endpoints.get_mut(&address) {
            Some(followed) if followed.tracked.sources == sources => return Ok(()),
            Some(followed) => {
                followed.tracked.sources = sources;
                followed.tracked
            }
            None => {
                self.last_id += 1;
                let activity = Activity { last: now(), ..Activity::default() };
                self.activity.insert(self.last_id, activity, 0).map_err(failed)?;
                let tracked = Tracked { id: self.last_id, sources };
                self.endpoints.insert(address, Followed { tracked, opened: 0, grown: 0 });
                tracked
            }
        };
        let endpoint = Endpoint::from(address);
        self.filter.widen([&endpoint]);
        let inserted = self.tracked.insert(endpoint, tracked, 0);
        if inserted.is_err() {
            self.forget(address);
        }
        inserted.map_err(failed)
    }

    fn forget(&mut self, address: SocketAddr) {
        if let Some(followed) = self.endpoints.remove(&address) {
            // What is not there needs no removal.
            drop(self.tracked.remove(&Endpoint::from(address)));
            drop(self.activity.remove(&followed.tracked.id));
        }
    }

    fn adopt(&mut self, uid: &str) -> Result<(), String> {
        if self.adopting.get(uid).is_some_and(Link::is_attached) {
            return Ok(());
        }
        let path = self.pods.as_ref().and_then(|pods| cgroup::pod(pods, uid)).ok_or_else(|| {
            format!("connections of pod {uid} may be older than the resolver, and its cgroup is not found on this node")
        })?;
        let attached = File::open(&path).and_then(|pod| Link::attach(self.adopt.as_fd(), pod, Hook::Ingress));
        let link = attached.map_err(|error| format!("cannot attach to the cgroup {}: {error}", path.display()))?;
        self.adopting.insert(uid.to_owned(), link);
        Ok(())
    }
}

impl Track for Sockets {
    fn sync(&mut self, wanted: &BTreeMap<SocketAddr, Wanted>) {
        let gone: Vec<SocketAddr> =
            self.endpoints.keys().filter(|address| !wanted.contains_key(address)).copied().collect();
        for address in gone {
            self.forget(address);
        }
        let adopted: BTreeSet<&String> = wanted.values().filter_map(|wanted| wanted.adopt.as_ref()).collect();
        self.adopting.retain(|uid, _| adopted.contains(uid));
        self.faults.clear();
        for (address, wanted) in wanted {
            let followed = self.follow(*address, wanted);
            if let Err(fault) = followed.and_then(|()| wanted.adopt.as_ref().map_or(Ok(()), |uid| self.adopt(uid))) {
                self.faults.insert(*address, fault);
            }
        }
        self.drop_groups();
        let followed: Vec<Endpoint> = self.endpoints.keys().copied().map(Endpoint::from).collect();
        self.filter.narrow(Part::Tracked, &followed);
    }

    fn reattach(&mut self) -> Result<bool, String> {
        if self.link.as_ref().is_some_and(Link::is_attached) {
            return Ok(false);
        }
        self.link = None;
        self.attach().map_err(|error| format!("cannot attach follow: {error}"))?;
        Ok(true)
    }

    fn look(&mut self) -> Result<BTreeMap<SocketAddr, Seen>, String> {
        let fault = |fault: &String| Seen { fault: Some(fault.clone()), ..Seen::default() };
        let mut seen: BTreeMap<_, _> = self.faults.iter().map(|(address, why)| (*address, fault(why))).collect();
        if self.endpoints.is_empty() {
            return Ok(seen);
        }
        self.looks += 1;
        self.number.set(0, self.looks, 0).map_err(|error| chain(&error))?;
        self.iterator.run().map_err(|error| format!("cannot look at the sockets of pods: {error}"))?;
        let now = now();
        for (address, followed) in &mut self.endpoints {
            let activity = self
                .activity
                .get(&followed.tracked.id, 0)
                .map_err(|error| format!("cannot read of connections to {address}: {}", chain(&error)))?;
            let lost =
                (activity.lost != 0).then(|| format!("the kernel had no memory to follow a connection to {address}"));
            let fault = self.faults.get(address).cloned().or(lost);
            if activity.opened != followed.opened {
                (followed.opened, followed.grown) = (activity.opened, now);
            }
            let activity = Seen {
                opened: activity.opened,
                open: if activity.look == self.looks { activity.open } else { 0 },
                idle: Duration::from_nanos(now.saturating_sub(activity.last.max(followed.grown))),
                visible: activity.seen != 0,
                fault,
            };
            seen.insert(*address, activity);
        }
        Ok(seen)
    }
}

fn key(group: u32, range: &Cidr) -> Key<Source> {
    let before = if range.address().is_ipv4() { 96 } else { 0 };
    let address = Endpoint::from(SocketAddr::new(range.address(), 0)).address;
    Key::new(GROUP_BITS + before + u32::from(range.prefix()), Source { group, address })
}

/// A process's name as the kernel keeps it.
fn comm(name: &str) -> [u8; NAME_LENGTH] {
    let mut comm = [0; NAME_LENGTH];
    for (to, from) in comm.iter_mut().zip(name.bytes().take(NAME_LENGTH - 1)) {
        *to = from;
    }
    comm
}

fn program<'a, T>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut T, LoadError>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    let program = programs.program_mut(name);
    program.ok_or_else(|| LoadError::Kernel(format!("the object has no program {name}")))?.try_into().map_err(kernel)
}

fn own(fd: std::os::fd::BorrowedFd<'_>) -> Result<OwnedFd, LoadError> {
    fd.try_clone_to_owned().map_err(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_off_as_the_kernel_does() {
        assert_eq!(&comm("kubelet"), b"kubelet\0\0\0\0\0\0\0\0\0");
        assert_eq!(&comm("a-very-long-process-name"), b"a-very-long-pro\0");
    }

    #[test]
    fn a_range_of_ipv4_is_one_of_mapped_addresses() {
        assert_eq!({ key(7, &"10.0.0.0/8".parse().unwrap()).prefix_len() }, 32 + 96 + 8);
        assert_eq!({ key(7, &"fd00::/64".parse().unwrap()).prefix_len() }, 32 + 64);
    }
}
