//! What a run leaves on the disk: its settings, checkpoints, metrics. Each file is whole at every moment.

use crate::error::{Error, Result};
use crate::io::events::Events;
use crate::io::{Checkpoint, atomic, weights};
use crate::tensor::HostTensor;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Settings that may change when a run goes on.
const FREE: &[&str] = &["steps", "checkpoint", "sample", "log_every", "export"];

/// The folder of a run, locked as long as this lives.
pub(super) struct Store {
    path: PathBuf,
    newest: usize,
    metrics: File,
    /// Once the run has begun.
    events: Option<Events>,
    _lock: File,
}

/// A checkpoint that is there.
struct Kept {
    step: usize,
    loss: f64,
    path: PathBuf,
}

/// The checkpoints of a run, by step.
fn checkpoints(run: &Path) -> Vec<Kept> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return vec![] };
    let mut all: Vec<Kept> = entries
        .filter_map(|e| {
            let path = e.ok()?.path();
            let name = path.file_name()?.to_str()?;
            let step = name.strip_prefix("step-")?.strip_suffix(".safetensors")?.parse().ok()?;
            Some(Kept { step, loss: f64::INFINITY, path })
        })
        .collect();
    all.sort_by_key(|k| k.step);
    all
}

impl Store {
    /// Opens the folder of a run, or makes it. With `resume` it may hold one.
    pub(super) fn open(path: &Path, settings: &Value, newest: usize, resume: bool) -> Result<Store> {
        let invalid = |what: String| Error::invalid(format!("{}: {what}", path.display()));
        for folder in [path.to_path_buf(), path.join("checkpoints"), path.join("samples")] {
            fs::create_dir_all(&folder).map_err(|e| invalid(format!("cannot be made: {e}")))?;
        }
        let lock =
            File::create(path.join(".lock")).map_err(|e| invalid(format!("cannot be written: {e}")))?;
        if lock.try_lock().is_err() {
            return Err(invalid("is in use by another run; wait for it, or choose another folder".into()));
        }
        let told = path.join("run.json");
        // A run that has left no checkpoint is none: it may have been refused.
        let begun = !checkpoints(path).is_empty();
        if begun && !resume {
            return Err(invalid("holds a run; go on with it (--resume), or choose another folder".into()));
        }
        match fs::read_to_string(&told) {
            Ok(text) if begun => {
                let old: Value =
                    serde_json::from_str(&text).map_err(|e| Error::file(&told, format!("not JSON: {e}")))?;
                if let Some((key, old, new)) = difference(&old, settings) {
                    return Err(invalid(format!(
                        "the run has `{key}` = {old}; got {new}; leave it out, or choose another folder"
                    )));
                }
            }
            _ => {}
        }
        clean(path);
        let text = serde_json::to_string_pretty(settings).unwrap_or_default() + "\n";
        atomic::write(&told, text.as_bytes())?;
        let log = path.join("metrics.jsonl");
        let metrics =
            OpenOptions::new().append(true).create(true).open(&log).map_err(|e| Error::file(&log, e))?;
        let store = Store { path: path.into(), newest, metrics, events: None, _lock: lock };
        // A kill may have come between a checkpoint and the removal of older ones.
        store.prune()?;
        Ok(store)
    }

    fn kept(&self) -> Vec<Kept> {
        checkpoints(&self.path)
    }

    /// The last checkpoint and its step.
    pub(super) fn last(&self) -> Result<Option<(usize, Checkpoint)>> {
        self.kept().last().map(|k| Ok((k.step, Checkpoint::open(&k.path)?))).transpose()
    }

    /// Writes a checkpoint; then removes those that need not be kept.
    pub(super) fn save(
        &self,
        step: usize,
        states: &[(String, HostTensor)],
        loss: f64,
        notes: &[(String, String)],
    ) -> Result<()> {
        let mut metadata: HashMap<String, String> = notes.iter().cloned().collect();
        metadata.insert("step".into(), step.to_string());
        metadata.insert("loss".into(), loss.to_string());
        let path = self.path.join(format!("checkpoints/step-{step:08}.safetensors"));
        weights::save(path, states, Some(metadata))?;
        self.prune()
    }

    /// Removes the checkpoints that are neither among the newest nor of the lowest loss.
    fn prune(&self) -> Result<()> {
        let mut kept = self.kept();
        for k in &mut kept {
            let loss = Checkpoint::open(&k.path).ok().and_then(|c| c.metadata().get("loss")?.parse().ok());
            k.loss = loss.unwrap_or(f64::INFINITY);
        }
        let best = kept.iter().min_by(|a, b| a.loss.total_cmp(&b.loss)).map(|k| k.step);
        let old = kept.len().saturating_sub(self.newest);
        for k in kept[..old].iter().filter(|k| Some(k.step) != best) {
            fs::remove_file(&k.path).map_err(|e| Error::file(&k.path, format!("cannot be removed: {e}")))?;
        }
        Ok(())
    }

