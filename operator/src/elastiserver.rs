//! The ElastiServer: what resolvers and notifiers talk to.
//!
//! Reading order: [`auth`] (who is it), [`notify`] (the plain HTTP port) with [`crd_cache`], [`stream`] (the TLS port and the streams on
//! it). Every replica serves; nothing here asks who leads.

use std::sync::Arc;

use elasti_api::v1alpha1::ElastiService;
use futures::future::BoxFuture;

pub mod auth;
pub mod crd_cache;
pub mod notify;
pub mod stream;

/// What a notification does.
pub trait Wake: Send + Sync {
    /// A request has come for a Service: its target must run.
    fn wake(&self, namespace: &str, service: &str) -> BoxFuture<'static, WakeAnswer>;

    /// All ElastiServices.
    fn elasti_services(&self) -> Vec<Arc<ElastiService>>;
}

/// What has become of a wake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WakeAnswer {
    /// The target runs or has been told to.
    Accepted,
    /// No ElastiService is about that Service.
    Unknown,
    /// The target could not be told to run, and why.
    Failed(String),
}
