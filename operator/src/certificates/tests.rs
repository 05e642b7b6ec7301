use std::collections::HashMap;
use std::sync::Mutex;

use elasti_api::names::CA_KEY;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde_json::Value;

use super::*;
use crate::testing::{Answer, answer, client};

const HOST: &str = "elasti-operator-stream.elasti.svc";

/// Objects by path, behind an API server that checks resourceVersions.
#[derive(Clone, Default)]
struct Objects(Arc<Mutex<HashMap<String, Value>>>);

impl Objects {
    fn keeper(&self) -> Keeper {
        let objects = self.clone();
        let client = client(move |request, body| objects.answer(&request, &body));
        Keeper::new(client, "elasti", names("elasti-operator-stream", "elasti", "cluster.local"))
    }

    fn answer(&self, request: &http::request::Parts, body: &[u8]) -> Answer {
        let mut objects = self.0.lock().unwrap();
        let path = request.uri.path().to_owned();
        if request.method == http::Method::GET {
            return objects.get(&path).map_or_else(|| answer(404, "NotFound"), |object| answer(200, object));
        }
        let mut object: Value = serde_json::from_slice(body).unwrap();
        let name = object["metadata"]["name"].as_str().unwrap();
        let path = if request.method == http::Method::POST { format!("{path}/{name}") } else { path };
        let version = objects.get(&path).map(|object| object["metadata"]["resourceVersion"].clone());
        if version.clone().unwrap_or_default() != object["metadata"]["resourceVersion"] {
            return answer(409, "Conflict");
        }
        let number: u64 = version.map_or(0, |version| version.as_str().unwrap().parse().unwrap());
        object["metadata"]["resourceVersion"] = (number + 1).to_string().into();
        objects.insert(path, object.clone());
        answer(200, object)
    }

    fn bundle(&self) -> String {
        let objects = self.0.lock().unwrap();
        objects["/api/v1/namespaces/elasti/configmaps/elasti-ca"]["data"][CA_KEY].as_str().unwrap().to_owned()
    }
}

#[derive(Debug)]
struct Clock(Timestamp);

impl rustls::time_provider::TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.as_second().try_into().unwrap())))
    }
}

/// Shakes hands at the time `now` with a client that trusts `bundle` and expects `host`.
async fn handshake(certificate: &Certificate, bundle: &str, host: &'static str, now: Timestamp) -> std::io::Result<()> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(certificate.clone()));
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    let client = ClientConfig::builder_with_details(provider, Arc::new(Clock(now)))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (near, far) = tokio::io::duplex(4096);
    let accept = tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(far);
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let connect = connector.connect(ServerName::try_from(host).unwrap(), near);
    let (_, connected) = tokio::join!(accept, connect);
    connected.map(|_| ())
}

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

#[tokio::test]
async fn every_replica_has_a_certificate_that_the_published_bundle_trusts() {
    let objects = Objects::default();
    let (leader, follower) = (objects.keeper(), objects.keeper());
    follower.round(false, start()).await.unwrap();
    assert!(!*follower.ready().borrow(), "only the leader makes authorities");
    leader.round(true, start()).await.unwrap();
    follower.round(false, start()).await.unwrap();
    for replica in [&leader, &follower] {
        assert!(*replica.ready().borrow());
        for host in [HOST, "elasti-operator-stream.elasti.svc.cluster.local", "elasti-operator-stream.elasti"] {
            handshake(&replica.certificate(), &objects.bundle(), host, start()).await.unwrap();
        }
        handshake(&replica.certificate(), &objects.bundle(), "elsewhere.elasti.svc", start()).await.unwrap_err();
    }
}

#[tokio::test]
async fn an_authority_is_replaced_without_a_failed_handshake_for_old_and_new_bundles() {
    let objects = Objects::default();
    let keeper = objects.keeper();
    keeper.round(true, start()).await.unwrap();
    let old = objects.bundle();

    let rotation = start() + Duration::from_hours(250 * 24);
    keeper.round(true, rotation).await.unwrap();
    let new = objects.bundle();
    assert!(new.starts_with(&old) && new.len() > old.len());
    for bundle in [&old, &new] {
        handshake(&keeper.certificate(), bundle, HOST, rotation).await.unwrap();
    }

    let spread = rotation + rotation::SPREAD;
    keeper.round(true, spread).await.unwrap();
    handshake(&keeper.certificate(), &new, HOST, spread).await.unwrap();
    handshake(&keeper.certificate(), &old, HOST, spread).await.unwrap_err();

    let expired = start() + Duration::from_hours(366 * 24);
    keeper.round(true, expired).await.unwrap();
    assert!(!objects.bundle().contains(&old));
    handshake(&keeper.certificate(), &objects.bundle(), HOST, expired).await.unwrap();
    handshake(&keeper.certificate(), &new, HOST, expired).await.unwrap();
}

#[tokio::test]
async fn a_certificate_is_renewed_before_it_expires() {
    let objects = Objects::default();
    let keeper = objects.keeper();
    keeper.round(true, start()).await.unwrap();
    let later = start() + Duration::from_hours(31 * 24);
    handshake(&keeper.certificate(), &objects.bundle(), HOST, later).await.unwrap_err();
    keeper.round(false, later).await.unwrap();
    handshake(&keeper.certificate(), &objects.bundle(), HOST, later).await.unwrap();
}

#[tokio::test]
async fn a_secret_that_was_edited_is_told_with_its_cure_and_left_alone() {
    let objects = Objects::default();
    let keeper = objects.keeper();
    keeper.round(true, start()).await.unwrap();
    let path = "/api/v1/namespaces/elasti/secrets/elasti-operator-tls";
    objects.0.lock().unwrap().get_mut(path).unwrap()["data"]["authorities.json"] = "bm8=".into();
    let error = keeper.round(true, start()).await.unwrap_err().to_string();
    assert!(error.contains("delete it"), "{error}");
}
