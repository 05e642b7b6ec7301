//! The plain HTTP port: `POST /informer/incoming-request` with KubeElasti's payload, `/crd-cache` and `/metrics`.

use std::sync::Arc;
use std::time::Duration;

use elasti_api::names::{CRD_CACHE_PATH, NOTIFY_PATH};
use elasti_runtime::admin::Routes;
use elasti_runtime::http::{Answer, read_body, text};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use hyper::body::Body;
use serde::Deserialize;

use super::auth::Authenticator;
use super::{Wake, WakeAnswer, crd_cache};
use crate::metrics::Metrics;

/// Longest notification in bytes: two names of Kubernetes objects and a number need a tenth of it.
const BODY_MAX: usize = 8 << 10;

/// How long a wake may take: one patch. `KubeElasti`'s resolver waits for 5 s.
const WAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers notifications.
#[derive(Clone)]
pub struct Notify {
    wake: Arc<dyn Wake>,
    /// `None` when notifications need no token.
    authenticator: Option<Authenticator>,
    routes: Routes,
    metrics: Metrics,
}

/// What `KubeElasti`'s resolver sends; its `count` is of no use to anybody.
#[derive(Deserialize)]
struct Notification {
    svc: String,
    namespace: String,
}

impl Notify {
    /// Hands notifications to `wake`; `/metrics` is answered by `routes`.
    pub fn new(wake: Arc<dyn Wake>, authenticator: Option<Authenticator>, routes: Routes, metrics: Metrics) -> Self {
        Self { wake, authenticator, routes, metrics }
    }

    /// Answers one request.
    pub async fn answer<B>(&self, request: Request<B>) -> Answer
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        match request.uri().path() {
            NOTIFY_PATH if request.method() == Method::POST => self.notification(request).await,
            CRD_CACHE_PATH if request.method() == Method::GET => self.crd_cache(request.headers()).await,
            NOTIFY_PATH | CRD_CACHE_PATH => text(StatusCode::METHOD_NOT_ALLOWED, "Invalid request method"),
            // The other routes are not for everybody who reaches this port.
            "/metrics" => self.routes.answer(&request),
            _ => text(StatusCode::NOT_FOUND, format!("there are {NOTIFY_PATH}, {CRD_CACHE_PATH} and /metrics")),
        }
    }

    async fn authenticate(&self, headers: &HeaderMap) -> Result<(), Answer> {
        let Some(authenticator) = &self.authenticator else { return Ok(()) };
        authenticator.caller(headers).await.map(drop).map_err(|error| {
            tracing::debug!(%error, "a request was turned away");
            text(error.status(), error.to_string())
        })
    }

    async fn crd_cache(&self, headers: &HeaderMap) -> Answer {
        match self.authenticate(headers).await {
            Ok(()) => json(crd_cache::page(&self.wake.elasti_services()).to_string()),
            Err(answer) => answer,
        }
    }

    async fn notification<B>(&self, request: Request<B>) -> Answer
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        let (head, body) = request.into_parts();
        if let Err(answer) = self.authenticate(&head.headers).await {
            return answer;
        }
        let body = match read_body(body, BODY_MAX).await {
            Ok(body) => body,
            Err(error) => return error.answer(),
        };
        match serde_json::from_slice(&body) {
            Ok(Notification { svc, namespace }) if !svc.is_empty() && !namespace.is_empty() => {
                self.wake(&namespace, &svc).await
            }
            _ => text(StatusCode::BAD_REQUEST, "Invalid request body"),
        }
    }

    async fn wake(&self, namespace: &str, service: &str) -> Answer {
        let late = || WakeAnswer::Failed(format!("no answer within {} s", WAKE_TIMEOUT.as_secs()));
        let waking = self.wake.wake(namespace, service);
        let answer = tokio::time::timeout(WAKE_TIMEOUT, waking).await.unwrap_or_else(|_| late());
        self.metrics.notified(&answer);
        match answer {
            WakeAnswer::Accepted => json(r#"{"message":"Request received successfully!"}"#),
            WakeAnswer::Unknown => {
                let cause = format!("no ElastiService names the Service {namespace}/{service}");
                text(StatusCode::NOT_FOUND, cause)
            }
            WakeAnswer::Failed(cause) => {
                tracing::warn!(namespace, service, cause, "a notified target could not be woken");
                text(StatusCode::BAD_GATEWAY, format!("the target of {namespace}/{service} cannot be woken: {cause}"))
            }
        }
    }
}

fn json(body: impl Into<String>) -> Answer {
    let mut answer = text(StatusCode::OK, body);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

#[cfg(test)]
mod tests;
