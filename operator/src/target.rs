//! Scale targets: which kinds there are, how one is observed, and how `/scale` is patched.

use std::fmt;
use std::sync::Arc;

use elasti_api::v1alpha1::ScaleTargetRef;
use k8s_openapi::api::autoscaling::v1::Scale;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind, Selector};

use crate::observed::{ObjectKey, TargetObserved};

/// A kind of target.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `apps/v1 Deployment`.
    Deployment,
    /// `apps/v1 StatefulSet`.
    StatefulSet,
    /// `argoproj.io/v1alpha1 Rollout`.
    Rollout,
    /// Whatever else an ElastiService names. Whether the cluster serves it with a `/scale` subresource is asked then.
    Other(Arc<OtherKind>),
}

/// A kind that is not known beforehand, as an ElastiService names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OtherKind {
    /// API group and version, such as `apps.kruise.io/v1alpha1`.
    pub api_version: String,
    /// Kind, such as `CloneSet`.
    pub kind: String,
}

impl Kind {
    /// Kinds that every cluster serves.
    pub const BUILT_IN: [Self; 2] = [Self::Deployment, Self::StatefulSet];

    /// The kind that a reference names.
    pub fn of(reference: &ScaleTargetRef) -> Self {
        match (reference.api_version.as_str(), reference.kind()) {
            ("apps/v1", "Deployment") => Self::Deployment,
            ("apps/v1", "StatefulSet") => Self::StatefulSet,
            ("argoproj.io/v1alpha1", "Rollout") => Self::Rollout,
            (api_version, kind) => {
                Self::Other(Arc::new(OtherKind { api_version: api_version.to_owned(), kind: kind.to_owned() }))
            }
        }
    }

    /// The API resource, of kinds that are known beforehand.
    pub fn resource(&self) -> Option<ApiResource> {
        let (group, version, kind, plural) = match self {
            Self::Deployment => ("apps", "v1", "Deployment", "deployments"),
            Self::StatefulSet => ("apps", "v1", "StatefulSet", "statefulsets"),
            Self::Rollout => ("argoproj.io", "v1alpha1", "Rollout", "rollouts"),
            Self::Other(_) => return None,
        };
        Some(ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural))
    }
}

impl OtherKind {
    /// Group, version and kind; the core group has no name.
    pub fn gvk(&self) -> GroupVersionKind {
        let (group, version) = self.api_version.rsplit_once('/').unwrap_or(("", &self.api_version));
        GroupVersionKind::gvk(group, version, &self.kind)
    }
}

impl fmt::Display for OtherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.kind, self.api_version)
    }
}

/// What is kept of a target.
pub fn observed(object: &DynamicObject) -> TargetObserved {
    let replicas = object.data.pointer("/spec/replicas").and_then(serde_json::Value::as_i64);
    let selector = object
        .data
        .pointer("/spec/selector")
        .and_then(|selector| serde_json::from_value::<LabelSelector>(selector.clone()).ok())
        .and_then(|selector| Selector::try_from(selector).ok())
        .map(|selector| selector.to_string())
        // A Rollout with `workloadRef` tells it in its status only.
        .or_else(|| object.data.pointer("/status/selector")?.as_str().map(str::to_owned))
        .unwrap_or_default();
    TargetObserved {
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
        spec_replicas: replicas.unwrap_or(1).try_into().unwrap_or(i32::MAX),
        pod_network: object.data.pointer("/spec/template/spec").is_some_and(|pod| pod["hostNetwork"] != true),
        selector,
        resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
    }
}

/// What is kept of a target of which only `/scale` is read: only the API server knows where such a kind keeps its replicas.
/// Replicas that are absent are zero, as in every Scale.
pub fn of_scale(key: &ObjectKey, scale: Scale) -> TargetObserved {
    let status = scale.status.unwrap_or_default();
    TargetObserved {
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        spec_replicas: scale.spec.and_then(|spec| spec.replicas).unwrap_or(0),
        // Nothing says that they have.
        pod_network: false,
        selector: status.selector.unwrap_or_default(),
        resource_version: scale.metadata.resource_version.unwrap_or_default(),
    }
}

/// How a `/scale` patch went.
#[derive(Debug, PartialEq, Eq)]
pub enum Scaled {
    /// The target has the new replicas.
    Done,
    /// Somebody else has changed the target meanwhile, so nothing was patched.
    Changed,
}

/// Scales from zero. The patch carries the resourceVersion that the caches know, so in the common case it is one
/// request; if the target has changed since, or the caches, which may be behind, have it above zero, it is read, and left alone
/// if it is.
pub async fn scale_up(api: &Api<DynamicObject>, target: &TargetObserved, replicas: i32) -> Result<Scaled, kube::Error> {
    if target.spec_replicas == 0 {
        match patch(api, &target.name, &target.resource_version, replicas).await {
            Err(kube::Error::Api(status)) if status.is_conflict() => {}
            other => return other.map(|()| Scaled::Done),
        }
    }
    let scale = api.get_scale(&target.name).await?;
    if scale.spec.and_then(|spec| spec.replicas).unwrap_or(0) > 0 {
        return Ok(Scaled::Changed);
    }
    let version = scale.metadata.resource_version.unwrap_or_default();
    patch(api, &target.name, &version, replicas).await.map(|()| Scaled::Done)
}

/// Scales to zero, if the target is still the one that was observed: the patch carries its resourceVersion, so whoever has
/// changed it since wins.
pub async fn scale_down(api: &Api<DynamicObject>, target: &TargetObserved) -> Result<Scaled, kube::Error> {
    match patch(api, &target.name, &target.resource_version, 0).await {
        Err(kube::Error::Api(status)) if status.is_conflict() => Ok(Scaled::Changed),
        other => other.map(|()| Scaled::Done),
    }
}

