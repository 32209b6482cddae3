//! Memory of the host for weights and arenas: mapped from the system, and given back as soon as it is dropped.

use crate::error::{Error, Result};
use memmap2::{MmapMut, MmapOptions};

/// From here on large pages are asked for: a fault for each 2 MiB instead of each 4 KiB.
#[cfg(target_os = "linux")]
const LARGE: usize = 2 << 20;

/// Zeroed memory whose first byte stands on a page. Only what is touched takes room.
pub struct Memory(MmapMut);

impl Memory {
    /// Zeroed memory.
    ///
    /// # Errors
    /// [`Error::Device`] with the bytes that are needed, when the system has no room for them.
    pub fn new(bytes: usize) -> Result<Memory> {
        let map = MmapOptions::new().len(bytes.max(1)).map_anon().map_err(|_| {
            Error::Device(format!(
                "out of memory: {bytes} bytes cannot be had; close other programs, or try a smaller picture or batch"
            ))
        })?;
        // A wish: without it everything works as well, only slower.
        #[cfg(target_os = "linux")]
        if bytes >= LARGE {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Memory(map))
    }

    /// Bytes of the system's memory that [`Memory::new`] takes once all of it is touched: whole pages.
    pub fn measure(bytes: usize) -> usize {
        bytes.max(1).checked_next_multiple_of(PAGE).unwrap_or(usize::MAX)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// The most memory that this process has taken so far, in bytes; `None` where the system does not say.
pub fn peak() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<usize>().ok()?.checked_mul(1024)
}

/// The usual page of the machines that this runs on.
const PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_written() {
        for bytes in [0, 1, 4096, 5 << 20] {
            let mut m = Memory::new(bytes).unwrap();
            assert!(m.bytes().len() >= bytes && m.bytes().iter().all(|&b| b == 0));
            assert_eq!(m.bytes().as_ptr().align_offset(64), 0);
            m.bytes_mut().fill(7);
            assert!(m.bytes().iter().all(|&b| b == 7) && Memory::measure(bytes) >= bytes);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let e = Memory::new(1 << 60).err().unwrap().to_string();
        assert!(e.contains("out of memory: 1152921504606846976 bytes"), "{e}");
    }
}
