//! The two objects: the Secret with the authorities and the ConfigMap with their certificates. Writes carry the
//! resourceVersion that was read, so a replica that does not know yet that it leads no more changes nothing.

use std::collections::BTreeMap;

use elasti_api::names::{CA_CONFIG_MAP, CA_KEY, TLS_SECRET};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::authority::Authority;

/// Key of the Secret's only item.
const AUTHORITIES_KEY: &str = "authorities.json";

pub(super) struct Store {
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
}

/// What is stored; the objects themselves are kept for the write that may follow.
pub(super) struct Stored {
    pub(super) secret: Option<Secret>,
    pub(super) config_map: Option<ConfigMap>,
    pub(super) authorities: Vec<Authority>,
    pub(super) bundle: Option<String>,
}

/// Why the objects could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("cannot reach {what}: {source}")]
    Api { what: &'static str, source: kube::Error },
    #[error("Secret {TLS_SECRET} is not what an operator has written ({0}); delete it: new authorities are made")]
    Malformed(#[from] serde_json::Error),
}

impl StoreError {
    /// Somebody else was faster.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Api { source: kube::Error::Api(status), .. }
            if status.is_conflict() || status.is_already_exists())
    }
}

fn secret_error(source: kube::Error) -> StoreError {
    StoreError::Api { what: "Secret elasti-operator-tls", source }
}

fn config_map_error(source: kube::Error) -> StoreError {
    StoreError::Api { what: "ConfigMap elasti-ca", source }
}

impl Store {
    pub(super) fn new(client: Client, namespace: &str) -> Self {
        Self { secrets: Api::namespaced(client.clone(), namespace), config_maps: Api::namespaced(client, namespace) }
    }

    pub(super) async fn read(&self) -> Result<Stored, StoreError> {
        let secret = self.secrets.get_opt(TLS_SECRET).await.map_err(secret_error)?;
        let config_map = self.config_maps.get_opt(CA_CONFIG_MAP).await.map_err(config_map_error)?;
        let item = secret.as_ref().and_then(|secret| secret.data.as_ref()?.get(AUTHORITIES_KEY));
        let authorities = item.map(|item| serde_json::from_slice(&item.0)).transpose()?.unwrap_or_default();
        let bundle = config_map.as_ref().and_then(|map| map.data.as_ref()?.get(CA_KEY).cloned());
        Ok(Stored { secret, config_map, authorities, bundle })
    }

    pub(super) async fn write(&self, secret: Option<Secret>, authorities: &[Authority]) -> Result<(), StoreError> {
        let item = ByteString(serde_json::to_vec(authorities)?);
        let exists = secret.is_some();
        let mut secret = secret.unwrap_or_default();
        secret.data.get_or_insert_with(BTreeMap::new).insert(AUTHORITIES_KEY.to_owned(), item);
        write(&self.secrets, TLS_SECRET, secret, exists).await.map_err(secret_error)
    }

    pub(super) async fn publish(&self, config_map: Option<ConfigMap>, bundle: String) -> Result<(), StoreError> {
        let exists = config_map.is_some();
        let mut config_map = config_map.unwrap_or_default();
        config_map.data.get_or_insert_with(BTreeMap::new).insert(CA_KEY.to_owned(), bundle);
        write(&self.config_maps, CA_CONFIG_MAP, config_map, exists).await.map_err(config_map_error)
    }
}

async fn write<K>(api: &Api<K>, name: &str, mut object: K, exists: bool) -> kube::Result<()>
where
    K: Resource + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    let params = PostParams::default();
    if exists {
        api.replace(name, &params, &object).await.map(|_| ())
    } else {
        *object.meta_mut() = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        api.create(&params, &object).await.map(|_| ())
    }
}