async fn patch(api: &Api<DynamicObject>, name: &str, version: &str, replicas: i32) -> Result<(), kube::Error> {
    let body = serde_json::json!({"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}});
    api.patch_scale(name, &PatchParams::default(), &Patch::Merge(body)).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http::Method;

    use super::*;
    use crate::testing;

    /// Keeps out B23: Rollouts without `replicas`, or with `workloadRef`, stay intercepted for ever.
    #[test]
    fn a_target_is_observed_as_the_api_means_it() {
        let object: DynamicObject = serde_json::from_value(serde_json::json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"namespace": "n", "name": "web", "resourceVersion": "7"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}},
        }))
        .unwrap();
        let target = observed(&object);
        assert_eq!(target.spec_replicas, 1, "absent spec.replicas means 1");
        assert_eq!((target.selector.as_str(), target.resource_version.as_str()), ("app=web", "7"));
    }

    #[test]
    fn pods_have_addresses_of_their_own_unless_the_template_says_otherwise_or_is_not_there() {
        for (spec, expected) in [
            (serde_json::json!({"template": {"spec": {"containers": []}}}), true),
            (serde_json::json!({"template": {"spec": {"hostNetwork": false}}}), true),
            (serde_json::json!({"template": {"spec": {"hostNetwork": true}}}), false),
            (serde_json::json!({"workloadRef": {"kind": "Deployment", "name": "web"}}), false),
        ] {
            let object = serde_json::json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": spec.clone()});
            assert_eq!(observed(&serde_json::from_value(object).unwrap()).pod_network, expected, "{spec}");
        }
    }

    #[test]
    fn kinds_are_known_under_old_and_new_spellings() {
        let kind = |api: &str, kind: &str| {
            Kind::of(&ScaleTargetRef { api_version: api.into(), kind: kind.into(), name: "x".into() })
        };
        assert_eq!(kind("apps/v1", "deployments"), Kind::Deployment);
        assert_eq!(kind("argoproj.io/v1alpha1", "rollouts"), Kind::Rollout);
        assert_eq!(kind("apps/v1", "Rollout").resource(), None, "the cluster is asked");
        let Kind::Other(core) = kind("v1", "ReplicationController") else { panic!("another kind") };
        assert_eq!(core.gvk(), GroupVersionKind::gvk("", "v1", "ReplicationController"));
        let Kind::Other(kruise) = kind("apps.kruise.io/v1beta1", "StatefulSet") else { panic!("another kind") };
        assert_eq!(kruise.gvk(), GroupVersionKind::gvk("apps.kruise.io", "v1beta1", "StatefulSet"));
    }

    /// Keeps out B23 too.
    #[test]
    fn a_rollout_without_replicas_and_with_a_reference_to_its_workload_is_observed() {
        let rollout = serde_json::json!({
            "apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "metadata": {"namespace": "n", "name": "web"},
            "spec": {"workloadRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}},
            "status": {"replicas": 1, "selector": "app=web"},
        });
        let target = observed(&serde_json::from_value(rollout).unwrap());
        assert_eq!((target.spec_replicas, target.selector.as_str()), (1, "app=web"));
    }

    #[test]
    fn of_other_kinds_the_scale_is_kept() {
        let scale = serde_json::json!({
            "metadata": {"namespace": "n", "name": "web", "resourceVersion": "7"},
            "spec": {}, "status": {"replicas": 2, "selector": "app=web"},
        });
        let target = of_scale(&ObjectKey::new("n", "web"), serde_json::from_value(scale).unwrap());
        assert_eq!(target.spec_replicas, 0);
        assert_eq!((target.selector.as_str(), target.resource_version.as_str()), ("app=web", "7"));
    }

    /// What is asked of an API server at which the target has `replicas`, by a wake for which the caches say `cached`.
    async fn requests_of_a_wake(cached: i32, replicas: i32) -> (Scaled, Vec<Method>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let scale = serde_json::json!({
            "apiVersion": "autoscaling/v1", "kind": "Scale",
            "metadata": {"namespace": "n", "name": "web", "resourceVersion": "8"}, "spec": {"replicas": replicas},
        });
        let client = testing::client(move |head, _| {
            seen.lock().unwrap().push(head.method);
            testing::answer(200, &scale)
        });
        let resource = Kind::Deployment.resource().unwrap();
        let api = Api::namespaced_with(client, "n", &resource);
        let object = serde_json::json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"namespace": "n", "name": "web", "resourceVersion": "7"}, "spec": {"replicas": cached},
        });
        let scaled = scale_up(&api, &observed(&serde_json::from_value(object).unwrap()), 1).await.unwrap();
        let asked = asked.lock().unwrap().clone();
        (scaled, asked)
    }

    /// Keeps out a lost notification: it came in the moment in which the caches had not heard yet that the target is at zero.
    #[tokio::test]
    async fn a_target_that_the_caches_have_above_zero_is_looked_at_before_its_wake_is_left_out() {
        assert_eq!(
            requests_of_a_wake(0, 0).await,
            (Scaled::Done, vec![Method::PATCH]),
            "one request in the common case"
        );
        assert_eq!(requests_of_a_wake(2, 2).await, (Scaled::Changed, vec![Method::GET]));
        assert_eq!(requests_of_a_wake(2, 0).await, (Scaled::Done, vec![Method::GET, Method::PATCH]));
    }
}
