//! The ElastiService resource, `elasti.truefoundry.com/v1alpha1`.
//!
//! The schema is KubeElasti's (v0.1.30), so that its manifests apply unchanged; fields of our own are optional.
//! Closed sets of words are strings here and enums in the schema: the API server refuses a wrong word at admission, and
//! an object that was stored under an older schema still deserializes, so that one of them never hides the others.
//! `config/crd/` is generated from this module by `cargo xtask crd`.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::message::{HoldPolicy, Mode};

/// Seconds without traffic before a target sleeps when `cooldownPeriod` is absent or 0.
pub const DEFAULT_COOLDOWN_SECONDS: u32 = 900;

/// Lets one Service scale to zero and wakes its target when a connection comes.
#[expect(clippy::duplicated_attributes, reason = "each printer column has a type")]
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "elasti.truefoundry.com",
    version = "v1alpha1",
    kind = "ElastiService",
    plural = "elastiservices",
    singular = "elastiservice",
    shortname = "elasti",
    namespaced,
    status = "ElastiServiceStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "Lets one Service scale to zero and wakes its target when a connection comes.",
    printcolumn(name = "Service", type_ = "string", json_path = ".spec.service"),
    printcolumn(name = "Target", type_ = "string", json_path = ".spec.scaleTargetRef.name"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".status.mode"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ElastiServiceSpec {
    /// What is scaled.
    pub scale_target_ref: ScaleTargetRef,

    /// Name of the Service, in the same namespace, whose connections wake the target.
    #[schemars(length(min = 1, max = 63))]
    pub service: String,

    /// Replicas that a wake brings the target to.
    #[serde(default = "one")]
    #[schemars(range(min = 1), extend("format" = "int32"))]
    pub min_target_replicas: i32,

    /// Seconds for which every trigger must call the target idle before it sleeps. 0 means the default.
    #[serde(default = "default_cooldown")]
    #[schemars(range(min = 0, max = 604_800), extend("format" = "int32"))]
    pub cooldown_period: u32,

    /// Seconds for which the target runs after a wake at least. Absent: it sleeps again after the cooldown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604_800), extend("format" = "int32"))]
    pub min_uptime: Option<u32>,

    /// What decides that the target is idle: all of them must agree. Absent: one trigger of type `traffic`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-validations" = [{
        "rule": "self.filter(trigger, trigger.type == 'traffic').size() <= 1",
        "message": "write one trigger of type traffic at most",
    }]))]
    pub triggers: Option<Vec<ScaleTrigger>>,

    /// The autoscaler that owns the target's replicas above zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaler: Option<AutoscalerRef>,

    /// When the target may sleep; outside of it a running target is left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled_period: Option<EnabledPeriod>,

    /// HTTP requests that are answered at zero without waking the target, first match first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub probe_response: Option<Vec<ProbeResponse>>,

    /// How connections are held while the target is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Hold>,

    /// What wakes the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake: Option<Wake>,

    /// ElastiServices that are woken together with this one, such as that of the database of a frontend. Each sleeps by its own
    /// triggers: one that is awake keeps no other awake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), extend("x-kubernetes-validations" = [{
        "rule": "self.all(one, self.exists_one(other, other == one))",
        "message": "name each ElastiService once",
    }]))]
    pub wake_with: Option<Vec<WakePartner>>,

    /// What resolvers must know of single ports of the Service, where they cannot find it out themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 100), extend(
        "x-kubernetes-list-type" = "map",
        "x-kubernetes-list-map-keys" = ["port"],
    ))]
    pub ports: Option<Vec<PortSpec>>,
}

/// What wakes a target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Wake {
    /// `connection` (the default): a client connects. `data`: it also sends something; not for protocols whose server speaks
    /// first. `auto`: it sends something or, where HTTP is not known to be spoken, stays for 200 ms; on ports of protocols
    /// whose server is known to speak first, it connects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["connection", "data", "auto"]))]
    pub on: Option<String>,
}

