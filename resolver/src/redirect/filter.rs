//! The bits by which the eBPF programs tell that a connection concerns none of their maps.
//!
//! Invariant: a bit is set before the first entry at its place is in a map, and cleared only after the last has gone; so what the
//! programs do not look up is not there. Owned by [`super::Redirector`] and [`super::sockets::Sockets`] together.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{Map, MapData};
use resolver_ebpf::{Endpoint, FILTER, FILTER_WORDS};

use super::{LoadError, kernel};

const WORDS: usize = FILTER_WORDS as usize;

/// Whose entries they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// [`resolver_ebpf::REDIRECTS`].
    Redirects,
    /// [`resolver_ebpf::DRAINING`].
    Draining,
    /// [`resolver_ebpf::TRACKED`].
    Tracked,
}

const PARTS: usize = 3;

type Place = (u32, u64);

/// The filter. Clones share it.
#[derive(Clone)]
pub(super) struct Filter(Arc<Mutex<State>>);

struct State {
    memory: Memory,
    /// Loading the programs needs its descriptor.
    _map: Option<MapData>,
    /// The places of each part's entries.
    places: [Vec<Place>; PARTS],
}

impl Filter {
    /// Of the loaded map.
    pub(super) fn new(map: Map) -> Result<Self, LoadError> {
        let Map::Array(map) = map else {
            return Err(LoadError::Kernel(format!("{FILTER} is no array")));
        };
        Ok(Self::of(Memory::of(map.fd().as_fd()).map_err(kernel)?, Some(map)))
    }

    fn of(memory: Memory, map: Option<MapData>) -> Self {
        Self(Arc::new(Mutex::new(State { memory, _map: map, places: Default::default() })))
    }

    /// Lets the programs look these up too; to be called before they are added to a map.
    pub(super) fn widen<'a>(&self, endpoints: impl IntoIterator<Item = &'a Endpoint>) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (word, bit) in endpoints.into_iter().map(Endpoint::place) {
            state.memory.word(word).fetch_or(bit, Ordering::Release);
        }
    }

    /// The map of this part is about to hold these too.
    pub(super) fn add(&self, part: Part, endpoints: &[Endpoint]) {
        self.widen(endpoints);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.places[part as usize].extend(endpoints.iter().map(Endpoint::place));
    }

    /// The map of this part holds these and nothing else. The memory itself is compared, not a memory of it: somebody else may
    /// have changed it.
    pub(super) fn narrow<'a>(&self, part: Part, endpoints: impl IntoIterator<Item = &'a Endpoint>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.places[part as usize] = endpoints.into_iter().map(Endpoint::place).collect();
        let mut wanted = vec![0_u64; WORDS];
        for (word, bit) in state.places.iter().flatten() {
            if let Some(wanted) = wanted.get_mut(*word as usize) {
                *wanted |= bit;
            }
        }
        for (word, wanted) in state.memory.words().iter().zip(wanted) {
            if word.load(Ordering::Relaxed) != wanted {
                word.store(wanted, Ordering::Release);
            }
        }
    }
}

/// The map's own memory, in this process.
struct Memory(NonNull<AtomicU64>);

// SAFETY: it is memory that the kernel keeps until it is unmapped, and all that is done with it is atomic.
#[expect(unsafe_code, reason = "a pointer to shared memory is not Send by itself")]
unsafe impl Send for Memory {}

impl Memory {
    #[expect(unsafe_code, reason = "aya maps no array's memory")]
    fn of(map: impl AsFd) -> io::Result<Self> {
        let (length, access) = (WORDS * size_of::<u64>(), libc::PROT_READ | libc::PROT_WRITE);
        let fd = map.as_fd().as_raw_fd();
        // SAFETY: anywhere, of a length that the map has, or the kernel refuses it.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, fd, 0) };
        let at = (at != libc::MAP_FAILED).then(|| NonNull::new(at.cast())).flatten();
        at.map(Self).ok_or_else(io::Error::last_os_error)
    }

    #[expect(unsafe_code, reason = "as above")]
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped, to a page's boundary, for as long as this lives; any bits are a value.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), WORDS) }
    }

    fn word(&self, index: u32) -> &AtomicU64 {
        &self.words()[index as usize % WORDS]
    }
}

impl Drop for Memory {
    #[expect(unsafe_code, reason = "as above")]
    fn drop(&mut self) {
        // SAFETY: mapped above, and nobody has a reference any more. It fails for no reason that anything could be done about.
        unsafe { libc::munmap(self.0.as_ptr().cast(), WORDS * size_of::<u64>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn endpoint(address: &str) -> Endpoint {
        Endpoint::from(address.parse::<SocketAddr>().unwrap())
    }

    /// A filter in a file's memory.
    fn filter() -> Filter {
        let file = tempfile::tempfile().unwrap();
        file.set_len((WORDS * size_of::<u64>()) as u64).unwrap();
        Filter::of(Memory::of(file).unwrap(), None)
    }

    fn passes(filter: &Filter, endpoint: &Endpoint) -> bool {
        let ((word, bit), state) = (endpoint.place(), filter.0.lock().unwrap());
        state.memory.word(word).load(Ordering::Relaxed) & bit != 0
    }

    #[test]
    fn a_place_is_free_when_the_last_entry_of_every_part_has_gone() {
        let (filter, [a, b]) = (filter(), ["10.96.0.1:80", "10.244.0.9:8080"].map(endpoint));
        filter.widen([&a, &b]);
        assert!(passes(&filter, &a) && passes(&filter, &b), "before they are in a map");
        filter.narrow(Part::Redirects, [&a, &b]);
        filter.narrow(Part::Tracked, [&b]);
        filter.narrow(Part::Redirects, [&a]);
        assert!(passes(&filter, &a) && passes(&filter, &b), "another part has it");
        filter.narrow(Part::Tracked, []);
        assert!(passes(&filter, &a) && !passes(&filter, &b));
    }

    #[test]
    fn what_somebody_else_has_cleared_is_set_again() {
        let (filter, a) = (filter(), endpoint("[fd00:96::1]:443"));
        filter.narrow(Part::Draining, [&a]);
        let (word, _) = a.place();
        filter.0.lock().unwrap().memory.word(word).store(0, Ordering::Relaxed);
        filter.narrow(Part::Redirects, []);
        assert!(passes(&filter, &a));
    }
}
