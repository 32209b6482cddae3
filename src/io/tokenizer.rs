//! Text to the ids that a text encoder takes, the same as transformers gives. BERT's tokenizer is in `wordpiece`. CLIP's, that of
//! Stable Diffusion (`CLIPTokenizerFast` of 4.57): NFC, white space collapsed, lower case, split into words, numbers digit by digit and
//! punctuation, then byte-level BPE with `</w>` at the end of a word.

use super::config::Config;
use super::texts::Texts;
use super::wordpiece;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, NormalizerWrapper, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// What CLIP splits a text into: English endings, words, single digits, runs of everything else.
const PIECES: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Longest input of CLIP's text encoder, for folders that do not say.
const MAX_LENGTH: usize = 77;
/// The end of a word.
pub(super) const END: &str = "</w>";

/// A prompt as the text encoder takes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Encoded {
    /// Shape (T): the begin token, the prompt, the end token, then the pad token up to [`Tokenizer::max_length`].
    pub ids: Vec<i32>,
    /// What did not fit, if anything: the text from the first token that was cut off.
    pub cut: Option<String>,
    /// Tokens of the whole prompt, without begin and end, with those that were cut off.
    pub tokens: usize,
}

/// A tokenizer of CLIP's or BERT's kind. Threads may share it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Where it was read from, for errors.
    place: PathBuf,
    max_length: usize,
    bos: i32,
    eos: i32,
    pad: i32,
    /// Tokens are BERT's: [`wordpiece`].
    bert: bool,
}

impl Tokenizer {
    /// Reads a tokenizer's folder: of CLIP's kind with `tokenizer.json`, or `vocab.json` and `merges.txt`; of BERT's with
    /// `vocab.txt`; and, where they are there,
    /// `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
    ///
    /// # Errors
    /// [`Error::File`] when a file is missing, damaged, or those of another kind; [`Error::Config`] for a value that
    /// is not understood.
    pub fn open(folder: impl AsRef<Path>) -> Result<Tokenizer> {
        Tokenizer::read(&Texts::folder(folder.as_ref()))
    }

    /// The same from the files wherever they are.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub(crate) fn read(texts: &Texts) -> Result<Tokenizer> {
        let place = texts.place();
        let config = read_or_empty(texts, "tokenizer_config.json")?;
        let known = ["CLIPTokenizer", "CLIPTokenizerFast", "BertTokenizer", "BertTokenizerFast"];
        let has = |name: &str| texts.has(name);
        let bert = match config.opt_str("tokenizer_class")? {
            Some(class) => config.one_of("tokenizer_class", &known, class)?.starts_with("Bert"),
            None => has("vocab.txt") && !has("vocab.json") && !has("tokenizer.json"),
        };
        let roles = Roles::read(texts, &config, bert)?;
        let mut inner = match bert {
            true => wordpiece::open(texts, &config, &roles.unk)?,
            false if has("tokenizer.json") => from_json(texts)?,
            false => from_vocabulary(texts, &roles.unk)?,
        };
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(&place, e))?;
        add_tokens(&mut inner, texts, &config, &roles)?;

        let id = |role: &str, token: &str| {
            let found = inner.token_to_id(token).and_then(|id| i32::try_from(id).ok());
            found.ok_or_else(|| {
                Error::file(&place, format!("its {role} token {token:?} is not in its vocabulary"))
            })
        };
        let (bos, eos, pad) = (id("bos", &roles.bos)?, id("eos", &roles.eos)?, id("pad", &roles.pad)?);
        Ok(Tokenizer { place, max_length: max_length(&config)?, bos, eos, pad, inner, bert })
    }

    /// Prompts of at most so many tokens, for an encoder that takes no more than that (BERT's tokenizers say 512).
    pub fn at_most(self, length: usize) -> Tokenizer {
        Tokenizer { max_length: self.max_length.min(length.max(3)), ..self }
    }

    /// Length of every encoded prompt: T, 77 for CLIP.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The begin token.
    pub fn bos(&self) -> i32 {
        self.bos
    }

    /// The end token; the text encoder's summary of the prompt stands at the first of them.
    pub fn eos(&self) -> i32 {
        self.eos
    }

    /// The pad token: often the end token, `!` (0) in Stable Diffusion 2.
    pub fn pad(&self) -> i32 {
        self.pad
    }

    /// Number of ids: one more than the greatest. The text encoder's table must have at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    /// The ids of a prompt. A prompt that is too long is cut; [`Encoded::cut`] says what is lost.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the tokenizer's own rules fail on the prompt.
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        let failed =
            |e| Error::invalid(format!("prompt: the tokenizer in {} fails: {e}", self.place.display()));
        let encoding = self.inner.encode_fast(prompt, false).map_err(failed)?;
        let all = encoding.get_ids();
        let room = self.max_length - 2;
        let (kept, lost) = all.split_at(all.len().min(room));
        let mut ids = Vec::with_capacity(self.max_length);
        ids.push(self.bos);
        // Ids fit: `from_vocabulary` and `from_json` have checked the vocabulary.
        ids.extend(kept.iter().map(|&id| id as i32));
        ids.push(self.eos);
        ids.resize(self.max_length, self.pad);
        let cut = (!lost.is_empty()).then(|| self.text(lost));
        Ok(Encoded { ids, cut, tokens: all.len() })
    }

    /// The text of some ids. Half a character, where a prompt was cut inside one, becomes U+FFFD.
    fn text(&self, ids: &[u32]) -> String {
        let tokens = ids.iter().filter_map(|&id| self.inner.id_to_token(id));
        if self.bert {
            let spelled = tokens.map(|t| match t.strip_prefix(wordpiece::INSIDE) {
                Some(inside) => inside.to_string(),
                None => format!(" {t}"),
            });
            return spelled.collect::<String>().trim().to_owned();
        }
        let mut bytes = Vec::new();
        for token in tokens {
            let (stem, space) = match token.strip_suffix(END) {
                Some(stem) => (stem, " "),
                None => (token.as_str(), ""),
            };
            match stem.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(spelled) => bytes.extend(spelled),
                None => bytes.extend(stem.as_bytes()),
            }
            bytes.extend(space.as_bytes());
        }
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

