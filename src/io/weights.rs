//! Checkpoints in safetensors form: one file, or a folder of a diffusers or transformers component, in one piece or in
//! shards. Weights stay in the file until they are read, one tensor at a time, and their pages can be given back.

use super::compvis::Names;
use super::config::Config;
use super::mmap::Map;
use super::words::distance;
use super::{atomic, convert, header};
use crate::error::{Error, Result};
use crate::tensor::{DType, HostTensor};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use super::convert::Order;
/// Element type of a tensor in a file.
pub use safetensors::Dtype as StoredType;

/// What a file says about a tensor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Element type.
    pub dtype: StoredType,
    /// Axes, outermost first.
    pub shape: Vec<usize>,
}

impl Entry {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.bitsize() / 8
    }
}

/// Sums over the tensors of one type.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Total {
    /// Number of tensors.
    pub tensors: usize,
    /// Number of elements.
    pub elements: usize,
    /// Size in bytes.
    pub bytes: usize,
}

/// The tensors of one component. Cheap to open: only headers are read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    maps: Vec<Map>,
    tensors: BTreeMap<String, Place>,
    metadata: HashMap<String, String>,
    /// What the file calls tensors, where these have other names here.
    names: Option<Arc<Names>>,
}

#[derive(Debug)]
struct Place {
    entry: Entry,
    /// Index into `maps`.
    map: usize,
    /// All of the stored tensor.
    range: Range<usize>,
    /// Where only some of its rows are meant.
    rows: Option<Rows>,
    /// What the file calls it, where that is something else.
    stored: Option<String>,
}

/// One of the matrices that a file holds in one: `head` rows of the first, as many of the second, …, then again of the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rows {
    /// Which one, from 0.
    pub(crate) part: usize,
    /// How many there are.
    pub(crate) of: usize,
    /// Rows of one at a time.
    pub(crate) head: usize,
}

impl Rows {
    /// These rows of a tensor with axes `shape`, which are axes of whole turns.
    fn pick(self, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
        let rows: usize = shape.first().copied().unwrap_or(0) * self.of;
        let run = bytes.len().checked_div(rows).unwrap_or(0) * self.head;
        let own = bytes.chunks_exact(run.max(1)).skip(self.part).step_by(self.of);
        own.flatten().copied().collect()
    }
}

/// A tensor under another name: the name, its axes, and which rows it has of the stored one.
pub(crate) struct Alias {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) rows: Option<Rows>,
}

/// What the weights of a component are called, by preference.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

impl Checkpoint {
    /// Opens a safetensors file, an index of shards (`*.index*.json`), or the folder of a component that holds
    /// `diffusion_pytorch_model.safetensors`, `model.safetensors`, their shards, or their `fp16` variants.
    ///
    /// # Errors
    /// [`Error::File`] when there is nothing to open, and when a file is damaged or of another kind;
    /// [`Error::Tensor`] and [`Error::Config`] when a header or an index contradicts itself.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        let file = if path.is_dir() { weights_of(path)? } else { path.into() };
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let mut checkpoint = Checkpoint {
            path: path.into(),
            maps: vec![],
            tensors: BTreeMap::new(),
            metadata: HashMap::new(),
            names: None,
        };
        if name.ends_with(".json") && name.contains(".index.") {
            checkpoint.add_shards(&file)?;
        } else {
            checkpoint.add(&file)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, file: &Path) -> Result<()> {
        let map = Map::open(file)?;
        let header = header::read(&map)?;
        for (name, entry, range) in header.tensors {
            let place = Place { entry, map: self.maps.len(), range, rows: None, stored: None };
            if let Some(other) = self.tensors.insert(name.clone(), place) {
                let first = self.maps[other.map].path().display();
                return Err(wrong(file, &name, "each tensor in one shard", format!("it is in {first} too")));
            }
        }
        self.metadata.extend(header.metadata);
        // The header has been read.
        map.release(0..map.len());
        self.maps.push(map);
        Ok(())
    }

