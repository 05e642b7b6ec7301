//! KubeElasti's page `/crd-cache`: every Service with its ElastiService. Pure; nothing secret is in it.

use std::sync::Arc;

use elasti_api::v1alpha1::ElastiService;
use serde_json::{Map, Value, json};

/// What stands in place of a secret.
const HIDDEN: &str = "(hidden)";

/// The page: `services` by `namespace/service`, each with name, spec and status.
pub fn page(elastis: &[Arc<ElastiService>]) -> Value {
    let services: Map<String, Value> = elastis.iter().map(|elasti| entry(elasti)).collect();
    json!({"services": services})
}

fn entry(elasti: &ElastiService) -> (String, Value) {
    let namespace = elasti.metadata.namespace.as_deref().unwrap_or_default();
    let mut spec = elasti.spec.clone();
    for trigger in spec.triggers.iter_mut().flatten() {
        if let Some(metadata) = &mut trigger.metadata {
            hide(metadata);
        }
    }
    let key = format!("{namespace}/{}", spec.service);
    (key, json!({"name": elasti.metadata.name, "spec": spec, "status": elasti.status}))
}

/// Hides what may be a secret in a trigger's metadata: values of headers, and credentials in the server's address.
fn hide(metadata: &mut Value) {
    if let Some(headers) = metadata.get_mut("headers").and_then(Value::as_object_mut) {
        headers.values_mut().for_each(|value| *value = HIDDEN.into());
    }
    if let Some(address) = metadata.get_mut("serverAddress")
        && let Some(text) = address.as_str()
        && let Some((scheme, rest)) = text.split_once("://")
        && let Some((_, host)) = rest.rsplit_once('@')
    {
        *address = format!("{scheme}://{HIDDEN}@{host}").into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b41_the_page_names_services_and_no_credentials() {
        let metadata = json!({
            "query": "q", "threshold": "1", "serverAddress": "https://me:s3cret@prometheus:9090",
            "headers": {"Authorization": "Bearer s3cret"},
        });
        let elasti = serde_json::from_value(json!({
            "apiVersion": "elasti.truefoundry.com/v1alpha1", "kind": "ElastiService",
            "metadata": {"namespace": "shop", "name": "elasti-web"},
            "spec": {
                "service": "web", "triggers": [{"type": "prometheus", "metadata": metadata}],
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            },
            "status": {"mode": "proxy"},
        }))
        .unwrap();
        let page = page(&[Arc::new(elasti)]);
        let entry = &page["services"]["shop/web"];
        assert_eq!((&entry["name"], &entry["status"]["mode"]), (&json!("elasti-web"), &json!("proxy")));
        let metadata = &entry["spec"]["triggers"][0]["metadata"];
        assert_eq!(metadata["serverAddress"], "https://(hidden)@prometheus:9090");
        assert_eq!(metadata["headers"]["Authorization"], HIDDEN);
        assert!(!page.to_string().contains("s3cret"));
    }
}
