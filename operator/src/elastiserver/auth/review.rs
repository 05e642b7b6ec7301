//! Asks the API server by TokenReview.
//!
//! Invariant: however many resolvers come at once, as after a restart of the operator, the API server is asked about few at a time: a
//! thousand together would all be answered too late, and wakes share their connection.

use std::sync::Arc;
use std::time::Duration;

use elasti_api::names::TOKEN_AUDIENCE;
use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::Semaphore;

use super::{Caller, Review, TokenReviewer};

/// How long an answer may take, the wait for a turn included: less than the resolver's five seconds for a whole connection.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Tokens that the API server is asked about at once; one takes it some milliseconds.
const AT_ONCE: usize = 32;

/// Where the API server says to which pod a token is bound.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";

/// The API server.
#[derive(Clone)]
pub struct ApiServer {
    client: Client,
    turns: Arc<Semaphore>,
}

impl ApiServer {
    /// Needs `create` on `tokenreviews.authentication.k8s.io`.
    pub fn new(client: Client) -> Self {
        Self { client, turns: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl TokenReviewer for ApiServer {
    fn review(&self, token: String) -> BoxFuture<'static, Result<Review, String>> {
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let turns = Arc::clone(&self.turns);
        async move {
            let spec = TokenReviewSpec { token: Some(token), audiences: Some(vec![TOKEN_AUDIENCE.to_owned()]) };
            let review = TokenReview { spec, ..TokenReview::default() };
            let params = PostParams::default();
            let asked = async {
                let _turn = turns.acquire().await;
                api.create(&params, &review).await
            };
            match tokio::time::timeout(TIMEOUT, asked).await {
                Ok(Ok(answer)) => Ok(judge(&answer.status.unwrap_or_default())),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("the API server has not answered within {} s", TIMEOUT.as_secs())),
            }
        }
        .boxed()
    }
}

fn judge(status: &TokenReviewStatus) -> Review {
    // A server that does not know audiences leaves them out, and has not checked ours.
    let ours = status.audiences.iter().flatten().any(|audience| audience == TOKEN_AUDIENCE);
    let Some(user) = status.user.as_ref().filter(|_| ours && status.authenticated == Some(true)) else {
        return Review::Refused;
    };
    let pod = user.extra.as_ref().and_then(|extra| extra.get(POD_NAME)?.first().cloned());
    Review::Genuine(Caller { user: user.username.clone().unwrap_or_default(), pod })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{answer, client};

    async fn review(status: u16, object: serde_json::Value) -> Result<Review, String> {
        let api = client(move |request, body| {
            let asked: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(request.uri.path(), "/apis/authentication.k8s.io/v1/tokenreviews");
            assert_eq!(asked["spec"], json!({"token": "t", "audiences": ["elasti-operator"]}));
            answer(status, &object)
        });
        ApiServer::new(api).review("t".into()).await
    }

    fn status(status: &serde_json::Value) -> serde_json::Value {
        json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "spec": {}, "status": status})
    }

    #[tokio::test]
    async fn a_genuine_token_names_its_account_and_its_pod() {
        let user = json!({"username": "system:serviceaccount:n:r", "extra": {POD_NAME: ["r-1"]}});
        let genuine = json!({"authenticated": true, "audiences": ["elasti-operator"], "user": user});
        let caller = Caller { user: "system:serviceaccount:n:r".into(), pod: Some("r-1".into()) };
        assert_eq!(review(201, status(&genuine)).await, Ok(Review::Genuine(caller)));
    }

    #[tokio::test(start_paused = true)]
    async fn many_tokens_wait_for_their_turn_and_none_for_longer_than_its_caller() {
        let busy = Arc::new(Semaphore::new(AT_ONCE));
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            let busy = Arc::clone(&busy);
            async move {
                let _one = busy.try_acquire().expect("no more are asked about at once");
                tokio::time::sleep(TIMEOUT / 4).await;
                Ok::<_, std::convert::Infallible>(answer(201, status(&json!({"authenticated": false}))))
            }
        });
        let reviewer = ApiServer::new(Client::new(service, "default"));
        let reviews = (0..AT_ONCE * 5).map(|number| reviewer.review(number.to_string()));
        let reviews = futures::future::join_all(reviews).await;
        let (in_time, late) = (&reviews[..AT_ONCE * 3], &reviews[AT_ONCE * 4..]);
        assert!(in_time.iter().all(|review| *review == Ok(Review::Refused)), "{in_time:?}");
        assert!(late.iter().all(Result::is_err), "{late:?}");
    }

    #[tokio::test]
    async fn what_is_not_for_our_audience_is_refused() {
        assert_eq!(review(201, status(&json!({"authenticated": false}))).await, Ok(Review::Refused));
        let other = json!({"authenticated": true, "audiences": ["other"], "user": {"username": "u"}});
        assert_eq!(review(201, status(&other)).await, Ok(Review::Refused));
        let unaware = json!({"authenticated": true, "user": {"username": "u"}});
        assert_eq!(review(201, status(&unaware)).await, Ok(Review::Refused));
    }

    #[tokio::test]
    async fn an_api_server_that_fails_has_said_nothing() {
        assert!(review(500, json!("InternalError")).await.is_err());
        assert!(review(403, json!("Forbidden")).await.is_err());
    }
}