/// The byte that a character of a byte-level vocabulary stands for. Printable Latin-1 stands for itself; the 68 other
/// bytes, in order, have the characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ 0..=0xff => u8::try_from(code).ok().filter(|&b| printable(b)),
        code => (0..=u8::MAX).filter(|&b| !printable(b)).nth(code as usize - 0x100),
    }
}

/// The tokens with a task.
struct Roles {
    bos: String,
    eos: String,
    unk: String,
    pad: String,
    /// As they are written in the files: a string, or an object with the rules by which they match.
    written: Vec<Value>,
    /// Those of BERT match the text as it was typed.
    bert: bool,
}

impl Roles {
    /// A file with `added_tokens_decoder` is complete; an older one is overruled by `special_tokens_map.json`.
    fn read(texts: &Texts, config: &Config, bert: bool) -> Result<Roles> {
        let map = read_or_empty(texts, "special_tokens_map.json")?;
        let order = if config.has("added_tokens_decoder") { [config, &map] } else { [&map, config] };
        let mut written = Vec::new();
        let mut role = |key: &str, default: &str| -> Result<String> {
            let Some(from) = order.iter().find(|c| c.has(key)) else {
                written.push(json!(default));
                return Ok(default.to_owned());
            };
            let value = from.get(key).unwrap_or(&Value::Null);
            let content = value.as_str().or_else(|| value.get("content")?.as_str());
            written.push(value.clone());
            content
                .map(str::to_owned)
                .ok_or_else(|| from.error(key, "a token: a string, or an object with `content`"))
        };
        let (begin, end) = ("<|startoftext|>", "<|endoftext|>");
        let names = match bert {
            true => [("cls", "[CLS]"), ("sep", "[SEP]"), ("unk", "[UNK]"), ("pad", "[PAD]")],
            false => [("bos", begin), ("eos", end), ("unk", end), ("pad", end)],
        };
        let [bos, eos, unk, pad] = names.map(|(name, default)| role(&format!("{name}_token"), default));
        Ok(Roles { bos: bos?, eos: eos?, unk: unk?, pad: pad?, written, bert })
    }
}

fn read_or_empty(texts: &Texts, name: &str) -> Result<Config> {
    if texts.has(name) { texts.config(name) } else { Config::from_value(texts.path(name), json!({})) }
}

