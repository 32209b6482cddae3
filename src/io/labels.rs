//! Names of classes by number: `id2label` in `model_index.json`, as diffusers' pipelines of DiT have it.

use super::config::Config;
use super::words::distance;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// The classes that a model draws.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Labels(BTreeMap<usize, String>);

/// Names that an error lists at most.
const LISTED: usize = 12;

impl Labels {
    /// From numbers and names.
    pub fn new(names: impl IntoIterator<Item = (usize, String)>) -> Labels {
        Labels(names.into_iter().collect())
    }

    /// Reads `id2label`: an object from numbers to names, in which several names of a class stand between commas.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent, empty, or something else.
    pub fn read(index: &Config) -> Result<Labels> {
        let want = "the names of the classes by number, such as {\"0\": \"circle\"}";
        let Some(listed) = index.section("id2label")? else { return Err(index.error("id2label", want)) };
        let pair = |key: &str| Some((key.parse().ok()?, listed.get(key)?.as_str()?.to_string()));
        let names: Option<BTreeMap<usize, String>> = listed.keys().map(pair).collect();
        match names.filter(|names| !names.is_empty()) {
            Some(names) => Ok(Labels(names)),
            None => Err(index.error("id2label", want)),
        }
    }

    /// Numbers and names, in order of number.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &str)> {
        self.0.iter().map(|(number, name)| (*number, name.as_str()))
    }

    /// Whether a class has this number.
    pub fn contains(&self, number: usize) -> bool {
        self.0.contains_key(&number)
    }

    /// The number of a class from one of its names (in any case of letters, with or without an article) or from that number.
    ///
    /// # Errors
    /// [`Error::Invalid`] for one that there is not, with those that resemble it.
    pub fn find(&self, class: &str) -> Result<usize> {
        let lower = class.trim().to_lowercase();
        let bare = ["a ", "an ", "the "].iter().find_map(|article| lower.strip_prefix(article));
        let wanted = bare.map_or(&*lower, str::trim);
        let all = || self.iter().flat_map(|(n, names)| names.split(',').map(move |name| (n, name.trim())));
        if let Some((number, _)) = all().find(|(_, name)| [&lower, wanted].contains(&&*name.to_lowercase())) {
            return Ok(number);
        }
        if let Some(number) = wanted.parse().ok().filter(|n| self.contains(*n)) {
            return Ok(number);
        }
        let mut near: Vec<(usize, &str)> =
            all().map(|(_, name)| (distance(&name.to_lowercase(), wanted), name)).collect();
        near.sort();
        near.retain(|(d, _)| *d <= 1 + wanted.chars().count() / 4);
        let quoted = |names: &[&str]| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
        let numbers = (self.0.first_key_value(), self.0.last_key_value());
        let numbers =
            if let (Some((a, _)), Some((b, _))) = numbers { format!("{a} to {b}") } else { "none".into() };
        let help = match near.len() {
            0 => {
                let names: Vec<&str> = self.iter().map(|(_, name)| name).take(LISTED).collect();
                let more = if self.0.len() > LISTED { ", …" } else { "" };
                format!("the model knows {}{more}", quoted(&names))
            }
            n => {
                format!("did you mean {}?", quoted(&near[..n.min(3)].iter().map(|n| n.1).collect::<Vec<_>>()))
            }
        };
        Err(Error::invalid(format!(
            "class: want a class of the model, by name or number ({numbers}); got `{class}`; {help}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn labels(value: serde_json::Value) -> Result<Labels> {
        Labels::read(&Config::from_value("model_index.json", value).unwrap())
    }

    #[test]
    fn classes_go_by_names_and_numbers() {
        let all = json!({"0": "tench, Tinca tinca", "1": "goldfish", "7": "3", "3": "shark"});
        let all = labels(json!({"id2label": all})).unwrap();
        let found =
            ["tinca TINCA", " a tench", "1", "Goldfish", "3", "7", "shark"].map(|c| all.find(c).unwrap());
        assert_eq!(found, [0, 0, 1, 1, 7, 7, 3], "names come before numbers");
        let error = |class: &str| all.find(class).unwrap_err().to_string();
        assert!(error("goldfsh").contains("got `goldfsh`; did you mean `goldfish`?"), "{}", error("goldfsh"));
        let far = error("aeroplane");
        assert!(
            far.contains("number (0 to 7)") && far.contains("knows `tench, Tinca tinca`, `goldfish`"),
            "{far}"
        );
        assert!(error("2").contains("got `2`") && error("-1").contains("got `-1`"));
    }

    #[test]
    fn a_list_that_is_none_is_refused() {
        for value in [
            json!({}),
            json!({"id2label": {}}),
            json!({"id2label": {"a": "b"}}),
            json!({"id2label": {"0": 1}}),
        ] {
            assert!(
                labels(value.clone()).unwrap_err().to_string().contains("`id2label`: want the names"),
                "{value}"
            );
        }
        assert!(labels(json!({"id2label": ["a"]})).is_err());
    }
}
