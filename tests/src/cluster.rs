//! The whole cluster: real nodes, real targets, and the product installed as its users install it.
//!
//! The tests run as host processes of node 1, in its network namespace, against the cluster that `cargo xtask test`
//! has set up; they speak to it through kubectl, as users do. Waiting is for conditions, with a deadline that says what
//! was seen last.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Debian's nginx, Redis and their clients in one image, made by the harness of the cluster.
pub const IMAGE: &str = "docker.io/library/elasti-targets:dev";

/// Longer than anything takes on a busy machine; what is late fails for another reason than time.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// The nodes, by number from 1.
pub const NODES: [&str; 2] = ["node1", "node2"];

/// Where the pods live that call; each has the name of its node, as its label `caller` too.
pub const CALLERS: &str = "callers";

/// Runs kubectl and returns its output; panics with its error.
pub fn kubectl(arguments: &[&str]) -> String {
    try_kubectl(arguments, None).unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
}

/// Runs kubectl, with something on its standard input if there is something.
pub fn try_kubectl(arguments: &[&str], input: Option<&str>) -> Result<String, String> {
    let program = std::env::var("ELASTI_KUBECTL").expect("run this by `cargo xtask test --only cluster`");
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl starts");
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes()).expect("kubectl reads");
    }
    let output = child.wait_with_output().expect("kubectl ends");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// An object, or nothing.
pub fn get(namespace: &str, kind: &str, name: &str) -> Option<Value> {
    let text = try_kubectl(&["-n", namespace, "get", kind, name, "-o", "json", "--ignore-not-found"], None).ok()?;
    serde_json::from_str(&text).ok()
}

/// All objects of a kind that a selector matches.
pub fn list(namespace: &str, kind: &str, selector: &str) -> Vec<Value> {
    let text = kubectl(&["-n", namespace, "get", kind, "-l", selector, "-o", "json"]);
    let list: Value = serde_json::from_str(&text).expect("kubectl prints JSON");
    list["items"].as_array().cloned().unwrap_or_default()
}

/// Applies an object.
pub fn apply(object: &Value) {
    try_apply(object).unwrap_or_else(|error| panic!("apply {object}: {error}"));
}

/// Applies an object, or says why the API server refuses it.
pub fn try_apply(object: &Value) -> Result<String, String> {
    try_kubectl(&["apply", "-f", "-"], Some(&object.to_string()))
}

