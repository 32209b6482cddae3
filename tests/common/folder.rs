//! Copies of a golden checkpoint that a test may damage.
#![allow(dead_code)]

use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, process};

/// Where the golden files are.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A folder for one test, removed when the test ends.
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one.
    pub fn new() -> Folder {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("ldm-test-{}-{n}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// One with a copy of the smallest Stable Diffusion checkpoint under `model`.
    pub fn with_model() -> Folder {
        let folder = Folder::new();
        copy(&golden("sd15-tiny"), &folder.0.join("model"));
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file anew: never through a link to the original.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        let _ = fs::remove_file(&path);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Changes a JSON file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let mut value: Value = serde_json::from_slice(&fs::read(self.path(name)).unwrap()).unwrap();
        change(value.as_object_mut().unwrap());
        self.write(name, value.to_string());
    }

    /// Changes header and data of a safetensors file.
    pub fn edit_tensors(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
        let (mut header, mut data) = tensors(&self.path(name));
        change(&mut header, &mut data);
        self.write(name, joined(&Value::Object(header).to_string(), &data));
    }

    /// Fills a tensor of a safetensors file with one value.
    pub fn fill(&self, name: &str, tensor: &str, value: f32) {
        self.edit_tensors(name, |header, data| {
            let at = |i: usize| header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
            data[at(0)..at(1)].chunks_mut(4).for_each(|v| v.copy_from_slice(&value.to_le_bytes()));
        });
    }

    /// Every file and folder with its contents, to see that nothing has changed.
    pub fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = vec![];
        let mut rest = vec![self.0.clone()];
        while let Some(dir) = rest.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                // A folder, or a link that leads nowhere, has none.
                let bytes = fs::read(&path).unwrap_or_default();
                if path.is_dir() {
                    rest.push(path.clone());
                }
                all.push((path, bytes));
            }
        }
        all.sort();
        all
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        match path.is_dir() {
            true => copy(&path, &to),
            // Tests replace files and never write into them: a link does, where the two are on one disk.
            false if fs::hard_link(&path, &to).is_ok() => {}
            false => drop(fs::copy(&path, &to).unwrap()),
        }
    }
}

/// Header and data of a safetensors file.
pub fn tensors(path: &Path) -> (Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    (header.as_object().unwrap().clone(), bytes[8 + n..].to_vec())
}

/// A safetensors file of its parts, right or wrong.
pub fn joined(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Takes a tensor out of header and data, so that the file stays well formed.
pub fn remove(header: &mut Map<String, Value>, data: &mut Vec<u8>, name: &str) {
    let gone = header.remove(name).unwrap();
    let at = |v: &Value, i: usize| v["data_offsets"][i].as_u64().unwrap() as usize;
    let (start, end) = (at(&gone, 0), at(&gone, 1));
    data.drain(start..end);
    for (_, entry) in header.iter_mut().filter(|(name, e)| *name != "__metadata__" && at(e, 0) >= end) {
        entry["data_offsets"] = json!([at(entry, 0) + start - end, at(entry, 1) + start - end]);
    }
}
