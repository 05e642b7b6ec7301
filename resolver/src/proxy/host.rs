//! Which Service a request to the proxy port is for, by the name that it bears. Pure.
//!
//! Only full names count: a name without a namespace could be anybody's, and any other host is none of ours.

/// A Service by name, and the port if one was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub service: String,
    /// Number of the Service's port.
    pub port: Option<u16>,
}

/// Reads `service.namespace`, `service.namespace.svc` or `service.namespace.svc.DOMAIN`, with or without a port. Envoy's
/// `X-Envoy-Decorator-Operation` has a path behind it, such as `web.shop.svc.cluster.local:80/*`; some have `http://` before it.
pub fn parse(text: &str, domain: &str) -> Option<Wanted> {
    let text = text.trim();
    let text = text.strip_prefix("http://").unwrap_or(text);
    let text = text.split('/').next()?;
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok().filter(|port| *port > 0)?)),
        None => (text, None),
    };
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let mut labels = host.splitn(3, '.');
    let (service, namespace, rest) = (labels.next()?, labels.next()?, labels.next());
    let of_cluster = rest.is_none_or(|rest| {
        rest.strip_prefix("svc").is_some_and(|rest| rest.is_empty() || rest.strip_prefix('.') == Some(domain))
    });
    let named = [service, namespace].iter().all(|label| is_label(label));
    (of_cluster && named).then(|| Wanted { namespace: namespace.to_owned(), service: service.to_owned(), port })
}

fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_services_are_read_in_every_form() {
        for (text, port) in [
            ("web.shop", None),
            ("web.shop:8080", Some(8080)),
            ("web.shop.svc", None),
            ("WEB.shop.svc:80", Some(80)),
            ("web.shop.svc.cluster.local.", None),
            ("web.shop.svc.cluster.local:80/*", Some(80)),
            ("http://web.shop.svc.cluster.local:80/*", Some(80)),
        ] {
            let wanted = Wanted { namespace: "shop".into(), service: "web".into(), port };
            assert_eq!(parse(text, "cluster.local"), Some(wanted), "{text}");
        }
    }

    #[test]
    fn b18_what_is_no_full_name_of_a_service_is_for_nobody() {
        for text in [
            "",
            "web",
            "localhost:8080",
            "[fd00::1]:80",
            "10.96.12.7:8080",
            "www.example.com",
            "web.shop.svc.example.com",
            "web.shop.svcx",
            "pod-0.web.shop.svc.cluster.local",
            "a_b.shop.svc",
            "web.shop:http",
            "web.shop:0",
            "-web.shop",
        ] {
            assert_eq!(parse(text, "cluster.local"), None, "{text}");
        }
    }
}
