//! What changes in the headers of a message on its way: what concerns one connection alone is taken out, and the target
//! is told who asked. Pure.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use http::header::{CONNECTION, FORWARDED, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Version, request};

/// Fields of one connection (RFC 9110, section 7.6.1, and its older companions). `Trailer` is not one of them.
const HOP_BY_HOP: [HeaderName; 4] =
    [HeaderName::from_static("keep-alive"), HeaderName::from_static("proxy-connection"), TE, TRANSFER_ENCODING];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Fields that a request gets at most.
const ADDED: usize = 4;

/// What a target is told of one client. What it takes to say that is kept, since most requests of a connection are alike.
#[derive(Debug)]
pub struct Introduction {
    client: IpAddr,
    address: HeaderValue,
    /// What `Forwarded` says of a request to this host.
    forwarded: Mutex<Option<(Option<HeaderValue>, HeaderValue)>>,
}

impl Introduction {
    /// Of this client.
    pub fn of(client: IpAddr) -> Self {
        let address = HeaderValue::try_from(client.to_string()).unwrap_or(HeaderValue::from_static("unknown"));
        Self { client, address, forwarded: Mutex::default() }
    }

    /// Makes a request of the client one of ours.
    pub fn put_into(&self, request: &mut request::Parts) {
        let trailers = has_token(&request.headers, &TE, "trailers");
        strip(&mut request.headers);
        if trailers {
            // gRPC servers ask for it.
            request.headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        let host = request.headers.get(HOST).cloned().or_else(|| {
            let authority = request.uri.authority()?;
            HeaderValue::from_str(authority.as_str()).ok()
        });
        let headers = &mut request.headers;
        headers.reserve(ADDED);
        append(headers, X_FORWARDED_FOR, self.address.clone());
        append(headers, FORWARDED, self.forwarded(host.as_ref()));
        if let Some(host) = host {
            headers.entry(X_FORWARDED_HOST).or_insert(host);
        }
        headers.entry(X_FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    }

    fn forwarded(&self, host: Option<&HeaderValue>) -> HeaderValue {
        // Every change is one assignment, so a poisoned lock still guards a sound value.
        let mut kept = self.forwarded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = kept.as_ref().filter(|(of, _)| of.as_ref() == host) {
            return value.clone();
        }
        let named = host.and_then(|host| host.to_str().ok());
        let named = named.map(|host| format!(";host={}", quoted(host))).unwrap_or_default();
        let value = HeaderValue::try_from(format!("for={}{named};proto=http", node(self.client)));
        let value = value.unwrap_or(HeaderValue::from_static("for=unknown"));
        // A copy of the host: as it came it would keep the whole head of its request.
        let host = host.and_then(|host| HeaderValue::from_bytes(host.as_bytes()).ok());
        *kept = Some((host, value.clone()));
        value
    }
}

/// Whether the client sends nothing after this request (RFC 9112, section 9.3).
pub fn is_last(request: &request::Parts) -> bool {
    let says = |token| has_token(&request.headers, &CONNECTION, token);
    request.version <= Version::HTTP_10 && !says("keep-alive") || says("close")
}

/// Takes out what concerns one connection alone. An upgrade concerns both, and stays.
pub fn strip(headers: &mut HeaderMap) {
    let upgrade = if has_token(headers, &CONNECTION, "upgrade") { headers.get(UPGRADE).cloned() } else { None };
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP).chain([&CONNECTION, &UPGRADE]) {
        headers.remove(name);
    }
    if let Some(upgrade) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, upgrade);
    }
}

/// Whether a list-valued field names `token`.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
}

/// One more element of a list-valued field, as a value of its own where the old one is not text.
fn append(headers: &mut HeaderMap, name: HeaderName, element: HeaderValue) {
    let joined = match headers.get(&name).and_then(|value| value.to_str().ok()) {
        Some(before) if headers.get_all(&name).iter().count() == 1 => {
            [before.as_bytes(), b", ", element.as_bytes()].concat()
        }
        _ => {
            headers.append(name, element);
            return;
        }
    };
    if let Ok(value) = HeaderValue::try_from(joined) {
        headers.insert(name, value);
    }
}

/// RFC 7239, section 6: IPv6 addresses in brackets, and thus in quotes.
fn node(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("\"[{address}]\""),
    }
}

/// RFC 7239, section 4: a token, else a quoted string.
fn quoted(text: &str) -> String {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)) && !text.is_empty() {
        return text.to_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn forwarded(fields: &[(&str, &str)], client: &str) -> HeaderMap {
        let mut request = http::Request::builder().uri("/a");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        let client: SocketAddr = client.parse().unwrap();
        Introduction::of(client.ip()).put_into(&mut parts);
        parts.headers
    }

    #[test]
    fn the_target_learns_who_asked() {
        let headers = forwarded(&[("host", "web.shop:8080")], "10.0.0.9:4000");
        assert_eq!(headers["x-forwarded-for"], "10.0.0.9");
        assert_eq!(headers["x-forwarded-host"], "web.shop:8080");
        assert_eq!(headers["x-forwarded-proto"], "http");
        assert_eq!(headers["forwarded"], "for=10.0.0.9;host=\"web.shop:8080\";proto=http");
    }

    #[test]
    fn what_proxies_before_us_said_stays() {
        let before = [
            ("host", "web"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-host", "example.com"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=1.2.3.4"),
        ];
        let headers = forwarded(&before, "[fd00::9]:4000");
        assert_eq!(headers["x-forwarded-for"], "1.2.3.4, fd00::9");
        assert_eq!(
            (&headers["x-forwarded-host"], &headers["x-forwarded-proto"]),
            (&"example.com".parse().unwrap(), &"https".parse().unwrap())
        );
        assert_eq!(headers["forwarded"], "for=1.2.3.4, for=\"[fd00::9]\";host=web;proto=http");
    }

    #[test]
    fn fields_of_one_connection_go_no_further() {
        let fields = [
            ("connection", "keep-alive, X-Own"),
            ("keep-alive", "timeout=5"),
            ("x-own", "1"),
            ("te", "trailers, deflate"),
            ("trailer", "x-sum"),
            ("accept", "*/*"),
        ];
        let headers = forwarded(&fields, "10.0.0.9:1");
        assert!(!headers.contains_key("connection") && !headers.contains_key("x-own"));
        assert!(!headers.contains_key("keep-alive"));
        assert_eq!(
            (&headers["te"], &headers["trailer"], &headers["accept"]),
            (&"trailers".parse().unwrap(), &"x-sum".parse().unwrap(), &"*/*".parse().unwrap())
        );
    }

    #[test]
    fn upgrades_pass() {
        let fields = [("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        let headers = forwarded(&fields, "10.0.0.9:1");
        assert_eq!(
            (&headers["connection"], &headers["upgrade"]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        assert!(!forwarded(&[("upgrade", "h2c")], "10.0.0.9:1").contains_key("upgrade"));
    }
}
