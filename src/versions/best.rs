//! `NAME@best:METRIC:min|max`: of the versions that a model's tags lead to, the one whose metric is best.
//!
//! In: candidates at or above the floor, keys. Out: one resolved version, which its user pins by digest like any other.
//! Promises: every version that is compared was verified and opened as for a mount; annotations are parsed only for this,
//! by a parser that keeps nothing but numbers of one object; of equals the newest wins; at most [`VERSIONS_MAX`] are
//! opened. A version that no key at hand opens, or that has no such metric, is not a candidate.
//! Held by: the tests below, tests/versions.rs.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Class, Code, Error, Result};
use crate::format::Manifest;
use crate::keys::{Aim, METRIC_NAME_BYTES_MAX, Resolved, Resolver};
use crate::refuse;

/// Versions opened for one choice: each costs a manifest and, for passphrases, a key derivation.
pub const VERSIONS_MAX: usize = 256;
/// Metrics of one version.
const METRICS_MAX: usize = 1024;

/// The version chosen, and by what.
#[derive(Debug)]
pub struct Best {
    pub resolved: Resolved,
    pub value: f64,
    /// Versions that have the metric.
    pub compared: usize,
}

/// The best version of `name` by `metric`; `open` decrypts a manifest with the keys at hand.
///
/// # Errors
/// As [`Resolver::candidates`] and [`Resolver::take`]: a version that is there and not what was signed refuses the choice.
/// `NOT_FOUND` if no version has the metric, naming those that were seen; `NO_KEY` if no version opens.
pub async fn best_of(
    resolver: &Resolver<'_>,
    name: &str,
    metric: &str,
    aim: Aim,
    open: &(dyn Fn(&Resolved) -> Result<Manifest> + Sync),
) -> Result<Best> {
    let mut best: Option<Best> = None;
    let (mut seen, mut compared, mut no_key) = (std::collections::BTreeSet::new(), 0, None);
    for candidate in resolver.candidates(name, VERSIONS_MAX).await? {
        let resolved = resolver.take(name, &candidate).await?;
        let seq = resolved.header.seq;
        let manifest = match open(&resolved) {
            Ok(manifest) => manifest,
            Err(denied) if denied.class() == Class::Denied => {
                tracing::warn!(version = seq, "not compared: {}", denied.chain());
                no_key = Some(denied);
                continue;
            }
            Err(err) => return Err(err),
        };
        let metrics = match metrics_of(&manifest) {
            Ok(metrics) => metrics,
            Err(bad) => {
                tracing::warn!(version = seq, "not compared: {}", bad.chain());
                continue;
            }
        };
        let Some(&value) = metrics.get(metric) else {
            seen.extend(metrics.into_keys());
            continue;
        };
        compared += 1;
        let wins = best.as_ref().is_none_or(|best| {
            aim.better(value, best.value) || (value == best.value && seq > best.resolved.header.seq)
        });
        if wins {
            best = Some(Best { resolved, value, compared });
        }
    }
    match (best, no_key) {
        (Some(best), _) => Ok(Best { compared, ..best }),
        (None, Some(denied)) if seen.is_empty() => {
            Err(denied.context(format!("no version of {name} could be compared")))
        }
        (None, _) if seen.is_empty() => {
            refuse!(NotFound, "no version of {name} has metrics; seal gives them with --metric")
        }
        (None, _) => {
            let seen: Vec<String> = seen.into_iter().collect();
            refuse!(NotFound, "no version of {name} has a metric {metric}; there are {}", seen.join(", "))
        }
    }
}

/// The top-level object `metrics` of a version's annotations: names and finite numbers. Empty if there is none.
///
/// # Errors
/// `MAN_FORMAT` for annotations that are not JSON, metrics that are not numbers, a name twice, or too many of them. The
/// publisher signed them, so this is its mistake and no attack.
pub fn metrics_of(manifest: &Manifest) -> Result<BTreeMap<String, f64>> {
    parse_metrics(manifest.annotations())
}

