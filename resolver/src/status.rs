//! KubeElasti's status pages: `/queue-status` and `/crd-cache-status`.

use elasti_runtime::http::{Answer, text};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::report::Board;

/// Answers the two pages; `None` for others.
pub fn answer<B>(board: &Board, request: &Request<B>) -> Option<Answer> {
    let path = request.uri().path();
    if !["/queue-status", "/crd-cache-status"].contains(&path) {
        return None;
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        return Some(text(StatusCode::METHOD_NOT_ALLOWED, "the method must be GET"));
    }
    let page = match path {
        "/queue-status" => queue(board, request.uri().query().unwrap_or_default()),
        _ => Some(services(board)),
    };
    let Some(page) = page else {
        return Some(text(StatusCode::BAD_REQUEST, "say which: /queue-status?namespace=shop&service=web"));
    };
    let mut answer = text(StatusCode::OK, page.to_string());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Some(answer)
}

/// Whether anything waits for a Service here: `queueStatus` is 1 then, as in KubeElasti, else 0; how
/// many, how many may, how many ready backends there are and what each may have at once. `None` when the query names none.
fn queue(board: &Board, query: &str) -> Option<Value> {
    // Names of Kubernetes objects are never escaped.
    let parameter = |name: &str| query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
    let ((_, namespace), (_, name)) = parameter("namespace").zip(parameter("service"))?;
    let Some(standby) = board.services().into_iter().find(|standby| standby.is(namespace, name)) else {
        return Some(json!({"queueStatus": 0, "held": 0, "forwarding": 0}));
    };
    let service = standby.service();
    let traffic = service.traffic();
    let (hold, backends) = {
        let view = service.view();
        (view.hold, view.ports.iter().map(|(_, port)| port.targets.len()).max().unwrap_or_default())
    };
    let breaker = if service.breaker_open() { "open" } else { "closed" };
    Some(json!({
        "queueStatus": u8::from(traffic.held > 0), "held": traffic.held, "forwarding": traffic.forwarding,
        "limit": hold.max_connections, "backends": backends, "concurrency": hold.concurrency, "breaker": breaker,
    }))
}

/// The Services of all ElastiServices that this resolver has been told of.
fn services(board: &Board) -> Value {
    let mut services: Vec<String> = board.services().iter().map(ToString::to_string).collect();
    services.sort_unstable();
    json!({"count": services.len(), "services": services})
}