    /// Takes out of the metrics what lies beyond a step, and a line that was cut off; begins TensorBoard's events there.
    pub(super) fn rewind(&mut self, step: usize) -> Result<()> {
        let path = self.path.join("metrics.jsonl");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let stays = |line: &&str| {
            let line: Option<Value> = serde_json::from_str(line).ok();
            line.and_then(|v| v["step"].as_u64()).is_some_and(|s| s <= step as u64)
        };
        let kept: String = text.lines().filter(stays).flat_map(|l| [l, "\n"]).collect();
        atomic::write(&path, kept.as_bytes())?;
        self.metrics = OpenOptions::new().append(true).open(&path).map_err(|e| Error::file(&path, e))?;
        self.events = Some(Events::create(&self.path, step as u64 + 1)?);
        Ok(())
    }

    /// Adds a line to the metrics, and its numbers to TensorBoard's events.
    pub(super) fn note(&mut self, line: &Value) -> Result<()> {
        if let (Some(events), Some(all), Some(step)) =
            (&mut self.events, line.as_object(), line["step"].as_u64())
        {
            let numbers = all.iter().filter(|(key, _)| *key != "step");
            let numbers: Vec<_> = numbers.filter_map(|(key, v)| Some((key.as_str(), v.as_f64()?))).collect();
            events.scalars(step, &numbers)?;
        }
        let path = self.path.join("metrics.jsonl");
        self.metrics.write_all(format!("{line}\n").as_bytes()).map_err(|e| Error::file(&path, e))
    }
}

/// Removes what a killed process was writing, anywhere in the run.
fn clean(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            clean(&entry.path());
        } else if name.starts_with(".ldm-") && name.ends_with(".tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The first setting in which two runs differ that must not: its key, the old value and the new.
fn difference(old: &Value, new: &Value) -> Option<(String, Value, Value)> {
    let (Some(a), Some(b)) = (old.as_object(), new.as_object()) else { return None };
    let keys = a.keys().chain(b.keys()).filter(|k| !FREE.contains(&k.as_str()));
    for key in keys {
        let (x, y) = (old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null));
        if x == y {
            continue;
        }
        if let (Some(x), Some(y)) = (x.as_object(), y.as_object()) {
            let inner = x.keys().chain(y.keys()).find(|k| x.get(*k) != y.get(*k))?;
            let at = |m: &serde_json::Map<String, Value>| m.get(inner).cloned().unwrap_or(Value::Null);
            return Some((format!("{key}.{inner}"), at(x), at(y)));
        }
        return Some((key.clone(), x.clone(), y.clone()));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;
    use serde_json::json;

    #[test]
    fn the_newest_and_the_best_stay() {
        let dir = Scratch::new("store");
        let mut store = Store::open(dir.path(), &json!({"seed": 1}), 2, false).unwrap();
        let states = [("w".to_string(), HostTensor::f32([1], vec![1.0]).unwrap())];
        for (step, loss) in [(1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)] {
            store.save(step, &states, loss, &[]).unwrap();
            store.note(&json!({"step": step})).unwrap();
        }
        assert_eq!(store.kept().iter().map(|k| k.step).collect::<Vec<_>>(), [2, 4, 5]);
        store.rewind(3).unwrap();
        store.note(&json!({"step": 9})).unwrap();
        let text = fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":9}\n");
        let again = |value: Value, resume: bool| {
            Store::open(dir.path(), &value, 2, resume).err().map(|e| e.to_string())
        };
        assert!(again(json!({"seed": 1}), true).unwrap().contains("in use"));
        drop(store);
        assert!(again(json!({"seed": 1}), false).unwrap().contains("--resume"));
        assert!(again(json!({"seed": 2}), true).unwrap().contains("`seed` = 1; got 2"));
        // As a process leaves it that was killed before it removed the old ones.
        fs::copy(
            dir.path().join("checkpoints/step-00000004.safetensors"),
            dir.path().join("checkpoints/step-00000003.safetensors"),
        )
        .unwrap();
        assert_eq!(again(json!({"seed": 1, "steps": 7}), true), None);
        let store = Store::open(dir.path(), &json!({"seed": 1}), 2, true).unwrap();
        assert_eq!(store.kept().iter().map(|k| k.step).collect::<Vec<_>>(), [2, 4, 5]);
    }
}
