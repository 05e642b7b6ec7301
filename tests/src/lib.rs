//! The harness of the cross-crate tests: network namespaces, a real API server, a whole cluster.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a harness fails loudly"
)]

pub mod api;
pub mod bpf;
pub mod cluster;
pub mod cycles;
pub mod faults;
pub mod kubeelasti;
pub mod load;
pub mod monitoring;
pub mod netns;
