//! Whatever happens, in whatever order, and whichever action fails: what must never happen does not.

use proptest::prelude::*;

use super::*;

/// Something that happens to a Service's world.
#[derive(Clone, Debug)]
enum Happening {
    Pass(u64),
    /// A plan is made and those of its actions succeed whose bits are set.
    Plan(u8),
    /// A scale-down that was given up as failed is carried out after all, if the API server still works on it.
    Land,
    Acknowledge,
    /// A resolver says that it listens, or redirects, as of now.
    Listen(usize, bool),
    Connect,
    Disconnect(usize),
    Leave(usize),
    Hold(usize, u32),
    Accept(usize),
    Forward(usize, u32),
    Ask(u8),
    ScaleByHand(i32),
    Ready(bool),
    Lead(bool),
    RemoveSlices,
    /// A pod begins to end; somebody else has its address, or not.
    Drain(u8, bool),
    /// The containers of those that end have ended.
    Ended,
    /// Somebody deletes the private Service.
    LosePrivate,
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        3 => (0_u64..90).prop_map(Pass),
        8 => prop_oneof![2 => Just(u8::MAX), 1 => any::<u8>()].prop_map(Plan),
        1 => Just(Land),
        4 => Just(Acknowledge),
        1 => (0_usize..4, any::<bool>()).prop_map(|(resolver, redirects)| Listen(resolver, redirects)),
        1 => Just(Connect),
        1 => (0_usize..4).prop_map(Disconnect),
        1 => (0_usize..4).prop_map(Leave),
        2 => (0_usize..4, 0_u32..3).prop_map(|(resolver, held)| Hold(resolver, held)),
        1 => (0_usize..4).prop_map(Accept),
        1 => (0_usize..4, 0_u32..2).prop_map(|(resolver, forwarding)| Forward(resolver, forwarding)),
        4 => (0_u8..8).prop_map(Ask),
        1 => (0_i32..3).prop_map(ScaleByHand),
        2 => any::<bool>().prop_map(Ready),
        1 => any::<bool>().prop_map(Lead),
        1 => Just(RemoveSlices),
        1 => (0_u8..3, any::<bool>()).prop_map(|(pod, elsewhere)| Drain(pod, elsewhere)),
        1 => Just(Ended),
        1 => Just(LosePrivate),
    ]
}

impl World {
    fn happen(&mut self, happening: &Happening) {
        let count = self.resolvers.len().max(1);
        match *happening {
            Happening::Pass(seconds) => self.pass(Duration::from_secs(seconds)),
            Happening::Plan(succeed) => self.plan_and_check(succeed),
            Happening::Acknowledge => self.acknowledge(),
            Happening::Listen(resolver, redirecting) => {
                let revision = self.status().revision;
                if let Some(resolver) = self.resolvers.get_mut(resolver % count) {
                    resolver.ack = Some(Ack { revision, listening: true, redirecting, holding: false, error: None });
                }
            }
            Happening::Connect if self.resolvers.len() < 4 => {
                self.connect(u8::try_from(self.resolvers.len()).unwrap() + 10);
            }
            Happening::Disconnect(resolver) if !self.resolvers.is_empty() => {
                self.resolvers.remove(resolver % count);
            }
            Happening::Leave(resolver) => self.change(resolver, |resolver| resolver.leaving = true),
            Happening::Hold(resolver, held) => self.change(resolver, |resolver| resolver.traffic.held = held),
            Happening::Accept(resolver) => self.change(resolver, |resolver| resolver.traffic.accepted += 1),
            Happening::Forward(resolver, open) => self.change(resolver, |resolver| resolver.traffic.forwarding = open),
            Happening::Ask(0) => self.answer(Verdict::Busy),
            Happening::Ask(1) => self.answer(Verdict::Unknown("gone".into())),
            Happening::Ask(_) => self.idle(),
            Happening::ScaleByHand(replicas) => self.scale(replicas),
            Happening::Ready(ready) => self.ready = ready && self.replicas() > 0,
            Happening::Lead(leads) => {
                self.leading_since = leads.then(|| self.leading_since.unwrap_or(self.now().instant));
            }
            Happening::RemoveSlices => self.slices.clear(),
            Happening::Land => self.land(),
            Happening::Drain(pod, elsewhere) => {
                let (pod, port) = (pod.to_string(), 80);
                self.draining.retain(|endpoint| endpoint.pod != pod);
                let address = format!("10.244.9.{pod}:8080").parse().unwrap();
                self.draining.push(DrainingEndpoint { port, address, pod, elsewhere });
            }
            Happening::Ended => self.draining.clear(),
            Happening::LosePrivate => self.private = None,
            Happening::Connect | Happening::Disconnect(_) => {}
        }
    }

