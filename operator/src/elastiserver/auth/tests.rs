use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::FutureExt;
use prometheus::Registry;

use super::*;

/// Knows tokens of the form `good:<namespace>:<name>:<pod>` and nothing else.
#[derive(Default)]
pub(crate) struct FakeReviewer {
    pub(crate) asked: AtomicUsize,
    pub(crate) down: AtomicBool,
}

impl TokenReviewer for FakeReviewer {
    fn review(&self, token: String) -> BoxFuture<'static, Result<Review, String>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.down.load(Ordering::SeqCst) {
            return futures::future::ready(Err("connection refused".into())).boxed();
        }
        let parts: Vec<&str> = token.split(':').collect();
        let review = match parts.as_slice() {
            ["good", namespace, name, pod] => Review::Genuine(Caller {
                user: format!("system:serviceaccount:{namespace}:{name}"),
                pod: Some((*pod).to_owned()),
            }),
            _ => Review::Refused,
        };
        futures::future::ready(Ok(review)).boxed()
    }
}

pub(crate) fn authenticator(reviewer: &Arc<FakeReviewer>) -> Authenticator {
    Authenticator::new(reviewer.clone(), &["elasti:resolver".to_owned()], Metrics::new(&Registry::new()).unwrap())
}

fn headers(authorization: &str) -> HeaderMap {
    HeaderMap::from_iter([(header::AUTHORIZATION, authorization.parse().unwrap())])
}

#[tokio::test]
async fn each_kind_of_caller_gets_the_answer_that_is_due() {
    let authenticator = authenticator(&Arc::default());
    let status = async |headers: HeaderMap| authenticator.caller(&headers).await.map_err(|error| error.status());
    let resolver = Caller { user: "system:serviceaccount:elasti:resolver".into(), pod: Some("r-1".into()) };
    assert_eq!(status(headers("bearer good:elasti:resolver:r-1")).await, Ok(resolver));
    assert_eq!(status(headers("Bearer good:default:resolver:r-1")).await, Err(StatusCode::FORBIDDEN));
    for bad in ["Bearer forged", "Bearer ", "Basic good:elasti:resolver:r-1", "Bearer"] {
        assert_eq!(status(headers(bad)).await, Err(StatusCode::UNAUTHORIZED), "{bad}");
    }
    assert_eq!(status(HeaderMap::new()).await, Err(StatusCode::UNAUTHORIZED));
    assert_eq!(status(headers(&format!("Bearer {}", "x".repeat(TOKEN_MAX + 1)))).await, Err(StatusCode::UNAUTHORIZED));
}

#[tokio::test]
async fn an_api_server_that_is_down_is_503_and_known_tokens_still_hold() {
    let reviewer = Arc::<FakeReviewer>::default();
    let authenticator = authenticator(&reviewer);
    let [known, unknown] = ["r-1", "r-2"].map(|pod| headers(&format!("Bearer good:elasti:resolver:{pod}")));
    authenticator.caller(&known).await.unwrap();
    reviewer.down.store(true, Ordering::SeqCst);
    authenticator.caller(&known).await.unwrap();
    assert_eq!(authenticator.caller(&unknown).await.unwrap_err().status(), StatusCode::SERVICE_UNAVAILABLE);
    reviewer.down.store(false, Ordering::SeqCst);
    authenticator.caller(&unknown).await.unwrap();
    assert_eq!(reviewer.asked.load(Ordering::SeqCst), 3, "one answer and one failure each are not asked twice");
}
