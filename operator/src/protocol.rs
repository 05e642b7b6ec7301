//! What is spoken on a Service port, as far as anybody has said: the ElastiService, else the Service port's
//! `appProtocol`, else its name. Pure; [`crate::plan`] tells it to resolvers, which find out the rest.

use elasti_api::message::{Protocol, Wakes};
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

/// Words for protocols whose server speaks first, from IANA's list.
const SERVER_FIRST: [&str; 11] =
    ["ftp", "imap", "imap2", "imap4", "mariadb", "mysql", "nntp", "pop3", "smtp", "ssh", "submission"];

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
    let word = word(port);
    if HTTP.contains(&word.as_str()) {
        Protocol::Http
    } else if TCP.contains(&word.as_str()) {
        Protocol::Tcp
    } else {
        Protocol::Auto
    }
}

/// What a client of `port` does that wakes the target.
pub fn wakes(spec: &ElastiServiceSpec, port: &ServicePort) -> Wakes {
    match spec.wake.as_ref().and_then(|wake| wake.on.as_deref()) {
        Some("data") => Wakes::Data,
        Some("auto") => match protocol(spec, port) {
            Protocol::Http => Wakes::Data,
            _ if SERVER_FIRST.contains(&word(port).as_str()) => Wakes::Connection,
            Protocol::Auto | Protocol::Tcp => Wakes::DataOrSilence,
        },
        _ => Wakes::Connection,
    }
}

/// The word that names what is spoken. A port may be named `grpc` or `grpc-internal`: the word before the dash counts, as meshes
/// read it.
fn word(port: &ServicePort) -> String {
    let name = port.name.split('-').next().unwrap_or_default();
    port.app_protocol.as_deref().unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use elasti_api::v1alpha1::Wake;

    use super::*;

    #[test]
    fn what_wakes_follows_the_field_and_with_auto_what_is_spoken() {
        let wakes = |on: Option<&str>, name: &str| {
            let wake = Some(Wake { on: on.map(str::to_owned) });
            let port = ServicePort { name: name.into(), port: 80, app_protocol: None };
            wakes(&ElastiServiceSpec { wake, ..ElastiServiceSpec::default() }, &port)
        };
        assert_eq!(wakes(None, "http"), Wakes::Connection);
        assert_eq!(wakes(Some("connection"), "http"), Wakes::Connection);
        assert_eq!(wakes(Some("data"), "mysql"), Wakes::Data);
        let auto = ["http", "mysql-read", "SMTP", "redis", ""].map(|name| wakes(Some("auto"), name));
        let (connection, silence) = (Wakes::Connection, Wakes::DataOrSilence);
        assert_eq!(auto, [Wakes::Data, connection, connection, silence, silence]);
    }

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
