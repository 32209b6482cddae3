//! A file mapped into memory, read only. This is the one file of `io` with `unsafe` in it.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A whole file, mapped read only. Its pages are read when they are touched, and can be given back.
#[derive(Debug)]
pub struct Map {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl Map {
    /// Maps a file.
    ///
    /// # Errors
    /// [`Error::File`] when the file is missing, is not a regular file, is empty, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Map> {
        let fail = |what: String| Error::file(path, what);
        let file = File::open(path).map_err(|e| fail(format!("cannot be opened: {e}")))?;
        let meta = file.metadata().map_err(|e| fail(format!("cannot be examined: {e}")))?;
        if !meta.is_file() {
            return Err(fail("want a regular file; got a folder or a device".into()));
        }
        if meta.len() == 0 {
            return Err(fail("the file is empty; download it again".into()));
        }
        // SAFETY: the mapping is private and read only, and `Map` hands out shared slices only. What remains is that
        // another process may change the file meanwhile. Its values may then change under us, which no invariant of
        // this crate depends on: `u8` has no invalid value, and every header is copied before it is trusted. Were it
        // cut short, touching a page beyond its end would end the process with SIGBUS: `bytes` checks the length
        // before each use, which leaves only the case that it shrinks during that use. The engine's own writers
        // never shorten a file in place (see `atomic`).
        let map =
            unsafe { Mmap::map(&file) }.map_err(|e| fail(format!("cannot be mapped into memory: {e}")))?;
        Ok(Map { path: path.into(), file, map })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Never: an empty file is not mapped.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The bytes of a range.
    ///
    /// # Errors
    /// [`Error::File`] when the range is not inside the file, or the file has become shorter since it was opened.
    pub fn bytes(&self, range: Range<usize>) -> Result<&[u8]> {
        let now = self
            .file
            .metadata()
            .map_err(|e| Error::file(&self.path, format!("cannot be examined: {e}")))?
            .len();
        if now < self.map.len() as u64 {
            let then = self.map.len();
            return Err(Error::file(
                &self.path,
                format!("was cut from {then} to {now} bytes while it was in use; start again"),
            ));
        }
        self.map.get(range.clone()).ok_or_else(|| {
            let (start, end, len) = (range.start, range.end, self.map.len());
            Error::file(
                &self.path,
                format!("bytes {start}..{end} are beyond the end of the file, {len} bytes"),
            )
        })
    }

    /// Tells the system that a range will be read soon. A hint: failure changes nothing.
    pub fn prefetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(range) = self.inside(range) {
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Gives the pages of a range back to the system. Reading them again is allowed: they come from the file again.
    /// Pages that the range shares with its neighbours go too. A hint: failure changes nothing.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(range) = self.inside(range) {
            // SAFETY: MADV_DONTNEED may lose what was written to private pages. This mapping is read only and backed
            // by a file, so nothing was ever written: a page that is touched later is read from the file anew, also
            // through slices that are alive now. `inside` keeps the range within the mapping.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The part of a range that lies in the file, or nothing.
    #[cfg(unix)]
    fn inside(&self, range: Range<usize>) -> Option<Range<usize>> {
        let end = range.end.min(self.map.len());
        (range.start < end).then_some(range.start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    #[test]
    fn bytes_survive_a_release() {
        let dir = Scratch::new("mmap");
        let want: Vec<u8> = (0..70_000).map(|i| (i % 251) as u8).collect();
        let map = Map::open(&dir.file("x", &want)).unwrap();
        let all = map.bytes(0..want.len()).unwrap();
        map.prefetch(10..usize::MAX);
        map.release(5000..60_000);
        map.release(0..usize::MAX);
        map.release(1 << 40..1 << 41);
        assert_eq!(all, want);
        assert_eq!(map.len(), want.len());
    }

    #[test]
    fn what_cannot_be_mapped_is_named() {
        let dir = Scratch::new("mmap");
        for (path, say) in [
            (dir.path().join("none"), "cannot be opened"),
            (dir.path().to_path_buf(), "regular file"),
            (dir.file("empty", ""), "empty"),
        ] {
            let e = Map::open(&path).unwrap_err().to_string();
            assert!(e.contains(say) && e.contains(path.to_str().unwrap()), "{e}");
        }
    }

    #[test]
    fn a_range_beyond_the_end_and_a_file_that_shrank_are_errors() {
        let dir = Scratch::new("mmap");
        let path = dir.file("x", [7; 9000]);
        let map = Map::open(&path).unwrap();
        assert!(map.bytes(8999..9001).unwrap_err().to_string().contains("beyond the end"));
        #[expect(clippy::reversed_empty_ranges)]
        let reversed = 5..3;
        assert!(map.bytes(reversed).is_err());
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert!(map.bytes(0..10).unwrap_err().to_string().contains("cut from 9000 to 100"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn released_pages_leave_the_memory() {
        let dir = Scratch::new("mmap");
        let n = 8 << 20;
        let path = dir.file("x", vec![3; n]);
        let map = Map::open(&path).unwrap();
        let resident = || {
            let all = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let ours = all.split_once(path.to_str().unwrap()).unwrap().1;
            let line = ours.lines().find(|l| l.starts_with("Rss:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
        };
        assert!(map.bytes(0..n).unwrap().iter().all(|&b| b == 3));
        assert!(resident() > n / 2);
        map.release(0..n / 2);
        assert!(resident() < n * 5 / 8, "half of it is given back");
        map.release(0..n);
        assert!(resident() < n / 8);
    }
}
