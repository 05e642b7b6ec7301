//! The `prometheus` trigger: idle while a query's value is below a threshold.
//!
//! An answer counts only if Prometheus itself was up for the whole cooldown: a server that has just started knows nothing
//! of the traffic before it. Numbers that are none (NaN, infinite), no series and several series cannot tell.

use std::time::Duration;

use elasti_api::v1alpha1::{PrometheusMetadata, ScaleTrigger};
use http::header::{AUTHORIZATION, HeaderName, HeaderValue};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Deserialize;

use crate::observed::Verdict;

/// How long one query may take, as in KubeElasti.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest answer that is read, in bytes: one series is some hundred.
const MAX_ANSWER: usize = 1 << 20;

/// Selects the `up` series when `uptimeFilter` is absent, as in KubeElasti.
const UPTIME_FILTER: &str = r#"container="prometheus""#;

/// What the operator is set to.
#[derive(Clone, Default)]
pub struct Defaults {
    /// Address of the server when a trigger names none.
    pub server_address: Option<String>,
    /// `Authorization` header for that address, and for no other.
    pub authorization: Option<String>,
}

/// Asks Prometheus servers.
#[derive(Clone)]
pub struct Prometheus {
    client: Client<hyper_rustls::HttpsConnector<HttpConnector>, Empty<bytes::Bytes>>,
    defaults: Defaults,
}

/// Reads a trigger's metadata; the error says what is wrong with it.
pub(super) fn metadata(trigger: &ScaleTrigger) -> Result<PrometheusMetadata, String> {
    if trigger.type_ != "prometheus" {
        return Err(format!("trigger type {:?} is unknown; the known type is prometheus", trigger.type_));
    }
    let metadata = trigger.metadata.clone().unwrap_or_else(|| serde_json::Value::Object(serde_json::Map::default()));
    serde_json::from_value(metadata).map_err(|error| format!("metadata of the prometheus trigger: {error}"))
}

impl Prometheus {
    /// With what the operator is set to.
    pub fn new(defaults: Defaults) -> Self {
        let builder = hyper_rustls::HttpsConnectorBuilder::new();
        let https = match builder.with_native_roots() {
            Ok(builder) => builder,
            // Without the system's certificates plain HTTP still works, and HTTPS fails with an error that says so.
            Err(_) => hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(
                rustls::ClientConfig::builder()
                    .with_root_certificates(rustls::RootCertStore::empty())
                    .with_no_client_auth(),
            ),
        };
        let https = https.https_or_http().enable_http1().build();
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(https);
        Self { client, defaults }
    }

    /// Whether the target is idle.
    pub(super) async fn ask(&self, metadata: &PrometheusMetadata, cooldown: Duration) -> Verdict {
        let answer = tokio::time::timeout(TIMEOUT, self.value_while_up(metadata, cooldown)).await;
        match answer {
            Ok(Ok(value)) => judge(value, metadata.threshold),
            Ok(Err(why)) => Verdict::Unknown(why),
            Err(_) => Verdict::Unknown(format!("Prometheus did not answer within {} s", TIMEOUT.as_secs())),
        }
    }

    async fn value_while_up(&self, metadata: &PrometheusMetadata, cooldown: Duration) -> Result<f64, String> {
        let filter = metadata.uptime_filter.as_deref().unwrap_or(UPTIME_FILTER);
        let up = format!("min_over_time((max(up{{{filter}}}) or vector(0))[{}s:])", cooldown.as_secs_f64().ceil());
        let (up, value) =
            futures::future::try_join(self.query(metadata, &up), self.query(metadata, &metadata.query)).await?;
        if (up - 1.0).abs() > f64::EPSILON {
            return Err(format!("Prometheus was not up for the whole cooldown, as up{{{filter}}} says"));
        }
        Ok(value)
    }