/// An ElastiService that is woken together with the one that names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WakePartner {
    /// Name of the ElastiService.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its namespace; absent: that of the one that names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
}

/// What resolvers must know of one port of the Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortSpec {
    /// The port's number in the Service.
    #[schemars(range(min = 1, max = 65_535), extend("format" = "int32"))]
    pub port: u16,
    /// What is spoken on the port: `http` (HTTP/1 and h2c), `tcp` (anything else) or `auto` (whoever speaks first shows
    /// it). Absent: the Service port's `appProtocol`, then its name, else `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["auto", "http", "tcp"]))]
    pub protocol: Option<String>,
    /// Resolvers begin their connections to the target with a PROXY protocol header of this version. The target must
    /// accept connections with and without one, since clients reach it directly while it is awake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["v2"]))]
    pub proxy_protocol: Option<String>,
}

/// A resource with a `/scale` subresource in the namespace of the ElastiService.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.apiVersion != 'apps/v1' || self.kind in ['Deployment', 'deployments', 'StatefulSet', 'ReplicaSet']",
    "message": "of apps/v1 a Deployment or a StatefulSet can be scaled; a Rollout has apiVersion argoproj.io/v1alpha1",
}, {
    "rule": "self.apiVersion != 'argoproj.io/v1alpha1' || self.kind in ['Rollout', 'rollouts']",
    "message": "of argoproj.io/v1alpha1 a Rollout can be scaled; a Deployment or StatefulSet has apiVersion apps/v1",
}, {
    "rule": "self.apiVersion.matches('^([a-z0-9.-]+/)?v[0-9]+((alpha|beta)[0-9]+)?$')",
    "message": "apiVersion is a group and a version, such as apps/v1",
}, {
    "rule": "self.kind.matches('^[A-Za-z][A-Za-z0-9]*$')",
    "message": "kind is the name of a kind, such as Deployment",
}, {
    "rule": "self.name != ''",
    "message": "name what to scale, such as a Deployment",
}]))]
pub struct ScaleTargetRef {
    /// API group and version of the target.
    #[schemars(length(max = 317))]
    pub api_version: String,
    /// Kind of the target: `Deployment`, `StatefulSet`, Argo's `Rollout`, or any other with a `/scale` subresource that the operator
    /// was given permission for. `deployments` and `rollouts` are older spellings of `Deployment` and `Rollout`.
    #[schemars(length(max = 63))]
    pub kind: String,
    /// Name of the target.
    #[schemars(length(max = 253))]
    pub name: String,
}

impl ScaleTargetRef {
    /// The kind in its one spelling: `deployments` and `rollouts` are older ones.
    pub fn kind(&self) -> &str {
        match self.kind.as_str() {
            "deployments" => "Deployment",
            "rollouts" => "Rollout",
            kind => kind,
        }
    }
}

/// One source of the answer to "is the target idle?".
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScaleTrigger {
    /// The kind of trigger.
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["prometheus", "traffic"]))]
    pub type_: String,
    /// What the trigger needs to know; see [`PrometheusMetadata`] and [`TrafficMetadata`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub metadata: Option<serde_json::Value>,
}

/// Metadata of a `traffic` trigger: the target is idle while no connection to its pods is opened or carries data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrafficMetadata {
    /// What an open connection without data means: `ignore` (the default) or `hold`, which keeps the target awake.
    #[serde(default)]
    pub idle_connections: Option<String>,
    /// With `hold`: fewer open connections than this keep nothing awake. Absent: 1.
    #[serde(default)]
    pub min_connections: Option<u32>,
    /// Clients whose connections do not count.
    #[serde(default)]
    pub ignore_sources: Vec<IgnoredSource>,
    /// Beginnings of `User-Agent` headers of HTTP: what such a client asks for at zero wakes nothing.
    #[serde(default)]
    pub ignore_user_agents: Vec<String>,
}

/// Clients whose connections do not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IgnoredSource {
    /// A range of addresses, such as `10.0.0.0/8`.
    Range(String),
    /// Pods.
    Pods(IgnoredPods),
}

