//! Autoscalers above zero: what is kept of a KEDA `ScaledObject` or a `HorizontalPodAutoscaler`, and how KEDA is paused.
//!
//! Pure. A `HorizontalPodAutoscaler` with `minReplicas` of at least 1 does nothing to a target at zero (its condition
//! `ScalingActive` is false, reason `ScalingDisabled`) and takes over above it, and its writes to `/scale` carry a
//! resourceVersion, so it needs no pause. KEDA scales a target at zero up to its minimum, so it is paused first. The
//! pause is KubeElasti's two annotations and one of our own, by which it is told from a pause that a user has set.

use elasti_api::v1alpha1::AutoscalerRef;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

/// KEDA: "true" stops the scaling of a `ScaledObject` at the replicas that its target has.
pub const PAUSED: &str = "autoscaling.keda.sh/paused";

/// KEDA: the replicas at which it keeps the target of a paused `ScaledObject`.
pub const PAUSED_REPLICAS: &str = "autoscaling.keda.sh/paused-replicas";

/// UID of the ElastiService that has paused the `ScaledObject`.
pub const PAUSED_BY: &str = "elasti.truefoundry.com/paused-by";

/// A kind of autoscaler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `keda.sh/v1alpha1 ScaledObject`.
    ScaledObject,
    /// `autoscaling/v2 HorizontalPodAutoscaler`.
    HorizontalPodAutoscaler,
}

impl Kind {
    /// The kind that a reference names; `None` when we know no such kind.
    pub fn of(reference: &AutoscalerRef) -> Option<Self> {
        match reference.type_.as_str() {
            "keda" => Some(Self::ScaledObject),
            "hpa" => Some(Self::HorizontalPodAutoscaler),
            _ => None,
        }
    }

    /// The name of the kind.
    pub fn name(self) -> &'static str {
        match self {
            Self::ScaledObject => "ScaledObject",
            Self::HorizontalPodAutoscaler => "HorizontalPodAutoscaler",
        }
    }

    /// The field that holds the fewest replicas that it leaves.
    pub fn minimum_field(self) -> &'static str {
        match self {
            Self::ScaledObject => "minReplicaCount",
            Self::HorizontalPodAutoscaler => "minReplicas",
        }
    }

    /// The API resource.
    pub fn resource(self) -> ApiResource {
        let (group, version, plural) = match self {
            Self::ScaledObject => ("keda.sh", "v1alpha1", "scaledobjects"),
            Self::HorizontalPodAutoscaler => ("autoscaling", "v2", "horizontalpodautoscalers"),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, self.name()), plural)
    }
}

/// Whether KEDA is kept from scaling, and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Pause {
    /// It scales.
    #[default]
    None,
    /// By an ElastiService.
    Ours {
        /// UID of the ElastiService.
        by: String,
        /// Whether KEDA keeps the target at zero; else at the replicas that it has.
        at_zero: bool,
    },
    /// By exactly the annotations of KubeElasti: its own pause, left behind, or that of a user who imitates it.
    KubeElasti,
    /// By a user: never changed.
    User {
        /// The replicas at which KEDA keeps the target; absent: those that it has.
        replicas: Option<i32>,
    },
}

/// An autoscaler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AutoscalerObserved {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its resourceVersion: a patch that carries it changes nothing that somebody else has changed since.
    pub resource_version: String,
    /// The fewest replicas that it leaves.
    pub min_replicas: i32,
    /// Whether it is paused; always [`Pause::None`] for a `HorizontalPodAutoscaler`.
    pub pause: Pause,
}

/// What is known of the autoscaler that an ElastiService names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AutoscalerState {
    /// It names none.
    #[default]
    Unnamed,
    /// It is there.
    Found(AutoscalerObserved),
    /// The API server knows no such object.
    Missing,
    /// Its kind cannot be read, and why.
    Unread(String),
}

impl AutoscalerState {
    /// The autoscaler, if it is there.
    pub fn found(&self) -> Option<&AutoscalerObserved> {
        match self {
            Self::Found(autoscaler) => Some(autoscaler),
            Self::Unnamed | Self::Missing | Self::Unread(_) => None,
        }
    }
}

