//! Flags and environment of the operator, turned into typed values. Everything that can be set is here.

use std::fmt;
use std::time::Duration;

use clap::Parser;
use elasti_api::message::HoldPolicy;
use elasti_api::names;
use elasti_api::v1alpha1::duration;
use elasti_runtime::config::Faults;
use elasti_runtime::reporting::Reporting;
use elasti_runtime::telemetry::{Format, Level};

use crate::slices::ENDPOINTS_MAX;

/// Puts idle targets to sleep, wakes them, and tells the resolvers.
///
/// Every flag can be given as environment variable too: `--operator-port` is `ELASTI_OPERATOR_PORT`. Names of `KubeElasti`
/// without that prefix are kept: `KUBERNETES_CLUSTER_DOMAIN`, `POLLING_INTERVAL`,
/// `WATCH_NAMESPACES`, `SENTRY_*`, `PROMETHEUS_TRIGGER_*`, and of its resolver `REQ_TIMEOUT`, `QUEUE_SIZE` and `MAX_QUEUE_CONCURRENCY`.
#[derive(Parser)]
#[command(name = names::OPERATOR, version)]
pub struct Arguments {
    /// Namespace of this pod; Lease, CA and the Services in front of the operator are there.
    #[arg(long, default_value = names::NAMESPACE)]
    operator_namespace: String,
    /// Name of this pod, unique among the replicas.
    #[arg(long, default_value = "")]
    pod_name: String,
    /// Port for notifications and metrics.
    #[arg(long, default_value_t = names::OPERATOR_PORT.to_string())]
    operator_port: String,
    /// Port for probes and the log level.
    #[arg(long, default_value_t = names::OPERATOR_HEALTH_PORT.to_string())]
    health_port: String,
    /// Port for the resolvers' streams.
    #[arg(long, default_value_t = names::OPERATOR_STREAM_PORT.to_string())]
    stream_port: String,
    /// Headless Service in front of the streams: its names are in the certificate.
    #[arg(long, default_value = names::OPERATOR_STREAM_SERVICE)]
    stream_service_name: String,
    /// Domain of the cluster's DNS.
    #[arg(long, env = "KUBERNETES_CLUSTER_DOMAIN", default_value = "cluster.local")]
    kubernetes_cluster_domain: String,
    /// Namespace of the resolvers; that of the operator if empty.
    #[arg(long, default_value = "")]
    resolver_namespace: String,
    /// ServiceAccounts that may open streams and send notifications, as namespace:name, separated by commas; the
    /// resolvers' own if empty.
    #[arg(long, default_value = "")]
    allowed_service_accounts: String,
    /// Answer notifications that bear no token, as KubeElasti does: whoever reaches the port can wake any target.
    #[arg(long)]
    notify_without_token: bool,
    /// Namespaces whose ElastiServices are looked after, separated by commas; all if empty. config/watched grants one.
    #[arg(long, env = "WATCH_NAMESPACES", default_value = "")]
    watch_namespaces: String,
    /// Name of the Lease that the replicas elect their leader by.
    #[arg(long, default_value = names::OPERATOR)]
    lease_name: String,
    /// How often triggers are asked.
    #[arg(long, env = "POLLING_INTERVAL", default_value = "30s")]
    polling_interval: String,
    /// How long kube-proxy may take to act upon a changed EndpointSlice: its --iptables-min-sync-period (1s by
    /// default) and as long again for the sync itself.
    #[arg(long, default_value = "2s")]
    kube_proxy_sync: String,
    /// How long a connection is held where its ElastiService does not say: seconds, or a duration such as 10m.
    #[arg(long, env = "REQ_TIMEOUT", default_value = "10m")]
    req_timeout: String,
    /// How many connections one resolver holds for a Service whose ElastiService does not say.
    #[arg(long, env = "QUEUE_SIZE", default_value_t = HoldPolicy::DEFAULT.max_connections.to_string())]
    queue_size: String,
    /// How many connections, or requests of HTTP, one resolver has open to a ready pod at once where the ElastiService does
    /// not say; as spec.hold.concurrency says if empty.
    #[arg(long, env = "MAX_QUEUE_CONCURRENCY", default_value = "")]
    max_queue_concurrency: String,
    /// The most resolvers in one EndpointSlice, unless a Local traffic policy needs all.
    #[arg(long, default_value = "16")]
    max_slice_endpoints: String,
    /// Prometheus for triggers that name no server.
    #[arg(long, env = "PROMETHEUS_TRIGGER_SERVER_ADDRESS", default_value = "")]
    prometheus_trigger_server_address: String,
    /// Authorization header for that server. Better given by environment: other users of the node can see flags.
    #[arg(long, env = "PROMETHEUS_TRIGGER_AUTHORIZATION_HEADER", default_value = "", hide_env_values = true)]
    prometheus_trigger_authorization_header: String,
    /// Sentry server that errors are told, as its DSN; none if empty. Better given by environment: it holds a key.
    #[arg(long, env = "SENTRY_DSN", default_value = "", hide_env_values = true)]
    sentry_dsn: String,
    /// Environment that these errors are told to come from.
    #[arg(long, env = "SENTRY_ENVIRONMENT", default_value = "")]
    sentry_environment: String,
    /// Log lines: text or json.
    #[arg(long, default_value = "text")]
    log_format: String,
    /// What is logged: a level, or directives such as `elasti_operator=debug,info`.
    #[arg(long, default_value = "info")]
    log_level: String,
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "(none)" } else { "(hidden)" })
    }
}

