//! The maps that the eBPF programs and the resolver share: keys, values and their layout.
//!
//! Everything is integers of fixed size without hidden padding, so both sides see the same bytes. Addresses have one
//! form, IPv6 with IPv4 mapped into it (RFC 4291, 2.5.5.2), so that IPv4 sockets, IPv6 sockets and IPv6 sockets that
//! speak IPv4 share one map.
#![cfg_attr(target_arch = "bpf", no_std)]

/// Name of the map from what clients dial to where they are sent: `Endpoint` to `Endpoint`.
pub const REDIRECTS: &str = "REDIRECTS";

/// Name of the map of addresses of pods that are about to end, as [`REDIRECTS`]. It holds for callers below [`PODS_CGROUP`]
/// only, but not for those in [`DRAINING_PODS`].
pub const DRAINING: &str = "DRAINING";

/// Name of the set of the cgroups of this node's pods that are about to end, by cgroup id (the inode number of the directory):
/// what such a pod dials itself passes, or the last words of peers to each other would wake their target again.
pub const DRAINING_PODS: &str = "DRAINING_PODS";

/// Name of the global with the id of the cgroup below which the node's pods are, and kubelet is not; zero when none is known:
/// then [`DRAINING`] holds for nobody.
pub const PODS_CGROUP: &str = "PODS_CGROUP";

/// Name of the array of [`NOTES_LEN`] [`Note`]s, one for each [`Note::place`]: what `getpeername` answers.
pub const NOTES: &str = "NOTES";

/// Name of the one-element array with the resolver's last heartbeat, in ns of `CLOCK_MONOTONIC`.
pub const HEARTBEAT: &str = "HEARTBEAT";

/// Name of the per-CPU counters, indexed by [`Counter`].
pub const COUNTERS: &str = "COUNTERS";

/// Name of the array of [`FILTER_WORDS`] words of 64 bits, one bit for each [`Endpoint::place`]: whoever finds none at his place
/// is in none of [`REDIRECTS`], [`DRAINING`] and [`TRACKED`], and asks them nothing. So a connection that concerns nobody costs
/// one word of memory. The resolver sets a bit before an entry and clears it after the last.
pub const FILTER: &str = "FILTER";

/// Words of [`FILTER`], a power of two: 128 KiB in all. Full maps leave nine of ten strangers at an empty place.
pub const FILTER_WORDS: u32 = 16_384;

/// Entries of [`REDIRECTS`]: each ElastiService has an interception port of 40,000, and a Service two address families.
/// The kernel rounds the number of its buckets up to 131,072 in any case, and elements cost nothing before they are there.
pub const REDIRECTS_MAX: u32 = 100_000;

/// Entries of [`DRAINING`]: addresses and ports of the pods of a cluster that end within three seconds.
pub const DRAINING_MAX: u32 = 16_384;

/// Entries of [`DRAINING_PODS`]: kubelet takes 110 pods by default, and nobody has made it take ten times as many.
pub const DRAINING_PODS_MAX: u32 = 1024;

/// How many levels of cgroups above a caller are looked at: a container's is the fifth or sixth, and some nest a node in them.
pub const CGROUP_LEVELS: i32 = 16;

/// Elements of [`NOTES`], a power of two: 6 MiB in all. A note stays until about so many other sockets of the node have got a
/// cookie, which few ever do; a connection that loses it loses nothing but the answer to `getpeername`, which then names the
/// resolver.
pub const NOTES_LEN: u32 = 131_072;

/// A heartbeat older than this, in ns, means that the resolver is stuck: connections pass untouched then. Ten times the
/// interval at which it is written, so that a busy machine does not cause it.
pub const HEARTBEAT_TTL_NS: u64 = 2_000_000_000;

/// The socket mark (`SO_MARK`) of the resolver's own connections, which are never redirected. Fixed, since the programs
/// of two resolvers share a node during a rollout. The kernel clears the marks of packets that leave a pod's network
/// namespace, so it meets no mark of kube-proxy or a CNI there.
pub const OWN_MARK: u32 = 0x00e1_a571;

/// Name of the map of the addresses whose connections are followed: pod address and port, to [`Tracked`].
pub const TRACKED: &str = "TRACKED";

/// Name of the map from [`Tracked::id`] to [`Activity`].
pub const ACTIVITY: &str = "ACTIVITY";

/// Name of the socket storage with the [`Connection`] of each followed socket.
pub const CONNECTIONS: &str = "CONNECTIONS";

/// Name of the trie of [`Source`]s whose connections do not count.
pub const IGNORED_SOURCES: &str = "IGNORED_SOURCES";

/// Name of the set of the names of probers: kubelet's processes, as the kernel cuts them off (`comm`, 16 bytes with the zero).
pub const PROBER_NAMES: &str = "PROBER_NAMES";

/// Name of the one-element array with the number of the look at all followed sockets that is going on.
pub const LOOK: &str = "LOOK";

/// Name of the global that says whether connections are followed at all; without it nothing but redirection is loaded.
pub const FOLLOW: &str = "FOLLOW";

