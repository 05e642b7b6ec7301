//! Follows the connections to tracked addresses, whoever their clients are: counts those that open, and sees in the sockets
//! themselves whether they carry data. Nothing runs for a packet, but for pods that are older than the programs (`adopt`).
//!
//! What does not count: the connections of probers (kubelet) and of resolvers, recognised on the node by the process or the
//! mark of the socket that dials, and those of ignored sources.

use core::ffi::c_void;
use core::ptr::{null_mut, read_volatile, write_volatile};

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_ops};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_sk_fullsock, bpf_sk_storage_get, bpf_tcp_sock};
use aya_ebpf::helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_comm, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_map, cgroup_skb, map, sock_ops};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap};
use aya_ebpf::programs::{SkBuffContext, SockAddrContext, SockOpsContext};
use resolver_ebpf::{
    Activity, CGROUP_LEVELS, Connection, Endpoint, IGNORED_MAX, IGNORED_SOURCES_MAX, OWN_MARK, PROBER_NAMES_MAX, Pair,
    Source, TRACKED_MAX, Tracked,
};

use super::{IPPROTO_TCP, PODS_CGROUP, concerns};

/// `sockops`: nothing is said about the connection. `cgroup_skb`: the packet passes.
const PASS: u32 = 1;

/// Of `enum` in linux/bpf.h: a client's socket is about to send its SYN; a server's connection is open.
const BPF_SOCK_OPS_TCP_CONNECT_CB: u32 = 3;
const BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB: u32 = 5;

/// `AF_INET6` of the kernel's headers.
const AF_INET6: u32 = 10;

/// `TCP_ESTABLISHED` and `TCP_CLOSE_WAIT` of net/tcp_states.h: the server has not ended the connection.
const ESTABLISHED: u32 = 1;
const CLOSE_WAIT: u32 = 8;

/// Bits of a whole [`Source`].
const SOURCE_BITS: u32 = 160;

#[map]
static TRACKED: HashMap<Endpoint, Tracked> = HashMap::with_max_entries(TRACKED_MAX, BPF_F_NO_PREALLOC);

#[map]
static ACTIVITY: HashMap<u32, Activity> = HashMap::with_max_entries(TRACKED_MAX, BPF_F_NO_PREALLOC);

#[map]
static IGNORED_SOURCES: LpmTrie<Source, u8> = LpmTrie::with_max_entries(IGNORED_SOURCES_MAX, BPF_F_NO_PREALLOC);

/// Connections that have begun and do not count, until the server's side has been asked about them.
#[map]
static IGNORED: LruHashMap<Pair, u8> = LruHashMap::with_max_entries(IGNORED_MAX, 0);

#[map]
static PROBER_NAMES: HashMap<[u8; 16], u8> = HashMap::with_max_entries(PROBER_NAMES_MAX, BPF_F_NO_PREALLOC);

#[map]
static LOOK: Array<u64> = Array::with_max_entries(1, 0);

#[btf_map]
static CONNECTIONS: SkStorage<Connection> = SkStorage::new();

/// Sockets of probers that dial a tracked address.
#[btf_map]
static PROBERS: SkStorage<u32> = SkStorage::new();

/// Set before the programs are loaded, as all globals: the verifier drops what is behind a zero.
#[unsafe(no_mangle)]
static FOLLOW: u32 = 0;

#[unsafe(no_mangle)]
static BYTES_RECEIVED: u32 = 0;

#[unsafe(no_mangle)]
static BYTES_ACKED: u32 = 0;

#[unsafe(no_mangle)]
static STATE: u32 = 0;

/// Marks the socket of a prober that dials a tracked address. A prober is a process outside of pods with one of their names.
#[inline(always)]
pub(super) fn note_prober(ctx: &SockAddrContext, dialled: &Endpoint) {
    // SAFETY: the loader writes it before the programs run, and nobody after that.
    if unsafe { read_volatile(&raw const FOLLOW) } == 0 {
        return;
    }
    // SAFETY: only whether there is an element is asked, here and below.
    if unsafe { TRACKED.get(dialled) }.is_none() {
        return;
    }
    let Ok(name) = bpf_get_current_comm() else { return };
    if unsafe { PROBER_NAMES.get(&name) }.is_none() || in_pod() {
        return;
    }
    // SAFETY: the verifier checks every access to the context.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if !sk.is_null() {
        storage(&raw const PROBERS, sk, BPF_SK_STORAGE_GET_F_CREATE, null_mut());
    }
}

#[sock_ops]
fn follow(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            let _followed = opened(ctx.ops);
        }
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            let _ignored = dials(ctx.ops);
        }
        _ => {}
    }
    PASS
}

