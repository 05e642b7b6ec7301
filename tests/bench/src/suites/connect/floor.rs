//! A program that does nothing: what the kernel counts for it is what counting costs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use elasti_resolver::redirect::link::{Hook, Link};

/// Its name.
pub(super) const NAME: &str = "floor";

/// Of linux/bpf.h: `BPF_PROG_LOAD` and `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
const BPF_PROG_LOAD: libc::c_int = 5;
const CGROUP_SOCK_ADDR: u32 = 18;

/// `return 1`: the connection passes.
static INSTRUCTIONS: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];

/// The first fields of what `BPF_PROG_LOAD` takes of `union bpf_attr`; the kernel takes those that are not there for zero.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// Runs for each `connect` of IPv4 in a cgroup until it is dropped.
pub(super) struct Floor(#[expect(dead_code, reason = "its end detaches the program")] Link);

impl Floor {
    /// Loads and attaches it.
    pub(super) fn attach(cgroup: &Path) -> Result<Self> {
        let mut prog_name = [0; 16];
        prog_name[..NAME.len()].copy_from_slice(NAME.as_bytes());
        let attributes = ProgLoad {
            prog_type: CGROUP_SOCK_ADDR,
            insn_cnt: 2,
            insns: INSTRUCTIONS.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
            prog_name,
            prog_ifindex: 0,
            expected_attach_type: Hook::Connect4 as u32,
        };
        let program = load(&attributes).context("the kernel does not take a program that does nothing")?;
        Ok(Self(Link::attach(program.as_fd(), File::open(cgroup)?, Hook::Connect4)?))
    }
}

#[expect(unsafe_code, reason = "no crate has this system call for a program that is in no file")]
fn load(attributes: &ProgLoad) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads as much as it is told that there is, and what it points to is static.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const *attributes, size_of_val(attributes)) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made it for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
