//! A whole resolver in this process, between a scripted operator (real TLS and HTTP/2) and scripted backends.
//! Needs no privileges.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a failed step fails the test")]

mod backend;
mod bounds;
mod connections;
mod forwarding;
mod handover;
mod http;
mod http2;
mod idle;
mod limits;
mod operator;
mod probes;
mod proxy;
mod redirects;
mod streams;
mod waking;
mod world;
