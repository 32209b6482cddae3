//! A vocabulary for CLIP's tokenizer, learnt from captions: byte-level BPE with `</w>` at the end of a word, in the files that
//! [`Tokenizer::open`](super::Tokenizer::open) and transformers' `CLIPTokenizer` read.

use super::{atomic, tokenizer};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

/// CLIP's begin token.
const BOS: &str = "<|startoftext|>";
/// CLIP's end token.
pub(super) const EOS: &str = "<|endoftext|>";
/// Files that tokenizers of either kind may have; the one that says that all are there last.
const ALL: [&str; 7] = [
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
];

/// Tokens and merges, in the order of CLIP's own: bytes, bytes at the end of a word, what each merge makes, begin, end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vocabulary {
    /// Number of tokens.
    pub size: usize,
    words: Vec<String>,
    merges: Vec<(String, String)>,
}

/// Learns a vocabulary of at most `most` tokens (at least 514).
///
/// # Errors
/// [`Error::Invalid`] when the captions cannot be split.
pub fn learn(captions: &[String], most: usize) -> Result<Vocabulary> {
    let failed = |e: tokenizers::Error| Error::invalid(format!("tokenizer: cannot be trained: {e}"));
    let inner = tokenizer::around(BPE::default()).map_err(failed)?;
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for caption in captions {
        let mut text = NormalizedString::from(caption.as_str());
        inner.get_normalizer().map_or(Ok(()), |n| n.normalize(&mut text)).map_err(failed)?;
        let mut split = PreTokenizedString::from(text.get());
        inner.get_pre_tokenizer().map_or(Ok(()), |p| p.pre_tokenize(&mut split)).map_err(failed)?;
        for (word, ..) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            *counts.entry(word.to_string()).or_default() += 1;
        }
    }
    let mut words = bytes();
    let most_merges = most.saturating_sub(words.len() + 2);
    let merges = merges(&counts, most_merges, characters, |a, b| format!("{a}{b}"));
    for (a, b) in &merges {
        let word = format!("{a}{b}");
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words.extend([BOS.to_string(), EOS.to_string()]);
    Ok(Vocabulary { size: words.len(), words, merges })
}

/// The first tokens: a character for each byte, in CLIP's order (printable ones first), and the same at the end of a word.
fn bytes() -> Vec<String> {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let last = alphabet.iter().map(|c| format!("{c}{}", tokenizer::END));
    alphabet.iter().map(char::to_string).chain(last).collect()
}

/// A word as characters, the last of which ends it.
fn characters(word: &str) -> Vec<String> {
    let last = word.chars().count().saturating_sub(1);
    let end = |i| if i == last { tokenizer::END } else { "" };
    word.chars().enumerate().map(|(i, c)| format!("{c}{}", end(i))).collect()
}

/// Words are `split` into tokens; the most frequent pair of neighbours becomes a token, at most `most` times, while there is one that occurs twice (Sennrich
/// et al. 2016). Of equally frequent ones the pair that was known first is taken: the tokenizers crate's trainer goes by the
/// order of a hash map there, which is another in each process, and runs would not repeat.
pub(super) fn merges(
    words: &BTreeMap<String, u64>,
    most: usize,
    split: impl Fn(&str) -> Vec<String>,
    join: impl Fn(&str, &str) -> String,
) -> Vec<(String, String)> {
    let mut names: Vec<String> = vec![];
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let mut id = |name: String| {
        *known.entry(name.clone()).or_insert_with(|| {
            names.push(name);
            names.len() - 1
        })
    };
    let mut split: Vec<(Vec<usize>, u64)> =
        words.iter().map(|(word, &n)| (split(word).into_iter().map(&mut id).collect(), n)).collect();
    let mut found = vec![];
    for _ in 0..most {
        let mut pairs: BTreeMap<(usize, usize), u64> = BTreeMap::new();
        for (word, count) in &split {
            word.windows(2).for_each(|w| *pairs.entry((w[0], w[1])).or_default() += count);
        }
        // The first of the most frequent ones.
        let best = pairs.into_iter().fold(None, |best: Option<((usize, usize), u64)>, next| match best {
            Some(b) if b.1 >= next.1 => Some(b),
            _ => Some(next),
        });
        let Some(((a, b), 2..)) = best else { break };
        let (left, right) = (names[a].clone(), names[b].clone());
        let both = join(&left, &right);
        let made = match known.get(&both) {
            Some(&there) => there,
            None => {
                names.push(both.clone());
                known.insert(both, names.len() - 1);
                names.len() - 1
            }
        };
        for (word, _) in &mut split {
            let mut i = 0;
            while i + 1 < word.len() {
                if (word[i], word[i + 1]) == (a, b) {
                    word[i] = made;
                    word.remove(i + 1);
                }
                i += 1;
            }
        }
        found.push((left, right));
    }
    found
}

impl Vocabulary {
    /// The vocabulary of these merges, each of which makes a token that no other makes.
    pub(super) fn of(merges: Vec<(String, String)>) -> Vocabulary {
        let mut words = bytes();
        words.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        words.extend([BOS.to_string(), EOS.to_string()]);
        Vocabulary { size: words.len(), words, merges }
    }