/// Waits until `seen` gives something.
pub fn until<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(it) = seen() {
            return it;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A namespace for one test, emptied before it begins.
pub struct Sandbox {
    /// Its name.
    pub namespace: String,
}

impl Sandbox {
    /// A namespace named after the test.
    pub fn new(test: &str) -> Self {
        let namespace = format!("test-{test}");
        kubectl(&["delete", "namespace", &namespace, "--ignore-not-found", "--wait"]);
        kubectl(&["create", "namespace", &namespace]);
        until("the namespace's ServiceAccount", || get(&namespace, "serviceaccount", "default"));
        Self { namespace }
    }

    /// Applies an object in this namespace.
    pub fn apply(&self, mut object: Value) {
        object["metadata"]["namespace"] = json!(self.namespace);
        apply(&object);
    }

    /// A Deployment of one pod, its Service and an ElastiService, awake and served directly.
    pub fn target(&self, target: &Target) {
        self.install(target);
        self.awake(target);
    }

    /// The same, not waited for.
    pub fn install(&self, target: &Target) {
        self.apply(target.deployment());
        self.apply(target.service());
        self.apply(target.elasti_service());
    }

    /// A trigger that always calls its target idle.
    pub fn idle_trigger(&self) -> Value {
        // Answers every query with 1: Prometheus was up, and the value is below the threshold.
        let answer = r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[0,"1"]}]}}"#;
        let stub = format!(
            "echo 'user www-data; daemon off; events {{}} http {{ server {{ listen 9090; location / {{ return 200 '\"'\"'{answer}'\"'\"'; }} }} }}' > /tmp/c; exec nginx -c /tmp/c"
        );
        let mut prometheus = Target::nginx("prometheus");
        prometheus.command = vec!["sh".into(), "-c".into(), stub];
        prometheus.ports = vec![9090];
        self.target(&prometheus);
        let address = self.cluster_address(&prometheus, 9090);
        json!({"type": "prometheus", "metadata": {
            "serverAddress": format!("http://{address}"), "query": "requests", "threshold": "2",
        }})
    }

    /// The same at zero, intercepted.
    pub fn sleeping_target(&self, target: &Target) {
        let mut deployment = target.deployment();
        deployment["spec"]["replicas"] = json!(0);
        self.apply(deployment);
        self.apply(target.service());
        self.apply(target.elasti_service());
        self.asleep(target);
    }

    /// kubectl in this namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&[&["-n", &self.namespace], arguments].concat())
    }

    /// Merges fields into an object: its kind, its name and further arguments.
    pub fn patch(&self, object: &[&str], fields: &Value) {
        self.kubectl(&[&["patch"], object, &["--type=merge", "-p", &fields.to_string()]].concat());
    }

    /// Calls port 80 of the target's Service from the pod of a node, and waits a minute for the answer.
    pub fn call(&self, target: &Target, node: usize) -> String {
        let url = format!("http://{}/", self.cluster_address(target, 80));
        from_pod(node, &["curl", "-sS", "--max-time", "60", &url])
    }

    /// Waits until the target serves directly.
    pub fn awake(&self, target: &Target) {
        until("the target serves", || {
            (self.mode(target).as_deref() == Some("serve") && self.slice(target).is_none()).then_some(())
        });
    }

    /// Scales the target to zero and waits until there is no pod left and all resolvers are published.
    pub fn sleep(&self, target: &Target) {
        kubectl(&["-n", &self.namespace, "scale", "deployment", &target.name, "--replicas=0"]);
        self.asleep(target);
    }

    /// Waits until the target is at zero and intercepted.
    pub fn asleep(&self, target: &Target) {
        let resolvers = resolvers().len();
        until("the target sleeps", || {
            let published = self.slice(target).map(|slice| slice["endpoints"].as_array().map_or(0, Vec::len));
            let asleep = self.mode(target).as_deref() == Some("proxy")
                && self.pods(target).is_empty()
                && published == Some(resolvers);
            asleep.then_some(())
        });
    }

    /// The target's pods, terminating ones too.
    pub fn pods(&self, target: &Target) -> Vec<Value> {
        list(&self.namespace, "pods", &format!("app={}", target.name))
    }

    /// The ElastiService's mode.
    pub fn mode(&self, target: &Target) -> Option<String> {
        Some(self.elasti_service(target)?["status"]["mode"].as_str()?.to_owned())
    }

    /// The ElastiService.
    pub fn elasti_service(&self, target: &Target) -> Option<Value> {
        get(&self.namespace, "elastiservice", &target.name)
    }

    /// The IPv4 slice that names resolvers.
    pub fn slice(&self, target: &Target) -> Option<Value> {
        get(&self.namespace, "endpointslice", &elasti_api::names::resolver_slice(&target.name, false))
    }

    /// The message and reason of a condition.
    pub fn condition(&self, target: &Target, type_: &str) -> Option<(String, String, String)> {
        let elasti = self.elasti_service(target)?;
        let condition = elasti["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == type_)?.clone();
        let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        Some((text("status"), text("reason"), text("message")))
    }

    /// The Service's address for one of its ports.
    pub fn cluster_address(&self, target: &Target, port: u16) -> SocketAddr {
        let service = get(&self.namespace, "service", &target.name).expect("the Service is there");
        let ip: IpAddr = service["spec"]["clusterIP"].as_str().expect("a cluster IP").parse().expect("an address");
        SocketAddr::new(ip, port)
    }

    /// The node port of one of the Service's ports.
    pub fn node_port(&self, target: &Target, port: u16) -> u16 {
        let service = get(&self.namespace, "service", &target.name).expect("the Service is there");
        let ports = service["spec"]["ports"].as_array().cloned().unwrap_or_default();
        let port = ports.iter().find(|candidate| candidate["port"] == port).expect("the port is there").clone();
        u16::try_from(port["nodePort"].as_u64().expect("a node port")).expect("a port")
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{}",
                kubectl(&["-n", &self.namespace, "get", "elastiservices,pods,endpointslices,events", "-o", "wide"])
            );
        } else {
            // Removed in the background: the next test need not wait for it.
            kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]);
        }
    }
}

