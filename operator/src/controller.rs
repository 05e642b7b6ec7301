//! The controller: observes one ElastiService, has [`crate::plan`] decide, and applies what it says.
//!
//! Runs on every replica; what only the Lease holder may do, the plan gives to nobody else. Nothing here decides anything.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elasti_api::v1alpha1::ElastiService;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

use crate::caches::{Caches, Concerned, Snapshot, watch::Concern};
use crate::clients::Clients;
use crate::elastiserver::{Wake, WakeAnswer};
use crate::idleness::{Triggers, ask_the_same, traffic};
use crate::leader::LeaderState;
use crate::metrics::{Metrics, Watched};
use crate::observed::{Diagnosis, ObjectKey, Observed, TriggersObserved, Verdict};
use crate::plan::{Action, Memory, Now, Plan, Publish, Settings, plan};
use crate::pods::{Pods, Selected};
use crate::publication::Publication;
use crate::resolvers::Resolvers;
use crate::scope::Scope;
use crate::sources::{self, Sources};
use crate::work::{Next, Round, Work};
use events::Events;
use port_book::PortBook;

mod apply;
mod diagnosis;
mod events;
mod port_book;

/// Who speaks in events and field managers.
const REPORTER: &str = "elasti-operator";

/// Services that are made at once. For each of them the API server goes over all addresses in use (ipallocator of Kubernetes
/// 1.34): beside 10,000 others, many at once would only time out and be made again.
const SERVICES: usize = 4;

/// What the controller works with.
pub struct Parts {
    /// Name of this replica's pod.
    pub replica: String,
    /// Kubernetes.
    pub clients: Clients,
    /// The namespaces that are looked after.
    pub scope: Scope,
    /// The cluster as seen.
    pub caches: Arc<Caches>,
    /// The resolvers as heard.
    pub resolvers: Resolvers,
    /// What resolvers are told.
    pub publication: Arc<Publication>,
    /// Whether this replica holds the Lease.
    pub leadership: watch::Receiver<LeaderState>,
    /// What asks triggers.
    pub triggers: Triggers,
    /// What the operator is set to.
    pub settings: Settings,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Background work that a shutdown waits for.
    pub tasks: TaskTracker,
}

/// The controller.
pub struct Controller {
    parts: Parts,
    events: Arc<Events>,
    /// Turns of Services that are made.
    services: Semaphore,
    ports: PortBook,
    pods: Pods,
    sources: Sources,
    /// Set once every cache has its first list: half-filled caches decide nothing.
    complete: watch::Sender<bool>,
    state: Mutex<State>,
    work: std::sync::OnceLock<Arc<Work<Self>>>,
}

#[derive(Default)]
struct State {
    /// What is remembered of each ElastiService, by UID.
    memories: HashMap<String, Memory>,
    answers: HashMap<String, Answer>,
    diagnoses: HashMap<String, Diagnosis>,
    /// UIDs whose triggers or pods are being asked.
    asking: HashSet<String>,
    diagnosing: HashSet<String>,
}

impl Controller {
    /// A controller that does nothing until [`Controller::start`].
    pub fn new(parts: Parts) -> Arc<Self> {
        let port_book = PortBook::new(&parts.clients.requests, &parts.scope);
        let events = Arc::new(Events::new(parts.clients.requests.clone(), parts.replica.clone()));
        Arc::new(Self {
            parts,
            events,
            services: Semaphore::new(SERVICES),
            ports: port_book,
            pods: Pods::default(),
            sources: Sources::default(),
            complete: watch::Sender::new(false),
            state: Mutex::default(),
            work: std::sync::OnceLock::new(),
        })
    }

    /// Takes the queue that pokes it.
    pub fn attach(&self, work: Arc<Work<Self>>) {
        // Attached once, at start.
        let _first = self.work.set(work);
    }