/// A client is about to dial: where it is one that does not count, the server's side is told.
#[inline(always)]
fn dials(ops: *const bpf_sock_ops) -> Option<()> {
    let (client, server) = ends(ops);
    if !concerns(&server) {
        return None;
    }
    // SAFETY: the verifier checks every access to the context and to the socket that it points to.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return None;
    }
    // SAFETY: only whether there is an element is asked.
    unsafe { TRACKED.get(&server) }?;
    let pair = Pair { client, server };
    // SAFETY: as above.
    if unsafe { (*sk).mark } != OWN_MARK && storage(&raw const PROBERS, sk, 0, null_mut::<u32>()).is_null() {
        // One that does not count may have dialled with this port before, and not been answered.
        let _gone = IGNORED.remove(&pair);
        return None;
    }
    IGNORED.insert(pair, 1, 0).ok()
}

/// A connection to a server on this node is open.
#[inline(always)]
fn opened(ops: *const bpf_sock_ops) -> Option<()> {
    let (server, client) = ends(ops);
    if !concerns(&server) {
        return None;
    }
    let (tracked, activity) = tracked(&server)?;
    // SAFETY: an element of ours; at worst one that was just removed is written.
    unsafe { write_volatile(&raw mut (*activity).seen, 1) };
    let pair = Pair { client, server };
    // SAFETY: only whether there is an element is asked.
    if unsafe { IGNORED.get(&pair) }.is_some() {
        let _gone = IGNORED.remove(&pair);
        return None;
    }
    if ignores(&tracked, &client) {
        return None;
    }
    // SAFETY: as above.
    unsafe { write_volatile(&raw mut (*activity).opened, (*activity).opened + 1) };
    // SAFETY: the verifier checks every access to the context.
    let sk = unsafe { (*ops).__bindgen_anon_2.sk };
    let mut connection = Connection { bytes: 0, id: tracked.id, padding: 0 };
    if sk.is_null() || remember(sk, &mut connection).is_null() {
        // SAFETY: as above.
        unsafe { write_volatile(&raw mut (*activity).lost, 1) };
    }
    Some(())
}

/// Attached to the cgroups of pods that may have connections older than the programs: the first packet of one has it followed.
#[cgroup_skb]
fn adopt(ctx: SkBuffContext) -> i32 {
    let _adopted = try_adopt(&ctx);
    PASS as i32
}

#[inline(always)]
fn try_adopt(ctx: &SkBuffContext) -> Option<()> {
    // SAFETY: the verifier checks every access to the context, and the helpers' results for null.
    unsafe {
        let sk = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if sk.is_null() {
            return None;
        }
        let sk = bpf_sk_fullsock(sk);
        if sk.is_null() || (*sk).protocol != IPPROTO_TCP || !is_open((*sk).state) {
            return None;
        }
        if !storage(&raw const CONNECTIONS, sk, 0, null_mut::<Connection>()).is_null() {
            return None;
        }
        let port = ((*sk).src_port as u16).to_be();
        let (server, client) = if (*sk).family == AF_INET6 {
            let local = &raw const (*sk).src_ip6;
            let remote = &raw const (*sk).dst_ip6;
            (Endpoint::v6(words(local), u32::from(port)), Endpoint::v6(words(remote), u32::from((*sk).dst_port)))
        } else {
            (Endpoint::v4((*sk).src_ip4, u32::from(port)), Endpoint::v4((*sk).dst_ip4, u32::from((*sk).dst_port)))
        };
        let (tracked, activity) = tracked(&server)?;
        write_volatile(&raw mut (*activity).seen, 1);
        if ignores(&tracked, &client) {
            return None;
        }
        let tcp = bpf_tcp_sock(sk);
        if tcp.is_null() {
            return None;
        }
        // Without what the packet brings: the next look finds that.
        let bytes = (*tcp).bytes_received + (*tcp).bytes_acked;
        let mut connection = Connection { bytes, id: tracked.id, padding: 0 };
        if remember(sk, &mut connection).is_null() {
            write_volatile(&raw mut (*activity).lost, 1);
        }
    }
    Some(())
}

/// What the kernel shows to an iterator over socket storage: `struct bpf_iter__bpf_sk_storage_map`.
#[repr(C)]
struct Stored {
    meta: u64,
    map: u64,
    sk: *const c_void,
    value: *mut Connection,
}

/// Run by the resolver, for each followed socket: whether it is open, and whether it has carried data since the last look.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/bpf_sk_storage_map")]
extern "C" fn look(ctx: *const Stored) -> i32 {
    let _looked = try_look(ctx);
    0
}

