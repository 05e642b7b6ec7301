//! The programs that redirect connections, and their maps; [`tracking`] has those that follow them. See the crate's library
//! for what the maps hold.
#![expect(unsafe_code, reason = "the kernel's context and maps are raw pointers that its verifier checks")]

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock_addr};
use aya_ebpf::helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::{cgroup_sock_addr, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use resolver_ebpf::{
    CGROUP_LEVELS, COUNTERS_LEN, Counter, DRAINING_MAX, DRAINING_PODS_MAX, Endpoint, FILTER_WORDS, HEARTBEAT_TTL_NS,
    NOTES_LEN, Note, OWN_MARK, REDIRECTS_MAX,
};

mod tracking;

/// `cgroup/connect*` and `cgroup/getpeername*`: the call goes on.
const ALLOW: i32 = 1;

/// `SOCK_STREAM` and `IPPROTO_TCP` of the kernel's headers.
const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;

#[map]
static FILTER: Array<u64> = Array::with_max_entries(FILTER_WORDS, BPF_F_MMAPABLE);

/// Not preallocated: a node pays for the Services that are at zero, not for all that could be.
#[map]
static REDIRECTS: HashMap<Endpoint, Endpoint> = HashMap::with_max_entries(REDIRECTS_MAX, BPF_F_NO_PREALLOC);

/// Not preallocated: it is empty but for the seconds in which a target goes to zero.
#[map]
static DRAINING: HashMap<Endpoint, Endpoint> = HashMap::with_max_entries(DRAINING_MAX, BPF_F_NO_PREALLOC);

#[map]
static DRAINING_PODS: HashMap<u64, u8> = HashMap::with_max_entries(DRAINING_PODS_MAX, BPF_F_NO_PREALLOC);

#[map]
static NOTES: Array<Note> = Array::with_max_entries(NOTES_LEN, 0);

#[map]
static HEARTBEAT: Array<u64> = Array::with_max_entries(1, 0);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_LEN, 0);

/// Not zero: every redirected connection is logged. Set before the programs are loaded, so that the verifier drops the
/// branch where it is off.
#[unsafe(no_mangle)]
static LOG_CONNECTS: u32 = 0;

/// Set before the programs are loaded, as above.
#[unsafe(no_mangle)]
static PODS_CGROUP: u64 = 0;

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    let _passed = try_connect4(&ctx);
    ALLOW
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    let _passed = try_connect6(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    let _passed = try_getpeername4(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    let _passed = try_getpeername6(&ctx);
    ALLOW
}

#[inline(always)]
fn try_connect4(ctx: &SockAddrContext) -> Option<()> {
    let addr = ctx.sock_addr;
    // SAFETY: the verifier checks every access to the context.
    let dialled = unsafe { Endpoint::v4((*addr).user_ip4, (*addr).user_port) };
    if !concerns(&dialled) {
        return None;
    }
    let target = redirect(ctx, &dialled)?;
    let ip = target.ip4()?;
    remember(ctx, dialled, target);
    // SAFETY: the verifier checks every access to the context.
    unsafe {
        (*addr).user_ip4 = ip;
        (*addr).user_port = target.port();
    }
    Some(())
}

#[inline(always)]
fn try_connect6(ctx: &SockAddrContext) -> Option<()> {
    let addr = ctx.sock_addr;
    // SAFETY: the verifier checks every access to the context.
    let dialled = unsafe { Endpoint::v6(words(addr), (*addr).user_port) };
    if !concerns(&dialled) {
        return None;
    }
    let target = redirect(ctx, &dialled)?;
    remember(ctx, dialled, target);
    // SAFETY: as above.
    unsafe {
        set_words(addr, &target.address);
        (*addr).user_port = target.port();
    }
    Some(())
}

#[inline(always)]
fn try_getpeername4(ctx: &SockAddrContext) -> Option<()> {
    let addr = ctx.sock_addr;
    // SAFETY: the verifier checks every access to the context.
    let peer = unsafe { Endpoint::v4((*addr).user_ip4, (*addr).user_port) };
    let original = original(ctx, &peer)?;
    let ip = original.ip4()?;
    // SAFETY: as above.
    unsafe {
        (*addr).user_ip4 = ip;
        (*addr).user_port = original.port();
    }
    Some(())
}

#[inline(always)]
fn try_getpeername6(ctx: &SockAddrContext) -> Option<()> {
    let addr = ctx.sock_addr;
    // SAFETY: the verifier checks every access to the context.
    let peer = unsafe { Endpoint::v6(words(addr), (*addr).user_port) };
    let original = original(ctx, &peer)?;
    // SAFETY: as above.
    unsafe {
        set_words(addr, &original.address);
        (*addr).user_port = original.port();
    }
    Some(())
}

/// Whether any of the maps may hold this endpoint.
#[inline(always)]
fn concerns(endpoint: &Endpoint) -> bool {
    let (word, bit) = endpoint.place();
    FILTER.get(word).is_some_and(|bits| bits & bit != 0)
}

/// Where this connection goes instead, if it is one of those that go elsewhere.
#[inline(always)]
fn redirect(ctx: &SockAddrContext, dialled: &Endpoint) -> Option<Endpoint> {
    let addr = ctx.sock_addr;
    // SAFETY: the verifier checks every access to the context.
    let (kind, protocol) = unsafe { ((*addr).type_, (*addr).protocol) };
    if kind != SOCK_STREAM || protocol != IPPROTO_TCP {
        return None;
    }
    let target = match target(&REDIRECTS, dialled) {
        Some(target) => target,
        None => {
            // An address of a pod, if of anybody.
            tracking::note_prober(ctx, dialled);
            draining(dialled)?
        }
    };
    // SAFETY: the verifier checks every access to the context and to the socket that it points to.
    let mark = unsafe {
        let sk = (*addr).__bindgen_anon_1.sk;
        if sk.is_null() {
            return None;
        }
        (*sk).mark
    };
    if mark == OWN_MARK {
        return None;
    }
    let heartbeat = *HEARTBEAT.get(0)?;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if now.saturating_sub(heartbeat) > HEARTBEAT_TTL_NS {
        count(Counter::Stale);
        return None;
    }
    count(Counter::Redirected);
    // SAFETY: the loader writes it before the programs run, and nobody after that.
    if unsafe { read_volatile(&raw const LOG_CONNECTS) } != 0 {
        debug!(ctx, "redirected port {}", u16::from_be(dialled.port_be));
    }
    Some(target)
}

/// Where a connection to a pod that is about to end goes instead. Kubelet's never do: it probes pods until they have ended.
#[inline(always)]
fn draining(dialled: &Endpoint) -> Option<Endpoint> {
    // SAFETY: the loader writes it before the programs run, and nobody after that.
    let pods = unsafe { read_volatile(&raw const PODS_CGROUP) };
    if pods == 0 {
        return None;
    }
    let target = target(&DRAINING, dialled)?;
    let mut below_pods = false;
    for level in 0..CGROUP_LEVELS {
        // SAFETY: a helper that takes any level; zero stands for one that the caller does not have.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            break;
        }
        below_pods |= cgroup == pods;
        // SAFETY: only whether there is an element is asked.
        if unsafe { DRAINING_PODS.get(cgroup) }.is_some() {
            return None;
        }
    }
    if below_pods { Some(target) } else { None }
}