    /// The caches are complete: resolvers may be told, and from now on ElastiServices are looked at.
    pub fn start(&self) {
        for key in self.parts.caches.elastis() {
            if let Some(snapshot) = self.parts.caches.snapshot(&key) {
                let uid = snapshot.elasti.metadata.uid.clone().unwrap_or_default();
                let (decided, _) = self.decide(&snapshot, &uid);
                self.tell(&uid, decided.publish);
            }
        }
        // Only now: a snapshot that lacks an ElastiService would make resolvers forget it.
        self.parts.publication.set_synced();
        self.parts.resolvers.open();
        self.complete.send_replace(true);
        self.look_at_all();
    }

    fn tell(&self, uid: &str, publish: Publish) {
        match publish {
            Publish::State(state) => self.parts.publication.publish(*state),
            Publish::Remove => self.parts.publication.remove(uid),
            Publish::Keep => {}
        }
    }

    /// Has every ElastiService looked at; says how many there are.
    pub fn look_at_all(&self) -> usize {
        let all: Concerned = self.parts.caches.elastis().into_iter().collect();
        let count = all.len();
        self.look(all);
        count
    }

    /// Has the ElastiService with this UID looked at.
    pub fn look_at(&self, uid: &str) {
        self.look(self.parts.caches.by_uid(uid).into_iter().collect());
    }

    /// Has the ElastiService with this UID looked at, and all that are woken with it.
    pub fn look_at_all_woken_with(&self, uid: &str) {
        let Some(key) = self.parts.caches.by_uid(uid) else { return };
        let mut concerned = self.parts.caches.woken_with(&key);
        concerned.insert(key);
        self.look(concerned);
    }

    /// Whether connections are held for an ElastiService that this one is to be woken with.
    fn partner_waits(&self, elasti: &ElastiService) -> bool {
        let metadata = &elasti.metadata;
        let key =
            ObjectKey::new(metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default());
        let wakers = self.parts.caches.wakers(&key);
        wakers.iter().any(|uid| self.parts.resolvers.held_since(uid).is_some())
    }

    fn follow_pods(self: &Arc<Self>, key: &ObjectKey, snapshot: &Snapshot, uid: &str, follow: bool) {
        let labels = snapshot.service.as_ref().filter(|_| follow).map(|service| service.selector.clone());
        let selected = labels.map(|labels| Selected { namespace: key.namespace.clone(), labels });
        // Weak: a watch keeps nothing alive.
        let (this, of) = (Arc::downgrade(self), uid.to_owned());
        self.pods.follow(&self.parts.clients.watches, uid, selected, move || {
            if let Some(this) = this.upgrade() {
                this.look_at(&of);
            }
        });
    }