/// Absent, or far beyond any encoder (transformers writes 10^30 for "no limit"), means CLIP's own.
fn max_length(config: &Config) -> Result<usize> {
    match config.opt_f64("model_max_length")? {
        None => Ok(MAX_LENGTH),
        Some(n) if n > 1e6 => Ok(MAX_LENGTH),
        Some(n) if n >= 3.0 && n.fract() == 0.0 => Ok(n as usize),
        Some(_) => Err(config.error("model_max_length", "a whole number of at least 3")),
    }
}

fn from_json(texts: &Texts) -> Result<tokenizers::Tokenizer> {
    let (path, text) = (texts.path("tokenizer.json"), texts.text("tokenizer.json")?);
    let tokenizer = tokenizers::Tokenizer::from_bytes(&text)
        .map_err(|e| Error::file(&path, format!("not a tokenizer: {e}; download it again")))?;
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) if bpe.end_of_word_suffix.as_deref() == Some(END) => {}
        _ => {
            return Err(Error::file(
                &path,
                format!("want CLIP's byte-level BPE with {END:?}; got another tokenizer"),
            ));
        }
    }
    // `encode` hands ids out as i32.
    if tokenizer.get_vocab(true).values().any(|&id| i32::try_from(id).is_err()) {
        return Err(Error::file(&path, "its vocabulary has an id above 2^31 - 1"));
    }
    Ok(tokenizer)
}

fn from_vocabulary(texts: &Texts, unk: &str) -> Result<tokenizers::Tokenizer> {
    let (vocab_path, merges_path) = (texts.path("vocab.json"), texts.path("merges.txt"));
    if !texts.has("vocab.json") {
        return Err(Error::file(
            texts.place(),
            "holds no tokenizer: want tokenizer.json, or vocab.json and merges.txt, or BERT's vocab.txt; download the folder",
        ));
    }
    let words = texts.config("vocab.json")?;
    let id = |token: &str| match words.usize(token) {
        Ok(id) if i32::try_from(id).is_ok() => Ok((token.to_owned(), id as u32)),
        _ => Err(words.error(token, "an id from 0 to 2^31 - 1")),
    };
    let vocab: Vocab = words.keys().map(id).collect::<Result<_>>()?;
    if !vocab.contains_key(unk) {
        return Err(Error::file(&vocab_path, format!("the unk token {unk:?} is not in it")));
    }
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges(&merges_path, &texts.text("merges.txt")?)?)
        .unk_token(unk.into())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix(END.into())
        .build()
        .map_err(|e| {
            Error::file(&merges_path, format!("does not go with vocab.json: {e}; download both again"))
        })?;
    around(bpe).map_err(|e| Error::file(texts.place(), e))
}

/// A model with CLIP's rules for the text in front of it.
pub(super) fn around(bpe: BPE) -> std::result::Result<tokenizers::Tokenizer, tokenizers::Error> {
    let space = tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into());
    let normalizers: Vec<NormalizerWrapper> =
        vec![NFC.into(), Replace::new(space, " ")?.into(), Lowercase.into()];
    let split = Split::new(SplitPattern::Regex(PIECES.into()), SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers)));
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![split.into(), bytes.into()])));
    Ok(tokenizer)
}

fn merges(path: &Path, text: &str) -> Result<Merges> {
    let mut all = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if (i == 0 && line.starts_with("#version")) || line.trim().is_empty() {
            continue;
        }
        match line.trim_end().split_once(' ') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() && !b.contains(' ') => {
                all.push((a.into(), b.into()))
            }
            _ => return Err(Error::file(path, format!("line {}: want two parts; got {line:?}", i + 1))),
        }
    }
    Ok(all)
}

