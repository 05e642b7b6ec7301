use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::sync::Mutex;

use elasti_runtime::telemetry::{Format, Level, subscriber};
use http_body_util::{BodyExt, Full};
use kube::Client;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::testing::{Answer, answer, client, silence};

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/elasti/leases/elasti-operator";

const ARGO: &str = "/apis/argoproj.io/v1alpha1";

const KEDA: &str = "/apis/keda.sh/v1alpha1";

/// A cluster with nothing in it but what the operator writes, and with Argo CD, whose API group Argo Rollouts is of too.
#[derive(Clone, Default)]
struct Cluster(Arc<Mutex<BTreeMap<String, Value>>>);

impl Cluster {
    fn client(&self) -> Client {
        let cluster = self.clone();
        client(move |request, body| cluster.answer(&request, &body))
    }

    fn answer(&self, request: &http::request::Parts, body: &[u8]) -> Answer {
        let mut objects = self.0.lock().unwrap();
        let path = request.uri.path().to_owned();
        let is_object = path.contains("/namespaces/");
        match request.method.as_str() {
            "GET" if is_object => {
                objects.get(&path).map_or_else(|| answer(404, "NotFound"), |object| answer(200, object))
            }
            "GET" if path == ARGO => {
                let applications = json!({
                    "name": "applications", "singularName": "application", "namespaced": true, "kind": "Application", "verbs": ["list"],
                });
                let list = json!({"kind": "APIResourceList", "groupVersion": "argoproj.io/v1alpha1", "resources": [applications]});
                answer(200, list)
            }
            // In plain text, as the API server says it of what it does not serve.
            "GET" if path.starts_with(ARGO) || path.starts_with(KEDA) => {
                let body = Full::from("404 page not found\n").boxed();
                http::Response::builder().status(404).body(body).unwrap()
            }
            "GET" if request.uri.query().is_some_and(|query| query.contains("watch=true")) => silence(),
            "GET" => answer(
                200,
                json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []}),
            ),
            method => {
                let object: Value = serde_json::from_slice(body).unwrap();
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                objects.insert(if method == "POST" { format!("{path}/{name}") } else { path }, object.clone());
                answer(200, object)
            }
        }
    }

    fn holder(&self) -> Option<String> {
        self.0.lock().unwrap().get(LEASE)?["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }
}

async fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    reply
}

/// Keeps out B42: SIGTERM does not end the operator.
#[tokio::test]
async fn an_operator_becomes_ready_leads_serves_and_gives_the_lease_back() {
    let flags = ["operator", "--pod-name=me", "--operator-port=0", "--health-port=0", "--stream-port=0"];
    let arguments = elasti_runtime::config::parse(flags.iter().map(OsString::from)).unwrap();
    let (cluster, (_, levels)) = (Cluster::default(), subscriber(Format::Text, &Level::default()));
    let bound = build(Config::new(&arguments).unwrap(), cluster.client().into(), levels).await.unwrap();
    let (notify, health, stream) = (bound.notify.port(), bound.health.port(), bound.stream.port());
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(bound.run(shutdown.clone()));

    let ready = async {
        while !get(health, "/readyz").await.starts_with("HTTP/1.1 200") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ready).await.expect("becomes ready");
    assert_eq!(cluster.holder(), Some("me".to_owned()));
    let metrics = get(notify, "/metrics").await;
    assert!(metrics.lines().any(|line| line == "elasti_operator_leader 1"), "{metrics}");
    let objects: Vec<String> = cluster.0.lock().unwrap().keys().cloned().collect();
    assert!(objects.iter().any(|path| path.ends_with("/configmaps/elasti-ca")), "{objects:?}");
    TcpStream::connect((Ipv4Addr::LOCALHOST, stream)).await.unwrap();

    shutdown.cancel();
    running.await.unwrap();
    assert_eq!(cluster.holder(), None);
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, stream)).await.is_err());
}