#[inline(always)]
fn try_look(ctx: *const Stored) -> Option<()> {
    // SAFETY: the verifier checks every access to the context and what it points to; the kernel's memory is read by a helper
    // that may fail.
    unsafe {
        let (sk, connection) = ((*ctx).sk, (*ctx).value);
        if sk.is_null() || connection.is_null() {
            return None;
        }
        let id = (*connection).id;
        let activity = ACTIVITY.get_ptr_mut(&id)?;
        let received: u64 = field(sk, &raw const BYTES_RECEIVED)?;
        let acknowledged: u64 = field(sk, &raw const BYTES_ACKED)?;
        let state: u8 = field(sk, &raw const STATE)?;
        let bytes = received + acknowledged;
        if (*connection).bytes != bytes {
            (*connection).bytes = bytes;
            write_volatile(&raw mut (*activity).last, bpf_ktime_get_ns());
        }
        let look = *LOOK.get(0)?;
        if (*activity).look != look {
            (*activity).look = look;
            (*activity).open = 0;
        }
        if is_open(u32::from(state)) {
            (*activity).open += 1;
        }
    }
    Some(())
}

/// A field of the kernel's structure, at the offset that the loader has put into a global.
#[inline(always)]
unsafe fn field<T: Default>(of: *const c_void, offset: *const u32) -> Option<T> {
    let mut value = T::default();
    let at = unsafe { of.byte_add(read_volatile(offset) as usize) };
    let failed = unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, at) };
    if failed == 0 { Some(value) } else { None }
}

#[inline(always)]
fn is_open(state: u32) -> bool {
    state == ESTABLISHED || state == CLOSE_WAIT
}

/// Whether the calling process is in a pod. Where nobody knows where pods are, none is.
#[inline(always)]
fn in_pod() -> bool {
    // SAFETY: the loader writes it before the programs run, and nobody after that.
    let pods = unsafe { read_volatile(&raw const PODS_CGROUP) };
    if pods == 0 {
        return false;
    }
    for level in 0..CGROUP_LEVELS {
        // SAFETY: a helper that takes any level; zero stands for one that the caller does not have.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 || cgroup == pods {
            return cgroup == pods;
        }
    }
    false
}

#[inline(always)]
fn tracked(server: &Endpoint) -> Option<(Tracked, *mut Activity)> {
    // SAFETY: at worst an element that is reused meanwhile is read, and another address has some activity too much.
    let tracked = *unsafe { TRACKED.get(server) }?;
    Some((tracked, ACTIVITY.get_ptr_mut(&tracked.id)?))
}

#[inline(always)]
fn ignores(tracked: &Tracked, client: &Endpoint) -> bool {
    if tracked.sources == 0 {
        return false;
    }
    let source = Source { group: tracked.sources, address: client.address };
    IGNORED_SOURCES.get(Key::new(SOURCE_BITS, source)).is_some()
}

#[inline(always)]
fn remember(sk: *mut bpf_sock, connection: &mut Connection) -> *mut Connection {
    storage(&raw const CONNECTIONS, sk, BPF_SK_STORAGE_GET_F_CREATE, connection)
}

#[inline(always)]
fn storage<T>(map: *const SkStorage<T>, sk: *mut bpf_sock, flags: u32, value: *mut T) -> *mut T {
    // SAFETY: the map's values are of this type, and the verifier checks that the socket is not null.
    unsafe { bpf_sk_storage_get(map.cast_mut().cast(), sk.cast(), value.cast(), u64::from(flags)).cast() }
}

/// The local and the remote end. The kernel keeps the local port in the machine's order and the remote one in the upper half.
#[inline(always)]
fn ends(ops: *const bpf_sock_ops) -> (Endpoint, Endpoint) {
    // SAFETY: the verifier checks every access to the context.
    unsafe {
        let local_port = u32::from(((*ops).local_port as u16).to_be());
        let remote_port = (*ops).remote_port >> 16;
        if (*ops).family == AF_INET6 {
            let local = words(&raw const (*ops).local_ip6);
            let remote = words(&raw const (*ops).remote_ip6);
            (Endpoint::v6(local, local_port), Endpoint::v6(remote, remote_port))
        } else {
            (Endpoint::v4((*ops).local_ip4, local_port), Endpoint::v4((*ops).remote_ip4, remote_port))
        }
    }
}

/// The words one by one: the verifier refuses wider accesses to contexts.
#[inline(always)]
unsafe fn words(first: *const [u32; 4]) -> [u32; 4] {
    let first = first.cast::<u32>();
    // SAFETY: four words of a context.
    unsafe {
        [
            first.read_volatile(),
            first.add(1).read_volatile(),
            first.add(2).read_volatile(),
            first.add(3).read_volatile(),
        ]
    }
}
