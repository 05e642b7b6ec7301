//! A run: Services with their targets, clients, triggers and watches in one namespace, and the cycles that they go through.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::Duration;

use elasti_traffic::record::{Kind, Record};
use futures::future::join_all;
use kube::Client;
use serde_json::{Value, json};

use super::clients::Clients;
use super::cycle::{Plan, Runner};
use super::report::{Cycle, Report};
use super::triggers::Triggers;
use super::watch::Watches;
use crate::cluster::{IMAGE, NODES, Sandbox, get, kubectl, list};

/// The image of `elasti-traffic`, made by xtask.
pub const TRAFFIC_IMAGE: &str = "docker.io/library/elasti-traffic:dev";

/// The image of PostgreSQL, made by xtask.
const POSTGRES_IMAGE: &str = "docker.io/library/elasti-postgres:dev";

/// What a Service's target does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Drains at SIGTERM.
    Drains,
    /// Ends at once at SIGTERM.
    Exits,
    /// Redis, which ends at once too.
    Redis,
    /// PostgreSQL, which at SIGTERM waits for its sessions and refuses others.
    Postgres,
}

impl Program {
    /// A word for names of Services.
    pub fn name(self) -> &'static str {
        match self {
            Self::Drains => "drains",
            Self::Exits => "exits",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::Drains | Self::Exits => 80,
            Self::Redis => 6379,
            Self::Postgres => 5432,
        }
    }

    fn container(self) -> Value {
        let probe = |how: Value| {
            let mut probe = how;
            probe["periodSeconds"] = json!(1);
            probe
        };
        match self {
            Self::Redis => json!({
                "name": "target", "image": IMAGE, "imagePullPolicy": "Never",
                "command": ["redis-server", "--protected-mode", "no", "--bind", "*", "-::*", "--save", ""],
                "readinessProbe": probe(json!({"tcpSocket": {"port": self.port()}})),
            }),
            Self::Postgres => json!({
                "name": "target", "image": POSTGRES_IMAGE, "imagePullPolicy": "Never",
                "securityContext": {"runAsUser": 100, "runAsGroup": 100},
                "readinessProbe": probe(json!({"exec": {"command": ["/usr/lib/postgresql/15/bin/pg_isready", "-h", "127.0.0.1"]}})),
            }),
            Self::Drains | Self::Exits => json!({
                "name": "target", "image": TRAFFIC_IMAGE, "imagePullPolicy": "Never",
                "args": ["serve", "--on-term", if self == Self::Drains { "drain" } else { "exit" }],
                "readinessProbe": probe(json!({"httpGet": {"path": "/echo/ready", "port": self.port()}})),
            }),
        }
    }
}

/// One Service of a run.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name of the Service, its Deployment and its ElastiService.
    pub name: String,
    /// What its target does.
    pub program: Program,
    /// Where clients call it.
    pub address: SocketAddr,
    /// It has an ElastiService; else it is a control.
    pub elasti: bool,
}

impl Service {
    /// How clients call it.
    pub fn kinds(&self) -> &'static [Kind] {
        match self.program {
            Program::Drains | Program::Exits => &Kind::OF_TARGET,
            Program::Redis => &[Kind::Redis],
            Program::Postgres => &[Kind::Postgres],
        }
    }
}

/// What is common to all Services of a run.
pub struct Run {
    /// The namespace.
    pub sandbox: Sandbox,
    /// The API server.
    pub api: Client,
    /// What is seen.
    pub watches: Watches,
    /// Who calls.
    pub clients: Clients,
    /// What calls a Service idle.
    pub triggers: Triggers,
    /// Idleness before a target sleeps.
    cooldown: Duration,
    records: Mutex<Vec<(Cycle, bool, String, Record)>>,
}

/// What each target of a run may do, in turns.
pub const PROGRAMS: [Program; 4] = [Program::Drains, Program::Exits, Program::Redis, Program::Postgres];

impl Run {
    /// Sets a run up. `hosts` are the command lines of the clients on hosts, `cooldown` the idleness before a target sleeps,
    /// in whole seconds.
    pub async fn new(hosts: &[Vec<String>], cooldown: Duration) -> Self {
        let sandbox = Sandbox::new("cycles");
        let mut config = kube::Config::infer().await.expect("run this by `cargo xtask test --only cycles`");
        // A Service may be quiet for longer than the operator bears.
        config.read_timeout = None;
        let api = Client::try_from(config).expect("the kubeconfig is good");
        let watches = Watches::new(&api, &sandbox.namespace, cooldown);
        let triggers = Triggers::start(node_address()).await;
        let clients = Clients::start(&sandbox.namespace, hosts);
        Self { sandbox, api, watches, clients, triggers, cooldown, records: Mutex::default() }
    }

