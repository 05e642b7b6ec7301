//! HTTP clients of triggers: one for each set of TLS settings, kept and shared.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use elasti_api::v1alpha1::TriggerTls;
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// A client.
pub(super) type HttpsClient = Client<hyper_rustls::HttpsConnector<HttpConnector>, Empty<bytes::Bytes>>;

/// Clients with TLS settings of their own that are kept: a cluster has few Prometheus servers. Beyond that all are made
/// anew.
const KEPT: usize = 64;

/// Gives clients.
#[derive(Clone)]
pub(super) struct Clients {
    usual: HttpsClient,
    own: Arc<Mutex<HashMap<TriggerTls, HttpsClient>>>,
}

impl Clients {
    pub(super) fn new() -> Self {
        let builder = hyper_rustls::HttpsConnectorBuilder::new();
        let https = match builder.with_native_roots() {
            Ok(builder) => builder,
            // Without the system's certificates plain HTTP still works, and HTTPS fails with an error that says so.
            Err(_) => hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(
                ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth(),
            ),
        };
        Self { usual: client(https), own: Arc::default() }
    }

    /// The client for these settings; the error says what is wrong with them.
    pub(super) fn of(&self, tls: Option<&TriggerTls>) -> Result<HttpsClient, String> {
        let Some(tls) = tls else { return Ok(self.usual.clone()) };
        // Every change is one insertion or removal, so a poisoned lock still guards a sound map.
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = own.get(tls) {
            return Ok(known.clone());
        }
        let made = client(hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config(tls)?));
        if own.len() >= KEPT {
            own.clear();
        }
        own.insert(tls.clone(), made.clone());
        Ok(made)
    }
}

fn client(https: hyper_rustls::HttpsConnectorBuilder<hyper_rustls::builderstates::WantsSchemes>) -> HttpsClient {
    let https = https.https_or_http().enable_http1().build();
    Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(https)
}

fn config(tls: &TriggerTls) -> Result<ClientConfig, String> {
    if tls.insecure_skip_verify {
        if tls.ca.is_some() {
            return Err("tls: ca has no meaning with insecureSkipVerify; name one of the two".to_owned());
        }
        let any = Arc::new(AnyCertificate(Arc::new(ring::default_provider())));
        return Ok(ClientConfig::builder().dangerous().with_custom_certificate_verifier(any).with_no_client_auth());
    }
    let Some(pem) = &tls.ca else {
        return Err("tls: name ca, with certificates in PEM, or insecureSkipVerify".to_owned());
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|error| format!("tls.ca is not PEM: {error}"))?;
        roots.add(certificate).map_err(|error| format!("tls.ca: {error}"))?;
    }
    if roots.is_empty() {
        return Err("tls.ca holds no certificate in PEM".to_owned());
    }
    Ok(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
}

/// What is wrong with TLS settings.
pub(super) fn fault(tls: &TriggerTls) -> Option<String> {
    config(tls).err()
}

/// Takes every certificate; the signature over the handshake is still checked against it.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