fn parse_metrics(annotations: &[u8]) -> Result<BTreeMap<String, f64>> {
    if annotations.is_empty() {
        return Ok(BTreeMap::new());
    }
    match serde_json::from_slice::<Annotations>(annotations) {
        Ok(parsed) => Ok(parsed.0.0),
        Err(err) => Err(Error::new(Code::ManFormat, "the metrics in the annotations cannot be read").with_source(err)),
    }
}

/// The top-level object: everything but `metrics` is passed over without being kept and without recursion, however deep.
struct Annotations(Metrics);

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Annotations, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Annotations;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Annotations, A::Error> {
                use serde::de::Error as _;
                let mut metrics: Option<Metrics> = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name != "metrics" {
                        map.next_value::<IgnoredAny>()?;
                    } else if metrics.replace(map.next_value()?).is_some() {
                        return Err(A::Error::custom("metrics stand there twice"));
                    }
                }
                Ok(Annotations(metrics.unwrap_or_default()))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

#[derive(Default)]
struct Metrics(BTreeMap<String, f64>);

impl<'de> Deserialize<'de> for Metrics {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Metrics, D::Error> {
        struct Numbers;
        impl<'de> Visitor<'de> for Numbers {
            type Value = Metrics;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an object of at most {METRICS_MAX} numbers, each name once")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Metrics, A::Error> {
                use serde::de::Error as _;
                let mut metrics = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, f64>()? {
                    if metrics.len() == METRICS_MAX || name.len() > METRIC_NAME_BYTES_MAX || !value.is_finite() {
                        return Err(A::Error::custom(format!(
                            "more or other than {METRICS_MAX} short names of numbers"
                        )));
                    }
                    if metrics.insert(name, value).is_some() {
                        return Err(A::Error::custom("a metric stands there twice"));
                    }
                }
                Ok(Metrics(metrics))
            }
        }
        deserializer.deserialize_map(Numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_of_the_top_level_object_are_metrics() {
        let text = br#"{"license":"x","deep":{"metrics":{"loss":1}},"metrics":{"loss":1.5,"acc":9e-1,"n":3,"neg":-2}}"#;
        let metrics = parse_metrics(text).unwrap();
        assert_eq!(
            metrics.into_iter().collect::<Vec<_>>(),
            [("acc".to_owned(), 0.9), ("loss".to_owned(), 1.5), ("n".to_owned(), 3.0), ("neg".to_owned(), -2.0)]
        );
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(500_000), "]".repeat(500_000));
        for none in [deep.as_bytes(), &b""[..], b"{}", br#"{"license":"x"}"#] {
            assert!(parse_metrics(none).unwrap().is_empty());
        }
    }

    #[test]
    fn annotations_that_are_not_bounded_numbers_are_refused() {
        let deep_metrics = format!("{{\"metrics\":{}", "{\"a\":".repeat(50_000));
        let many = format!(
            "{{\"metrics\":{{{}}}}}",
            (0..=METRICS_MAX).map(|n| format!("\"{n}\":1")).collect::<Vec<_>>().join(",")
        );
        let long = format!("{{\"metrics\":{{\"{}\":1}}}}", "x".repeat(METRIC_NAME_BYTES_MAX + 1));
        for bad in [
            "not json",
            "[]",
            r#"[{"loss":1}]"#,
            r#"{"metrics":[1]}"#,
            r#"{"metrics":{"loss":"1"}}"#,
            r#"{"metrics":{"loss":null}}"#,
            r#"{"metrics":{"loss":[1]}}"#,
            r#"{"metrics":{"loss":1e999}}"#,
            r#"{"metrics":{"loss":NaN}}"#,
            r#"{"metrics":{"loss":1,"loss":2}}"#,
            r#"{"metrics":{"loss":1},"metrics":{"loss":2}}"#,
            r#"{"metrics":7}"#,
            r#"{"metrics":{}} trailing"#,
            &deep_metrics,
            &many,
            &long,
        ] {
            let refused = parse_metrics(bad.as_bytes()).expect_err(&bad[..bad.len().min(60)]);
            assert_eq!(refused.code(), Code::ManFormat);
        }
    }
}