    /// The files of a tokenizer for prompts of `length` tokens, begin and end counted, filled up with `pad`: name and text.
    pub(super) fn texts(&self, length: usize, pad: &str) -> [(&'static str, String); 4] {
        let ids: Map<String, Value> =
            self.words.iter().enumerate().map(|(i, w)| (w.clone(), json!(i))).collect();
        let merges: String = self.merges.iter().map(|(a, b)| format!("{a} {b}\n")).collect();
        let token = |content: &str| {
            json!({
                "content": content, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false,
            })
        };
        let special = |content: &str| {
            let mut token = token(content);
            token["special"] = json!(true);
            token
        };
        let [bos, eos] = [self.size.saturating_sub(2), self.size.saturating_sub(1)].map(|id| id.to_string());
        let mut added = Map::new();
        if let Some(id) = ids.get(pad).filter(|_| pad != EOS) {
            // As transformers has it for Stable Diffusion 2.x: found in the text as it was typed.
            let mut found = special(pad);
            found["normalized"] = json!(false);
            added.insert(id.to_string(), found);
        }
        added.insert(bos, special(BOS));
        added.insert(eos, special(EOS));
        let map = json!({"bos_token": token(BOS), "eos_token": token(EOS), "pad_token": pad, "unk_token": token(EOS)});
        let config = json!({
            "added_tokens_decoder": added,
            "bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS, "errors": "replace",
            "clean_up_tokenization_spaces": false, "model_max_length": length, "tokenizer_class": "CLIPTokenizer",
        });
        [
            ("vocab.json", Value::Object(ids).to_string()),
            ("merges.txt", format!("#version: 0.2\n{merges}")),
            ("special_tokens_map.json", map.to_string()),
            ("tokenizer_config.json", config.to_string()),
        ]
    }

    /// Writes the files of a tokenizer for prompts of `length` tokens, begin and end counted, into a folder that is there; the
    /// one that says that all are there last.
    ///
    /// # Errors
    /// [`Error::File`] when one cannot be written.
    pub fn write(&self, folder: &Path, length: usize) -> Result<()> {
        self.texts(length, EOS)
            .iter()
            .try_for_each(|(name, text)| atomic::write(folder.join(name), text.as_bytes()))
    }
}

/// Copies the files of a tokenizer.
///
/// # Errors
/// [`Error::File`] when one cannot be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let held: Vec<_> = ALL.iter().filter(|name| from.join(name).is_file()).collect();
    if !held.iter().any(|name| ["vocab.json", "vocab.txt", "tokenizer.json"].contains(name)) {
        return Err(Error::file(from, "want the files of a tokenizer; there is no vocabulary"));
    }
    held.into_iter().try_for_each(|name| {
        let path = from.join(name);
        let bytes = fs::read(&path).map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?;
        atomic::write(to.join(name), &bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Tokenizer;
    use crate::io::scratch::Scratch;

    /// Two runs with one seed have one vocabulary, in whatever process they are.
    #[test]
    fn of_equally_frequent_pairs_the_first_known_is_taken() {
        let words = ["wx", "ab", "yz", "cd", "abc"].map(|w| (w.to_string(), 2)).into();
        let found: Vec<String> = merges(&words, 9, characters, |a, b| format!("{a}{b}"))
            .into_iter()
            .map(|(a, b)| a + " " + &b)
            .collect();
        assert_eq!(found, ["a b</w>", "a b", "c d</w>", "w x</w>", "y z</w>", "ab c</w>"]);
        let once = [("ab".to_string(), 1)].into();
        assert_eq!(merges(&once, 9, characters, |a, b| format!("{a}{b}")), []);
    }

    #[test]
    fn common_words_become_tokens_and_all_text_has_some() {
        let captions: Vec<String> = ["a red circle", "a blue circle", "a red square"]
            .iter()
            .cycle()
            .take(60)
            .map(|s| s.to_string())
            .collect();
        let dir = Scratch::new("vocabulary");
        learn(&captions, 600).unwrap().write(dir.path(), 12).unwrap();
        let t = Tokenizer::open(dir.path()).unwrap();
        let encoded = t.encode("A red  CIRCLE").unwrap();
        assert_eq!((encoded.tokens, encoded.ids.len(), t.max_length()), (3, 12, 12));
        assert_eq!((encoded.ids[0], encoded.ids[4]), (t.bos(), t.eos()));
        assert_eq!(t.vocab_size(), t.eos() as usize + 1);
        assert!(t.vocab_size() > 514 && t.vocab_size() < 600);
        let other = t.encode("größer ☃").unwrap();
        assert!(other.tokens > 5 && !other.ids[1..6].contains(&t.eos()), "every byte has a token");
        assert_eq!(learn(&captions, 600).unwrap(), learn(&captions, 600).unwrap());
        assert_eq!(learn(&captions, 520).unwrap().size, 520);
        assert_eq!(learn(&[], 600).unwrap().size, 514);
    }
}
