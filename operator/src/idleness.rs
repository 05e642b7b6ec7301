//! Triggers: what says whether a target is idle.
//!
//! [`Triggers::ask`] asks every trigger of an ElastiService at once; all must agree. Whatever cannot be told counts as
//! [`Verdict::Unknown`], which never puts a target to sleep.

use elasti_api::v1alpha1::{ElastiServiceSpec, ScaleTrigger};
use futures::future::join_all;

use crate::observed::Verdict;

mod https;
mod prometheus;
mod secrets;

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

    /// Asks every trigger of `spec`, of an ElastiService in this namespace. Busy if one sees traffic, else unknown if one cannot tell, else idle.
    pub async fn ask(&self, namespace: &str, spec: &ElastiServiceSpec) -> Verdict {
        let triggers = spec.triggers.as_deref().unwrap_or_default();
        if triggers.is_empty() {
            return Verdict::Unknown("there is no trigger".to_owned());
        }
        let verdicts = join_all(triggers.iter().map(async |trigger| match prometheus::metadata(trigger) {
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

/// What is wrong with a trigger as it is written, with cause and cure.
pub fn fault(trigger: &ScaleTrigger) -> Option<String> {
    prometheus::metadata(trigger).err()
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
    }
}