/// A target: one container of [`IMAGE`].
#[derive(Clone, Debug)]
pub struct Target {
    /// Name of the Deployment, the Service and the ElastiService.
    pub name: String,
    /// Its program.
    pub command: Vec<String>,
    /// Ports of the Service; the container listens on the same ones.
    pub ports: Vec<u16>,
    /// Fields of the container that are laid over the usual ones.
    pub container: Value,
    /// Fields of the pod's spec that are laid over the usual ones.
    pub pod: Value,
    /// The Deployment's update strategy; null: the usual one.
    pub strategy: Value,
    /// Fields of the ElastiService's spec that are laid over the usual ones.
    pub spec: Value,
}

impl Target {
    fn new(name: &str, command: &[&str], ports: &[u16]) -> Self {
        Self {
            name: name.to_owned(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            ports: ports.to_vec(),
            container: json!({}),
            pod: json!({}),
            strategy: Value::Null,
            spec: json!({}),
        }
    }

    /// nginx, which answers `nginx on HOSTNAME`: HTTP on 80, HTTPS on 443.
    pub fn nginx(name: &str) -> Self {
        Self::new(name, &["nginx", "-g", "daemon off;"], &[80, 443])
    }

    /// Redis.
    pub fn redis(name: &str) -> Self {
        Self::new(name, &["redis-server", "--protected-mode", "no", "--bind", "*", "-::*", "--save", ""], &[6379])
    }

    /// A server that speaks first.
    pub fn greeter(name: &str) -> Self {
        Self::new(name, &["socat", "TCP6-LISTEN:2525,ipv6only=0,fork,reuseaddr", "SYSTEM:echo 220 ready"], &[2525])
    }

    /// Its Deployment, of one pod.
    pub fn deployment(&self) -> Value {
        let mut container = json!({
            "name": "target", "image": IMAGE, "imagePullPolicy": "Never", "command": self.command,
            "readinessProbe": {"tcpSocket": {"port": self.ports[0]}, "periodSeconds": 1},
        });
        lay_over(&mut container, &self.container);
        let mut pod = json!({"containers": [container], "nodeName": NODES[0], "terminationGracePeriodSeconds": 1});
        lay_over(&mut pod, &self.pod);
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": self.name},
            "spec": {
                "replicas": 1,
                "strategy": self.strategy,
                "selector": {"matchLabels": {"app": self.name}},
                "template": {
                    "metadata": {"labels": {"app": self.name}},
                    "spec": pod,
                },
            },
        })
    }

    /// Its Service, of type NodePort.
    pub fn service(&self) -> Value {
        let ports: Vec<Value> =
            self.ports.iter().map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name},
            "spec": {"type": "NodePort", "selector": {"app": self.name}, "ports": ports},
        })
    }

    /// The ElastiService, as its user would write it.
    pub fn elasti_service(&self) -> Value {
        let mut spec = json!({
            "service": self.name,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": self.name},
        });
        lay_over(&mut spec, &self.spec);
        json!({
            "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService",
            "metadata": {"name": self.name}, "spec": spec,
        })
    }
}

fn lay_over(object: &mut Value, fields: &Value) {
    for (field, value) in fields.as_object().into_iter().flatten() {
        object[field] = value.clone();
    }
}

