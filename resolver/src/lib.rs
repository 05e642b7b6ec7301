//! The resolver: on every node it accepts connections to Services that are intercepted, holds them while the target is
//! down, and forwards them as soon as it is up.
//!
//! Reading order: [`directory`] (what the operators said), [`fallback`] (whom to believe when they are silent),
//! [`supervisor`] (makes it so: listeners, redirects, acknowledgements), [`standby`] (what is kept until somebody connects),
//! [`service`] (what the connections of one Service share; [`ports`]), [`listeners`], [`capacity`], [`hold`] and [`forward`] (the life of one connection), [`readiness`] (asks
//! starting pods), [`tracking`] (what is known of connections to pods), [`report`] (what flows back to the operators), [`stream`]
//! (the wire), [`app`] (the wiring), [`config`].
//!
//! One task owns all state; it and the connections talk through watch channels, so nothing queues without bound.

pub mod app;
pub mod balance;
pub mod breaker;
pub mod capacity;
pub mod claims;
pub mod config;
pub mod connection;
pub mod directory;
pub mod draining;
pub mod fallback;
pub mod forward;
pub mod hold;
pub mod http;
pub mod interception;
pub mod listeners;
pub mod metrics;
pub mod ports;
pub mod protocol;
pub mod proxy;
pub mod proxy_protocol;
pub mod readiness;
pub mod redirect;
pub mod report;
pub mod service;
pub mod standby;
pub mod status;
pub mod stream;
pub mod supervisor;
mod sync;
pub mod tracking;
pub mod wake;

#[cfg(test)]
pub(crate) mod testing;
