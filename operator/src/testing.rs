//! What tests share: a Kubernetes client that asks a function instead of an API server.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use kube::Client;
use kube::client::Body;
use serde::Serialize;

pub(crate) type Answer = http::Response<BoxBody<Bytes, Infallible>>;

/// A client whose requests `answer` answers.
pub(crate) fn client<A>(answer: A) -> Client
where
    A: Fn(http::request::Parts, Vec<u8>) -> Answer + Clone + Send + Sync + 'static,
{
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let answer = answer.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Ok::<_, Infallible>(answer(parts, body.to_vec()))
        }
    });
    Client::new(service, "default")
}

/// An object, or for a status of failure an API error with this reason.
pub(crate) fn answer(status: u16, object: impl Serialize) -> Answer {
    let mut object = serde_json::to_value(object).unwrap();
    if status >= 400 {
        object = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "reason": object, "code": status, "message": object,
        });
    }
    let body = Full::from(serde_json::to_vec(&object).unwrap()).boxed();
    http::Response::builder().status(status).body(body).unwrap()
}

/// A watch that tells this and ends.
pub(crate) fn events(events: &[(&str, serde_json::Value)]) -> Answer {
    let line = |(type_, object): &(&str, serde_json::Value)| {
        let mut object = object.clone();
        object["apiVersion"] = "v1".into();
        object["kind"] = "Pod".into();
        format!("{}\n", serde_json::json!({"type": type_, "object": object}))
    };
    http::Response::new(Full::from(events.iter().map(line).collect::<String>()).boxed())
}

/// A watch in which nothing happens.
pub(crate) fn silence() -> Answer {
    http::Response::new(StreamBody::new(futures::stream::pending()).boxed())
}
