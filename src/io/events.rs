//! Event files of TensorBoard: numbers by step, in records with check sums.
//!
//! A record is its length (u64), the masked CRC-32C of that, a protobuf `Event`, and the masked CRC-32C of it (TensorFlow's
//! `TFRecord`); of `Event` these fields are written: `wall_time` 1, `step` 2, `file_version` 3, `summary` 5, `session_log` 7.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file that grows.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// A new file in a folder. Numbers of earlier files from step `next` on no longer count.
    ///
    /// # Errors
    /// [`Error::File`] when it cannot be written.
    pub fn create(folder: &Path, next: u64) -> Result<Events> {
        let seconds = now() as u64;
        let path = folder.join(format!("events.out.tfevents.{seconds:010}.{}.ldm", std::process::id()));
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let mut events = Events { file: file.map_err(|e| Error::file(&path, e))?, path };
        events.write(&bytes(3, b"brain.Event:2"), 0)?;
        // A session that starts (SessionLog.START).
        events.write(&bytes(7, &number(1, 1)), next)?;
        Ok(events)
    }

    /// Adds numbers of a step.
    ///
    /// # Errors
    /// [`Error::File`] when they cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let value = |(tag, v): &(&str, f64)| {
            let mut value = bytes(1, tag.as_bytes());
            // simple_value = 2, a float.
            value.push(2 << 3 | 5);
            value.extend((*v as f32).to_le_bytes());
            bytes(1, &value)
        };
        self.write(&bytes(5, &values.iter().flat_map(value).collect::<Vec<u8>>()), step)
    }

    fn write(&mut self, what: &[u8], step: u64) -> Result<()> {
        // wall_time = 1, a double.
        let mut event = vec![1 << 3 | 1];
        event.extend(now().to_le_bytes());
        event.extend(number(2, step));
        event.extend(what);
        let length = (event.len() as u64).to_le_bytes();
        let record =
            [&length[..], &masked(&length).to_le_bytes(), &event, &masked(&event).to_le_bytes()].concat();
        self.file.write_all(&record).map_err(|e| Error::file(&self.path, format!("cannot be written: {e}")))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn varint(mut v: u64) -> Vec<u8> {
    let mut out = vec![];
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
    out
}

/// A field of a whole number.
fn number(field: u8, v: u64) -> Vec<u8> {
    [vec![field << 3], varint(v)].concat()
}

/// A field of bytes, a text or a message.
fn bytes(field: u8, v: &[u8]) -> Vec<u8> {
    [vec![field << 3 | 2], varint(v.len() as u64), v.to_vec()].concat()
}

/// CRC-32C (Castagnoli), bit by bit: records are short.
fn crc(data: &[u8]) -> u32 {
    let bit = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !data.iter().fold(!0, |crc, b| (0..8).fold(crc ^ u32::from(*b), |crc, _| bit(crc)))
}

/// As records have it, so that a check sum of check sums is no constant.
fn masked(data: &[u8]) -> u32 {
    crc(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    #[test]
    fn records_can_be_read_back() {
        assert_eq!(crc(b"123456789"), 0xe306_9283);
        assert_eq!((varint(300), number(2, 5)), (vec![0xac, 2], vec![16, 5]));
        let dir = Scratch::new("events");
        let mut events = Events::create(dir.path(), 4).unwrap();
        events.scalars(300, &[("loss", 0.5), ("rate", 1e-3)]).unwrap();
        let data = std::fs::read(&events.path).unwrap();
        let (mut rest, mut all) = (&data[..], vec![]);
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let sum = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            assert_eq!((sum(8), sum(12 + n)), (masked(&rest[..8]), masked(&rest[12..12 + n])));
            all.push(&rest[12..12 + n]);
            rest = &rest[16 + n..];
        }
        assert_eq!(all.len(), 3);
        assert!(all[0].ends_with(b"brain.Event:2") && all[1].ends_with(&[16, 4, 58, 2, 8, 1]));
        let want = [&[16, 0xac, 2, 42, 26, 10, 11, 10, 4][..], b"loss", &[21, 0, 0, 0, 63]].concat();
        assert_eq!(&all[2][9..9 + want.len()], want);
    }
}