    fn add_shards(&mut self, index: &Path) -> Result<()> {
        let config = Config::read(index)?;
        let Some(files) = config.section("weight_map")? else {
            return Err(config.error("weight_map", "an object that gives the file of each tensor"));
        };
        let names: Vec<&str> = files.keys().collect();
        let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
        for name in &names {
            let shard = files.str(name)?;
            // An index has no business outside its folder.
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                return Err(files.error(name, "the name of a file in the same folder"));
            }
            shards.entry(shard).or_insert(name);
        }
        for (shard, tensor) in shards {
            let file = index.with_file_name(shard);
            if !file.exists() {
                let what =
                    format!("not found; {} says that it holds `{tensor}`; download it", index.display());
                return Err(Error::file(file, what));
            }
            self.add(&file)?;
        }
        for name in names {
            let (shard, place) = (files.str(name)?, self.tensors.get(name));
            if place.is_none_or(|p| self.maps[p.map].path().file_name() != Some(shard.as_ref())) {
                let want = format!("this tensor in {shard}");
                return Err(wrong(index, name, want, "a shard without it; download index and shards again"));
            }
        }
        match self.tensors.keys().find(|name| !files.has(name)) {
            Some(name) => {
                Err(wrong(self.file(name), name, "only tensors that the index lists", index.display()))
            }
            None => Ok(()),
        }
    }

    /// The tensors of a part of a single file by diffusers' names: several in place of one where these lie in it, none for what is no weight.
    /// The file's notes have been read and are not kept.
    ///
    /// # Errors
    /// [`Error::Tensor`] when two tensors get one name, or a tensor's rows cannot be shared out.
    pub(crate) fn renamed(self, names: Names) -> Result<Checkpoint> {
        let mut tensors: BTreeMap<String, Place> = BTreeMap::new();
        for (stored, place) in &self.tensors {
            for Alias { name, shape, rows } in names.ours(stored, &place.entry) {
                let entry = Entry { dtype: place.entry.dtype, shape };
                let parts = rows.map_or(1, |r| r.of);
                let turns = rows.map_or(1, |r| r.of * r.head.max(1));
                let first = place.entry.shape.first().copied().unwrap_or(1);
                if entry.bytes() * parts != place.entry.bytes() || first % turns != 0 {
                    let want = format!("rows in turns of {turns}, for `{name}` {:?}", entry.shape);
                    return Err(wrong(self.file(stored), stored, want, format!("{:?}", place.entry.shape)));
                }
                let (map, range) = (place.map, place.range.clone());
                let own = Place { entry, map, range, rows, stored: Some(stored.clone()) };
                if let Some(other) = tensors.insert(name.clone(), own) {
                    let other = other.stored.unwrap_or_default();
                    let got = format!("`{other}`, which is the same to the model");
                    return Err(wrong(self.file(stored), stored, "one tensor for each weight", got));
                }
            }
        }
        Ok(Checkpoint { tensors, metadata: HashMap::new(), names: Some(Arc::new(names)), ..self })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type and axes of a tensor, if it is there.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name).map(|p| &p.entry)
    }

    /// What the file calls a tensor, whether it is there or not.
    pub fn stored_name(&self, name: &str) -> String {
        let there = self.tensors.get(name).and_then(|p| p.stored.clone());
        let named = || self.names.as_ref()?.theirs(name).map(|theirs| theirs.name);
        there.or_else(named).unwrap_or_else(|| name.into())
    }

    /// The file that holds a tensor; what was opened, if none does.
    pub fn file(&self, name: &str) -> &Path {
        self.tensors.get(name).map_or(&self.path, |p| self.maps[p.map].path())
    }

    /// The writer's notes, of all shards together.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// What there is of each element type.
    pub fn dtypes(&self) -> BTreeMap<StoredType, Total> {
        let mut all: BTreeMap<StoredType, Total> = BTreeMap::new();
        for Place { entry, .. } in self.tensors.values() {
            let total = all.entry(entry.dtype).or_default();
            total.tensors += 1;
            total.elements += entry.elements();
            total.bytes += entry.bytes();
        }
        all
    }

    /// A float tensor as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let (entry, bytes) = self.bytes(name)?;
        convert::floats(entry, &bytes).map_err(|fault| self.fault(name, fault))
    }

    /// A tensor in another element type, rounded to nearest: floats to f32, f16 or bf16, integers to i32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, of the other kind, has more than six axes, holds NaN or infinity, or
    /// a value that `dtype` cannot hold.
    pub fn read(&self, name: &str, dtype: DType) -> Result<HostTensor> {
        let (entry, bytes) = self.bytes(name)?;
        convert::tensor(entry, &bytes, dtype).map_err(|fault| self.fault(name, fault))
    }

    /// Whether a tensor holds whole numbers.
    pub fn is_integer(&self, name: &str) -> bool {
        use StoredType::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
        let whole = [I64, I32, I16, I8, U64, U32, U16, U8, BOOL];
        self.entry(name).is_some_and(|e| whole.contains(&e.dtype))
    }

    /// What stays the same as long as the tensors do that are `wanted`: a hash of their names and values, the whole numbers
    /// among them left out.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn fingerprint(&self, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut eat = |bytes: &[u8]| {
            bytes.iter().for_each(|b| hash = (hash ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3));
        };
        for name in self.names().filter(|n| wanted(n) && !self.is_integer(n)) {
            eat(name.as_bytes());
            eat(bytemuck::cast_slice(&self.read_f32(name)?));
        }
        Ok(format!("{hash:016x}"))
    }

    /// An integer tensor as i64.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing or no integer tensor (I64 or I32).
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>> {
        let (entry, bytes) = self.bytes(name)?;
        convert::integers(entry, &bytes).map_err(|fault| self.fault(name, fault))
    }

    /// A tensor to be read row by row, by several threads at once; the system begins to fetch it.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, [`Error::File`] when the file has become shorter.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let (entry, bytes) = self.bytes(name)?;
        let (name, place) = self.tensors.get_key_value(name).ok_or_else(|| self.missing(name))?;
        Ok(Tensor { checkpoint: self, name, place, entry, bytes })
    }

    /// Tells the system that a tensor will be read soon.
    pub fn prefetch(&self, name: &str) {
        if let Some(p) = self.tensors.get(name) {
            self.maps[p.map].prefetch(p.range.clone());
        }
    }

    /// Gives the memory under a tensor back to the system, once it has been read. It can be read again.
    pub fn release(&self, name: &str) {
        if let Some(p) = self.tensors.get(name) {
            self.maps[p.map].release(p.range.clone());
        }
    }

    /// Gives all of the files' memory back: also what the system mapped around what was read, in pages as large as it likes. It can be read
    /// again.
    pub fn release_all(&self) {
        self.maps.iter().for_each(|map| map.release(0..map.len()));
    }

    /// A tensor's bytes as they are stored, gathered where only some rows of what the file holds are meant.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, [`Error::File`] when the file has become shorter.
    pub(crate) fn bytes(&self, name: &str) -> Result<(&Entry, Cow<'_, [u8]>)> {
        let p = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let map = &self.maps[p.map];
        map.prefetch(p.range.clone());
        let all = map.bytes(p.range.clone())?;
        let own = match p.rows {
            Some(rows) => Cow::Owned(rows.pick(&p.entry.shape, all)),
            None => Cow::Borrowed(all),
        };
        Ok((&p.entry, own))
    }

    fn missing(&self, name: &str) -> Error {
        let near = self.names().map(|n| (distance(n, name), n)).min();
        let near = near.map_or(String::new(), |(_, n)| format!("; the nearest name is `{n}`"));
        wrong(&self.path, name, "this tensor", format!("{} others{near}", self.len()))
    }

    fn fault(&self, name: &str, fault: convert::Fault) -> Error {
        let part = self.tensors.get(name).is_some_and(|p| p.rows.is_some());
        // Its rows lie among others: their numbers are those of the part.
        let of = if part { format!(" of the rows that are `{name}`") } else { String::new() };
        wrong(self.file(name), &self.stored_name(name), fault.want, format!("{}{of}", fault.got))
    }
}

