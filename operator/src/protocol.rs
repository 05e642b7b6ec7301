//! What is spoken on a Service port, as far as anybody has said: the ElastiService, else the Service port's
//! `appProtocol`, else its name. Pure; [`crate::plan`] tells it to resolvers, which find out the rest.

use elasti_api::message::Protocol;
use elasti_api::v1alpha1::{ElastiServiceSpec, PortSpec};

use crate::observed::ServicePort;

/// Words that mean HTTP without TLS: Kubernetes' standard names (KEP-3726), IANA's, and those that meshes have in port names.
const HTTP: [&str; 8] =
    ["http", "http2", "h2c", "grpc", "grpc-web", "kubernetes.io/h2c", "kubernetes.io/ws", "kubernetes.io/http"];

/// Words that mean something else, from the same sources.
const TCP: [&str; 15] = [
    "tcp",
    "tls",
    "https",
    "kubernetes.io/wss",
    "amqp",
    "kafka",
    "ldap",
    "mongo",
    "mongodb",
    "mqtt",
    "mysql",
    "postgres",
    "postgresql",
    "redis",
    "ssh",
];

/// What `spec` says of the port with this number.
pub fn port_spec(spec: &ElastiServiceSpec, port: u16) -> Option<&PortSpec> {
    spec.ports.iter().flatten().find(|spec| spec.port == port)
}

/// What is spoken on `port`.
pub fn protocol(spec: &ElastiServiceSpec, port: &ServicePort) -> Protocol {
    match port_spec(spec, port.port).and_then(|spec| spec.protocol.as_deref()) {
        Some("http") => return Protocol::Http,
        Some("tcp") => return Protocol::Tcp,
        Some(_) => return Protocol::Auto,
        None => {}
    }
    // A port may be named `grpc` or `grpc-internal`: the word before the dash counts, as meshes read it.
    let name = port.name.to_ascii_lowercase();
    let prefix = name.split('-').next().unwrap_or_default();
    let said = port.app_protocol.as_deref().map(str::to_ascii_lowercase);
    let word = said.as_deref().unwrap_or(prefix);
    if HTTP.contains(&word) {
        Protocol::Http
    } else if TCP.contains(&word) {
        Protocol::Tcp
    } else {
        Protocol::Auto
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spoken(name: &str, app_protocol: Option<&str>, field: Option<&str>) -> Protocol {
        let spec = ElastiServiceSpec {
            ports: Some(vec![PortSpec { port: 80, protocol: field.map(str::to_owned), ..PortSpec::default() }]),
            ..ElastiServiceSpec::default()
        };
        let port = ServicePort { name: name.into(), port: 80, app_protocol: app_protocol.map(str::to_owned) };
        protocol(&spec, &port)
    }

    #[test]
    fn the_field_comes_before_app_protocol_and_that_before_the_name() {
        assert_eq!(spoken("redis", Some("h2c"), Some("tcp")), Protocol::Tcp);
        assert_eq!(spoken("redis", Some("h2c"), Some("auto")), Protocol::Auto);
        assert_eq!(spoken("redis", Some("kubernetes.io/h2c"), None), Protocol::Http);
        assert_eq!(spoken("redis", None, None), Protocol::Tcp);
        assert_eq!(spoken("gRPC-internal", None, None), Protocol::Http);
    }

    #[test]
    fn unknown_words_say_nothing() {
        assert_eq!(spoken("", None, None), Protocol::Auto);
        assert_eq!(spoken("metrics", None, None), Protocol::Auto);
        assert_eq!(spoken("http", Some("example.com/own"), None), Protocol::Auto);
    }
}
