//! The operator against a real API server, with its real permissions; nothing else of Kubernetes runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod admission;
mod autoscalers;
mod faults;
mod interception;
mod monitoring;
mod namespaces;
mod outages;
mod removal;
mod replicas;
mod targets;
mod triggers;
mod wake;
