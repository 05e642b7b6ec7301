//! `spec.probeResponse` in the words that resolvers understand.

use elasti_api::probe::{Look, ProbeRule, ProbeRules};
use elasti_api::v1alpha1::{ElastiServiceSpec, ProbeResponse};

use crate::idleness;

/// The status of the answer to clients that shall wake nothing, where no other rule answers: the truth.
const ASLEEP: u16 = 503;

/// The rules of an ElastiService, in order: `probeResponse`, then what the trigger `traffic` ignores.
pub fn rules(spec: &ElastiServiceSpec) -> Vec<ProbeRule> {
    let agents = idleness::traffic::trigger(spec).map(|trigger| trigger.ignored_agents).unwrap_or_default();
    spec.probe_response.iter().flatten().map(rule).chain(ignoring(&agents)).collect()
}

/// The rule for clients whose `User-Agent` begins with one of these words.
fn ignoring(agents: &[String]) -> Option<ProbeRule> {
    let words: Vec<String> = agents.iter().map(|agent| regex::escape(agent)).collect();
    (!words.is_empty()).then(|| ProbeRule {
        method: None,
        path: None,
        headers: vec![("user-agent".to_owned(), Look::Expression(format!("^(?:{})", words.join("|"))))],
        query: Vec::new(),
        status: ASLEEP,
        body: "the target sleeps\n".to_owned(),
    })
}

/// What is wrong with the first rule that is faulty.
pub fn fault(spec: &ElastiServiceSpec) -> Option<String> {
    ProbeRules::new(rules(spec)).1.into_iter().next()
}

fn rule(from: &ProbeResponse) -> ProbeRule {
    let path = from.path.as_ref().map(|path| {
        let value = path.value.clone().unwrap_or_else(|| "/".to_owned());
        match path.type_.as_deref() {
            Some("Exact") => Look::Exact(value),
            Some("RegularExpression") => Look::Expression(value),
            _ => Look::PathPrefix(value),
        }
    });
    let headers = from.headers.iter().flatten().map(|header| (&header.name, &header.type_, &header.value));
    let query =
        from.query_params.iter().flatten().map(|parameter| (&parameter.name, &parameter.type_, &parameter.value));
    ProbeRule {
        method: from.method.clone(),
        path,
        headers: headers.map(look).collect(),
        query: query.map(look).collect(),
        status: u16::try_from(from.response.status).unwrap_or(200),
        body: from.response.body.clone(),
    }
}

fn look((name, type_, value): (&String, &Option<String>, &String)) -> (String, Look) {
    let value = value.clone();
    let look = if type_.as_deref() == Some("RegularExpression") { Look::Expression(value) } else { Look::Exact(value) };
    (name.clone(), look)
}

#[cfg(test)]
mod tests {
    use elasti_api::probe::Question;
    use elasti_api::v1alpha1::ScaleTrigger;

    use super::*;

    fn spec(rules: &serde_json::Value) -> ElastiServiceSpec {
        let target = serde_json::json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"});
        let spec = serde_json::json!({"service": "web", "scaleTargetRef": target, "probeResponse": rules});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn rules_of_kubeelasti_mean_the_same() {
        let rules = rules(&spec(&serde_json::json!([
            {"path": {"value": "/healthz"}, "method": "GET", "response": {"status": 200, "body": "{\"ok\":true}"}},
            {
                "path": {"type": "RegularExpression", "value": "^/v[0-9]"},
                "headers": [{"name": "a", "value": "b"}],
                "queryParams": [{"name": "q", "type": "RegularExpression", "value": "."}],
                "response": {"status": 204, "body": ""},
            },
            {"path": {}, "response": {"status": 503, "body": "x"}},
        ])));
        assert_eq!((rules[0].path.clone(), rules[0].status), (Some(Look::PathPrefix("/healthz".into())), 200));
        assert_eq!(rules[0].method.as_deref(), Some("GET"));
        assert_eq!(rules[1].path, Some(Look::Expression("^/v[0-9]".into())));
        assert_eq!(rules[1].headers, [("a".to_owned(), Look::Exact("b".into()))]);
        assert_eq!(rules[1].query, [("q".to_owned(), Look::Expression(".".into()))]);
        assert_eq!(rules[2].path, Some(Look::PathPrefix("/".into())));
    }

    #[test]
    fn clients_that_are_ignored_are_told_the_truth_unless_a_rule_says_otherwise() {
        let mut spec =
            spec(&serde_json::json!([{"path": {"value": "/healthz"}, "response": {"status": 200, "body": ""}}]));
        let metadata = serde_json::json!({"ignoreUserAgents": ["kube-probe/", "a(b"]});
        spec.triggers = Some(vec![ScaleTrigger { type_: "traffic".into(), metadata: Some(metadata) }]);
        let (rules, faults) = ProbeRules::new(rules(&spec));
        assert!(faults.is_empty(), "{faults:?}");
        let status = |path, agent: &'static str| {
            let header = move |name: &str| (name == "user-agent").then_some(agent.into()).into_iter();
            rules.answer(Question { method: "GET", path, query: None }, header).map(|rule| rule.status)
        };
        assert_eq!(status("/healthz", "kube-probe/1.34"), Some(200));
        assert_eq!(status("/metrics", "kube-probe/1.34"), Some(ASLEEP));
        assert_eq!(status("/", "a(b"), Some(ASLEEP));
        assert_eq!(status("/", "curl kube-probe/"), None);
    }

    #[test]
    fn a_faulty_expression_is_named() {
        let path = serde_json::json!({"type": "RegularExpression", "value": "("});
        let faulty = serde_json::json!([{"path": path, "response": {"status": 200, "body": ""}}]);
        assert!(fault(&spec(&faulty)).unwrap().contains("probeResponse[0]"));
        assert_eq!(fault(&spec(&serde_json::json!([]))), None);
    }
}