/// Tokens that are found in the text before it is split: begin, end and pad, and what a fine-tune has added.
fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    texts: &Texts,
    config: &Config,
    roles: &Roles,
) -> Result<()> {
    let mut wanted: Vec<(usize, AddedToken, Config)> = Vec::new();
    if let Some(listed) = config.section("added_tokens_decoder")? {
        for key in listed.keys() {
            let (Ok(id), Some(value)) = (key.parse(), listed.get(key)) else {
                return Err(listed.error(key, "an id as key, and a token"));
            };
            let Some(token) = token(value, true) else {
                return Err(listed.error(key, "a token with `content`"));
            };
            wanted.push((id, token, listed.clone()));
        }
    }
    if wanted.is_empty() && texts.has("added_tokens.json") {
        let listed = texts.config("added_tokens.json")?;
        for key in listed.keys() {
            let special = roles.written.iter().any(|v| token(v, false).is_some_and(|t| t.content == key));
            wanted.push((listed.usize(key)?, AddedToken::from(key, special), listed.clone()));
        }
    }
    // In order of their ids: one that is new gets the next free id, which must then be its own.
    wanted.sort_by_key(|(id, ..)| *id);
    for (id, token, from) in wanted {
        let content = token.content.clone();
        tokenizer.add_tokens(&[token]);
        if tokenizer.token_to_id(&content).map(|n| n as usize) != Some(id) {
            let want = format!("an id that follows the vocabulary for the added token {content:?}");
            return Err(from.error(&id.to_string(), want));
        }
    }
    let known: Vec<String> = tokenizer.get_added_tokens_decoder().into_values().map(|t| t.content).collect();
    // The last is the pad token: it alone matches the text as it was typed. A token that the vocabulary lacks would
    // get an id made up for it; `open` reports it instead.
    let rest: Vec<AddedToken> = (roles.written.iter().enumerate())
        .filter_map(|(i, v)| token(v, i < 3 && !roles.bert))
        .filter(|t| !known.contains(&t.content) && tokenizer.token_to_id(&t.content).is_some())
        .collect();
    tokenizer.add_special_tokens(&rest);
    Ok(())
}

