//! BERT's tokenizer and vocabularies: text cleaned, in lower case, split at white space and punctuation, and each word into the
//! longest pieces that the vocabulary has (`##` begins those inside a word), as transformers' `BertTokenizer` of 4.57 does.

use super::config::Config;
use super::texts::Texts;
use super::{atomic, vocabulary};
use crate::error::{Error, Result};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tokenizers::models::bpe::Vocab;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

/// The beginning of a piece inside a word.
pub(super) const INSIDE: &str = "##";
/// Tokens with a task, in the order of BERT's vocabularies: padding, unknown, begin, end, and one for training BERT.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Fewest tokens of a vocabulary that [`learn`] makes: those with a task, printable characters of ASCII in lower case, and
/// letters and digits inside a word.
pub const LEAST: usize = SPECIAL.len() + 68 + 36;

/// A tokenizer from `vocab.txt`, a token a line, and the flags of `tokenizer_config.json`.
pub(super) fn open(texts: &Texts, config: &Config, unk: &str) -> Result<tokenizers::Tokenizer> {
    let (path, text) = (texts.path("vocab.txt"), texts.text("vocab.txt")?);
    let mut vocab = Vocab::new();
    for (id, token) in text.lines().enumerate() {
        // Of a token that stands there twice the last line counts, as in transformers.
        vocab.insert(token.to_string(), id as u32);
    }
    if !vocab.contains_key(unk) {
        return Err(Error::file(&path, format!("the unk token {unk:?} is not in it")));
    }
    config.neutral("do_basic_tokenize", &[true])?;
    config.neutral::<bool>("never_split", &[])?;
    let normalizer = BertNormalizer::new(
        true,
        config.opt_bool("tokenize_chinese_chars")?.unwrap_or(true),
        config.opt_bool("strip_accents")?,
        config.opt_bool("do_lower_case")?.unwrap_or(true),
    );
    let model = WordPiece::builder()
        .vocab(vocab)
        .unk_token(unk.into())
        .build()
        .map_err(|e| Error::file(&path, format!("not BERT's vocabulary: {e}")))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(normalizer));
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    if tokenizer.token_to_id(SPECIAL[4]).is_some() {
        tokenizer.add_special_tokens(&[AddedToken::from(SPECIAL[4], true)]);
    }
    Ok(tokenizer)
}

/// The words of a text, without the white space around them.
fn words(text: &str) -> std::result::Result<Vec<String>, tokenizers::Error> {
    let mut text = NormalizedString::from(text);
    BertNormalizer::default().normalize(&mut text)?;
    let mut split = PreTokenizedString::from(text.get());
    BertPreTokenizer.pre_tokenize(&mut split)?;
    let words = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(words.into_iter().map(|(word, ..)| word.to_string()).collect())
}

/// Learns a vocabulary from captions: the characters that there are, and of the most frequent pairs of neighbouring pieces
/// as many as make `most` tokens (at least [`LEAST`]). The same captions make the same vocabulary, in any process.
///
/// # Errors
/// [`Error::Invalid`] when the captions cannot be split.
pub fn learn(captions: &[String], most: usize) -> Result<Vec<String>> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for caption in captions {
        let found =
            words(caption).map_err(|e| Error::invalid(format!("tokenizer: cannot be trained: {e}")))?;
        found.into_iter().for_each(|word| *counts.entry(word).or_default() += 1);
    }
    let ascii = ('!'..='~').filter(|c| !c.is_ascii_uppercase());
    let inside = ascii.clone().filter(char::is_ascii_alphanumeric);
    let first: BTreeSet<char> = ascii.chain(counts.keys().filter_map(|w| w.chars().next())).collect();
    let inside: BTreeSet<char> = inside.chain(counts.keys().flat_map(|w| w.chars().skip(1))).collect();
    let mut all: Vec<String> = SPECIAL.map(String::from).into();
    all.extend(first.iter().map(char::to_string));
    all.extend(inside.iter().map(|c| format!("{INSIDE}{c}")));
    let split = |word: &str| {
        let mark = |i| if i == 0 { "" } else { INSIDE };
        word.chars().enumerate().map(|(i, c)| format!("{}{c}", mark(i))).collect()
    };
    for (a, b) in vocabulary::merges(&counts, most.saturating_sub(all.len()), split, joined) {
        let piece = joined(&a, &b);
        if !all.contains(&piece) {
            all.push(piece);
        }
    }
    Ok(all)
}

/// Two pieces as one.
fn joined(a: &str, b: &str) -> String {
    format!("{a}{}", b.strip_prefix(INSIDE).unwrap_or(b))
}

