//! The `prometheus` trigger: idle while a query's value is below a threshold.
//!
//! An answer counts only if Prometheus itself was up for the whole cooldown: a server that has just started knows nothing
//! of the traffic before it. Numbers that are none (NaN, infinite), no series and several series cannot tell.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use elasti_api::v1alpha1::{PrometheusMetadata, ScaleTrigger};
use http::header::{AUTHORIZATION, HeaderName, HeaderValue};
use http::{HeaderMap, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::https::{self, Clients, HttpsClient};
use super::secrets::Secrets;
use crate::observed::Verdict;

/// How long one query may take, as in KubeElasti.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Triggers that one server is asked about at once, with two queries each: thousands of connections to one that is dead would
/// take the open files that others need.
const PLACES: usize = 64;

/// How long a trigger may wait for its turn: in as long it would be asked again by default.
const PLACE_PATIENCE: Duration = Duration::from_secs(30);

/// Longest answer that is read, in bytes: one series is some hundred.
const MAX_ANSWER: usize = 1 << 20;

/// Selects the `up` series when `uptimeFilter` is absent, as in KubeElasti.
const UPTIME_FILTER: &str = r#"container="prometheus""#;

/// How often within a cooldown it is looked whether Prometheus was up.
const UPTIME_STEPS: f64 = 20.0;

/// Most seconds between two such looks: as far apart as they are by default.
const UPTIME_STEP_MAX: f64 = 60.0;

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
    clients: Clients,
    secrets: Secrets,
    places: Places,
    defaults: Defaults,
}

/// Reads a trigger's metadata; the error says what is wrong with it.
pub(super) fn metadata(trigger: &ScaleTrigger) -> Result<PrometheusMetadata, String> {
    if trigger.type_ != "prometheus" {
        return Err(format!("trigger type {:?} is unknown", trigger.type_));
    }
    let metadata = trigger.metadata.clone().unwrap_or_else(|| serde_json::Value::Object(serde_json::Map::default()));
    let metadata: PrometheusMetadata =
        serde_json::from_value(metadata).map_err(|error| format!("metadata of the prometheus trigger: {error}"))?;
    if metadata.authorization_secret.is_some() && metadata.headers.keys().any(|name| is_authorization(name)) {
        return Err("headers has an Authorization and authorizationSecret names another; name one".to_owned());
    }
    match metadata.tls.as_ref().and_then(https::fault) {
        Some(fault) => Err(fault),
        None => Ok(metadata),
    }
}

fn is_authorization(header: &str) -> bool {
    header.eq_ignore_ascii_case(AUTHORIZATION.as_str())
}

impl Prometheus {
    /// With what the operator is set to; `client` reads Secrets.
    pub fn new(defaults: Defaults, client: kube::Client) -> Self {
        Self { clients: Clients::new(), secrets: Secrets::new(client), places: Places::default(), defaults }
    }

    /// Whether the target of an ElastiService in this namespace is idle.
    pub(super) async fn ask(&self, namespace: &str, metadata: &PrometheusMetadata, cooldown: Duration) -> Verdict {
        let address =
            metadata.server_address.as_deref().or(self.defaults.server_address.as_deref()).unwrap_or_default();
        let place = self.places.at(address);
        let Ok(Ok(_place)) = tokio::time::timeout(PLACE_PATIENCE, place.acquire_owned()).await else {
            return Verdict::Unknown(format!(
                "{address} does not answer as fast as {PLACES} triggers at once ask it; give it more CPU, or raise --polling-interval"
            ));
        };
        let asked = async {
            let server = self.server(namespace, metadata).await?;
            server.value_while_up(metadata, cooldown).await
        };
        match tokio::time::timeout(TIMEOUT, asked).await {
            Ok(Ok(value)) => judge(value, metadata.threshold),
            Ok(Err(why)) => Verdict::Unknown(why),
            Err(_) => Verdict::Unknown(format!(
                "{address} did not answer within {} s; see whether it is up and the operator may reach it",
                TIMEOUT.as_secs()
            )),
        }
    }

