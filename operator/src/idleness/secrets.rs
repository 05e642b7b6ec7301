//! Values of Secrets that triggers name, read from the namespace of the ElastiService and kept for a minute.
//!
//! The operator's own roles do not allow it: whoever wants it grants `get` on the one Secret, so that nobody who may write
//! ElastiServices gets to see others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::v1alpha1::SecretKey;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};

use crate::observed::ObjectKey;

/// How long a value is kept: triggers are asked more often than Secrets change.
const KEPT: Duration = Duration::from_mins(1);

/// Reads Secrets.
#[derive(Clone)]
pub(super) struct Secrets {
    client: Client,
    kept: Arc<Mutex<HashMap<ObjectKey, (Instant, Secret)>>>,
}

impl Secrets {
    pub(super) fn new(client: Client) -> Self {
        Self { client, kept: Arc::default() }
    }

    /// A value; the error says why there is none, and the cure.
    pub(super) async fn value(&self, namespace: &str, wanted: &SecretKey) -> Result<String, String> {
        let secret = self.secret(ObjectKey::new(namespace, &wanted.name)).await?;
        let data = secret.data.unwrap_or_default();
        let value = data.get(&wanted.key).ok_or_else(|| format!("Secret {} has no key {}", wanted.name, wanted.key))?;
        let text = std::str::from_utf8(&value.0);
        text.map(|text| text.trim().to_owned())
            .map_err(|_| format!("the key {} of the Secret {} holds no text", wanted.key, wanted.name))
    }

    async fn secret(&self, key: ObjectKey) -> Result<Secret, String> {
        {
            // Every change is one insertion or removal, so a poisoned lock still guards a sound map.
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.retain(|_, (read, _)| read.elapsed() < KEPT);
            if let Some((_, secret)) = kept.get(&key) {
                return Ok(secret.clone());
            }
        }
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &key.namespace);
        let secret = api.get(&key.name).await.map_err(|error| match error {
            kube::Error::Api(status) if status.is_forbidden() => format!(
                "the operator may not read the Secret {key}: grant its ServiceAccount `get` on it by a Role in that namespace"
            ),
            kube::Error::Api(status) if status.is_not_found() => format!("there is no Secret {key}"),
            other => format!("cannot read the Secret {key}: {other}"),
        })?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(key, (Instant::now(), secret.clone()));
        Ok(secret)
    }
}