/// Pods whose connections do not count.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IgnoredPods {
    /// Their namespace; absent: that of the ElastiService.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Their labels.
    pub pod_selector: LabelSelector,
}

impl Eq for IgnoredPods {}

impl<'de> Deserialize<'de> for IgnoredSource {
    /// Not `untagged`, whose errors name no key.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(range) => Ok(Self::Range(range)),
            pods => serde_json::from_value(pods).map(Self::Pods).map_err(serde::de::Error::custom),
        }
    }
}

/// Metadata of a `prometheus` trigger: the target is idle while the query's value is below the threshold. Keys that are not
/// known are ignored, as KubeElasti does, and told ([`PrometheusMetadata::KEYS`]).
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PrometheusMetadata {
    /// Base address of the Prometheus server; absent: the operator's default address.
    #[serde(default)]
    pub server_address: Option<String>,
    /// A query with one series as its answer.
    pub query: String,
    /// The value below which the target is idle: a number, or a string that holds one.
    #[serde(deserialize_with = "number_or_string")]
    pub threshold: f64,
    /// Selects the `up` series that says whether Prometheus itself was there for the whole cooldown.
    #[serde(default)]
    pub uptime_filter: Option<String>,
    /// Headers of the query's request.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Where the `Authorization` header is kept: a Secret in the namespace of the ElastiService.
    #[serde(default)]
    pub authorization_secret: Option<SecretKey>,
    /// How the server's certificate is checked; absent: by the authorities that the operator's system trusts.
    #[serde(default)]
    pub tls: Option<TriggerTls>,
}

impl PrometheusMetadata {
    /// Its keys.
    pub const KEYS: [&str; 7] =
        ["serverAddress", "query", "threshold", "uptimeFilter", "headers", "authorizationSecret", "tls"];
}

/// One value of a Secret.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretKey {
    /// Name of the Secret.
    pub name: String,
    /// Key of the value.
    pub key: String,
}

/// How the certificate of a trigger's server is checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TriggerTls {
    /// The authorities to trust, and no others: certificates in PEM.
    #[serde(default)]
    pub ca: Option<String>,
    /// Trust any certificate. Whoever is on the way to the server can put the target to sleep and read the headers.
    #[serde(default)]
    pub insecure_skip_verify: bool,
}

/// An autoscaler of the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalerRef {
    /// The kind of autoscaler.
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["hpa", "keda"]))]
    pub type_: String,
    /// Name of the `HorizontalPodAutoscaler` or `ScaledObject`.
    pub name: String,
}

/// A recurring time in which the target may sleep.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnabledPeriod {
    /// Cron expression of five fields: when the period starts. It may begin with `CRON_TZ=` and a time zone.
    #[serde(default = "midnight")]
    pub schedule: String,
    /// Time zone of the schedule by its IANA name, such as `Europe/Berlin`; absent: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// How long the period lasts, such as `8h` or `1h30m`.
    #[serde(default = "one_day")]
    #[schemars(extend("x-kubernetes-validations" = [{
        "rule": "duration(self) > duration('0s')",
        "message": "a duration above zero such as 8h or 1h30m",
    }]))]
    pub duration: String,
}

/// A rule for HTTP requests that are answered at zero: all of path, headers, query and method must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbeResponse {
    /// The path; absent: every path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Headers that must all match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub headers: Option<Vec<HeaderMatch>>,
    /// Query parameters that must all match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub query_params: Option<Vec<QueryParamMatch>>,
    /// The method; absent: every method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"]))]
    pub method: Option<String>,
    /// The answer.
    pub response: ProbeAnswer,
}

/// How a path must look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PathMatch {
    /// How the value is compared; absent: `PathPrefix`, by whole segments.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Exact", "PathPrefix", "RegularExpression"]))]
    pub type_: Option<String>,
    /// The path, prefix or expression; absent: `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub value: Option<String>,
}

