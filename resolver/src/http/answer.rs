//! What an HTTP client is told when its request does not reach the target: a status that says whether to come again, and
//! a sentence that names the Service and the cause. Pure.

use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Response, StatusCode};

use crate::hold::Closed;
use crate::http::body::Body;

/// Seconds after which a refused client may come again: a wake takes about as long.
const RETRY_AFTER_SECONDS: &str = "1";

/// gRPC's `UNAVAILABLE`: the status that its clients retry.
const GRPC_UNAVAILABLE: &str = "14";

/// Whether these headers belong to a gRPC call.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// The answer to a request to `service` (namespace and name) that never reached the target.
pub fn answer(reason: Closed, service: &str, grpc: bool) -> Response<Body> {
    let cause = match reason {
        Closed::Timeout => "its target did not become ready in time",
        Closed::DialFailed => "its target is ready but does not accept connections",
        Closed::Limit => "as many connections wait for its target as may",
        Closed::Unavailable => "its target has failed for minutes, and is still being waited for",
        Closed::ClientLeft => "the client has left",
        Closed::Removed => "it is not intercepted any more; connect again",
        Closed::Malformed => "the request is malformed",
        Closed::Shutdown => "the resolver is shutting down; connect again",
    };
    let message = format!("elasti: {service}: {cause}");
    let mut response = Response::new(Body::default());
    if grpc {
        // A response of trailers alone (gRPC over HTTP/2, "Responses"); the message is plain ASCII, as it must be.
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from_static(GRPC_UNAVAILABLE));
        if let Ok(message) = HeaderValue::from_str(&message) {
            headers.insert("grpc-message", message);
        }
        return response;
    }
    let late = matches!(reason, Closed::Timeout | Closed::DialFailed);
    *response.status_mut() = if late { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if !late {
        headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
    }
    response.map(|_| Body::from(message + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_clients_learn_whether_to_come_again() {
        let full = answer(Closed::Limit, "shop/web", false);
        assert_eq!(full.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(full.headers()[RETRY_AFTER], "1");
        let late = answer(Closed::Timeout, "shop/web", false);
        assert_eq!(late.status(), StatusCode::GATEWAY_TIMEOUT);
        assert!(!late.headers().contains_key(RETRY_AFTER));
    }

    #[test]
    fn grpc_clients_get_a_status_that_they_retry() {
        let late = answer(Closed::Timeout, "shop/web", true);
        assert_eq!((late.status(), &late.headers()["grpc-status"]), (StatusCode::OK, &HeaderValue::from_static("14")));
        assert!(late.headers()["grpc-message"].to_str().unwrap().contains("shop/web"));
        let mut headers = HeaderMap::new();
        assert!(!is_grpc(&headers));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        assert!(is_grpc(&headers));
    }
}
