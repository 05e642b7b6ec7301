//! A real cluster with Elasti on it, as suites use it: targets, `/scale`, logs. `cargo xtask bench` sets it up and runs the
//! suites as a host process of its first node.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use elasti_api::names;
use elasti_operator::clients::Clients;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams};
use kube::{Client, Config};
use rustix::process::Pid;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Longer than anything takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

/// Who applies.
pub(crate) const FIELD_MANAGER: &str = "elasti-bench";

/// Debian's nginx, made by the harness of the cluster.
const IMAGE: &str = "docker.io/library/elasti-targets:dev";

/// The labels of the product's pods.
pub(crate) const RESOLVERS: &str = "app=elasti-resolver";
pub(crate) const OPERATORS: &str = "app.kubernetes.io/name=elasti-operator";

/// Port of all targets.
pub(crate) const PORT: u16 = 80;

/// A namespace of the cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// As the operator has it: a bare patch is as fast as one of ours.
    patches: Client,
    namespace: String,
}

/// How ElastiServices are asked for.
pub(crate) fn elasti_services() -> ApiResource {
    ApiResource {
        group: "elasti.truefoundry.com".into(),
        version: "v1alpha1".into(),
        api_version: "elasti.truefoundry.com/v1alpha1".into(),
        kind: "ElastiService".into(),
        plural: "elastiservices".into(),
    }
}

/// A Deployment of nginx and its Service.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Of the Deployment, the Service and the ElastiService.
    pub(crate) name: String,
    /// How long after its container has started nginx begins to listen.
    pub(crate) listens_after: Duration,
    /// Whether there is an ElastiService.
    pub(crate) sleeps: bool,
    /// Whether a node takes its pods; without, waking it costs the machine nothing.
    pub(crate) runs: bool,
}

impl Cluster {
    /// A namespace that is empty, however an earlier run has ended.
    pub(crate) async fn new(namespace: &str) -> Result<Self> {
        let config = Config::infer().await.context("no kubeconfig: run this by `cargo xtask bench`")?;
        let patches = Clients::new(config.clone())?.requests;
        let cluster = Self { client: Client::try_from(config)?, patches, namespace: namespace.to_owned() };
        cluster.remove().await?;
        let gone = || async { Ok(cluster.namespaces().get_opt(namespace).await?.is_none().then_some(())) };
        until("the namespace of an earlier run is gone", gone).await?;
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        let apply = PatchParams::apply(FIELD_MANAGER);
        cluster.namespaces().patch(namespace, &apply, &Patch::Apply(object)).await?;
        Ok(cluster)
    }

    /// Has all of it removed, in the background.
    pub(crate) async fn remove(&self) -> Result<()> {
        match self.namespaces().delete(&self.namespace, &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    /// Its name.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    fn namespaces(&self) -> Api<Namespace> {
        Api::all(self.client.clone())
    }

    /// The pods of this namespace.
    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The slices of this namespace.
    pub(crate) fn slices(&self) -> Api<EndpointSlice> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The ElastiServices of this namespace.
    pub(crate) fn elastis(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, &elasti_services())
    }

