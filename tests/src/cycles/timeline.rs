//! The judgement: in which window of its cycle a request arrived, and whether it counts as failed.
//!
//! Pure: what was recorded of requests and seen of the Service goes in. Events bear the time at which the harness's watch
//! saw them, which is after they came about; so no time that a rule allows is longer than it says.

use std::collections::BTreeSet;
use std::net::IpAddr;

use elasti_traffic::record::{Micros, Record};
use serde::Serialize;

/// What the redirection may take after the watch has shown that a target was scaled to zero by hand, or that the slices
/// which resolvers have acknowledged are published.
const REDIRECTION: Micros = 50_000;

/// How late a watch may tell that a target was scaled to zero, on a machine whose cores are all busy: its pods, and the
/// connections to them, may have ended by then.
const LATE: Micros = 1_000_000;

/// How long after the return to direct connections a request still belongs to it.
const AFTER_SERVE: Micros = 1_000_000;

/// A part of a Service's cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Window {
    /// The target serves directly.
    BeforeInterception,
    /// Intercepted, and the target is still up.
    BeforeScale,
    /// Scaled to zero; its pods have not ended.
    Draining,
    /// There is no pod.
    Zero,
    /// Scaled up; no pod is ready.
    Starting,
    /// A pod is ready; connections are still intercepted.
    BeforeServe,
    /// The first second of direct connections.
    AfterServe,
}

impl Window {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::BeforeInterception,
        Self::BeforeScale,
        Self::Draining,
        Self::Zero,
        Self::Starting,
        Self::BeforeServe,
        Self::AfterServe,
    ];

    /// A word for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeInterception => "before interception",
            Self::BeforeScale => "before scale",
            Self::Draining => "draining",
            Self::Zero => "at zero",
            Self::Starting => "starting",
            Self::BeforeServe => "ready, before serve",
            Self::AfterServe => "after serve",
        }
    }
}

/// Something that the watches have seen of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The harness is about to scale the target to zero, as somebody would by hand.
    ByHand,
    /// The harness has scaled a target without ElastiService up again, and it is ready.
    Restored,
    /// `status.mode` is `proxy`.
    Intercepting(bool),
    /// A slice names resolvers that have acknowledged.
    Published(bool),
    /// The target's `spec.replicas`.
    Replicas(i64),
    /// How many endpoints of the target are ready.
    Ready(usize),
    /// How many pods the target has, ending ones too.
    Pods(usize),
}

/// What is true of a Service at one moment.
#[expect(clippy::struct_excessive_bools, reason = "each is seen by itself, in any combination")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// `status.mode` is `proxy`.
    pub intercepting: bool,
    /// A slice names resolvers that have acknowledged.
    pub published: bool,
    /// The target's `spec.replicas`.
    pub replicas: i64,
    /// How many endpoints of the target are ready.
    pub ready: usize,
    /// How many pods the target has, ending ones too.
    pub pods: usize,
    /// It is scaled to zero by hand in this cycle.
    by_hand: bool,
    /// It was at zero since connections were last direct.
    was_at_zero: bool,
    /// Since when every new connection passes through a resolver.
    intercepted: Option<Micros>,
    /// Since when connections are direct again.
    served: Option<Micros>,
}

impl Default for State {
    /// Before anything was seen: direct, with a target that has no pod yet.
    fn default() -> Self {
        Self {
            intercepting: false,
            published: false,
            replicas: 1,
            ready: 0,
            pods: 0,
            by_hand: false,
            was_at_zero: false,
            intercepted: None,
            served: None,
        }
    }
}

impl State {
    /// The target serves directly, and nothing of ours is in the way.
    pub fn is_direct(&self) -> bool {
        !self.intercepting && !self.published && self.replicas > 0 && self.ready > 0
    }

    /// Intercepted, published, and the target is still up.
    pub fn is_before_scale(&self) -> bool {
        self.intercepting && self.published && self.replicas > 0 && !self.was_at_zero
    }

    /// Scaled to zero without a pod left.
    pub fn is_at_zero(&self) -> bool {
        self.intercepting && self.replicas == 0 && self.pods == 0
    }

    /// Woken from zero and ready, and still intercepted.
    pub fn is_before_serve(&self) -> bool {
        self.intercepting && self.was_at_zero && self.replicas > 0 && self.ready > 0
    }

    fn after(mut self, at: Micros, event: Event) -> Self {
        match event {
            Event::Intercepting(false) | Event::Restored => {
                (self.intercepting, self.by_hand, self.was_at_zero) = (false, false, false);
                (self.intercepted, self.served) = (None, Some(at));
            }
            Event::ByHand => self.by_hand = true,
            Event::Intercepting(true) => self.intercepting = true,
            Event::Published(published) => self.published = published,
            Event::Replicas(replicas) => {
                self.replicas = replicas;
                self.was_at_zero |= replicas == 0;
            }
            Event::Ready(ready) => self.ready = ready,
            Event::Pods(pods) => self.pods = pods,
        }
        // Who scales a target to zero himself has intercepted it before, or has lost what is lost.
        let at_once = self.replicas == 0 && !self.by_hand;
        if at_once || self.replicas == 0 || self.intercepting && self.published {
            let since = if at_once { at } else { at + REDIRECTION };
            self.intercepted = Some(self.intercepted.map_or(since, |known| known.min(since)));
        }
        self
    }