    async fn server<'a>(&'a self, namespace: &str, metadata: &'a PrometheusMetadata) -> Result<Server<'a>, String> {
        let default = self.defaults.server_address.as_deref();
        let address =
            metadata.server_address.as_deref().or(default).ok_or_else(|| {
                "the trigger has no serverAddress and the operator no default one; set either".to_owned()
            })?;
        let mut headers = HeaderMap::new();
        let authorization = match &metadata.authorization_secret {
            Some(secret) => Some(self.secrets.value(namespace, secret).await?),
            // For that address, and for no other.
            None => {
                self.defaults.authorization.clone().filter(|_| default.is_some_and(|default| same(default, address)))
            }
        };
        if let Some(authorization) = authorization {
            let mut value = HeaderValue::try_from(authorization)
                .map_err(|_| "the authorization cannot stand in an HTTP header".to_owned())?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        for (name, value) in &metadata.headers {
            let (name, value) = name
                .parse::<HeaderName>()
                .ok()
                .zip(HeaderValue::from_str(value).ok())
                .ok_or_else(|| format!("headers: {name:?} or its value cannot stand in an HTTP header"))?;
            headers.insert(name, value);
        }
        Ok(Server { client: self.clients.of(metadata.tls.as_ref())?, address, headers })
    }
}

/// How many may ask a server at once, by its address: a dead one delays nobody who asks another.
#[derive(Clone, Default)]
struct Places(Arc<Mutex<HashMap<String, Arc<Semaphore>>>>);

impl Places {
    fn at(&self, address: &str) -> Arc<Semaphore> {
        // Every change is one insertion or removal, so a poisoned lock still guards a sound map.
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(address) {
            return Arc::clone(server);
        }
        // Nobody asks those any more.
        servers.retain(|_, server| Arc::strong_count(server) > 1);
        Arc::clone(servers.entry(address.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(PLACES))))
    }
}

/// One server, as one trigger asks it.
struct Server<'a> {
    client: HttpsClient,
    address: &'a str,
    headers: HeaderMap,
}

impl Server<'_> {
    async fn value_while_up(&self, metadata: &PrometheusMetadata, cooldown: Duration) -> Result<f64, String> {
        let filter = metadata.uptime_filter.as_deref().unwrap_or(UPTIME_FILTER);
        let up = uptime(filter, cooldown);
        let (up, value) = futures::future::try_join(self.query(&up), self.query(&metadata.query)).await?;
        if (up - 1.0).abs() > f64::EPSILON {
            return Err(format!(
                "{} was not up for the whole cooldown, as its up{{{filter}}} says; if it was, set uptimeFilter to what selects its own series of up",
                self.address
            ));
        }
        Ok(value)
    }

    async fn query(&self, query: &str) -> Result<f64, String> {
        let address = self.address;
        let uri: Uri =
            format!("{}/api/v1/query?query={}", address.trim_end_matches('/'), escape(query)).parse().map_err(
                |error| format!("serverAddress {address:?} is not an address such as http://prometheus:9090: {error}"),
            )?;
        let mut request =
            Request::get(uri).body(Empty::new()).map_err(|error| format!("serverAddress {address:?}: {error}"))?;
        request.headers_mut().extend(self.headers.clone());
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

/// KubeElasti's query for the uptime, at steps of our own: left to themselves they are of Prometheus's evaluation interval (a minute by
/// default), so that a shorter cooldown has no step in it at most times.
fn uptime(filter: &str, cooldown: Duration) -> String {
    let seconds = cooldown.as_secs_f64().ceil();
    let step = (seconds / UPTIME_STEPS).clamp(1.0, UPTIME_STEP_MAX).floor();
    format!("min_over_time((max(up{{{filter}}}) or vector(0))[{seconds}s:{step}s])")
}

/// Whether two addresses are one: a slash at the end says nothing.
fn same(one: &str, other: &str) -> bool {
    one.trim_end_matches('/') == other.trim_end_matches('/')
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
mod tests;