/// Runs a command in the calling pod of a node, numbered from 1.
pub fn from_pod(node: usize, command: &[&str]) -> String {
    static CALLING_PODS: Once = Once::new();
    CALLING_PODS.call_once(|| {
        apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": CALLERS}}));
        until("the ServiceAccount of the callers", || get(CALLERS, "serviceaccount", "default"));
        for name in NODES {
            apply(&json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": CALLERS, "labels": {"caller": name}},
                "spec": {
                    "nodeName": name, "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "caller", "image": IMAGE, "imagePullPolicy": "Never", "command": ["sleep", "infinity"],
                    }],
                },
            }));
        }
        kubectl(&["-n", CALLERS, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s"]);
    });
    let mut arguments = vec!["-n", CALLERS, "exec", NODES[node - 1], "--"];
    arguments.extend(command);
    kubectl(&arguments)
}

/// Sends bytes as a process of node 1's host and returns the answer up to its end, or to `enough` bytes.
pub fn from_host(address: SocketAddr, request: &[u8], enough: usize) -> String {
    let mut stream =
        TcpStream::connect_timeout(&address, PATIENCE).unwrap_or_else(|error| panic!("{address}: {error}"));
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.write_all(request).expect("sent");
    let mut answer = Vec::new();
    stream.take(enough as u64).read_to_end(&mut answer).unwrap_or_else(|error| panic!("{address}: {error}"));
    String::from_utf8_lossy(&answer).into_owned()
}

/// A request for nginx that ends the connection.
pub const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: target\r\nConnection: close\r\n\r\n";

/// The resolvers' pods that are not about to end.
pub fn resolvers() -> Vec<Value> {
    let mut pods = list(elasti_api::names::NAMESPACE, "pods", "app=elasti-resolver");
    pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    pods
}

/// A resolver's metric, summed over all series that hold `labels`, over all resolvers.
pub fn metric(name: &str, labels: &str) -> f64 {
    resolvers().iter().map(|pod| sum(&scrape(pod), name, labels)).sum()
}

fn scrape(pod: &Value) -> String {
    let ip: IpAddr = pod["status"]["podIP"].as_str().expect("a pod IP").parse().expect("an address");
    let request = b"GET /metrics HTTP/1.1\r\nHost: resolver\r\nConnection: close\r\n\r\n";
    from_host(SocketAddr::new(ip, elasti_api::names::RESOLVER_PORT), request, usize::MAX)
}

fn sum(text: &str, name: &str, labels: &str) -> f64 {
    text.lines()
        .filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(labels)
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// Bytes that have passed the interfaces of the resolvers' pods, both ways.
pub fn resolver_interface_bytes() -> u64 {
    let namespaces = std::env::var("ELASTI_NODES").expect("run this by `cargo xtask test --only cluster`");
    let namespaces: Vec<&str> = namespaces.split(',').collect();
    resolvers()
        .iter()
        .map(|pod| {
            let ip = pod["status"]["podIP"].as_str().expect("a pod IP");
            let node = NODES.iter().position(|name| pod["spec"]["nodeName"] == *name).expect("a node of ours");
            let ip_command = |arguments: &[&str]| -> Value {
                let namespace = format!("--net=/run/netns/{}", namespaces[node]);
                let output = Command::new("nsenter").args([&namespace, "ip", "-j"]).args(arguments).output();
                serde_json::from_slice(&output.expect("nsenter starts").stdout).expect("ip prints JSON")
            };
            let route = ip_command(&["route", "get", ip]);
            let device = route[0]["dev"].as_str().expect("a route to the pod");
            let statistics = ip_command(&["-s", "link", "show", "dev", device]);
            let bytes = |way: &str| statistics[0]["stats64"][way]["bytes"].as_u64().expect("a counter");
            bytes("rx") + bytes("tx")
        })
        .sum()
}
