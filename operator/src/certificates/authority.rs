//! Keys and certificates: an authority as it is kept, and the certificates that it signs.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};

use super::rotation::past_two_thirds;

/// Life of an authority: renewed eight months in, by a program that may be upgraded less often than that.
const AUTHORITY_LIFE: Duration = Duration::from_hours(365 * 24);

/// Life of a certificate. It is never on disk and is renewed while the program runs, so it may be short.
const LEAF_LIFE: Duration = Duration::from_hours(30 * 24);

/// Everything is valid from a little before now, for clocks that are behind ours.
const BACKDATE: Duration = Duration::from_hours(1);

/// An authority as the Secret keeps it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Authority {
    /// Its certificate, PEM.
    pub certificate: String,
    /// Its private key, PEM.
    pub key: String,
    /// When its life begins.
    pub not_before: Timestamp,
    /// When its life ends.
    pub not_after: Timestamp,
    /// Since when its certificate is in the published bundle.
    pub published: Option<Timestamp>,
}

/// Why no certificate could be made.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// A key or a certificate does not parse, or is not what it should be.
    #[error("{0}; if the Secret was edited, delete it: new authorities are made")]
    Authority(#[from] rcgen::Error),
    /// TLS cannot use the result.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

impl Authority {
    /// A new authority that is valid from `now`.
    pub fn new(now: Timestamp) -> Result<Self, SignError> {
        let (not_before, not_after) = (now - BACKDATE, now + AUTHORITY_LIFE);
        let mut params = params(not_before, not_after, &format!("elasti-operator CA {}", now.as_second()));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, key: key.serialize_pem(), not_before, not_after, published: None })
    }

    /// A certificate for `names`, valid from `now`.
    pub fn sign(&self, names: &[String], now: Timestamp) -> Result<Leaf, SignError> {
        let not_after = self.not_after.min(now + LEAF_LIFE);
        let mut params = params(now - BACKDATE, not_after, "elasti-operator");
        params.subject_alt_names = CertificateParams::new(names)?.subject_alt_names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = rustls::crypto::ring::default_provider();
        let certified = CertifiedKey::from_der(vec![certificate.der().clone()], key, &provider)?;
        Ok(Leaf { certified: Arc::new(certified), signed_by: self.certificate.clone(), signed_at: now, not_after })
    }
}

fn params(not_before: Timestamp, not_after: Timestamp, name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let seconds = |at: Timestamp| Duration::from_secs(at.as_second().try_into().unwrap_or_default());
    params.not_before = epoch + seconds(not_before);
    params.not_after = epoch + seconds(not_after);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// A certificate with its key, for TLS.
#[derive(Debug)]
pub struct Leaf {
    certified: Arc<CertifiedKey>,
    signed_by: String,
    signed_at: Timestamp,
    not_after: Timestamp,
}

impl Leaf {
    /// For a handshake.
    pub fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    /// Whether another one is due: two thirds of its life have passed, or another authority signs.
    pub fn due(&self, signer: &Authority, now: Timestamp) -> bool {
        self.signed_by != signer.certificate || past_two_thirds(self.signed_at, self.not_after, now)
    }
}
