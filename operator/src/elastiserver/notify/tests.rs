use std::sync::Mutex;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use elasti_api::v1alpha1::ElastiService;
use elasti_runtime::admin::Readiness;
use elasti_runtime::telemetry::{Format, Level, subscriber};
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use prometheus::Registry;

use super::*;
use crate::elastiserver::auth::tests::{FakeReviewer, authenticator};

const TOKEN: &str = "Bearer good:elasti:resolver:r-1";
const BODY: &str = r#"{"count":1,"svc":"web","namespace":"n"}"#;

/// Knows the Service `n/web`; that of `n/broken` cannot be woken.
#[derive(Default)]
struct Woken(Mutex<Vec<String>>);

impl Wake for Woken {
    fn wake(&self, namespace: &str, service: &str) -> BoxFuture<'static, WakeAnswer> {
        self.0.lock().unwrap().push(format!("{namespace}/{service}"));
        let answer = match (namespace, service) {
            ("n", "web") => WakeAnswer::Accepted,
            ("n", "broken") => WakeAnswer::Failed("there is no Deployment broken".into()),
            ("n", "stuck") => return std::future::pending().boxed(),
            _ => WakeAnswer::Unknown,
        };
        std::future::ready(answer).boxed()
    }

    fn elasti_services(&self) -> Vec<Arc<ElastiService>> {
        let mut elasti = ElastiService::default();
        (elasti.metadata.namespace, elasti.spec.service) = (Some("n".into()), "web".into());
        vec![Arc::new(elasti)]
    }
}

struct Bench {
    notify: Notify,
    woken: Arc<Woken>,
    reviewer: Arc<FakeReviewer>,
}

fn bench(with_token: bool) -> Bench {
    let (woken, reviewer) = (Arc::<Woken>::default(), Arc::<FakeReviewer>::default());
    let registry = Registry::new();
    let metrics = Metrics::new(&registry).unwrap();
    let (_, levels) = subscriber(Format::Text, &Level::default());
    let routes = Routes::new("test", "1", registry, Readiness::default(), levels).unwrap();
    let authenticator = with_token.then(|| authenticator(&reviewer));
    Bench { notify: Notify::new(woken.clone(), authenticator, routes, metrics), woken, reviewer }
}

impl Bench {
    async fn ask(&self, method: &str, path: &str, token: &str, body: &str) -> (u16, String) {
        let request = Request::builder().method(method).uri(path).header(header::AUTHORIZATION, token);
        let answer = self.notify.answer(request.body(Full::new(Bytes::from(body.to_owned()))).unwrap()).await;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap().trim().to_owned())
    }

    fn woken(&self) -> Vec<String> {
        self.woken.0.lock().unwrap().clone()
    }
}

#[tokio::test]
async fn b41_services_are_told_to_who_bears_a_token() {
    let bench = bench(true);
    let (status, body) = bench.ask("GET", CRD_CACHE_PATH, TOKEN, "").await;
    assert_eq!(status, 200);
    assert!(body.starts_with(r#"{"services":{"n/web":{"#), "{body}");
    assert_eq!(bench.ask("GET", CRD_CACHE_PATH, "Bearer nonsense", "").await.0, 401);
    assert_eq!(bench.ask("POST", CRD_CACHE_PATH, TOKEN, "").await.0, 405);
}

#[tokio::test]
async fn a_notification_wakes_its_service_and_is_answered_as_kubeelasti_does() {
    let bench = bench(true);
    let answer = bench.ask("POST", NOTIFY_PATH, TOKEN, BODY).await;
    assert_eq!(answer, (200, r#"{"message":"Request received successfully!"}"#.to_owned()));
    assert_eq!(bench.woken(), ["n/web"]);
}

#[tokio::test]
async fn what_is_turned_away_wakes_nothing() {
    let bench = bench(true);
    let long = format!(r#"{{"svc":"web","namespace":"n","x":"{}"}}"#, "x".repeat(BODY_MAX));
    for (method, path, token, body, status, told) in [
        ("GET", NOTIFY_PATH, TOKEN, BODY, 405, "Invalid request method"),
        ("POST", NOTIFY_PATH, TOKEN, "{", 400, "Invalid request body"),
        ("POST", NOTIFY_PATH, TOKEN, r#"{"count":1}"#, 400, "Invalid request body"),
        ("POST", NOTIFY_PATH, TOKEN, r#"{"svc":"","namespace":""}"#, 400, "Invalid request body"),
        ("POST", NOTIFY_PATH, TOKEN, &long, 413, "longer than 8192 bytes"),
        ("POST", NOTIFY_PATH, "Bearer forged", BODY, 401, "not genuine"),
        ("POST", NOTIFY_PATH, "", BODY, 401, "missing"),
        ("POST", NOTIFY_PATH, "Bearer good:n:other:p", BODY, 403, "--allowed-service-accounts"),
        ("POST", "/elsewhere", TOKEN, BODY, 404, "there are"),
        ("PUT", "/logging?level=debug", TOKEN, "", 404, "there are"),
    ] {
        let (answered, text) = bench.ask(method, path, token, body).await;
        assert_eq!(answered, status, "{method} {path} {token} {text}");
        assert!(text.contains(told), "{text}");
    }
    bench.reviewer.down.store(true, Ordering::SeqCst);
    let (status, _) = bench.ask("POST", NOTIFY_PATH, "Bearer good:elasti:resolver:new", BODY).await;
    assert_eq!(status, 503);
    assert_eq!(bench.woken(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn wakes_that_do_not_work_are_told_with_their_cause() {
    let bench = bench(true);
    for (service, status, told) in
        [("nobody", 404, "n/nobody"), ("broken", 502, "no Deployment broken"), ("stuck", 502, "within 5 s")]
    {
        let body = format!(r#"{{"svc":"{service}","namespace":"n"}}"#);
        let (answered, text) = bench.ask("POST", NOTIFY_PATH, TOKEN, &body).await;
        assert_eq!(answered, status);
        assert!(text.contains(told), "{text}");
    }
}

#[tokio::test]
async fn a_flag_waives_the_token() {
    let bench = bench(false);
    assert_eq!(bench.ask("POST", NOTIFY_PATH, "", BODY).await.0, 200);
    assert_eq!(bench.reviewer.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn metrics_are_on_the_same_port() {
    let bench = bench(true);
    bench.ask("POST", NOTIFY_PATH, TOKEN, BODY).await;
    let (status, text) = bench.ask("GET", "/metrics", "", "").await;
    assert_eq!(status, 200);
    assert!(text.contains(r#"elasti_operator_notifications_total{result="accepted"} 1"#), "{text}");
}
