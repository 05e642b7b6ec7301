//! `cargo xtask demo`: the product at work on a real Kubernetes, with nginx and Redis as targets.
//!
//! Without `--kubeconfig` it starts the two-node test cluster and installs everything; with it, the user's own cluster is
//! used as it is, Elasti installed.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Options, ProxyMode, images};
use crate::install;
use timeline::Wake;

mod timeline;

/// Where the demo's objects live.
const NAMESPACE: &str = "elasti-demo";

/// Longer than any step takes, an image pull included.
const PATIENCE: Duration = Duration::from_mins(3);

/// Options of `demo`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Use this cluster, where Elasti is installed already (kubectl must be in the PATH), and no other
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Image with nginx and curl, for a cluster of your own
    #[arg(long, default_value = "docker.io/library/nginx")]
    nginx_image: String,
    /// Image with redis-server and redis-cli, for a cluster of your own
    #[arg(long, default_value = "docker.io/library/redis")]
    redis_image: String,
}

/// Where the demo runs.
enum Place {
    Test(Cluster),
    Own(PathBuf),
}

/// The demo.
struct Demo {
    place: Place,
    nginx: String,
    redis: String,
}

/// A target of the demo.
struct Target {
    name: &'static str,
    what: &'static str,
    port: u16,
    command: &'static [&'static str],
    /// What the calling pod runs, before the address.
    call: fn(&str) -> Vec<String>,
}

const TARGETS: [Target; 2] = [
    Target {
        name: "web",
        what: "an HTTP request to nginx",
        port: 80,
        command: &["nginx", "-g", "daemon off;"],
        call: |ip| ["curl", "-sS", "-i", "--max-time", "120", &format!("http://{ip}/")].map(String::from).to_vec(),
    },
    Target {
        name: "cache",
        what: "a PING to Redis",
        port: 6379,
        command: &["redis-server", "--protected-mode", "no", "--bind", "*", "-::*", "--save", ""],
        call: |ip| ["redis-cli", "-h", ip, "PING"].map(String::from).to_vec(),
    },
];

/// Runs the demo.
pub(crate) fn run(args: &Args) -> Result<()> {
    let demo = if let Some(kubeconfig) = &args.kubeconfig {
        Demo { place: Place::Own(kubeconfig.clone()), nginx: args.nginx_image.clone(), redis: args.redis_image.clone() }
    } else {
        say("starting a real two-node Kubernetes on this machine");
        let options = Options { name: "elasti".to_owned(), kube_proxy: ProxyMode::default(), api_server_only: false };
        let cluster = Cluster::up(&options)?;
        say("installing Elasti: kubectl apply -k config/default");
        install::install(&cluster)?;
        let image = images::TARGETS.to_owned();
        Demo { place: Place::Test(cluster), nginx: image.clone(), redis: image }
    };
    demo.run()
}

impl Demo {
    fn run(&self) -> Result<()> {
        say("deploying nginx and Redis, each with a Service and an ElastiService");
        self.deploy()?;
        let bare = self.bare_scale_up()?;
        for target in &TARGETS {
            self.sleep(target)?;
        }
        show(&self.kubectl(&["get", "elastiservices,deployments"])?);
        for target in &TARGETS {
            let wake = self.wake(target)?;
            show(&format!("{}\n{}", wake.answer.trim_end(), timeline::table(&wake, bare)));
        }
        for target in &TARGETS {
            self.wait(target, "serve")?;
        }
        show(&self.kubectl(&["get", "elastiservices,pods"])?);
        self.say_what_next();
        Ok(())
    }

    fn command(&self) -> Result<Command> {
        match &self.place {
            Place::Test(cluster) => cluster.kubectl(),
            Place::Own(kubeconfig) => {
                let mut command = Command::new("kubectl");
                command.env("KUBECONFIG", kubeconfig);
                Ok(command)
            }
        }
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        crate::process::output(self.command()?.args(["-n", NAMESPACE]).args(arguments))
    }

