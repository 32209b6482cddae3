//! Typed access to the JSON files that stand beside a model's weights. Every error names the file and the key.

use super::words::distance;
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Keys that any transformers configuration may carry and that do not change what a text encoder computes.
/// For [`Config::only`], beside the model's own.
pub const TRANSFORMERS_KEYS: &[&str] = &[
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dropout",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_factor",
    "initializer_range",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "projection_dim",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// A JSON object from a file. A key that is null counts as absent.
#[derive(Clone, Debug)]
pub struct Config {
    file: PathBuf,
    /// `text_config.` in a section of that name; empty at the top.
    prefix: String,
    values: Map<String, Value>,
}

impl Config {
    /// Reads a file that holds one JSON object. `NaN` and `Infinity`, which Python writes, are read as strings.
    ///
    /// # Errors
    /// [`Error::File`] when the file is missing, is not JSON, or holds something other than an object.
    pub fn read(path: impl AsRef<Path>) -> Result<Config> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::file(path, "not found"),
            std::io::ErrorKind::InvalidData => Error::file(path, "want JSON; got something that is not text"),
            _ => Error::file(path, format!("cannot be read: {e}")),
        })?;
        Config::parse(path, &text)
    }

    /// The same from a file's text; `file` is what errors name.
    ///
    /// # Errors
    /// [`Error::File`] when the text is not JSON, or holds something other than an object.
    pub fn parse(file: impl AsRef<Path>, text: &str) -> Result<Config> {
        let value = serde_json::from_str(text)
            .or_else(|e| serde_json::from_str(&quote_bare_words(text)).map_err(|_| e))
            .map_err(|e| Error::file(&file, format!("not valid JSON: {e}; download it again")))?;
        Config::from_value(file, value)
    }

    /// The same from a value; `file` is what errors name.
    ///
    /// # Errors
    /// [`Error::File`] when the value is not an object.
    pub fn from_value(file: impl AsRef<Path>, value: Value) -> Result<Config> {
        match value {
            Value::Object(values) => Ok(Config { file: file.as_ref().into(), prefix: String::new(), values }),
            other => Err(Error::file(file, format!("want a JSON object {{…}}; got {}", shown(Some(&other))))),
        }
    }

    /// The file that was read.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// All keys, null ones too, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// The value of a key, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    /// Whether a key is there and not null.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The error for a key whose value is not what is needed; says what was found.
    pub fn error(&self, key: &str, want: impl Into<String>) -> Error {
        Error::Config {
            file: self.file.clone(),
            key: format!("{}{key}", self.prefix),
            want: want.into(),
            got: shown(self.values.get(key)),
        }
    }

    fn need<T>(&self, key: &str, want: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| self.error(key, want))
    }

    fn optional<T>(&self, key: &str, want: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|v| read(v).ok_or_else(|| self.error(key, want))).transpose()
    }

    /// A whole number of at least 0, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind; so for all getters below.
    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, A_USIZE, as_usize)
    }

    /// A whole number of at least 0; the default where the key is absent, and `None` where it is null: to diffusers that is no default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn usize_unless_null(&self, key: &str, default: usize) -> Result<Option<usize>> {
        if self.values.contains_key(key) { self.opt_usize(key) } else { Ok(Some(default)) }
    }

    /// A number, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, A_NUMBER, Value::as_f64)
    }

    /// `true` or `false`, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.optional(key, A_BOOL, Value::as_bool)
    }

    /// A string, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.error(key, A_STRING))).transpose()
    }

    /// A whole number of at least 0.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent or of another kind; so for all getters that return a bare value.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.need(key, A_USIZE, self.opt_usize(key)?)
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent or of another kind.
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.need(key, A_NUMBER, self.opt_f64(key)?)
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent or of another kind.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.need(key, A_BOOL, self.opt_bool(key)?)
    }

    /// A string.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent or of another kind.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.need(key, A_STRING, self.opt_str(key)?)
    }

    /// A whole number of at least 0, or the default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn usize_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.opt_usize(key)?.unwrap_or(default))
    }

    /// A number, or the default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn f64_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.opt_f64(key)?.unwrap_or(default))
    }

    /// `true` or `false`, or the default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.opt_bool(key)?.unwrap_or(default))
    }

    /// A string, or the default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn str_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        Ok(self.opt_str(key)?.unwrap_or(default))
    }

    /// A list of whole numbers.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent or of another kind.
    pub fn usize_list(&self, key: &str) -> Result<Vec<usize>> {
        let want = "a list of whole numbers";
        self.need(key, want, self.optional(key, want, |v| list(v, as_usize))?)
    }

    /// A list of strings.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent or of another kind.
    pub fn str_list(&self, key: &str) -> Result<Vec<String>> {
        let want = "a list of strings";
        self.need(key, want, self.optional(key, want, |v| list(v, |x| x.as_str().map(str::to_owned)))?)
    }

    /// A list of numbers, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind.
    pub fn opt_f64_list(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.optional(key, "a list of numbers", |v| list(v, Value::as_f64))
    }

    /// One whole number for each of `n` levels: a list of `n`, or one number that holds for all.
    ///
    /// # Errors
    /// [`Error::Config`] when it is absent, of another kind, or of another length.
    pub fn per_level(&self, key: &str, n: usize) -> Result<Vec<usize>> {
        self.need(key, A_USIZE, self.levels(key, n, A_USIZE, as_usize)?)
    }

    /// As [`Config::per_level`], with a default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind or length.
    pub fn per_level_or(&self, key: &str, n: usize, default: usize) -> Result<Vec<usize>> {
        Ok(self.levels(key, n, A_USIZE, as_usize)?.unwrap_or_else(|| vec![default; n]))
    }

    /// As [`Config::per_level_or`], for `true` and `false`.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is of another kind or length.
    pub fn bool_per_level_or(&self, key: &str, n: usize, default: bool) -> Result<Vec<bool>> {
        Ok(self.levels(key, n, A_BOOL, Value::as_bool)?.unwrap_or_else(|| vec![default; n]))
    }

    fn levels<T: Clone>(
        &self,
        key: &str,
        n: usize,
        one: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let want = format!("{one}, or a list of {n}, one for each level");
        self.optional(key, &want, |v| match read(v) {
            Some(x) => Some(vec![x; n]),
            None => list(v, &read).filter(|all| all.len() == n),
        })
    }

    /// One of a few words, or the default.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is none of them.
    pub fn one_of<'a>(&self, key: &str, words: &[&'a str], default: &'a str) -> Result<&'a str> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let found = value.as_str().and_then(|text| words.iter().find(|w| **w == text));
        found.copied().ok_or_else(|| self.error(key, format!("one of {}", words.join(", "))))
    }

    /// The object under a key, if there is one. Its errors name its keys with the section before them.
    ///
    /// # Errors
    /// [`Error::Config`] when the value is not an object.
    pub fn section(&self, key: &str) -> Result<Option<Config>> {
        let values = self.optional(key, "an object {…}", |v| v.as_object().cloned())?;
        let prefix = format!("{}{key}.", self.prefix);
        Ok(values.map(|values| Config { file: self.file.clone(), prefix, values }))
    }

    /// Checks that there is no key beside the known ones. Null counts as absent; keys that begin with `_` are notes of
    /// the writer.
    ///
    /// # Errors
    /// [`Error::Config`] that names the first unknown key, and the known one that it resembles, if any.
    pub fn only(&self, known: &[&str]) -> Result<()> {
        let unknown = |key: &&str| self.has(key) && !key.starts_with('_') && !known.contains(key);
        let Some(key) = self.keys().find(unknown) else { return Ok(()) };
        let near =
            known.iter().map(|k| (distance(k, key), *k)).min().filter(|(d, _)| *d <= 1 + key.len() / 6);
        Err(self.error(
            key,
            match near {
                Some((_, k)) => format!("a key that the engine knows; did the writer mean `{k}`?"),
                None => {
                    "a key that the engine knows (it may ask for something newer than this engine)".into()
                }
            },
        ))
    }

    /// Checks that a key whose effect the engine does not have is absent, null, or at a value that has no effect.
    /// Without `allowed` values it must be absent or null.
    ///
    /// # Errors
    /// [`Error::Config`] when it is set to something else.
    pub fn neutral<V: Into<Value> + Clone>(&self, key: &str, allowed: &[V]) -> Result<()> {
        let Some(value) = self.get(key) else { return Ok(()) };
        let allowed: Vec<Value> = allowed.iter().map(|v| v.clone().into()).collect();
        if allowed.iter().any(|a| same(a, value)) {
            return Ok(());
        }
        let mut want: Vec<String> = allowed.iter().map(|a| shown(Some(a))).collect();
        want.push("null".into());
        Err(self.error(key, format!("{} (the engine has nothing else here)", want.join(" or "))))
    }
}

