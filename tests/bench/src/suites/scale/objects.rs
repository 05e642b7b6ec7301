//! The API server and what is on it: many Services at zero, each with its Deployment and its ElastiService.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use kube::api::{Api, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::Kubeconfig;
use kube::{Client, Config};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::operator::{Access, Metrics};
use crate::cluster::{elasti_services, until};

/// Requests in flight while objects are made.
const AT_ONCE: usize = 32;

/// An operator that is about to wake a target again does so within this.
const SHORTLY: Duration = Duration::from_millis(20);

/// Where the Services are.
const NAMESPACE: &str = "default";

/// Where the product is.
const OWN: &str = elasti_api::names::NAMESPACE;

/// An API server with the product's objects on it, as an administrator sees it.
#[derive(Clone)]
pub(super) struct ApiServer(Client);

impl ApiServer {
    /// That of `KUBECONFIG`.
    pub(super) async fn new() -> Result<Self> {
        let config = Config::infer().await.context("no kubeconfig: run this by `cargo xtask bench`")?;
        Ok(Self(Client::try_from(config)?))
    }

    /// Makes the Services with these numbers, at zero.
    pub(super) async fn add(&self, numbers: std::ops::Range<usize>) -> Result<()> {
        let made = stream::iter(numbers).map(|number| self.add_one(number)).buffer_unordered(AT_ONCE);
        made.try_collect::<Vec<()>>().await?;
        Ok(())
    }

    async fn add_one(&self, number: usize) -> Result<()> {
        let name = name(number);
        let (labels, metadata) = (json!({"app": name}), json!({"name": name}));
        let deployment = json!({"metadata": metadata, "spec": {
            "replicas": 0, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "target", "image": "target"}]}},
        }});
        let service = json!({"metadata": metadata, "spec": {"selector": labels, "ports": [{"port": 80}]}});
        let elasti = json!({
            "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService", "metadata": metadata,
            "spec": {"service": name, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}},
        });
        let how = PostParams::default();
        self.deployments().create(&how, &serde_json::from_value(deployment)?).await?;
        let services: Api<Service> = Api::namespaced(self.0.clone(), NAMESPACE);
        services.create(&how, &serde_json::from_value(service)?).await?;
        self.elastis().create(&how, &serde_json::from_value(elasti)?).await?;
        Ok(())
    }

    fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.0.clone(), NAMESPACE)
    }

    fn elastis(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.0.clone(), NAMESPACE, &elasti_services())
    }

    /// The UID of an ElastiService.
    pub(super) async fn uid(&self, number: usize) -> Result<String> {
        self.elastis().get(&name(number)).await?.metadata.uid.context("an object has a UID")
    }

    /// Waits until a target has been woken, and puts it back.
    pub(super) async fn woken(&self, number: usize) -> Result<()> {
        let name = name(number);
        until("the target is scaled up", || async {
            let scale = self.deployments().get_scale(&name).await?;
            Ok((scale.spec.and_then(|spec| spec.replicas) > Some(0)).then_some(()))
        })
        .await
    }

    /// Scales a target to zero by hand, until it stays there: while the operator has not heard that nobody waits any more, it is woken
    /// again.
    pub(super) async fn put_to_sleep(&self, number: usize) -> Result<()> {
        let name = name(number);
        until("the target stays at zero", || async {
            let patch = Patch::Merge(json!({"spec": {"replicas": 0}}));
            self.deployments().patch_scale(&name, &PatchParams::default(), &patch).await?;
            tokio::time::sleep(SHORTLY).await;
            let scale = self.deployments().get_scale(&name).await?;
            Ok((scale.spec.and_then(|spec| spec.replicas).unwrap_or(0) == 0).then_some(()))
        })
        .await
    }

    /// Requests that it has answered so far; a watch is one when it ends.
    pub(super) async fn requests(&self) -> Result<f64> {
        Ok(Metrics(self.metrics().await?).sum("apiserver_request_total{"))
    }

    async fn metrics(&self) -> Result<String> {
        Ok(self.0.request_text(http::Request::get("/metrics").body(Vec::new())?).await?)
    }

    /// What it has been told so far, leases aside.
    pub(super) async fn writes(&self) -> Result<f64> {
        let metrics = self.metrics().await?;
        let writes = |line: &&str| {
            let verbs = ["APPLY", "PATCH", "DELETE"].map(|verb| format!("verb=\"{verb}\""));
            let event = line.contains(r#"resource="events""#) && line.contains(r#"verb="POST""#);
            event || verbs.iter().any(|verb| line.contains(verb))
        };
        let lines: Vec<&str> = metrics.lines().filter(writes).collect();
        Ok(Metrics(lines.join("\n")).sum("apiserver_request_total{"))
    }

    /// The CA of the operator's streams, once it has made one.
    pub(super) async fn ca(&self) -> Result<String> {
        let maps: Api<ConfigMap> = Api::namespaced(self.0.clone(), OWN);
        until("the operator has published its CA", || async {
            let map = maps.get_opt(elasti_api::names::CA_CONFIG_MAP).await?;
            Ok(map.and_then(|map| map.data?.get(elasti_api::names::CA_KEY).cloned()))
        })
        .await
    }

    /// Makes a resolver's pod and a token for it; their names.
    pub(super) async fn resolver(&self, number: usize) -> Result<(String, String)> {
        let pods: Api<Pod> = Api::namespaced(self.0.clone(), OWN);
        let pod = json!({"metadata": {"name": format!("elasti-resolver-{number}")}, "spec": {
            "serviceAccountName": elasti_api::names::RESOLVER,
            "containers": [{"name": "resolver", "image": "elasti-resolver"}],
        }});
        let pod = pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
        let name = pod.metadata.name.context("a pod has a name")?;
        let bound = json!({"kind": "Pod", "apiVersion": "v1", "name": name, "uid": pod.metadata.uid});
        let audience = json!([elasti_api::names::TOKEN_AUDIENCE]);
        Ok((name, self.token(elasti_api::names::RESOLVER, &audience, &bound).await?))
    }

    async fn token(&self, account: &str, audiences: &Value, bound: &Value) -> Result<String> {
        let request = json!({"spec": {"audiences": audiences, "boundObjectRef": bound, "expirationSeconds": 36_000}});
        let request: TokenRequest = serde_json::from_value(request)?;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.0.clone(), OWN);
        let issued = accounts.create_token_request(account, &PostParams::default(), &request).await?;
        Ok(issued.status.context("a token is issued")?.token)
    }

    /// What an operator needs to get here: the administrator's kubeconfig, but with the operator's own token.
    pub(super) async fn access(&self, log: &Path) -> Result<Access> {
        let token = self.token(elasti_api::names::OPERATOR, &json!([]), &Value::Null).await?;
        let mut kubeconfig = serde_json::to_value(Kubeconfig::read()?)?;
        kubeconfig["users"][0]["user"] = json!({"token": token});
        let files = TempDir::new()?;
        // JSON is YAML.
        std::fs::write(files.path().join("kubeconfig"), serde_json::to_vec(&kubeconfig)?)?;
        Ok(Access { files, log: log.to_owned() })
    }
}

fn name(number: usize) -> String {
    format!("service-{number}")
}
