//! The client processes: on the host and in a pod of each node, told by a pipe and heard by another.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use elasti_traffic::record::{Command, Load, Record, Said};
use tokio::sync::Notify;

use super::run::TRAFFIC_IMAGE;
use crate::cluster::{NODES, apply, kubectl};

/// Longer than a client's own patience with a request.
const PATIENCE: Duration = Duration::from_mins(2);

/// All clients of a run. They end with it.
pub struct Clients {
    places: Vec<Mutex<ChildStdin>>,
    heard: Arc<Heard>,
    next: AtomicU64,
    processes: Vec<Child>,
}

#[derive(Default)]
struct Heard {
    loads: Mutex<BTreeMap<u64, LoadHeard>>,
    changed: Notify,
}

#[derive(Default)]
struct LoadHeard {
    records: Vec<Record>,
    done: bool,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, LoadHeard>> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A load that a client makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    place: usize,
    load: u64,
}

impl Clients {
    /// Starts them: a host process and a pod on each node. `hosts` are the command lines of the former.
    pub fn start(namespace: &str, hosts: &[Vec<String>]) -> Self {
        for name in NODES {
            let pod = serde_json::json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": format!("clients-{name}"), "namespace": namespace},
                "spec": {
                    "nodeName": name, "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "clients", "image": TRAFFIC_IMAGE, "imagePullPolicy": "Never",
                        "args": ["serve", "--port", "8080", "--on-term", "exit"],
                    }],
                },
            });
            apply(&pod);
        }
        let pods = NODES.map(|name| format!("pod/clients-{name}"));
        let mut wait = vec!["-n", namespace, "wait", "--for=condition=Ready", "--timeout=60s"];
        wait.extend(pods.iter().map(String::as_str));
        kubectl(&wait);
        let program = std::env::var("ELASTI_KUBECTL").expect("set by xtask");
        let in_pods = pods.iter().map(|pod| {
            [&program, "-n", namespace, "exec", "-i", pod, "--", "/elasti-traffic", "client"]
                .map(ToOwned::to_owned)
                .to_vec()
        });
        let heard = Arc::<Heard>::default();
        let (mut places, mut processes) = (Vec::new(), Vec::new());
        for line in hosts.iter().cloned().chain(in_pods) {
            let (stdin, child) = start(&line, &heard);
            places.push(Mutex::new(stdin));
            processes.push(child);
        }
        Self { places, heard, next: AtomicU64::new(1), processes }
    }

    /// How many places there are.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// Begins a load at a place; its number is given here.
    pub fn begin(&self, place: usize, load: &Load) -> Running {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.heard.lock().insert(number, LoadHeard::default());
        self.tell(place, &Command::Start(Load { load: number, ..load.clone() }));
        Running { place, load: number }
    }

    /// Lets no more requests of a load arrive.
    pub fn stop(&self, running: Running) {
        self.tell(running.place, &Command::Stop { load: running.load });
    }

    fn tell(&self, place: usize, command: &Command) {
        let line = serde_json::to_string(command).expect("a command is JSON") + "\n";
        let mut stdin = self.places[place].lock().unwrap_or_else(PoisonError::into_inner);
        stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).expect("the client listens");
    }

    /// Waits until a stopped load has ended; its requests.
    pub async fn records(&self, running: Running) -> Vec<Record> {
        let ended = async {
            loop {
                let changed = self.heard.changed.notified();
                if self.heard.lock().get(&running.load).is_some_and(|load| load.done) {
                    return self.heard.lock().remove(&running.load).map(|load| load.records).unwrap_or_default();
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.unwrap_or_else(|_| panic!("{running:?} does not end"))
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ended_already = process.kill();
            let _ended_already = process.wait();
        }
    }
}

fn start(line: &[String], heard: &Arc<Heard>) -> (ChildStdin, Child) {
    let mut child = std::process::Command::new(&line[0])
        .args(&line[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{line:?}: {error}"));
    let stdin = child.stdin.take().expect("the input is piped");
    let mut lines = BufReader::new(child.stdout.take().expect("the output is piped")).lines();
    let first = lines.next().expect("a client speaks").expect("a client speaks");
    assert_eq!(serde_json::from_str::<Said>(&first).ok(), Some(Said::Ready), "{line:?}: {first}");
    let heard = heard.clone();
    std::thread::spawn(move || hear(lines, &heard));
    (stdin, child)
}

fn hear(lines: Lines<BufReader<ChildStdout>>, heard: &Heard) {
    // The end of a client's output is the end of the run, or shows as a load that does not end.
    for line in lines.map_while(Result::ok) {
        match serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}")) {
            Said::Request(record) => heard.lock().entry(record.load).or_default().records.push(record),
            Said::Done { load } => heard.lock().entry(load).or_default().done = true,
            Said::Ready => {}
        }
        heard.changed.notify_waiters();
    }
}
