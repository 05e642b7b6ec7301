//! The proof: Services go to zero and come again, over and over, while real clients call them; no request may be lost.
//!
//! `cargo xtask test --only cycles` sets it up; `tests/tests/cycles.rs` runs it. [`run::Run`] owns a run, [`timeline`]
//! judges, [`report`] counts.

pub mod clients;
pub mod cycle;
pub mod report;
pub mod run;
pub mod timeline;
pub mod triggers;
pub mod watch;
