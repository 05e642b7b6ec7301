//! Applies one action of a plan to the cluster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use elasti_api::names::{FINALIZER, private_service};
use elasti_api::v1alpha1::ElastiService;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use serde_json::json;

use super::events::event;
use super::{Controller, Decided, REPORTER, diagnosis, now};
use crate::autoscaler::{self, AutoscalerObserved, Wish};
use crate::caches::Snapshot;
use crate::observed::{ObjectKey, TargetObserved};
use crate::plan::Action;
use crate::target::{self, Scaled};
use crate::{private_service as private, slices};

/// How long one request may take: well inside the Lease, which is certain for at least 10 s after each renewal.
const DEADLINE: Duration = Duration::from_secs(5);

/// Pods that are looked at for a diagnosis: the first that tells a cause is enough.
const DIAGNOSED_PODS: u32 = 20;

/// Nothing was sent.
#[derive(Debug, thiserror::Error)]
#[error("the Lease is not certain any more; nothing is scaled down")]
struct LeaseUncertain;

/// Whether the request that failed so has changed nothing, and will not: it never left, or the API server said no.
pub(super) fn refused(error: &anyhow::Error) -> bool {
    let said_no = |error: &kube::Error| matches!(error, kube::Error::Api(status) if (400..500).contains(&status.code));
    error.is::<LeaseUncertain>() || error.downcast_ref().is_some_and(said_no)
}

impl Controller {
    pub(super) async fn apply(
        self: &Arc<Self>,
        key: &ObjectKey,
        snapshot: &Snapshot,
        under: &Decided,
        action: Action,
    ) -> anyhow::Result<()> {
        let name = name_of(&action);
        // Waiting for a turn is no missing answer.
        let _turn = match action {
            Action::ApplyPrivateService => Some(self.services.acquire().await?),
            _ => None,
        };
        let deadline = match action {
            // A scale-down that arrives after the Lease is lost could put a busy target to sleep.
            Action::ScaleDown => {
                let certain = under.leadership.valid_until.saturating_duration_since(Instant::now());
                if certain.is_zero() {
                    return Err(LeaseUncertain.into());
                }
                certain.min(DEADLINE)
            }
            _ => DEADLINE,
        };
        let done = tokio::time::timeout(deadline, self.execute(key, snapshot, under, action)).await;
        done.with_context(|| format!("{name} got no answer within {} ms", deadline.as_millis()))?
    }