    /// Follows the pods that the trigger `traffic` ignores.
    fn follow_sources(self: &Arc<Self>, key: &ObjectKey, snapshot: &Snapshot, uid: &str) {
        let trigger = traffic::trigger(&snapshot.elasti.spec);
        let own = |selected: sources::Selected| match selected.namespace.as_str() {
            "" => sources::Selected { namespace: key.namespace.clone(), ..selected },
            _ => selected,
        };
        let selected = trigger.map(|trigger| trigger.ignored_pods.into_iter().map(own).collect()).unwrap_or_default();
        let this = Arc::downgrade(self);
        self.sources.follow(&self.parts.clients.watches, uid, selected, move |uid| {
            if let Some(this) = this.upgrade() {
                this.look_at(uid);
            }
        });
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change of the state is one insertion or removal, so a poisoned lock still guards a sound one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leads(&self) -> LeaderState {
        *self.parts.leadership.borrow()
    }

    fn decide(&self, snapshot: &Snapshot, uid: &str) -> (Plan, Decided) {
        let leadership = self.leads();
        let now = now();
        let mut state = self.state();
        let observed = Observed {
            elasti: &snapshot.elasti,
            taken_by: snapshot.taken_by.clone(),
            shared_with: snapshot.shared_with.clone(),
            service: snapshot.service.clone(),
            private: snapshot.private.clone(),
            target: snapshot.target.clone(),
            autoscaler: snapshot.autoscaler.clone(),
            stale_pauses: snapshot.stale_pauses.clone(),
            backends: snapshot.backends.clone(),
            draining: snapshot.draining.clone(),
            pods: self.pods.of(uid),
            endpoints: snapshot.endpoints.clone(),
            ignored_pods: self.sources.addresses(uid),
            source_faults: self.sources.faults(uid),
            slices: snapshot.slices.clone(),
            stale_private: snapshot.stale_private.clone(),
            resolvers: self.parts.resolvers.observed(uid),
            arrivals: self.parts.resolvers.arrivals(),
            triggers: state.answers.get(uid).and_then(|answer| answer.to(&snapshot.elasti)).cloned(),
            diagnosis: state.diagnoses.get(uid).cloned(),
            partners: snapshot.partners.clone(),
            partner_waits: self.partner_waits(&snapshot.elasti),
            leading_since: leadership.leader.then_some(leadership.since),
            holder_silent: leadership.holder_silent,
        };
        let memory = state.memories.get(uid).cloned().unwrap_or_default();
        let decided = plan(&observed, &memory, &self.parts.settings, now);
        state.memories.insert(uid.to_owned(), decided.memory.clone());
        if observed.target_ready() {
            state.diagnoses.remove(uid);
        }
        (decided, Decided { leadership })
    }
}

/// What a plan was decided under.
struct Decided {
    leadership: LeaderState,
}

impl Round for Controller {
    async fn round(self: Arc<Self>, key: ObjectKey) -> anyhow::Result<Next> {
        if !*self.complete.borrow() {
            return Ok(Next::Wait);
        }
        let Some(snapshot) = self.parts.caches.snapshot(&key) else { return Ok(Next::Gone) };
        let uid = snapshot.elasti.metadata.uid.clone().unwrap_or_default();
        let timer = self.parts.metrics.reconcile_timer();
        self.follow_sources(&key, &snapshot, &uid);
        let (decided, under) = self.decide(&snapshot, &uid);
        self.tell(&uid, decided.publish);
        let follow_pods = || self.follow_pods(&key, &snapshot, &uid, decided.follow_pods);
        // Of a target that is woken now there is no pod yet, and looking for one would only delay the patch.
        let wakes = decided.actions.iter().any(|action| matches!(action, Action::ScaleUp { .. }));
        if !wakes {
            follow_pods();
        }
        self.parts.metrics.mode(&key, snapshot.elasti.status.as_ref().and_then(|status| status.mode));
        let at_zero = snapshot.target.found().is_some_and(|target| target.spec_replicas == 0);
        let replicas = u32::try_from(snapshot.elasti.spec.min_target_replicas.max(1)).unwrap_or(1);
        self.parts.metrics.at_zero(&key, at_zero.then_some(replicas));
        let (mut failed, mut status_passed) = (None, false);
        for action in decided.actions {
            let scales_down = action == Action::ScaleDown;
            if failed.is_some() && action.needs_all_before() || status_passed && action.tells_status() {
                if scales_down {
                    self.will_not_scale_down(&uid);
                }
                continue;
            }
            let allocates_ports = matches!(action, Action::AllocatePorts(_));
            let writes_status = matches!(action, Action::WriteStatus(_));
            // One step that the API server refuses, such as a Service beyond a quota, keeps no other from being taken.
            let scales_up = matches!(action, Action::ScaleUp { .. });
            let applied = self.apply(&key, &snapshot, &under, action).await;
            if scales_up {
                follow_pods();
            }
            // It is not the status any more that the rest was planned with; the watch brings the new one.
            status_passed |= if applied.is_ok() { allocates_ports } else { writes_status };
            if let Err(error) = applied {
                if scales_down && apply::refused(&error) {
                    self.will_not_scale_down(&uid);
                }
                failed = Some(worse(failed, error));
            }
        }
        match failed {
            None => Ok(decided.again.map_or(Next::Wait, Next::After)),
            // Somebody else was faster; what they have done arrives by the watch.
            Some(error) if conflict(&error) => Ok(Next::After(Duration::from_millis(100))),
            Some(error) => {
                timer.failed();
                Err(error)
            }
        }
    }