/// Names of the globals with the offsets of `bytes_received` and `bytes_acked` in the kernel's `struct tcp_sock`, and of
/// `skc_state` in `struct sock_common`, which is the beginning of the former.
pub const OFFSETS: [&str; 3] = ["BYTES_RECEIVED", "BYTES_ACKED", "STATE"];

/// Entries of [`TRACKED`] and [`ACTIVITY`]: kubelet takes 110 pods by default, and few of them have many ports.
pub const TRACKED_MAX: u32 = 8192;

/// Entries of [`IGNORED_SOURCES`]: some ranges for each ElastiService with pods on the node.
pub const IGNORED_SOURCES_MAX: u32 = 16_384;

/// Entries of the map of connections that have begun and do not count: they are in it for a round trip. The oldest go first,
/// and count.
pub const IGNORED_MAX: u32 = 16_384;

/// Entries of [`PROBER_NAMES`].
pub const PROBER_NAMES_MAX: u32 = 64;

/// Counters of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Connections sent to the resolver.
    Redirected = 0,
    /// Connections that would have been, had the heartbeat not been too old.
    Stale = 1,
}

/// How many counters there are.
pub const COUNTERS_LEN: u32 = 2;

/// An address and a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Endpoint {
    /// The address as four words whose bytes are in network order, as `bpf_sock_addr.user_ip6` has it.
    pub address: [u32; 4],
    /// The port, its bytes in network order.
    pub port_be: u16,
    /// Always zero: map keys are compared byte by byte.
    pub padding: u16,
}

/// A connection that was sent elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Note {
    /// The cookie of its socket, which no other has had or will have (`SO_COOKIE` of socket(7)); zero, which none has, while the
    /// rest is being written.
    pub cookie: u64,
    /// What the client dialled.
    pub original: Endpoint,
    /// Where it was sent. A socket whose peer is another one by now has been connected anew.
    pub replacement: Endpoint,
}

/// An address whose connections are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tracked {
    /// Key of its [`Activity`], never used again for another address.
    pub id: u32,
    /// [`Source::group`] of the clients that do not count; zero when all do.
    pub sources: u32,
}

/// What is known of the connections of one address. Times are of `CLOCK_MONOTONIC`, in ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Activity {
    /// Connections that were opened and counted. Two of one moment may count as one. Nobody asks the clock for each: it was since
    /// the look before that a number has grown.
    pub opened: u64,
    /// The latest look at which one had carried data since the look before, or when the address was first followed.
    pub last: u64,
    /// The look that `open` is of; with another one than the latest, none is open.
    pub look: u64,
    /// Counted connections that neither side had ended at that look.
    pub open: u32,
    /// Not zero once a counted connection could not be followed.
    pub lost: u32,
    /// Not zero once any connection was seen, whether it counted or not.
    pub seen: u32,
    /// Always zero.
    pub padding: u32,
}

/// What is kept with a followed socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// The payload that it had received, and that of its own that had been acknowledged, together.
    pub bytes: u64,
    /// [`Tracked::id`] of its address.
    pub id: u32,
    /// Always zero.
    pub padding: u32,
}

/// A client whose connections do not count, for the addresses of its group: data of a trie's key, which matches as many bits
/// as the key says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Source {
    /// As [`Tracked::sources`].
    pub group: u32,
    /// As [`Endpoint::address`].
    pub address: [u32; 4],
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pair {
    /// Who has dialled.
    pub client: Endpoint,
    /// Who was dialled.
    pub server: Endpoint,
}

const _: () = assert!(size_of::<Tracked>() == 8 && size_of::<Activity>() == 40 && size_of::<Connection>() == 16);
const _: () = assert!(size_of::<Source>() == 20 && size_of::<Pair>() == 40);
const _: () = assert!(size_of::<Endpoint>() == 20 && align_of::<Endpoint>() == 4);
const _: () = assert!(size_of::<Note>() == 48 && NOTES_LEN.is_power_of_two());

impl Note {
    /// Where [`NOTES`] has the note of a socket. The kernel numbers sockets one after the other, each CPU from some thousand
    /// numbers of its own: neighbours in time are neighbours in memory, and the oldest note goes first.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the upper bits are not asked")]
    pub const fn place(cookie: u64) -> u32 {
        cookie as u32 % NOTES_LEN
    }
}

/// Third word of an IPv4-mapped address.
const MAPPED: u32 = 0xffff_u32.to_be();

impl Endpoint {
    /// From the fields of an IPv4 `bpf_sock_addr`: both in network byte order, the port in the low half of its word.
    #[inline]
    pub const fn v4(ip: u32, port: u32) -> Self {
        Self::v6([0, 0, MAPPED, ip], port)
    }

    /// From the fields of an IPv6 `bpf_sock_addr`.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the kernel keeps a 16-bit port in a 32-bit field")]
    pub const fn v6(address: [u32; 4], port: u32) -> Self {
        Self { address, port_be: port as u16, padding: 0 }
    }

