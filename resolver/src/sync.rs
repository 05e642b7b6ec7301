//! The locks and counts that connections of one Service share. `examples/interleavings.rs` puts a checker's in their place,
//! which tries the orders in which threads can meet.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};
pub(crate) use std::sync::{Mutex, MutexGuard};