    fn intercepted(&self, at: Micros) -> bool {
        self.intercepted.is_some_and(|since| at >= since)
    }

    fn window(&self, at: Micros) -> Window {
        if self.replicas == 0 {
            return if self.pods == 0 { Window::Zero } else { Window::Draining };
        }
        if self.was_at_zero {
            return if self.ready == 0 { Window::Starting } else { Window::BeforeServe };
        }
        if self.intercepted(at) {
            return Window::BeforeScale;
        }
        match self.served {
            Some(served) if at < served + AFTER_SERVE => Window::AfterServe,
            _ => Window::BeforeInterception,
        }
    }
}

/// What has become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It has its right answer.
    Answered,
    /// It has none and should have: nothing excuses it.
    Failed,
    /// It has none: its connection was opened to a pod directly, before interception, and the pod was told to end.
    Apart,
}

/// All that was seen of one Service.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// The state after each event, in order of time.
    states: Vec<(Micros, State)>,
}

impl Timeline {
    /// Adds what has just been seen. What was so before is no event.
    pub fn add(&mut self, at: Micros, event: Event) {
        let state = self.now();
        let known = match event {
            Event::ByHand | Event::Restored => false,
            Event::Intercepting(is) => state.intercepting == is,
            Event::Published(is) => state.published == is,
            Event::Replicas(count) => state.replicas == count,
            Event::Ready(count) => state.ready == count,
            Event::Pods(count) => state.pods == count,
        };
        if !known {
            self.states.push((at, state.after(at, event)));
        }
    }

    /// The state now.
    pub fn now(&self) -> State {
        self.states.last().map(|(_, state)| *state).unwrap_or_default()
    }

    fn at(&self, time: Micros) -> State {
        let count = self.states.partition_point(|(at, _)| *at <= time);
        count.checked_sub(1).map(|last| self.states[last].1).unwrap_or_default()
    }

    /// The window of the cycle in which a moment lies.
    pub fn window(&self, time: Micros) -> Window {
        self.at(time).window(time)
    }

    /// Whether the target was scaled to zero after a moment.
    pub fn was_at_zero_since(&self, time: Micros) -> bool {
        self.states.iter().any(|(at, state)| *at > time && state.replicas == 0)
    }

    /// What has become of a request. `resolvers` are the addresses of all resolvers.
    pub fn verdict(&self, request: &Record, resolvers: &BTreeSet<IpAddr>) -> Verdict {
        if request.error.is_none() {
            return Verdict::Answered;
        }
        let forwarded = request.peer.is_some_and(|peer| resolvers.contains(&peer));
        if forwarded || self.at(request.connecting).intercepted(request.connecting) {
            return Verdict::Failed;
        }
        let scaled = self
            .states
            .iter()
            .find(|(at, state)| state.replicas == 0 && (request.connecting..=request.ended + LATE).contains(at));
        let excused = match scaled {
            // Who scales a target to zero himself and has not intercepted it before is not excused.
            Some((at, state)) => state.by_hand || state.intercepted.is_some_and(|since| since < *at),
            None => self.at(request.connecting).replicas == 0,
        };
        if excused { Verdict::Apart } else { Verdict::Failed }
    }

