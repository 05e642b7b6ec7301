//! Why a target is not ready, as its pods tell it. Pure.

use k8s_openapi::api::core::v1::Pod;

use crate::observed::Diagnosis;

/// Waiting reasons of a container that starts as it should.
const STARTING: [&str; 2] = ["ContainerCreating", "PodInitializing"];

/// The first cause that a pod tells.
pub(super) fn diagnose(target: &str, pods: &[Pod]) -> Diagnosis {
    let told = |reason: &str, message: String| Diagnosis { reason: reason.to_owned(), message };
    if pods.is_empty() {
        let message = format!(
            "{target} has no pod yet; look at the events of its ReplicaSet for a quota or an admission that refuses it"
        );
        return told("NoPod", message);
    }
    pods.iter().find_map(container_fault).or_else(|| pods.iter().find_map(unscheduled)).unwrap_or_else(|| {
        let name = pods[0].metadata.name.clone().unwrap_or_default();
        told(
            "NotReady",
            format!("pod {name} has started and is not ready yet; look at its readiness probe and its log"),
        )
    })
}

fn container_fault(pod: &Pod) -> Option<Diagnosis> {
    let status = pod.status.as_ref()?;
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    for container in containers {
        let Some(waiting) = container.state.as_ref().and_then(|state| state.waiting.as_ref()) else { continue };
        let reason = waiting.reason.clone().unwrap_or_default();
        if reason.is_empty() || STARTING.contains(&reason.as_str()) {
            continue;
        }
        let pod = pod.metadata.name.clone().unwrap_or_default();
        let detail = waiting.message.clone().unwrap_or_default();
        let message =
            format!("container {} of pod {pod} (image {}) does not start: {detail}", container.name, container.image);
        return Some(Diagnosis { reason, message });
    }
    None
}

fn unscheduled(pod: &Pod) -> Option<Diagnosis> {
    let condition =
        pod.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == "PodScheduled")?;
    (condition.status == "False").then(|| Diagnosis {
        reason: condition.reason.clone().unwrap_or_else(|| "Unschedulable".to_owned()),
        message: format!(
            "pod {} finds no node: {}",
            pod.metadata.name.clone().unwrap_or_default(),
            condition.message.clone().unwrap_or_default()
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: &serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "web-1"}, "status": status})).unwrap()
    }

    #[test]
    fn the_cause_is_named() {
        let pull = pod(&serde_json::json!({"containerStatuses": [{
            "name": "c", "image": "nowhere/x", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ErrImagePull", "message": "no such host"}},
        }]}));
        let diagnosis = diagnose("web", &[pull]);
        assert_eq!(diagnosis.reason, "ErrImagePull");
        assert!(diagnosis.message.contains("nowhere/x") && diagnosis.message.contains("no such host"));

        let pending = pod(&serde_json::json!({"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes are available"},
        ]}));
        assert_eq!(diagnose("web", &[pending]).reason, "Unschedulable");
        assert_eq!(diagnose("web", &[]).reason, "NoPod");
        assert_eq!(diagnose("web", &[pod(&serde_json::json!({}))]).reason, "NotReady");
    }
}