/// What is kept of an autoscaler. Absent minima are those that the APIs document: 0 for KEDA, whose `idleReplicaCount` goes
/// below its minimum, and 1 for a `HorizontalPodAutoscaler`.
pub fn observed(kind: Kind, object: &DynamicObject) -> AutoscalerObserved {
    let count = |field: &str| object.data["spec"][field].as_i64().map(|count| i32::try_from(count).unwrap_or(i32::MAX));
    let min_replicas = match kind {
        Kind::ScaledObject => count("idleReplicaCount").or_else(|| count("minReplicaCount")).unwrap_or(0),
        Kind::HorizontalPodAutoscaler => count("minReplicas").unwrap_or(1),
    };
    AutoscalerObserved {
        kind,
        namespace: object.metadata.namespace.clone().unwrap_or_default(),
        name: object.metadata.name.clone().unwrap_or_default(),
        resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
        min_replicas,
        pause: match kind {
            Kind::ScaledObject => pause(object),
            Kind::HorizontalPodAutoscaler => Pause::None,
        },
    }
}

/// As KEDA reads its annotations: `paused-replicas` pauses whatever `paused` says.
fn pause(object: &DynamicObject) -> Pause {
    let annotation =
        |name: &str| object.metadata.annotations.as_ref().and_then(|all| all.get(name)).map(String::as_str);
    let (paused, replicas) = (annotation(PAUSED) == Some("true"), annotation(PAUSED_REPLICAS));
    if !paused && replicas.is_none() {
        return Pause::None;
    }
    match (paused, replicas, annotation(PAUSED_BY)) {
        (true, None | Some("0"), Some(by)) => Pause::Ours { by: by.to_owned(), at_zero: replicas.is_some() },
        (true, Some("0"), None) => Pause::KubeElasti,
        _ => Pause::User { replicas: replicas.and_then(|replicas| replicas.trim().parse().ok()) },
    }
}

/// What shall become of KEDA's pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Paused at the replicas that the target has: before it is scaled down.
    Hold,
    /// Paused at zero: the target sleeps.
    AtZero,
    /// KEDA scales again: the target is awake.
    Resume,
}

/// The merge patch that fulfils a wish of the ElastiService with this UID, if the autoscaler is still the one observed.
pub fn patch(autoscaler: &AutoscalerObserved, wish: Wish, uid: &str) -> Value {
    let annotations = match wish {
        Wish::Hold => json!({PAUSED: "true", PAUSED_BY: uid}),
        Wish::AtZero => json!({PAUSED: "true", PAUSED_REPLICAS: "0", PAUSED_BY: uid}),
        Wish::Resume => json!({PAUSED: "false", PAUSED_REPLICAS: null, PAUSED_BY: null}),
    };
    json!({"metadata": {"resourceVersion": autoscaler.resource_version, "annotations": annotations}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaled_object(annotations: &Value, spec: &Value) -> AutoscalerObserved {
        let object = json!({
            "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject",
            "metadata": {"namespace": "shop", "name": "web", "annotations": annotations}, "spec": spec,
        });
        observed(Kind::ScaledObject, &serde_json::from_value(object).unwrap())
    }

    #[test]
    fn a_pause_is_told_from_that_of_a_user() {
        let ours = |at_zero| Pause::Ours { by: "u".into(), at_zero };
        for (annotations, expected) in [
            (json!({}), Pause::None),
            (json!({PAUSED: "false"}), Pause::None),
            (json!({PAUSED: "false", PAUSED_BY: "u"}), Pause::None),
            (json!({PAUSED: "true", PAUSED_BY: "u"}), ours(false)),
            (json!({PAUSED: "true", PAUSED_REPLICAS: "0", PAUSED_BY: "u"}), ours(true)),
            (json!({PAUSED: "true", PAUSED_REPLICAS: "0"}), Pause::KubeElasti),
            (json!({PAUSED: "true"}), Pause::User { replicas: None }),
            (json!({PAUSED_REPLICAS: "0"}), Pause::User { replicas: Some(0) }),
            (json!({PAUSED: "true", PAUSED_REPLICAS: "3", PAUSED_BY: "u"}), Pause::User { replicas: Some(3) }),
            (json!({PAUSED_REPLICAS: "many"}), Pause::User { replicas: None }),
        ] {
            assert_eq!(scaled_object(&annotations, &json!({})).pause, expected, "{annotations}");
        }
    }

    #[test]
    fn minima_are_those_that_the_apis_document() {
        for (spec, expected) in [
            (json!({}), 0),
            (json!({"minReplicaCount": 2}), 2),
            (json!({"minReplicaCount": 2, "idleReplicaCount": 0}), 0),
        ] {
            assert_eq!(scaled_object(&json!({}), &spec).min_replicas, expected, "{spec}");
        }
        for (spec, expected) in [(json!({}), 1), (json!({"minReplicas": 0}), 0)] {
            let object = json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "web"}, "spec": spec});
            let observed = observed(Kind::HorizontalPodAutoscaler, &serde_json::from_value(object).unwrap());
            assert_eq!(observed.min_replicas, expected);
        }
    }
}
