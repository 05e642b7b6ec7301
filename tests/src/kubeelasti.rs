//! The set-up of KubeElasti's own end-to-end cases: an HTTP target under a `ScaledObject` of KEDA, and a trigger that asks Debian's
//! real Prometheus. KEDA itself runs only in the level `integrations`; elsewhere its resource is there.

use std::path::PathBuf;
use std::sync::Once;

use serde_json::{Value, json};

use crate::cluster::{IMAGE, NODES, Sandbox, Target, apply, from_pod, get, kubectl, try_kubectl, until};

/// Where Prometheus runs.
pub const MONITORING: &str = "monitoring";

/// The Deployment, the Service and the ElastiService of KubeElasti's cases have related names; here they share this one.
pub const NAME: &str = "target-deployment";

/// A target that answers as KubeElasti's does (httpbin): a mebibyte at `/bytes`, slowly at `/drip`, without a length at
/// `/stream`, little at `/ip` and `/uuid`, and at `/headers` what a header says.
pub fn httpbin(name: &str) -> Target {
    let locations = [
        "location /status { return 200 ok; }",
        "location /bytes { root /tmp; }",
        "location /drip { root /tmp; limit_rate 20; }",
        "location /stream { root /tmp; ssi on; ssi_types *; }",
        "location /ip { return 200 $remote_addr; }",
        "location /uuid { return 200 $request_id; }",
        "location /headers { return 200 $http_x_elasti_test; }",
    ];
    let server = format!("server {{ listen 80; {} }}", locations.join(" "));
    let config =
        format!("user www-data; daemon off; events {{ }} http {{ default_type text/plain; access_log off; {server} }}");
    let files = "head -c 1048576 /dev/zero | tr '\\0' x > /tmp/bytes; cp /tmp/bytes /tmp/stream; head -c 40 /tmp/bytes > /tmp/drip";
    let mut target = Target::nginx(name);
    target.command = ["sh", "-c"].map(str::to_owned).to_vec();
    target.command.push(format!("{files}; echo '{config}' > /tmp/c; exec nginx -c /tmp/c"));
    target.ports = vec![80];
    target.container = json!({"readinessProbe": {"httpGet": {"path": "/status/200", "port": 80}, "periodSeconds": 1}});
    target.spec = spec(name);
    target
}

