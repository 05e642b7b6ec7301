//! Names, ports and labels: each is written once, here, and a test compares `config/` with it.
//!
//! Those that KubeElasti's users script against are kept as they are; a comment says which.

/// API group of the ElastiService resource, as KubeElasti has it.
pub const GROUP: &str = "elasti.truefoundry.com";

/// Finalizer on every reconciled ElastiService, as KubeElasti has it.
pub const FINALIZER: &str = "elasti.truefoundry.com/finalizer";

/// Namespace of the default installation.
pub const NAMESPACE: &str = "elasti";

/// The operator's Deployment, ServiceAccount, Lease, TLS Secret and headless Service.
pub const OPERATOR: &str = "elasti-operator";

/// Service in front of the operators' notify endpoint, as KubeElasti's chart has it.
pub const OPERATOR_SERVICE: &str = "elasti-operator-controller-service";

/// Headless Service that resolves to every operator replica: resolvers connect to each.
pub const OPERATOR_STREAM_SERVICE: &str = "elasti-operator-stream";

/// The resolver's DaemonSet, ServiceAccount and `app` label.
pub const RESOLVER: &str = "elasti-resolver";

/// ConfigMap with the CA certificates that resolvers trust, under [`CA_KEY`].
pub const CA_CONFIG_MAP: &str = "elasti-ca";

/// Key of the CA bundle in [`CA_CONFIG_MAP`].
pub const CA_KEY: &str = "ca.crt";

/// Secret in which the operator keeps its certificate authorities.
pub const TLS_SECRET: &str = "elasti-operator-tls";

/// Audience of the resolver's projected ServiceAccount token.
pub const TOKEN_AUDIENCE: &str = "elasti-operator";

/// Operator: `POST /informer/incoming-request` and `/metrics`, as KubeElasti has it.
pub const OPERATOR_PORT: u16 = 8013;

/// Operator: liveness and readiness probes, as KubeElasti has it.
pub const OPERATOR_HEALTH_PORT: u16 = 8081;

/// Operator: the resolver stream, TLS.
pub const OPERATOR_STREAM_PORT: u16 = 8014;

/// Resolver: metrics and probes, as KubeElasti has it.
pub const RESOLVER_PORT: u16 = 8013;

/// Resolver: HTTP for those who name a Service by the `Host` header, as KubeElasti has it.
pub const RESOLVER_PROXY_PORT: u16 = 8012;

/// First interception port; below lie the resolver's own: its listeners, and what its pod dials from.
pub const INTERCEPTION_PORT_MIN: u16 = 20_000;

/// Last interception port; above lie those that the kernel uses where nobody sets them aside.
pub const INTERCEPTION_PORT_MAX: u16 = 59_999;

/// Path of KubeElasti's notification: a request has come for a Service at zero.
pub const NOTIFY_PATH: &str = "/informer/incoming-request";

/// Path of KubeElasti's page with every Service and its ElastiService.
pub const CRD_CACHE_PATH: &str = "/crd-cache";

/// Path of the resolver stream on [`OPERATOR_STREAM_PORT`]: one HTTP/2 POST whose bodies stream both ways.
pub const STREAM_PATH: &str = "/resolver/stream";

/// Label by which an EndpointSlice names its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Label by which an EndpointSlice names its controller; Kubernetes leaves slices of other controllers alone.
pub const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";

/// Longest name of a Service (RFC 1035 label).
#[cfg(feature = "crd")]
const SERVICE_NAME_MAX: usize = 63;

/// Longest name of an EndpointSlice (RFC 1123 subdomain).
#[cfg(feature = "crd")]
const SLICE_NAME_MAX: usize = 253;

/// Name of the private Service of a public one, as KubeElasti v0.1.30 builds it.
#[cfg(feature = "crd")]
pub fn private_service(service: &str) -> String {
    derived(service, "pvt", SERVICE_NAME_MAX)
}

/// Name of the resolver slice of a public Service, as KubeElasti v0.1.30 builds it. The IPv4 slice bears this name;
/// the IPv6 slice adds `-ipv6`, since a slice holds one address family.
#[cfg(feature = "crd")]
pub fn resolver_slice(service: &str, ipv6: bool) -> String {
    const IPV6_SUFFIX: &str = "-ipv6";
    let name = derived(service, "endpointslice-to-resolver", SLICE_NAME_MAX - IPV6_SUFFIX.len());
    if ipv6 { name + IPV6_SUFFIX } else { name }
}

/// `elasti-<service>-<purpose>-<hash>`: the hash is over the whole name, so that a shortened one stays unique.
#[cfg(feature = "crd")]
fn derived(service: &str, purpose: &str, max: usize) -> String {
    use sha2::{Digest, Sha256};
    use std::fmt::Write;

    const HASH_BYTES: usize = 5;
    let mut hash = String::with_capacity(HASH_BYTES * 2);
    for byte in &Sha256::digest(service)[..HASH_BYTES] {
        // Writing to a String cannot fail.
        let _ok = write!(hash, "{byte:02x}");
    }
    let room = max - "elasti---".len() - purpose.len() - hash.len();
    // Names of Services are ASCII; a caller's other text is cut at a character boundary.
    let cut = (0..=room.min(service.len())).rev().find(|at| service.is_char_boundary(*at)).unwrap_or(0);
    let stem = service[..cut].trim_end_matches('-');
    format!("elasti-{stem}-{purpose}-{hash}")
}

#[cfg(all(test, feature = "crd"))]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_kubeelasti() {
        assert_eq!(private_service("target-deployment"), "elasti-target-deployment-pvt-9696239e87");
        assert_eq!(private_service("target-statefulset"), "elasti-target-statefulset-pvt-ff3e71892b");
        assert_eq!(resolver_slice("target-grpc", false), "elasti-target-grpc-endpointslice-to-resolver-849ec905b5");
    }

    #[test]
    fn long_names_fit_and_stay_unique() {
        let (a, b) = ("a".repeat(63), "a".repeat(62) + "b");
        assert_eq!(private_service(&a).len(), SERVICE_NAME_MAX);
        assert_ne!(private_service(&a), private_service(&b));
        let dashed = "a".repeat(30) + "--x--------------";
        assert!(private_service(&dashed).contains("x-pvt-"), "{}", private_service(&dashed));
    }
}
