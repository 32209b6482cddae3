//! Writing a file so that it is either the old one or the whole new one, never half of it.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes `bytes` to `path`: a temporary file in the same folder, flushed to the disk, then renamed.
///
/// # Errors
/// As [`write_with`].
pub fn write(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_with(path, |w| w.write_all(bytes))
}

/// As [`write()`], for contents that are made while they are written. If `fill` fails, `path` stays as it was.
/// A symbolic link is followed. A device or a pipe (`/dev/stdout`) is written to directly.
///
/// # Errors
/// [`Error::File`] as [`check_target`], and when writing fails, such as on a full disk.
pub fn write_with(path: impl AsRef<Path>, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let path = path.as_ref();
    let target = Target::find(path)?;
    if target.special {
        let put = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).open(&target.path)?;
            fill(&mut file)?;
            file.flush()
        };
        return put().map_err(|e| failed(path, e));
    }
    let (temporary, file) = create_beside(path, &target)?;
    let put = || -> io::Result<()> {
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut writer)?;
        let file = writer.into_inner().map_err(|e| e.into_error())?;
        if let Some(permissions) = &target.permissions {
            file.set_permissions(permissions.clone())?;
        }
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, &target.path)
    };
    put().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        failed(path, e)
    })?;
    sync_folder(&target.folder);
    Ok(())
}

/// Checks that `path` can be written, without touching it: its folder exists and takes new files, and what stands
/// there now, if anything, is not a folder and not read-only. For calling before long work starts.
///
/// # Errors
/// [`Error::File`] that says what is in the way and what to do.
pub fn check_target(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let target = Target::find(path)?;
    if !target.special {
        // Only an attempt tells: permissions, quotas and read-only mounts are all different questions.
        let (probe, _) = create_beside(path, &target)?;
        let _ = fs::remove_file(probe);
    }
    Ok(())
}

/// Where a path leads.
struct Target {
    path: PathBuf,
    folder: PathBuf,
    /// A device or a pipe.
    special: bool,
    /// Those of the file that is replaced.
    permissions: Option<fs::Permissions>,
}

impl Target {
    fn find(path: &Path) -> Result<Target> {
        let Some(name) = path.file_name() else {
            return Err(Error::file(path, "names no file; give a file name"));
        };
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir() {
            return Err(Error::file(
                path,
                format!("is a folder; give a file in it, such as {}", example(path)),
            ));
        }
        let folder = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        match fs::metadata(folder) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => {
                return Err(Error::file(path, format!("{} is a file, not a folder", folder.display())));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let f = folder.display();
                return Err(Error::file(
                    path,
                    format!("the folder {f} does not exist; create it: mkdir -p '{f}'"),
                ));
            }
            Err(e) => return Err(Error::file(path, format!("the folder {}: {e}", folder.display()))),
        }
        let mut target =
            Target { path: path.into(), folder: folder.into(), special: false, permissions: None };
        let Ok(meta) = fs::metadata(path) else {
            if path.is_symlink() {
                return Err(Error::file(
                    path,
                    "is a link to a file that does not exist; remove it or choose another",
                ));
            }
            target.path = folder.join(name);
            return Ok(target);
        };
        target.special = !meta.is_file();
        if target.special {
            return Ok(target);
        }
        if meta.permissions().readonly() {
            return Err(Error::file(path, "exists and is read-only; remove it or choose another name"));
        }
        target.permissions = Some(meta.permissions());
        if path.is_symlink() {
            target.path = fs::canonicalize(path).map_err(|e| failed(path, e))?;
            target.folder = target.path.parent().unwrap_or(Path::new(".")).into();
        }
        Ok(target)
    }
}

fn example(folder: &Path) -> String {
    folder.join("out.png").display().to_string()
}

fn failed(path: &Path, e: io::Error) -> Error {
    Error::file(path, format!("cannot be written: {e}"))
}

/// A new, empty, hidden file next to the target: a rename is atomic only inside one file system.
fn create_beside(path: &Path, target: &Target) -> Result<(PathBuf, File)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // A name may be in use by a process of another machine that shares the folder: try the next.
    for _ in 0..100 {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = target.folder.join(format!(".ldm-{}-{n}.tmp", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => {
                let folder = target.folder.display();
                return Err(Error::file(path, format!("no file can be created in the folder {folder}: {e}")));
            }
        }
    }
    Err(Error::file(path, format!("{} is full of .ldm-*.tmp files; remove them", target.folder.display())))
}

/// Makes the rename itself last. Not every file system can do this, and the file is whole either way.
fn sync_folder(folder: &Path) {
    #[cfg(unix)]
    if let Ok(f) = File::open(folder) {
        let _ = f.sync_all();
    }
    #[cfg(not(unix))]
    let _ = folder;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    fn names(dir: &Scratch) -> Vec<String> {
        let mut v: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        v.sort();
        v
    }

    #[test]
    fn a_file_is_written_and_replaced_whole() {
        let dir = Scratch::new("atomic");
        let path = dir.path().join("a.bin");
        check_target(&path).unwrap();
        assert!(names(&dir).is_empty(), "a check leaves nothing");
        write(&path, b"one").unwrap();
        write(&path, b"two, longer").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two, longer");
        assert_eq!(names(&dir), ["a.bin"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = Scratch::new("atomic");
        let path = dir.file("a.bin", "old");
        let e = write_with(&path, |w| {
            w.write_all(b"half of it")?;
            Err(io::Error::other("disk full"))
        });
        assert!(e.unwrap_err().to_string().contains("cannot be written: disk full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(&dir), ["a.bin"]);
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let dir = Scratch::new("atomic");
        let file = dir.file("file", "x");
        let mut read_only = fs::metadata(&file).unwrap().permissions();
        read_only.set_readonly(true);
        fs::set_permissions(dir.file("locked", "x"), read_only).unwrap();
        let slash = format!("{}/new/", dir.path().display());
        for (path, say) in [
            (dir.path().join("no/such/x.png"), "no/such does not exist; create it: mkdir -p"),
            (dir.path().to_path_buf(), "is a folder; give a file in it"),
            (slash.into(), "is a folder"),
            (file.join("x.png"), "file is a file, not a folder"),
            (dir.path().join("locked"), "read-only"),
            (PathBuf::from("/"), "names no file"),
            (dir.path().join(".."), "names no file"),
        ] {
            for e in [check_target(&path).unwrap_err(), write(&path, b"").unwrap_err()] {
                let e = e.to_string();
                assert!(e.contains(say) && e.contains(path.to_str().unwrap()), "{e}");
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_are_not_replaced() {
        use std::os::unix::fs::FileTypeExt;
        let dir = Scratch::new("atomic");
        fs::create_dir(dir.path().join("deep")).unwrap();
        let real = dir.file("deep/real", "old");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"new");
        fs::remove_file(&real).unwrap();
        assert!(write(&link, b"new").unwrap_err().to_string().contains("link"));

        check_target("/dev/null").unwrap();
        write("/dev/null", b"x").unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }
}
