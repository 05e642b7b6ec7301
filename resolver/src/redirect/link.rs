//! One program's attachment to a cgroup, and whether it still is one.
//!
//! A link of our own rather than aya's, which keeps its descriptor to itself: the kernel tells of an attachment that
//! somebody has ended (`bpftool link detach`, a cgroup that was removed) by the descriptor alone, unless one has
//! `CAP_SYS_ADMIN`. Used by [`super::Redirector`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `BPF_LINK_CREATE` of `enum bpf_cmd` in linux/bpf.h.
const BPF_LINK_CREATE: libc::c_int = 28;

/// `enum bpf_attach_type` of linux/bpf.h: the hooks that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// `BPF_CGROUP_INET_INGRESS`
    Ingress = 0,
    /// `BPF_CGROUP_SOCK_OPS`
    SockOps = 3,
    /// `BPF_CGROUP_INET4_CONNECT`
    Connect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`
    Connect6 = 11,
    /// `BPF_CGROUP_INET4_GETPEERNAME`
    Getpeername4 = 29,
    /// `BPF_CGROUP_INET6_GETPEERNAME`
    Getpeername6 = 30,
}

/// The first fields of the `link_create` part of `union bpf_attr`; the kernel takes those that are not there for zero.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Detaches when it is dropped.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl Link {
    /// Attaches a loaded program to a cgroup's directory, beside whatever is attached there already: links of cgroups are
    /// shared by their nature. Those attached earlier run first.
    pub fn attach(program: BorrowedFd<'_>, cgroup: impl AsFd, hook: Hook) -> io::Result<Self> {
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
        let attributes = LinkCreate {
            prog_fd: number(program),
            target_fd: number(cgroup.as_fd()),
            attach_type: hook as u32,
            flags: 0,
        };
        create(BPF_LINK_CREATE, &attributes).map(Self)
    }

    /// Whether the kernel still runs the program. One that cannot be asked counts as attached.
    pub fn is_attached(&self) -> bool {
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()));
        told.map_or(true, |told| attached(&told))
    }
}

/// `BPF_ITER_CREATE` of `enum bpf_cmd`.
const BPF_ITER_CREATE: libc::c_int = 33;

/// `BPF_TRACE_ITER` of `enum bpf_attach_type`.
const BPF_TRACE_ITER: u32 = 28;

/// As [`LinkCreate`], for an iterator: what it walks over follows.
#[repr(C)]
struct IteratorCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    /// Address of a `union bpf_iter_link_info`, whose first field is the map.
    iter_info: u64,
    iter_info_len: u32,
    padding: u32,
}

/// A program that can be run for each element of a map.
#[derive(Debug)]
pub struct Iterator(OwnedFd);

impl Iterator {
    /// Links a loaded program of the type `iter` to a map.
    pub fn attach(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<Self> {
        let info: [u32; 1] = [map.as_raw_fd().cast_unsigned()];
        let attributes = IteratorCreate {
            prog_fd: program.as_raw_fd().cast_unsigned(),
            target_fd: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            iter_info: (&raw const info).addr() as u64,
            iter_info_len: 4,
            padding: 0,
        };
        create(BPF_LINK_CREATE, &attributes).map(Self)
    }

    /// Runs the program for each element. Whatever it writes is dropped.
    pub fn run(&self) -> io::Result<()> {
        let attributes: [u32; 2] = [self.0.as_raw_fd().cast_unsigned(), 0];
        let mut run = File::from(create(BPF_ITER_CREATE, &attributes)?);
        io::copy(&mut run, &mut io::sink()).map(drop)
    }
}

/// A command of bpf(2) that makes a descriptor.
fn create<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as many bytes of the structure as it is told; the descriptors and the memory that it names are
    // borrowed by the callers.
    #[expect(unsafe_code, reason = "no crate has this system call")]
    let created = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    let fd = i32::try_from(created).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made it for us alone; it closes it on exec by itself.
    #[expect(unsafe_code, reason = "a descriptor from a system call")]
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What `fdinfo` says of a link: the cgroup's number, which is 0 once it is detached (`bpf_cgroup_link_show_fdinfo`).
fn attached(fdinfo: &str) -> bool {
    let cgroup = fdinfo.lines().find_map(|line| line.strip_prefix("cgroup_id:"));
    cgroup.is_none_or(|number| number.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_without_a_cgroup_is_detached() {
        assert!(attached("pos:\t0\nlink_type:\tcgroup\ncgroup_id:\t4711\nattach_type:\t10\n"));
        assert!(!attached("pos:\t0\nlink_type:\tcgroup\ncgroup_id:\t0\nattach_type:\t10\n"));
        assert!(attached("pos:\t0\n"), "a kernel that does not tell");
    }
}
