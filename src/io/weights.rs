//! Checkpoints in safetensors form: one file, or a folder of a diffusers or transformers component, in one piece or in
//! shards. Weights stay in the file until they are read, one tensor at a time, and their pages can be given back.

use super::config::Config;
use super::mmap::Map;
use super::words::distance;
use super::{atomic, convert, header};
use crate::error::{Error, Result};
use crate::tensor::{DType, HostTensor};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

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
}

#[derive(Debug)]
struct Place {
    entry: Entry,
    /// Index into `maps`.
    map: usize,
    range: Range<usize>,
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
            let place = Place { entry, map: self.maps.len(), range };
            if let Some(other) = self.tensors.insert(name.clone(), place) {
                let first = self.maps[other.map].path().display();
                return Err(wrong(file, &name, "each tensor in one shard", format!("it is in {first} too")));
            }
        }
        self.metadata.extend(header.metadata);
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
        convert::floats(entry, bytes).map_err(|fault| self.fault(name, fault))
    }

    /// A tensor in another element type, rounded to nearest: floats to f32, f16 or bf16, integers to i32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, of the other kind, has more than six axes, holds NaN or infinity, or
    /// a value that `dtype` cannot hold.
    pub fn read(&self, name: &str, dtype: DType) -> Result<HostTensor> {
        let (entry, bytes) = self.bytes(name)?;
        convert::tensor(entry, bytes, dtype).map_err(|fault| self.fault(name, fault))
    }

    /// Whether a tensor holds whole numbers.
    pub fn is_integer(&self, name: &str) -> bool {
        let whole = [StoredType::I64, StoredType::I32, StoredType::U8, StoredType::BOOL];
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
        convert::integers(entry, bytes).map_err(|fault| self.fault(name, fault))
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

    fn bytes(&self, name: &str) -> Result<(&Entry, &[u8])> {
        let p = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let map = &self.maps[p.map];
        map.prefetch(p.range.clone());
        Ok((&p.entry, map.bytes(p.range.clone())?))
    }

    fn missing(&self, name: &str) -> Error {
        let near = self.names().map(|n| (distance(n, name), n)).min();
        let near = near.map_or(String::new(), |(_, n)| format!("; the nearest name is `{n}`"));
        wrong(&self.path, name, "this tensor", format!("{} others{near}", self.len()))
    }

    fn fault(&self, name: &str, fault: convert::Fault) -> Error {
        wrong(self.file(name), name, fault.want, fault.got)
    }
}

/// A tensor in its file: any of its rows can be converted, at any time and by any thread.
pub struct Tensor<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    place: &'a Place,
    entry: &'a Entry,
    bytes: &'a [u8],
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
        let done = convert::rows(self.entry, self.bytes, (dtype, order), rows.clone(), out);
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

