//! The header of a safetensors file: 8 bytes of length, then JSON that says where each tensor lies. A file may be cut
//! off, damaged, or made to mislead: nothing in it is used before all of it has been checked.

use super::mmap::Map;
use super::weights::Entry;
use crate::error::{Error, Result};
use safetensors::tensor::{Metadata, SafeTensorError, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// As the format's own library has it; far above any real header.
const MAX_HEADER: u64 = 100_000_000;

/// A checked header.
pub(crate) struct Header {
    /// Name, type and axes, and the bytes of the file: all inside it, none overlapping.
    pub(crate) tensors: Vec<(String, Entry, Range<usize>)>,
    /// The writer's notes.
    pub(crate) metadata: HashMap<String, String>,
}

/// Reads and checks the header of a mapped file.
pub(crate) fn read(map: &Map) -> Result<Header> {
    let path = map.path();
    let start = map.bytes(0..map.len().min(512))?;
    let not_safetensors = |why: String| match kind(start) {
        Some(kind) => Error::file(path, format!("want a safetensors file; got {kind}")),
        None => Error::file(path, format!("not a whole safetensors file: {why}; download it again")),
    };
    let Some((length, _)) = start.split_first_chunk::<8>() else {
        return Err(not_safetensors(format!("it is only {} bytes long", map.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let what = kind(start).map_or_else(
            || {
                format!(
                    "something else: its header would have {length} bytes, above the limit of {MAX_HEADER}; if it should be one, \
                     download it again"
                )
            },
            str::to_string,
        );
        return Err(Error::file(path, format!("want a safetensors file; got {what}")));
    }
    if length > map.len() as u64 - 8 {
        return Err(not_safetensors(format!("its header claims {length} bytes of a file of {}", map.len())));
    }
    let data = 8 + length as usize; // fits: it is below MAX_HEADER
    let json = map.bytes(8..data)?;
    let entries: Entries =
        serde_json::from_slice(json).map_err(|e| not_safetensors(format!("its header is not valid: {e}")))?;
    let (mut infos, mut metadata) = (Vec::with_capacity(entries.0.len()), HashMap::new());
    for (name, value) in entries.0 {
        if name == "__metadata__" {
            metadata = notes(value)
                .ok_or_else(|| not_safetensors("its __metadata__ is no map of strings".into()))?;
        } else {
            let info = info(path, &name, value)?;
            infos.push((name, info));
        }
    }
    infos.sort_by_key(|(_, info)| info.data_offsets);
    let end = cover(path, &infos)?;
    let (want, got) = (data as u64 + end as u64, map.len() as u64);
    if want != got {
        let how = if got < want { "cut off" } else { "followed by other data" };
        return Err(not_safetensors(format!(
            "its tensors end at byte {want}, but it has {got}: it is {how}"
        )));
    }
    let tensors = infos.into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        (name, Entry { dtype: info.dtype, shape: info.shape }, data + start..data + end)
    });
    Ok(Header { tensors: tensors.collect(), metadata })
}

fn notes(value: Value) -> Option<HashMap<String, String>> {
    match value {
        Value::Null => Some(HashMap::new()),
        value => serde_json::from_value(value).ok(),
    }
}

/// One tensor's entry; its size must be what type and axes come to.
fn info(path: &Path, name: &str, value: Value) -> Result<TensorInfo> {
    let wrong = |want: &str, got: String| Error::Tensor {
        file: path.into(),
        name: name.into(),
        want: want.into(),
        got,
    };
    let shown = value.to_string();
    let info: TensorInfo = serde_json::from_value(value)
        .map_err(|e| wrong("an entry with dtype, shape and data_offsets", format!("{shown} ({e})")))?;
    let (start, end) = info.data_offsets;
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
    let held = end.checked_sub(start);
    match bits {
        Some(bits) if bits % 8 == 0 && held == Some(bits / 8) => Ok(info),
        Some(bits) => {
            let want = format!("{} bytes for {} {:?}", bits.div_ceil(8), info.dtype, info.shape);
            Err(wrong(&want, format!("data_offsets [{start}, {end}]")))
        }
        None => Err(wrong("a shape that fits into memory", format!("{} {:?}", info.dtype, info.shape))),
    }
}

/// The tensors, in order of their offsets, must follow each other without gap or overlap. Returns their end.
fn cover(path: &Path, infos: &[(String, TensorInfo)]) -> Result<usize> {
    let copy = infos.iter().map(|(n, i)| {
        (n.clone(), TensorInfo { dtype: i.dtype, shape: i.shape.clone(), data_offsets: i.data_offsets })
    });
    match Metadata::new(None, copy.collect()) {
        Ok(metadata) => Ok(metadata.data_len()),
        Err(SafeTensorError::InvalidOffset(name)) => {
            let at = infos.iter().position(|(n, _)| *n == name).unwrap_or(0);
            let before = infos[..at].last();
            let want = match before {
                Some((other, info)) => format!("its first byte at {}, after `{other}`", info.data_offsets.1),
                None => "its first byte at 0".into(),
            };
            let got = format!(
                "data_offsets {:?}: the file is damaged; download it again",
                infos[at].1.data_offsets
            );
            Err(Error::Tensor { file: path.into(), name, want, got })
        }
        Err(e) => Err(Error::file(path, format!("not a valid safetensors file: {e}; download it again"))),
    }
}

/// What a file is that is no safetensors file, from its first bytes, and what to do about it.
fn kind(start: &[u8]) -> Option<&'static str> {
    let text = start.trim_ascii_start().to_ascii_lowercase();
    Some(match start {
        [b'P', b'K', 3, 4, ..] => {
            "a zip archive, most likely a PyTorch checkpoint; convert it to safetensors"
        }
        [0x80, 2..=5, ..] => {
            "a Python pickle, most likely an old PyTorch checkpoint; convert it to safetensors"
        }
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file; take the safetensors file of the same model",
        [0x89, b'H', b'D', b'F', ..] => "an HDF5 file; take the safetensors file of the same model",
        _ if text.starts_with(b"version https://git-lfs") => {
            "a Git LFS pointer; fetch the file itself: git lfs pull"
        }
        _ if text.starts_with(b"<!doctype") || text.starts_with(b"<html") => {
            "a web page; the download went wrong: check the address, and whether it wants a login"
        }
        _ if text.starts_with(b"{") => "JSON; want the file with the weights, which ends in .safetensors",
        _ => return None,
    })
}

/// The members of the header object in order. A name that comes twice is an error: which one would count?
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Entries, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Entries;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object with one entry for each tensor")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
                let (mut all, mut seen) = (Vec::new(), HashSet::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("`{name}` is listed twice")));
                    }
                    all.push((name, value));
                }
                Ok(Entries(all))
            }
        }
        d.deserialize_map(V)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    /// The error of a file with these bytes; it must name the file.
    fn refused(bytes: &[u8]) -> String {
        let dir = Scratch::new("header");
        let path = dir.file("bad.safetensors", bytes);
        let e =
            Map::open(&path).and_then(|m| read(&m)).err().unwrap_or_else(|| panic!("accepted: {bytes:?}"));
        assert!(e.to_string().starts_with(path.to_str().unwrap()), "{e}");
        e.to_string()
    }

    const GOOD: &str = r#"{"__metadata__":{"k":"v"},"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},
        "a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}  "#;

    #[test]
    fn a_good_header_is_read() {
        let dir = Scratch::new("header");
        let bytes = file(GOOD, &[0; 12]);
        let h = read(&Map::open(&dir.file("x", &bytes)).unwrap()).unwrap();
        let (name, entry, range) = &h.tensors[1];
        assert_eq!(
            (name.as_str(), &entry.shape[..], range.clone()),
            ("b", &[2][..], bytes.len() - 4..bytes.len())
        );
        assert_eq!(h.metadata["k"], "v");
        for empty in ["{}", r#"{"z":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}}"#] {
            assert!(read(&Map::open(&dir.file("y", file(empty, &[]))).unwrap()).is_ok());
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let whole = file(GOOD, &[0; 12]);
        for n in 0..whole.len() {
            refused(&whole[..n]);
        }
        assert!(refused(&[whole.clone(), vec![0]].concat()).contains("followed by other data"));
        assert!(refused(&whole[..whole.len() - 1]).contains("cut off"));
    }

    #[test]
    fn damage_anywhere_in_the_header_never_panics() {
        let dir = Scratch::new("header");
        let whole = file(GOOD, &[0; 12]);
        for i in 0..whole.len() - 12 {
            for byte in [0, b'"', b'9', b'}', b'-', 0x80, 0xff] {
                let mut bad = whole.clone();
                bad[i] = byte;
                let map = Map::open(&dir.file("x", &bad)).unwrap();
                if let Ok(h) = read(&map) {
                    assert!(h.tensors.iter().all(|(_, _, r)| map.bytes(r.clone()).is_ok()));
                }
            }
        }
    }

    #[test]
    fn lies_are_named() {
        let entry = |name: &str, dtype: &str, shape: &str, offsets: &str| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        let one = |dtype, shape, offsets| format!("{{{}}}", entry("w", dtype, shape, offsets));
        let two = |x, y| format!("{{{},{}}}", entry("w", "F32", "[2]", x), entry("v", "F32", "[2]", y));
        for (header, say) in [
            (one("F32", "[3]", "[0,8]"), "`w`: want 12 bytes for F32 [3]; got data_offsets [0, 8]"),
            (one("F16", "[2,2]", "[8,0]"), "want 8 bytes for F16 [2, 2]; got data_offsets [8, 0]"),
            (one("F32", "[2]", "[8,16]"), "`w`: want its first byte at 0"),
            (one("F32", "[100]", "[0,400]"), "it is cut off"),
            (one("F32", "[1]", "[0,4]"), "followed by other data"),
            (one("F32", "[4294967296,4294967296,4294967296]", "[0,8]"), "`w`: want a shape that fits"),
            (one("F32", "[2305843009213693952]", "[0,8]"), "a shape that fits"),
            (one("F4", "[3]", "[0,8]"), "`w`: want 2 bytes"),
            (one("Q4", "[2]", "[0,8]"), "`w`: want an entry with dtype"),
            (one("F32", "[-2]", "[0,8]"), "`w`: want an entry"),
            (one("F32", "[2]", "[0,18446744073709551616]"), "`w`: want an entry"),
            (one("F32", "[2]", "[0]"), "`w`: want an entry"),
            (r#"{"w":{"dtype":"F32"}}"#.into(), "`w`: want an entry"),
            (r#"{"w":7}"#.into(), "`w`: want an entry"),
            (two("[0,8]", "[0,8]"), "want its first byte at 8, after"),
            (two("[0,8]", "[4,12]"), "`v`: want its first byte at 8, after `w`"),
            (two("[0,8]", "[12,20]"), "`v`: want its first byte at 8"),
            (format!("{{{0},{0}}}", entry("w", "F32", "[2]", "[0,8]")), "`w` is listed twice"),
            (r#"{"__metadata__":{"k":1}}"#.into(), "__metadata__ is no map of strings"),
            ("[]".into(), "its header is not valid"),
            ("{".into(), "its header is not valid"),
            ("{\"\u{1}\":1}".into(), "its header is not valid"),
            (format!("{{\"w\":{}", "[".repeat(4000)), "its header is not valid"),
            ("".into(), "its header is not valid"),
        ] {
            let e = refused(&file(&header, &[0; 8]));
            assert!(e.contains(say), "{header}\n{e}\nwant {say}");
        }
        assert!(refused(&file("{}", &[])[..9]).contains("its header claims 2 bytes of a file of 9"));
        assert!(refused(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat()).contains("would have 184467"));
        assert!(refused(&[&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()).contains("not valid"));
    }

    #[test]
    fn a_header_above_the_limit_is_refused() {
        let dir = Scratch::new("header");
        let path = dir.file("big", (MAX_HEADER + 1).to_le_bytes());
        std::fs::File::options().write(true).open(&path).unwrap().set_len(MAX_HEADER + 1000).unwrap();
        assert!(read(&Map::open(&path).unwrap()).err().unwrap().to_string().contains("above the limit"));
    }

    #[test]
    fn other_kinds_of_files_are_recognised() {
        for (bytes, say) in [
            (&b"PK\x03\x04 archive/data.pkl"[..], "PyTorch checkpoint"),
            (b"\x80\x02}q\x00 etc etc", "pickle"),
            (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"{\"weight_map\": {}}", "JSON"),
            (b"short", "only 5 bytes"),
        ] {
            let e = refused(bytes);
            assert!(e.contains(say), "{e}");
        }
    }
}
