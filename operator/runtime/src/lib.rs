//! What both programs need to run. Reading order: [`config`] (flags, all faults at once), [`telemetry`] (logs),
//! [`shutdown`] (signals), [`limits`], [`http`] (a small HTTP/1 server), [`admin`] (probes, metrics and log level on it).
//!
//! Nothing here knows of Kubernetes or of ElastiServices.

pub mod admin;
pub mod config;
pub mod http;
pub mod limits;
pub mod reporting;
pub mod shutdown;
pub mod telemetry;
