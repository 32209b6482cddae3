//! CLIP's own vocabulary, for checkpoints of Stable Diffusion that bring none: 49,408 tokens, from the merges that are built in
//! (`assets/clip` says where they come from).

use super::vocabulary::Vocabulary;
use flate2::read::GzDecoder;
use std::collections::BTreeMap;
use std::io::Read;

/// `merges.txt` as transformers has it, compressed: 48,894 lines.
const MERGES: &[u8] = include_bytes!("../../assets/clip/merges.txt.gz");
/// Length of CLIP's prompts, begin and end counted.
const LENGTH: usize = 77;

/// The files of a tokenizer's folder, by name: `vocab.json`, `merges.txt`, `special_tokens_map.json`, `tokenizer_config.json`.
/// Stable Diffusion 1.x fills up with `<|endoftext|>`, 2.x with `!`.
pub(crate) fn texts(pad: &str) -> BTreeMap<String, String> {
    let mut text = String::new();
    GzDecoder::new(MERGES).read_to_string(&mut text).expect("built in: a test reads it");
    // Below the line with the version.
    let pairs = text.lines().skip(1).filter_map(|line| line.split_once(' '));
    let vocabulary = Vocabulary::of(pairs.map(|(a, b)| (a.into(), b.into())).collect());
    vocabulary.texts(LENGTH, pad).into_iter().map(|(name, text)| (name.into(), text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::texts::Texts;
    use crate::io::vocabulary::EOS;
    use crate::io::{Config, Tokenizer};
    use std::path::Path;

    fn golden() -> Config {
        Config::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/clip_ids.json")).unwrap()
    }

    fn tokenizer(pad: &str) -> Tokenizer {
        Tokenizer::read(&Texts::held(Path::new("clip"), texts(pad).into())).unwrap()
    }

    /// Bytes and CRC-32, as the golden file has them.
    fn summary(text: &str) -> (usize, u64) {
        let mut crc = flate2::Crc::new();
        crc.update(text.as_bytes());
        (text.len(), crc.sum().into())
    }

    #[test]
    fn every_token_is_that_of_open_clip() {
        let all = texts(EOS);
        let ids: BTreeMap<String, usize> = serde_json::from_str(&all["vocab.json"]).unwrap();
        let by_id: BTreeMap<usize, &str> = ids.iter().map(|(token, id)| (*id, token.as_str())).collect();
        assert!(by_id.keys().copied().eq(0..49408));
        assert_eq!((ids["!"], ids["!</w>"], ids["<|startoftext|>"], ids[EOS]), (0, 256, 49406, 49407));
        let want = golden().section("vocabulary").unwrap().unwrap();
        let crc = |c: &Config| c.get("crc32").unwrap().as_u64().unwrap();
        let tokens: String = by_id.values().map(|token| format!("{token}\n")).collect();
        assert_eq!(summary(&tokens), (want.usize("bytes").unwrap(), crc(&want)));
        let want = want.section("merges").unwrap().unwrap();
        assert_eq!(summary(&all["merges.txt"]), (want.usize("bytes").unwrap(), crc(&want)));
    }

    /// Those of Stable Diffusion 1.x and 2.x, whose pad tokens differ.
    #[test]
    fn ids_are_those_of_transformers() {
        let (first, second) = (tokenizer(EOS), tokenizer("!"));
        for (t, pad) in [(&first, 49407), (&second, 0)] {
            assert_eq!((t.bos(), t.eos(), t.pad()), (49406, 49407, pad));
            assert_eq!((t.max_length(), t.vocab_size()), (77, 49408));
        }
        let golden = golden();
        let cases = golden.get("cases").unwrap().as_array().unwrap();
        let (mut others, mut agreed) = (0, 0);
        for case in cases {
            let case = Config::from_value("case", case.clone()).unwrap();
            let prompt = case.str("prompt").unwrap();
            let want = |key: &str, pad: i32| {
                let mut ids: Vec<i32> = case.usize_list(key).unwrap().iter().map(|&i| i as i32).collect();
                ids.resize(77, pad);
                ids
            };
            assert_eq!(first.encode(prompt).unwrap().ids, want("ids", 49407), "{prompt:?}");
            let key = if case.has("ids_pad") { "ids_pad" } else { "ids" };
            assert_eq!(second.encode(prompt).unwrap().ids, want(key, 0), "{prompt:?}");
            others += usize::from(case.has("ids_pad"));
            agreed += usize::from(!case.has("differ"));
        }
        // Of these, so many have the same ids by three tokenizers; `!` in a prompt is the pad token in 2.x.
        assert!(cases.len() >= 36 && agreed >= 30 && others >= 2, "{} {agreed} {others}", cases.len());
        let known = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407, 49407];
        let ids = first.encode("a photo of an astronaut riding a horse on mars").unwrap().ids;
        assert_eq!(ids[..13], known);
    }
}