/// What the map holds for this destination. Read twice: the kernel reuses a removed element at once (since 6.1 without
/// preallocation too), so what is read while the resolver changes the map may be another Service's target. Then the two
/// differ, or the second is gone, and the connection passes.
#[inline(always)]
fn target(map: &HashMap<Endpoint, Endpoint>, dialled: &Endpoint) -> Option<Endpoint> {
    // SAFETY: the memory stays the map's; what it holds is checked by reading it again.
    let target = *unsafe { map.get(dialled) }?;
    // SAFETY: as above.
    let again = *unsafe { map.get(dialled) }?;
    if target == again { Some(target) } else { None }
}

/// Keeps what the client dialled, in the place of a socket that is older by [`NOTES_LEN`].
#[inline(always)]
fn remember(ctx: &SockAddrContext, original: Endpoint, replacement: Endpoint) {
    let cookie = cookie(ctx);
    let Some(note) = NOTES.get_ptr_mut(Note::place(cookie)) else { return };
    // SAFETY: an element of ours. Whoever reads it meanwhile finds another cookie before or after.
    unsafe {
        write_volatile(&raw mut (*note).cookie, 0);
        write_volatile(&raw mut (*note).original, original);
        write_volatile(&raw mut (*note).replacement, replacement);
        write_volatile(&raw mut (*note).cookie, cookie);
    }
}

/// What the client of this socket dialled, if its peer is still the one that it was sent to.
#[inline(always)]
fn original(ctx: &SockAddrContext, peer: &Endpoint) -> Option<Endpoint> {
    let cookie = cookie(ctx);
    let note = NOTES.get_ptr(Note::place(cookie))?;
    // SAFETY: an element of ours. What is written anew while it is read has another cookie before or after; where a CPU changes the
    // order of what it writes, the replacement below is at least that of the same port of the same Service.
    let (before, note, after) = unsafe {
        (read_volatile(&raw const (*note).cookie), read_volatile(note), read_volatile(&raw const (*note).cookie))
    };
    if before == cookie && after == cookie && note.replacement == *peer { Some(note.original) } else { None }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the one that the kernel gave us.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

#[inline(always)]
fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a per-CPU element of ours; programs of this type do not interrupt each other on one CPU.
        unsafe { *value += 1 }
    }
}

/// The words one by one: the verifier refuses wider accesses to the context.
#[inline(always)]
unsafe fn words(addr: *const bpf_sock_addr) -> [u32; 4] {
    let first = unsafe { &raw const (*addr).user_ip6 }.cast::<u32>();
    // SAFETY: four words of the context.
    unsafe {
        [
            first.read_volatile(),
            first.add(1).read_volatile(),
            first.add(2).read_volatile(),
            first.add(3).read_volatile(),
        ]
    }
}

/// As [`words`].
#[inline(always)]
unsafe fn set_words(addr: *mut bpf_sock_addr, words: &[u32; 4]) {
    let first = unsafe { &raw mut (*addr).user_ip6 }.cast::<u32>();
    // SAFETY: four words of the context.
    unsafe {
        first.write_volatile(words[0]);
        first.add(1).write_volatile(words[1]);
        first.add(2).write_volatile(words[2]);
        first.add(3).write_volatile(words[3]);
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The licence that the kernel asks for: some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