    fn urgent(&self, key: &ObjectKey) -> bool {
        let uid = self.parts.caches.uid(key);
        uid.is_some_and(|uid| self.parts.resolvers.held_since(&uid).is_some())
    }
}

fn now() -> Now {
    Now { instant: Instant::now(), timestamp: jiff::Timestamp::now() }
}

/// Of two errors the one that is told and waited for: the first that is no conflict.
fn worse(before: Option<anyhow::Error>, error: anyhow::Error) -> anyhow::Error {
    match before {
        Some(before) if !conflict(&before) || conflict(&error) => before,
        _ => error,
    }
}

fn conflict(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if status.is_conflict())
}

impl Concern for Controller {
    fn look(&self, concerned: Concerned) {
        if let Some(work) = self.work.get() {
            for key in &concerned {
                work.poke(key);
            }
        }
    }

    fn watched(&self, kind: &str, what: Watched) {
        self.parts.metrics.watched(kind, what);
    }

    fn forget(&self, key: &ObjectKey, uid: &str) {
        self.parts.metrics.forget(key);
        self.parts.publication.remove(uid);
        if self.leads().leader {
            self.ports.release(uid);
        }
        self.pods.forget(uid);
        self.sources.forget(uid);
        let mut state = self.state();
        state.memories.remove(uid);
        state.answers.remove(uid);
        state.diagnoses.remove(uid);
    }
}

impl Wake for Arc<Controller> {
    fn wake(&self, namespace: &str, service: &str) -> BoxFuture<'static, WakeAnswer> {
        let (this, service) = (self.clone(), ObjectKey::new(namespace, service));
        async move {
            let caches = &this.parts.caches;
            let Some(key) = caches.owner_of(&service) else { return WakeAnswer::Unknown };
            let Some(snapshot) = caches.snapshot(&key) else { return WakeAnswer::Unknown };
            let replicas = snapshot.elasti.spec.min_target_replicas.max(1);
            match this.wake_target(&key, &snapshot, replicas).await {
                Ok(()) => WakeAnswer::Accepted,
                Err(error) => WakeAnswer::Failed(format!("{error:#}")),
            }
        }
        .boxed()
    }

    fn elasti_services(&self) -> Vec<Arc<ElastiService>> {
        self.parts.caches.elasti_services()
    }
}

/// What triggers have said, and whose they are.
struct Answer {
    /// As they were when they were asked.
    of: Arc<ElastiService>,
    said: TriggersObserved,
}

impl Answer {
    /// The answer, if it is one to what this ElastiService asks.
    fn to(&self, elasti: &Arc<ElastiService>) -> Option<&TriggersObserved> {
        let same = Arc::ptr_eq(&self.of, elasti) || ask_the_same(&self.of.spec, &elasti.spec);
        same.then_some(&self.said)
    }
}

impl Controller {
    /// Takes the triggers' answer.
    fn answered(&self, elasti: Arc<ElastiService>, asked: Instant, verdict: Verdict) {
        let uid = elasti.metadata.uid.clone().unwrap_or_default();
        {
            let mut state = self.state();
            state.asking.remove(&uid);
            let before = state.answers.get(&uid).and_then(|answer| answer.to(&elasti)).and_then(|said| said.idle_since);
            let idle_since = (verdict == Verdict::Idle).then(|| before.unwrap_or(asked));
            let said = TriggersObserved { verdict, asked, idle_since };
            if state.memories.contains_key(&uid) {
                state.answers.insert(uid.clone(), Answer { of: elasti, said });
            }
        }
        self.look_at(&uid);
    }

    /// The scale-down that was planned was refused, or not sent at all.
    fn will_not_scale_down(&self, uid: &str) {
        if let Some(memory) = self.state().memories.get_mut(uid) {
            memory.scale_down_refused();
        }
    }
}
