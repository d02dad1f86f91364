//! Which version of which model: `NAME`, `NAME@VERSION`, `NAME@TAG`.
//!
//! Promises: a number is always a version and never a tag, so that no tag can be taken for one.
//! Held by: the test below.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::format::{check_channel, check_model_name};
use crate::refuse;

/// Which version of a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Wanted {
    /// `NAME`: what `latest` names.
    Newest,
    /// `NAME@3`.
    Version(u64),
    /// `NAME@prod`.
    Tag(String),
}

/// `NAME`, `NAME@VERSION` or `NAME@TAG`.
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
    if text.starts_with("best:") {
        refuse!(Usage, "choosing a version by metric (@{text}) is not in this version; name a version or a tag");
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
        ] {
            let selector: ModelSelector = text.parse().unwrap();
            assert_eq!(selector, ModelSelector { name: name.into(), wanted });
            assert_eq!(selector.to_string(), text);
        }
        for text in ["", "@3", "m@", "m@0", "m@best:loss", "m@A", "m@a@b", "../m", "m@99999999999999999999"] {
            assert_eq!(text.parse::<ModelSelector>().unwrap_err().code(), Code::Usage, "{text:?}");
        }
    }
}
