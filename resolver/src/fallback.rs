//! Where connections go when the operators are silent. Pure: the length of the silence decides.
//!
//! The private Service's cluster IPs are kept fresh by kube-proxy, which does not need us or the operator.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use elasti_api::message::{PortState, ServiceState};

/// How long a silence may be before backends are not believed, or redirection is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// From this age of the last message on, connections go to the private Service.
    pub fallback: Duration,
    /// From this age on, nothing is redirected: EndpointSlices alone bring connections here.
    pub redirect: Duration,
}

impl Default for Patience {
    /// Thirty seconds: longer than an operator's rollout or a change of the Lease takes. Five minutes: by then the
    /// operators are down, not busy, and somebody else may have to take the Service over.
    fn default() -> Self {
        Self { fallback: Duration::from_secs(30), redirect: Duration::from_mins(5) }
    }
}

/// What the resolver believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// An operator has been heard lately: its backends are fresh.
    Informed,
    /// Backends may be stale: the private Service knows better.
    Fallback,
    /// As [`Phase::Fallback`], and connections are not redirected any more.
    Abandoned,
}

/// The phase after a silence of this length.
pub fn phase(silence: Duration, patience: Patience) -> Phase {
    if silence >= patience.redirect {
        Phase::Abandoned
    } else if silence >= patience.fallback {
        Phase::Fallback
    } else {
        Phase::Informed
    }
}

/// Where connections to a port are forwarded; empty while they must be held. A Service without private Service keeps
/// its last known backends.
pub fn targets(state: &ServiceState, port: &PortState, phase: Phase) -> Arc<[SocketAddr]> {
    if phase == Phase::Informed || state.fallback.is_empty() {
        return port.backends.as_slice().into();
    }
    state.fallback.iter().map(|ip| SocketAddr::new(*ip, port.port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::service_state;

    #[test]
    fn silence_is_endured_in_three_phases() {
        let at = |seconds| phase(Duration::from_secs(seconds), Patience::default());
        assert_eq!([at(0), at(29), at(30), at(299), at(300)], {
            use Phase::{Abandoned, Fallback, Informed};
            [Informed, Informed, Fallback, Fallback, Abandoned]
        });
    }

    #[test]
    fn the_private_service_takes_the_place_of_backends() {
        let mut state = service_state("a", 1, 20_000);
        state.ports[0].backends = vec!["10.0.0.1:8080".parse().unwrap()];
        let targets = |state: &ServiceState, phase| targets(state, &state.ports[0], phase).to_vec();
        assert_eq!(targets(&state, Phase::Fallback), state.ports[0].backends, "none known: the last backends");
        state.fallback = vec!["10.96.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        assert_eq!(targets(&state, Phase::Informed), state.ports[0].backends);
        let private: Vec<SocketAddr> = vec!["10.96.0.7:80".parse().unwrap(), "[fd00::7]:80".parse().unwrap()];
        assert_eq!(targets(&state, Phase::Fallback), private);
        assert_eq!(targets(&state, Phase::Abandoned), private);
    }
}