    fn change(&mut self, resolver: usize, change: impl FnOnce(&mut ResolverObserved)) {
        let count = self.resolvers.len().max(1);
        self.resolvers.get_mut(resolver % count).map(change);
    }

    fn answer(&mut self, verdict: Verdict) {
        let asked = self.now().instant;
        self.triggers = Some(TriggersObserved { verdict, asked, idle_since: None });
    }

    fn replicas(&self) -> i32 {
        self.target.found().map_or(0, |target| target.spec_replicas)
    }

    fn plan_and_check(&mut self, succeed: u8) {
        let plan = self.plan();
        self.never_scales_down_too_early(&plan);
        self.never_leaves_a_held_connection_to_nobody(&plan);
        self.never_lets_go_while_there_is_something_to_hold(&plan);
        self.never_redirects_an_address_that_is_not_an_ending_pods(&plan);
        self.never_holds_without_a_scale_down_on_its_way(&plan);
        let mut all = true;
        for (number, action) in plan.actions.iter().enumerate() {
            let succeeds = succeed.checked_shr(u32::try_from(number).unwrap()).unwrap_or(1) & 1 == 1;
            if action.needs_all_before() && !all {
                // As the controller does.
                self.memory.scale_down_refused();
                continue;
            }
            if *action == Action::ScaleDown {
                self.sent = Some(self.versions);
            }
            if succeeds {
                self.apply(action);
            } else if *action == Action::ScaleDown {
                self.in_flight = Some((self.versions, self.now().instant));
            }
            all &= succeeds;
        }
    }

    fn land(&mut self) {
        let Some((version, sent)) = self.in_flight.take() else { return };
        let worked_on = self.now().instant.saturating_duration_since(sent) < OUTCOME_PATIENCE;
        if version == self.versions && worked_on {
            assert_eq!(self.status().mode, Some(Mode::Proxy), "a scale-down came late and found nobody who intercepts");
            self.scale(0);
            self.ready = false;
        }
    }

    /// Plans, applies what succeeds and lets time pass as plans ask for it, until `done` or for a minute.
    fn run_until(&mut self, done: impl Fn(&Self) -> bool) -> bool {
        let end = self.elapsed + Duration::from_mins(1);
        while self.elapsed < end {
            self.settle();
            if done(self) {
                return true;
            }
            let again = self.plan().again.unwrap_or(Duration::from_secs(1));
            self.pass(again.max(Duration::from_millis(1)));
        }
        false
    }

    fn never_redirects_an_address_that_is_not_an_ending_pods(&self, plan: &Plan) {
        let Publish::State(state) = &plan.publish else { return };
        for address in state.ports.iter().flat_map(|port| &port.draining) {
            let endpoint = self.draining.iter().find(|endpoint| endpoint.address == *address);
            assert!(endpoint.is_some_and(|endpoint| !endpoint.elsewhere), "{address} is somebody else's");
            let forwards = state.ports.iter().any(|port| !port.backends.is_empty());
            assert!(!forwards, "{address}: a pod is ready");
            assert_eq!(state.mode, Mode::Proxy);
        }
    }

    fn never_holds_without_a_scale_down_on_its_way(&self, plan: &Plan) {
        let holding = matches!(&plan.publish, Publish::State(state) if state.holding);
        let on_its_way = self.memory.descent.is_some() || self.sent == Some(self.versions);
        assert!(!holding || on_its_way, "clients wait although a pod is ready, and for nothing");
    }

    fn never_scales_down_too_early(&self, plan: &Plan) {
        if !scales_down(&plan.actions) {
            return;
        }
        let status = self.status();
        assert!(self.leading_since.is_some(), "only the Lease holder scales down");
        assert_eq!(status.mode, Some(Mode::Proxy), "intercepted first");
        assert!(self.slices.iter().any(|slice| !slice.endpoints.is_empty()), "published first");
        assert!(slices::eligible(&self.resolvers, status.revision).count() > 0, "somebody listens");
        assert!(self.resolvers.iter().all(|resolver| resolver.traffic.held == 0 && resolver.traffic.forwarding == 0));
        assert!(self.holding, "no pod gets a connection from the last word on");
        let mut staying = self.resolvers.iter().filter(|resolver| !resolver.leaving);
        let all_hold = staying.all(|resolver| resolver.ack.as_ref().is_some_and(|ack| ack.holding));
        let since = self.memory.descent.and_then(|descent| descent.holding).expect("since when they shall");
        let waited = self.now().instant.saturating_duration_since(since);
        assert!(all_hold || waited >= REDIRECT_PATIENCE, "every resolver holds, or was waited for");
        let triggers = self.triggers.as_ref().expect("the triggers were asked");
        assert_eq!(triggers.verdict, Verdict::Idle);
        let cooldown = self.elasti.spec.cooldown();
        let age = |since: Instant| self.now().instant.saturating_duration_since(since);
        assert!(age(triggers.idle_since.expect("idle")) >= cooldown, "idle for the cooldown");
        assert!(age(self.leading_since.expect("leads")) >= cooldown, "and watched by this leader for as long");
    }

