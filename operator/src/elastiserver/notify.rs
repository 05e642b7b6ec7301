//! The plain HTTP port: `POST /informer/incoming-request` with KubeElasti's payload, and `/metrics`.

use std::sync::Arc;
use std::time::Duration;

use elasti_api::names::NOTIFY_PATH;
use elasti_runtime::admin::Routes;
use elasti_runtime::http::{Answer, read_body, text};
use http::{HeaderValue, Method, Request, StatusCode, header};
use hyper::body::Body;
use serde::Deserialize;

use super::auth::Authenticator;
use super::{Wake, WakeAnswer};
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
            NOTIFY_PATH => text(StatusCode::METHOD_NOT_ALLOWED, "Invalid request method"),
            // The other routes are not for everybody who reaches this port.
            "/metrics" => self.routes.answer(&request),
            _ => text(StatusCode::NOT_FOUND, format!("there are {NOTIFY_PATH} and /metrics")),
        }
    }

    async fn notification<B>(&self, request: Request<B>) -> Answer
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        let (head, body) = request.into_parts();
        if let Some(authenticator) = &self.authenticator
            && let Err(error) = authenticator.caller(&head.headers).await
        {
            tracing::debug!(%error, "a notification was turned away");
            return text(error.status(), error.to_string());
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
            WakeAnswer::Accepted => {
                let mut answer = text(StatusCode::OK, r#"{"message":"Request received successfully!"}"#);
                let json = HeaderValue::from_static("application/json");
                answer.headers_mut().insert(header::CONTENT_TYPE, json);
                answer
            }
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

#[cfg(test)]
mod tests;
