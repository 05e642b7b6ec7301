//! What an ill-disposed neighbour can do to eBPF programs: root alone, on the machine itself.

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Commands of bpf(2), from `enum bpf_cmd` in linux/bpf.h.
const BPF_LINK_GET_FD_BY_ID: i32 = 30;
const BPF_LINK_GET_NEXT_ID: i32 = 31;
const BPF_LINK_DETACH: i32 = 34;

/// Detaches every program that is linked to a cgroup, as `bpftool link detach` would, and returns how many there were.
/// Their owners go on holding the links.
pub fn detach_programs(cgroup: &Path) -> usize {
    let number = std::fs::metadata(cgroup).expect("the cgroup is there").ino().to_string();
    let mut attributes = [0; 2];
    let mut detached = 0;
    while bpf(BPF_LINK_GET_NEXT_ID, &mut attributes).is_ok() {
        attributes[0] = attributes[1];
        let mut id = [attributes[0]];
        // A link that has gone meanwhile is nobody's.
        let Ok(fd) = bpf(BPF_LINK_GET_FD_BY_ID, &mut id) else { continue };
        // SAFETY: the kernel has just made it for us alone.
        #[expect(unsafe_code, reason = "a descriptor from a system call")]
        let link = unsafe { OwnedFd::from_raw_fd(fd) };
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd())).unwrap_or_default();
        let on = told.lines().find_map(|line| line.strip_prefix("cgroup_id:")).unwrap_or_default();
        if on.trim() == number {
            let mut fd = [link.as_raw_fd().cast_unsigned()];
            bpf(BPF_LINK_DETACH, &mut fd).expect("a link can be detached");
            detached += 1;
        }
    }
    detached
}

/// The system call; the kernel takes fields of `union bpf_attr` that are not there for zero.
fn bpf<const FIELDS: usize>(command: i32, attributes: &mut [u32; FIELDS]) -> Result<i32, Error> {
    // SAFETY: the kernel reads and writes no more than it is told that there is.
    #[expect(unsafe_code, reason = "no crate has this system call")]
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(Error::last_os_error)
}