/// How a header must look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeaderMatch {
    /// Name of the header, in any case.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// How the value is compared; absent: `Exact`.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Exact", "RegularExpression"]))]
    pub type_: Option<String>,
    /// The value or expression.
    #[schemars(length(min = 1, max = 4096))]
    pub value: String,
}

/// How a query parameter must look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueryParamMatch {
    /// Name of the parameter.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// How the value is compared; absent: `Exact`.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Exact", "RegularExpression"]))]
    pub type_: Option<String>,
    /// The value or expression.
    #[schemars(length(min = 1, max = 1024))]
    pub value: String,
}

/// The answer to a request that must not wake the target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbeAnswer {
    /// HTTP status.
    #[schemars(extend("enum" = [200, 204, 400, 401, 403, 404, 500, 502, 503, 504], "format" = "int32"))]
    pub status: i32,
    /// Body.
    pub body: String,
}

/// How connections are held while the target is not ready.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Hold {
    /// A connection that has been held for this long is closed, such as `90s`; absent: `10m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = [{
        "rule": "duration(self) > duration('0s') && duration(self) <= duration('24h')",
        "message": "a duration above zero and of at most 24h, such as 90s or 10m",
    }]))]
    pub timeout: Option<String>,
    /// Connections held at once by one resolver; more are refused. Absent: 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000), extend("format" = "int32"))]
    pub max_connections: Option<u32>,
    /// What a held connection may send before its sender has to wait, in bytes. Absent: as much as the node's kernel
    /// takes (`net.ipv4.tcp_rmem`, mostly 128 KiB).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4096, max = 16_777_216), extend("format" = "int32"))]
    pub max_buffered_bytes: Option<u32>,
    /// Connections, or requests of HTTP, that one resolver has open to each ready pod at once; more wait. Absent: any
    /// number of connections; 250 requests of HTTP, beyond which each waits for 5 s at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000), extend("format" = "int32"))]
    pub concurrency: Option<u32>,
}

/// What the operator has made of an ElastiService.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ElastiServiceStatus {
    /// When the mode last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reconciled_time: Option<Time>,
    /// When the target was last woken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scaled_up_time: Option<Time>,
    /// `proxy` while connections are intercepted, `serve` while clients reach the target directly.
    #[serde(default, deserialize_with = "known_mode", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub mode: Option<Mode>,
    /// Counts the changes of mode and ports, so that a resolver never takes an older state for a newer one.
    #[serde(default)]
    #[schemars(extend("format" = "int64"))]
    pub revision: u64,
    /// The interception port of each TCP port of the Service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<InterceptedPort>,
    /// The generation of the spec that the conditions speak of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `Intercepting` and `TargetReady`, each with cause and cure where it is not as wished.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The interception port of one TCP port of the Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterceptedPort {
    /// The Service port.
    #[schemars(extend("format" = "int32"))]
    pub port: u16,
    /// The resolvers' port for it, unique in the cluster.
    #[schemars(extend("format" = "int32"))]
    pub interception_port: u16,
}

impl ElastiServiceSpec {
    /// For how long every trigger must call the target idle before it sleeps.
    pub fn cooldown(&self) -> Duration {
        let seconds = if self.cooldown_period == 0 { DEFAULT_COOLDOWN_SECONDS } else { self.cooldown_period };
        Duration::from_secs(seconds.into())
    }

    /// How connections are held; `default` says what the spec does not. A timeout that admission let through but that
    /// does not parse counts as absent.
    pub fn hold_policy(&self, default: HoldPolicy) -> HoldPolicy {
        let Some(hold) = &self.hold else { return default };
        HoldPolicy {
            timeout: hold.timeout.as_deref().and_then(duration).unwrap_or(default.timeout),
            max_connections: hold.max_connections.unwrap_or(default.max_connections),
            max_buffered_bytes: hold.max_buffered_bytes.or(default.max_buffered_bytes),
            concurrency: hold.concurrency.or(default.concurrency),
        }
    }
}

