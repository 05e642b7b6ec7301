//! What a client speaks, by the first bytes that it sends. Pure; [`crate::connection`] asks.
//!
//! To take HTTP for bytes costs nobody a request, to take bytes for HTTP does: what is not surely HTTP is bytes.

use elasti_api::message::Protocol;

/// First bytes worth looking at: the preface of HTTP/2, or a request line up to its target's first byte, or a short one
/// to its end.
pub const FIRST_BYTES: usize = 512;

/// How a connection is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge (h2c).
    Http2,
    /// Anything else.
    Bytes,
}

/// How HTTP/2 begins (RFC 9113, section 3.4), as far as it is one line.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n";

/// The methods of RFC 9110 and RFC 5789: enough to know a request line that is cut off after them.
const METHODS: [&[u8]; 9] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];

/// What a client that begins with these bytes speaks on a port of which `said` is known.
pub fn spoken(said: Protocol, first: &[u8]) -> Spoken {
    if said == Protocol::Tcp || first.is_empty() {
        return Spoken::Bytes;
    }
    // `PRI * HTTP/2.0` is reserved for this; a shorter beginning could still be another protocol's.
    let common = first.len().min(HTTP2_PREFACE.len());
    if first[..common] == HTTP2_PREFACE[..common] && (common > 5 || said == Protocol::Http) {
        return Spoken::Http2;
    }
    if is_request_line(first, said) { Spoken::Http1 } else { Spoken::Bytes }
}

/// Whether this is the beginning of `METHOD SP target SP HTTP/1.x` (RFC 9112, section 3), cut off or not.
fn is_request_line(first: &[u8], said: Protocol) -> bool {
    // RFC 9112, section 2.2: empty lines before a request are to be ignored.
    let first = first.strip_prefix(b"\r\n").unwrap_or(first);
    let line = first.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
    let complete = line.ends_with(b"\n");
    let mut words = line.trim_ascii_end().splitn(2, |byte| *byte == b' ');
    let (method, rest) = (words.next().unwrap_or_default(), words.next());
    if method.is_empty() || !method.iter().all(|byte| is_token(*byte)) {
        return false;
    }
    let Some(rest) = rest else {
        // Cut off within the method, or right after it.
        let begun = said == Protocol::Http && METHODS.iter().any(|known| known.starts_with(method));
        return !complete && (begun || line.ends_with(b" ") && METHODS.contains(&method));
    };
    if complete {
        return (rest.ends_with(b" HTTP/1.1") || rest.ends_with(b" HTTP/1.0")) && !is_unfit(first);
    }
    let target = rest.first().is_some_and(|byte| matches!(byte, b'/' | b'*')) || rest.starts_with(b"http");
    target || (method == b"CONNECT")
}

/// Whether these are the first bytes of a handshake record of TLS, of any version (RFC 8446, section 5.1).
pub fn is_handshake(first: &[u8]) -> bool {
    first.starts_with(&[22, 3])
}

/// Whether these are the first bytes of a request whose target hyper would refuse or change although servers may take it:
/// raw bytes that are not UTF-8, characters that should have been encoded, a fragment.
pub fn is_unfit(first: &[u8]) -> bool {
    let Some(end) = first.iter().position(|byte| *byte == b'\n') else { return false };
    let line = first[..end].trim_ascii_end();
    let mut words = line.splitn(2, |byte| *byte == b' ').skip(1);
    let Some(rest) = words.next() else { return false };
    let Some(target) = rest.strip_suffix(b" HTTP/1.1").or_else(|| rest.strip_suffix(b" HTTP/1.0")) else {
        return false;
    };
    let is_odd = |byte: &u8| matches!(byte, b'#' | b'<' | b'>' | b'"' | b'`' | 0x7f..);
    target.iter().any(is_odd) && (target.contains(&b'#') || http::Uri::try_from(target).is_err())
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(first: &str) -> Spoken {
        spoken(Protocol::Auto, first.as_bytes())
    }

    #[test]
    fn requests_are_http() {
        for first in [
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "POST /v1/x?a=b HTTP/1.0\r\n",
            "\r\nGET / HTTP/1.1\r\n",
            "PROPFIND /dav/%20 HTTP/1.1\n",
            "OPTIONS * HTTP/1.1\r\n",
            "CONNECT example.com:443 HTTP/1.1\r\n",
            "GET http://a/b HTTP/1.1\r\n",
            "GET /a-very-long-path-that-is-cut",
            "GET ",
            "BREW /pot",
        ] {
            assert_eq!(auto(first), Spoken::Http1, "{first:?}");
        }
        assert_eq!(auto("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), Spoken::Http2);
        assert_eq!(auto("PRI * HT"), Spoken::Http2);
    }

    #[test]
    fn everything_else_is_bytes() {
        for first in [
            "",
            "G",
            "GET foo\r\n",
            "GET /a\r\n",
            "get key\r\n",
            "*1\r\n$4\r\nPING\r\n",
            "SSH-2.0-OpenSSH_9.2\r\n",
            "EHLO mail.example.com\r\n",
            "PRI",
            "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03",
            "\0\0\0\x08\x04\u{d2}\x16/",
            "AMQP\0\0\x09\x01",
            "\r\n",
            "GET\r\n",
            "(x) /",
        ] {
            assert_eq!(auto(first), Spoken::Bytes, "{first:?}");
        }
    }

    #[test]
    fn a_request_that_hyper_cannot_pass_on_as_it_is_is_bytes() {
        for target in ["/a#b", "/<a>", "/?q=\"x\"", "/`", "/?a=<b>"] {
            assert_eq!(auto(&format!("GET {target} HTTP/1.1\r\n")), Spoken::Bytes, "{target}");
        }
        let latin1 = b"GET /caf\xe9 HTTP/1.1\r\n";
        assert_eq!(spoken(Protocol::Auto, latin1), Spoken::Bytes);
        assert_eq!(auto("GET /caf\u{e9}?{\"a\":1} HTTP/1.1\r\n"), Spoken::Bytes, "quotes in a query");
        assert_eq!(auto("GET /caf\u{e9}/{\"a\"}|^[]?x=`{} HTTP/1.1\r\n"), Spoken::Http1);
    }

    #[test]
    fn what_is_said_of_the_port_decides_where_bytes_do_not() {
        assert_eq!(spoken(Protocol::Tcp, b"GET / HTTP/1.1\r\n"), Spoken::Bytes);
        assert_eq!(spoken(Protocol::Http, b"G"), Spoken::Http1);
        assert_eq!(spoken(Protocol::Http, b"ping"), Spoken::Bytes, "whatever the port is called");
        assert_eq!(spoken(Protocol::Http, b"PR"), Spoken::Http2);
        assert_eq!(spoken(Protocol::Http, b"\x16\x03\x01"), Spoken::Bytes, "TLS on a port that is called http");
    }
}