/// Writes a safetensors file, atomically. The same tensors give the same bytes: wider types first, then by name.
///
/// # Errors
/// [`Error::Invalid`] when a name comes twice or is reserved; [`Error::File`] when the file cannot be written.
pub fn save(
    path: impl AsRef<Path>,
    tensors: &[(String, HostTensor)],
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let mut order: Vec<&(String, HostTensor)> = tensors.iter().collect();
    order.sort_by_key(|(name, t)| (std::cmp::Reverse(t.spec().dtype.size()), name));
    let mut header = serde_json::Map::new();
    if let Some(notes) = metadata {
        let sorted: BTreeMap<String, String> = notes.into_iter().collect();
        header.insert("__metadata__".into(), serde_json::json!(sorted));
    }
    let mut end = 0;
    for (name, tensor) in &order {
        let spec = tensor.spec();
        let (start, shape) = (end, &spec.shape[..]);
        end += spec.bytes();
        let entry = serde_json::json!({
            "dtype": spec.dtype.name().to_uppercase(), "shape": shape, "data_offsets": [start, end],
        });
        if name == "__metadata__" || header.insert(name.clone(), entry).is_some() {
            return Err(Error::invalid(format!("tensor `{name}`: the name is reserved, or comes twice")));
        }
    }
    let mut text = serde_json::Value::Object(header).to_string();
    // Aligns the data, so that other readers may use it in place.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    atomic::write_with(path, |w| {
        w.write_all(&(text.len() as u64).to_le_bytes())?;
        w.write_all(text.as_bytes())?;
        order.iter().try_for_each(|(_, tensor)| w.write_all(tensor.bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::scratch::Scratch;
    use crate::tensor::{Data, Spec};
    use half::{bf16, f16};

    fn sample() -> Vec<(String, HostTensor)> {
        vec![
            (
                "c.half".into(),
                HostTensor::new([3], Data::F16([0.5, -2.0, 65504.0].map(f16::from_f32).into())).unwrap(),
            ),
            ("a.weight".into(), HostTensor::f32([2, 2], vec![1.0, 2.5, -3.0, 1e5]).unwrap()),
            ("b.brain".into(), HostTensor::new([1], Data::BF16(vec![bf16::from_f32(1.5)])).unwrap()),
            ("d.ids".into(), HostTensor::i32([2, 1], vec![7, -9]).unwrap()),
        ]
    }

    fn text<T: std::fmt::Debug>(r: Result<T>) -> String {
        r.unwrap_err().to_string()
    }

    #[test]
    fn threads_may_share_a_checkpoint() {
        fn shared<T: Send + Sync>() {}
        shared::<Checkpoint>();
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let dir = Scratch::new("weights");
        let path = dir.path().join("x.safetensors");
        let notes = HashMap::from([("format".to_string(), "pt".to_string()), ("a".into(), "ü".into())]);
        save(&path, &sample(), Some(notes.clone())).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        save(&path, &sample(), Some(notes.clone())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "the same bytes each time");
        assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());

        let c = Checkpoint::open(&path).unwrap();
        assert_eq!(c.names().collect::<Vec<_>>(), ["a.weight", "b.brain", "c.half", "d.ids"]);
        assert_eq!((c.metadata(), c.path(), c.file("a.weight"), c.len()), (&notes, &*path, &*path, 4));
        for (name, tensor) in sample() {
            assert_eq!(c.read(&name, tensor.spec().dtype).unwrap(), tensor);
            c.release(&name);
            assert_eq!(c.read(&name, tensor.spec().dtype).unwrap(), tensor, "after a release");
        }
        assert_eq!(c.entry("c.half"), Some(&Entry { dtype: StoredType::F16, shape: vec![3] }));
        assert_eq!(c.read_f32("c.half").unwrap(), [0.5, -2.0, 65504.0]);
        assert_eq!(c.read_i64("d.ids").unwrap(), [7, -9]);
        assert_eq!(c.dtypes()[&StoredType::F32], Total { tensors: 1, elements: 4, bytes: 16 });
        assert_eq!(c.dtypes().len(), 4);
    }

    #[test]
    fn errors_name_file_tensor_and_value() {
        let dir = Scratch::new("weights");
        let path = dir.path().join("x.safetensors");
        let mut tensors = sample();
        tensors.push(("bad".into(), HostTensor::f32([2, 3], vec![0., 0., 0., 0., f32::NAN, 0.]).unwrap()));
        save(&path, &tensors, None).unwrap();
        let c = Checkpoint::open(&path).unwrap();
        let at = format!("{}: tensor ", path.display());
        for (e, say) in [
            (
                text(c.read("a.weigth", DType::F32)),
                "`a.weigth`: want this tensor; got 5 others; the nearest name is `a.weight`",
            ),
            (text(c.read("bad", DType::F32)), "`bad`: want finite values; got NaN at [1, 1]"),
            (text(c.read_f32("bad")), "`bad`: want finite values; got NaN at [1, 1]"),
            (
                text(c.read("a.weight", DType::F16)),
                "`a.weight`: want values that f16 can hold; got 100000 at [1, 1]",
            ),
            (text(c.read("a.weight", DType::I32)), "`a.weight`: want I64 or I32; got F32"),
            (text(c.read("d.ids", DType::BF16)), "`d.ids`: want F32, F16, BF16 or F64; got I32"),
            (text(c.read_i64("c.half")), "`c.half`: want I64 or I32; got F16"),
        ] {
            assert!(e.starts_with(&at) && e.contains(say), "{e}");
        }
        let twice = [sample(), sample()].concat();
        assert!(text(save(&path, &twice, None)).contains("comes twice"));
        let reserved = [("__metadata__".to_string(), HostTensor::zeros(Spec::new(DType::F32, [1])))];
        assert!(text(save(&path, &reserved, None)).contains("reserved"));
        assert!(text(save(dir.path().join("no/x"), &sample(), None)).contains("does not exist"));
    }

    #[test]
    fn folders_are_searched_by_preference() {
        let dir = Scratch::new("weights");
        let folder = dir.path();
        assert!(
            text(Checkpoint::open(folder))
                .contains("holds no weights: want diffusion_pytorch_model.safetensors")
        );
        dir.file("diffusion_pytorch_model.bin", "x");
        assert!(text(Checkpoint::open(folder)).contains("pickle"));
        dir.file("model_index.json", "{}");
        assert!(text(Checkpoint::open(folder)).contains("whole pipeline"));
        let mut seen = vec![];
        for name in [
            "diffusion_pytorch_model.fp16.safetensors",
            "model.safetensors",
            "diffusion_pytorch_model.safetensors",
        ] {
            save(folder.join(name), &sample()[..1], None).unwrap();
            seen.push(Checkpoint::open(folder).unwrap().file("c.half").ends_with(name));
        }
        assert_eq!(seen, [true; 3]);
        assert!(text(Checkpoint::open(folder.join("none.safetensors"))).contains("cannot be opened"));
    }

    #[test]
    fn shards_are_one_checkpoint() {
        let dir = Scratch::new("weights");
        let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        let tensors = sample();
        save(dir.path().join(one), &tensors[..2], None).unwrap();
        save(dir.path().join(two), &tensors[2..], None).unwrap();
        let index = |map: serde_json::Value| {
            dir.file(
                "model.safetensors.index.json",
                serde_json::json!({"metadata": {}, "weight_map": map}).to_string(),
            );
            Checkpoint::open(dir.path())
        };
        let right = serde_json::json!({"a.weight": one, "c.half": one, "b.brain": two, "d.ids": two});
        let c = index(right.clone()).unwrap();
        assert!(c.file("d.ids").ends_with(two) && c.len() == 4);
        assert_eq!(c.read("d.ids", DType::I32).unwrap(), tensors[3].1);

        let with = |key: &str, value: serde_json::Value| {
            let mut map = right.clone();
            map[key] = value;
            text(index(map))
        };
        assert!(with("a.weight", two.into()).contains("`a.weight`: want this tensor in model-00002"));
        assert!(with("extra", one.into()).contains("`extra`: want this tensor in model-00001"));
        assert!(with("a.weight", "gone.safetensors".into()).contains("gone.safetensors: not found;"));
        assert!(
            with("a.weight", "../x.safetensors".into())
                .contains("weight_map.a.weight`: want the name of a file")
        );
        assert!(with("a.weight", "/etc/passwd".into()).contains("in the same folder"));
        assert!(with("a.weight", 3.into()).contains("want a string; got 3"));
        let mut fewer = right.clone();
        fewer.as_object_mut().unwrap().remove("d.ids");
        assert!(text(index(fewer)).contains("`d.ids`: want only tensors that the index lists"));
        assert!(text(index(serde_json::json!(null))).contains("`weight_map`: want an object"));

        save(dir.path().join(two), &tensors[1..], None).unwrap();
        assert!(text(index(right)).contains("`a.weight`: want each tensor in one shard"));
    }
}