    /// The times and states, for a report of what went wrong.
    pub fn describe(&self, from: Micros, to: Micros) -> String {
        let lines: Vec<String> = self
            .states
            .iter()
            .filter(|(at, _)| (from..=to).contains(at))
            .map(|(at, state)| {
                format!(
                    "  {:>10.3} s intercepting {} published {} replicas {} ready {} pods {}",
                    f64::from(u32::try_from(at.saturating_sub(from) / 1000).unwrap_or(u32::MAX)) / 1000.0,
                    state.intercepting,
                    state.published,
                    state.replicas,
                    state.ready,
                    state.pods
                )
            })
            .collect();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use elasti_traffic::record::Kind;

    use super::*;

    const MS: Micros = 1000;

    fn up() -> Timeline {
        let mut timeline = Timeline::default();
        for event in [Event::Replicas(1), Event::Pods(1), Event::Ready(1)] {
            timeline.add(0, event);
        }
        timeline
    }

    /// Intercepted at 1 s, scaled at 3 s, at zero at 5 s, woken at 7 s, ready at 8 s, direct at 9 s.
    fn by_idleness() -> Timeline {
        let mut timeline = up();
        for (at, event) in [
            (1000, Event::Intercepting(true)),
            (1010, Event::Published(true)),
            (3000, Event::Replicas(0)),
            (3010, Event::Ready(0)),
            (5000, Event::Pods(0)),
            (7000, Event::Replicas(1)),
            (7010, Event::Pods(1)),
            (8000, Event::Ready(1)),
            (9000, Event::Intercepting(false)),
            (9010, Event::Published(false)),
        ] {
            timeline.add(at * MS, event);
        }
        timeline
    }

    fn by_hand() -> Timeline {
        let mut timeline = up();
        timeline.add(990 * MS, Event::ByHand);
        timeline.add(1000 * MS, Event::Replicas(0));
        timeline.add(1020 * MS, Event::Intercepting(true));
        timeline.add(1100 * MS, Event::Published(true));
        timeline
    }

    fn request(connecting: Micros, ended: Micros, error: bool) -> Record {
        Record {
            load: 1,
            kind: Kind::KeepAlive,
            arrived: connecting * MS,
            connecting: connecting * MS,
            peer: None,
            ended: ended * MS,
            error: error.then(|| "reset".to_owned()),
        }
    }

    #[test]
    fn each_moment_of_a_cycle_has_its_window() {
        let timeline = by_idleness();
        let windows = [500, 1055, 1061, 3001, 5001, 7001, 8001, 9001, 10_001].map(|at| timeline.window(at * MS));
        assert_eq!(
            windows,
            [
                Window::BeforeInterception,
                Window::BeforeInterception,
                Window::BeforeScale,
                Window::Draining,
                Window::Zero,
                Window::Starting,
                Window::BeforeServe,
                Window::AfterServe,
                Window::BeforeInterception,
            ]
        );
    }

    #[test]
    fn a_target_that_is_woken_while_its_pods_drain_is_starting() {
        let mut timeline = by_hand();
        timeline.add(1200 * MS, Event::Ready(0));
        timeline.add(1300 * MS, Event::Replicas(1));
        assert_eq!(timeline.window(1250 * MS), Window::Draining);
        assert_eq!(timeline.window(1350 * MS), Window::Starting);
    }

    #[test]
    fn a_scale_down_that_is_aborted_goes_back_to_serve() {
        let mut timeline = up();
        timeline.add(1000 * MS, Event::Intercepting(true));
        timeline.add(1010 * MS, Event::Published(true));
        timeline.add(2000 * MS, Event::Intercepting(false));
        assert_eq!(timeline.window(1500 * MS), Window::BeforeScale);
        assert_eq!(timeline.window(2500 * MS), Window::AfterServe);
    }

    #[test]
    fn nothing_excuses_a_connection_that_was_begun_while_intercepted() {
        let none = BTreeSet::new();
        for connecting in [1061, 3001, 5001, 7001, 8500] {
            let verdict = by_idleness().verdict(&request(connecting, connecting + 10, true), &none);
            assert_eq!(verdict, Verdict::Failed, "{connecting}");
        }
    }

    #[test]
    fn by_hand_the_redirection_has_fifty_milliseconds() {
        let none = BTreeSet::new();
        assert_eq!(by_hand().verdict(&request(1049, 1060, true), &none), Verdict::Apart);
        assert_eq!(by_hand().verdict(&request(1050, 1060, true), &none), Verdict::Failed);
    }

    #[test]
    fn a_target_that_is_scaled_before_it_is_intercepted_excuses_nothing() {
        let mut timeline = up();
        timeline.add(1000 * MS, Event::Replicas(0));
        timeline.add(1020 * MS, Event::Intercepting(true));
        let verdict = |at| timeline.verdict(&request(at, 1500, true), &BTreeSet::new());
        assert_eq!((verdict(999), verdict(1000)), (Verdict::Failed, Verdict::Failed));
    }

    #[test]
    fn a_direct_connection_is_excused_by_the_end_of_its_pod_alone() {
        let none = BTreeSet::new();
        assert_eq!(by_idleness().verdict(&request(500, 3100, true), &none), Verdict::Apart);
        assert_eq!(by_idleness().verdict(&request(500, 2001, true), &none), Verdict::Apart, "the watch was late");
        assert_eq!(by_idleness().verdict(&request(500, 1999, true), &none), Verdict::Failed, "its pod was up");
        assert_eq!(by_idleness().verdict(&request(9500, 9600, true), &none), Verdict::Failed, "its pod was up");
        assert_eq!(by_idleness().verdict(&request(500, 2900, false), &none), Verdict::Answered);
    }

    #[test]
    fn nothing_excuses_a_connection_that_a_resolver_forwards() {
        let resolver: IpAddr = [10, 244, 0, 9].into();
        let forwarded = Record { peer: Some(resolver), ..request(500, 3100, true) };
        assert_eq!(by_idleness().verdict(&forwarded, &BTreeSet::from([resolver])), Verdict::Failed);
    }
}