    async fn execute(
        self: &Arc<Self>,
        key: &ObjectKey,
        snapshot: &Snapshot,
        under: &Decided,
        action: Action,
    ) -> anyhow::Result<()> {
        let elasti = &snapshot.elasti;
        let client = || self.parts.clients.requests.clone();
        let namespace = key.namespace.as_str();
        let apply = PatchParams::apply(REPORTER).force();
        match action {
            Action::AddFinalizer => self.finalizers(elasti, true).await?,
            Action::RemoveFinalizer => {
                let result = self.finalizers(elasti, false).await;
                self.parts.metrics.finalized(result.is_ok());
                result?;
            }
            Action::ScaleUp { replicas } => self.wake_target(key, snapshot, replicas).await?,
            Action::ScaleDown => self.scale_down(key, snapshot).await?,
            Action::AllocatePorts(ports) => {
                let owned = elasti.status.clone().unwrap_or_default().ports;
                let ports = self.ports.allocate(under.leadership.epoch, elasti, &owned, &ports).await?;
                let revision = elasti.status.as_ref().map_or(0, |status| status.revision) + 1;
                self.write_status(elasti, json!({"ports": ports, "revision": revision})).await?;
            }
            Action::WriteStatus(status) => {
                let before = elasti.status.as_ref().and_then(|status| status.mode);
                let mode = status.mode.filter(|mode| before != Some(*mode));
                let result = self.write_status(elasti, serde_json::to_value(*status)?).await;
                if let Some(mode) = mode {
                    self.parts.metrics.updated(key, mode, result.is_ok());
                }
                result?;
            }
            Action::ApplyPrivateService => {
                if let Some(public) = &snapshot.service {
                    let api: Api<Service> = Api::namespaced(client(), namespace);
                    let name = private_service(&elasti.spec.service);
                    if snapshot.private_found {
                        let alone = PatchParams { field_manager: Some(REPORTER.to_owned()), ..PatchParams::default() };
                        gone(api.patch(&name, &alone, &Patch::Merge(private::ports_alone(public))).await)?;
                    }
                    api.patch(&name, &apply, &Patch::Apply(private::object(public, elasti))).await?;
                }
            }
            Action::DeletePrivateServices(names) => {
                let api: Api<Service> = Api::namespaced(client(), namespace);
                for name in names {
                    gone(api.delete(&name, &DeleteParams::default()).await)?;
                }
            }
            Action::ApplySlice(slice) => {
                let api: Api<EndpointSlice> = Api::namespaced(client(), namespace);
                api.patch(&slice.name, &apply, &Patch::Apply(slices::object(&slice, elasti))).await?;
            }
            Action::DeleteSlices(names) => {
                let api: Api<EndpointSlice> = Api::namespaced(client(), namespace);
                for name in names {
                    gone(api.delete(&name, &DeleteParams::default()).await)?;
                }
            }
            Action::AnnotateAutoscaler { autoscaler, wish } => self.annotate(elasti, &autoscaler, wish).await?,
            Action::AskTriggers => self.ask_triggers(elasti),
            Action::Diagnose => self.diagnose(snapshot),
            Action::Event { warning, reason, message } => self.record(elasti, event(warning, &reason, message)),
        }
        Ok(())
    }

    /// An autoscaler that is gone needs no pause and no end of one.
    async fn annotate(
        &self,
        elasti: &ElastiService,
        autoscaler: &AutoscalerObserved,
        wish: Wish,
    ) -> Result<(), kube::Error> {
        let api: Api<DynamicObject> = Api::namespaced_with(
            self.parts.clients.requests.clone(),
            &autoscaler.namespace,
            &autoscaler.kind.resource(),
        );
        let uid = elasti.metadata.uid.as_deref().unwrap_or_default();
        let patch = Patch::Merge(autoscaler::patch(autoscaler, wish, uid));
        gone(api.patch(&autoscaler.name, &PatchParams::default(), &patch).await)?;
        let what = format!("{} {}", autoscaler.kind.name(), autoscaler.name);
        tracing::info!(autoscaler = %what, ?wish, "annotated");
        let (reason, message) = match wish {
            Wish::Hold => ("AutoscalerPaused", format!("{what} is paused: the target is about to sleep")),
            Wish::Resume => ("AutoscalerResumed", format!("{what} scales the target again")),
            Wish::AtZero => return Ok(()),
        };
        self.record(elasti, event(false, reason, message));
        Ok(())
    }