/// A tensor in its file: any of its rows can be converted, at any time and by any thread.
pub struct Tensor<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    place: &'a Place,
    entry: &'a Entry,
    bytes: Cow<'a, [u8]>,
}

/// How far beyond what is touched the system maps a file, at most.
const AROUND: usize = 64 << 10;

impl Drop for Tensor<'_> {
    /// Lets go of what was mapped around the pieces that were read one by one.
    fn drop(&mut self) {
        let Range { start, end } = self.place.range;
        self.checkpoint.maps[self.place.map].release(start.saturating_sub(AROUND)..end + AROUND);
    }
}

impl Tensor<'_> {
    /// Converts the rows `rows` of the outermost axis to `dtype`, rounded to nearest, in this order, into `out`: bytes
    /// for just these rows, aligned to the type. Then gives the file's memory under them back to the system.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; the place of a value is its place in the file. Also when the rows are not there, or
    /// `out` has another size.
    pub fn rows(&self, rows: Range<usize>, dtype: DType, order: Order, out: &mut [u8]) -> Result<()> {
        let done = convert::rows(self.entry, &self.bytes, (dtype, order), rows.clone(), out);
        if matches!(self.bytes, Cow::Owned(_)) {
            // Gathered: the file's memory is let go when all rows are done.
            return done.map_err(|fault| self.checkpoint.fault(self.name, fault));
        }
        let row = self.bytes.len() / self.entry.shape.first().copied().unwrap_or(1).max(1);
        let at = |row_index: usize| self.place.range.start + row_index * row;
        self.checkpoint.maps[self.place.map].release(at(rows.start)..at(rows.end));
        done.map_err(|fault| self.checkpoint.fault(self.name, fault))
    }
}

