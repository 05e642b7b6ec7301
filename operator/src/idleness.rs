//! Triggers: what says whether a target is idle.
//!
//! [`Triggers::ask`] asks every trigger of an ElastiService at once that has to be asked; what [`traffic`] needs, resolvers tell
//! unasked. All must agree. Whatever cannot be told counts as [`Verdict::Unknown`], which never puts a target to sleep.

use elasti_api::v1alpha1::{ElastiServiceSpec, ScaleTrigger};
use futures::future::join_all;

use crate::observed::Verdict;

mod https;
mod prometheus;
mod secrets;
pub mod traffic;

pub use prometheus::{Defaults, Prometheus};

/// Asks triggers.
#[derive(Clone)]
pub struct Triggers {
    prometheus: Prometheus,
}

impl Triggers {
    /// With what the operator is set to; `client` reads the Secrets that triggers name.
    pub fn new(defaults: Defaults, client: kube::Client) -> Self {
        Self { prometheus: Prometheus::new(defaults, client) }
    }

    /// Asks every trigger of `spec`, of an ElastiService in this namespace, that has to be asked. Busy if one sees traffic, else
    /// unknown if one cannot tell, else idle.
    pub async fn ask(&self, namespace: &str, spec: &ElastiServiceSpec) -> Verdict {
        let verdicts = join_all(asked(spec).map(async |trigger| match prometheus::metadata(trigger) {
            Ok(metadata) => self.prometheus.ask(namespace, &metadata, spec.cooldown()).await,
            Err(fault) => Verdict::Unknown(fault),
        }))
        .await;
        combine(verdicts)
    }
}

fn combine(verdicts: Vec<Verdict>) -> Verdict {
    let mut answer = Verdict::Idle;
    for verdict in verdicts {
        match verdict {
            Verdict::Busy => return Verdict::Busy,
            Verdict::Unknown(why) => answer = Verdict::Unknown(why),
            Verdict::Idle => {}
        }
    }
    answer
}

/// The triggers that have to be asked.
fn asked(spec: &ElastiServiceSpec) -> impl Iterator<Item = &ScaleTrigger> {
    spec.triggers.iter().flatten().filter(|trigger| trigger.type_ != traffic::TYPE)
}

/// Whether any trigger has to be asked.
pub fn asks(spec: &ElastiServiceSpec) -> bool {
    asked(spec).next().is_some()
}

/// What is wrong with the triggers as they are written, with cause and cure.
pub fn fault(spec: &ElastiServiceSpec) -> Option<String> {
    let triggers = spec.triggers.as_deref().unwrap_or_default();
    let fault = triggers.iter().find_map(|trigger| match trigger.type_.as_str() {
        traffic::TYPE => traffic::metadata(trigger).err(),
        "prometheus" => prometheus::metadata(trigger).err(),
        other => Some(format!("trigger type {other:?} is unknown; the known types are prometheus and traffic")),
    });
    let several = || triggers.iter().filter(|trigger| trigger.type_ == traffic::TYPE).count() > 1;
    fault.or_else(|| several().then(|| "there is more than one trigger of type traffic; keep one".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_triggers_must_agree() {
        let unknown = || Verdict::Unknown("x".into());
        assert_eq!(combine(vec![Verdict::Idle, Verdict::Idle]), Verdict::Idle);
        assert_eq!(combine(vec![Verdict::Idle, unknown()]), unknown());
        assert_eq!(combine(vec![unknown(), Verdict::Busy]), Verdict::Busy);
    }

    #[test]
    fn a_faulty_trigger_is_named() {
        let fault = |trigger: &ScaleTrigger| {
            fault(&ElastiServiceSpec { triggers: Some(vec![trigger.clone()]), ..ElastiServiceSpec::default() })
        };
        let trigger = |metadata| ScaleTrigger { type_: "prometheus".into(), metadata };
        let good = serde_json::json!({"query": "q", "threshold": "0.5", "serverAddress": "http://p:9090"});
        assert_eq!(fault(&trigger(Some(good))), None);
        assert!(fault(&trigger(None)).unwrap().contains("query"));
        let unknown_key = serde_json::json!({"query": "q", "threshold": 1, "treshold": 2});
        assert!(fault(&trigger(Some(unknown_key))).unwrap().contains("treshold"));
        let both = serde_json::json!({
            "query": "q", "threshold": 1, "headers": {"authorization": "x"}, "authorizationSecret": {"name": "a", "key": "b"},
        });
        assert!(fault(&trigger(Some(both))).unwrap().contains("authorizationSecret"));
        let no_ca = serde_json::json!({"query": "q", "threshold": 1, "tls": {"ca": "hello"}});
        assert!(fault(&trigger(Some(no_ca))).unwrap().contains("tls.ca"));
        assert!(fault(&ScaleTrigger { type_: "moon".into(), metadata: None }).unwrap().contains("moon"));
        let traffic = |metadata| ScaleTrigger { type_: "traffic".into(), metadata };
        for good in
            [None, Some(serde_json::json!({"idleConnections": "hold", "ignoreSources": ["10.0.0.0/8", "fd00::1"]}))]
        {
            assert_eq!(fault(&traffic(good)), None);
        }
        for (bad, named) in [
            (serde_json::json!({"idleConnection": "hold"}), "idleConnections"),
            (serde_json::json!({"idleConnections": "keep"}), "ignore or hold"),
            (serde_json::json!({"ignoreSources": ["10.0.0.0/40"]}), "10.0.0.0/40"),
            (serde_json::json!({"ignoreSources": "10.0.0.0/8"}), "ignoreSources"),
        ] {
            let told = fault(&traffic(Some(bad))).unwrap();
            assert!(told.contains(named) || told.contains("sequence"), "{told}");
        }
    }

    #[test]
    fn one_traffic_trigger_is_enough_and_none_is_one() {
        let traffic = || ScaleTrigger { type_: "traffic".into(), metadata: None };
        let spec = |triggers| ElastiServiceSpec { triggers, ..ElastiServiceSpec::default() };
        assert!(fault(&spec(Some(vec![traffic(), traffic()]))).unwrap().contains("more than one"));
        for none in [None, Some(vec![])] {
            assert_eq!(traffic::trigger(&spec(none.clone())), Some(traffic::TrafficTrigger::default()));
            assert!(!asks(&spec(none)));
        }
        let prometheus = ScaleTrigger { type_: "prometheus".into(), metadata: None };
        assert_eq!(traffic::trigger(&spec(Some(vec![prometheus.clone()]))), None);
        assert!(asks(&spec(Some(vec![traffic(), prometheus]))));
    }
}
