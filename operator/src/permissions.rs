//! What the operator may ask of the Kubernetes API, and which module does.
//!
//! `config/rbac` grants exactly this: a test compares the two in both directions. A request that is missing here is refused
//! in a real cluster; one that nobody makes any more is to be taken out. Server-side apply of an object that may not exist
//! is `patch` and `create`. Two are granted by users, where they want it: `idleness::secrets` gets the Secrets that triggers
//! name; `caches::others` lists and watches other kinds of targets and gets their `/scale`, which `target` patches.

use elasti_api::names::{CA_CONFIG_MAP, GROUP, OPERATOR, TLS_SECRET};

/// Where something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In the operator's own namespace.
    Own,
    /// In the namespaces that it looks after: all, or those of `--watch-namespaces`.
    Watched,
    /// With objects of no namespace.
    Cluster,
}

/// Requests of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Where.
    pub scope: Scope,
    /// API group; empty for the core group.
    pub group: &'static str,
    /// Resource, or `resource/subresource`.
    pub resource: &'static str,
    /// The one object; absent: any. RBAC knows no names for `create`.
    pub object: Option<&'static str>,
    /// What is done.
    pub verbs: &'static [&'static str],
}

const fn watched(group: &'static str, resource: &'static str, verbs: &'static [&'static str]) -> Permission {
    Permission { scope: Scope::Watched, group, resource, object: None, verbs }
}

const fn own(
    group: &'static str,
    resource: &'static str,
    object: Option<&'static str>,
    verbs: &'static [&'static str],
) -> Permission {
    Permission { scope: Scope::Own, group, resource, object, verbs }
}

/// Every request that the operator makes.
pub const PERMISSIONS: &[Permission] = &[
    // caches::watch, what decisions are made from; controller::port_book lists once more, uncached, before it allocates.
    watched(GROUP, "elastiservices", &["list", "watch"]),
    watched("", "services", &["list", "watch"]),
    watched("discovery.k8s.io", "endpointslices", &["list", "watch"]),
    watched("apps", "deployments", &["list", "watch"]),
    watched("apps", "statefulsets", &["list", "watch"]),
    watched("argoproj.io", "rollouts", &["list", "watch"]),
    watched("autoscaling", "horizontalpodautoscalers", &["list", "watch"]),
    watched("keda.sh", "scaledobjects", &["list", "watch"]),
    // controller::apply: KEDA's pause.
    watched("keda.sh", "scaledobjects", &["patch"]),
    // controller::apply: finalizer and status.
    watched(GROUP, "elastiservices", &["patch"]),
    watched(GROUP, "elastiservices/status", &["patch"]),
    // controller::apply: the private Service and the resolvers' slices.
    watched("", "services", &["create", "patch", "delete"]),
    watched("discovery.k8s.io", "endpointslices", &["create", "patch", "delete"]),
    // The same: OpenShift asks for this of whoever writes a slice with addresses of pods.
    watched("discovery.k8s.io", "endpointslices/restricted", &["create"]),
    // target: wake and sleep.
    watched("apps", "deployments/scale", &["get", "patch"]),
    watched("apps", "statefulsets/scale", &["get", "patch"]),
    watched("argoproj.io", "rollouts/scale", &["get", "patch"]),
    // controller::apply: why a target does not get ready, asked only when it takes long; pods: when one is
    // waited for; sources: those that triggers ignore.
    watched("", "pods", &["list", "watch"]),
    // controller: events; a repeated one is patched into a series.
    watched("events.k8s.io", "events", &["create", "patch"]),
    // elastiserver::auth: the resolvers' tokens.
    Permission {
        scope: Scope::Cluster,
        group: "authentication.k8s.io",
        resource: "tokenreviews",
        object: None,
        verbs: &["create"],
    },
    // leader.
    own("coordination.k8s.io", "leases", None, &["create"]),
    own("coordination.k8s.io", "leases", Some(OPERATOR), &["get", "update"]),
    // certificates::store: the CAs, and what resolvers get to see of them.
    own("", "secrets", None, &["create"]),
    own("", "secrets", Some(TLS_SECRET), &["get", "update"]),
    own("", "configmaps", None, &["create"]),
    own("", "configmaps", Some(CA_CONFIG_MAP), &["get", "update"]),
];
