//! Flags and environment of the resolver, turned into typed values. Everything that can be set is here.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use elasti_api::names;
use elasti_runtime::config::Faults;
use elasti_runtime::reporting::Reporting;
use elasti_runtime::telemetry::{Format, Level};
use http::HeaderName;

use crate::capacity::Limits;
use crate::fallback::Patience;

/// Holds connections to Services whose target is down, and forwards them when it is up.
///
/// Every flag can be given as environment variable too: `--pod-ips` is `ELASTI_POD_IPS`.
#[derive(Parser)]
#[command(name = names::RESOLVER, version)]
pub struct Arguments {
    /// Operators' stream, as host:port. The host must resolve to every replica, and be named in their certificate.
    #[arg(long, default_value_t = format!("{}.{}.svc:{}", names::OPERATOR_STREAM_SERVICE, names::NAMESPACE, names::OPERATOR_STREAM_PORT))]
    operator: String,
    /// PEM bundle of the CAs that may sign the operators' certificate.
    #[arg(long, default_value = "/etc/elasti/ca/ca.crt")]
    ca_file: String,
    /// ServiceAccount token for the operators.
    #[arg(long, default_value = "/var/run/secrets/elasti/token")]
    token_file: String,
    /// Name of this pod.
    #[arg(long, default_value = "")]
    pod: String,
    /// Name of its node.
    #[arg(long, default_value = "")]
    node: String,
    /// Addresses of this pod, separated by commas.
    #[arg(long, default_value = "")]
    pod_ips: String,
    /// Port for probes, metrics and the log level.
    #[arg(long, default_value_t = names::RESOLVER_PORT.to_string())]
    resolver_port: String,
    /// Port for HTTP requests that name a Service of an ElastiService by their host.
    #[arg(long, default_value_t = names::RESOLVER_PROXY_PORT.to_string())]
    resolver_proxy_port: String,
    /// Header by which requests to that port name the Service; Host where they do not have it, or if empty.
    #[arg(long, env = "HEADER_FOR_HOST", default_value = "X-Envoy-Decorator-Operation")]
    header_for_host: String,
    /// Domain of the cluster's DNS.
    #[arg(long, env = "KUBERNETES_CLUSTER_DOMAIN", default_value = "cluster.local")]
    kubernetes_cluster_domain: String,
    /// Whether eBPF redirects connections on the node: auto (where kernel and permissions allow it) or off.
    #[arg(long, default_value = "auto")]
    ebpf: String,
    /// Where the host's cgroup hierarchies are mounted in this container
    #[arg(long, default_value = "/host-cgroup")]
    cgroup: String,
    /// Names of processes outside of pods whose connections to pods are no traffic, separated by commas: kubelet under its names.
    #[arg(long, default_value = "kubelet,k3s-server,k3s-agent,k3s,kubelite,hyperkube")]
    probers: String,
    /// How many seconds connections get to end once the resolver is asked to stop; it stops as soon as there are none.
    #[arg(long, default_value = "600")]
    drain_timeout: String,
    /// How many milliseconds pass between two questions to a starting pod whether it is ready, from 1 to 1000; 0: kubelet
    /// alone asks.
    #[arg(long, default_value = "10")]
    probe_interval: String,
    /// Sentry server that errors are told, as its DSN; none if empty. Better given by environment: it holds a key.
    #[arg(long, env = "SENTRY_DSN", default_value = "", hide_env_values = true)]
    sentry_dsn: String,
    /// Environment that these errors are told to come from.
    #[arg(long, env = "SENTRY_ENVIRONMENT", default_value = "")]
    sentry_environment: String,
    /// Log lines: text or json.
    #[arg(long, default_value = "text")]
    log_format: String,
    /// What is logged: a level, or directives such as `elasti_resolver=debug,info`.
    #[arg(long, default_value = "info")]
    log_level: String,
}

/// The configuration in force.
#[derive(Clone, Debug)]
pub struct Config {
    /// Host of the operators' stream.
    pub operator_host: String,
    /// Port of the operators' stream.
    pub operator_port: u16,
    /// PEM bundle of CAs.
    pub ca_file: PathBuf,
    /// ServiceAccount token.
    pub token_file: PathBuf,
    /// Name of this pod.
    pub pod: String,
    /// Name of its node.
    pub node: String,
    /// Addresses of this pod, one per family at most.
    pub pod_ips: Vec<IpAddr>,
    /// Port for probes and metrics; 0 for any.
    pub resolver_port: u16,
    /// Port for HTTP requests that name a Service; 0 for any.
    pub proxy_port: u16,
    /// Header by which they name it.
    pub header_for_host: Option<HeaderName>,
    /// Domain of the cluster's DNS.
    pub cluster_domain: String,
    /// Whether to redirect by eBPF where possible.
    pub ebpf: bool,
    /// Where the host's cgroup hierarchies are mounted.
    pub cgroup: PathBuf,
    /// Names of processes outside of pods whose connections to pods are no traffic.
    pub probers: Vec<String>,
    /// How long connections get to end.
    pub drain_timeout: Duration,
    /// The time between two questions to a starting pod; zero: it is not asked.
    pub probe_interval: Duration,
    /// Who is told of errors.
    pub reporting: Option<Reporting>,
    /// How log lines look.
    pub log_format: Format,
    /// What is logged.
    pub log_level: Level,
    /// When to believe whom; no flag, for tests.
    pub patience: Patience,
    /// What connections may use; what the system allows if absent. No flag, for tests.
    pub limits: Option<Limits>,
}