fn wrong(file: &Path, name: &str, want: impl Into<String>, got: impl std::fmt::Display) -> Error {
    Error::Tensor { file: file.into(), name: name.into(), want: want.into(), got: got.to_string() }
}

/// The file in a component's folder that holds, or lists, its weights.
fn weights_of(folder: &Path) -> Result<PathBuf> {
    for variant in ["", ".fp16"] {
        for stem in STEMS {
            let file = folder.join(format!("{stem}{variant}.safetensors"));
            let index = folder.join(format!("{stem}.safetensors.index{variant}.json"));
            if let Some(found) = [file, index].into_iter().find(|p| p.is_file()) {
                return Ok(found);
            }
        }
    }
    let has = |name: &str| folder.join(name).is_file();
    let pickled = STEMS.iter().any(|s| has(&format!("{s}.bin"))) || has("pytorch_model.bin");
    Err(Error::file(
        folder,
        match () {
            () if has("model_index.json") => "want the folder of one component; got a whole pipeline",
            () if pickled => "its weights are a Python pickle (.bin); take or make their safetensors form",
            () => {
                "holds no weights: want diffusion_pytorch_model.safetensors, model.safetensors, or an index of shards"
            }
        },
    ))
}

/// What files call a type.
pub(crate) fn stored(dtype: DType) -> StoredType {
    match dtype {
        DType::F32 => StoredType::F32,
        DType::F16 => StoredType::F16,
        DType::BF16 => StoredType::BF16,
        DType::I32 => StoredType::I32,
    }
}

/// Bytes to be written.
pub(crate) enum Bytes<'a> {
    Stored(Cow<'a, [u8]>),
    Tensor(HostTensor),
}

impl AsRef<[u8]> for Bytes<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Bytes::Stored(bytes) => bytes,
            Bytes::Tensor(tensor) => tensor.bytes(),
        }
    }
}

/// A tensor to be written, whose bytes are made when their turn comes.
pub(crate) struct Piece<'a> {
    pub(crate) name: String,
    pub(crate) entry: Entry,
    pub(crate) bytes: Box<dyn Fn() -> Result<Bytes<'a>> + 'a>,
    /// After they have been written.
    pub(crate) done: Box<dyn Fn() + 'a>,
}

/// Writes a safetensors file, atomically. The same tensors give the same bytes: wider types first, then by name.
///
/// # Errors
/// [`Error::Invalid`] when a name comes twice or is reserved; [`Error::File`] when the file cannot be written.
pub fn save(
    path: impl AsRef<Path>,
    tensors: &[(String, HostTensor)],
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let pieces = tensors.iter().map(|(name, t)| Piece {
        name: name.clone(),
        entry: Entry { dtype: stored(t.spec().dtype), shape: t.shape().to_vec() },
        bytes: Box::new(|| Ok(Bytes::Stored(Cow::Borrowed(t.bytes())))),
        done: Box::new(|| ()),
    });
    write(path, pieces.collect(), metadata)
}

/// [`save`], for tensors that need not be in memory together.
///
/// # Errors
/// As there, and those of the tensors' bytes.
pub(crate) fn write(
    path: impl AsRef<Path>,
    mut order: Vec<Piece>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    order.sort_by(|a, b| {
        let key = |p: &Piece| std::cmp::Reverse(p.entry.dtype.bitsize());
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    let mut header = serde_json::Map::new();
    if let Some(notes) = metadata {
        let sorted: BTreeMap<String, String> = notes.into_iter().collect();
        header.insert("__metadata__".into(), serde_json::json!(sorted));
    }
    let mut end = 0;
    for Piece { name, entry, .. } in &order {
        let start = end;
        end += entry.bytes();
        let (dtype, shape) = (entry.dtype.to_string(), &entry.shape);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        if name == "__metadata__" || header.insert(name.clone(), entry).is_some() {
            return Err(Error::invalid(format!("tensor `{name}`: the name is reserved, or comes twice")));
        }
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // Aligns the data, so that other readers may use it in place.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    let mut fault = None;
    let written = atomic::write_with(path, |w| {
        w.write_all(&(text.len() as u64).to_le_bytes())?;
        w.write_all(text.as_bytes())?;
        order.iter().try_for_each(|piece| match (piece.bytes)() {
            Ok(bytes) => {
                let written = w.write_all(bytes.as_ref());
                drop(bytes);
                (piece.done)();
                written
            }
            Err(e) => {
                fault = Some(e);
                Err(std::io::Error::other("a tensor cannot be read"))
            }
        })
    });
    fault.map_or(written, Err)
}

#[cfg(test)]
mod tests;
