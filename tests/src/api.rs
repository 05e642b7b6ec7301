//! A real API server and nothing behind it: no controller, no kubelet. What those would do, a test does itself.
//!
//! The tests run in the network namespace of the API server, with the administrator's kubeconfig in `KUBECONFIG`, as
//! `cargo xtask test --only api` sets it up. An operator sees the whole cluster, so tests take turns: whoever holds a
//! [`Cluster`] is alone. Objects are JSON as users write it; waiting is for conditions, with a deadline.

use std::path::Path;
use std::time::{Duration, Instant};

use elasti_api::names;
use elasti_api::v1alpha1::ElastiService;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, CustomResourceExt, Resource};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

mod faulty;
mod objects;
mod processes;
mod prometheus;

pub use faulty::{Done, Fault, FaultyWay};
pub use objects::{custom, deployment, elasti_service, ready_endpoint, scaled_object, service};
pub use processes::{Operator, Resolver, host_address};
pub use prometheus::{Prometheus, Says};

/// Longer than anything takes on a busy machine; what is late fails for another reason than time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who applies objects.
const MANAGER: &str = "elasti-tests";

static TURN: Mutex<()> = Mutex::const_new(());

/// Waits until `seen` gives something.
pub async fn until<T>(what: &str, mut seen: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(it) = seen().await {
            return it;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The API server, with the product's CRD, namespace and permissions, and without any ElastiService.
pub struct Cluster {
    client: Client,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Waits for its turn and clears what earlier tests have left.
    pub async fn new() -> Self {
        let turn = TURN.lock().await;
        let clients = elasti_operator::clients::Clients::infer().await;
        let client = clients.expect("run this by `cargo xtask test --only api`").watches;
        let cluster = Self { client, _turn: turn };
        cluster.enforce_schema().await;
        for file in ["default/namespace.yaml", "rbac/service-accounts.yaml"].into_iter().chain([
            "cluster-wide/operator-role.yaml",
            "rbac/token-role.yaml",
            "rbac/operator-role.yaml",
        ]) {
            cluster.apply_file(file).await;
        }
        let all = Api::<DynamicObject>::all_with(cluster.client.clone(), &ApiResource::erase::<ElastiService>(&()));
        for left in all.list(&ListParams::default()).await.unwrap().items {
            let sandbox = cluster.in_namespace(left.metadata.namespace.as_deref().unwrap());
            let name = left.metadata.name.as_deref().unwrap();
            if left.metadata.finalizers.is_some() {
                sandbox.patch::<ElastiService>(name, &json!({"metadata": {"finalizers": null}})).await;
            }
            sandbox.delete::<ElastiService>(name).await;
        }
        // The operators of earlier tests are gone; nobody shall wait for their Lease to run out.
        cluster.own().delete::<k8s_openapi::api::coordination::v1::Lease>(names::OPERATOR).await;
        cluster
    }

    /// Puts the product's CRD in force.
    pub async fn enforce_schema(&self) {
        self.apply(&serde_json::to_value(ElastiService::crd()).unwrap()).await;
        let sandbox = self.in_namespace("default");
        until("the schema is in force", async || {
            let refused = sandbox.dry_run(&elasti_service("probe", json!({"service": ""}))).await.err()?;
            refused.contains("spec.service").then_some(())
        })
        .await;
    }

    /// Has the API server serve KEDA's `ScaledObject`s, as its CRD would; nobody acts upon them.
    pub async fn serve_scaled_objects(&self) {
        self.serve("keda.sh", "ScaledObject", &Value::Null).await;
    }

    /// Has the API server serve a kind of the version `v1alpha1` whose spec may be anything; `scale` is where it keeps its replicas,
    /// null if it has no `/scale`. Nobody acts upon its objects.
    pub async fn serve(&self, group: &str, kind: &str, scale: &Value) {
        let (singular, plural) = (kind.to_lowercase(), plural(kind));
        let names = json!({"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": singular});
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let mut version =
            json!({"name": "v1alpha1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}});
        if !scale.is_null() {
            version["subresources"] = json!({"scale": scale});
        }
        let crd = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [version]},
        });
        self.apply(&crd).await;
        let (default, probe) = (self.in_namespace("default"), custom(group, kind, "probe", &json!({})));
        until("the kind is served", async || default.dry_run(&probe).await.ok()).await;
    }

    /// Has the API server serve such a kind no more.
    pub async fn serve_no_more(&self, group: &str, kind: &str) {
        let crds = Api::<CustomResourceDefinition>::all(self.client.clone());
        crds.delete(&format!("{}.{group}", plural(kind)), &DeleteParams::default()).await.unwrap();
        let (default, probe) = (self.in_namespace("default"), custom(group, kind, "probe", &json!({})));
        until("the kind is served no more", async || default.dry_run(&probe).await.err()).await;
    }

    /// Lets the operator scale another kind, as a `ClusterRole` with the label of docs/targets.md does where its rules are
    /// aggregated.
    pub async fn permit_targets(&self, group: &str, kind: &str) {
        let mut role = objects_in("cluster-wide/operator-role.yaml").remove(2);
        let plural = plural(kind);
        role["rules"] = json!([
            {"apiGroups": [group], "resources": [plural], "verbs": ["list", "watch"]},
            {"apiGroups": [group], "resources": [format!("{plural}/scale")], "verbs": ["get", "patch"]},
        ]);
        self.apply(&role).await;
    }

    /// Lets the operator do in these namespaces what it may do everywhere, and nothing in others, until the end of the turn.
    pub async fn permit_only(&self, sandboxes: &[&Sandbox]) {
        let bindings = Api::<k8s_openapi::api::rbac::v1::ClusterRoleBinding>::all(self.client.clone());
        match bindings.delete(names::OPERATOR, &DeleteParams::default()).await {
            // Not the first time in this turn.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            other => drop(other.unwrap()),
        }
        for sandbox in sandboxes {
            for mut object in objects_in("watched/operator-role.yaml") {
                object["metadata"]["namespace"] = json!(sandbox.namespace);
                self.apply(&object).await;
            }
        }
        let reads = |namespace: &str| {
            let account = format!("system:serviceaccount:{}:{}", names::NAMESPACE, names::OPERATOR);
            let attributes = json!({"namespace": namespace, "verb": "list", "resource": "services"});
            let review = json!({"metadata": {}, "spec": {"user": account, "resourceAttributes": attributes}});
            let api = Api::<SubjectAccessReview>::all(self.client.clone());
            async move {
                let review = api.create(&PostParams::default(), &serde_json::from_value(review).unwrap()).await;
                review.unwrap().status.unwrap().allowed
            }
        };
        until("the permissions are in force", async || {
            let elsewhere = reads("default").await;
            let mut there = true;
            for sandbox in sandboxes {
                there &= reads(&sandbox.namespace).await;
            }
            (there && !elsewhere).then_some(())
        })
        .await;
    }

    /// Puts a CRD in force whose spec takes anything, as an older or broken one might.
    pub async fn relax_schema(&self) {
        let mut crd = serde_json::to_value(ElastiService::crd()).unwrap();
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] =
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        self.apply(&crd).await;
        let sandbox = self.in_namespace("default");
        until("the schema is relaxed", async || {
            sandbox.dry_run(&elasti_service("probe", json!({"service": ""}))).await.ok()
        })
        .await;
    }

    async fn apply_file(&self, file: &str) {
        for object in objects_in(file) {
            self.apply(&object).await;
        }
    }

    async fn apply(&self, object: &Value) {
        let namespace = object["metadata"]["namespace"].as_str();
        let api = api(&self.client, namespace, &resource_of(object));
        let parameters = PatchParams::apply(MANAGER).force();
        let name = object["metadata"]["name"].as_str().unwrap();
        api.patch(name, &parameters, &Patch::Apply(object)).await.unwrap();
    }

    /// A new namespace.
    pub async fn sandbox(&self) -> Sandbox {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-"}});
        let api = api(&self.client, None, &resource_of(&namespace));
        let made = api.create(&PostParams::default(), &serde_json::from_value(namespace).unwrap()).await.unwrap();
        let sandbox = self.in_namespace(&made.metadata.name.unwrap());
        sandbox.create(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}})).await;
        sandbox
    }

    /// The operator's own namespace.
    pub fn own(&self) -> Sandbox {
        self.in_namespace(names::NAMESPACE)
    }

    fn in_namespace(&self, namespace: &str) -> Sandbox {
        Sandbox { client: self.client.clone(), namespace: namespace.to_owned() }
    }

    /// What the API server answers to a GET.
    pub async fn get(&self, path: &str, accept: &str) -> Value {
        let request = http::Request::get(path).header(http::header::ACCEPT, accept).body(Vec::new()).unwrap();
        self.client.request(request).await.unwrap()
    }

    /// A ready operator with this name of its pod; `flags` are added to those that every test needs.
    pub async fn operator(&self, pod: &str, flags: &[&str]) -> Operator {
        let token = self.own().token(names::OPERATOR, None, None).await;
        Operator::start(pod, flags, token, None).await
    }

    /// The same, with a way to the API server that may fail.
    pub async fn operator_by(&self, way: &FaultyWay, pod: &str) -> Operator {
        let token = self.own().token(names::OPERATOR, None, None).await;
        Operator::start(pod, &[], token, Some(way)).await
    }

    /// A resolver on a node of its own with a stream to each of these operators.
    pub async fn resolver(&self, operators: &[&Operator]) -> Resolver {
        let own = self.own();
        let pod = own
            .create(json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "elasti-resolver-"},
                "spec": {
                    "serviceAccountName": names::RESOLVER,
                    "containers": [{"name": "resolver", "image": "elasti-resolver"}],
                },
            }))
            .await;
        let token = own.token(names::RESOLVER, Some(names::TOKEN_AUDIENCE), Some(&pod)).await;
        let bundle = own.get::<k8s_openapi::api::core::v1::ConfigMap>(names::CA_CONFIG_MAP).await.unwrap();
        let ca = bundle["data"][names::CA_KEY].as_str().unwrap();
        Resolver::start(pod["metadata"]["name"].as_str().unwrap(), ca, &token, operators).await
    }
}