/// The spec of KubeElasti's cases, with its old spelling of the kind.
fn spec(name: &str) -> Value {
    let query = format!(r#"sum(rate(nginx_ingress_controller_requests{{service="{name}"}}[20s])) or vector(0)"#);
    json!({
        "cooldownPeriod": 300, "minTargetReplicas": 1,
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "deployments", "name": name},
        "triggers": [trigger(&query, r#"container="prometheus""#)],
        "autoscaler": {"type": "keda", "name": "target-scaled-object"},
    })
}

/// A trigger that asks the real Prometheus.
pub fn trigger(query: &str, uptime: &str) -> Value {
    let server = format!("http://prometheus.{MONITORING}.svc.cluster.local:9090");
    json!({"type": "prometheus", "metadata": {
        "serverAddress": server, "query": query, "threshold": "0.01", "uptimeFilter": uptime,
    }})
}

/// KubeElasti's `setup.sh`: the target, its `ScaledObject` and its ElastiService, all well and served directly.
pub fn set_up(sandbox: &Sandbox, target: &Target) {
    prometheus();
    scaled_object(sandbox, "Deployment", &target.name);
    sandbox.target(target);
    is_well(sandbox, target);
}

/// The usual target in a namespace of its own, set up.
pub fn begin(test: &str) -> (Sandbox, Target) {
    let (sandbox, target) = (Sandbox::new(test), httpbin(NAME));
    set_up(&sandbox, &target);
    (sandbox, target)
}

/// Waits until the ElastiService has no fault, of its autoscaler neither; but that Prometheus has just started and is not
/// believed before it has been up for a whole cooldown.
pub fn is_well(sandbox: &Sandbox, target: &Target) {
    until("the ElastiService is well", || {
        let (status, reason, _) = sandbox.condition(target, "Ready")?;
        (status == "True" || reason == "TriggerFailed").then_some(())
    });
}

/// KEDA's autoscaler of a target.
pub fn scaled_object(sandbox: &Sandbox, kind: &str, name: &str) {
    static SERVED: Once = Once::new();
    SERVED.call_once(|| {
        // A real KEDA has brought its own.
        if get("", "crd", "scaledobjects.keda.sh").is_some() {
            return;
        }
        let names = json!({"kind": "ScaledObject", "listKind": "ScaledObjectList", "plural": "scaledobjects", "singular": "scaledobject"});
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let version =
            json!({"name": "v1alpha1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}});
        apply(&json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": "scaledobjects.keda.sh"},
            "spec": {"group": "keda.sh", "scope": "Namespaced", "names": names, "versions": [version]},
        }));
        kubectl(&["wait", "--for=condition=Established", "crd/scaledobjects.keda.sh", "--timeout=60s"]);
        // kubectl finds a new kind once discovery tells of it.
        until("ScaledObjects are served", || try_kubectl(&["get", "scaledobjects"], None).ok());
    });
    sandbox.apply(wants_one("target-scaled-object", kind, name, LOOKS));
}

/// Seconds between two looks of KEDA, longer than any case takes: whatever is scaled to zero by hand and not by us, it starts at
/// its next look, as it should. KubeElasti's cases count on being faster than its 30 s.
const LOOKS: u32 = 3600;

/// A `ScaledObject` that wants one replica at least, at all times, and looks every so many seconds.
pub fn wants_one(name: &str, kind: &str, target: &str, looks: u32) -> Value {
    json!({
        "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"kind": kind, "name": target}, "minReplicaCount": 1, "maxReplicaCount": 5,
            "pollingInterval": looks,
            "triggers": [{"type": "cron", "metadata": {
                "timezone": "UTC", "start": "0 0 1 1 *", "end": "59 23 31 12 *", "desiredReplicas": "1",
            }}],
        },
    })
}

/// KubeElasti's `send_traffic.sh`: five calls, one after the other, from a pod. KubeElasti's repeats a call that fails; this
/// does not. Returns the size of each body.
pub fn send_traffic(sandbox: &Sandbox, service: &str, path: &str) -> Vec<usize> {
    let url = format!("http://{service}.{}.svc.cluster.local{path}", sandbox.namespace);
    let call = format!("curl -sS --max-time 160 -o /dev/null -w '%{{http_code}} %{{size_download}}\\n' '{url}'");
    let told = from_pod(1, &["sh", "-ec", &format!("for call in 1 2 3 4 5; do {call}; done")]);
    let sizes: Vec<usize> = told
        .lines()
        .map(|line| line.strip_prefix("200 ").unwrap_or_else(|| panic!("{url}: {line}")).parse().expect("a size"))
        .collect();
    assert_eq!(sizes.len(), 5, "{told}");
    sizes
}

/// Debian's Prometheus, as a pod beside what it scrapes: itself, and what [`push`] has given.
pub fn prometheus() {
    static RUNNING: Once = Once::new();
    RUNNING.call_once(|| {
        let program = PathBuf::from(std::env::var_os("ELASTI_PROMETHEUS").expect("cargo xtask test sets it"));
        let programs = program.parent().expect("a directory").to_owned();
        apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": MONITORING}}));
        until("the ServiceAccount of Prometheus", || get(MONITORING, "serviceaccount", "default"));
        let scraped = json!({"global": {"scrape_interval": "1s"}, "scrape_configs": [
            {"job_name": "prometheus", "static_configs": [
                {"targets": ["localhost:9090"], "labels": {"container": "prometheus"}},
            ]},
            {"job_name": "pushed", "honor_labels": true, "static_configs": [{"targets": ["localhost:9091"]}]},
        ]});
        let nginx = "user www-data; daemon off; events { } http { default_type text/plain; access_log off;
            server { listen 9091; location /metrics { root /pushed; } } }";
        let meta = json!({"name": "prometheus", "namespace": MONITORING, "labels": {"app": "prometheus"}});
        // YAML is a superset of JSON.
        apply(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {
            "prometheus.yml": scraped.to_string(), "nginx.conf": nginx,
        }}));
        let mount = |name: &str| json!({"name": name, "mountPath": format!("/{name}")});
        let arguments = ["--config.file=/config/prometheus.yml", "--storage.tsdb.path=/tmp/data", "--log.level=warn"];
        let command: Vec<&str> = ["/programs/prometheus"].into_iter().chain(arguments).collect();
        apply(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {
            "nodeName": NODES[0], "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "prometheus", "image": IMAGE, "imagePullPolicy": "Never", "command": command,
                    "readinessProbe": {"httpGet": {"path": "/-/ready", "port": 9090}, "periodSeconds": 1},
                    "volumeMounts": [mount("programs"), mount("config")],
                },
                {
                    "name": "pushed", "image": IMAGE, "imagePullPolicy": "Never",
                    "command": ["nginx", "-c", "/config/nginx.conf"],
                    "volumeMounts": [mount("config"), mount("pushed")],
                },
            ],
            "volumes": [
                {"name": "programs", "hostPath": {"path": programs}},
                {"name": "config", "configMap": {"name": "prometheus"}},
                {"name": "pushed", "emptyDir": {}},
            ],
        }}));
        apply(&json!({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {
            "selector": {"app": "prometheus"}, "ports": [{"name": "http", "port": 9090}],
        }}));
        kubectl(&["-n", MONITORING, "wait", "--for=condition=Ready", "pod/prometheus", "--timeout=60s"]);
    });
}

/// Gives Prometheus metrics, in its text format, as a Pushgateway does.
pub fn push(metrics: &str) {
    let write = "cat > /pushed/new && mv /pushed/new /pushed/metrics";
    let arguments = ["-n", MONITORING, "exec", "-i", "prometheus", "-c", "pushed", "--", "sh", "-c", write];
    try_kubectl(&arguments, Some(metrics)).unwrap_or_else(|error| panic!("push: {error}"));
    let last = metrics.lines().last().and_then(|line| line.rsplit_once(' ')).expect("a metric").0;
    until("Prometheus has it", || {
        let query = ["/programs/promtool", "query", "instant", "http://localhost:9090", last];
        let arguments = [&["-n", MONITORING, "exec", "prometheus", "-c", "prometheus", "--"], &query[..]].concat();
        kubectl(&arguments).contains("=>").then_some(())
    });
}