/// Larger numbers stand in no real configuration; the limit keeps sizes that are made of a few of them countable.
const MAX_USIZE: usize = i32::MAX as usize;
const A_USIZE: &str = "a whole number from 0 to 2147483647";
const A_NUMBER: &str = "a number";
const A_BOOL: &str = "true or false";
const A_STRING: &str = "a string";

/// Python writes `1.0` where it means 1.
fn as_usize(v: &Value) -> Option<usize> {
    let whole = |f: f64| (f >= 0.0 && f.fract() == 0.0 && f < 9e15).then_some(f as u64);
    v.as_u64()
        .or_else(|| v.as_f64().and_then(whole))
        .and_then(|n| n.try_into().ok())
        .filter(|n| *n <= MAX_USIZE)
}

fn list<T>(v: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    v.as_array()?.iter().map(read).collect()
}

fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(x), Some(y)) => x == y,
        _ => a == b,
    }
}

fn shown(v: Option<&Value>) -> String {
    let Some(v) = v else { return "nothing".into() };
    let text = v.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// `NaN`, `Infinity` and `-Infinity` outside strings, put in quotes.
fn quote_bare_words(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut in_string) = (text, false);
    while let Some(c) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|w| !in_string && rest.starts_with(w));
        let taken = match word {
            Some(w) => w.len(),
            None if in_string && c == '\\' => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            None => c.len_utf8(),
        };
        in_string ^= c == '"';
        match word {
            Some(w) => out.extend(["\"", w, "\""]),
            None => out.push_str(&rest[..taken]),
        }
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;
    use serde_json::json;

    fn config(v: Value) -> Config {
        Config::from_value("unet/config.json", v).unwrap()
    }

    fn text<T: std::fmt::Debug>(r: Result<T>) -> String {
        r.unwrap_err().to_string()
    }

    #[test]
    fn getters_read_values_defaults_and_null() {
        let c = config(json!({"n": 3, "w": 4.0, "f": 1e-5, "b": true, "s": "silu", "z": null,
            "l": [1, 2.0], "t": ["a", "b"], "fl": [0.5, 1]}));
        assert_eq!((c.usize("n").unwrap(), c.usize("w").unwrap(), c.usize_or("z", 7).unwrap()), (3, 4, 7));
        assert_eq!(
            (c.f64("n").unwrap(), c.f64_or("f", 0.0).unwrap(), c.opt_f64("z").unwrap()),
            (3.0, 1e-5, None)
        );
        assert_eq!((c.bool("b").unwrap(), c.bool_or("z", true).unwrap()), (true, true));
        assert_eq!(
            (c.str("s").unwrap(), c.str_or("z", "x").unwrap(), c.opt_str("q").unwrap()),
            ("silu", "x", None)
        );
        assert_eq!((c.usize_list("l").unwrap(), c.str_list("t").unwrap().len()), (vec![1, 2], 2));
        assert_eq!(c.opt_f64_list("fl").unwrap(), Some(vec![0.5, 1.0]));
        assert!(c.has("n") && !c.has("z") && !c.has("q"));
    }

    #[test]
    fn errors_name_file_key_and_value() {
        let c = config(json!({"n": -1, "s": 3, "l": [1, "x"], "o": {"k": "v"}}));
        assert_eq!(
            text(c.usize("n")),
            "unet/config.json: `n`: want a whole number from 0 to 2147483647; got -1"
        );
        assert_eq!(
            text(c.usize("absent")),
            "unet/config.json: `absent`: want a whole number from 0 to 2147483647; got nothing"
        );
        assert_eq!(text(c.str_or("s", "")), "unet/config.json: `s`: want a string; got 3");
        assert!(text(c.usize_list("l")).contains("got [1,\"x\"]"));
        assert!(text(c.bool_or("s", true)).contains("want true or false"));
        let o = c.section("o").unwrap().unwrap();
        assert_eq!(text(o.f64("k")), "unet/config.json: `o.k`: want a number; got \"v\"");
        assert!(c.section("absent").unwrap().is_none());
        assert!(c.section("s").is_err());
    }

    #[test]
    fn levels_take_a_number_or_a_list() {
        let c = config(json!({"a": 8, "b": [5, 10, 20], "x": "no", "f": [true, false, true]}));
        assert_eq!(c.per_level("a", 3).unwrap(), [8, 8, 8]);
        assert_eq!(c.per_level("b", 3).unwrap(), [5, 10, 20]);
        assert_eq!(c.per_level_or("z", 2, 1).unwrap(), [1, 1]);
        assert_eq!(c.bool_per_level_or("f", 3, false).unwrap(), [true, false, true]);
        assert_eq!(c.bool_per_level_or("g", 2, false).unwrap(), [false, false]);
        assert!(text(c.per_level("b", 4)).contains("a list of 4"));
        assert!(c.per_level("x", 3).is_err() && c.per_level("z", 3).is_err());
    }

    #[test]
    fn words_unknown_keys_and_neutral_values() {
        let c = config(json!({"_class_name": "UNet", "act_fn": "gelu", "norm_num_group": 32, "dual": true,
            "scale": 1, "none": null}));
        assert_eq!(c.one_of("absent", &["silu"], "silu").unwrap(), "silu");
        assert!(
            text(c.one_of("act_fn", &["silu", "swish"], "silu")).contains("one of silu, swish; got \"gelu\"")
        );
        let known = ["act_fn", "dual", "scale", "none", "norm_num_groups"];
        assert!(text(c.only(&known)).contains(
            "`norm_num_group`: want a key that the engine knows; did the writer mean `norm_num_groups`?"
        ));
        assert!(!text(c.only(&known[..4])).contains("mean"));
        c.only(&[&known[..], &["norm_num_group"]].concat()).unwrap();
        c.neutral("scale", &[1.0]).unwrap();
        c.neutral("none", &[false]).unwrap();
        c.neutral::<bool>("absent", &[]).unwrap();
        assert!(text(c.neutral("dual", &[false])).contains("want false or null"));
        assert!(text(c.neutral::<bool>("dual", &[])).contains("want null"));
    }

    #[test]
    fn files_that_are_not_json_objects_are_named() {
        let dir = Scratch::new("config");
        for (body, say) in [
            ("{\"a\": ", "not valid JSON"),
            ("[1]", "want a JSON object"),
            ("", "not valid JSON"),
            ("{\"a\": 1e999}", "not valid JSON"),
            ("\u{feff}{}", "not valid JSON"),
            ("{\"a\": NaNN}", "not valid JSON"),
        ] {
            let path = dir.file("c.json", body);
            let e = text(Config::read(&path));
            assert!(e.contains(say) && e.contains("c.json"), "{e}");
        }
        assert!(text(Config::read(dir.file("c.json", [0xff, 0xfe]))).contains("not text"));
        assert!(text(Config::read(dir.path().join("none.json"))).ends_with("none.json: not found"));
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(Config::read(dir.file("deep.json", deep)).is_err());
    }

    #[test]
    fn infinity_as_python_writes_it_is_no_error_until_it_is_used() {
        let dir = Scratch::new("config");
        let body =
            r#"{"lambda_min_clipped": -Infinity, "s": "NaN \" Infinity é", "n": [NaN, Infinity], "k\\": 1}"#;
        let c = Config::read(dir.file("c.json", body)).unwrap();
        c.neutral("lambda_min_clipped", &["-Infinity"]).unwrap();
        assert_eq!(c.str("s").unwrap(), "NaN \" Infinity é");
        assert!(c.opt_f64("lambda_min_clipped").is_err() && c.opt_f64_list("n").is_err());
        assert_eq!(c.usize("k\\").unwrap(), 1);
    }
}