    /// Makes a target at zero; says where clients dial it.
    pub(crate) async fn add(&self, target: &Target) -> Result<SocketAddr> {
        let (name, labels, apply) = (&target.name, json!({"app": target.name}), PatchParams::apply(FIELD_MANAGER));
        let metadata = json!({"name": name, "namespace": self.namespace});
        let script = format!("sleep {}; exec nginx -g 'daemon off;'", target.listens_after.as_secs_f64());
        let nowhere = json!({"elasti.bench/nowhere": "true"});
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata,
            "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": {
                "terminationGracePeriodSeconds": 1,
                "nodeSelector": if target.runs { json!({}) } else { nowhere },
                "containers": [{
                    "name": "target", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
                    "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
                }],
            }}},
        });
        self.deployments().patch(name, &apply, &Patch::Apply(deployment)).await?;
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"port": PORT}]},
        });
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let service = services.patch(name, &apply, &Patch::Apply(service)).await?;
        if target.sleeps {
            let elasti = json!({
                "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService", "metadata": metadata,
                "spec": {"service": name, "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}},
            });
            self.elastis().patch(name, &apply, &Patch::Apply(elasti)).await?;
        }
        let address = service.spec.and_then(|spec| spec.cluster_ip).context("the Service has no cluster IP")?;
        Ok(SocketAddr::new(address.parse()?, PORT))
    }

    /// Scales a target, as `kubectl scale` does but for its read before.
    pub(crate) async fn scale(&self, target: &Target, replicas: i32) -> Result<()> {
        let patch = json!({"spec": {"replicas": replicas}});
        let deployments: Api<Deployment> = Api::namespaced(self.patches.clone(), &self.namespace);
        deployments.patch_scale(&target.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Waits until a target is at zero, and intercepted if it has an ElastiService.
    pub(crate) async fn asleep(&self, target: &Target) -> Result<()> {
        until(&format!("{} is at zero", target.name), || async {
            let selected = ListParams::default().labels(&format!("app={}", target.name));
            let none_left = self.pods().list_metadata(&selected).await?.items.is_empty();
            Ok((none_left && self.ready_endpoints(target).await? == usize::from(target.sleeps)).then_some(()))
        })
        .await
    }

    /// Whether the slices of a target have ready endpoints, those of an ElastiService in mode `proxy` counted as one.
    async fn ready_endpoints(&self, target: &Target) -> Result<usize> {
        let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={}", target.name));
        let (mut pods, mut resolvers) = (0, 0);
        for slice in self.slices().list(&of_service).await?.items {
            let endpoints = slice.endpoints.iter();
            let ready =
                endpoints.filter(|it| it.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true));
            let ours = slice.metadata.name.is_some_and(|name| name.starts_with("elasti-"));
            *(if ours { &mut resolvers } else { &mut pods }) += ready.count();
        }
        if target.sleeps {
            let mode = self.elastis().get_status(&target.name).await?.data["status"]["mode"] == "proxy";
            return Ok(usize::from(mode && pods == 0 && resolvers > 0));
        }
        Ok(pods)
    }

    /// Waits until a target's slices name a ready pod, and no resolver.
    pub(crate) async fn awake(&self, target: &Target) -> Result<()> {
        until(&format!("{} is up", target.name), || async {
            let serves = if target.sleeps {
                self.elastis().get_status(&target.name).await?.data["status"]["mode"] == "serve"
            } else {
                self.ready_endpoints(target).await? > 0
            };
            Ok(serves.then_some(()))
        })
        .await
    }

    /// Has operator and resolvers run, or not; waits until that is so.
    pub(crate) async fn installed(&self, wanted: bool) -> Result<()> {
        let operators: Api<Deployment> = Api::namespaced(self.client.clone(), names::NAMESPACE);
        let resolvers: Api<DaemonSet> = Api::namespaced(self.client.clone(), names::NAMESPACE);
        let patch = json!({"spec": {"replicas": if wanted { 2 } else { 0 }}});
        operators.patch_scale(names::OPERATOR, &PatchParams::default(), &Patch::Merge(patch)).await?;
        let selector = json!({"elasti.bench/nowhere": (!wanted).then_some("true")});
        let patch = json!({"spec": {"template": {"spec": {"nodeSelector": selector}}}});
        resolvers.patch(names::RESOLVER, &PatchParams::default(), &Patch::Merge(patch)).await?;
        if wanted {
            return self.installation_is_ready().await;
        }
        until("operator and resolvers are gone", || async {
            Ok(self.own_pods().list(&ListParams::default()).await?.items.is_empty().then_some(()))
        })
        .await
    }

    /// Waits until two operators and the resolvers of two nodes are ready, and no other is left.
    pub(crate) async fn installation_is_ready(&self) -> Result<()> {
        until("operators and resolvers are ready", || async {
            let pods = self.own_pods().list(&ListParams::default()).await?.items;
            Ok((pods.len() == 4 && pods.iter().all(is_ready)).then_some(()))
        })
        .await
    }

    /// The product's pods.
    pub(crate) fn own_pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), names::NAMESPACE)
    }

    /// The pod of the operator that leads.
    pub(crate) async fn leader(&self) -> Result<Pod> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), names::NAMESPACE);
        let holder = leases.get(names::OPERATOR).await?.spec.and_then(|spec| spec.holder_identity);
        Ok(self.own_pods().get(&holder.context("nobody leads")?).await?)
    }

    /// The Deployments of this namespace.
    pub(crate) fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The last log lines of the product's pods with this label, each without the runtime's prefix.
    pub(crate) async fn logs(&self, label: &str, since: Duration) -> Result<Vec<String>> {
        let pods = self.own_pods();
        let seconds = i64::try_from(since.as_secs() + 2)?;
        let parameters = LogParams { since_seconds: Some(seconds), ..LogParams::default() };
        let mut lines = Vec::new();
        for pod in pods.list(&ListParams::default().labels(label)).await?.items {
            let name = pod.metadata.name.unwrap_or_default();
            let text = pods.logs(&name, &parameters).await?;
            lines.extend(text.lines().map(str::to_owned));
        }
        Ok(lines)
    }
}

