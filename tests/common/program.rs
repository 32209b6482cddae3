//! The program as a process, and what must hold of every run.
#![allow(dead_code)]

use super::folder::Folder;
use std::path::Path;
use std::process::Command;

/// How a run ended and what it said.
pub struct Outcome {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// Runs the program.
pub fn ldm(args: &[&str]) -> Outcome {
    run(Command::new(env!("CARGO_BIN_EXE_ldm")).args(args))
}

pub fn run(command: &mut Command) -> Outcome {
    let run = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // Without a code it was ended by a signal: an abort, or the system's memory killer.
    let o = Outcome { code: run.status.code().unwrap_or(-1), out: text(&run.stdout), err: text(&run.stderr) };
    let ended = !o.err.contains("panicked") && (0..3).contains(&o.code);
    assert!(ended, "{command:?}: exit code {}: {}", o.code, o.err);
    o
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The program must end with this code, say all of this, and change nothing in the folder.
#[track_caller]
pub fn refused(folder: &Folder, code: i32, say: &[&str], run: impl FnOnce() -> Outcome) {
    let before = folder.contents();
    let o = run();
    assert_eq!(o.code, code, "exit code, with: {}{}", o.out, o.err);
    for word in say {
        assert!(o.err.contains(word), "want `{word}` in: {}", o.err);
    }
    let after = folder.contents();
    let names = |all: &[(std::path::PathBuf, Vec<u8>)]| all.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after), "files were left or lost");
    assert!(before == after, "a file was changed");
}
