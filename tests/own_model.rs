//! The model that comes with the sources, as a fresh clone has it: `ldm sample` without `-m`.

#[path = "common/folder.rs"]
mod folder;
#[path = "common/program.rs"]
mod program;

use folder::Folder;
use ldm::io::{Checkpoint, StoredType};
use program::{ldm, run, text};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/shapes-64")
}

/// Scenes that training has not shown, by number; the pictures are judged by their pixels. Of 256 such, README says how many
/// are right: this is a sample of them with fewer steps.
#[test]
fn it_draws_what_it_is_asked_for() {
    let f = Folder::new();
    let (scenes, made) = (f.path("scenes"), f.path("made"));
    let o = ldm(&["data", "shapes", "--split", "test", "--count", "24", "-o", text(&scenes)]);
    assert_eq!(o.code, 0, "{}", o.err);
    let list = scenes.join("metadata.jsonl");
    let from_list = ["sample", "--from-file", text(&list), "-o", text(&made), "-s", "0", "--steps", "20"];
    let o = ldm(&[&from_list[..], &["--batch-size", "12", "--device", "cpu"]].concat());
    assert_eq!((o.code, o.out.lines().count()), (0, 24), "{}", o.err);
    let o = ldm(&["eval", "shapes", text(&made), "--json"]);
    let said: Value = serde_json::from_str(&o.out).unwrap();
    let share = |what: &str| said["all"]["scores"][what]["share"].as_f64().unwrap();
    assert!(share("binding") >= 0.6 && share("colour") >= 0.6, "{}", said["all"]);
    // Beside the captions lie the pictures that they are of.
    let first = std::fs::read(scenes.join("0000.png")).unwrap();
    let o = ldm(&["sample", "--from-file", text(&list), "-o", text(&scenes), "--steps", "1"]);
    assert!(
        o.code == 2 && o.err.contains("holds a data set") && o.err.contains("another folder"),
        "{}",
        o.err
    );
    assert_eq!(std::fs::read(scenes.join("0000.png")).unwrap(), first);
}

/// Somewhere else too, as long as the sources are where the program was built.
#[test]
fn it_is_found_from_any_folder() {
    let f = Folder::new();
    let mut program = Command::new(env!("CARGO_BIN_EXE_ldm"));
    program.args(["sample", "-p", "a small blue ring", "--steps", "1", "-o", "ring.png", "--device", "cpu"]);
    let o = run(program.current_dir(f.path("")));
    assert_eq!(o.code, 0, "{}", o.err);
    assert!(f.path("ring.png").is_file());
}

#[test]
fn it_is_small() {
    let size = |part: &str| {
        let path = model().join(part);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let name = checkpoint.names().next().unwrap().to_string();
        assert_eq!(checkpoint.entry(&name).unwrap().dtype, StoredType::BF16, "{part}");
        let files = fs::read_dir(&path).unwrap();
        files.map(|f| f.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    let bytes: u64 = ["unet", "text_encoder", "vae"].into_iter().map(size).sum();
    assert!(bytes < 30_000_000, "{bytes}");
}
