//! Rules for HTTP requests that resolvers answer in place of a target: health checks that must not wake it.
//!
//! Pure. The operator sends [`ProbeRule`]s, a resolver compiles them to [`ProbeRules`]. As in KubeElasti the first rule
//! whose method, path, headers and query all match answers; of several values of one header or parameter any may match;
//! expressions are not anchored; a rule whose expression is none is left out.

use std::borrow::Cow;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

/// The most memory that a compiled expression may take, in bytes.
const EXPRESSION_SIZE: usize = 1 << 20;

/// How a text must look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Look {
    /// It is this.
    Exact(String),
    /// It is this path, or one below it.
    PathPrefix(String),
    /// It contains what this expression describes.
    Expression(String),
}

/// A request that is answered, and the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProbeRule {
    /// The method, in any case; absent: every method.
    pub method: Option<String>,
    /// The path, percent-decoded; absent: every path.
    pub path: Option<Look>,
    /// Headers by their names, in any case.
    pub headers: Vec<(String, Look)>,
    /// Parameters of the query by their names.
    pub query: Vec<(String, Look)>,
    /// Status of the answer.
    pub status: u16,
    /// Body of the answer.
    pub body: String,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The method.
    pub method: &'a str,
    /// The path as it was sent.
    pub path: &'a str,
    /// The query as it was sent, without `?`.
    pub query: Option<&'a str>,
}

/// Rules, compiled. Two are equal when they were made of equal rules.
#[derive(Debug, Default)]
pub struct ProbeRules {
    source: Vec<ProbeRule>,
    compiled: Vec<Compiled>,
}

impl PartialEq for ProbeRules {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for ProbeRules {}

#[derive(Debug)]
struct Compiled {
    /// Its place in `source`.
    rule: usize,
    path: Option<Matcher>,
    headers: Vec<(String, Matcher)>,
    query: Vec<(String, Matcher)>,
}

#[derive(Debug)]
enum Matcher {
    Exact(String),
    PathPrefix(String),
    Expression(Regex),
}

impl ProbeRules {
    /// Compiles rules, and says what is wrong with each that is left out.
    pub fn new(source: Vec<ProbeRule>) -> (Self, Vec<String>) {
        let (mut compiled, mut faults) = (Vec::new(), Vec::new());
        for (number, rule) in source.iter().enumerate() {
            match compile(number, rule) {
                Ok(rule) => compiled.push(rule),
                Err(fault) => faults.push(format!("probeResponse[{number}]: {fault}")),
            }
        }
        (Self { source, compiled }, faults)
    }

    /// What they were made of.
    pub fn source(&self) -> &[ProbeRule] {
        &self.source
    }

    /// The rule that answers a question; `header` gives the values of a header.
    pub fn answer<'h, H, V>(&self, question: Question<'_>, header: H) -> Option<&ProbeRule>
    where
        H: Fn(&str) -> V,
        V: Iterator<Item = Cow<'h, str>>,
    {
        let path = percent_encoding::percent_decode_str(question.path).decode_utf8_lossy();
        let query: Vec<_> = form_urlencoded::parse(question.query.unwrap_or_default().as_bytes()).collect();
        let matches = |compiled: &&Compiled| {
            let method = self.source[compiled.rule].method.as_ref();
            method.is_none_or(|method| method.eq_ignore_ascii_case(question.method))
                && compiled.path.as_ref().is_none_or(|matcher| matcher.matches(&path))
                && compiled.headers.iter().all(|(name, matcher)| header(name).any(|value| matcher.matches(&value)))
                && compiled
                    .query
                    .iter()
                    .all(|(name, matcher)| query.iter().any(|(given, value)| given == name && matcher.matches(value)))
        };
        self.compiled.iter().find(matches).map(|compiled| &self.source[compiled.rule])
    }
}

fn compile(rule: usize, from: &ProbeRule) -> Result<Compiled, String> {
    let all = |looks: &[(String, Look)]| {
        looks.iter().map(|(name, look)| Ok((name.clone(), Matcher::new(look)?))).collect::<Result<Vec<_>, String>>()
    };
    let path = from.path.as_ref().map(Matcher::new).transpose()?;
    Ok(Compiled { rule, path, headers: all(&from.headers)?, query: all(&from.query)? })
}