/// Parses a duration as Go and Kubernetes write it, such as `1h30m`; nothing when it is not one or is not above zero.
pub fn duration(text: &str) -> Option<Duration> {
    let parsed: kube::core::Duration = text.parse().ok()?;
    (!parsed.is_negative()).then(|| Duration::from(parsed)).filter(|duration| !duration.is_zero())
}

fn one() -> i32 {
    1
}

fn default_cooldown() -> u32 {
    DEFAULT_COOLDOWN_SECONDS
}

fn midnight() -> String {
    "0 0 * * *".to_owned()
}

fn one_day() -> String {
    "24h".to_owned()
}

fn any_object(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "description": "What the trigger needs to know.",
        "x-kubernetes-preserve-unknown-fields": true,
    })
}

/// KubeElasti writes a plain string, possibly empty: what is not a mode counts as none yet.
fn known_mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Mode>, D::Error> {
    let word = Option::<String>::deserialize(deserializer)?;
    Ok(word.and_then(|word| serde_json::from_value(serde_json::Value::String(word)).ok()))
}

fn number_or_string<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Threshold {
        Number(f64),
        Text(String),
    }
    match Threshold::deserialize(deserializer)? {
        Threshold::Number(number) => Ok(number),
        Threshold::Text(text) => text.trim().parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| {
            serde::de::Error::custom(format!("threshold {text:?} is not a number, write one such as \"0.5\""))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(spec: serde_json::Value) -> ElastiServiceSpec {
        serde_json::from_value(spec).unwrap()
    }

    fn minimal() -> serde_json::Value {
        serde_json::json!({
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "deployments", "name": "web"},
            "service": "web",
        })
    }

    /// Keeps out B1: without `minTargetReplicas` a target never wakes, and an active one is scaled to zero.
    #[test]
    fn defaults_mean_what_the_docs_say() {
        let spec = parse(minimal());
        assert_eq!((spec.min_target_replicas, spec.cooldown()), (1, Duration::from_mins(15)));
        assert_eq!(spec.scale_target_ref.kind(), "Deployment");
        assert_eq!(spec.hold_policy(HoldPolicy::default()), HoldPolicy::default());
        let mut zero = minimal();
        zero["cooldownPeriod"] = 0.into();
        assert_eq!(parse(zero).cooldown(), Duration::from_mins(15));
    }

    #[test]
    fn hold_is_read_as_kubernetes_writes_durations() {
        let mut spec = minimal();
        spec["hold"] = serde_json::json!({"timeout": "1m30s", "maxConnections": 5});
        let default = HoldPolicy { concurrency: Some(7), ..HoldPolicy::default() };
        let policy = parse(spec).hold_policy(default);
        assert_eq!((policy.timeout, policy.max_connections), (Duration::from_secs(90), 5));
        assert_eq!(policy.concurrency, Some(7), "what is not said is as the operator is set");
        assert_eq!((duration("-1s"), duration("soon"), duration("0s")), (None, None, None));
    }

    #[test]
    fn a_threshold_may_be_a_number_or_a_string() {
        for threshold in [serde_json::json!(0.5), serde_json::json!("0.5"), serde_json::json!(" 0.5 ")] {
            let metadata: PrometheusMetadata =
                serde_json::from_value(serde_json::json!({"query": "q", "threshold": threshold})).unwrap();
            assert!((metadata.threshold - 0.5).abs() < f64::EPSILON);
        }
        for bad in ["half", "NaN", "inf", ""] {
            let metadata = serde_json::json!({"query": "q", "threshold": bad});
            let error = serde_json::from_value::<PrometheusMetadata>(metadata).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[test]
    fn a_status_of_kubeelasti_deserializes() {
        let status: ElastiServiceStatus = serde_json::from_value(serde_json::json!({"mode": ""})).unwrap();
        assert_eq!(status.mode, None);
        let status: ElastiServiceStatus = serde_json::from_value(serde_json::json!({"mode": "proxy"})).unwrap();
        assert_eq!(status.mode, Some(Mode::Proxy));
    }
}