/// Whether a pod is ready, and is to stay.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Both clocks of this machine, to compare a program's log with what was seen here. All processes of the cluster run on this
/// one machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    instant: Instant,
    system: SystemTime,
}

impl Clock {
    /// More than this between the two, and one was set meanwhile.
    const DRIFT_MAX: Duration = Duration::from_millis(1);

    /// Begins to compare them.
    pub(crate) fn start() -> Self {
        Self { instant: Instant::now(), system: SystemTime::now() }
    }

    /// When a log line was written; an error if a clock was set meanwhile.
    pub(crate) fn instant(&self, logged: SystemTime) -> Result<Instant> {
        let (monotonic, system) = (self.instant.elapsed(), self.system.elapsed()?);
        if monotonic.abs_diff(system) > Self::DRIFT_MAX {
            bail!("the machine's clock was set during the measurement");
        }
        Ok(match logged.duration_since(self.system) {
            Ok(after) => self.instant + after,
            Err(before) => self.instant.checked_sub(before.duration()).unwrap_or(self.instant),
        })
    }
}

/// Waits until `seen` gives something; a request that fails is repeated.
pub(crate) async fn until<T, F>(what: &str, mut seen: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let begun = Instant::now();
    loop {
        let last = match seen().await {
            Ok(Some(it)) => return Ok(it),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if begun.elapsed() > PATIENCE {
            let why = last.map(|error| format!("; last {error:#}")).unwrap_or_default();
            bail!("waited {} s in vain until {what}{why}", PATIENCE.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Asks for the main page; says when the first byte of the answer was there.
pub(crate) async fn ask(address: SocketAddr) -> Result<Instant> {
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: target\r\nconnection: close\r\n\r\n").await?;
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await?;
        let first_byte = Instant::now();
        if !answer[..length].starts_with(b"HTTP/1.1 200 ") {
            bail!("{address} answered {}", String::from_utf8_lossy(&answer[..length.min(100)]));
        }
        stream.read_to_end(&mut answer).await?;
        Ok(first_byte)
    };
    tokio::time::timeout(PATIENCE, asked).await.with_context(|| format!("no answer of {address}"))?
}

/// The process of a pod's program, by its cgroup and its name, which the kernel cuts after 15 characters.
pub(crate) fn process_of(pod: &Pod, program: &str) -> Result<Pid> {
    let uid = pod.metadata.uid.as_deref().context("a pod has a UID")?;
    let found = std::fs::read_dir("/proc")?.flatten().find_map(|entry| {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
        let name = read("comm")?;
        let is = read("cgroup")?.contains(uid) && name.len() > 5 && program.starts_with(name.trim());
        Pid::from_raw(entry.file_name().to_str()?.parse().ok()?).filter(|_| is)
    });
    found.with_context(|| format!("pod {uid} has no process {program}"))
}
