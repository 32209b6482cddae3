//! Folders of pictures, as the field lays them out.
//!
//! | layout | captions | classes |
//! |---|---|---|
//! | `metadata.jsonl`, a line `{"file_name": "0001.png", "text": "a red circle"}` per picture (Hugging Face's ImageFolder) | `text` | `label`, a number |
//! | `prompts.txt`, a line per picture in order of name | that line | |
//! | one folder per class, in order of name | `a.txt` beside `a.png` | rank of the folder |
//! | pictures alone | `a.txt` beside `a.png` | |

use crate::error::{Error, Result};
use crate::io::picture::{EXTENSIONS, is_picture};
use serde_json::Value;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// A picture of a folder, not read yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Item {
    /// Its file.
    pub path: PathBuf,
    /// What it shows; either all pictures of a folder have a caption or none.
    pub caption: Option<String>,
    /// Its class, from 0; either all pictures of a folder have one or none.
    pub class: Option<usize>,
}

/// A folder of pictures, in order of name (or of `metadata.jsonl`).
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    items: Vec<Item>,
    classes: Vec<String>,
}

/// More folders inside each other are a loop of links.
const MAX_DEPTH: usize = 32;

impl Folder {
    /// Lists a folder. Pictures are not read, only what is said of them. Names that start with a dot are left out.
    ///
    /// # Errors
    /// [`Error::File`] when the folder cannot be read or has no pictures; when pictures stand beside class folders; when
    /// some pictures have a caption or a class and others not; and, with the line, when `metadata.jsonl` or `prompts.txt`
    /// is malformed, or names a picture that is not there.
    pub fn open(path: impl AsRef<Path>) -> Result<Folder> {
        let path = path.as_ref();
        let metadata = path.join("metadata.jsonl");
        let prompts = path.join("prompts.txt");
        let (items, classes) = if metadata.is_file() {
            (read_metadata(path, &metadata)?, vec![])
        } else {
            let (mut items, classes) = walk(path)?;
            match prompts.is_file() {
                true => read_prompts(&prompts, &mut items)?,
                false => read_sidecars(&mut items)?,
            }
            (items, classes)
        };
        if items.is_empty() {
            let want = EXTENSIONS.join(", ");
            return Err(Error::file(
                path,
                format!("want a folder of pictures ({want}); there are none here"),
            ));
        }
        Ok(Folder { path: path.into(), items, classes })
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pictures, at least one.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Names of the class folders, in order of their numbers; empty where there are none.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read as UTF-8 text: {e}")))
}

/// All pictures below a folder, in order of path.
///
/// # Errors
/// [`Error::File`] when it cannot be listed.
pub fn pictures(root: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    Ok(find(root.as_ref())?.into_iter().map(|(_, path)| path).collect())
}

/// All pictures below a folder, each after the top folder that it lies in: those beside these folders come first.
fn find(root: &Path) -> Result<Vec<(Option<String>, PathBuf)>> {
    let mut found: Vec<(Option<String>, PathBuf)> = vec![];
    let mut waiting = vec![(root.to_path_buf(), None::<String>, 0)];
    while let Some((folder, class, depth)) = waiting.pop() {
        if depth > MAX_DEPTH {
            return Err(Error::file(&folder, format!("lies deeper than {MAX_DEPTH} folders; is it a link?")));
        }
        let failed = |e: std::io::Error| Error::file(&folder, format!("cannot be listed: {e}"));
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                waiting.push((path, class.clone().or(Some(name)), depth + 1));
            } else if is_picture(&path) {
                found.push((class.clone(), path));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// All pictures below a folder with the rank of the top folder that they lie in, and the names of these folders.
fn walk(root: &Path) -> Result<(Vec<Item>, Vec<String>)> {
    let found = find(root)?;
    let mut classes: Vec<String> = found.iter().filter_map(|(class, _)| class.clone()).collect();
    classes.dedup();
    if let (Some((None, path)), false) = (found.first(), classes.is_empty()) {
        let class = root.join(&classes[0]);
        let what = format!(
            "a picture beside the class folder {}; want all pictures in class folders, or none",
            class.display()
        );
        return Err(Error::file(path, what));
    }
    let item = |(class, path): (Option<String>, PathBuf)| {
        let class = class.and_then(|c| classes.binary_search(&c).ok());
        Item { path, caption: None, class }
    };
    Ok((found.into_iter().map(item).collect(), classes))
}

/// Captions from `a.txt` beside `a.png`: for all pictures, or for none.
fn read_sidecars(items: &mut [Item]) -> Result<()> {
    let sidecar = |item: &Item| item.path.with_extension("txt");
    let there = items.iter().filter(|i| sidecar(i).is_file()).count();
    if there == 0 {
        return Ok(());
    }
    for item in items {
        let path = sidecar(item);
        if !path.is_file() {
            let what = format!("has no caption; want it in {} ({there} others have one)", path.display());
            return Err(Error::file(&item.path, what));
        }
        item.caption = Some(read_text(&path)?.trim().into());
    }
    Ok(())
}

/// Captions from `prompts.txt`.
fn read_prompts(path: &Path, items: &mut [Item]) -> Result<()> {
    let text = read_text(path)?;
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    if lines.len() != items.len() {
        let what = format!("want a line for each of the {} pictures; got {}", items.len(), lines.len());
        return Err(Error::file(path, what));
    }
    items.iter_mut().zip(lines).for_each(|(item, line)| item.caption = Some(line.into()));
    Ok(())
}

/// Pictures, captions and classes from `metadata.jsonl`.
fn read_metadata(root: &Path, path: &Path) -> Result<Vec<Item>> {
    let text = read_text(path)?;
    let mut items: Vec<Item> = vec![];
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let bad = |what: String| Error::file(path, format!("line {}: {what}", i + 1));
        let value: Value = serde_json::from_str(line).map_err(|e| bad(format!("not JSON: {e}")))?;
        let Some(name) = value["file_name"].as_str() else {
            return Err(bad(format!("want a text `file_name`; got {}", value["file_name"])));
        };
        let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
        if !inside || name.is_empty() {
            return Err(bad(format!("want a file_name inside the folder; got `{name}`")));
        }
        let file = root.join(name);
        if !file.is_file() {
            return Err(bad(format!("{} is not there", file.display())));
        }
        let caption = match &value["text"] {
            Value::Null => None,
            Value::String(text) => Some(text.trim().to_string()),
            other => return Err(bad(format!("`text`: want a text; got {other}"))),
        };
        let class = match &value["label"] {
            Value::Null => None,
            other => match other.as_u64().and_then(|v| u32::try_from(v).ok()) {
                Some(class) => Some(class as usize),
                None => return Err(bad(format!("`label`: want the number of a class, from 0; got {other}"))),
            },
        };
        if let Some(first) = items.first() {
            let has = |there: bool| if there { "has one" } else { "has none" };
            for (key, a, b) in [
                ("text", first.caption.is_some(), caption.is_some()),
                ("label", first.class.is_some(), class.is_some()),
            ] {
                if a != b {
                    let (first, this) = (has(a), has(b));
                    return Err(bad(format!(
                        "`{key}`: {this}, while the first line {first}; want all or none"
                    )));
                }
            }
        }
        items.push(Item { path: file, caption, class });
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    fn listed(folder: &Folder) -> Vec<(String, Option<&str>, Option<usize>)> {
        let name = |i: &Item| i.path.strip_prefix(folder.path()).unwrap().display().to_string();
        folder.items().iter().map(|i| (name(i), i.caption.as_deref(), i.class)).collect()
    }

    #[test]
    fn class_folders_are_ranked_by_name() {
        let dir = Scratch::new("folder");
        for name in [
            "n02/b.JPG",
            "n01/z/a.webp",
            "n01/c.png",
            "n02/a.jpeg",
            "n03/note.md",
            ".git/a.png",
            "n01/._c.png",
        ] {
            dir.file(name, "");
        }
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(folder.classes(), ["n01", "n02"]);
        let want = [("n01/c.png", 0), ("n01/z/a.webp", 0), ("n02/a.jpeg", 1), ("n02/b.JPG", 1)];
        assert_eq!(listed(&folder), want.map(|(n, c)| (n.to_string(), None, Some(c))));
        dir.file("loose.png", "");
        let e = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("loose.png: a picture beside the class folder") && e.contains("n01"), "{e}");
    }

    #[test]
    fn captions_stand_beside_the_pictures_or_in_a_list() {
        let dir = Scratch::new("folder");
        dir.file("b.png", "");
        dir.file("a.png", "");
        assert_eq!(listed(&Folder::open(dir.path()).unwrap())[0], ("a.png".into(), None, None));
        dir.file("a.txt", "a cat\n");
        let e = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("b.png: has no caption; want it in") && e.contains("b.txt"), "{e}");
        dir.file("b.txt", "a dog");
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(
            listed(&folder),
            [("a.png".into(), Some("a cat"), None), ("b.png".into(), Some("a dog"), None)]
        );
        let list = dir.file("prompts.txt", "one\ntwo\n");
        assert_eq!(listed(&Folder::open(dir.path()).unwrap())[1].1, Some("two"));
        std::fs::write(list, "one\n").unwrap();
        let e = Folder::open(dir.path()).unwrap_err().to_string();
        assert!(e.contains("prompts.txt: want a line for each of the 2 pictures; got 1"), "{e}");
    }

    #[test]
    fn metadata_lists_pictures_captions_and_classes() {
        let dir = Scratch::new("folder");
        dir.file("in/b.png", "");
        dir.file("a.png", "");
        dir.file("unlisted.png", "");
        dir.file(
            "metadata.jsonl",
            "{\"file_name\": \"in/b.png\", \"text\": \"x \", \"label\": 3}\n\n{\"file_name\": \"a.png\", \"text\": \"y\", \
             \"label\": 0, \"more\": []}\n",
        );
        let folder = Folder::open(dir.path()).unwrap();
        assert_eq!(
            listed(&folder),
            [("in/b.png".into(), Some("x"), Some(3)), ("a.png".into(), Some("y"), Some(0))]
        );
        for (line, say) in [
            ("{", "not JSON"),
            ("[]", "want a text `file_name`; got null"),
            ("{\"file_name\": 3}", "want a text `file_name`; got 3"),
            ("{\"file_name\": \"../a.png\"}", "inside the folder; got `../a.png`"),
            ("{\"file_name\": \"/etc/passwd\"}", "inside the folder"),
            ("{\"file_name\": \"\"}", "inside the folder"),
            ("{\"file_name\": \"c.png\"}", "c.png is not there"),
            ("{\"file_name\": \"a.png\", \"text\": 5}", "`text`: want a text; got 5"),
            (
                "{\"file_name\": \"a.png\", \"text\": \"x\", \"label\": -1}",
                "`label`: want the number of a class",
            ),
            ("{\"file_name\": \"a.png\"}", "`text`: has none, while the first line has one"),
            (
                "{\"file_name\": \"a.png\", \"text\": \"\", \"label\": 1}",
                "`label`: has one, while the first line",
            ),
        ] {
            dir.file("metadata.jsonl", format!("{{\"file_name\": \"a.png\", \"text\": \"y\"}}\n{line}\n"));
            let e = Folder::open(dir.path()).unwrap_err().to_string();
            assert!(e.contains("metadata.jsonl: line 2: ") && e.contains(say), "{line}: {e}");
        }
    }

    #[test]
    fn a_folder_without_pictures_is_refused() {
        let dir = Scratch::new("folder");
        let text = |p: &Path| Folder::open(p).unwrap_err().to_string();
        assert!(
            text(dir.path())
                .contains("want a folder of pictures (jpeg, jpg, png, webp); there are none here")
        );
        assert!(text(&dir.path().join("none")).contains("cannot be listed"));
        dir.file("metadata.jsonl", "");
        assert!(text(dir.path()).contains("there are none here"));
        assert!(text(&dir.file("file.png", "")).contains("cannot be listed"));
    }
}
