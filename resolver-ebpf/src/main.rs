//! The eBPF programs: `connect4/6` send connections for intercepted Services to the resolver, `getpeername4/6` let the
//! client go on seeing the address that it dialled.
//!
//! They fail open: whatever is not as expected passes untouched, and the verdict is always "allow". They run per
//! `connect()` and `getpeername()`, never per packet.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
