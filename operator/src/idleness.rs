//! Triggers: what says whether a target is idle.
//!
//! [`Triggers::ask`] asks every trigger of an ElastiService at once that has to be asked; what [`traffic`] needs, resolvers tell
//! unasked. All must agree. Whatever cannot be told counts as [`Verdict::Unknown`], which never puts a target to sleep.

use elasti_api::v1alpha1::{ElastiServiceSpec, PrometheusMetadata, ScaleTrigger};
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

/// Whether an answer to the triggers of one is an answer to those of the other.
pub fn ask_the_same(one: &ElastiServiceSpec, other: &ElastiServiceSpec) -> bool {
    asked(one).eq(asked(other))
}

/// What is wrong with the triggers as they are written, with cause and cure.
pub fn fault(spec: &ElastiServiceSpec) -> Option<String> {
    let triggers = spec.triggers.as_deref().unwrap_or_default();
    let fault = triggers.iter().find_map(|trigger| match trigger.type_.as_str() {
        traffic::TYPE => traffic::metadata(trigger).err(),
        // A key that is missing is often one that is misspelt.
        "prometheus" => prometheus::metadata(trigger).err().map(|fault| match ignored(spec) {
            Some(ignored) => format!("{fault}; {ignored}"),
            None => fault,
        }),
        other => Some(format!("trigger type {other:?} is unknown; the known types are prometheus and traffic")),
    });
    let several = || triggers.iter().filter(|trigger| trigger.type_ == traffic::TYPE).count() > 1;
    fault.or_else(|| several().then(|| "there is more than one trigger of type traffic; keep one".to_owned()))
}

/// What triggers say that means nothing and is ignored, with what would mean something.
pub fn ignored(spec: &ElastiServiceSpec) -> Option<String> {
    let known = PrometheusMetadata::KEYS;
    let triggers = spec.triggers.iter().flatten().filter(|trigger| trigger.type_ == "prometheus");
    let keys =
        triggers.filter_map(|trigger| trigger.metadata.as_ref().and_then(serde_json::Value::as_object)).flatten();
    let unknown: Vec<&str> = keys.map(|(key, _)| key.as_str()).filter(|key| !known.contains(key)).collect();
    (!unknown.is_empty()).then(|| {
        let (unknown, known) = (unknown.join(", "), known.join(", "));
        format!("metadata of the prometheus trigger has keys that mean nothing: {unknown}; known are {known}")
    })
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
    fn an_answer_is_one_to_the_triggers_that_were_asked() {
        let spec = |query: &str, cooldown_period| {
            let metadata = Some(serde_json::json!({"query": query, "threshold": 1}));
            let triggers = Some(vec![ScaleTrigger { type_: "prometheus".into(), metadata }]);
            ElastiServiceSpec { triggers, cooldown_period, ..ElastiServiceSpec::default() }
        };
        assert!(ask_the_same(&spec("q", 60), &spec("q", 5)));
        assert!(!ask_the_same(&spec("q", 60), &spec("p", 60)));
        assert!(!ask_the_same(&spec("q", 60), &ElastiServiceSpec::default()));
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
        let misspelt = serde_json::json!({"query": "q", "treshold": 2});
        let told = fault(&trigger(Some(misspelt))).unwrap();
        assert!(told.contains("threshold") && told.contains("treshold"), "{told}");
        let both = serde_json::json!({
            "query": "q", "threshold": 1, "headers": {"authorization": "x"}, "authorizationSecret": {"name": "a", "key": "b"},
        });
        assert!(fault(&trigger(Some(both))).unwrap().contains("authorizationSecret"));
        let no_ca = serde_json::json!({"query": "q", "threshold": 1, "tls": {"ca": "hello"}});
        assert!(fault(&trigger(Some(no_ca))).unwrap().contains("tls.ca"));
        assert!(fault(&ScaleTrigger { type_: "moon".into(), metadata: None }).unwrap().contains("moon"));
        let traffic = |metadata| ScaleTrigger { type_: "traffic".into(), metadata };
        for good in [
            None,
            Some(serde_json::json!({
                "idleConnections": "hold", "minConnections": 2, "ignoreUserAgents": ["kube-probe/"],
                "ignoreSources": [
                    "10.0.0.0/8", "fd00::1", {"podSelector": {"matchLabels": {"app": "x"}}, "namespace": "n"},
                ],
            })),
        ] {
            assert_eq!(fault(&traffic(good)), None);
        }
        for (bad, named) in [
            (serde_json::json!({"idleConnection": "hold"}), "idleConnections"),
            (serde_json::json!({"idleConnections": "keep"}), "ignore or hold"),
            (serde_json::json!({"ignoreSources": ["10.0.0.0/40"]}), "10.0.0.0/40"),
            (serde_json::json!({"ignoreSources": "10.0.0.0/8"}), "sequence"),
            (serde_json::json!({"ignoreSources": [{"podSelector": {}}]}), "podSelector"),
            (serde_json::json!({"ignoreSources": [{"podSelector": {"labels": {"app": "x"}}}]}), "podSelector"),
            (serde_json::json!({"ignoreSources": [{"selector": {"matchLabels": {"app": "x"}}}]}), "podSelector"),
            (serde_json::json!({"ignoreUserAgents": [""]}), "ignoreUserAgents"),
            (serde_json::json!({"minConnections": 2}), "minConnections"),
            (serde_json::json!({"idleConnections": "hold", "minConnections": 0}), "1 or more"),
            (serde_json::json!({"idleConnections": "hold", "minConnections": -1}), "u32"),
        ] {
            let told = fault(&traffic(Some(bad))).unwrap();
            assert!(told.contains(named), "{told}");
        }
    }

    #[test]
    fn keys_of_prometheus_that_mean_nothing_are_named_and_no_fault() {
        let spec = |metadata| ElastiServiceSpec {
            triggers: Some(vec![ScaleTrigger { type_: "prometheus".into(), metadata: Some(metadata) }]),
            ..ElastiServiceSpec::default()
        };
        let known: serde_json::Map<_, _> =
            PrometheusMetadata::KEYS.map(|key| (key.to_owned(), serde_json::Value::Null)).into_iter().collect();
        assert_eq!(ignored(&spec(known.into())), None);
        let odd = spec(serde_json::json!({"query": "q", "threshold": 1, "uptimeFliter": "x"}));
        assert_eq!(fault(&odd), None);
        let told = ignored(&odd).unwrap();
        assert!(told.contains("nothing: uptimeFliter;") && told.contains("uptimeFilter"), "{told}");
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