    fn apply(&self, object: &Value) -> Result<()> {
        let mut command = self.command()?;
        let mut child = command.args(["apply", "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        child.stdin.take().context("the input is piped")?.write_all(object.to_string().as_bytes())?;
        let status = child.wait()?;
        if !status.success() {
            bail!(
                "kubectl refuses {object}; with a cluster of your own, install Elasti first: kubectl apply -k config/default"
            );
        }
        Ok(())
    }

    fn deploy(&self) -> Result<()> {
        self.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))?;
        until("the namespace's ServiceAccount", || {
            Ok(self.kubectl(&["get", "serviceaccount", "default"]).is_ok().then_some(()))
        })?;
        for target in &TARGETS {
            for object in self.objects(target) {
                self.apply(&object)?;
            }
        }
        let caller = |name: &str, image: &str| json!({"name": name, "image": image, "imagePullPolicy": "IfNotPresent", "command": ["sleep", "infinity"]});
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "caller", "namespace": NAMESPACE},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [caller("web", &self.nginx), caller("cache", &self.redis)],
            },
        }))?;
        self.kubectl(&["wait", "--for=condition=Ready", "pod", "caller", "--timeout=180s"])?;
        for target in &TARGETS {
            self.kubectl(&["scale", "deployment", target.name, "--replicas=1"])?;
            self.wait(target, "serve")?;
        }
        Ok(())
    }

    fn objects(&self, target: &Target) -> [Value; 3] {
        let image = if target.name == "web" { &self.nginx } else { &self.redis };
        let metadata = json!({"name": target.name, "namespace": NAMESPACE});
        let labels = json!({"app": target.name});
        [
            json!({
                "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata,
                "spec": {
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}, "spec": {
                        "terminationGracePeriodSeconds": 5,
                        "containers": [{
                            "name": "target", "image": image, "imagePullPolicy": "IfNotPresent", "command": target.command,
                            "readinessProbe": {"tcpSocket": {"port": target.port}, "periodSeconds": 1},
                        }],
                    }},
                },
            }),
            json!({
                "apiVersion": "v1", "kind": "Service", "metadata": metadata,
                "spec": {"selector": labels, "ports": [{"port": target.port}]},
            }),
            json!({
                "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService", "metadata": metadata,
                "spec": {
                    "service": target.name,
                    "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": target.name},
                },
            }),
        ]
    }

    /// How long nginx takes from `kubectl scale` until a pod is ready, without anybody waiting for it.
    fn bare_scale_up(&self) -> Result<Duration> {
        say("for comparison: a bare `kubectl scale` from 0 to 1");
        let target = &TARGETS[0];
        self.sleep(target)?;
        let begun = Instant::now();
        self.kubectl(&["scale", "deployment", target.name, "--replicas=1"])?;
        let mut watch = self.command()?;
        watch.args(["-n", NAMESPACE, "wait", "--for=condition=Available", "deployment", target.name, "--timeout=180s"]);
        crate::process::output(&mut watch)?;
        let took = begun.elapsed();
        self.wait(target, "serve")?;
        Ok(took)
    }

    fn sleep(&self, target: &Target) -> Result<()> {
        say(&format!("scaling {} to zero by hand", target.name));
        self.kubectl(&["scale", "deployment", target.name, "--replicas=0"])?;
        self.wait(target, "proxy")?;
        until("its pods are gone", || {
            let pods = self.kubectl(&["get", "pods", "-l", &format!("app={}", target.name), "-o", "name"])?;
            Ok(pods.trim().is_empty().then_some(()))
        })
    }

    fn wait(&self, target: &Target, mode: &str) -> Result<()> {
        until(&format!("{} is in mode {mode}", target.name), || {
            let seen = self.kubectl(&["get", "elastiservice", target.name, "-o", "jsonpath={.status.mode}"])?;
            Ok((seen == mode).then_some(()))
        })
    }

    fn wake(&self, target: &Target) -> Result<Wake> {
        say(&format!("{}, which has no pod", target.what));
        let ip = self.kubectl(&["get", "service", target.name, "-o", "jsonpath={.spec.clusterIP}"])?;
        let watch = timeline::PodWatch::start(self.command()?, NAMESPACE, target.name)?;
        let call = (target.call)(&ip);
        let mut arguments = vec!["exec", "caller", "-c", target.name, "--"];
        arguments.extend(call.iter().map(String::as_str));
        let answer = self.kubectl(&arguments)?;
        let logs = |selector: &str| {
            crate::process::output(self.command()?.args([
                "-n",
                "elasti",
                "logs",
                "--prefix",
                "--timestamps",
                "--since=3m",
                "--tail=-1",
                "-l",
                selector,
            ]))
        };
        until("the wake stands in the resolver's log", || {
            Ok(timeline::read(
                &logs("app=elasti-resolver")?,
                &logs("app.kubernetes.io/name=elasti-operator")?,
                target.name,
            ))
        })
        .map(|phases| Wake { answer, phases, pod: watch.stop() })
    }

    fn say_what_next(&self) {
        let kubectl = match &self.place {
            Place::Test(_) => "cargo xtask cluster kubectl -- -n elasti-demo",
            Place::Own(_) => "kubectl -n elasti-demo",
        };
        show(&format!(
            "Try next:\n  {kubectl} get elasti -w\n  {kubectl} scale deployment web --replicas=0\n  \
             {kubectl} exec caller -c web -- curl -s http://web/\n  {kubectl} describe elasti web"
        ));
        if matches!(self.place, Place::Test(_)) {
            show("  cargo xtask cluster down        # removes the cluster");
        }
    }
}

fn say(what: &str) {
    eprintln!("==> {what}");
}

#[expect(clippy::print_stdout, reason = "the demo shows something")]
fn show(text: &str) {
    println!("{text}");
}

/// Polls until there is something.
fn until<T>(what: &str, mut seen: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(it) = seen()? {
            return Ok(it);
        }
        if begun.elapsed() > PATIENCE {
            bail!("waited {} s in vain until {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