    async fn query(&self, metadata: &PrometheusMetadata, query: &str) -> Result<f64, String> {
        let (address, authorization) = match (&metadata.server_address, &self.defaults.server_address) {
            (Some(own), default) => {
                (own, self.defaults.authorization.as_ref().filter(|_| default.as_ref() == Some(own)))
            }
            (None, Some(default)) => (default, self.defaults.authorization.as_ref()),
            (None, None) => {
                return Err("the trigger has no serverAddress and the operator no default one; set either".to_owned());
            }
        };
        let uri: Uri =
            format!("{}/api/v1/query?query={}", address.trim_end_matches('/'), escape(query)).parse().map_err(
                |error| format!("serverAddress {address:?} is not an address such as http://prometheus:9090: {error}"),
            )?;
        let mut request = Request::get(uri);
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let mut request = request.body(Empty::new()).map_err(|error| format!("serverAddress {address:?}: {error}"))?;
        for (name, value) in &metadata.headers {
            let (name, value) = name
                .parse::<HeaderName>()
                .ok()
                .zip(HeaderValue::from_str(value).ok())
                .ok_or_else(|| format!("headers: {name:?} or its value cannot stand in an HTTP header"))?;
            request.headers_mut().insert(name, value);
        }
        let response =
            self.client.request(request).await.map_err(|error| format!("cannot ask {address}: {}", root(&error)))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await
            .map_err(|error| format!("the answer of {address} broke off: {error}"))?
            .to_bytes();
        if status != StatusCode::OK {
            let text = String::from_utf8_lossy(&body);
            return Err(format!("{address} answered {status}: {}", text.chars().take(200).collect::<String>()));
        }
        single_value(&body).map_err(|why| format!("{address} answered {query:?} with {why}"))
    }
}

/// The innermost cause: the outer ones only say that a request failed.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn judge(value: f64, threshold: f64) -> Verdict {
    // Queries of KubeElasti's users say -1 for "do not scale".
    if (value + 1.0).abs() < f64::EPSILON || value >= threshold { Verdict::Busy } else { Verdict::Idle }
}

/// The one number of an instant query's answer, or what it is instead.
fn single_value(body: &[u8]) -> Result<f64, String> {
    #[derive(Deserialize)]
    struct Answer {
        data: Data,
    }
    #[derive(Deserialize)]
    #[serde(tag = "resultType", content = "result", rename_all = "lowercase")]
    enum Data {
        Vector(Vec<Series>),
        Scalar((f64, String)),
    }
    #[derive(Deserialize)]
    struct Series {
        value: (f64, String),
    }
    let answer: Answer =
        serde_json::from_slice(body).map_err(|error| format!("something else than one number: {error}"))?;
    let text = match answer.data {
        Data::Scalar((_, text)) => text,
        Data::Vector(series) => match <[Series; 1]>::try_from(series) {
            Ok([series]) => series.value.1,
            Err(series) => return Err(format!("{} series, not one", series.len())),
        },
    };
    text.parse().ok().filter(|value: &f64| value.is_finite()).ok_or(format!("{text}, which is no finite number"))
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
fn escape(text: &str) -> String {
    use std::fmt::Write;
    let mut escaped = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ok = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(result_type: &str, result: &serde_json::Value) -> Result<f64, String> {
        let body = serde_json::json!({"status": "success", "data": {"resultType": result_type, "result": result}});
        single_value(&serde_json::to_vec(&body).unwrap())
    }

    #[test]
    fn only_one_finite_number_is_an_answer() {
        let series = |value: &str| serde_json::json!({"metric": {}, "value": [1.0, value]});
        assert_eq!(answer("vector", &serde_json::json!([series("0.25")])), Ok(0.25));
        assert_eq!(answer("scalar", &serde_json::json!([1.0, "2"])), Ok(2.0));
        for bad in ["NaN", "+Inf", "-Inf", "", "x"] {
            assert!(answer("vector", &serde_json::json!([series(bad)])).is_err(), "{bad}");
        }
        assert!(answer("vector", &serde_json::json!([])).unwrap_err().contains("0 series"));
        assert!(answer("vector", &serde_json::json!([series("1"), series("1")])).unwrap_err().contains("2 series"));
        assert!(single_value(b"{}").is_err());
    }

    #[test]
    fn below_the_threshold_is_idle() {
        assert_eq!(judge(0.4, 0.5), Verdict::Idle);
        assert_eq!(judge(0.5, 0.5), Verdict::Busy);
        assert_eq!(judge(-1.0, 0.5), Verdict::Busy);
    }

    #[test]
    fn queries_are_escaped() {
        assert_eq!(escape("sum(rate(x[1m])) + 1"), "sum%28rate%28x%5B1m%5D%29%29%20%2B%201");
    }
}
