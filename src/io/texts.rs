//! The small text files of a model's component: those of a folder on disk, or held in memory, where they came inside another
//! file. Whoever reads them need not know which, and errors name the place.

use super::config::Config;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where text files are read from. A clone shares what is held.
#[derive(Clone, Debug)]
pub(crate) enum Texts {
    /// The files of a folder.
    Folder(PathBuf),
    /// Those under `folder` among the texts that came with `file`.
    Held {
        /// What errors name.
        file: PathBuf,
        /// By path relative to the model, with `/`: `tokenizer/merges.txt`.
        all: Arc<BTreeMap<String, String>>,
        /// `tokenizer/`, or empty for the model itself.
        folder: String,
    },
}

impl Texts {
    /// The files of a folder. Whether it is there shows when one is read.
    pub(crate) fn folder(path: impl Into<PathBuf>) -> Texts {
        Texts::Folder(path.into())
    }

    /// Texts in memory, by path relative to the model (`tokenizer/merges.txt`); `file` is what they came with.
    pub(crate) fn held(file: &Path, texts: Arc<BTreeMap<String, String>>) -> Texts {
        Texts::Held { file: file.into(), all: texts, folder: String::new() }
    }

    /// Those of a folder inside.
    pub(crate) fn inner(&self, name: &str) -> Texts {
        match self {
            Texts::Folder(path) => Texts::Folder(path.join(name)),
            Texts::Held { file, all, folder } => {
                Texts::Held { file: file.clone(), all: all.clone(), folder: format!("{folder}{name}/") }
            }
        }
    }

    /// What errors call the folder: its path, or `model.safetensors:tokenizer`.
    pub(crate) fn place(&self) -> PathBuf {
        match self {
            Texts::Folder(path) => path.clone(),
            Texts::Held { file, folder, .. } if folder.is_empty() => file.clone(),
            Texts::Held { file, folder, .. } => inside(file, folder.trim_end_matches('/')),
        }
    }

    /// What errors call a file: its path, or `model.safetensors:tokenizer/merges.txt`.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match self {
            Texts::Folder(path) => path.join(name),
            Texts::Held { file, folder, .. } => inside(file, &format!("{folder}{name}")),
        }
    }

    /// Whether a file is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self {
            Texts::Folder(path) => path.join(name).is_file(),
            Texts::Held { .. } => self.get(name).is_ok(),
        }
    }

    /// A whole file.
    ///
    /// # Errors
    /// [`Error::File`] when it is missing, cannot be read, or is not UTF-8.
    pub(crate) fn text(&self, name: &str) -> Result<String> {
        match self {
            Texts::Folder(path) => {
                let path = path.join(name);
                std::fs::read_to_string(&path).map_err(|e| Error::file(&path, format!("cannot be read: {e}")))
            }
            Texts::Held { .. } => self.get(name).map(str::to_owned),
        }
    }

    /// A file that holds one JSON object.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub(crate) fn config(&self, name: &str) -> Result<Config> {
        match self {
            Texts::Folder(path) => Config::read(path.join(name)),
            Texts::Held { .. } => Config::parse(self.path(name), self.get(name)?),
        }
    }

    /// A text that is held.
    fn get(&self, name: &str) -> Result<&str> {
        let found = match self {
            Texts::Folder(_) => None,
            Texts::Held { all, folder, .. } => all.get(&format!("{folder}{name}")),
        };
        found.map(String::as_str).ok_or_else(|| Error::file(self.path(name), "not found"))
    }
}

/// `model.safetensors:tokenizer/merges.txt`.
fn inside(file: &Path, name: &str) -> PathBuf {
    let mut whole = file.as_os_str().to_owned();
    whole.push(":");
    whole.push(name);
    whole.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    /// The same three files, on disk and in memory.
    fn both(dir: &Scratch) -> [Texts; 2] {
        let files = [
            ("model_index.json", "{\"a\": -Infinity}"),
            ("tokenizer/merges.txt", "a b\n"),
            ("bad/config.json", "[1]"),
        ];
        files.iter().for_each(|(name, text)| drop(dir.file(name, text)));
        let all = files.map(|(name, text)| (name.to_string(), text.to_string())).into();
        [Texts::folder(dir.path()), Texts::held(Path::new("models/m.safetensors"), Arc::new(all))]
    }

    #[test]
    fn a_folder_and_what_is_held_are_read_alike() {
        let dir = Scratch::new("texts");
        for texts in both(&dir) {
            assert_eq!(texts.config("model_index.json").unwrap().str("a").unwrap(), "-Infinity");
            assert_eq!(texts.text("tokenizer/merges.txt").unwrap(), "a b\n");
            let inner = texts.inner("tokenizer");
            assert_eq!(inner.text("merges.txt").unwrap(), "a b\n");
            assert!(inner.has("merges.txt") && texts.has("tokenizer/merges.txt"));
            assert!(!inner.has("model_index.json") && !texts.has("tokenizer") && !texts.has("merges.txt"));
            assert_eq!(inner.path("merges.txt"), texts.path("tokenizer/merges.txt"));
            let object = texts.inner("bad").config("config.json").unwrap_err().to_string();
            assert!(object.ends_with("config.json: want a JSON object {…}; got [1]"), "{object}");
            assert!(inner.config("merges.txt").unwrap_err().to_string().contains("not valid JSON"));
        }
    }

    #[test]
    fn errors_name_the_place() {
        let dir = Scratch::new("texts");
        let [folder, held] = both(&dir);
        assert_eq!(folder.inner("tokenizer").place(), dir.path().join("tokenizer"));
        assert_eq!(held.place(), Path::new("models/m.safetensors"));
        assert_eq!(held.inner("tokenizer").place(), Path::new("models/m.safetensors:tokenizer"));
        assert_eq!(held.inner("a").inner("b").path("c"), Path::new("models/m.safetensors:a/b/c"));
        let want = "models/m.safetensors:tokenizer/vocab.json: not found";
        let inner = held.inner("tokenizer");
        assert_eq!(inner.text("vocab.json").unwrap_err().to_string(), want);
        assert_eq!(inner.config("vocab.json").unwrap_err().to_string(), want);
        let missing = folder.text("none.txt").unwrap_err().to_string();
        assert!(missing.contains("none.txt: cannot be read: "), "{missing}");
        assert!(folder.config("none.json").unwrap_err().to_string().ends_with("none.json: not found"));
        dir.file("bytes.txt", [0xff, 0xfe]);
        assert!(folder.text("bytes.txt").unwrap_err().to_string().contains("bytes.txt: cannot be read"));
    }
}
