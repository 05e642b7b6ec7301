//! What the operator is set to, as far as plans depend on it. Made from the configuration by [`crate::app`].

use std::time::Duration;

use elasti_api::message::HoldPolicy;

/// What the operator is set to.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How long kube-proxy may take to act upon a changed slice.
    pub kube_proxy_sync: Duration,
    /// How often triggers are asked.
    pub polling_interval: Duration,
    /// The most resolvers in a slice, unless a `Local` traffic policy needs all.
    pub max_slice_endpoints: usize,
    /// How connections are held where an ElastiService does not say.
    pub hold: HoldPolicy,
}