/// The configuration in force. Its `Debug` form is fit for logs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Namespace of this pod.
    pub namespace: String,
    /// Name of this pod.
    pub pod_name: String,
    /// Port for notifications and metrics; 0 for any.
    pub port: u16,
    /// Port for probes; 0 for any.
    pub health_port: u16,
    /// Port for streams; 0 for any.
    pub stream_port: u16,
    /// Service in front of the streams.
    pub stream_service_name: String,
    /// Domain of the cluster's DNS.
    pub cluster_domain: String,
    /// ServiceAccounts that may connect, as `namespace:name`.
    pub allowed_service_accounts: Vec<String>,
    /// Whether notifications need no token.
    pub notify_without_token: bool,
    /// Namespaces that are looked after; all if empty. Sorted, none twice.
    pub watch_namespaces: Vec<String>,
    /// Name of the Lease.
    pub lease_name: String,
    /// How often triggers are asked.
    pub polling_interval: Duration,
    /// How long kube-proxy may take.
    pub kube_proxy_sync: Duration,
    /// How connections are held where an ElastiService does not say.
    pub hold: HoldPolicy,
    /// The most resolvers in one slice; at least 1.
    pub max_slice_endpoints: usize,
    /// Prometheus for triggers that name no server.
    pub prometheus_server_address: Option<String>,
    /// Authorization header for that server.
    pub prometheus_authorization: Secret,
    /// Who is told of errors.
    pub reporting: Option<Reporting>,
    /// How log lines look.
    pub log_format: Format,
    /// What is logged.
    pub log_level: Level,
}

/// The longest that a connection may be held.
const HOLD_TIMEOUT_MAX: Duration = Duration::from_hours(24);

impl Config {
    /// Checks everything and reports every fault.
    pub fn new(arguments: &Arguments) -> Result<Self, Faults> {
        let mut faults = Faults::default();
        let namespace = faults.required("--operator-namespace", &arguments.operator_namespace);
        let resolver_namespace = match arguments.resolver_namespace.trim() {
            "" => namespace.as_str(),
            other => other,
        };
        let config = Self {
            allowed_service_accounts: accounts(arguments, resolver_namespace, &mut faults),
            pod_name: faults.required("--pod-name", &arguments.pod_name),
            port: faults.parse("--operator-port", &arguments.operator_port).unwrap_or_default(),
            health_port: faults.parse("--health-port", &arguments.health_port).unwrap_or_default(),
            stream_port: faults.parse("--stream-port", &arguments.stream_port).unwrap_or_default(),
            stream_service_name: faults.required("--stream-service-name", &arguments.stream_service_name),
            cluster_domain: faults.required("--kubernetes-cluster-domain", &arguments.kubernetes_cluster_domain),
            notify_without_token: arguments.notify_without_token,
            watch_namespaces: namespaces(&arguments.watch_namespaces, &mut faults),
            lease_name: faults.required("--lease-name", &arguments.lease_name),
            polling_interval: time("--polling-interval", &arguments.polling_interval, &mut faults),
            kube_proxy_sync: time("--kube-proxy-sync", &arguments.kube_proxy_sync, &mut faults),
            hold: hold(arguments, &mut faults),
            max_slice_endpoints: max_slice_endpoints(&arguments.max_slice_endpoints, &mut faults),
            prometheus_server_address: server_address(&arguments.prometheus_trigger_server_address, &mut faults),
            prometheus_authorization: Secret(arguments.prometheus_trigger_authorization_header.trim().to_owned()),
            reporting: Reporting::new(&arguments.sentry_dsn, &arguments.sentry_environment).unwrap_or_else(|error| {
                // The value is not told: it may hold a key.
                faults.add("--sentry-dsn", error);
                None
            }),
            log_format: faults.parse("--log-format", &arguments.log_format).unwrap_or(Format::Text),
            log_level: faults.parse("--log-level", &arguments.log_level).unwrap_or_default(),
            namespace,
        };
        let mut ports = [config.port, config.health_port, config.stream_port];
        ports.sort_unstable();
        if ports.windows(2).any(|pair| pair[0] == pair[1] && pair[0] != 0) {
            faults.add("--operator-port, --health-port, --stream-port", "must differ");
        }
        faults.finish(config)
    }
}

