//! The autoscaler of a target: KEDA is paused before its target is put to sleep, and scales again once it is awake.
//!
//! Invariants: nothing is put to sleep before KEDA's pause has been read back; a pause that a user has set is never
//! changed; a pause of ours goes when the target is above zero without a scale-down in progress, and with the
//! ElastiService.

use elasti_api::v1alpha1::AutoscalerRef;

use super::{Action, Planner};
use crate::autoscaler::{AutoscalerObserved, AutoscalerState, Kind, Pause, Wish};

impl Planner<'_> {
    /// Whether nothing but us will change the target's replicas on its way down; if not yet, asks for it.
    pub(super) fn autoscaler_holds_still(&mut self) -> bool {
        match &self.observed.autoscaler {
            AutoscalerState::Found(autoscaler) if autoscaler.kind == Kind::ScaledObject => match &autoscaler.pause {
                Pause::None => {
                    self.annotate(autoscaler.clone(), Wish::Hold);
                    false
                }
                Pause::User { .. } | Pause::KubeElasti => true,
                Pause::Ours { by, .. } => by == self.observed.uid(),
            },
            // KubeElasti ignores whatever stands under `hpa`, and a HorizontalPodAutoscaler stops by itself at zero.
            _ => true,
        }
    }

    /// Whether the autoscaler, or what is known of it, forbids sleep.
    pub(super) fn autoscaler_forbids_sleep(&self) -> bool {
        let named = self.observed.elasti.spec.autoscaler.as_ref();
        fault(&self.observed.autoscaler, named).is_some_and(|(forbids, ..)| forbids)
    }

    /// Keeps pauses of ours as the target's scale asks for.
    pub(super) fn keep_autoscaler(&mut self) {
        for stale in &self.observed.stale_pauses {
            self.annotate(stale.clone(), Wish::Resume);
        }
        let Some(autoscaler) = self.observed.autoscaler.found() else { return };
        let Some(target) = self.observed.target.found() else { return };
        let (at_zero, descends) = (target.spec_replicas == 0, self.memory.descent.is_some());
        let wish = match &autoscaler.pause {
            Pause::Ours { by, .. } if by != self.observed.uid() => return,
            Pause::Ours { at_zero: false, .. } if at_zero => Wish::AtZero,
            Pause::Ours { .. } if !at_zero && !descends => Wish::Resume,
            Pause::KubeElasti if self.inherits_pause() && at_zero => Wish::AtZero,
            // Woken before this was seen.
            Pause::KubeElasti if self.inherits_pause() => Wish::Resume,
            _ => return,
        };
        self.annotate(autoscaler.clone(), wish);
    }

    /// Whether KEDA is paused at zero and KubeElasti may have left that behind: only before our first word about this
    /// ElastiService, which waits until the pause is ours or gone.
    pub(super) fn inherits_pause(&self) -> bool {
        let found = self.observed.autoscaler.found();
        self.status().observed_generation.is_none()
            && found.is_some_and(|autoscaler| autoscaler.pause == Pause::KubeElasti)
    }

    /// Lets KEDA scale again, if it was us who paused it.
    pub(super) fn release_autoscaler(&mut self) {
        let uid = self.observed.uid();
        let own = self.observed.autoscaler.found().filter(|autoscaler| match &autoscaler.pause {
            Pause::Ours { by, .. } => by == uid,
            Pause::KubeElasti => self.inherits_pause(),
            Pause::None | Pause::User { .. } => false,
        });
        for autoscaler in own.into_iter().chain(&self.observed.stale_pauses) {
            self.annotate(autoscaler.clone(), Wish::Resume);
        }
    }

    fn annotate(&mut self, autoscaler: AutoscalerObserved, wish: Wish) {
        self.actions.push(Action::AnnotateAutoscaler { autoscaler: Box::new(autoscaler), wish });
    }
}

/// What is wrong with the autoscaler that an ElastiService names: whether it forbids sleep, a word, and a sentence with
/// cause and cure. `named` is what `spec.autoscaler` names.
pub(crate) fn fault(state: &AutoscalerState, named: Option<&AutoscalerRef>) -> Option<(bool, &'static str, String)> {
    const AWAKE: &str = "the target is not put to sleep meanwhile";
    let name = named.map(|named| named.name.as_str()).unwrap_or_default();
    match (state, named.and_then(Kind::of)) {
        (AutoscalerState::Missing, Some(Kind::ScaledObject)) => Some((
            true,
            "AutoscalerNotFound",
            format!("there is no ScaledObject {name}; create it or correct spec.autoscaler; {AWAKE}"),
        )),
        (AutoscalerState::Unread(why), Some(Kind::ScaledObject)) => {
            Some((true, "AutoscalerNotFound", format!("{why}; {AWAKE}")))
        }
        (
            AutoscalerState::Found(AutoscalerObserved {
                name, pause: Pause::User { replicas: Some(replicas) }, ..
            }),
            _,
        ) if *replicas > 0 => Some((
            true,
            "AutoscalerPaused",
            format!(
                "ScaledObject {name} is paused at {replicas} replicas, which KEDA would restore; remove the annotation {}; {AWAKE}",
                crate::autoscaler::PAUSED_REPLICAS
            ),
        )),
        (AutoscalerState::Found(autoscaler), _) if autoscaler.min_replicas == 0 && autoscaler.pause == Pause::None => {
            let (kind, name, field) = (autoscaler.kind.name(), &autoscaler.name, autoscaler.kind.minimum_field());
            Some((
                false,
                "AutoscalerScalesToZero",
                format!(
                    "{kind} {name} may scale the target to zero by itself, before connections are intercepted and while they are served; set its {field} to 1 or more and let triggers of the ElastiService decide"
                ),
            ))
        }
        _ => None,
    }
}