    async fn finalizers(&self, elasti: &ElastiService, wanted: bool) -> Result<(), kube::Error> {
        let mut finalizers = elasti.metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|finalizer| finalizer != FINALIZER);
        if wanted {
            finalizers.push(FINALIZER.to_owned());
        }
        let patch =
            json!({"metadata": {"resourceVersion": elasti.metadata.resource_version, "finalizers": finalizers}});
        let result = self.elastis(elasti).patch(&name(elasti), &PatchParams::default(), &Patch::Merge(patch)).await;
        gone(result)
    }

    async fn write_status(&self, elasti: &ElastiService, status: serde_json::Value) -> Result<(), kube::Error> {
        let patch = json!({"metadata": {"resourceVersion": elasti.metadata.resource_version}, "status": status});
        self.elastis(elasti)
            .patch_status(&name(elasti), &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(|_| ())
    }

    fn elastis(&self, elasti: &ElastiService) -> Api<ElastiService> {
        Api::namespaced(self.parts.clients.requests.clone(), elasti.metadata.namespace.as_deref().unwrap_or_default())
    }

    fn target<'a>(&self, snapshot: &'a Snapshot) -> anyhow::Result<(Api<DynamicObject>, &'a TargetObserved)> {
        let reference = &snapshot.elasti.spec.scale_target_ref;
        let target =
            snapshot.target.found().with_context(|| format!("there is no {} {}", reference.kind(), reference.name))?;
        let resource = snapshot.target_resource.as_ref();
        let resource = resource.with_context(|| format!("{} cannot be scaled", reference.kind))?;
        Ok((Api::namespaced_with(self.parts.clients.requests.clone(), &target.namespace, resource), target))
    }

    /// Wakes a target, and with it those of `spec.wakeWith`. While connections are held their own plans see to it; a wake for
    /// another reason is told nobody else.
    pub(super) async fn wake_target(&self, key: &ObjectKey, snapshot: &Snapshot, replicas: i32) -> anyhow::Result<()> {
        let scaled = self.scale_up(key, snapshot, replicas).await?;
        let uid = snapshot.elasti.metadata.uid.as_deref().unwrap_or_default();
        if scaled == Scaled::Changed || self.parts.resolvers.held_since(uid).is_some() {
            return Ok(());
        }
        for partner in self.parts.caches.woken_with(key) {
            let sleeping = self.parts.caches.snapshot(&partner).filter(|snapshot| {
                let at_zero = snapshot.target.found().is_some_and(|target| target.spec_replicas == 0);
                at_zero && snapshot.taken_by.is_none()
            });
            let Some(snapshot) = sleeping else { continue };
            let replicas = snapshot.elasti.spec.min_target_replicas.max(1);
            if let Err(error) = self.scale_up(&partner, &snapshot, replicas).await {
                let error = format!("{error:#}");
                tracing::warn!(elastiservice = %partner, with = %key, error, "cannot be woken; its first connection will");
            }
        }
        Ok(())
    }

    async fn scale_up(&self, key: &ObjectKey, snapshot: &Snapshot, replicas: i32) -> anyhow::Result<Scaled> {
        let (api, target) = self.target(snapshot)?;
        let uid = snapshot.elasti.metadata.uid.as_deref().unwrap_or_default();
        // Asked for before the patch: once the target starts, the connections may be held no more.
        let held_since = self.parts.resolvers.held_since(uid);
        let elapsed = || held_since.map(|since| since.elapsed());
        let sent = elapsed();
        let result = target::scale_up(&api, target, replicas).await;
        self.count_scaled(key, snapshot, "up", &result);
        let scaled = result?;
        if scaled == Scaled::Done {
            // One that is gone is not remembered anew.
            if let Some(memory) = self.state().memories.get_mut(uid) {
                memory.woken(now());
            }
            let after = elapsed();
            if let (Some(sent), Some(after)) = (sent, after) {
                self.parts.metrics.woken(sent, after);
            }
            let millis = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
            let (sent_ms, after_ms) = (sent.map(millis), after.map(millis));
            tracing::info!(elastiservice = %key, target = %target.name, replicas, sent_ms, after_ms, "woken");
            let event = event(false, "ScaledUp", format!("scaled {} from 0 to {replicas}", target.name));
            self.record(&snapshot.elasti, event);
        }
        Ok(scaled)
    }

    fn count_scaled(
        &self,
        key: &ObjectKey,
        snapshot: &Snapshot,
        direction: &'static str,
        result: &Result<Scaled, kube::Error>,
    ) {
        if matches!(result, Ok(Scaled::Changed)) {
            return;
        }
        let spec = &snapshot.elasti.spec;
        let target = format!("{}-{}", spec.scale_target_ref.kind(), spec.scale_target_ref.name);
        self.parts.metrics.scaled(key, &spec.service, &target, direction, result.is_ok());
    }

    async fn scale_down(&self, key: &ObjectKey, snapshot: &Snapshot) -> anyhow::Result<()> {
        let (api, target) = self.target(snapshot)?;
        let result = target::scale_down(&api, target).await;
        self.count_scaled(key, snapshot, "down", &result);
        if result? == Scaled::Done {
            tracing::info!(elastiservice = %key, target = %target.name, "put to sleep");
            self.record(
                &snapshot.elasti,
                event(false, "ScaledDown", format!("scaled {} to 0: it is idle", target.name)),
            );
        }
        Ok(())
    }

    fn ask_triggers(self: &Arc<Self>, elasti: &Arc<ElastiService>) {
        let uid = elasti.metadata.uid.clone().unwrap_or_default();
        if !self.state().asking.insert(uid.clone()) {
            return;
        }
        let (this, elasti) = (self.clone(), elasti.clone());
        self.parts.tasks.spawn(async move {
            let asked = Instant::now();
            let namespace = elasti.metadata.namespace.clone().unwrap_or_default();
            let verdict = this.parts.triggers.ask(&namespace, &elasti.spec).await;
            this.answered(elasti, asked, verdict);
        });
    }

    fn diagnose(self: &Arc<Self>, snapshot: &Snapshot) {
        let uid = snapshot.elasti.metadata.uid.clone().unwrap_or_default();
        let Some(target) = snapshot.target.found().filter(|target| !target.selector.is_empty()).cloned() else {
            return;
        };
        if !self.state().diagnosing.insert(uid.clone()) {
            return;
        }
        let (this, elasti) = (self.clone(), snapshot.elasti.clone());
        self.parts.tasks.spawn(async move {
            let api: Api<Pod> = Api::namespaced(this.parts.clients.requests.clone(), &target.namespace);
            // What the API server has in memory is new enough.
            let parameters = ListParams::default().labels(&target.selector).limit(DIAGNOSED_PODS).match_any();
            let pods = api.list(&parameters).await;
            let changed = {
                let mut state = this.state();
                state.diagnosing.remove(&uid);
                let pods = match pods {
                    Ok(pods) => pods,
                    Err(error) => {
                        let name = &target.name;
                        tracing::warn!(target = %name, %error, "its pods cannot be asked why it is not ready; let the operator list pods");
                        return;
                    }
                };
                let diagnosis = diagnosis::diagnose(&target.name, &pods.items);
                let before = state.diagnoses.insert(uid.clone(), diagnosis.clone());
                before.is_none_or(|before| before.reason != diagnosis.reason).then_some(diagnosis)
            };
            if let Some(diagnosis) = changed {
                this.record(&elasti, event(true, &diagnosis.reason, diagnosis.message));
                this.look_at(&uid);
            }
        });
    }
}

fn name_of(action: &Action) -> &'static str {
    match action {
        Action::AddFinalizer => "AddFinalizer",
        Action::RemoveFinalizer => "RemoveFinalizer",
        Action::ScaleUp { .. } => "ScaleUp",
        Action::ScaleDown => "ScaleDown",
        Action::AllocatePorts(_) => "AllocatePorts",
        Action::WriteStatus(_) => "WriteStatus",
        Action::ApplyPrivateService => "ApplyPrivateService",
        Action::DeletePrivateServices(_) => "DeletePrivateServices",
        Action::ApplySlice(_) => "ApplySlice",
        Action::DeleteSlices(_) => "DeleteSlices",
        Action::AnnotateAutoscaler { .. } => "AnnotateAutoscaler",
        Action::AskTriggers => "AskTriggers",
        Action::Diagnose => "Diagnose",
        Action::Event { .. } => "Event",
    }
}

fn name(elasti: &ElastiService) -> String {
    elasti.metadata.name.clone().unwrap_or_default()
}

/// What is gone already need not be deleted.
fn gone<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        other => other.map(|_| ()),
    }
}