fn accounts(arguments: &Arguments, resolver_namespace: &str, faults: &mut Faults) -> Vec<String> {
    const FLAG: &str = "--allowed-service-accounts";
    let accounts: Vec<String> = faults.parse_list(FLAG, &arguments.allowed_service_accounts);
    for account in &accounts {
        if !matches!(account.split_once(':'), Some((namespace, name)) if !namespace.is_empty() && !name.is_empty()) {
            faults.add(FLAG, format_args!("'{account}' must be namespace:name"));
        }
    }
    if accounts.is_empty() { vec![format!("{resolver_namespace}:{}", names::RESOLVER)] } else { accounts }
}

fn namespaces(text: &str, faults: &mut Faults) -> Vec<String> {
    const FLAG: &str = "--watch-namespaces";
    let mut namespaces: Vec<String> = faults.parse_list(FLAG, text);
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    for namespace in &namespaces {
        if !namespace.bytes().all(allowed) {
            faults.add(FLAG, format_args!("'{namespace}' is no name of a namespace"));
        }
    }
    namespaces.sort();
    namespaces.dedup();
    namespaces
}

/// A Go duration above zero.
fn time(flag: &str, text: &str, faults: &mut Faults) -> Duration {
    duration(text.trim()).unwrap_or_else(|| {
        faults.add(flag, format_args!("'{text}' must be a duration above zero, such as 30s or 1m30s"));
        Duration::default()
    })
}

/// Bounded as the same fields of an ElastiService are.
fn hold(arguments: &Arguments, faults: &mut Faults) -> HoldPolicy {
    const TIMEOUT: &str = "--req-timeout";
    let text = arguments.req_timeout.trim();
    let timeout = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => time(TIMEOUT, text, faults),
    };
    if timeout.is_zero() || timeout > HOLD_TIMEOUT_MAX {
        faults.add(TIMEOUT, format_args!("'{text}' must be above zero and at most 24h"));
    }
    let mut number = |flag, text: &str, most: u32| {
        let number = faults.parse(flag, text).unwrap_or(1);
        if !(1..=most).contains(&number) {
            faults.add(flag, format_args!("{number} must be 1 to {most}"));
        }
        number
    };
    HoldPolicy {
        timeout,
        max_connections: number("--queue-size", &arguments.queue_size, 1_000_000),
        concurrency: match arguments.max_queue_concurrency.trim() {
            "" => None,
            text => Some(number("--max-queue-concurrency", text, 100_000)),
        },
        ..HoldPolicy::DEFAULT
    }
}

fn max_slice_endpoints(text: &str, faults: &mut Faults) -> usize {
    const FLAG: &str = "--max-slice-endpoints";
    let number = faults.parse(FLAG, text).unwrap_or(1);
    if !(1..=ENDPOINTS_MAX).contains(&number) {
        faults.add(FLAG, format_args!("{number} must be 1 to {ENDPOINTS_MAX}, which a slice holds at the most"));
    }
    number
}

fn server_address(text: &str, faults: &mut Faults) -> Option<String> {
    const FLAG: &str = "--prometheus-trigger-server-address";
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    let uri: Option<http::Uri> = faults.parse(FLAG, text);
    if uri.is_some_and(|uri| !matches!(uri.scheme_str(), Some("http" | "https"))) {
        faults.add(FLAG, format_args!("'{text}' must start with http:// or https://"));
    }
    Some(text.to_owned())
}

#[cfg(test)]
mod tests;