/// A token with the rules by which it matches, from a string or an object.
fn token(value: &Value, normalized: bool) -> Option<AddedToken> {
    let flag = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
    let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
    let token = AddedToken::from(content, flag("special", true))
        .single_word(flag("single_word", false))
        .lstrip(flag("lstrip", false))
        .rstrip(flag("rstrip", false))
        .normalized(flag("normalized", normalized));
    Some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    fn cases() -> Vec<Config> {
        let all = Config::read(golden("tokenizer_ids.json")).unwrap();
        let cases = all.get("cases").unwrap().as_array().unwrap();
        cases.iter().map(|c| Config::from_value("case", c.clone()).unwrap()).collect()
    }

    /// The golden folder, with some files changed.
    fn copy(change: impl Fn(&str, &mut Value)) -> Scratch {
        let dir = Scratch::new("tokenizer");
        for name in ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"] {
            let mut bytes = std::fs::read(golden("tokenizer").join(name)).unwrap();
            if name.ends_with(".json") {
                let mut value = serde_json::from_slice(&bytes).unwrap();
                change(name, &mut value);
                bytes = value.to_string().into();
            }
            dir.file(name, bytes);
        }
        dir
    }

    fn refused(dir: &Scratch) -> String {
        let e = Tokenizer::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains(dir.path().to_str().unwrap()), "{e}");
        e
    }

    fn matches(t: &Tokenizer, ids: &str) {
        for case in cases() {
            let prompt = case.str("prompt").unwrap();
            let got = t.encode(prompt).unwrap();
            let want: Vec<i32> = case.usize_list(ids).unwrap().iter().map(|&i| i as i32).collect();
            assert_eq!(got.ids, want, "{prompt:?}");
            if ids == "ids" {
                assert_eq!(got.cut.as_deref(), case.opt_str("cut").unwrap(), "{prompt:?}");
                assert_eq!(got.tokens, case.usize("tokens").unwrap(), "{prompt:?}");
            }
        }
    }

    #[test]
    fn ids_are_those_of_transformers() {
        assert!(cases().len() >= 15);
        for folder in ["tokenizer", "tokenizer-fast"] {
            let t = Tokenizer::open(golden(folder)).unwrap();
            assert_eq!(
                (t.max_length(), t.bos(), t.eos(), t.pad(), t.vocab_size()),
                (77, 998, 999, 999, 1000)
            );
            matches(&t, "ids");
        }
    }

    #[test]
    fn files_in_memory_give_the_same_tokenizer() {
        for folder in ["tokenizer", "tokenizer-fast"] {
            let files = std::fs::read_dir(golden(folder)).unwrap().map(|f| f.unwrap().path());
            let all = files.map(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                (format!("tokenizer/{name}"), std::fs::read_to_string(&path).unwrap())
            });
            let held = Texts::held(Path::new("m.safetensors"), std::sync::Arc::new(all.collect()));
            matches(&Tokenizer::read(&held.inner("tokenizer")).unwrap(), "ids");
            let e = Tokenizer::read(&held.inner("text")).unwrap_err().to_string();
            assert!(e.starts_with("m.safetensors:text: holds no tokenizer"), "{e}");
        }
        let texts = [("vocab.json", r#"{"<|endoftext|>": 0}"#), ("merges.txt", "a\n")];
        let texts = texts.map(|(name, text)| (name.to_string(), text.to_string())).into();
        let e = Tokenizer::read(&Texts::held(Path::new("m.safetensors"), std::sync::Arc::new(texts)));
        let want = "m.safetensors:merges.txt: line 1: want two parts; got \"a\"";
        assert_eq!(e.unwrap_err().to_string(), want);
    }

    #[test]
    fn another_pad_token_is_used_and_found_in_the_text() {
        let dir = copy(|name, v| {
            if name != "vocab.json" {
                v["pad_token"] = "!".into();
            }
        });
        let t = Tokenizer::open(dir.path()).unwrap();
        assert_eq!((t.pad(), t.eos()), (0, 999));
        matches(&t, "ids_pad");
    }

    #[test]
    fn folders_of_older_versions_are_read() {
        // The map of special tokens overrules a configuration without `added_tokens_decoder`.
        let dir = copy(|name, v| match name {
            "tokenizer_config.json" => *v = json!({"pad_token": "<|endoftext|>", "model_max_length": 1e30}),
            "special_tokens_map.json" => v["pad_token"] = "!".into(),
            _ => {}
        });
        let t = Tokenizer::open(dir.path()).unwrap();
        assert_eq!((t.pad(), t.max_length()), (0, 77));
        matches(&t, "ids_pad");
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
        matches(&Tokenizer::open(dir.path()).unwrap(), "ids");

        dir.file("added_tokens.json", r#"{"<cat-toy>": 1000, "<dog>": 1001}"#);
        let t = Tokenizer::open(dir.path()).unwrap();
        assert_eq!(t.encode("a <dog> b").unwrap().ids[1..4], [320, 1001, 321]);
        assert_eq!(t.vocab_size(), 1002);
        dir.file("added_tokens.json", r#"{"<cat-toy>": 2000}"#);
        assert!(refused(&dir).contains("<cat-toy>"));
    }

    #[test]
    fn a_short_encoder_is_filled_to_its_length() {
        let dir = copy(|name, v| {
            if name == "tokenizer_config.json" {
                v["model_max_length"] = 4.into();
            }
        });
        let got = Tokenizer::open(dir.path()).unwrap().encode("a b c").unwrap();
        assert_eq!(got, Encoded { ids: vec![998, 320, 321, 999], cut: Some("c".into()), tokens: 3 });
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let change = |file: &'static str, key: &'static str, value: Value| {
            refused(&copy(move |name, v| {
                if name == file {
                    v[key] = value.clone();
                }
            }))
        };
        assert!(
            change("tokenizer_config.json", "tokenizer_class", json!("T5Tokenizer"))
                .contains("CLIPTokenizer, CLIPTokenizerFast, BertTokenizer")
        );
        assert!(change("tokenizer_config.json", "model_max_length", json!(2)).contains("at least 3"));
        assert!(change("tokenizer_config.json", "bos_token", json!(7)).contains("`bos_token`: want a token"));
        assert!(
            change("tokenizer_config.json", "pad_token", json!("<none>")).contains("pad token \"<none>\"")
        );
        assert!(
            change("tokenizer_config.json", "unk_token", json!("<none>")).contains("unk token \"<none>\"")
        );
        assert!(change("vocab.json", "a</w>", json!("x")).contains("`a</w>`: want an id"));
        assert!(change("vocab.json", "a</w>", json!(1u64 << 31)).contains("want an id"));

        let dir = copy(|_, _| {});
        dir.file("merges.txt", "#version: 0.2\na b c\n");
        assert!(refused(&dir).contains("line 2: want two parts; got \"a b c\""));
        dir.file("merges.txt", "zzz yyy\n");
        assert!(refused(&dir).contains("does not go with vocab.json"));
        std::fs::remove_file(dir.path().join("merges.txt")).unwrap();
        assert!(refused(&dir).contains("merges.txt: cannot be read"));
        std::fs::remove_file(dir.path().join("vocab.json")).unwrap();
        assert!(refused(&dir).contains("holds no tokenizer"));
        dir.file("tokenizer.json", "{\"version\"");
        assert!(refused(&dir).contains("not a tokenizer"));
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut seen: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        assert_eq!((byte_of('Ġ'), byte_of('a'), byte_of(' ')), (Some(b' '), Some(b'a'), None));
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
    }
}
