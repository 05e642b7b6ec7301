//! The answer to a request that the target shall not be woken for, as `spec.probeResponse` has it. Pure.

use std::borrow::Cow;

use elasti_api::probe::{ProbeRules, Question};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::body::Body;

/// The answer, if one of the rules has one. A body that is JSON is called so, any other is text; none is sent where HTTP
/// allows none.
pub fn answer<B>(rules: &ProbeRules, request: &Request<B>) -> Option<Response<Body>> {
    let (uri, headers) = (request.uri(), request.headers());
    let question = Question { method: request.method().as_str(), path: uri.path(), query: uri.query() };
    // HTTP/2 has the host in the request line alone.
    let authority = || uri.authority().map(|authority| Cow::Owned(authority.to_string()));
    let values = |name: &str| {
        let host = name.eq_ignore_ascii_case("host").then(authority).flatten();
        headers.get_all(name).into_iter().map(|value| String::from_utf8_lossy(value.as_bytes())).chain(host)
    };
    let rule = rules.answer(question, values)?;
    let status = StatusCode::from_u16(rule.status).unwrap_or(StatusCode::OK);
    if status == StatusCode::NO_CONTENT {
        let mut response = Response::new(Body::default());
        *response.status_mut() = status;
        return Some(response);
    }
    let json = serde_json::from_str::<serde_json::Value>(&rule.body).is_ok();
    let kind = if json { "application/json" } else { "text/plain; charset=utf-8" };
    let body = if request.method() == Method::HEAD { String::new() } else { rule.body.clone() };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    Some(response)
}