    /// Makes Services whose targets take turns in what they do, with ElastiServices or without; returns when all are
    /// served directly.
    pub async fn services(&self, count: usize, elasti: bool) -> Vec<Service> {
        let mut services = Vec::new();
        for number in 0..count {
            let program = PROGRAMS[number % PROGRAMS.len()];
            let name = format!("{}{}-{number}", if elasti { "" } else { "control-" }, program.name());
            self.apply(&name, program, NODES[number % NODES.len()], elasti);
            let object = get(&self.sandbox.namespace, "service", &name).expect("the Service is there");
            let ip: IpAddr = object["spec"]["clusterIP"].as_str().expect("a cluster IP").parse().expect("an address");
            services.push(Service { name, program, address: SocketAddr::new(ip, program.port()), elasti });
        }
        for service in &services {
            self.watches.until(&service.name, "is served directly", super::timeline::State::is_direct).await;
        }
        services
    }

    fn apply(&self, name: &str, program: Program, node: &str, elasti: bool) {
        let labels = json!({"app": name});
        self.sandbox.apply(json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
            "spec": {
                "replicas": 1, "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {
                    "nodeName": node, "terminationGracePeriodSeconds": 15, "containers": [program.container()],
                }},
            },
        }));
        self.sandbox.apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"selector": labels, "ports": [{"port": program.port()}]},
        }));
        if !elasti {
            return;
        }
        self.sandbox.apply(json!({
            "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService", "metadata": {"name": name},
            "spec": {
                "service": name, "cooldownPeriod": self.cooldown.as_secs(), "triggers": [self.triggers.of(name)],
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            },
        }));
    }

    /// Goes through so many cycles in all, side by side on all Services; meanwhile each control goes through
    /// `control_cycles`. Each Service goes through all plans in turns; `first` shifts which one it begins with, so that
    /// runs differ. The report, and that of the controls.
    pub async fn cycles(
        &self,
        (services, count, first): (&[Service], usize, usize),
        (controls, control_cycles): (&[Service], usize),
    ) -> (Report, Report) {
        let (mut report, mut control) = (Report::default(), Report::default());
        let runners = services.iter().enumerate().map(|(number, service)| async move {
            let mut runner = Runner::new(self, service, first + number);
            let plans = first + number * Plan::COUNT.div_ceil(services.len());
            for (round, cycle) in (number..count).step_by(services.len()).enumerate() {
                let plan = Plan::of(plans + round);
                eprintln!("{}: cycle {cycle}: {plan}", service.name);
                runner.cycle(round, plan).await;
            }
        });
        let control_runners = controls.iter().enumerate().map(|(number, service)| async move {
            let mut runner = Runner::new(self, service, number);
            for cycle in 0..control_cycles {
                runner.control_cycle(cycle).await;
            }
        });
        tokio::join!(join_all(runners), join_all(control_runners));
        self.judge(&mut report, &mut control);
        (report, control)
    }

    /// Keeps what clients have recorded in a Service's cycle until it is judged. `plan` is for people.
    pub fn keep(&self, service: &Service, number: usize, plan: &str, records: Vec<Record>) {
        let mut kept = self.records.lock().expect("nobody panics with it");
        let cycle = Cycle { service: service.name.clone(), number };
        kept.extend(records.into_iter().map(|record| (cycle.clone(), service.elasti, plan.to_owned(), record)));
    }

    fn judge(&self, report: &mut Report, control: &mut Report) {
        let resolvers = resolver_addresses();
        let records = std::mem::take(&mut *self.records.lock().expect("nobody panics with it"));
        let mut timelines = BTreeMap::new();
        for (cycle, elasti, plan, record) in records {
            let name = &cycle.service;
            let timeline = timelines.entry(name.clone()).or_insert_with(|| self.watches.timeline(name));
            let (window, verdict) = (timeline.window(record.arrived), timeline.verdict(&record, &resolvers));
            let report = if elasti { &mut *report } else { &mut *control };
            report.add(&cycle, record.kind, window, verdict, || {
                let from = record.connecting.min(record.arrived).saturating_sub(5_000_000);
                format!(
                    "{name}, {plan}, {}: {record:?}\n since {from}:\n{}",
                    window.name(),
                    timeline.describe(from, record.ended)
                )
            });
        }
    }
}

/// The IPv4 address of node 1, where the run itself is.
fn node_address() -> IpAddr {
    let path = r#"jsonpath={.status.addresses[?(@.type=="InternalIP")].address}"#;
    let addresses = kubectl(&["get", "node", NODES[0], "-o", path]);
    let mut addresses = addresses.split_whitespace().filter_map(|address| address.parse().ok());
    addresses.find(IpAddr::is_ipv4).expect("a node has an IPv4 address")
}

/// All addresses of resolvers, ending ones too.
fn resolver_addresses() -> BTreeSet<IpAddr> {
    let pods = list(elasti_api::names::NAMESPACE, "pods", "app=elasti-resolver");
    let addresses = pods.iter().flat_map(|pod| pod["status"]["podIPs"].as_array().cloned().unwrap_or_default());
    addresses.filter_map(|address| address["ip"].as_str()?.parse().ok()).collect()
}