/// A namespace.
#[derive(Clone)]
pub struct Sandbox {
    client: Client,
    /// Its name.
    pub namespace: String,
}

impl Sandbox {
    fn api<K>(&self) -> Api<DynamicObject>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        api(&self.client, Some(&self.namespace), &ApiResource::erase::<K>(&()))
    }

    /// Creates an object.
    pub async fn create(&self, object: Value) -> Value {
        self.try_create(&object).await.unwrap_or_else(|error| panic!("{object}: {error}"))
    }

    /// Creates an object, or returns why the API server refuses it.
    pub async fn try_create(&self, object: &Value) -> Result<Value, String> {
        self.post(object, &PostParams::default()).await
    }

    /// What the API server would make of an object.
    pub async fn dry_run(&self, object: &Value) -> Result<Value, String> {
        self.post(object, &PostParams { dry_run: true, ..PostParams::default() }).await
    }

    async fn post(&self, object: &Value, parameters: &PostParams) -> Result<Value, String> {
        let api = api(&self.client, Some(&self.namespace), &resource_of(object));
        let made = api.create(parameters, &serde_json::from_value(object.clone()).unwrap()).await;
        made.map(|made| serde_json::to_value(made).unwrap()).map_err(|error| error.to_string())
    }

    /// An object, or nothing.
    pub async fn get<K>(&self, name: &str) -> Option<Value>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        self.api::<K>().get_opt(name).await.unwrap().map(|object| serde_json::to_value(object).unwrap())
    }

    /// A `ScaledObject`.
    pub async fn scaled_object(&self, name: &str) -> Value {
        self.current(&scaled_object(name, &json!({}))).await
    }

    /// An object as it is now.
    pub async fn current(&self, object: &Value) -> Value {
        let api = api(&self.client, Some(&self.namespace), &resource_of(object));
        serde_json::to_value(api.get(object["metadata"]["name"].as_str().unwrap()).await.unwrap()).unwrap()
    }

    /// All objects of a kind.
    pub async fn list<K>(&self) -> Vec<Value>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let list = self.api::<K>().list(&ListParams::default()).await.unwrap();
        list.items.into_iter().map(|object| serde_json::to_value(object).unwrap()).collect()
    }

    /// Lays fields over an object.
    pub async fn patch<K>(&self, name: &str, fields: &Value)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(fields)).await.unwrap();
    }

    /// Deletes an object, if it is there.
    pub async fn delete<K>(&self, name: &str)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match self.api::<K>().delete(name, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            other => drop(other.unwrap()),
        }
    }

    /// A ServiceAccount's token, bound to a pod if one is given.
    pub async fn token(&self, account: &str, audience: Option<&str>, pod: Option<&Value>) -> String {
        let bound = pod.map(|pod| {
            let metadata = &pod["metadata"];
            json!({"kind": "Pod", "apiVersion": "v1", "name": metadata["name"], "uid": metadata["uid"]})
        });
        let audiences: Vec<&str> = audience.into_iter().collect();
        let request = json!({"spec": {"audiences": audiences, "boundObjectRef": bound}});
        let request: TokenRequest = serde_json::from_value(request).unwrap();
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), &self.namespace);
        let issued = accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
        issued.status.unwrap().token
    }

    /// The `spec.replicas` of a Deployment.
    pub async fn replicas(&self, deployment: &str) -> i64 {
        let deployment = self.get::<k8s_openapi::api::apps::v1::Deployment>(deployment).await.unwrap();
        deployment["spec"]["replicas"].as_i64().unwrap()
    }

    /// Scales a Deployment, as its user would.
    pub async fn scale(&self, deployment: &str, replicas: u32) {
        let fields = json!({"spec": {"replicas": replicas}});
        self.patch::<k8s_openapi::api::apps::v1::Deployment>(deployment, &fields).await;
    }

    /// Waits until an ElastiService is as told, and returns it.
    pub async fn until(&self, name: &str, told: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let elasti = self.get::<ElastiService>(name).await.unwrap_or_default();
            if holds(&elasti) {
                return elasti;
            }
            assert!(Instant::now() < deadline, "waited in vain for {told}: {elasti:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until connections reach resolvers, and returns the ElastiService.
    pub async fn until_published(&self, name: &str) -> Value {
        self.until(name, "interception by resolvers", |elasti| reason(elasti, "Intercepting") == "Published").await
    }

    /// Waits until clients reach the target directly: the mode is `serve` and the Service `name` has no slice of ours.
    pub async fn until_served(&self, name: &str) -> Value {
        let elasti = self.until(name, "mode serve", |elasti| elasti["status"]["mode"] == "serve").await;
        until("the slice goes", async || self.slice(name).await.is_none().then_some(())).await;
        elasti
    }

    /// Waits until a condition has this reason, and returns its message.
    pub async fn until_reason(&self, name: &str, type_: &str, wanted: &str) -> String {
        let elasti = self.until(name, wanted, |elasti| reason(elasti, type_) == wanted).await;
        condition(&elasti, type_)["message"].as_str().unwrap().to_owned()
    }

    /// The IPv4 slice by which a Service's connections reach resolvers.
    pub async fn slice(&self, service: &str) -> Option<Value> {
        self.get::<k8s_openapi::api::discovery::v1::EndpointSlice>(&names::resolver_slice(service, false)).await
    }

    /// The private Service of a public one.
    pub async fn private(&self, service: &str) -> Option<Value> {
        self.get::<k8s_openapi::api::core::v1::Service>(&names::private_service(service)).await
    }
}

/// A condition of an ElastiService; null when there is none.
pub fn condition<'a>(elasti: &'a Value, type_: &str) -> &'a Value {
    let conditions = elasti["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().find(|condition| condition["type"] == type_).unwrap_or(&Value::Null)
}

/// The reason of a condition; empty when there is none.
pub fn reason<'a>(elasti: &'a Value, type_: &str) -> &'a str {
    condition(elasti, type_)["reason"].as_str().unwrap_or_default()
}

/// The interception port of an ElastiService for a port of its Service.
pub fn interception_port(elasti: &Value, port: u16) -> u16 {
    let ports = elasti["status"]["ports"].as_array().expect("ports are allocated");
    let own = ports.iter().find(|own| own["port"] == port).expect("the port is allocated");
    own["interceptionPort"].as_u64().and_then(|port| u16::try_from(port).ok()).expect("a port")
}

/// The objects of a file of `config`.
fn objects_in(file: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config").join(file);
    let text = std::fs::read_to_string(path).unwrap();
    serde_yaml_ng::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap()).collect()
}

fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

fn resource_of(object: &Value) -> ApiResource {
    let api_version = object["apiVersion"].as_str().unwrap();
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, object["kind"].as_str().unwrap()))
}

fn api(client: &Client, namespace: Option<&str>, resource: &ApiResource) -> Api<DynamicObject> {
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
        None => Api::all_with(client.clone(), resource),
    }
}