/// Writes the files of a tokenizer for prompts of `length` tokens, begin and end counted, into a folder that is there; the one
/// that says that all are there last.
///
/// # Errors
/// [`Error::File`] when one cannot be written.
pub fn write(vocabulary: &[String], folder: &Path, length: usize) -> Result<()> {
    let [pad, unk, cls, sep, mask] = SPECIAL;
    let map =
        json!({"cls_token": cls, "mask_token": mask, "pad_token": pad, "sep_token": sep, "unk_token": unk});
    let mut config = map.clone();
    for (key, value) in [
        ("do_lower_case", json!(true)),
        ("model_max_length", json!(length)),
        ("strip_accents", json!(null)),
        ("tokenize_chinese_chars", json!(true)),
        ("tokenizer_class", json!("BertTokenizer")),
    ] {
        config[key] = value;
    }
    let texts = [
        ("vocab.txt", vocabulary.join("\n") + "\n"),
        ("special_tokens_map.json", map.to_string()),
        ("tokenizer_config.json", config.to_string()),
    ];
    texts.iter().try_for_each(|(name, text)| atomic::write(folder.join(name), text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Tokenizer;
    use crate::io::scratch::Scratch;

    #[test]
    fn ids_are_those_of_transformers() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let t = Tokenizer::open(golden.join("ldm-tiny/tokenizer")).unwrap();
        assert_eq!(t.max_length(), 512);
        let t = t.at_most(77);
        let all = Config::read(golden.join("bert_ids.json")).unwrap();
        let cases = all.get("cases").unwrap().as_array().unwrap();
        assert!(cases.len() >= 25);
        for case in cases {
            let case = Config::from_value("case", case.clone()).unwrap();
            let prompt = case.str("prompt").unwrap();
            let want: Vec<i32> = case.usize_list("ids").unwrap().iter().map(|&i| i as i32).collect();
            assert_eq!(t.encode(prompt).unwrap().ids, want, "{prompt:?}");
        }
    }

    fn captions() -> Vec<String> {
        let some = ["a red circle", "a blue circle above a red square", "a Größe, naïve"];
        some.iter().cycle().take(60).map(|s| s.to_string()).collect()
    }

    #[test]
    fn common_words_become_tokens_and_ascii_has_some() {
        let dir = Scratch::new("wordpiece");
        let learnt = learn(&captions(), 160).unwrap();
        assert_eq!(learnt, learn(&captions(), 160).unwrap());
        assert!(learnt.len() > LEAST && learnt.len() <= 160, "{}", learnt.len());
        assert_eq!(learn(&[], 200).unwrap().len(), LEAST);
        write(&learnt, dir.path(), 12).unwrap();
        let t = Tokenizer::open(dir.path()).unwrap();
        assert_eq!((t.pad(), t.bos(), t.eos(), t.max_length()), (0, 2, 3, 12));
        assert_eq!(t.vocab_size(), learnt.len());
        let id = |token: &str| learnt.iter().position(|t| t == token).unwrap() as i32;
        let encoded = t.encode("A red  CIRCLE, Größe").unwrap();
        let head = [2, id("a"), id("red"), id("circle"), id(","), id("große")];
        assert_eq!(encoded.ids[..6], head, "{learnt:?}");
        assert!(!encoded.ids.contains(&1) && encoded.cut.is_none());
        assert_eq!(t.encode("").unwrap().ids, [[2, 3].as_slice(), &[0; 10]].concat());
        let long = t.encode("a blue circle above a red square a blue circle zebra").unwrap();
        assert_eq!((long.cut.as_deref(), long.ids.len()), (Some("zebra"), 12), "{long:?}");
        assert!(t.encode("☃").unwrap().ids.contains(&1), "a character that no caption had");
        assert_eq!(t.encode("[SEP]").unwrap().ids[1], 3);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = Scratch::new("wordpiece");
        let refused = || Tokenizer::open(dir.path()).unwrap_err().to_string();
        dir.file("vocab.txt", "[PAD]\n[CLS]\n[SEP]\na\n");
        assert!(refused().contains("the unk token \"[UNK]\" is not in it"), "{}", refused());
        dir.file("vocab.txt", "[PAD]\n[UNK]\n[CLS]\na\n");
        assert!(refused().contains("its eos token \"[SEP]\" is not in its vocabulary"), "{}", refused());
        dir.file("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n");
        dir.file(
            "tokenizer_config.json",
            r#"{"tokenizer_class": "BertTokenizer", "do_basic_tokenize": false}"#,
        );
        assert!(refused().contains("`do_basic_tokenize`"), "{}", refused());
    }
}