impl Config {
    /// Checks everything and reports every fault.
    pub fn new(arguments: &Arguments) -> Result<Self, Faults> {
        let mut faults = Faults::default();
        let (operator_host, operator_port) = operator(&arguments.operator, &mut faults);
        let config = Self {
            operator_host,
            operator_port,
            ca_file: faults.required("--ca-file", &arguments.ca_file).into(),
            token_file: faults.required("--token-file", &arguments.token_file).into(),
            pod: faults.required("--pod", &arguments.pod),
            node: faults.required("--node", &arguments.node),
            pod_ips: pod_ips(&arguments.pod_ips, &mut faults),
            resolver_port: faults.parse("--resolver-port", &arguments.resolver_port).unwrap_or_default(),
            proxy_port: faults.parse("--resolver-proxy-port", &arguments.resolver_proxy_port).unwrap_or_default(),
            header_for_host: match arguments.header_for_host.trim() {
                "" => None,
                header => faults.parse("--header-for-host", header),
            },
            cluster_domain: faults.required("--kubernetes-cluster-domain", &arguments.kubernetes_cluster_domain),
            ebpf: ebpf(&arguments.ebpf, &mut faults),
            cgroup: arguments.cgroup.trim().into(),
            probers: arguments
                .probers
                .split(',')
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .map(Into::into)
                .collect(),
            drain_timeout: Duration::from_secs(
                // Kept within a day, so that no sum of times overflows.
                faults.parse::<u32>("--drain-timeout", &arguments.drain_timeout).unwrap_or_default().min(86_400).into(),
            ),
            probe_interval: probe_interval(&arguments.probe_interval, &mut faults),
            reporting: Reporting::new(&arguments.sentry_dsn, &arguments.sentry_environment).unwrap_or_else(|error| {
                // The value is not told: it may hold a key.
                faults.add("--sentry-dsn", error);
                None
            }),
            log_format: faults.parse("--log-format", &arguments.log_format).unwrap_or(Format::Text),
            log_level: faults.parse("--log-level", &arguments.log_level).unwrap_or_default(),
            patience: Patience::default(),
            limits: None,
        };
        faults.finish(config)
    }
}

/// `host:port`, or `[address]:port` for IPv6.
fn operator(text: &str, faults: &mut Faults) -> (String, u16) {
    const FLAG: &str = "--operator";
    let Some((host, port)) = text.trim().rsplit_once(':') else {
        faults.add(FLAG, format_args!("'{text}' must be host:port"));
        return (String::new(), 0);
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() {
        faults.add(FLAG, format_args!("'{text}' names no host"));
    }
    (host.to_owned(), faults.parse(FLAG, port).unwrap_or_default())
}

fn pod_ips(text: &str, faults: &mut Faults) -> Vec<IpAddr> {
    const FLAG: &str = "--pod-ips";
    let before = text.split(',').filter(|item| !item.trim().is_empty()).count();
    let addresses: Vec<IpAddr> = faults.parse_list(FLAG, text);
    if before == 0 {
        faults.add(FLAG, "is required: status.podIPs of the downward API");
    }
    for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        if addresses.iter().filter(|address| family(address)).count() > 1 {
            faults.add(FLAG, format_args!("'{text}' has two addresses of one family"));
        }
    }
    addresses
}

fn probe_interval(text: &str, faults: &mut Faults) -> Duration {
    const FLAG: &str = "--probe-interval";
    let millis: u64 = faults.parse(FLAG, text).unwrap_or_default();
    if millis > 1000 {
        faults.add(FLAG, format_args!("'{text}' must be milliseconds, at most 1000"));
    }
    Duration::from_millis(millis)
}

fn ebpf(text: &str, faults: &mut Faults) -> bool {
    if !["auto", "off"].contains(&text) {
        faults.add("--ebpf", format_args!("'{text}' must be 'auto' or 'off'"));
    }
    text == "auto"
}

#[cfg(test)]
mod tests {
    use elasti_api::message::HoldPolicy;

    use super::*;

    fn config(arguments: &[&str]) -> Result<Config, Faults> {
        let arguments = ["elasti-resolver"].iter().chain(arguments).map(std::ffi::OsString::from);
        Config::new(&elasti_runtime::config::parse(arguments).unwrap())
    }

    #[test]
    fn the_defaults_are_those_of_the_installation() {
        let config = config(&["--pod=p", "--node=n", "--pod-ips=10.244.0.3,fd00::3"]).unwrap();
        assert_eq!((&*config.operator_host, config.operator_port), ("elasti-operator-stream.elasti.svc", 8014));
        assert_eq!((config.resolver_port, config.ebpf, config.cgroup), (8013, true, "/host-cgroup".into()));
        assert_eq!(config.drain_timeout, HoldPolicy::default().timeout, "a held connection outlives a rollout");
        assert_eq!(config.pod_ips.len(), 2);
        assert_eq!(config.probers[0], "kubelet");
    }

    #[test]
    fn every_fault_is_told_at_once() {
        let faulty = [
            "--operator=x",
            "--pod-ips=10.0.0.1,10.0.0.2",
            "--ebpf=on",
            "--resolver-port=-1",
            "--log-format=xml",
            "--probe-interval=10s",
        ];
        let told = config(&faulty.map(|flag| flag)).unwrap_err().to_string();
        for flag in [
            "--operator",
            "--pod:",
            "--node",
            "--pod-ips",
            "--ebpf",
            "--resolver-port",
            "--log-format",
            "--probe-interval",
        ] {
            assert!(told.contains(flag), "{flag} in {told}");
        }
    }

    #[test]
    fn an_operator_may_be_an_ipv6_address() {
        let mut faults = Faults::default();
        assert_eq!(operator("[fd00::1]:8014", &mut faults), ("fd00::1".to_owned(), 8014));
        assert_eq!(faults, Faults::default());
    }
}