impl Matcher {
    fn new(look: &Look) -> Result<Self, String> {
        Ok(match look {
            Look::Exact(text) => Self::Exact(text.clone()),
            Look::PathPrefix(prefix) => Self::PathPrefix(prefix.trim_end_matches('/').to_owned()),
            Look::Expression(expression) => Self::Expression(
                RegexBuilder::new(expression)
                    .size_limit(EXPRESSION_SIZE)
                    .build()
                    .map_err(|error| format!("{expression:?} is not a regular expression: {error}"))?,
            ),
        })
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(wanted) => text == wanted,
            Self::PathPrefix(prefix) => {
                text.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Expression(expression) => expression.is_match(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(status: u16) -> ProbeRule {
        ProbeRule { method: None, path: None, headers: vec![], query: vec![], status, body: String::new() }
    }

    /// The status of the answer to a request with these headers, 0 if there is none.
    fn status(rules: &ProbeRules, method: &str, target: &str, headers: &[(&str, &'static str)]) -> u16 {
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let header = |name: &str| {
            let values: Vec<_> = headers.iter().filter(|(given, _)| given.eq_ignore_ascii_case(name)).collect();
            values.into_iter().map(|(_, value)| Cow::Borrowed(*value)).collect::<Vec<_>>().into_iter()
        };
        rules.answer(Question { method, path, query }, header).map_or(0, |rule| rule.status)
    }

    fn path(look: Look) -> ProbeRules {
        ProbeRules::new(vec![ProbeRule { path: Some(look), ..rule(200) }]).0
    }

    #[test]
    fn a_prefix_ends_with_a_segment() {
        let rules = path(Look::PathPrefix("/health".into()));
        for (target, expected) in [
            ("/health", 200),
            ("/health/", 200),
            ("/health/live?x=1", 200),
            ("/healthy", 0),
            ("/", 0),
            ("/%68ealth", 200),
        ] {
            assert_eq!(status(&rules, "GET", target, &[]), expected, "{target}");
        }
        assert_eq!(status(&path(Look::PathPrefix("/".into())), "GET", "/any", &[]), 200);
    }

    #[test]
    fn exact_is_exact_and_expressions_are_not_anchored() {
        let exact = path(Look::Exact("/a".into()));
        assert_eq!([status(&exact, "GET", "/a", &[]), status(&exact, "GET", "/a/", &[])], [200, 0]);
        let expression = path(Look::Expression("a[0-9]b".into()));
        assert_eq!(status(&expression, "GET", "/xa7by", &[]), 200);
    }

    #[test]
    fn method_headers_and_query_must_all_match() {
        let (rules, faults) = ProbeRules::new(vec![ProbeRule {
            method: Some("post".into()),
            headers: vec![("User-Agent".into(), Look::Expression("^kube-probe/".into()))],
            query: vec![("full".into(), Look::Exact("a b".into()))],
            ..rule(204)
        }]);
        assert!(faults.is_empty());
        let agent = ("user-agent", "kube-probe/1.34");
        assert_eq!(status(&rules, "POST", "/?full=no&full=a+b", &[("user-agent", "x"), agent]), 204);
        assert_eq!(status(&rules, "GET", "/?full=a%20b", &[agent]), 0);
        assert_eq!(status(&rules, "POST", "/?full=a%20b", &[]), 0);
        assert_eq!(status(&rules, "POST", "/", &[agent]), 0);
    }

    #[test]
    fn the_first_match_answers_and_a_faulty_rule_is_left_out_and_named() {
        let broken = ProbeRule { path: Some(Look::Expression("(".into())), ..rule(500) };
        let (rules, faults) = ProbeRules::new(vec![broken, rule(200), rule(404)]);
        assert_eq!(status(&rules, "GET", "/", &[]), 200);
        assert!(faults.len() == 1 && faults[0].starts_with("probeResponse[0]"), "{faults:?}");
    }
}