    fn never_leaves_a_held_connection_to_nobody(&self, plan: &Plan) {
        let held = self.resolvers.iter().any(|resolver| resolver.traffic.held > 0);
        if held && self.replicas() == 0 {
            let longest = UNDONE_WAIT * 2_u32.pow(UNDONE_DOUBLINGS);
            let later = plan.again.is_some_and(|again| again <= longest.max(FOLLOWER_PATIENCE));
            assert!(scales_up(&plan.actions) || later, "{plan:?}");
            let first = self.memory.wakes.as_ref().is_none_or(|wakes| wakes.times < 2);
            assert!(scales_up(&plan.actions) || !first || self.leading_since.is_none(), "{plan:?}");
        }
    }

    fn never_lets_go_while_there_is_something_to_hold(&self, plan: &Plan) {
        assert_ne!(plan.publish, Publish::Remove, "listeners stay as long as the ElastiService");
        if self.replicas() > 0 && self.ready {
            return;
        }
        for action in &plan.actions {
            match action {
                Action::WriteStatus(status) => {
                    assert!(self.leading_since.is_none() || status.mode == Some(Mode::Proxy), "nobody else can serve");
                }
                Action::DeleteSlices(_) => assert_ne!(self.status().mode, Some(Mode::Proxy), "the only way in"),
                _ => {}
            }
        }
    }
}

/// What cannot be made, such as a private Service beyond a quota, keeps a target awake, and nobody waits for it.
#[test]
fn a_scale_down_that_is_left_out_keeps_nobody_waiting() {
    let mut world = World::descending();
    world.private = None;
    world.pass(SETTINGS.kube_proxy_sync);
    for _ in 0..5 {
        // All succeeds but what is first.
        world.plan_and_check(u8::MAX << 1);
        world.acknowledge();
        world.idle();
    }
    assert!(world.private.is_none() && world.replicas() > 0);
    world.answer(Verdict::Busy);
    world.plan_and_check(u8::MAX << 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_breaks_an_invariant(happenings in prop::collection::vec(happening(), 1..120)) {
        let mut world = World::serving();
        for happening in &happenings {
            world.happen(happening);
        }
    }

    #[test]
    fn whatever_has_happened_a_held_client_reaches_a_ready_target_in_the_end(
        happenings in prop::collection::vec(happening(), 1..60),
    ) {
        let mut world = World::serving();
        for happening in &happenings {
            world.happen(happening);
        }
        if world.resolvers.is_empty() {
            world.connect(9);
        }
        world.scale(0);
        world.ready = false;
        world.resolvers[0].traffic.held = 1;
        prop_assert!(world.run_until(|world| world.replicas() > 0), "woken, whether this replica leads or not");
        world.ready = true;
        world.resolvers[0].traffic.held = 0;
        world.leading_since = Some(world.now().instant);
        world.run_until(|world| world.status().mode == Some(Mode::Serve));
        prop_assert_eq!(world.status().mode, Some(Mode::Serve));
        world.settle();
        prop_assert!(world.slices.is_empty());
    }

    #[test]
    fn whatever_has_happened_an_intercepted_service_is_one_that_a_connection_wakes(
        happenings in prop::collection::vec(happening(), 1..60), leads in any::<bool>(),
    ) {
        let mut world = World::serving();
        for happening in &happenings {
            world.happen(happening);
        }
        world.leading_since = leads.then_some(world.now().instant);
        if world.resolvers.is_empty() {
            world.connect(9);
        }
        world.settle();
        if world.status().mode != Some(Mode::Proxy) {
            return Ok(());
        }
        let Publish::State(state) = world.plan().publish else { panic!("resolvers know nothing of it") };
        prop_assert_eq!(state.ports.len(), 1, "the listener is open");
        prop_assert_eq!(state.mode, Mode::Proxy);
        let resolver = world.resolvers.len() - 1;
        world.resolvers[resolver].traffic.held = 1;
        // What may still come of a scale-down that was given up, comes now.
        world.land();
        prop_assert!(world.run_until(|world| world.replicas() > 0));
    }
}