    /// Where [`FILTER`] has this endpoint's bit: word and bit.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "the eBPF programs shall do without a call")]
    pub const fn place(&self) -> (u32, u64) {
        // Odd constants of many bits (2^64 divided by the golden ratio, and two of MurmurHash3): each bit of the input
        // reaches the upper bits of the product, of which the last are taken.
        let [a, b, c, d] = self.address;
        let upper = ((a as u64) << 32 | b as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let lower = ((c as u64) << 32 | d as u64).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let port = (self.port_be as u64).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        let mixed = upper ^ (lower ^ lower >> 29).wrapping_add(port);
        let mixed = (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = (mixed >> 44) as u32;
        (place / 64 % FILTER_WORDS, 1 << (place % 64))
    }

    /// The IPv4 address, as `bpf_sock_addr.user_ip4` has it; `None` when it is IPv6.
    #[inline]
    pub const fn ip4(&self) -> Option<u32> {
        if self.address[0] == 0 && self.address[1] == 0 && self.address[2] == MAPPED {
            Some(self.address[3])
        } else {
            None
        }
    }

    /// The port, as `bpf_sock_addr.user_port` has it.
    #[inline]
    pub const fn port(&self) -> u32 {
        self.port_be as u32
    }
}

#[cfg(not(target_arch = "bpf"))]
mod host {
    use std::net::{IpAddr, SocketAddr};

    use super::{Activity, Endpoint, Source, Tracked};

    impl From<SocketAddr> for Endpoint {
        fn from(address: SocketAddr) -> Self {
            let ip = match address.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            let words = ip.octets();
            let (words, _) = words.as_chunks::<4>();
            Self {
                address: [0, 1, 2, 3].map(|word| u32::from_ne_bytes(words[word])),
                port_be: address.port().to_be(),
                padding: 0,
            }
        }
    }

    impl From<Endpoint> for SocketAddr {
        fn from(endpoint: Endpoint) -> Self {
            let mut octets = [0; 16];
            for (octets, word) in octets.as_chunks_mut::<4>().0.iter_mut().zip(endpoint.address) {
                *octets = word.to_ne_bytes();
            }
            Self::new(IpAddr::from(octets).to_canonical(), u16::from_be(endpoint.port_be))
        }
    }

    // SAFETY: `repr(C)`, integers only, no padding that is not a field: any bytes are a valid value.
    #[expect(unsafe_code, reason = "aya asks for the promise that any bytes are a valid value")]
    unsafe impl aya::Pod for Endpoint {}

    // SAFETY: `repr(C)`, integers only, no padding that is not a field.
    #[expect(unsafe_code, reason = "aya asks for the promise that any bytes are a valid value")]
    unsafe impl aya::Pod for Tracked {}

    // SAFETY: as above.
    #[expect(unsafe_code, reason = "aya asks for the promise that any bytes are a valid value")]
    unsafe impl aya::Pod for Activity {}

    // SAFETY: as above.
    #[expect(unsafe_code, reason = "aya asks for the promise that any bytes are a valid value")]
    unsafe impl aya::Pod for Source {}
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;

    #[test]
    fn addresses_survive_the_map() {
        for address in ["10.96.0.10:80", "[fd00:96::a]:443", "255.255.255.255:65535"] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(SocketAddr::from(Endpoint::from(address)), address);
        }
    }

    #[test]
    fn endpoints_are_spread_over_the_filter() {
        // Services of one range, and pods with several ports: what clusters have.
        let services = (0..40_000_u32).map(|index| (0x0a60_0000 + index, 80_u16));
        let pods = (0..10_000_u32).flat_map(|index| [8080, 8081, 9090].map(|port| (0x0af4_0000 + index, port)));
        let mut places = std::collections::HashSet::new();
        for (ip, port) in services.chain(pods) {
            let endpoint = Endpoint::from(SocketAddr::from((Ipv4Addr::from(ip), port)));
            let (word, bit) = endpoint.place();
            assert!(word < FILTER_WORDS && bit.is_power_of_two());
            places.insert((word, bit));
        }
        // 70,000 that fall on 2^20 places by chance take 67,700 of them.
        assert!((67_000..68_500).contains(&places.len()), "{} places", places.len());
    }

    #[test]
    fn an_ipv4_address_has_one_form_whichever_socket_dials_it() {
        let plain = Endpoint::from("10.96.0.10:80".parse::<SocketAddr>().unwrap());
        let mapped = Endpoint::from("[::ffff:10.96.0.10]:80".parse::<SocketAddr>().unwrap());
        assert_eq!(plain, mapped);
        let ip = u32::from_ne_bytes(Ipv4Addr::new(10, 96, 0, 10).octets());
        assert_eq!(plain, Endpoint::v4(ip, u32::from(80_u16.to_be())));
        assert_eq!((plain.ip4(), plain.port()), (Some(ip), u32::from(80_u16.to_be())));
        assert_eq!(Endpoint::from("[fd00::1]:80".parse::<SocketAddr>().unwrap()).ip4(), None);
    }
}
