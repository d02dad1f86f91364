//! Which version of which model: `NAME`, `NAME@VERSION`, `NAME@TAG`, `NAME@best:METRIC:min`.
//!
//! Promises: a number is always a version and never a tag, so that no tag can be taken for one; whether a metric is good
//! when it is low or when it is high is never guessed.
//! Held by: the test below.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::format::{check_channel, check_model_name};
use crate::refuse;

/// Longest name of a metric.
pub const METRIC_NAME_BYTES_MAX: usize = 256;

/// Which version of a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// `NAME`: what `latest` names.
    Newest,
    /// `NAME@3`.
    Version(u64),
    /// `NAME@prod`.
    Tag(String),
    /// `NAME@best:eval_loss:min`: of the versions that the model's tags lead to, the one with the best metric.
    Best { metric: String, aim: Aim },
}

/// Which end of a metric is the good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Aim {
    Min,
    Max,
}

impl Aim {
    pub const fn name(self) -> &'static str {
        match self {
            Aim::Min => "min",
            Aim::Max => "max",
        }
    }

    /// Whether `a` is better than `b`; neither is NaN.
    pub fn better(self, a: f64, b: f64) -> bool {
        match self {
            Aim::Min => a < b,
            Aim::Max => a > b,
        }
    }
}

/// `NAME`, `NAME@VERSION`, `NAME@TAG` or `NAME@best:METRIC:min|max`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelSelector {
    pub name: String,
    pub wanted: Wanted,
}

impl FromStr for ModelSelector {
    type Err = Error;

    fn from_str(text: &str) -> Result<ModelSelector> {
        let (name, wanted) = match text.split_once('@') {
            None => (text, Wanted::Newest),
            Some((name, version)) => (name, parse_wanted(version)?),
        };
        check_model_name(name)?;
        Ok(ModelSelector { name: name.into(), wanted })
    }
}

fn parse_wanted(text: &str) -> Result<Wanted> {
    if let Some(rest) = text.strip_prefix("best:") {
        let (metric, aim) = match rest.rsplit_once(':') {
            Some((metric, "min")) => (metric, Aim::Min),
            Some((metric, "max")) => (metric, Aim::Max),
            Some(_) | None => refuse!(
                Usage,
                "@{text} does not say which end of the metric is the good one; write @{text}:min or @{text}:max"
            ),
        };
        if metric.is_empty() || metric.len() > METRIC_NAME_BYTES_MAX || metric.chars().any(char::is_control) {
            refuse!(Usage, "@{text} names no metric; write @best:METRIC:min or @best:METRIC:max");
        }
        return Ok(Wanted::Best { metric: metric.into(), aim });
    }
    if !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit()) {
        return match text.parse() {
            Ok(seq) if seq > 0 => Ok(Wanted::Version(seq)),
            Ok(_) | Err(_) => refuse!(Usage, "version {text} is not one: they count from 1"),
        };
    }
    check_channel(text)?;
    Ok(Wanted::Tag(text.into()))
}

impl fmt::Display for ModelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.wanted {
            Wanted::Newest => f.write_str(&self.name),
            Wanted::Version(seq) => write!(f, "{}@{seq}", self.name),
            Wanted::Tag(tag) => write!(f, "{}@{tag}", self.name),
            Wanted::Best { metric, aim } => write!(f, "{}@best:{metric}:{}", self.name, aim.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn selectors_are_names_versions_and_tags() {
        for (text, name, wanted) in [
            ("acme/m", "acme/m", Wanted::Newest),
            ("m@3", "m", Wanted::Version(3)),
            ("m@prod", "m", Wanted::Tag("prod".into())),
            ("m@best:loss:min", "m", Wanted::Best { metric: "loss".into(), aim: Aim::Min }),
            ("m@best:eval:acc:max", "m", Wanted::Best { metric: "eval:acc".into(), aim: Aim::Max }),
        ] {
            let selector: ModelSelector = text.parse().unwrap();
            assert_eq!(selector, ModelSelector { name: name.into(), wanted });
            assert_eq!(selector.to_string(), text);
        }
        let long = format!("m@best:{}:min", "x".repeat(METRIC_NAME_BYTES_MAX + 1));
        for text in ["", "@3", "m@", "m@0", "m@A", "m@a@b", "../m", "m@99999999999999999999", "m@best::min", &long] {
            assert_eq!(text.parse::<ModelSelector>().unwrap_err().code(), Code::Usage, "{text:?}");
        }
    }

    #[test]
    fn a_metric_without_its_good_end_is_refused_and_told_how_to_write_it() {
        for text in ["m@best:loss", "m@best:loss:low", "m@best:"] {
            let refused = text.parse::<ModelSelector>().unwrap_err();
            assert_eq!(refused.code(), Code::Usage);
            assert!(refused.message().contains(&format!("{}:min", &text[1..])), "{refused:?}");
        }
    }
}
