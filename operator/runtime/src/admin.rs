//! Routes that every program of ours has: `/healthz`, `/readyz`, `/metrics` and `/logging`.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::{Method, Request, StatusCode};
use prometheus::process_collector::ProcessCollector;
use prometheus::{IntGaugeVec, Opts, Registry, TextEncoder};

use crate::http::{Answer, Peer, text};
use crate::telemetry::{Level, Levels};

/// What must be done before a program is ready, by name.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeSet<&'static str>>>);

impl Readiness {
    /// Makes the program wait for `task`.
    pub fn block(&self, task: &'static str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(task);
    }

    /// `task` is done; once done is done, unless it is blocked again.
    pub fn done(&self, task: &'static str) {
        let left = {
            let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            pending.remove(task).then(|| pending.len())
        };
        if let Some(left) = left {
            tracing::info!(task, left, "ready");
        }
    }

    /// The tasks that are not done, in the order of their names.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }
}

/// The routes; a program's own handler calls [`Routes::answer`] for what it does not know itself.
#[derive(Clone, Debug)]
pub struct Routes {
    registry: Registry,
    readiness: Readiness,
    levels: Levels,
}

impl Routes {
    /// Also registers the process's own metrics and `elasti_build_info` with `program` as label. Fails when the
    /// registry has them already.
    pub fn new(
        program: &str,
        version: &str,
        registry: Registry,
        readiness: Readiness,
        levels: Levels,
    ) -> prometheus::Result<Self> {
        let build = IntGaugeVec::new(
            Opts::new("elasti_build_info", "Always 1; the labels say what runs."),
            &["program", "version"],
        )?;
        build.with_label_values(&[program, version]).set(1);
        registry.register(Box::new(build))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self { registry, readiness, levels })
    }

    /// Answers `/healthz`, `/readyz`, `/metrics` and `/logging`; 404 for other paths, 405 for other methods, 403 to a stranger who
    /// would change the level.
    pub fn answer<B>(&self, request: &Request<B>) -> Answer {
        let get = [Method::GET, Method::HEAD].contains(request.method());
        match request.uri().path() {
            "/healthz" if get => text(StatusCode::OK, "ok"),
            "/readyz" if get => self.readyz(),
            "/metrics" if get => self.metrics(),
            "/logging" if get => text(StatusCode::OK, self.levels.current()),
            "/logging" if request.method() == Method::PUT => {
                // Whoever may, could keep what is done from being seen, or fill the node's disk.
                if !request.extensions().get::<Peer>().is_some_and(|peer| peer.is_local()) {
                    let cure =
                        "the level is changed from the pod itself: kubectl port-forward to it, and ask localhost";
                    return text(StatusCode::FORBIDDEN, cure);
                }
                self.set_level(request.uri().query())
            }
            "/healthz" | "/readyz" | "/metrics" | "/logging" => {
                text(StatusCode::METHOD_NOT_ALLOWED, "the method must be GET, or PUT on /logging")
            }
            _ => text(StatusCode::NOT_FOUND, "there are /healthz, /readyz, /metrics and /logging"),
        }
    }

    fn readyz(&self) -> Answer {
        let pending = self.readiness.pending();
        if pending.is_empty() {
            return text(StatusCode::OK, "ok");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}", pending.join(", ")))
    }

    fn metrics(&self) -> Answer {
        match TextEncoder::new().encode_to_string(&self.registry.gather()) {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    fn set_level(&self, query: Option<&str>) -> Answer {
        let Some(level) = query.and_then(|query| query.strip_prefix("level=")) else {
            return text(StatusCode::BAD_REQUEST, "say which: PUT /logging?level=debug");
        };
        let set = level
            .parse::<Level>()
            .map_err(|error| error.to_string())
            .and_then(|level| self.levels.set(&level).map_err(|error| error.to_string()));
        match set {
            Ok(()) => {
                tracing::info!(level, "log level changed");
                text(StatusCode::OK, level)
            }
            Err(error) => text(StatusCode::BAD_REQUEST, format!("'{level}' is no level: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Server, read_body};
    use crate::telemetry::{Format, subscriber};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_util::sync::CancellationToken;

    fn routes(readiness: &Readiness) -> (Routes, impl Sized + use<>) {
        let (subscriber, levels) = subscriber(Format::Text, &Level::default());
        (Routes::new("test", "1", Registry::new(), readiness.clone(), levels).unwrap(), subscriber)
    }

    fn ask(routes: &Routes, method: Method, uri: &str) -> Answer {
        ask_from("127.0.0.1:1", routes, method, uri)
    }

    fn ask_from(peer: &str, routes: &Routes, method: Method, uri: &str) -> Answer {
        let request = Request::builder().method(method).uri(uri).extension(Peer(peer.parse().unwrap()));
        routes.answer(&request.body(()).unwrap())
    }

    #[tokio::test]
    async fn readyz_names_what_is_pending() {
        let readiness = Readiness::default();
        readiness.block("snapshot");
        let (routes, _subscriber) = routes(&readiness);
        let answer = ask(&routes, Method::GET, "/readyz");
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(read_body(answer.into_body(), 100).await.unwrap(), "waiting for: snapshot\n");
        readiness.done("snapshot");
        assert_eq!(ask(&routes, Method::GET, "/readyz").status(), StatusCode::OK);
    }

    #[test]
    fn unknown_paths_and_methods_are_told_apart() {
        let (routes, _subscriber) = routes(&Readiness::default());
        assert_eq!(ask(&routes, Method::GET, "/").status(), StatusCode::NOT_FOUND);
        assert_eq!(ask(&routes, Method::POST, "/metrics").status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(ask(&routes, Method::GET, "/healthz").status(), StatusCode::OK);
    }

    #[test]
    fn the_level_changes_only_to_one_that_exists() {
        let (routes, _subscriber) = routes(&Readiness::default());
        assert_eq!(ask(&routes, Method::PUT, "/logging?level=loud=very").status(), StatusCode::BAD_REQUEST);
        assert_eq!(ask(&routes, Method::PUT, "/logging").status(), StatusCode::BAD_REQUEST);
        assert_eq!(ask(&routes, Method::PUT, "/logging?level=debug").status(), StatusCode::OK);
        assert_eq!(routes.levels.current(), "debug");
    }

    #[test]
    fn the_level_is_changed_from_within_the_pod_alone() {
        let (routes, _subscriber) = routes(&Readiness::default());
        let ask = |peer| ask_from(peer, &routes, Method::PUT, "/logging?level=debug").status();
        assert_eq!(ask("10.244.0.9:1"), StatusCode::FORBIDDEN);
        assert_eq!(ask("[::ffff:10.244.0.9]:1"), StatusCode::FORBIDDEN);
        assert_eq!(ask("[::ffff:127.0.0.1]:1"), StatusCode::OK);
        assert_eq!(ask_from("10.244.0.9:1", &routes, Method::GET, "/logging").status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn metrics_are_served_over_tcp_until_shutdown() {
        let (routes, _subscriber) = routes(&Readiness::default());
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address();
        let shutdown = CancellationToken::new();
        let handler = move |request| std::future::ready(routes.answer(&request));
        let serving = tokio::spawn(server.serve(handler, shutdown.clone()));

        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut reply = String::new();
        client.read_to_string(&mut reply).await.unwrap();
        assert!(reply.starts_with("HTTP/1.1 200 OK"), "{reply}");
        assert!(reply.contains(r#"elasti_build_info{program="test",version="1"} 1"#), "{reply}");
        assert!(reply.contains("process_open_fds"), "{reply}");

        shutdown.cancel();
        serving.await.unwrap();
        assert!(tokio::net::TcpStream::connect(address).await.is_err());
    }
}
